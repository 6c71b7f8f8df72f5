"""What the training benchmarks share: transformers' Trainer as the peer, and timed steps."""

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler


def train(
    model: Any,
    steps: Sequence[Sequence[Any]],
    collate: Callable[[Any], Any],
    *,
    lr: float,
    weight_decay: float,
    clip: float,
) -> None:
    """An optimizer step for each list of examples, with nothing beside the training."""
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
            train_dataset=[example for step in steps for example in step],  # type: ignore[arg-type]
            data_collator=collate,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def grouped_by_length(lengths: np.ndarray, batch: int) -> list[np.ndarray]:
    """Rows of each of Trainer's steps with `train_sampling_strategy="group_by_length"`."""
    generator = torch.Generator().manual_seed(0)
    order = np.array([*LengthGroupedSampler(batch, lengths=lengths.tolist(), generator=generator)])
    return [order[start : start + batch] for start in range(0, len(order), batch)]


def spread(
    batches: Sequence[np.ndarray],
    sizes: Callable[[np.ndarray], float],
    count: int,
    *,
    batch: int,
    rounds: int,
) -> list[list[np.ndarray]]:
    """For each round `count` whole batches, in the middles of `count` equal parts by size.

    Args:
        sizes: of a batch's rows.
        batch: examples of a whole one.
    """
    whole = sorted((rows for rows in batches if len(rows) == batch), key=sizes)
    middles = [(2 * part + 1) * len(whole) // (2 * count) for part in range(count)]
    return [[whole[middle + turn - rounds // 2] for middle in middles] for turn in range(rounds)]
