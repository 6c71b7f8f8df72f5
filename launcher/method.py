"""What a method is to the launcher: texts in, one score per label out."""

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from torch import Tensor, nn

from data_prep.dataset import Dataset
from data_prep.subset import read_chosen
from launcher.config import Config
from launcher.errors import InputError


class Batch(Protocol):
    """Examples that go through the model together."""

    rows: list[int]
    """Where each example stood in the list that was batched."""


class Classifier(Protocol):
    """A method that scores labels."""

    module: nn.Module

    def score_batches(self, texts: Sequence[str]) -> list[Any]:
        """Cut texts into batches (`Batch`); every text is in exactly one."""

    def scores(self, batch: Any) -> Tensor:
        """[examples, labels] float32 log-probabilities.

        A method that only names a category gives 0 for it and -inf for the others; a row of
        nothing but -inf named none.
        """

    def notes(self) -> dict[str, int]:
        """Counts to be told at the end, for example of truncated texts."""


class Fitted(Protocol):
    """A `Classifier` that learns in one go rather than by gradient steps; its `TRAINS` is false."""

    def fit(self, splits: dict[str, pa.Table], folder: Path) -> None:
        """Called on rank 0 alone: learn, and write what was learned into the run folder."""

    def load_export(self, folder: Path) -> None:
        """Called on every rank afterwards: go on with what `fit` wrote."""


class TrainingSet(Protocol):
    """One epoch's examples, known by their sizes."""

    lengths: np.ndarray
    """[examples] int64, tokens of each."""
    weights: np.ndarray
    """[examples] float64, what each adds to the denominator of the mean loss."""
    names: list[str]
    """What messages call each."""

    def batch(self, rows: Sequence[int]) -> Any:
        """The examples `rows` as one micro batch."""


class Learner(Protocol):
    """A method that trains; one that also is a `Classifier` has `load_export(folder)`, too, which
    makes it go on with what `export` wrote."""

    module: nn.Module
    """Becomes DeepSpeed's engine around it."""
    replicated: nn.Module | None
    """What is trained beside a frozen module, whole on every rank; None: the module's own weights
    are trained, those that want a gradient."""

    def start(self, examples: pa.Table) -> None:
        """Called once the module is placed, perhaps sharded: first values of what is trained, which
        may depend on the train split `examples`. Collective, and the same on every rank."""

    def training_set(self, examples: pa.Table, epoch: int) -> TrainingSet:
        """The examples of one epoch; the same on every rank, and as many in every epoch."""

    def loss(self, batch: Any) -> Tensor:
        """Sum of the losses of a micro batch; its denominator is the sum of `weights`."""

    def flops(self, lengths: np.ndarray) -> float:
        """Model FLOPs of a training step on examples of these lengths."""

    def export(self, state: dict[str, Tensor], folder: Path) -> None:
        """Write the trained weights in the form in which they are used again."""


def method_module(config: Config) -> ModuleType:
    """The module of the config's method. It offers

    - `TRAINS` and `CLASSIFIES`: whether `build` gives a `Learner`, a `Classifier`, or both in one;
      a `Classifier` that does not train may be `Fitted`;
    - `trains_model(config)`: whether training changes the model's own weights, which then need
      gradients and AdamW's moments;
    - `prepare(config, dataset) -> Config`: fix whatever depends on the data, so that the stored
      config alone rebuilds the method;
    - `check(config, dataset) -> list[str]`: validate without running, lines for the reader;
    - `build(config, labels) -> Classifier | Learner`;
    - `describe(config) -> dict`: title and prompt for reports;
    - perhaps `footprint(config, dataset, ranks) -> launcher.footprint.Footprint`: what a step
      needs, counted with the module on the device `meta`; without it `--plan` is refused, and
      `parallel.zero: auto` goes by the size of the weights.
    """
    return importlib.import_module(config.method)


def read_data(config: Config, module: ModuleType) -> Dataset:
    """The dataset, refused now rather than later when a split that the run needs is missing."""
    data = config.data
    dataset = read_chosen(data)
    needed = ["train"] * module.TRAINS + list(data.evaluate) * module.CLASSIFIES
    for split in needed:
        if split not in dataset.splits:
            raise InputError(
                f"data: this run needs the split {split!r}; the data has "
                f"{', '.join(dataset.splits)}"
            )
    used = {split: table.slice(0, data.first(split)) for split, table in dataset.splits.items()}
    return replace(dataset, splits=used)
