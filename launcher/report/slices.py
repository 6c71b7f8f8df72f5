"""Where runs are right: accuracy on parts of the examples."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.meaningless import reasons
from data_prep.relatives import has_relative
from launcher.report.data import Data
from launcher.report.leaderboard import entries_of
from launcher.report.runs import Examples, Group
from launcher.report.tables import Cell, Estimate, Table

_LENGTHS = [1, 2, 3, 4, 5, 6, 7, 9, 13, 21, 51]
_FREQUENCIES = [1, 2, 3, 5, 10, 30, 100, 1000]
_CATEGORIES = [1, 2, 3, 4, 5, 6, 11]
_Z = 1.959963984540054


@dataclass(frozen=True)
class Slicing:
    """Parts of the examples that have something in common."""

    key: str
    title: str
    parts: list[tuple[str, np.ndarray]]  # name and [n] bool
    note: str = ""
    ordered: bool = False


def wilson(right: int, n: int) -> Estimate:
    """A share with its 95 % score interval, which holds for few examples too (Wilson 1927)."""
    share, z = right / n, _Z
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Estimate(share, float(max(0, middle - half)), float(min(1, middle + half)))


def slicings(examples: Examples, data: Data) -> tuple[list[Slicing], list[str]]:
    """All slicings that can be made, and a sentence for each that can't."""
    lengths = np.fromiter(map(len, examples.texts), np.int64, len(examples))
    found = [_ranges("length", "Text length in characters", lengths, _LENGTHS)]
    lacks = []

    frequency = data.column(examples, "frequency")
    if frequency is None:
        lacks.append(f"Accuracy by frequency: {_lack(data)}")
    elif (frequency == frequency[:1]).all():
        lacks.append("Accuracy by frequency: all texts have the same frequency in the data.")
    else:
        found.append(_ranges("frequency", "Frequency of the text", frequency, _FREQUENCIES))

    if examples.spread:
        number = (examples.shares > 0).sum(axis=1)
        title = "Categories in which the text occurs"
        found.append(_ranges("categories", title, number, _CATEGORIES))
    else:
        lacks.append(
            "Accuracy by number of categories: every gold distribution has a single category."
        )

    train = data.train()
    if train is None:
        why = "the data have no train split." if data.dataset else _lack(data)
        lacks.append(f"Accuracy with and without relatives in the training set: {why}")
    else:
        related = has_relative(examples.texts.tolist(), train[0])
        found.append(
            Slicing(
                "relatives",
                "Relatives in the training set",
                _parts([("with a relative", related), ("without", ~related)]),
                "A relative contains the text or is contained in it; what is learned from it is "
                "remembered rather than understood.",
            )
        )
    why_not = np.array(reasons(examples.texts.tolist()), dtype=object)
    said = np.array([why is None for why in why_not], dtype=bool)
    kinds = [(str(kind), why_not == kind) for kind in sorted(set(why_not[~said].tolist()))]
    if kinds:
        note = "By the rule that finds chats which say nothing, from the text alone."
        parts = _parts([("says something", said), ("says nothing", ~said), *kinds])
        found.append(Slicing("meaningless", "Meaningless chats", parts, note))
    else:
        lacks.append("Accuracy without meaningless chats: the filter finds none among the texts.")
    return found, lacks


def table_of(group: Group, slicing: Slicing) -> Table:
    """Acc@1 of each row of the leaderboard in each part."""
    right = [one.right() for one in group.answers()]
    entries = entries_of(group)
    rows: list[list[Cell]] = []
    for name, mask in slicing.parts:
        n = int(mask.sum())
        figures: list[Cell] = []
        for entry in entries:
            hits = [int((right[place] & mask).sum()) for place in entry.places]
            figures.append(wilson(hits[0], n) if len(hits) == 1 else _over_seeds(hits, n))
        rows.append([name, n, *figures])
    return Table(
        caption=f"{group.split}: Acc@1 by {slicing.title[0].lower()}{slicing.title[1:]}",
        header=["part", "n", *(entry.name for entry in entries)],
        rows=rows,
        notes=[slicing.note] if slicing.note else [],
        file="slices",
        context={"split": group.split, "by": slicing.key},
    )


def _over_seeds(hits: Sequence[int], n: int) -> Estimate:
    return Estimate(float(np.mean(hits)) / n, sd=float(np.std(hits, ddof=1)) / n)


def _ranges(key: str, title: str, values: np.ndarray, starts: Sequence[int]) -> Slicing:
    """Parts from each start to before the next one."""
    parts = []
    for place, start in enumerate(starts):
        if place + 1 == len(starts):
            parts.append((f"{start}+", values >= start))
        else:
            end = starts[place + 1]
            name = str(start) if end == start + 1 else f"{start}–{end - 1}"
            parts.append((name, (values >= start) & (values < end)))
    return Slicing(key, title, _parts(parts), ordered=True)


def _parts(parts: Sequence[tuple[str, np.ndarray]]) -> list[tuple[str, np.ndarray]]:
    return [(name, mask) for name, mask in parts if mask.any()]


def _lack(data: Data) -> str:
    return data.lack or "the examples are not found in the data by id and text."
