"""What is to be learned of each example: shares of labels, and how much it counts."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from launcher import targets
from prompting import scorer
from prompting.question import Question
from prompting.settings import TuningSettings


def of_examples(settings: TuningSettings, examples: pa.Table, labels: int) -> np.ndarray:
    """[examples, labels] float32: the shares to learn, or 1 for the label.

    Raises:
        InputError: an example has neither.
    """
    if settings.soft_targets:
        return targets.from_shares(examples, labels, "tuning.soft_targets")
    return targets.from_labels(examples, labels)


def class_weights(settings: TuningSettings, labels: Sequence[str]) -> Tensor:
    """[labels] float32; see `launcher.targets.class_weights`."""
    return targets.class_weights(settings.class_weights, labels, "tuning.class_weights")


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
