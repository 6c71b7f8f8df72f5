"""The distinct texts of a dataset, and how often each occurs where."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.clean import normal_form
from data_prep.dataset import Dataset

_ROWS_AT_A_TIME = 65_536


@dataclass(frozen=True)
class Chats:
    """Distinct texts over all splits, in order of first appearance.

    `rows` has, for each row of a split, the index of its text; `labels` its label, -1 where it has
    none (the label with the largest share where only a distribution is given).

    Per text: `forms`, the index of its normal form, int32 [texts]; over all rows, `frequency`, how
    often it was seen, int64 [texts], and `counts`, how often in each category, float32
    [texts, labels]: a row's frequency is spread by its distribution, or else goes to its label.
    `frequency_known` is whether any row says that it was seen more than once.
    """

    texts: list[str]
    forms: np.ndarray
    rows: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    frequency: np.ndarray
    counts: np.ndarray
    frequency_known: bool


def collect(dataset: Dataset) -> Chats:
    """Count the texts of all splits."""
    columns = [table["text"] for table in dataset.splits.values()]
    chunks = [chunk for column in columns for chunk in column.chunks]
    encoded = pa.chunked_array(chunks).combine_chunks().dictionary_encode()
    texts = encoded.dictionary.to_pylist()
    indices = encoded.indices.to_numpy()
    ends = np.cumsum([len(column) for column in columns])
    rows = dict(zip(dataset.splits, np.split(indices, ends[:-1]), strict=True))

    labels: dict[str, np.ndarray] = {}
    frequency_known = False
    frequency = np.zeros(len(texts), np.int64)
    counts = np.zeros((len(texts), len(dataset.labels)), np.float32)
    for split, table in dataset.splits.items():
        known = []
        for start in range(0, table.num_rows, _ROWS_AT_A_TIME):
            part = table.slice(start, _ROWS_AT_A_TIME)
            where = rows[split][start : start + _ROWS_AT_A_TIME]
            seen = part["frequency"].to_numpy()
            shares, label = _shares(part, len(dataset.labels))
            frequency_known |= bool((seen > 1).any())
            np.add.at(frequency, where, seen)
            np.add.at(counts, where, shares * seen[:, None].astype(np.float32))
            known.append(label)
        labels[split] = np.concatenate(known)
    forms = normal_form(encoded.dictionary).dictionary_encode().indices.to_numpy()
    return Chats(texts, forms, rows, labels, frequency, counts, frequency_known)


def _shares(table: pa.Table, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Share of each category per row, all 0 for a row without any; and its label or -1."""
    label = pc.fill_null(table["label"], -1).to_numpy().copy()
    spread = table["distribution"].is_valid().to_numpy()
    shares = np.zeros((table.num_rows, count), np.float32)
    flat = pc.list_flatten(table["distribution"]).to_numpy().reshape(-1, count)
    shares[spread] = flat
    single = np.flatnonzero(~spread & (label >= 0))
    shares[single, label[single]] = 1
    missing = spread & (label < 0)
    label[missing] = shares[missing].argmax(axis=1)
    return shares, label
