"""Texts that occur twice: within a split, and between splits that should be strangers."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.audit.chats import Chats
from data_prep.dataset import SPLITS, Dataset
from data_prep.relatives import has_relative


def duplicates(chats: Chats) -> dict[str, dict[str, int]]:
    """Per split, the rows whose text an earlier row has: as it is, and in normal form."""
    return {
        split: {
            "exact": len(rows) - len(np.unique(rows)),
            "normalised": len(rows) - len(np.unique(chats.forms[rows])),
        }
        for split, rows in chats.rows.items()
    }


def leaks(dataset: Dataset, chats: Chats) -> list[dict[str, Any]]:
    """For each split and each before it (train, dev, test): how many rows have a double there.

    Counts the rows of `split` by what they share with `against`: the text (`exact`), its normal
    form (`normalised`), the text or a longer or shorter form of it (`substring`: one contains the
    other), the video (`video`; None where no row names one).
    """
    splits = [split for split in SPLITS if split in dataset.splits]
    found = []
    for later, split in enumerate(splits):
        rows = chats.rows[split]
        own = np.unique(rows)
        for against in splits[:later]:
            theirs = np.unique(chats.rows[against])
            related = np.zeros(len(chats.texts), bool)
            related[own] = has_relative(_texts(chats, own), _texts(chats, theirs))
            found.append(
                {
                    "split": split,
                    "against": against,
                    "texts": len(rows),
                    "exact": int(np.isin(rows, theirs).sum()),
                    "normalised": int(np.isin(chats.forms[rows], chats.forms[theirs]).sum()),
                    "substring": int(related[rows].sum()),
                    "video": _shared_videos(dataset.splits[split], dataset.splits[against]),
                }
            )
    return found


def _texts(chats: Chats, indices: np.ndarray) -> list[str]:
    return [chats.texts[index] for index in indices.tolist()]


def _shared_videos(table: pa.Table, other: pa.Table) -> int | None:
    videos = pc.drop_null(other["group"].combine_chunks()).unique()
    if not len(videos) or table["group"].null_count == table.num_rows:
        return None
    shared = pc.is_in(table["group"], value_set=videos)  # a null is in no set without nulls
    return int(pc.sum(shared).as_py())
