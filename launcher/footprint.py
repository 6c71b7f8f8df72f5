"""What a step of a method needs, counted by running it on the device `meta`, where no tensor has
values: the shapes, the kernels and the order are the method's own, so are the figures."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from torch import nn

from launcher.batching import micro_batches, step_order
from launcher.config import Config
from launcher.counting import KEPT_WHOLE, Pass, count

_SAMPLE = 2000
"""Texts whose lengths are looked at."""


@dataclass(frozen=True)
class Footprint:
    """One rank's model and work; numbers of weights are those of the whole model."""

    precision: str
    frozen: int
    trained: int
    """Weights of the module that get gradients."""
    replicated: int
    """Weights trained beside the module, float32 and whole on every rank."""
    small: int
    """Weights of the module in tensors that ZeRO 3 keeps whole."""
    largest: int
    """Weights of the largest tensor."""
    vocabulary: int
    prefix: int
    """Bytes of the keys and values that all examples share, part of the activations."""
    heaviest: dict[bool, Pass]
    """The largest micro batch; by whether weights are sharded, because then linear layers keep
    their inputs even if their weights are frozen."""
    passes: float
    """Micro batches of one rank's step; scoring: 1."""
    later: float
    """The largest micro batch that is not its step's first, in units of `heaviest`; 0: none is."""
    work: float
    """Arithmetic of one rank's step, in units of `heaviest`."""
    examples: float
    """Examples of a step, over all ranks."""
    trains: bool


def of_training(
    config: Config,
    method: Any,
    examples: pa.Table,
    ranks: int,
    *,
    scored: pa.Table | None = None,
    prefix: int = 0,
) -> Footprint:
    """The footprint of a `Learner` whose module, and `replicated`, are on the device `meta`.

    Args:
        scored: examples that are also scored, in evaluation.
        prefix: see `Footprint.prefix`.
    """
    if method.replicated is not None:
        method.replicated.to("meta")
    chosen = sample(examples)
    epoch = method.training_set(chosen, 0)
    tokens, size = config.train.micro_batch_tokens, config.train.global_batch
    steps = [
        [part for part, counts in micro_batches(rows, epoch.lengths, tokens, ranks, 0)]
        for rows in step_order(epoch.lengths, size, config.run.seed)
    ]
    whole = [parts for parts in steps if sum(map(len, parts)) >= size // ranks] or steps
    parts = [part for parts in whole for part in parts]

    def run(index: int) -> Callable[[], None]:
        batch = epoch.batch(parts[index].tolist())

        def step() -> None:
            method.module.train()
            method.loss(batch).backward()

        return step

    def tokens_of(part: np.ndarray) -> int:
        return len(part) * int(epoch.lengths[part].max())

    padded = [tokens_of(part) for part in parts]
    heavy = [run(index) for index in _extremes(padded, [len(part) for part in parts])]
    if scored is not None:
        heavy += _scoring(method, scored)[0]
    return _footprint(
        config,
        method,
        heavy,
        passes=len(parts) / len(whole),
        later=max((tokens_of(part) for own in whole for part in own[1:]), default=0) / max(padded),
        work=sum(padded) / max(padded) / len(whole),
        examples=min(size, len(chosen)),
        trains=True,
        prefix=prefix,
    )


def of_scoring(
    config: Config, method: Any, examples: pa.Table, ranks: int, *, prefix: int = 0
) -> Footprint:
    """The footprint of a `Classifier` whose module is on the device `meta`; a step is a batch on
    every rank."""
    heavy, work, rows = _scoring(method, examples)
    return _footprint(
        config,
        method,
        heavy,
        passes=1,
        later=0.0,
        work=work,
        examples=rows * ranks,
        trains=False,
        prefix=prefix,
    )


def _footprint(
    config: Config,
    method: Any,
    heavy: Sequence[Callable[[], Any]],
    *,
    passes: float,
    later: float,
    work: float,
    examples: float,
    trains: bool,
    prefix: int,
) -> Footprint:
    """`heavy`: first the pass with the most tokens."""
    module, replicated = method.module, getattr(method, "replicated", None)
    model = getattr(module, "model", module)
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 0))
    sizes = [(math.prod(p.shape), trains and p.requires_grad) for p in module.parameters()]
    everything = nn.ModuleList([module] if replicated is None else [module, replicated])
    heaviest: dict[bool, Pass] = {}
    # Where nothing is kept for a backward pass, both are the same.
    for sharded in (False, True) if trains else (False,):
        counted = [count(everything, run, sharded=sharded, vocabulary=vocabulary) for run in heavy]
        most = max(counted, key=lambda own: own.activations)
        heaviest[sharded] = replace(
            counted[0],
            activations=most.activations,
            with_gradients=max(own.with_gradients for own in counted),
            logits=most.logits,
            activations_gathered=max(own.activations_gathered for own in counted),
        )
    heaviest.setdefault(True, heaviest[False])
    return Footprint(
        precision=config.model.precision,
        frozen=sum(size for size, wants in sizes if not wants),
        trained=sum(size for size, wants in sizes if wants),
        replicated=0 if replicated is None else sum(p.numel() for p in replicated.parameters()),
        small=sum(size for size, _ in sizes if size <= KEPT_WHOLE),
        largest=max(size for size, _ in sizes),
        vocabulary=vocabulary,
        prefix=prefix,
        heaviest=heaviest,
        passes=passes,
        later=later,
        work=work,
        examples=examples,
        trains=trains,
    )


def _scoring(method: Any, examples: pa.Table) -> tuple[list[Callable[[], Any]], float, int]:
    """The passes that may need the most memory; the work of one of middling size in units of the
    first, and its rows."""
    batches = method.score_batches(sample(examples)["text"].to_pylist())
    rows, tokens = [len(batch.rows) for batch in batches], [b.ids.numel() for b in batches]

    def run(index: int) -> Callable[[], Any]:
        def score() -> Any:
            method.module.eval()
            return method.scores(batches[index])

        return score

    # What is computed once for all batches is no part of one.
    count(method.module, run(int(np.argmin(tokens))), sharded=False, vocabulary=0)
    heavy = [run(index) for index in _extremes(tokens, rows)]
    # The middle of the texts, not of the batches.
    order = np.argsort(rows, kind="stable")
    middle = int(order[np.searchsorted(np.cumsum(np.array(rows)[order]), sum(rows) / 2)])
    return heavy, tokens[middle] / max(tokens), rows[middle]


def sample(examples: pa.Table) -> pa.Table:
    """At most some thousand examples of all lengths, the longest among them."""
    lengths = np.array([len(text) for text in examples["text"].to_pylist()])
    order = np.argsort(-lengths, kind="stable")
    return examples.take(order[:: max(1, len(order) // _SAMPLE)])


def _extremes(tokens: Sequence[int], rows: Sequence[int]) -> list[int]:
    """Where the most tokens and the most rows are, which have the most activations and logits."""
    return [*dict.fromkeys([int(np.argmax(tokens)), int(np.argmax(rows))])]
