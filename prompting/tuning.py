"""Prompt tuning: a frozen language model is asked with learned vectors, and only they are trained.

The loss is taken over the same token trie that scores the labels. What all examples of a micro
batch begin with, soft vectors included, is computed once and gradients flow back through it: in a
causal model those states can't depend on what follows.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from launcher import lora, pretrained
from launcher.cpu_linear import onednn_linear
from launcher.distributed import full_shape
from launcher.errors import InputError
from launcher.footprint import Footprint
from launcher.targets import balanced
from launcher.throughput import transformer_flops
from prompting import adapter, models, question, scorer, soft_prompt, targets, whitened_prefix
from prompting.question import Question
from prompting.settings import TuningSettings
from prompting.whitened_prefix import WhitenedPrefix

TRAINS, CLASSIFIES = True, True
# Vectors need larger steps than matrices: what fits those leaves them where they are.
_VECTORS_LR = 1e-2
# Texts of which the queries are watched: thousands of tokens for the tens of dimensions of a head.
_WATCHED_TEXTS = 1000


def trains_model(config: Any) -> bool:
    """Only LoRA's updates are part of the model."""
    return bool(config.tuning.kind == "lora")


def prepare(config: Any, dataset: Any) -> Any:
    """Write out the soft spans' lengths, drawn demonstrations, class weights and learning rate."""
    settings: TuningSettings = config.tuning
    config = question.prepare(config, dataset)
    if config.prompt.scoring != "sum":
        raise InputError(
            f"prompt.scoring: {config.prompt.scoring}, but what is trained is the sum of the label "
            "tokens' log-probabilities: leave prompt.scoring out"
        )
    template = config.prompt.template
    if settings.kind != "lora":
        path = pretrained.required_path(config.model.path)
        tokenizer = models.load_tokenizer(path, models.check_checkpoint(path))
        template = soft_prompt.soften(template, tokenizer, settings.length)
        if _init(settings) == "text" and not settings.init_from:
            soft_prompt.check_words(template, tokenizer)
    elif template.soft_spans:
        raise InputError(f"prompt.template {template.name!r}: kind lora learns no soft spans")
    weights = settings.class_weights
    if weights == "balanced":
        weights = balanced(dataset, "tuning.class_weights")
    train = config.train
    if "lr" not in train.model_fields_set and settings.kind in ("prompt", "prefix"):
        train = train.model_copy(update={"lr": _VECTORS_LR})
    return config.model_copy(
        update={
            "train": train,
            "prompt": config.prompt.model_copy(update={"template": template}),
            "tuning": settings.model_copy(
                update={"length": None, "init": _init(settings), "class_weights": weights}
            ),
        }
    )


def build(config: Any, labels: Sequence[str]) -> "Tuning":
    """The method with its frozen model and what it learns, not yet given its first values."""
    settings: TuningSettings = config.tuning
    mapped = config.model.weights == "memory_mapped"
    if mapped and config.train.epochs and not config.parallel.activation_checkpointing:
        raise InputError(
            "model.weights: memory_mapped, but a backward pass would keep every layer's cast "
            "weights: set parallel.activation_checkpointing to true"
        )
    asked, model_config = _read(config, labels)
    model = models.load_model(
        config.model.path,
        config.model.precision,
        config.model.attention,
        settings.dropout,
        memory_mapped=mapped,
    )
    identity = adapter.identity(
        settings.kind, pretrained.fingerprint(config.model.path, model_config), asked
    )
    return Tuning(config, asked, model, identity)


def check(config: Any, dataset: Any) -> list[str]:
    """Validate model files, tokenizer, template and label words; show one example with its ids."""
    config = prepare(config, dataset)
    asked, model_config = _read(config, dataset.labels)
    vectors = sum(span.length for span in asked.prompt.spans)
    example = dataset.splits[config.data.evaluate[0]]["text"][0].as_py()
    learned = f"{config.tuning.kind}, {vectors} soft vectors" if vectors else config.tuning.kind
    return [
        *models.lines(model_config, asked.tokenizer),
        f"learned: {learned}",
        *asked.lines(example),
    ]


def footprint(config: Any, dataset: Any, ranks: int) -> Footprint:
    """What a step needs; see `launcher.footprint`."""
    from prompting.footprint import of_tuning  # it builds this module's method

    return of_tuning(config, dataset, ranks)


def describe(config: Any) -> dict[str, str]:
    """How reports name this run."""
    template = config.prompt.template
    kind = {"prompt": "soft prompt", "p_tuning": "p-tuning", "prefix": "prefix tuning"}
    title = f"{template.name}, {kind.get(config.tuning.kind, 'LoRA')}"
    return {"title": title, "prompt": template.question}


class Tuning:
    """See `launcher.method.Classifier` and `launcher.method.Learner`."""

    def __init__(
        self, config: Any, asked: Question, model: PreTrainedModel, identity: dict[str, Any]
    ) -> None:
        self.settings: TuningSettings = config.tuning
        self.asked, self.identity = asked, identity
        self.micro_batch_tokens = config.evaluation.micro_batch_tokens
        self.vocabulary: int = model.config.get_text_config().vocab_size
        self.vectors = sum(span.length for span in asked.prompt.spans)
        self.weights = targets.class_weights(self.settings, asked.labels)
        self.model_config = model.config
        self.replicated: nn.Module | None = None
        """The learned network, float32 and whole on every rank; None: LoRA's updates are in the
        model itself."""
        self.seed: int = config.run.seed
        model.requires_grad_(False)
        if self.settings.kind == "lora":
            lora.inject(_describe_lora(self.settings, model), model, self.seed)
        else:
            self.replicated = soft_prompt.make_network(
                self.settings, model.config, self.vectors, self.seed
            )
        if config.parallel.activation_checkpointing:
            _checkpoint_layers(model)
        self.module: Any = _Asked(model, asked)
        self._made: list[tuple[pa.Table, targets.Examples]] = []

    def start(self, examples: pa.Table) -> None:
        """Give the learned vectors their first values; see `launcher.method.Learner`."""
        if self.settings.init_from:
            self.load_adapter(Path(self.settings.init_from))
        elif isinstance(self.replicated, WhitenedPrefix):
            self.replicated.fit(self._head_states(examples["text"].to_pylist()))
        elif self.replicated is not None and not self._starts_by_itself:
            vectors = soft_prompt.initial_vectors(
                self._model(), self.asked, self.settings, self.seed
            )
            if self.settings.kind == "prefix":
                # The states that the words have in every layer, computed by the sharded model.
                self.module.eval()
                vectors = self.module(None, vectors)
            self._set(vectors)

    def training_set(self, examples: pa.Table, epoch: int) -> targets.Examples:
        """The same examples in every epoch, made once for all of them."""
        for known, made in self._made:
            if known is examples:
                return made
        names = examples["id"].to_pylist()
        shares = targets.of_examples(self.settings, examples, len(self.asked.labels))
        suffixes = self.asked.suffixes(examples["text"].to_pylist())
        made = targets.Examples(self.settings, self.asked, names, suffixes, shares)
        self._made.append((examples, made))
        return made

    def loss(self, batch: targets.TuningBatch) -> Tensor:
        """Sum of the examples' losses, each times its class weight; see `TuningSettings`."""
        with onednn_linear(self._model()):
            words = self._word_scores(batch.ids, batch.pads)
        shares = batch.targets.to(words.device)
        weights = self.weights.to(words.device)
        if self.settings.objective == "language_modelling":
            first = [self.asked.owners.index(label) for label in range(len(self.asked.labels))]
            return -(words[:, first] * shares * weights).sum()
        scores = scorer.label_scores(words, self.asked.trie, "sum")
        return (kl_div(scores, shares, reduction="none") * weights).sum()

    def flops(self, lengths: np.ndarray) -> float:
        """Model FLOPs of a training step on examples of these `lengths`."""
        body, head = self.module_sizes
        tokens, kept = int(lengths.sum()), len(lengths) * (1 + len(self.asked.trie.tokens))
        layers = transformer_flops(weights=body, tokens=tokens, trained=False)
        return layers + transformer_flops(weights=head, tokens=kept, trained=False)

    def score_batches(self, texts: Sequence[str]) -> list[scorer.ScoringBatch]:
        """Batches of equal length, the longest first so that memory peaks at once."""
        return self.asked.batches(texts, tokens=self.micro_batch_tokens, vocabulary=self.vocabulary)

    def scores(self, batch: scorer.ScoringBatch) -> Tensor:
        """[rows, labels] log-probabilities; see `launcher.method.Classifier.scores`."""
        with torch.no_grad(), onednn_linear(self._model()):
            words = self._word_scores(batch.ids, batch.pads)
        return scorer.label_scores(words, self.asked.trie, "sum")

    def notes(self) -> dict[str, int]:
        """Texts cut to fit the model's positions."""
        return {"truncated_texts": len(self.asked.truncated)}

    def export(self, state: dict[str, Tensor], folder: Path) -> None:
        """Write `adapter/` in the run folder; `state` holds LoRA's updates, if it is that."""
        base = self.identity["base"]["path"]
        if self.replicated is None:
            # Named by the engine's module, which holds the model.
            named = {name.removeprefix("model."): value for name, value in state.items()}
            tensors = {lora.peft_name(name): value.float() for name, value in named.items()}
            described = _describe_lora(self.settings, self._model())
            described.base_model_name_or_path, described.inference_mode = base, True
        else:
            with torch.no_grad():
                tensors = {"prompt_embeddings": self._learned().float().cpu()}
            described = None
            if soft_prompt.is_in_front(self.asked):
                kept = self.settings
                if kept.kind == "p_tuning":
                    kept = kept.model_copy(update={"kind": "prompt"})
                described = soft_prompt.peft_config(
                    kept, self.model_config, self.vectors, base=base, inference=True
                )
        adapter.save(folder / "adapter", tensors, described, self.identity)

    def load_export(self, folder: Path) -> None:
        """Go on with what `export` wrote; see `launcher.method.Learner`."""
        self.load_adapter(folder / "adapter")

    def load_adapter(self, folder: Path) -> None:
        """Take an adapter's tensors, written here or by PEFT.

        Raises:
            InputError: it is corrupt, or belongs to another base, prompt or label set.
        """
        tensors = adapter.load(folder, self.identity)
        if self.replicated is None:
            updates = lora.updates(self._model())
            adapter.check_shapes(folder, tensors, {n: full_shape(p) for n, p in updates.items()})
            adapter.check_scale(folder, self.settings.lora)
            # What is written into a gathered weight is kept only where that is asked for.
            for name, parameter in updates.items():
                with pretrained.writable(parameter):
                    parameter.data.copy_(tensors[name])
            return
        adapter.check_shapes(folder, tensors, {"prompt_embeddings": (self.vectors, self._width())})
        self._set(tensors["prompt_embeddings"])

    @cached_property
    def module_sizes(self) -> tuple[int, int]:
        """Weights of the layers, and of the head, that a token is multiplied with."""
        head = self._model().get_output_embeddings().weight
        tables = {id(head), id(self._model().get_input_embeddings().weight)}
        layers = [p for p in self._model().parameters() if id(p) not in tables]
        return sum(math.prod(full_shape(p)) for p in layers), math.prod(full_shape(head))

    def _head_states(self, texts: Sequence[str]) -> list[whitened_prefix.HeadStates]:
        """What the heads see of texts that stand behind the vectors, without them.

        The same texts on every rank: collective under ZeRO 3, and equal everywhere."""
        step = -(-len(texts) // _WATCHED_TEXTS)
        self.module.eval()
        common = len(self.asked.encoded.head) - self.vectors
        watched = whitened_prefix.watched(self._model(), common)
        with torch.no_grad(), onednn_linear(self._model()), watched as states:
            for batch in self.score_batches(texts[::step]):
                self.module(batch.ids, None, None, in_every_layer=True)
        return states

    @property
    def _starts_by_itself(self) -> bool:
        """Whether the first values are the network's own, as PEFT draws them."""
        return self.settings.init == "random" and self.settings.kind != "prompt"

    def _model(self) -> Any:
        return getattr(self.module, "module", self.module).model

    def _learned(self) -> Tensor:
        """[vectors, width] float32, with its gradient: what the network gives now."""
        assert self.replicated is not None
        places = torch.arange(self.vectors, device=next(self.replicated.parameters()).device)
        learned: Tensor = self.replicated(places)
        return learned

    def _word_scores(self, ids: Tensor, pads: Tensor | None) -> Tensor:
        learned = None if self.replicated is None else self._learned()
        words: Tensor = self.module(ids, learned, pads, self.settings.kind == "prefix")
        return words

    def _set(self, vectors: Tensor) -> None:
        """Make the network give `vectors`; one that computes them becomes a plain table."""
        assert self.replicated is not None
        if list(self.replicated.state_dict()) != ["embedding.weight"]:
            device = next(self.replicated.parameters()).device
            table = nn.Embedding(vectors.shape[0], vectors.shape[1], device=device)
            self.replicated = nn.Sequential(OrderedDict(embedding=table))
        kept: Any = self.replicated.get_submodule("embedding")
        with torch.no_grad():
            kept.weight.copy_(vectors)

    def _width(self) -> int:
        described = soft_prompt.peft_config(
            self.settings, self.model_config, self.vectors, base="", inference=True
        )
        layers = 2 * described.num_layers if self.settings.kind == "prefix" else 1
        return int(layers * described.token_dim)


class _Asked(nn.Module):
    """The frozen model with everything that is computed by it, as one pass for DeepSpeed."""

    def __init__(self, model: PreTrainedModel, asked: Question) -> None:
        super().__init__()
        self.model = model
        self.head, self.trie = asked.encoded.head, asked.trie

    def forward(
        self,
        ids: Tensor | None,
        learned: Tensor | None,
        pads: Tensor | None = None,
        in_every_layer: bool = False,
    ) -> Tensor:
        """[rows, words] log-probabilities of the label words behind the prompts `ids`.

        Without `ids`: the states in every layer that the input vectors `learned` lead to. Without
        the keys and values that are `learned`: logits [rows, 1, vocabulary] behind what follows
        them, where it stands.
        """
        if ids is None:
            assert learned is not None
            return soft_prompt.computed_prefix(self.model, learned)
        before, head = scorer.NO_PREFIX, self.head
        if in_every_layer and learned is None:
            vectors = sum(i >= self.model.config.vocab_size for i in head)
            rows = torch.tensor([*head[vectors:]], dtype=torch.int64).expand(len(ids), -1)
            rows = torch.cat([rows, ids], dim=1).to(self.model.device)
            places = torch.arange(vectors, vectors + rows.shape[1], device=rows.device)
            logits: Tensor = self.model(
                input_ids=rows, position_ids=places[None], use_cache=False, logits_to_keep=1
            ).logits
            return logits
        if in_every_layer:
            assert learned is not None
            states = learned.to(self.model.dtype)
            before = soft_prompt.learned_prefix(states, self.model.config)
            head, learned = head[len(states) :], None
        prefix = scorer.compute_prefix(self.model, head, learned, before)
        return scorer.score_words(self.model, prefix, ids, self.trie, learned, pads)


def _read(config: Any, labels: Sequence[str]) -> tuple[Question, Any]:
    """`question.read_question`, and whether what is to be learned fits it."""
    asked, model_config = question.read_question(config, labels)
    if config.tuning.kind == "prefix" and not soft_prompt.is_in_front(asked):
        raise InputError(
            f"prompt.template {config.prompt.template.name!r}: kind prefix has its keys and values "
            "in front of everything, expected one soft span there, as in {soft:20}{text}"
        )
    if config.tuning.init == "whitened":
        whitened_prefix.check_model(model_config)
    targets.class_weights(config.tuning, labels)
    return asked, model_config


def _describe_lora(settings: TuningSettings, model: PreTrainedModel) -> LoraConfig:
    return lora.describe(
        settings.lora,
        model,
        task="CAUSAL_LM",
        # The query and value projections of PanGu and Llama kinds, and of GPT-2.
        usual=("q_proj", "v_proj", "c_attn"),
        key="tuning.lora",
    )


def _init(settings: TuningSettings) -> str:
    projects = settings.kind == "prefix" and settings.prefix_projection
    network = settings.kind == "p_tuning" or projects
    return settings.init or ("random" if network or settings.kind == "lora" else "text")


def _checkpoint_layers(model: PreTrainedModel) -> None:
    """Compute the layers' activations again in the backward pass.

    Not by transformers' own switch: that one takes away the cache, which holds the prefix. Shapes
    are not compared, because ZeRO 3 empties weights between the two computations. The second one
    happens outside `loss`, so it is told to use the same kernels.
    """
    layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    if not layers:
        raise InputError(
            f"parallel.activation_checkpointing: {model.config.model_type} models do not say what "
            "their layers are: set it to false"
        )
    for layer in layers:
        layer.forward = partial(
            checkpoint,
            layer.forward,
            use_reentrant=False,
            determinism_check="none",
            context_fn=lambda: (nullcontext(), onednn_linear(model)),
        )
