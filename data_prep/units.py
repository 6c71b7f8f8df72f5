"""The rows of a dataset, made from counts a part at a time: all at once they would not fit."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.counting import Counts
from data_prep.dataset import SCHEMA
from data_prep.distribution import LabelSet, label_units

_ROWS_AT_A_TIME = 1 << 16


class Units:
    """Units with their splits: a row per unit, or per unit and split where videos are split.

    `kept` is False for rows of no class; `split` -1 for rows of no split; bool and int8 [rows].
    """

    def __init__(self, counts: Counts, labels: LabelSet, splits: int) -> None:
        self._counts, self._labels = counts, labels
        key = counts.unit * splits + counts.cell // len(labels.categories)
        self._starts = np.flatnonzero(np.diff(key, prepend=-1))
        self._lengths = np.diff(self._starts, append=len(key))
        self.unit = counts.unit[self._starts]
        self.split = (key[self._starts] % splits).astype(np.int8)
        self.kept = np.ones(len(self.unit), dtype=bool)
        if labels.chosen is not None:
            for rows in _parts(np.arange(len(self.unit))):
                self.kept[rows] = label_units(self._dense(rows), labels)[0]

    @property
    def texts(self) -> pa.Array:
        """Text of each row."""
        return self._counts.units.take(pa.array(self.unit))

    def table(self, rows: np.ndarray, split: str, videos: pa.Array) -> pa.Table:
        """Rows of the dataset, in the order of `rows`."""
        batches = []
        for start, part in enumerate(_parts(rows)):
            _, label, shares = label_units(self._dense(part), self._labels)
            entries, offsets = self._entries(part)
            first, last = (
                reduce.reduceat(each[entries], offsets)
                for reduce, each in (
                    (np.minimum, self._counts.first_video),
                    (np.maximum, self._counts.last_video),
                )
            )
            number = pa.array(np.arange(len(part)) + start * _ROWS_AT_A_TIME).cast(pa.string())
            ends = np.arange(0, shares.size + 1, shares.shape[1], dtype=np.int32)
            columns = {
                "id": pc.binary_join_element_wise(split, number, "-"),
                "text": self._counts.units.take(pa.array(self.unit[part])),
                "label": label,
                "distribution": pa.ListArray.from_arrays(ends, shares.ravel()),
                "group": pc.if_else(pa.array(first == last), videos.take(pa.array(first)), None),
                "frequency": np.add.reduceat(self._counts.frequency[entries], offsets),
            }
            batches.append(pa.record_batch(columns, schema=SCHEMA))
        return pa.Table.from_batches(batches, SCHEMA)

    def _dense(self, rows: np.ndarray) -> np.ndarray:
        """How often each of `rows` occurs in each category, int64 [rows, categories]."""
        entries, _ = self._entries(rows)
        categories = len(self._labels.categories)
        counts = np.zeros((len(rows), categories), np.int64)
        row = np.repeat(np.arange(len(rows)), self._lengths[rows])
        counts[row, self._counts.cell[entries] % categories] = self._counts.frequency[entries]
        return counts

    def _entries(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the entries of `rows`, one row after another, and where each row's begin."""
        length = self._lengths[rows]
        offsets = np.cumsum(length) - length
        return np.arange(length.sum()) + np.repeat(self._starts[rows] - offsets, length), offsets


def _parts(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[at : at + _ROWS_AT_A_TIME] for at in range(0, len(rows), _ROWS_AT_A_TIME)]
