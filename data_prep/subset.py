"""Parts of a dataset that an experiment is about: some labels, or a held-out part of the train
split."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.dataset import SCHEMA, Dataset, read_dataset
from launcher.errors import InputError


def read_chosen(data: Any) -> Dataset:
    """The dataset that a config's `data` heading (`launcher.config.DataSettings`) asks for, except
    for `max_examples`; raises InputError as `read_dataset` and the functions below do."""
    names = data.file_labels or data.labels
    dataset = read_dataset(data.path, files=data.files(), labels=names)
    if data.keep_labels is not None:
        dataset = keep_labels(dataset, data.keep_labels)
    if data.hold_out is not None:
        dataset = hold_out(dataset, data.hold_out)
    return dataset


def keep_labels(dataset: Dataset, kept: Sequence[str] | int) -> Dataset:
    """Only the examples of some labels, which keep their order.

    Args:
        kept: their names, or how many: those most frequent in the train split, the first of equals.

    Shares of other labels are left out and the rest divided by its sum; an example without a label
    stays if something is left of its shares.

    Raises:
        InputError: a name is unknown, too many are asked for, or a split would be empty.
    """
    names = list(dataset.labels)
    places = _most_frequent(dataset, kept) if isinstance(kept, int) else _places(names, kept)
    # The last place stands for no label.
    renumbered = np.full(len(names) + 1, -1, dtype=np.int32)
    renumbered[places] = np.arange(len(places))
    splits = {name: _kept(split, places, renumbered) for name, split in dataset.splits.items()}
    if empty := [name for name, split in splits.items() if not len(split)]:
        raise InputError(f"data.keep_labels: no example is left in {', '.join(empty)}")
    grouping = None
    if dataset.grouping is not None:
        chosen = {names[place] for place in places}
        left = {g: [m for m in ms if m in chosen] for g, ms in dataset.grouping.items()}
        grouping = {group: members for group, members in left.items() if members}
    return replace(
        dataset,
        labels=tuple(names[place] for place in places),
        splits=splits,
        grouping=grouping,
        provenance={**dataset.provenance, "kept_of_labels": names},
    )


def hold_out(dataset: Dataset, share: float) -> Dataset:
    """A `share` of the train split, drawn once and for all, in place of the dev split.

    For choices that must not be made on the dev split. The draw depends on the number of examples
    alone, so that runs whose scores are combined hold out the same ones.

    Raises:
        InputError: there is no train split, or a part would be empty.
    """
    train = dataset.splits.get("train")
    count = 0 if train is None else round(share * len(train))
    if train is None or not 0 < count < len(train):
        raise InputError(
            f"data.hold_out: {share} of {0 if train is None else len(train)} train examples: "
            "expected at least one on both sides"
        )
    held = np.zeros(len(train), dtype=bool)
    held[np.random.default_rng(0).permutation(len(train))[:count]] = True
    parts = {"train": train.filter(pa.array(~held)), "dev": train.filter(pa.array(held))}
    provenance = {**dataset.provenance, "dev_held_out_of_train": share}
    return replace(dataset, splits={**dataset.splits, **parts}, provenance=provenance)


def _places(names: list[str], kept: Sequence[str]) -> list[int]:
    if unknown := [name for name in kept if name not in names]:
        raise InputError(
            f"data.keep_labels: {', '.join(unknown)}: no such label; the labels are "
            f"{', '.join(names)}"
        )
    return [place for place, name in enumerate(names) if name in kept]


def _most_frequent(dataset: Dataset, count: int) -> list[int]:
    train, names = dataset.splits.get("train"), dataset.labels
    if train is None or count > len(names):
        raise InputError(
            f"data.keep_labels: the {count} most frequent of {len(names)} labels"
            + (" need a train split" if train is None else "; expected at most as many")
        )
    seen = np.bincount(train["label"].drop_null().to_numpy(), minlength=len(names))
    return sorted(np.argsort(-seen, kind="stable")[:count].tolist())


def _kept(split: pa.Table, places: list[int], renumbered: np.ndarray) -> pa.Table:
    old = split["label"].fill_null(-1).to_numpy()
    label = renumbered[old]
    shares: list[list[float] | None] = []
    for row in split["distribution"].to_pylist():
        left = None if row is None else np.array([row[place] for place in places])
        total = 0.0 if left is None else float(left.sum())
        shares.append(None if left is None or total == 0 else (left / total).tolist())
    stays = (label >= 0) | ((old < 0) & np.array([row is not None for row in shares], dtype=bool))
    split = split.set_column(
        split.column_names.index("label"), "label", pa.array(label, pa.int32(), mask=label < 0)
    )
    split = split.set_column(
        split.column_names.index("distribution"),
        "distribution",
        pa.array(shares, SCHEMA.field("distribution").type),
    )
    return split.filter(pa.array(stays)).cast(SCHEMA)
