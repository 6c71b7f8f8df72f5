"""Examples to learn from: their tokens, their targets, and what each counts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

import launcher.targets
from finetune.settings import FinetuneSettings
from finetune.tokenization import Tokens
from launcher.targets import from_labels, from_shares


@dataclass(frozen=True)
class TextBatch:
    """Texts that go through the model together, padded on the right."""

    rows: list[int]
    """Where each stood in what was batched."""
    ids: Tensor
    """[rows, length] int64."""
    lengths: Tensor
    """[rows] int64, tokens of each."""
    targets: Tensor | None = None
    """[rows, labels] float32, what is to be learned."""
    counts: Tensor | None = None
    """[rows] float32, what each row counts."""

    @property
    def mask(self) -> Tensor | None:
        """[rows, length] int64, 0 for padding; None where there is none, which is faster."""
        longest = self.ids.shape[1]
        if int(self.lengths.min()) == longest:
            return None
        return (torch.arange(longest) < self.lengths[:, None]).long()


class Examples:
    """The examples of an epoch; see `launcher.method.TrainingSet`."""

    def __init__(
        self,
        tokens: Tokens,
        names: list[str],
        targets: np.ndarray,
        counts: np.ndarray,
        *,
        pad: int,
        fed: np.ndarray | int = 0,
        predicted: np.ndarray | int = 1,
    ) -> None:
        """Per example: `counts`, what its loss is multiplied with; `fed`, tokens beside its own;
        `predicted`, parts that its loss is the sum of."""
        self.tokens, self.names, self.targets, self.pad = tokens, names, targets, pad
        self.counts = counts.astype(np.float32)
        self.lengths = tokens.lengths + fed
        self.weights = counts.astype(np.float64) * predicted

    def batch(self, rows: Sequence[int]) -> TextBatch:
        """The examples `rows` as one micro batch."""
        own = list(rows)
        return pad_right(
            self.tokens,
            own,
            self.pad,
            torch.from_numpy(self.targets[own]),
            torch.from_numpy(self.counts[own]),
        )


def pad_right(
    tokens: Tokens,
    rows: list[int],
    pad: int,
    targets: Tensor | None = None,
    counts: Tensor | None = None,
) -> TextBatch:
    """The texts `rows` as one batch."""
    lengths = tokens.lengths[rows]
    ids = np.full((len(rows), int(lengths.max())), pad, dtype=np.int64)
    for place, row in enumerate(rows):
        ids[place, : lengths[place]] = tokens[row]
    return TextBatch(rows, torch.from_numpy(ids), torch.from_numpy(lengths), targets, counts)


def equal_length_batches(tokens: Tokens, budget: int, fed: int, pad: int) -> Iterator[TextBatch]:
    """Every text in a batch of texts as long as it, the longest first so that memory peaks at once.

    Args:
        budget: tokens of a batch, among them `fed` for each text that are not its own.
    """
    lengths = tokens.lengths
    for length in sorted(set(lengths.tolist()), reverse=True):
        rows = np.flatnonzero(lengths == length)
        # Cut evenly: a last batch of three rows would cost almost as much as a full one.
        parts = -(-len(rows) // max(1, budget // (length + fed)))
        for part in np.array_split(rows, parts):
            yield pad_right(tokens, part.tolist(), pad)


def targets(settings: FinetuneSettings, examples: pa.Table, labels: int) -> np.ndarray:
    """[examples, labels] float32: 1 for the label, or the shares; 1 for each share if multi-label.

    Raises:
        InputError: an example has none.
    """
    if settings.multi_label:
        shares = from_shares(examples, labels, "finetune.multi_label")
        return (shares > 0).astype(np.float32)
    if settings.soft_targets:
        return from_shares(examples, labels, "finetune.soft_targets")
    return from_labels(examples, labels)


def class_weights(settings: FinetuneSettings, labels: Sequence[str]) -> Tensor:
    """[labels] float32; see `launcher.targets.class_weights`."""
    return launcher.targets.class_weights(settings.class_weights, labels, "finetune.class_weights")
