"""How likely is each label after each prompt, exactly and with as little computation as can be.

What all prompts begin with is computed once (`Prefix`); what follows is computed in batches of
equal length, so nothing is padded; the label trie is fed behind each prompt in the same pass, each
branch seeing only the prompt and its own ancestors; and logits are asked for only where a label's
token is predicted. All of it is exact for causal models: the sums equal those of one sequence per
label without a cache, up to rounding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from prompting.labels import LabelTrie

_MAX_LOGITS = 2**26
"""Logits of one pass: 256 MiB in float32, which a large vocabulary reaches before its tokens do."""

_CACHED_LOGITS = 2**18
"""Logits that a core's cache holds: 1 MiB in float32."""


@dataclass(frozen=True)
class Prefix:
    """States of the ids that every prompt begins with, one row for all of them."""

    length: int
    keys: list[Tensor]
    """One [1, heads, length, head size] per layer."""
    values: list[Tensor]

    def cache(self) -> Cache | None:
        """A cache that puts the prefix before the keys and values of one pass, whatever its rows.

        It keeps nothing of the pass, so activation checkpointing may run a layer again.
        """
        if self.length == 0:
            return None
        return Cache(layers=[*map(_PrefixLayer, self.keys, self.values)])

    def growing_cache(self, rows: int) -> DynamicCache:
        """A cache for many passes that starts with the prefix in each of `rows` rows."""
        cache: Any = DynamicCache()
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(key[:, :, :0], value[:, :, :0], layer)
            cache.layers[layer].keys = key.expand(rows, -1, -1, -1)
            cache.layers[layer].values = value.expand(rows, -1, -1, -1)
        return cache


@dataclass(frozen=True)
class ScoringBatch:
    """Prompts of one length, without their common prefix."""

    rows: list[int]
    """Where each prompt stood in the list that was batched."""
    ids: Tensor
    """[rows, length] int64."""
    pads: Tensor | None = None
    """[rows] int64, how many of each row's first ids stand for nothing; None: none."""


NO_PREFIX = Prefix(0, [], [])


def compute_prefix(
    model: PreTrainedModel,
    ids: Sequence[int],
    soft: Tensor | None = None,
    before: Prefix = NO_PREFIX,
) -> Prefix:
    """States of the common prefix `ids`, computed once; gradients flow back through them.

    Args:
        soft: [vectors, hidden], what ids past the vocabulary stand for; see `embed`.
        before: states in front of `ids`.
    """
    if not ids:
        return before
    inputs = torch.tensor([list(ids)])
    positions = torch.arange(before.length, before.length + len(ids), device=model.device)[None]
    count = model.config.get_text_config().num_hidden_layers
    layers = [_RecordingLayer(*states) for states in zip(before.keys, before.values, strict=True)]
    layers = layers or [_RecordingLayer() for _ in range(count)]
    model(
        **embed(model, inputs, soft),
        position_ids=positions,
        cache=Cache(layers=[*layers]),
        use_cache=True,
        logits_to_keep=1,
    )
    recorded = [layer.recorded for layer in layers if layer.recorded is not None]
    return Prefix(
        before.length + len(ids), [key for key, _ in recorded], [value for _, value in recorded]
    )


def embed(model: PreTrainedModel, ids: Tensor, soft: Tensor | None) -> dict[str, Tensor]:
    """The model's input for `ids`: themselves, or their embeddings where some are soft.

    Args:
        ids: [rows, length] int64 on the CPU; the vocabulary's size + n stands for `soft[n]`.
        soft: [vectors, hidden] in any float type; None: no id is soft.
    """
    vocabulary = model.config.get_text_config().vocab_size
    is_soft = ids >= vocabulary
    if soft is None or not bool(is_soft.any()):
        return {"input_ids": ids.to(model.device)}
    is_soft, ids = is_soft.to(model.device), ids.to(model.device)
    hard: Tensor = model.get_input_embeddings()(ids.masked_fill(is_soft, 0))
    learned = soft.to(hard.dtype)[(ids - vocabulary).clamp(min=0)]
    return {"inputs_embeds": torch.where(is_soft[..., None], learned, hard)}


def length_batches(
    suffixes: Sequence[Sequence[int]], *, tokens: int, fed: int, vocabulary: int
) -> Iterator[ScoringBatch]:
    """Cut prompts into batches of exactly equal length, the longest first.

    Args:
        suffixes: ids of each prompt behind the common prefix, at least one each.
        tokens: tokens per batch, those of the trie included.
        fed: trie nodes fed behind each prompt.
        vocabulary: entries of the head, which bounds the rows by memory.
    """
    by_length: dict[int, list[int]] = {}
    for row, suffix in enumerate(suffixes):
        by_length.setdefault(len(suffix), []).append(row)
    for length in sorted(by_length, reverse=True):
        rows = by_length[length]
        most = max(1, min(tokens // (length + fed), _MAX_LOGITS // (vocabulary * (fed + 1))))
        # Cut evenly: a last batch of three rows would cost almost as much as a full one.
        count = -(-len(rows) // most)
        for part in range(count):
            own = rows[part * len(rows) // count : (part + 1) * len(rows) // count]
            yield ScoringBatch(own, torch.tensor([list(suffixes[row]) for row in own]))


def left_padded(suffixes: Sequence[Sequence[int]], rows: Sequence[int]) -> ScoringBatch:
    """Prompts of any lengths as one batch, padded in front, where what follows them lines up."""
    longest = max(map(len, suffixes))
    pads = [longest - len(suffix) for suffix in suffixes]
    ids = torch.tensor([[0] * pad + [*own] for pad, own in zip(pads, suffixes, strict=True)])
    return ScoringBatch([*rows], ids, torch.tensor(pads) if any(pads) else None)


def score_words(
    model: PreTrainedModel,
    prefix: Prefix,
    ids: Tensor,
    trie: LabelTrie,
    soft: Tensor | None = None,
    pads: Tensor | None = None,
) -> Tensor:
    """Log-probability of every label word after every prompt.

    Args:
        model: any causal LM of transformers that takes a 4-D mask (attention eager or sdpa).
        prefix: states of the ids in front of `ids`.
        ids: [rows, length] int64, the rest of each prompt.
        soft: [vectors, hidden], what ids past the vocabulary stand for; see `embed`.
        pads: [rows] int64, how many of each row's first ids stand for nothing; None: none.

    Returns:
        [rows, words] float32, the sum over the word's tokens of log p(token | prompt, tokens
        before it).
    """
    rows, length = ids.shape
    device = model.device
    fed = torch.tensor(trie.tokens, dtype=torch.int64)
    inputs = torch.cat([ids, fed.expand(rows, -1)], dim=1)
    depths = torch.tensor(trie.depths, dtype=torch.int64)
    places = torch.cat([torch.arange(length), length - 1 + depths])[None]
    if pads is not None:
        places = (places - pads[:, None]).clamp(min=0)
    positions = (prefix.length + places).expand(rows, -1)
    logits = model(
        **embed(model, inputs, soft),
        attention_mask=_tree_mask(prefix.length, length, trie, pads, model.dtype).to(device),
        position_ids=positions.to(device),
        cache=prefix.cache(),
        use_cache=prefix.length > 0,
        logits_to_keep=torch.arange(length - 1, length + len(depths), device=device),
    ).logits.float()
    sources = torch.tensor([source for source, _ in trie.edges], device=device)
    tokens = torch.tensor([token for _, token in trie.edges], device=device)
    # A few rows at a time stay in a CPU's cache, where log_softmax is one pass over them.
    size = max(1, _CACHED_LOGITS // logits[0].numel()) if device.type == "cpu" else rows
    edges = torch.cat([part.log_softmax(dim=2)[:, sources, tokens] for part in logits.split(size)])
    return edges @ trie.steps.to(device).T


def label_scores(
    word_scores: Tensor, trie: LabelTrie, scoring: str, empty: Tensor | None = None
) -> Tensor:
    """Label log-probabilities that add up to 1 over the labels.

    Args:
        word_scores: [rows, words] sums of token log-probabilities.
        scoring: `sum`; `mean`, divided by the word's tokens; or `pmi`, minus `empty`: pointwise
            mutual information. With one word per label that is the contextual calibration of Zhao
            et al. 2021 (section 4, W = diag(p_cf)^-1, b = 0) with the empty text as its input: W p
            divided by its sum, where they take softmax(W p), which orders the labels alike.
        empty: [1, words], the sums after the prompt with an empty text.

    Returns:
        [rows, labels] float32.
    """
    if scoring == "mean":
        word_scores = word_scores / trie.lengths.to(word_scores.device)
    elif scoring == "pmi":
        assert empty is not None
        word_scores = word_scores - empty
    return torch.log_softmax(trie.per_label(word_scores), dim=1)


def generate(
    model: PreTrainedModel, prefix: Prefix, ids: Tensor, *, new_tokens: int, lockstep: bool
) -> list[list[int]]:
    """Greedy continuation of every prompt, up to and without the model's end-of-text id.

    Args:
        ids: [rows, length] int64 behind the prefix.
        new_tokens: ids per row at most.
        lockstep: take exactly `new_tokens` steps, as sharded ranks must all run the same number
            of passes; otherwise stop when every row has ended.
    """
    rows = len(ids)
    ends = model.generation_config.eos_token_id
    ending = torch.tensor(ends if isinstance(ends, list) else [ends] if ends is not None else [-1])
    cache = prefix.growing_cache(rows)
    step = ids.to(model.device)
    position = prefix.length
    ended = torch.zeros(rows, dtype=torch.bool)
    produced: list[Tensor] = []
    for _ in range(new_tokens):
        positions = torch.arange(position, position + step.shape[1], device=model.device)
        output = model(
            input_ids=step,
            position_ids=positions[None].expand(rows, -1),
            cache=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        position += step.shape[1]
        step = output.logits[:, -1].argmax(dim=1, keepdim=True)
        produced.append(step[:, 0].cpu())
        ended |= torch.isin(produced[-1], ending)
        if bool(ended.all()) and not lockstep:
            break
    stops = set(ending.tolist())
    outputs = []
    for row in torch.stack(produced, dim=1).tolist():
        end = next((i for i, token in enumerate(row) if token in stops), len(row))
        outputs.append(row[:end])
    return outputs


class _PrefixLayer(DynamicLayer):
    """One layer's states of a prefix, which a pass sees before its own."""

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = keys is not None

    @property
    def shared(self) -> tuple[Tensor, Tensor] | None:
        """What PanGu attends to without a copy for each row."""
        return None if self.keys is None or self.values is None else (self.keys, self.values)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The prefix's [1, heads, length, size] in front of each row's; both [rows, ...]."""
        if self.keys is None or self.values is None:
            return key_states, value_states
        rows = len(key_states)
        return (
            torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], dim=2),
            torch.cat([self.values.expand(rows, -1, -1, -1), value_states], dim=2),
        )


class _RecordingLayer(_PrefixLayer):
    """A layer that remembers what the first pass saw in it."""

    recorded: tuple[Tensor, Tensor] | None = None

    @property
    def shared(self) -> None:
        """Nothing: what is recorded is the whole."""
        return None

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        states = super().update(*args, **kwargs)
        # A second call is activation checkpointing's, whose results are the same.
        self.recorded = self.recorded or states
        return states


def _tree_mask(
    prefix: int, length: int, trie: LabelTrie, pads: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """[rows or 1, 1, length + fed, prefix + length + fed] additive mask: causal, then by ancestry.

    A pad is seen by itself alone: a softmax over nothing would not be a number.
    """
    fed = len(trie.tokens)
    seen = torch.zeros(length + fed, prefix + length + fed, dtype=torch.bool)
    seen[:, :prefix] = True
    seen[:length, prefix : prefix + length] = torch.ones(length, length, dtype=torch.bool).tril()
    seen[length:, prefix : prefix + length] = True
    seen[length:, prefix + length :] = trie.ancestors
    seen = seen[None]
    if pads is not None:
        tokens = torch.arange(length + fed)
        padding = torch.nn.functional.pad(tokens[None] < pads[:, None], (prefix, 0))
        own = torch.nn.functional.pad(torch.eye(length + fed, dtype=torch.bool), (prefix, 0))
        seen = seen & ~padding[:, None] | own
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    return mask[:, None]
