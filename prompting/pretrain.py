"""Causal language modelling on short texts: domain adaptation of a PanGu, or a nano from nothing.

Each training example is put into one of several prompt templates with its label word behind it, as
PanGu-Alpha-Evolution was trained on many tasks in one form, or stands as plain text.
"""

import math
import random
from collections.abc import Sequence
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from launcher import pretrained
from launcher.cpu_linear import onednn_linear
from launcher.distributed import full_shape
from launcher.engine import DTYPES
from launcher.errors import InputError
from launcher.footprint import Footprint
from launcher.throughput import transformer_flops
from prompting import models
from prompting.pangu import PanguConfig, PanguForCausalLM, PanguTokenizer, train_vocabulary
from prompting.settings import PretrainSettings
from prompting.template import build_prompt, encode_pieces, encode_prompt, leading_ids

TRAINS, CLASSIFIES = True, False
# Orders of the choices that are tokenized per template; each example draws one of them.
_CHOICE_ORDERS = 64
# An answer's tokens: for each the ids that are right, of which the first is what stands there.
Answer = list[list[int]]
# Ids, what predicting each of them counts, and the ids that are right in its place.
Sequenced = tuple[list[int], list[float], list[list[int]]]


def trains_model(config: Any) -> bool:
    """Every weight is."""
    return True


def prepare(config: Any, dataset: Any) -> Any:
    """Train the vocabulary on the train split where a nano is started without one."""
    for template in config.pretrain.templates:
        if template.soft_spans:
            raise InputError(
                f"pretrain.templates: {template.name!r} has soft spans, which only "
                "prompting.tuning fills: take them out"
            )
    shape = config.pretrain.shape
    if (shape is None) == (config.model.path is None):
        raise InputError(
            "pretrain: expected either pretrain.shape (start from nothing) or model.path "
            f"(continue from it); seen {'neither' if shape is None else 'both'}"
        )
    if shape is None or shape.vocabulary is not None:
        return config
    path = config.run_dir / "vocab.model"
    if not path.exists():
        prompts = [_filled(template, dataset.labels) for template in config.pretrain.templates]
        texts = dataset.splits["train"]["text"].to_pylist()
        whole = dataset.labels if shape.whole_labels else ()
        corpus = [*texts, *dataset.labels, *prompts]
        train_vocabulary(corpus, path, shape.vocabulary_size, whole)
    shape = shape.model_copy(update={"vocabulary": str(path)})
    pretrain = config.pretrain.model_copy(update={"shape": shape})
    return config.model_copy(update={"pretrain": pretrain})


def build(config: Any, labels: Sequence[str]) -> "Pretraining":
    """The method with its model, loaded or initialised from `run.seed`."""
    settings: PretrainSettings = config.pretrain
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    if settings.shape is None:
        model_config = models.check_checkpoint(config.model.path)
        tokenizer = models.load_tokenizer(config.model.path, model_config)
        model = models.load_model(config.model.path, config.model.precision, config.model.attention)
    else:
        assert settings.shape.vocabulary is not None, "prepare() trains it"
        tokenizer = PanguTokenizer(settings.shape.vocabulary)
        model = nano(settings, len(tokenizer), config.run.seed)
        torch.nn.Module.to(model, dtype=DTYPES[config.model.precision])
    if config.parallel.activation_checkpointing:
        pretrained.recompute_layers(model)
    return Pretraining(settings, labels, model, tokenizer, config.run.seed)


def check(config: Any, dataset: Any) -> list[str]:
    """Validate the model's files or shape."""
    settings: PretrainSettings = config.pretrain
    if settings.shape is None:
        models.load_tokenizer(config.model.path, models.check_checkpoint(config.model.path))
        return [f"continues from {config.model.path}"]
    with torch.device("meta"):
        model = nano(settings, settings.shape.vocabulary_size, 0)
    count = sum(parameter.numel() for parameter in model.parameters())
    return [f"a new PanGu of {count:,} parameters"]


def footprint(config: Any, dataset: Any, ranks: int) -> Footprint:
    """What a step needs; see `launcher.footprint`."""
    from prompting.footprint import of_pretrain  # it builds this module's method

    return of_pretrain(config, dataset, ranks)


def describe(config: Any) -> dict[str, str]:
    """How reports name this run."""
    return {"title": "causal language modelling", "prompt": ""}


class Pretraining:
    """Trains every weight on the texts; see `launcher.method.Learner`."""

    def __init__(
        self,
        settings: PretrainSettings,
        labels: Sequence[str],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
    ) -> None:
        self.module: Any = _TokenLoss(model)
        self.replicated = None
        self.settings = settings
        self.tokenizer = tokenizer
        self.labels = list(labels)
        self.seed = seed
        self.limit = models.max_positions(model.config)
        self.end = end_of_text(tokenizer)
        self._encoded: list[tuple[pa.Table, bool, list[list[int]]]] = []
        longest = max(
            (len(h) + len(t) for orders in self.forms for h, t in orders), default=0
        ) + max(map(len, self.label_ids))
        if longest >= self.limit:
            raise InputError(
                f"pretrain.templates: a prompt and its answer have {longest} tokens, which leaves "
                f"no room for a text in the model's {self.limit} positions"
            )

    def start(self, examples: pa.Table) -> None:
        """The weights are there already."""

    def flops(self, lengths: np.ndarray) -> float:
        """Model FLOPs of a training step on examples of these lengths."""
        return transformer_flops(weights=self.size, tokens=int(lengths.sum()), trained=True)

    def training_set(self, examples: pa.Table, epoch: int) -> "Epoch":
        """Each example in its form for this epoch, drawn from the seed and the epoch alone."""
        texts = self._ids(examples, first=False)
        at_start = self._ids(examples, first=True)
        labels = [-1 if label is None else label for label in examples["label"].to_pylist()]
        generator = random.Random(self.seed * 1_000_003 + epoch)
        # Which labels may be seen must not change between epochs.
        seen = np.random.default_rng(self.seed).random(len(texts)) < self.settings.labelled_share
        forms: list[tuple[int, int]] = []
        answers: list[Answer] = []
        for row, (label, may_see) in enumerate(zip(labels, seen.tolist(), strict=True)):
            plain = label < 0 or not may_see or not self.settings.templates
            plain = plain or generator.random() < self.settings.raw_text_share
            words = self._words(texts[row]) if plain and self.settings.recall_share else []
            recalls = bool(words) and generator.random() < self.settings.recall_share
            asked = recalls or not plain
            template = generator.randrange(len(self.settings.templates)) if asked else -1
            forms.append((template, generator.randrange(_CHOICE_ORDERS)))
            if recalls:
                # Any of its words is right; which one stands there is drawn.
                place = generator.randrange(len(words))
                ending = [] if self.settings.block_tokens is None else [[self.end]]
                answers.append([words[place:] + words[:place], *ending])
            else:
                answers.append([] if plain else [[i] for i in self.label_ids[label]])
        starts = [self.starts[template] for template, _ in forms]
        texts = [a if s else t for s, a, t in zip(starts, at_start, texts, strict=True)]
        names, blocks = examples["id"].to_pylist(), list[Sequenced]()
        if self.settings.block_tokens is not None:
            # The same texts in every epoch, which therefore all have as many blocks.
            never = self.settings.raw_text_share == 1 or not self.settings.templates
            packed = [
                never or label < 0 or not may_see
                for label, may_see in zip(labels, seen, strict=True)
            ]
            places = [*compress(range(len(texts)), packed)]
            if self.settings.related_blocks:
                places = _related(places, examples["text"].to_pylist(), generator)
            else:
                generator.shuffle(places)
            stream = [self.sequence(forms[p], texts[p], answers[p]) for p in places]
            blocks = _blocks(stream, min(self.settings.block_tokens, self.limit))
            alone = [not joined for joined in packed]
            texts, answers, forms, names = (
                [*compress(column, alone)] for column in (texts, answers, forms, names)
            )
        return Epoch(self, names, texts, answers, forms, blocks, generator)

    def loss(self, batch: "PretrainBatch") -> Tensor:
        """Weighted sum of the cross-entropies of the tokens to predict."""
        device = next(self.module.parameters()).device
        kept = self._kept(batch.weights > 0)
        tensors = [batch.ids, batch.targets, batch.weights, kept]
        if self.settings.shift_positions:
            # Only then: at pads' positions transformers sees packed texts, and masks them apart.
            tensors.append(batch.positions)
        loss: Tensor = self.module(*(tensor.to(device) for tensor in tensors))
        return loss

    def export(self, state: dict[str, Tensor], folder: Path) -> None:
        """Write `model/` in the run folder: what `model.path` of other runs then names."""
        pretrained.quiet()
        weights = {name.removeprefix("model."): value for name, value in state.items()}
        model = getattr(self.module, "module", self.module).model
        model.save_pretrained(folder / "model", state_dict=weights)
        self.tokenizer.save_pretrained(folder / "model")

    def _kept(self, needed: Tensor) -> Tensor:
        """Positions whose logits are computed, [kept] or [rows, kept]; `needed` is [rows, length].

        On the CPU: a GPU would have to be waited for."""
        if not isinstance(getattr(self.module, "module", self.module).model, PanguForCausalLM):
            return needed.any(dim=0).nonzero()[:, 0]
        # Each row's own positions first; then as many others as the row with the most has.
        most = int(needed.sum(dim=1).max())
        return needed.int().argsort(dim=1, descending=True, stable=True)[:, :most]

    def _ids(self, examples: pa.Table, *, first: bool) -> list[list[int]]:
        """Token ids of every text inside or `first` in a prompt, tokenized once for all epochs."""
        for known, known_first, ids in self._encoded:
            if known is examples and known_first == first:
                return ids
        ids = encode_pieces(self.tokenizer, examples["text"].to_pylist(), first=first)
        self._encoded.append((examples, first, ids))
        return ids

    def _words(self, text: list[int]) -> list[int]:
        """The ids of a text that stand for more than a blank."""
        return [i for i in text if i not in self.blanks]

    def sequence(self, form: tuple[int, int], text: list[int], answer: Answer) -> Sequenced:
        """A text in its form, with what predicting each id counts."""
        template, order = form
        if template < 0:
            ids = [*self.leading, *text, self.end][: self.limit]
            return ids, [1.0] * len(ids), [[i] for i in ids]
        head, tail = self.forms[template][order]
        text = text[: self.limit - len(head) - len(tail) - len(answer)]
        said = float(self.settings.loss_on == "all")
        weights = [said] * len(head) + [1.0] * len(text) + [said] * len(tail)
        weights += [self.settings.answer_weight] * len(answer)
        ids = [*head, *text, *tail]
        right = [[i] for i in ids] + answer
        return [*ids, *(own[0] for own in answer)], weights, right

    @cached_property
    def blanks(self) -> set[int]:
        """Ids that stand for a blank alone."""
        tokens = range(len(self.tokenizer))
        return {i for i in tokens if not str(self.tokenizer.decode([i])).strip()}

    @cached_property
    def size(self) -> int:
        """Weights of the model."""
        return sum(math.prod(full_shape(p)) for p in self.module.parameters())

    @cached_property
    def leading(self) -> list[int]:
        """Ids that begin a plain text."""
        return leading_ids(self.tokenizer)

    @cached_property
    def forms(self) -> list[list[tuple[list[int], list[int]]]]:
        """(head, tail) ids by template and order of the choices."""
        generator = random.Random(self.seed)
        forms = []
        for template in self.settings.templates:
            orders = [self.labels] * _CHOICE_ORDERS
            if self.settings.shuffle_choices:
                orders = [generator.sample(self.labels, len(self.labels)) for _ in orders]
            encoded = [
                encode_prompt(build_prompt(template, order), self.tokenizer) for order in orders
            ]
            forms.append([(prompt.head, prompt.tail) for prompt in encoded])
        return forms

    @cached_property
    def label_ids(self) -> list[list[int]]:
        """Token ids of each label word and the end of the text behind it."""
        return [[*ids, self.end] for ids in encode_pieces(self.tokenizer, self.labels)]

    @cached_property
    def starts(self) -> list[bool]:
        """Whether a template begins with the text; the last one stands for plain text."""
        prompts = [build_prompt(template, self.labels) for template in self.settings.templates]
        return [not prompt.head for prompt in prompts] + [True]


class _TokenLoss(nn.Module):
    """The model with its loss, so that the head, and PanGu's query layer, are paid only where a
    token is to be predicted: for a nano they cost more than all other layers together."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        ids: Tensor,
        targets: Tensor,
        weights: Tensor,
        kept: Tensor,
        positions: Tensor | None = None,
    ) -> Tensor:
        """The weighted sum of the cross-entropies at the places `kept`; the others [rows, length],
        `targets` [rows, length, most]. Without `positions` every row begins at 0."""
        with onednn_linear(self.model):
            logits = self.model(
                input_ids=ids, position_ids=positions, logits_to_keep=kept, use_cache=False
            ).logits
        kept = kept.expand(len(ids), -1)
        targets = torch.take_along_dim(targets, kept[..., None], dim=1)
        weights = weights.gather(1, kept)
        logits, targets = logits.float().flatten(0, 1), targets.flatten(0, 1)
        if targets.shape[1] == 1:
            losses = cross_entropy(logits, targets[:, 0], reduction="none")
        else:
            chosen = logits.log_softmax(1).gather(1, targets.clamp(min=0))
            given = (targets >= 0).float()
            losses = -(chosen * given).sum(1) / given.sum(1)
        return losses @ weights.flatten()


class PretrainBatch:
    """Sequences padded on the right, where a causal model needs no mask."""

    def __init__(self, sequences: list[Sequenced], begins: list[int], pad: int) -> None:
        longest = max(len(ids) for ids, *_ in sequences)
        most = max(len(own) for *_, right in sequences for own in right)
        self.ids = torch.full((len(sequences), longest), pad)
        """[rows, length] int64."""
        self.targets = torch.full((*self.ids.shape, most), -1)
        """[rows, length, most] int64, the ids that may follow, each as likely as the next; -1: no
        further one."""
        self.weights = torch.zeros(self.ids.shape)
        """[rows, length] float32, what predicting it counts; 0: nothing."""
        self.positions = torch.zeros_like(self.ids)
        """[rows, length] int64; a pad stands where the row ends, which the model has."""
        self.targets[..., 0] = pad
        for row, (ids, weights, right) in enumerate(sequences):
            self.ids[row, : len(ids)] = torch.tensor(ids)
            padded = [own + [-1] * (most - len(own)) for own in right[1:]]
            following = torch.tensor(padded, dtype=torch.int64)
            self.targets[row, : len(padded)] = following.reshape(len(padded), most)
            self.weights[row, : len(ids) - 1] = torch.tensor(weights[1:])
            places = torch.arange(longest).clamp(max=len(ids) - 1)
            self.positions[row] = begins[row] + places


class Epoch:
    """The examples of one epoch; see `launcher.method.TrainingSet`."""

    def __init__(
        self,
        method: Pretraining,
        names: list[str],
        texts: list[list[int]],
        answers: list[Answer],
        forms: list[tuple[int, int]],
        blocks: list[Sequenced],
        generator: random.Random,
    ) -> None:
        self.method, self.texts, self.answers, self.forms = method, texts, answers, forms
        self.blocks = blocks
        self.names = [*names, *(f"block {block}" for block in range(len(blocks)))]
        sequences = map(self._sequence, range(len(texts) + len(blocks)))
        sizes = [(len(ids), sum(weights[1:])) for ids, weights, _ in sequences]
        self.lengths = np.array([length for length, _ in sizes])
        self.weights = np.array([weight for _, weight in sizes])
        room = [
            method.limit - length if method.settings.shift_positions else 0 for length, _ in sizes
        ]
        self.begins = [generator.randint(0, most) for most in room]

    def batch(self, rows: Sequence[int]) -> PretrainBatch:
        """The examples `rows`, assembled and padded."""
        pad = self.method.tokenizer.pad_token_id
        sequences = [self._sequence(row) for row in rows]
        begins = [self.begins[row] for row in rows]
        return PretrainBatch(sequences, begins, 0 if pad is None else pad)

    def _sequence(self, row: int) -> Sequenced:
        if row >= len(self.texts):
            return self.blocks[row - len(self.texts)]
        return self.method.sequence(self.forms[row], self.texts[row], self.answers[row])


def _related(places: list[int], texts: list[str], generator: random.Random) -> list[int]:
    """`places` in random order, but those whose texts share two characters side by side; which two
    of a text's is drawn anew each time."""
    order: dict[str, float] = {}

    def key(place: int) -> tuple[float, float]:
        start = generator.randrange(max(1, len(texts[place]) - 1))
        pair = texts[place][start : start + 2]
        return order.setdefault(pair, generator.random()), generator.random()

    return sorted(places, key=key)


def _blocks(texts: list[Sequenced], size: int) -> list[Sequenced]:
    """All texts one after the other, cut every `size` ids."""
    joined = [i for ids, *_ in texts for i in ids]
    counts = [weight for _, weights, _ in texts for weight in weights]
    right = [own for *_, answers in texts for own in answers]
    # A last block of one id would have nothing to predict.
    cuts = [slice(start, start + size) for start in range(0, len(joined) - 1, size)]
    return [(joined[cut], counts[cut], right[cut]) for cut in cuts]


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that closes a text: the tokenizer's end of text, or [SEP] of a BERT vocabulary."""
    for end in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if end is not None:
            return int(end)
    raise InputError("model.path: the tokenizer has no end-of-text id, which closes the answers")


def nano(settings: PretrainSettings, vocabulary_size: int, seed: int) -> PanguForCausalLM:
    """A PanGu of `pretrain.shape`, initialised from `seed`."""
    shape = settings.shape
    assert shape is not None
    torch.manual_seed(seed)
    return PanguForCausalLM(
        PanguConfig(
            vocab_size=vocabulary_size,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=4 * shape.hidden_size,
            max_position_embeddings=shape.max_position_embeddings,
            embd_pdrop=shape.dropout,
            attn_pdrop=shape.dropout,
            resid_pdrop=shape.dropout,
            initializer_range=shape.initializer_range,
        )
    )


def _filled(template: Any, labels: Sequence[str]) -> str:
    return build_prompt(template, labels).text_with("")
