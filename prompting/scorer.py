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
from transformers import DynamicCache, PreTrainedModel

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

    def cache(self, rows: int) -> DynamicCache | None:
        """A cache that starts with the prefix in each of `rows` rows, without copying it."""
        if self.length == 0:
            return None
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


def compute_prefix(model: PreTrainedModel, ids: Sequence[int]) -> Prefix:
    """States of the common prefix `ids`, computed once; gradients flow back through them."""
    if not ids:
        return Prefix(0, [], [])
    inputs = torch.tensor([list(ids)], device=model.device)
    cache = model(input_ids=inputs, use_cache=True, logits_to_keep=1).cache
    return Prefix(
        len(ids), [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]
    )


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


def score_words(model: PreTrainedModel, prefix: Prefix, ids: Tensor, trie: LabelTrie) -> Tensor:
    """Log-probability of every label word after every prompt.

    Args:
        model: any causal LM of transformers that takes a 4-D mask (attention eager or sdpa).
        prefix: states of the ids in front of `ids`.
        ids: [rows, length] int64, the rest of each prompt.

    Returns:
        [rows, words] float32, the sum over the word's tokens of log p(token | prompt, tokens
        before it).
    """
    rows, length = ids.shape
    device = model.device
    fed = torch.tensor(trie.tokens, dtype=torch.int64)
    inputs = torch.cat([ids, fed.expand(rows, -1)], dim=1).to(device)
    depths = torch.tensor(trie.depths, dtype=torch.int64)
    positions = prefix.length + torch.cat([torch.arange(length), length - 1 + depths])
    logits = model(
        input_ids=inputs,
        attention_mask=_tree_mask(prefix.length, length, trie, model.dtype, device),
        position_ids=positions.to(device)[None].expand(rows, -1),
        cache=prefix.cache(rows),
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
    cache = prefix.cache(rows) or DynamicCache()
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


def _tree_mask(
    prefix: int, length: int, trie: LabelTrie, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[1, 1, length + fed, prefix + length + fed] additive mask: causal, then by ancestry."""
    fed = len(trie.tokens)
    seen = torch.zeros(length + fed, prefix + length + fed, dtype=torch.bool)
    seen[:, :prefix] = True
    seen[:length, prefix : prefix + length] = torch.ones(length, length, dtype=torch.bool).tril()
    seen[length:, prefix : prefix + length] = True
    seen[length:, prefix + length :] = trie.ancestors
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    return mask[None, None].to(device)
