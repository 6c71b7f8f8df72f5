"""Small networks on the sum of a text's feature vectors: the study's baseline, and better ones.

With one-hot words the first layer is a table of vectors, one a word, so it is kept as one. The
study's network has four layers of 50 on the words as jieba cuts them; a wide layer on character
n-grams is of the kind of fastText (Joulin et al. 2017).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from baselines.features import Features, encode, read_vocabulary, vocabulary, write_vocabulary
from baselines.settings import MlpSettings
from launcher.engine import DTYPES
from launcher.errors import InputError
from launcher.files import replacing
from launcher.pretrained import assign
from launcher.throughput import transformer_flops

TRAINS, CLASSIFIES = True, True
_SLOPE = 0.1
_FIRST_VECTORS = 0.03
"""Standard deviation of the features' vectors at first."""


def trains_model(config: Any) -> bool:
    """All weights are trained."""
    return True


def prepare(config: Any, dataset: Any) -> Any:
    """Write the vocabulary of the train split into the run folder and fix its size."""
    settings: MlpSettings = config.mlp
    _gold(dataset.splits["train"])
    file = config.run_dir / "vocabulary.json"
    if not file.exists():
        write_vocabulary(file, _vocabulary(settings, dataset))
    update = {"vocabulary_size": len(read_vocabulary(file))}
    return config.model_copy(update={"mlp": settings.model_copy(update=update)})


def build(config: Any, labels: Sequence[str]) -> "Mlp":
    """The method, its network initialised from `run.seed`."""
    settings: MlpSettings = config.mlp
    assert settings.vocabulary_size is not None, "prepare() fixes it"
    torch.manual_seed(config.run.seed)
    network = Network(settings, settings.vocabulary_size, len(labels))
    network.to(DTYPES[config.model.precision])
    return Mlp(settings, network, config.run_dir, config.evaluation.micro_batch_tokens)


def check(config: Any, dataset: Any) -> list[str]:
    """Validate the data; show the features of one text and the network's size."""
    settings: MlpSettings = config.mlp
    _gold(dataset.splits["train"])
    names = _vocabulary(settings, dataset)
    with torch.device("meta"):
        network = Network(settings, len(names), len(dataset.labels))
    text = dataset.splits["train"]["text"][0].as_py()
    return [
        f"network: {len(names):,} features, {sum(p.numel() for p in network.parameters()):,} "
        "parameters",
        f"text: {text}",
        f"  features {' '.join(_features(settings).of(text))}",
    ]


def describe(config: Any) -> dict[str, str]:
    """How reports name this run."""
    settings: MlpSettings = config.mlp
    widths = " x ".join(map(str, settings.hidden))
    return {"title": f"MLP {widths} on {', '.join(settings.features)}", "prompt": ""}


class Network(nn.Module):
    """Features to logits; the widths, slope and place of the dropout are `MlpSettings`'."""

    def __init__(self, settings: MlpSettings, features: int, labels: int) -> None:
        super().__init__()
        widths = settings.hidden
        self.vectors = nn.EmbeddingBag(features, widths[0], mode="sum", include_last_offset=True)
        nn.init.normal_(self.vectors.weight, std=_FIRST_VECTORS)
        self.bias = nn.Parameter(torch.zeros(widths[0]))
        self.layers = nn.ModuleList(
            nn.Linear(above, below) for above, below in itertools.pairwise(widths)
        )
        self.head = nn.Linear(widths[-1], labels)
        self.middle = (len(widths) - 1) // 2
        self.dropout, self.feature_dropout = settings.dropout, settings.feature_dropout
        self.square_root = settings.pooling == "sqrt"

    def forward(self, features: Tensor, starts: Tensor) -> Tensor:
        """[features of all texts] int64, [texts + 1] int64 -> [texts, labels]."""
        sizes = starts.diff()
        counts = sizes.clamp(min=1).to(self.bias.dtype)
        each = counts.rsqrt() if self.square_root else torch.ones_like(counts)
        each = functional.dropout(
            each.repeat_interleave(sizes), self.feature_dropout, self.training
        )
        states = self.vectors(features, starts, per_sample_weights=each) + self.bias
        for place in range(len(self.layers) + 1):
            if place:
                states = self.layers[place - 1](states)
            states = functional.leaky_relu(states, _SLOPE)
            if place == self.middle:
                states = functional.dropout(states, self.dropout, self.training)
        logits: Tensor = self.head(states)
        return logits


@dataclass(frozen=True)
class BagBatch:
    """Texts as the places of their features, one text behind the other."""

    rows: list[int]
    """Where each stood in what was batched."""
    features: Tensor
    """[features of all texts] int64."""
    starts: Tensor
    """[texts + 1] int64, where each text's begin."""
    gold: Tensor | None = None
    """[texts] int64."""


class Mlp:
    """A network on features; see `launcher.method.Classifier` and `launcher.method.Learner`."""

    def __init__(
        self, settings: MlpSettings, network: Network, run_dir: Path, micro_batch_tokens: int
    ) -> None:
        self.module: Any = network
        self.replicated = None
        self.settings = settings
        self.micro_batch_tokens = micro_batch_tokens
        self.features = _features(settings)
        self._folder = run_dir
        self._sets: list[tuple[pa.Table, Examples]] = []

    def start(self, examples: pa.Table) -> None:
        """The weights are there already."""

    def training_set(self, examples: pa.Table, epoch: int) -> "Examples":
        """The same examples in every epoch, encoded once."""
        for known, made in self._sets:
            if known is examples:
                return made
        starts, found = encode(self.features, examples["text"].to_pylist(), self._places)
        made = Examples(starts, found, _gold(examples), examples["id"].to_pylist())
        self._sets.append((examples, made))
        return made

    def loss(self, batch: BagBatch) -> Tensor:
        """Sum of the examples' cross-entropies."""
        assert batch.gold is not None
        logits = self._logits(batch)
        return functional.cross_entropy(logits, batch.gold.to(logits.device), reduction="sum")

    def flops(self, lengths: np.ndarray) -> float:
        """Model FLOPs of a training step; a text's vectors are added up, not multiplied."""
        widths = self.settings.hidden
        layers = sum(a * b for a, b in itertools.pairwise(widths))
        tokens = transformer_flops(weights=layers, tokens=len(lengths), trained=True)
        return tokens + 4 * widths[0] * float(lengths.sum())

    def score_batches(self, texts: Sequence[str]) -> list[BagBatch]:
        """Batches in the order of the texts."""
        starts, found = encode(self.features, texts, self._places)
        sizes = np.maximum(np.diff(starts), 1)
        # Cut where the running number of features passes another multiple of the budget.
        part = (np.cumsum(sizes) - 1) // self.micro_batch_tokens
        cuts = np.flatnonzero(np.diff(part)) + 1
        return [
            _bag(rows.tolist(), starts, found) for rows in np.split(np.arange(len(texts)), cuts)
        ]

    def scores(self, batch: BagBatch) -> Tensor:
        """[rows, labels] log-probabilities; see `launcher.method.Classifier.scores`."""
        with torch.no_grad():
            return self._logits(batch).log_softmax(dim=1)

    def notes(self) -> dict[str, int]:
        """Nothing to tell."""
        return {}

    def export(self, state: dict[str, Tensor], folder: Path) -> None:
        """Write `mlp.safetensors` into the run folder, beside the vocabulary."""
        with replacing(folder / "mlp.safetensors") as temporary:
            save_file({name: value.contiguous() for name, value in state.items()}, temporary)

    def load_export(self, folder: Path) -> None:
        """Go on with what `export` wrote."""
        self._folder = folder
        self.__dict__.pop("_places", None)
        file = folder / "mlp.safetensors"
        try:
            state = load_file(file)
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{file}: not readable ({reason}): run it again") from None
        assign(getattr(self.module, "module", self.module), state, folder)

    @cached_property
    def _places(self) -> dict[str, int]:
        places = read_vocabulary(self._folder / "vocabulary.json")
        if len(places) != self.settings.vocabulary_size:
            raise InputError(
                f"{self._folder / 'vocabulary.json'}: {len(places):,} features, expected "
                f"{self.settings.vocabulary_size:,}: it belongs to another run"
            )
        return places

    def _logits(self, batch: BagBatch) -> Tensor:
        device = next(self.module.parameters()).device
        logits: Tensor = self.module(batch.features.to(device), batch.starts.to(device))
        return logits.float()


class Examples:
    """Encoded examples; see `launcher.method.TrainingSet`."""

    def __init__(
        self, starts: np.ndarray, found: np.ndarray, gold: np.ndarray, names: list[str]
    ) -> None:
        self.starts, self.found, self.gold, self.names = starts, found, gold, names
        # A text none of whose features is known still takes a place in the batch.
        self.lengths = np.maximum(np.diff(starts), 1)
        self.weights = np.ones(len(gold))

    def batch(self, rows: Sequence[int]) -> BagBatch:
        """The examples `rows` as one micro batch."""
        return _bag([*rows], self.starts, self.found, torch.from_numpy(self.gold[[*rows]]))


def _bag(
    rows: list[int], starts: np.ndarray, found: np.ndarray, gold: Tensor | None = None
) -> BagBatch:
    parts = [found[starts[row] : starts[row + 1]] for row in rows]
    ends = np.cumsum([0, *map(len, parts)])
    return BagBatch(rows, torch.from_numpy(np.concatenate(parts)), torch.from_numpy(ends), gold)


def _features(settings: MlpSettings) -> Features:
    return Features(settings.features, settings.ngrams)


def _vocabulary(settings: MlpSettings, dataset: Any) -> list[str]:
    texts = dataset.splits["train"]["text"].to_pylist()
    return vocabulary(_features(settings), texts, settings.min_count)


def _gold(examples: pa.Table) -> np.ndarray:
    """[examples] int64 labels.

    Raises:
        InputError: an example has none.
    """
    column = examples["label"]
    if column.null_count:
        raise InputError(
            f"data: {column.null_count} of {len(examples)} examples to learn from have no label: "
            "leave them out"
        )
    return column.to_numpy().astype(np.int64)
