"""Labels at several levels, for example zones and the main categories that they belong to.

Only the labels themselves have scores; a group's probability is the sum of its members'. So levels
can't contradict each other: no group is less likely than one of its members.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from finetune.settings import LevelSettings
from launcher.errors import InputError

Grouping = dict[str, list[str]]


def resolve(
    levels: Mapping[str, LevelSettings], labels: Sequence[str], given: Grouping | None
) -> dict[str, LevelSettings]:
    """The levels with every group's members written out as labels.

    Args:
        given: the dataset's own grouping, for the level that has none.

    Raises:
        InputError: a level has no grouping, or one that does not have each label exactly once.
    """
    resolved: dict[str, LevelSettings] = {}
    groups: dict[str, list[str]] = {}
    for name, level in levels.items():
        grouping = given if level.grouping is None else level.grouping
        if grouping is None:
            raise InputError(
                f"finetune.levels.{name}: no grouping, and the dataset's labels.json has none: "
                "give one, as in {group: [label, ...]}"
            )
        # A label's own name comes first: 生活 may be a zone and a main category.
        written = {
            group: [
                label
                for member in members
                for label in ([member] if member in labels else groups.get(member, [member]))
            ]
            for group, members in grouping.items()
        }
        _check(name, written, labels)
        groups |= written
        resolved[name] = level.model_copy(update={"grouping": written})
    return resolved


def memberships(levels: Mapping[str, LevelSettings], labels: Sequence[str]) -> list[Tensor]:
    """For each resolved level [labels, groups] bool: whether the label is in the group."""
    found = []
    for level in levels.values():
        assert level.grouping is not None, "resolve() fills it in"
        columns = [[label in members for label in labels] for members in level.grouping.values()]
        found.append(torch.tensor(columns).T)
    return found


def roll_up(log_probs: Tensor, membership: Tensor) -> Tensor:
    """[rows, labels] log-probabilities to [rows, groups]."""
    outside = torch.zeros(membership.shape).masked_fill(~membership, -torch.inf)
    return (log_probs[:, :, None] + outside.to(log_probs.device)).logsumexp(dim=1)


def _check(name: str, grouping: Grouping, labels: Sequence[str]) -> None:
    members = [member for group in grouping.values() for member in group]
    twice = sorted({member for member in members if members.count(member) > 1})
    missing = [label for label in labels if label not in members]
    unknown = [member for member in members if member not in labels]
    for what, names in (
        ("has members that are no labels or groups", unknown),
        ("has labels in more than one place", twice),
        ("lacks labels", missing),
    ):
        if names:
            raise InputError(
                f"finetune.levels.{name}: {what}: {', '.join(names[:8])}; expected each of the "
                f"{len(labels)} labels in exactly one group"
            )
    if not all(grouping.values()):
        raise InputError(f"finetune.levels.{name}: a group has no members: leave it out")
