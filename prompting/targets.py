"""What is to be learned of each example: shares of labels, and how much it counts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from launcher.errors import InputError
from prompting import scorer
from prompting.question import Question
from prompting.settings import TuningSettings


def targets(settings: TuningSettings, examples: pa.Table, labels: int) -> np.ndarray:
    """[examples, labels] float32: the shares to learn, or 1 for the label.

    Raises:
        InputError: an example has neither.
    """
    if settings.soft_targets:
        column = examples["distribution"]
        if column.null_count:
            raise InputError(
                f"tuning.soft_targets: {column.null_count} of {len(examples)} examples have no "
                "distribution: leave soft_targets out, or use data that has it"
            )
        shares = np.array(column.to_pylist(), dtype=np.float32).reshape(-1, labels)
        return shares / shares.sum(axis=1, keepdims=True)
    column = examples["label"]
    if column.null_count:
        raise InputError(
            f"data: {column.null_count} of {len(examples)} examples to learn from have no "
            "label: leave them out"
        )
    return np.eye(labels, dtype=np.float32)[column.to_numpy()]


def balanced(dataset: Any) -> dict[str, float]:
    """Class weights in inverse proportion to the labels' frequencies in the train split."""
    counts = np.bincount(
        dataset.splits["train"]["label"].drop_null().to_numpy(), minlength=len(dataset.labels)
    )
    if not counts.all():
        missing = dataset.labels[int(counts.argmin())]
        raise InputError(
            f"tuning.class_weights: balanced, but the train split has no example of {missing!r}"
        )
    weights = counts.sum() / (len(counts) * counts)
    return dict(zip(dataset.labels, weights.round(6).tolist(), strict=True))


def class_weights(settings: TuningSettings, labels: Sequence[str]) -> Tensor:
    """[labels] float32."""
    given = settings.class_weights if isinstance(settings.class_weights, dict) else {}
    return torch.tensor([given.get(label, 1.0) for label in labels])


class TuningBatch:
    """Prompts padded in front, and what is to be learned of each."""

    def __init__(self, batch: scorer.ScoringBatch, targets: np.ndarray) -> None:
        self.ids, self.pads = batch.ids, batch.pads
        self.targets = torch.from_numpy(targets)
        """[rows, labels] float32."""


class Examples:
    """The examples of an epoch; see `launcher.method.TrainingSet`."""

    def __init__(
        self,
        settings: TuningSettings,
        asked: Question,
        names: list[str],
        suffixes: list[list[int]],
        shares: np.ndarray,
    ) -> None:
        self.names, self.suffixes, self.shares = names, suffixes, shares
        fed = len(asked.trie.tokens)
        self.lengths = np.array([len(ids) + fed for ids in suffixes])
        each = class_weights(settings, asked.labels).numpy().astype(np.float64)
        if settings.objective == "language_modelling":
            # The mean is over the answers' tokens.
            words = dict(zip(asked.owners[::-1], asked.trie.words[::-1], strict=True))
            each = each * [len(words[label]) for label in range(len(each))]
        self.weights = shares.astype(np.float64) @ each

    def batch(self, rows: Sequence[int]) -> TuningBatch:
        """The examples `rows` as one micro batch."""
        padded = scorer.left_padded([self.suffixes[row] for row in rows], rows)
        return TuningBatch(padded, self.shares[list(rows)])
