"""The training texts nearest to a text, by the characters and pairs of characters they share."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np


class Neighbours:
    """An index over training texts."""

    def __init__(self, texts: Sequence[str], labels: np.ndarray) -> None:
        """Args: texts and their labels ([n] int, -1 for none)."""
        self._texts, self._labels = texts, labels
        units: dict[str, int] = {}
        found: list[int] = []
        self._sizes = np.zeros(len(texts), dtype=np.int64)
        for row, text in enumerate(texts):
            own = [units.setdefault(unit, len(units)) for unit in _units(text)]
            self._sizes[row] = len(own)
            found += own
        self._units = units
        flat = np.array(found, dtype=np.int32)
        order = np.argsort(flat, kind="stable")
        self._rows = np.repeat(np.arange(len(texts), dtype=np.int32), self._sizes)[order]
        self._starts = np.searchsorted(flat[order], np.arange(len(units) + 1))

    def nearest(self, text: str, most: int = 3) -> list[tuple[str, int, float]]:
        """Text, label and similarity of the nearest training texts, the nearest first.

        The similarity is Dice's: twice the number of units both have over the sum of their
        numbers; units are the different characters and pairs of characters. Equal texts have 1;
        texts that share no unit are not near.
        """
        own = _units(text)
        places = [self._units[unit] for unit in own if unit in self._units]
        hits = [self._rows[self._starts[place] : self._starts[place + 1]] for place in places]
        if not hits:
            return []
        shared = np.bincount(np.concatenate(hits), minlength=len(self._texts))
        similar = 2 * shared / (len(own) + self._sizes)
        kept = min(most, len(similar))
        best = np.flatnonzero(similar >= np.partition(similar, -kept)[-kept])
        best = best[np.argsort(-similar[best], kind="stable")][:most]
        return [
            (self._texts[row], int(self._labels[row]), float(similar[row]))
            for row in best.tolist()
            if similar[row] > 0
        ]


def _units(text: str) -> list[str]:
    return list(dict.fromkeys([*text, *map("".join, pairwise(text))]))
