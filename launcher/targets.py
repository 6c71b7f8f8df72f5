"""What a training example is to be given: its label or its shares, and what each label counts."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from launcher.errors import InputError


def from_labels(examples: pa.Table, labels: int) -> np.ndarray:
    """[examples, labels] float32: 1 for the label, 0 elsewhere.

    Raises:
        InputError: an example has no label.
    """
    column = examples["label"]
    if column.null_count:
        raise InputError(
            f"data: {column.null_count} of {len(examples)} examples to learn from have no label: "
            "leave them out"
        )
    return np.eye(labels, dtype=np.float32)[column.to_numpy()]


def from_shares(examples: pa.Table, labels: int, key: str) -> np.ndarray:
    """[examples, labels] float32: the shares, adding up to 1.

    Args:
        key: of the config, what asks for them.

    Raises:
        InputError: an example has no distribution.
    """
    column = examples["distribution"]
    if column.null_count:
        raise InputError(
            f"{key}: {column.null_count} of {len(examples)} examples have no distribution: leave "
            f"{key.rpartition('.')[2]} out, or use data that has it"
        )
    shares = np.array(column.to_pylist(), dtype=np.float32).reshape(-1, labels)
    return shares / shares.sum(axis=1, keepdims=True)


def balanced(dataset: Any, key: str) -> dict[str, float]:
    """Class weights in inverse proportion to the labels' frequencies in the train split.

    Raises:
        InputError: a label has no example there.
    """
    labels = dataset.splits["train"]["label"].drop_null().to_numpy()
    counts = np.bincount(labels, minlength=len(dataset.labels))
    if not counts.all():
        missing = dataset.labels[int(counts.argmin())]
        raise InputError(f"{key}: balanced, but the train split has no example of {missing!r}")
    weights = counts.sum() / (len(counts) * counts)
    return dict(zip(dataset.labels, weights.round(6).tolist(), strict=True))


def class_weights(
    given: dict[str, float] | Literal["none", "balanced"], labels: Sequence[str], key: str
) -> Tensor:
    """[labels] float32; labels that are not named count 1.

    Raises:
        InputError: a name is no label.
    """
    named = given if isinstance(given, dict) else {}
    for name in named:
        if name not in labels:
            raise InputError(f"{key}: {name!r} is no label; the labels are {', '.join(labels)}")
    return torch.tensor([named.get(label, 1.0) for label in labels])
