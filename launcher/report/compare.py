"""Is one run better than another? Paired tests on the same examples, corrected for their number."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from launcher.report import tables
from launcher.report.leaderboard import Entry, entries_of
from launcher.report.runs import Answers, Examples, Group
from launcher.report.tables import Cell, Estimate, Table

LEVEL = 0.05
_DRAWS = 1999
_MOST_PAIRS = 300
_CELLS = 2_000_000
"""Numbers drawn at a time; bounds the memory."""


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p of the exact McNemar test: the binomial test on the examples that only one of
    two runs has right (McNemar 1947; exact as in Dietterich 1998).

    Args:
        only_a, only_b: numbers of examples that only the one, only the other has right.
    """
    total, least = only_a + only_b, min(only_a, only_b)
    if total == 0:
        return 1.0
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, total + 1)))])
    counts = np.arange(least + 1)
    terms = factorials[total] - factorials[counts] - factorials[total - counts]
    return min(1.0, 2 * float(np.exp(terms - total * math.log(2)).sum()))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p-values adjusted so that the chance of any false finding among them all stays at the level
    (Holm 1979)."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    result = np.empty_like(p)
    result[order] = np.minimum(adjusted, 1)
    return result


@dataclass(frozen=True)
class Draws:
    """Metrics of each run on the same resampled sets of examples."""

    values: dict[str, np.ndarray]  # by metric [runs]
    draws: dict[str, np.ndarray]  # by metric [draws, runs]


def resample(
    examples: Examples, answers: Sequence[Answers], draws: int = _DRAWS, seed: int = 0
) -> Draws:
    """The paired bootstrap (Efron and Tibshirani 1993, chapter 8): all runs see the same draw, so
    that the difference of any two of them is drawn as well. Metrics: `acc@1`, `acc@3`, `macro_f1`.
    """
    n = len(examples)
    right = np.concatenate([[one.right(k) for one in answers] for k in (1, 3)])
    generator = np.random.default_rng(seed)
    size = max(1, _CELLS // n)
    drawn: list[np.ndarray] = []
    for start in range(0, draws, size):
        height = min(size, draws - start)
        rows = generator.integers(n, size=(height, n), dtype=np.int32)
        rows += np.arange(height, dtype=np.int32)[:, None] * n
        weights = np.bincount(rows.ravel(), minlength=height * n).reshape(height, n)
        hits = weights.astype(np.float32) @ right.T.astype(np.float32)
        f1 = _macro_f1(examples, answers, np.ascontiguousarray(weights.T, dtype=np.uint8))
        drawn.append(np.concatenate([hits / n, f1], axis=1))
    once = _macro_f1(examples, answers, np.ones((n, 1), dtype=np.uint8))
    values = np.concatenate([right.mean(axis=1), once[0]])
    names = ("acc@1", "acc@3", "macro_f1")
    return Draws(
        dict(zip(names, np.split(values, 3), strict=True)),
        dict(zip(names, np.split(np.concatenate(drawn), 3, axis=1), strict=True)),
    )


def difference(
    drawn: Draws, metric: str, a: Sequence[int], b: Sequence[int], seed: int = 0
) -> tuple[Estimate, float]:
    """Mean metric of the runs `a` minus that of the runs `b`: estimate with interval, and p.

    Where a side has S > 1 runs (seeds), S - 1 of them are drawn with replacement in each draw, so
    that the interval covers other seeds, too (Rao and Wu 1988). p is twice the share of draws on
    the other side of 0.
    """
    generator = np.random.default_rng([seed, *a, len(a), *b])
    sides = [_mean_of_seeds(drawn.draws[metric], runs, generator) for runs in (a, b)]
    draws = sides[0] - sides[1]
    low, high = np.percentile(draws, [2.5, 97.5])
    values = drawn.values[metric]
    value = float(values[[*a]].mean() - values[[*b]].mean())
    beyond = min(np.count_nonzero(draws <= 0), np.count_nonzero(draws >= 0))
    p = min(1.0, 2 * (beyond + 1) / (len(draws) + 1))
    return Estimate(value, float(low), float(high), sign=True), p


def comparisons(group: Group) -> Table | None:
    """Every two rows of the leaderboard compared; None where there are not two."""
    entries = entries_of(group)
    if len(entries) < 2 or len(group.examples) == 0:
        return None
    answers = group.answers()
    right = np.stack([one.right() for one in answers])
    entries.sort(key=lambda entry: -right[entry.places].mean())
    drawn = resample(group.examples, answers)
    pairs = list(itertools.combinations(range(len(entries)), 2))
    notes = []
    if len(pairs) > _MOST_PAIRS:
        pairs = [(0, other) for other in range(1, len(entries))]
        notes.append("With so many runs each is compared with the best one only.")
    found = [_pair(entries[a], entries[b], right, drawn) for a, b in pairs]
    adjusted = holm([p for _, p in found])
    several = any(len(entry.places) > 1 for entry in entries)
    rows = [
        [*cells, tables.probability(p), tables.probability(q), _verdict(cells, q)]
        for (cells, p), q in zip(found, adjusted.tolist(), strict=True)
    ]
    caption = f"{group.split}: {tables.count(len(pairs), 'paired comparison')}"
    return Table(
        caption=f"{caption} on {tables.count(len(group.examples), 'example')}",
        header=[*_HEADER],
        rows=rows,
        notes=[*notes, *_NOTES, *([_SEEDS] if several else [])],
        file="comparisons",
        context={"split": group.split},
    )


_HEADER = ["A", "B", "only A right", "only B right", "Acc@1, A − B", "Acc@3, A − B"]
_HEADER += ["macro-F1, A − B", "p", "p, Holm", "at 5 %"]
_NOTES = (
    "p: exact McNemar test on the examples that only one of the two has right by Acc@1. p, Holm: "
    f"corrected for all comparisons of this table; a difference is called one below {LEVEL}.",
    f"Differences with the 95 % interval of the paired bootstrap ({_DRAWS:,} draws of the "
    "examples, the same ones for all runs).",
)
_SEEDS = (
    "Where a row has several seeds, its mean is compared, seeds are drawn as well as examples, and "
    f"p is the bootstrap's, {2 / (_DRAWS + 1):.3f} at least. A row with one seed is taken as if "
    "another seed would give the same."
)


def _pair(a: Entry, b: Entry, right: np.ndarray, drawn: Draws) -> tuple[list[Cell], float]:
    """The cells of a comparison up to its p, and p."""
    single = len(a.places) == len(b.places) == 1
    first, second = right[a.places[0]], right[b.places[0]]
    only = [int((first & ~second).sum()), int((second & ~first).sum())]
    found = {key: difference(drawn, key, a.places, b.places) for key in drawn.values}
    estimates = [estimate for estimate, _ in found.values()]
    counts: list[Cell] = [*only] if single else [None, None]
    p = mcnemar(*only) if single else found["acc@1"][1]
    return [a.name, b.name, *counts, *estimates], p


def _verdict(cells: Sequence[Cell], p: float) -> str:
    estimate = cells[4]
    assert isinstance(estimate, Estimate)
    if p >= LEVEL or estimate.value == 0:
        return "no difference shown"
    return "A is better" if estimate.value > 0 else "B is better"


def _mean_of_seeds(
    draws: np.ndarray, runs: Sequence[int], generator: np.random.Generator
) -> np.ndarray:
    own = draws[:, [*runs]]
    if len(runs) == 1:
        return own[:, 0]
    chosen = generator.integers(len(runs), size=(len(draws), len(runs) - 1))
    return np.take_along_axis(own, chosen, axis=1).mean(axis=1)


def _macro_f1(examples: Examples, answers: Sequence[Answers], weights: np.ndarray) -> np.ndarray:
    """[draws, runs] from how often each draw holds each example, uint8 [n, draws]."""
    labels = len(examples.labels)
    gold, columns = _totals(examples.gold, weights, labels), []
    for one in answers:
        named, right = one.predicted >= 0, one.predicted == examples.gold
        predicted = _totals(one.predicted[named], weights[named], labels)
        both = gold + predicted
        hits = _totals(examples.gold[right], weights[right], labels)
        f1 = np.divide(2 * hits, both, out=np.full(both.shape, np.nan), where=both > 0)
        columns.append(np.nanmean(f1, axis=0))
    return np.stack(columns, axis=1)


def _totals(of: np.ndarray, weights: np.ndarray, labels: int) -> np.ndarray:
    """[labels, draws] sums of the weights [n, draws] by label [n]."""
    sums = np.zeros((labels, weights.shape[1]), dtype=np.int32)
    order = np.argsort(of, kind="stable")
    present, starts = np.unique(of[order], return_index=True)
    if len(present):
        sums[present] = np.add.reduceat(weights[order], starts, axis=0, dtype=np.int32)
    return sums
