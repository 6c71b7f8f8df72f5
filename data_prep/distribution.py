"""Label sets over the zones, and each unit's distribution over the labels of a set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_prep.sources import listed, read_json
from data_prep.zones import (
    FIRST_LEVEL_ZONES,
    MAIN_CATEGORIES,
    Zone,
    first_level_of,
    zone_ids,
    zones,
)
from launcher.errors import InputError

GENERAL = "general"
STUDY6 = ("动画", "游戏", "科技", "生活", "美食")
"""The five zones of the study's 6-class set; the sixth class is `GENERAL`."""
STUDY6_GENERAL = 3
UNKNOWN = "unknown"


@dataclass(frozen=True)
class LabelSet:
    """Categories to count in, and the labels made of them.

    `categories` are counted; `of_zone` gives the category of a zone id of either tree. `general`: a
    unit that occurs in more categories than this is labelled `GENERAL`. `chosen`: of the other
    units only those are kept whose category is one of these.
    """

    categories: tuple[str, ...]
    of_zone: Mapping[int, int]
    grouping: dict[str, list[str]] | None = None
    general: int | None = None
    chosen: tuple[str, ...] | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """Names in order: the (chosen) categories, then `GENERAL` if there is one."""
        return (self.chosen or self.categories) + ((GENERAL,) if self.general is not None else ())

    @property
    def label_grouping(self) -> dict[str, list[str]] | None:
        """The labels by main category, `GENERAL` by itself."""
        if self.grouping is None or self.chosen is not None:
            return None
        return self.grouping | ({GENERAL: [GENERAL]} if self.general is not None else {})

    def category(self, tid: int | None, tid_v2: int | None) -> int | None:
        """Index of a video's category: by its zone of 2022, else of 2025, else `UNKNOWN`'s."""
        for zone in (tid, tid_v2):
            if zone is not None and zone in self.of_zone:
                return self.of_zone[zone]
        return self.categories.index(UNKNOWN) if self.categories[-1] == UNKNOWN else None


def label_set(name: str, *, general: int | None = None, keep_unknown: bool = False) -> LabelSet:
    """A label set by name or from a JSON file `{"label": [zone ids or first-level names], ...}`.

    zones126: the ids of August 2021 that the study counted in, first-level ones among them; a
    second-level zone's name is `first/second`. zones21: their first-level zones. main5: the study's
    five main categories. zones31: the first-level zones of 2025. study6: its 6-class set, counted
    in zones21. A file's first-level zone stands for all below it that the file doesn't name.
    `keep_unknown` adds a last category for videos whose zone is in no other.

    Raises InputError for an unknown name, a file of another form, or `general` below 1.
    """
    if general is not None and general < 1:
        raise InputError(f"--general: {general}; expected the most categories of a label, from 1")
    if name == "study6":
        if general is not None or keep_unknown:
            given = "--general" if general is not None else "--keep-unknown"
            raise InputError(f"--labels study6 fixes the classes; leave out {given}")
        return replace(_zones21(), general=STUDY6_GENERAL, chosen=STUDY6)
    makers = {"zones126": _zones126, "zones21": _zones21, "main5": _main5, "zones31": _zones31}
    made = makers[name]() if name in makers else _from_file(Path(name), [*makers, "study6"])
    if keep_unknown:
        grouping = made.grouping and made.grouping | {UNKNOWN: [UNKNOWN]}
        made = replace(made, categories=(*made.categories, UNKNOWN), grouping=grouping)
    return replace(made, general=general)


def label_units(counts: np.ndarray, labels: LabelSet) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each unit's distribution over the labels and its single label.

    `counts` is how often each unit occurs in each category, int64 [units, categories], no row
    without any. A share is the label's part of the unit's occurrences in labels; a general unit is
    wholly general. The single label has the largest share, of equal ones the first in order.

    Returns which units are kept, bool [units]; of these the label's index, int32 [kept], and the
    shares, float32 [kept, labels].
    """
    general = np.zeros(len(counts), dtype=bool)
    if labels.general is not None:
        general = (counts > 0).sum(axis=1) > labels.general
    kept = np.ones(len(counts), dtype=bool)
    if labels.chosen is not None:
        columns = [labels.categories.index(name) for name in labels.chosen]
        kept = general | np.isin(counts.argmax(axis=1), columns)
        counts, general = counts[kept][:, columns], general[kept]
    label = counts.argmax(axis=1).astype(np.int32)
    totals = counts.sum(axis=1, keepdims=True)
    shares = (counts / np.maximum(totals, 1)).astype(np.float32)
    if labels.general is not None:
        label[general], shares[general] = len(labels.labels) - 1, 0
        shares = np.column_stack([shares, general.astype(np.float32)])
    return kept, label, shares


def _zones126() -> LabelSet:
    tree, ids = zones("v1"), zone_ids("2021-08")
    names = {tid: _name_in_2021(tree[tid]) for tid in ids}
    grouping: dict[str, list[str]] = {name: [] for name in FIRST_LEVEL_ZONES}
    for tid in ids:
        parent = tree[tid].parent
        top = names[tid if parent is None else parent]
        if parent is not None:
            names[tid] = f"{top}/{names[tid]}"
        grouping[top].append(names[tid])
    return LabelSet(tuple(names.values()), {tid: i for i, tid in enumerate(ids)}, grouping)


def _zones21() -> LabelSet:
    index = {name: index for index, name in enumerate(FIRST_LEVEL_ZONES)}
    tops = {tid: first_level_of(tid) for tid in zones("v1")}
    of_zone = {tid: index[top] for tid, top in tops.items() if top in index}
    return LabelSet(FIRST_LEVEL_ZONES, of_zone, MAIN_CATEGORIES)


def _main5() -> LabelSet:
    main = [
        index
        for zone in FIRST_LEVEL_ZONES
        for index, members in enumerate(MAIN_CATEGORIES.values())
        if zone in members
    ]
    of_zone = {tid: main[zone] for tid, zone in _zones21().of_zone.items()}
    return LabelSet(tuple(MAIN_CATEGORIES), of_zone)


def _zones31() -> LabelSet:
    tree = zones("v2")
    tops = [tid for tid, zone in tree.items() if zone.parent is None]
    of_zone = {
        tid: tops.index(tid if zone.parent is None else zone.parent) for tid, zone in tree.items()
    }
    return LabelSet(tuple(tree[tid].name for tid in tops), of_zone)


def _name_in_2021(zone: Zone) -> str:
    return (zone.named or {}).get("2021-08", zone.name)


def _from_file(file: Path, names: Sequence[str]) -> LabelSet:
    if not file.exists():
        raise InputError(f"--labels: {file}: no such file, and not one of {listed(names)}")
    mapping = read_json(file)
    if (
        not isinstance(mapping, dict)
        or len(mapping) < 2
        or not all(name.strip() and isinstance(ids, list) and ids for name, ids in mapping.items())
    ):
        raise InputError(
            f'{file}: expected {{"label": [zone ids or first-level names], ...}}, two or more'
        )
    by_name = {zone.name: tid for tid, zone in zones("v1").items() if zone.parent is None}
    known = {**zones("v1"), **zones("v2")}
    of_zone: dict[int, int] = {}
    problems = []
    for index, (name, members) in enumerate(mapping.items()):
        for member in members:
            tid = by_name.get(member) if isinstance(member, str) else member
            if not isinstance(tid, int) or tid not in known:
                problems.append(
                    f"{file}: {name}: {member!r} is neither a zone id nor one of {listed(by_name)}"
                )
            elif of_zone.setdefault(tid, index) != index:
                problems.append(f"{file}: zone {member!r} stands under two labels")
    if problems:
        raise InputError("\n".join(problems))
    below = {tid: of_zone[zone.parent] for tid, zone in known.items() if zone.parent in of_zone}
    return LabelSet(tuple(mapping), below | of_zone)
