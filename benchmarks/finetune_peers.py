"""The ways of fine-tuning that `benchmarks.finetune` times ours against, all by transformers."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

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
        if self.onednn:
            with onednn_linear(model):
                _train(self, model, steps, lr, weight_decay, clip)
        else:
            _train(self, model, steps, lr, weight_decay, clip)


def at_random(lengths: np.ndarray, batch: int) -> list[np.ndarray]:
    """Trainer's own order."""
    order = np.random.default_rng(0).permutation(len(lengths))
    return [order[start : start + batch] for start in range(0, len(order), batch)]


def grouped_by_length(lengths: np.ndarray, batch: int) -> list[np.ndarray]:
    """Trainer's order with `train_sampling_strategy="group_by_length"`."""
    generator = torch.Generator().manual_seed(0)
    order = np.array([*LengthGroupedSampler(batch, lengths=lengths.tolist(), generator=generator)])
    return [order[start : start + batch] for start in range(0, len(order), batch)]


def to_the_longest(step: Sequence[Feature]) -> dict[str, Tensor]:
    return _padded(step, max(len(feature["input_ids"]) for feature in step))


def to_the_fixed_length(step: Sequence[Feature]) -> dict[str, Tensor]:
    return _padded(step, FIXED_LENGTH)


PEERS = {
    "fixed 128": Peer(at_random, to_the_fixed_length),
    "dynamic": Peer(at_random, to_the_longest),
    "grouped": Peer(grouped_by_length, to_the_longest),
    "grouped oneDNN": Peer(grouped_by_length, to_the_longest, onednn=True),
}


def _padded(step: Sequence[Feature], length: int) -> dict[str, Tensor]:
    rows = [feature["input_ids"] for feature in step]
    return {
        "input_ids": torch.tensor([row + [_PAD] * (length - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(r) + [0] * (length - len(r)) for r in rows]),
        "labels": torch.tensor([feature["labels"] for feature in step]),
    }


def _train(
    peer: Peer,
    model: PreTrainedModel,
    steps: Sequence[Sequence[Feature]],
    lr: float,
    weight_decay: float,
    clip: float,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            max_steps=len(steps),
            per_device_train_batch_size=len(steps[0]),
            train_sampling_strategy="sequential",
            learning_rate=lr,
            lr_scheduler_type="constant",
            weight_decay=weight_decay,
            max_grad_norm=clip,
            logging_strategy="no",
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=[feature for step in steps for feature in step],  # type: ignore[arg-type]
            data_collator=peer.collate,  # type: ignore[arg-type]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
