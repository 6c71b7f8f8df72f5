"""The ways of fine-tuning that `benchmarks.finetune` times ours against, all by transformers."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import trainer
from launcher.cpu_linear import onednn_linear

Feature = dict[str, Any]
"""An example: its `input_ids`, and its label as `labels`."""
Order = Callable[[np.ndarray, int], list[np.ndarray]]
"""From the examples' lengths and a batch's size to the rows of each step."""

FIXED_LENGTH = 128
_PAD = 0


@dataclass(frozen=True)
class Peer:
    """How examples are ordered and padded, and on which kernels."""

    order: Order
    collate: Callable[[Sequence[Feature]], dict[str, Tensor]]
    onednn: bool = False

    def train(
        self,
        model: PreTrainedModel,
        steps: Sequence[Sequence[Feature]],
        lr: float,
        weight_decay: float,
        clip: float,
    ) -> None:
        """An optimizer step for each list of examples, by transformers' Trainer."""
        with onednn_linear(model) if self.onednn else nullcontext():
            trainer.train(model, steps, self.collate, lr=lr, weight_decay=weight_decay, clip=clip)


def at_random(lengths: np.ndarray, batch: int) -> list[np.ndarray]:
    """Trainer's own order."""
    order = np.random.default_rng(0).permutation(len(lengths))
    return [order[start : start + batch] for start in range(0, len(order), batch)]


def to_the_longest(step: Sequence[Feature]) -> dict[str, Tensor]:
    return _padded(step, max(len(feature["input_ids"]) for feature in step))


def to_the_fixed_length(step: Sequence[Feature]) -> dict[str, Tensor]:
    return _padded(step, FIXED_LENGTH)


PEERS = {
    "fixed 128": Peer(at_random, to_the_fixed_length),
    "dynamic": Peer(at_random, to_the_longest),
    "grouped": Peer(trainer.grouped_by_length, to_the_longest),
    "grouped oneDNN": Peer(trainer.grouped_by_length, to_the_longest, onednn=True),
}


def _padded(step: Sequence[Feature], length: int) -> dict[str, Tensor]:
    rows = [feature["input_ids"] for feature in step]
    return {
        "input_ids": torch.tensor([row + [_PAD] * (length - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(r) + [0] * (length - len(r)) for r in rows]),
        "labels": torch.tensor([feature["labels"] for feature in step]),
    }
