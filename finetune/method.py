"""What all fine-tunes share: a network that gives one logit per label, trained and saved."""

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune import checkpoints, examples, levels, lora, tokenization
from finetune.examples import Examples, TextBatch
from finetune.settings import FinetuneSettings
from launcher import footprint as counting
from launcher.cpu_linear import onednn_linear
from launcher.errors import InputError
from launcher.footprint import Footprint
from launcher.pretrained import assign, fingerprint, recompute_layers, required_path
from launcher.targets import balanced
from launcher.throughput import transformer_flops

_LAYER = re.compile(r"(.*?)\b(?:layer|layers|h|block|albert_layer_groups)\.(\d+)\.")
# Rates that fine-tuning starts from where the config names none; the shared default is for nets
# that start from nothing.
_RATES = {"all": 5e-5, "head": 1e-3, "lora": 5e-4}


def prepare(config: Any, dataset: Any) -> Any:
    """Tokenize the train split and write out class weights, levels and the learning rate.

    The levels go into the data's provenance, too, so that predictions alone tell of them.

    Raises:
        InputError: the tokenizer does not fit the model or the data, or a setting the labels.
    """
    settings: FinetuneSettings = config.finetune
    read_texts(config, dataset)
    examples.class_weights(settings, dataset.labels)
    examples.targets(settings, dataset.splits["train"], len(dataset.labels))
    weights = settings.class_weights
    if weights == "balanced":
        weights = balanced(dataset, "finetune.class_weights")
    resolved = levels.resolve(settings.levels, dataset.labels, dataset.grouping)
    if resolved:
        groupings = {name: level.grouping for name, level in resolved.items()}
        dataset.provenance["levels"] = groupings
    train = config.train
    if "lr" not in train.model_fields_set:
        train = train.model_copy(update={"lr": _RATES[settings.trains]})
    update = {"class_weights": weights, "levels": resolved}
    return config.model_copy(
        update={"train": train, "finetune": settings.model_copy(update=update)}
    )


def read_texts(config: Any, dataset: Any) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """The tokenizer, fit for the model and the train split; lines for a reader."""
    path = required_path(config.model.path)
    model_config = checkpoints.read_config(path)
    tokenizer = tokenization.load_tokenizer(path, model_config)
    limit = tokenization.longest_text(model_config, config.finetune.max_tokens)
    texts = dataset.splits["train"]["text"].to_pylist()
    tokens = tokenization.encode_once(tokenizer, texts, limit, _cache(config))
    allowed = config.finetune.allow_unknown_tokens
    known = tokenization.check_unknown(tokenizer, texts, tokens, allowed=allowed)
    return tokenizer, [
        f"model: {model_config.model_type}, texts of at most {limit} tokens, {len(tokenizer)} ids",
        known,
        f"text: {texts[0]}",
        f"  ids {tokens[0].tolist()}",
    ]


def describe(config: Any) -> dict[str, str]:
    """How reports name this run."""
    trains = {"all": "", "head": ", head only", "lora": ", LoRA"}[config.finetune.trains]
    return {"title": f"{Path(config.model.path).name}{trains}", "prompt": ""}


def footprint(
    config: Any, dataset: Any, ranks: int, prepare: Callable[..., Any], build: Callable[..., Any]
) -> Footprint:
    """A step on the train split, or scoring in between where that needs more memory.

    Args:
        prepare: the method's own.
        build: gives the method from config, labels, path and `checkpoints.describe`.
    """
    splits = {name: counting.sample(table) for name, table in dataset.splits.items()}
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        # The tokens of a sample are not kept.
        run = config.run.model_copy(update={"dir": Path(folder)})
        # A sample may lack a label, which has no balanced weight then.
        settings = config.finetune.model_copy(update={"class_weights": "none"})
        config = config.model_copy(update={"run": run, "finetune": settings})
        config = prepare(config, replace(dataset, splits=splits))
        method = build(config, dataset.labels, config.model.path, checkpoints.describe)
        method.module.to("meta")
        return counting.of_training(
            config, method, splits["train"], ranks, scored=splits.get("dev")
        )


class Network(nn.Module):
    """A pretrained model and its head, as one pass for DeepSpeed."""

    def __init__(self, model: PreTrainedModel, head: nn.Module | None, trains: str) -> None:
        super().__init__()
        self.model: Any = model
        self.head = head
        self.trains = trains

    def train(self, mode: bool = True) -> "Network":
        """A frozen model stays in evaluation mode: dropout there would only add noise."""
        super().train(mode)
        if self.trains == "head":
            self.model.base_model.eval()
        return self


class Finetuned:
    """A network that is trained; see `launcher.method.Classifier` and `launcher.method.Learner`.

    Called with the ids [rows, length], their mask or None, and their lengths [rows], the network
    gives logits [rows, labels].
    """

    task = "SEQ_CLS"
    """What PEFT calls it."""

    def __init__(
        self,
        config: Any,
        labels: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        network: Network,
        head_names: set[str],
    ) -> None:
        self.config, self.labels, self.tokenizer = config, list(labels), tokenizer
        self.settings: FinetuneSettings = config.finetune
        self.module: Any = network
        self.replicated: nn.Module | None = None
        self.model_config = network.model.config
        self.limit = tokenization.longest_text(self.model_config, self.settings.max_tokens)
        pad = tokenizer.pad_token_id
        self.pad: int = 0 if pad is None else pad
        self.fed = 0
        """Tokens computed for each text beside its own."""
        self.class_weights = examples.class_weights(self.settings, labels)
        self.memberships = levels.memberships(self.settings.levels, labels)
        self.weights_per_token = checkpoints.multiplied_weights(network.model)
        self._made: list[tuple[pa.Table, Examples]] = []
        self._truncated: set[str] = set()
        own = {f"head.{name}" for name, _ in (network.head or nn.Module()).named_parameters()}
        self._prepare_training(network, own | {f"model.{name}" for name in head_names})
        if config.parallel.activation_checkpointing:
            recompute_layers(network.model)

    def start(self, examples: pa.Table) -> None:
        """The weights are there already."""

    def training_set(self, table: pa.Table, epoch: int) -> Examples:
        """The same examples in every epoch, tokenized once for all of them and for other runs."""
        for known, made in self._made:
            if known is table:
                return made
        texts = table["text"].to_pylist()
        tokens = tokenization.encode_once(self.tokenizer, texts, self.limit, _cache(self.config))
        self._truncated |= tokenization.truncated(self.tokenizer, texts, tokens, self.limit)
        targets = examples.targets(self.settings, table, len(self.labels))
        made = self._examples(tokens, table["id"].to_pylist(), targets)
        self._made.append((table, made))
        return made

    def loss(self, batch: TextBatch) -> Tensor:
        """Sum of the examples' losses, each times what it counts.

        Cross-entropy with the targets, smoothed, plus that of each level times its weight; or the
        mean over the labels of the binary cross-entropies.
        """
        logits = self._logits(batch)
        assert batch.targets is not None and batch.counts is not None
        targets, counts = batch.targets.to(logits.device), batch.counts.to(logits.device)
        smoothing = self.settings.label_smoothing
        if self.settings.multi_label:
            smoothed = targets * (1 - smoothing) + smoothing / 2
            losses = binary_cross_entropy_with_logits(logits, smoothed, reduction="none")
            return ((losses * self.class_weights.to(logits.device)).mean(dim=1) * counts).sum()
        log_probs = logits.log_softmax(dim=1)
        smoothed = targets * (1 - smoothing) + smoothing / len(self.labels)
        losses = -(smoothed * log_probs).sum(dim=1)
        for level, membership in zip(self.settings.levels.values(), self.memberships, strict=True):
            grouped = smoothed @ membership.to(smoothed)
            of_level = -(grouped * levels.roll_up(log_probs, membership)).sum(dim=1)
            losses = losses + level.weight * of_level
        return (losses * counts).sum()

    def flops(self, lengths: np.ndarray) -> float:
        """Model FLOPs of a training step on examples of these lengths."""
        trained = self.settings.trains == "all"
        tokens = int(lengths.sum())
        flops = transformer_flops(weights=self.weights_per_token, tokens=tokens, trained=trained)
        # Nothing goes back through a model whose head alone is trained.
        return flops / 2 if self.settings.trains == "head" else flops

    def lr_factor(self, name: str) -> float:
        """What the learning rate of the module's parameter `name` is multiplied with."""
        return self._factors[name]

    def score_batches(self, texts: Sequence[str]) -> list[TextBatch]:
        """Batches of equal length, the longest first so that memory peaks at once."""
        tokens = tokenization.encode(self.tokenizer, texts, self.limit)
        self._truncated |= tokenization.truncated(self.tokenizer, texts, tokens, self.limit)
        budget = self.config.evaluation.micro_batch_tokens
        return [*examples.equal_length_batches(tokens, budget, self.fed, self.pad)]

    def scores(self, batch: TextBatch) -> Tensor:
        """[rows, labels] log-probabilities; see `launcher.method.Classifier.scores`."""
        with torch.no_grad():
            logits = self._logits(batch)
        if self.settings.multi_label:
            logits = logsigmoid(logits)
        return logits.log_softmax(dim=1)

    def notes(self) -> dict[str, int]:
        """Texts cut to fit the model's positions."""
        return {"truncated_texts": len(self._truncated)}

    def export(self, state: dict[str, Tensor], folder: Path) -> None:
        """Write `model/` in the run folder, which transformers reads; LoRA's updates and the head
        in PEFT's format into `adapter/`."""
        model, head = _split(state)
        if self.settings.trains == "lora":
            base = fingerprint(self.config.model.path, self.model_config)
            settings, own = self.settings.lora, self._network().model
            lora.save(folder / "adapter", model, head, settings, own, self.task, base)
            return
        own = self._network().model
        whole = checkpoints.completed(own, model, checkpoints.source(self.config))
        checkpoints.save(own, whole, head, self.tokenizer, folder / "model")

    def load_export(self, folder: Path) -> None:
        """Go on with what `export` wrote; see `launcher.method.Learner`."""
        network = self._network()
        if self.settings.trains == "lora":
            base = fingerprint(self.config.model.path, self.model_config)
            names = [name for name, p in network.model.named_parameters() if p.requires_grad]
            model, head = lora.read_back(folder / "adapter", names, base)
        else:
            model, head = checkpoints.read_back(folder / "model")
        assign(network.model, model, folder)
        if network.head is not None:
            assign(network.head, head, folder)

    def _examples(self, tokens: tokenization.Tokens, names: list[str], targets: Any) -> Examples:
        counts = targets @ self.class_weights.numpy()
        if self.settings.multi_label:
            counts = np.ones(len(targets))
        return Examples(tokens, names, targets, counts, pad=self.pad, fed=self.fed)

    def _network(self) -> Network:
        return getattr(self.module, "module", self.module)

    def _logits(self, batch: TextBatch, *more: Tensor) -> Tensor:
        model = self._network().model
        device, mask = model.device, batch.mask
        with onednn_linear(model):
            logits: Tensor = self.module(
                batch.ids.to(device),
                None if mask is None else mask.to(device),
                batch.lengths.to(device),
                *(one.to(device) for one in more),
            )
        return logits.float()

    def _prepare_training(self, network: Network, head: set[str]) -> None:
        """Say which parameters want a gradient and at which rates they learn.

        Args:
            head: names of the parameters that classify.
        """
        trains = self.settings.trains
        if trains != "all":
            network.requires_grad_(False)
        if trains == "lora":
            lora.inject(self.settings.lora, network.model, self.config.run.seed, self.task)
        for name, parameter in network.named_parameters():
            if name in head:
                parameter.requires_grad_(True)
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise InputError(
                f"finetune.trains: {trains}, but this model has no head of its own: use all or lora"
            )
        depths = layer_depths([name for name, _ in network.named_parameters()], head)
        deepest = max(depths.values())
        decay = self.settings.layer_decay
        self._factors = {name: decay ** (deepest - depth) for name, depth in depths.items()}


def layer_depths(names: Sequence[str], head: set[str]) -> dict[str, int]:
    """How many layers a parameter lies above the embeddings, which have 0, by its name.

    Args:
        names: in the model's order, from the embeddings up; an encoder's before its decoder's.
        head: names that lie above all others.
    """
    depths: dict[str, int] = {}
    seen: dict[tuple[str, str], int] = {}
    depth = 0
    for name in names:
        if name in head:
            continue
        if match := _LAYER.match(name):
            depth = seen.setdefault((match[1], match[2]), len(seen) + 1)
        depths[name] = depth
    top = max(depths.values(), default=0) + 1
    return {name: depths.get(name, top) for name in names}


def _split(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A network's parameters as its model's and its head's, by their own names."""
    parts = [
        {
            name.removeprefix(prefix): value
            for name, value in state.items()
            if name.startswith(prefix)
        }
        for prefix in ("model.", "head.")
    ]
    return parts[0], parts[1]


def _cache(config: Any) -> Path:
    """Where tokenized texts are kept for all runs that lie side by side."""
    return config.run.dir / ".tokens"
