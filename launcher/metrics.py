"""Metrics of a run with 95 % intervals, from its predictions alone."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from launcher.errors import InputError
from launcher.files import replacing
from launcher.predictions import Predictions, prediction_files, read_predictions

METRICS = ("acc@1", "acc@3", "hit@1", "hit@3", "macro_f1", "ece")

_ECE_BINS = 15
_CHUNK = 4_000_000
"""Numbers drawn at a time; bounds the memory whatever the number of examples and labels."""


def compute(
    predictions: Predictions, *, bootstrap_samples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """All metrics of one split, JSON-ready; examples without a gold label are left out.

    The gold label is the stored one, else the label with the largest share. Equal shares, and
    equal scores, are put in label order: of two equals the first label counts as the larger.

    Keys:
        n, unlabelled, unmatched: numbers of examples with a gold label, without one, and (of the
            n) with an output that named no label.
        acc@1, acc@3: the study's. The one predicted label is among the gold labels with the at
            most k largest non-zero shares; unmatched is wrong.
        hit@1, hit@3: the usual top-k accuracy. The gold label is among the k best scores.
        macro_f1: mean F1 of the labels that are gold or predicted somewhere.
        ece: expected calibration error, 15 bins of equal width on the softmax of the scores
            (Guo et al. 2017, section 2).
        per_class: by label name precision, recall, f1 (null where undefined) and support.
        confusion: [L, L + 1] counts, rows gold, columns predicted, the last one unmatched.
        majority, chance: share of the most frequent gold label; 1 / L.
        bars: every metric that follows from always giving the most frequent label (the most
            frequent k for hit@k), and from guessing evenly.
        levels: where the provenance has coarser levels, by level its `labels`, `n` and metrics;
            see `roll_up`.

    A metric is `{"value", "ci95"}`; both are null where it is undefined. The interval is the
    percentile bootstrap over examples: binomial for shares, multinomial over the cells of the
    confusion matrix for F1, which is the same resampling, and drawn rows for `ece`. Those
    lie above the value of `ece` on average, because noise adds to gaps without a sign.
    """
    names = predictions.label_names
    shares = predictions.distributions
    gold = np.where(predictions.labels >= 0, predictions.labels, shares.argmax(axis=1))
    known = (predictions.labels >= 0) | (shares.max(axis=1) > 0)
    gold, shares, predicted = gold[known], shares[known], predictions.predicted[known]
    scores = None if predictions.scores is None else predictions.scores[known]
    n, count = len(gold), len(names)

    confusion = _confusion(gold, predicted, count)
    draw = _Bootstrap(bootstrap_samples, seed)
    metrics: dict[str, Any] = {key: {"value": None, "ci95": None} for key in METRICS}
    if n:
        for k in (1, 3):
            metrics[f"acc@{k}"] = draw.share(_in_gold_top(shares, predicted, k))
        metrics["macro_f1"] = draw.macro_f1(confusion)
        if scores is not None:
            for k in (1, 3):
                metrics[f"hit@{k}"] = draw.share(_rank(scores, gold) < k)
            metrics["ece"] = draw.ece(scores, gold)

    support = confusion.sum(axis=1)
    levels = {
        level: _of_level(predictions, grouping, bootstrap_samples, seed)
        for level, grouping in predictions.provenance.get("levels", {}).items()
    }
    return {
        "n": n,
        "unlabelled": int((~known).sum()),
        "unmatched": int((predicted < 0).sum()),
        **metrics,
        "majority": float(support.max() / n) if n else None,
        "chance": 1 / count,
        "bars": _bars(gold, shares, support, names),
        "per_class": _per_class(confusion, names),
        "confusion": confusion.tolist(),
        **({"levels": levels} if levels else {}),
    }


def roll_up(predictions: Predictions, grouping: Mapping[str, Sequence[str]]) -> Predictions:
    """The same predictions with each group of labels as one: shares and probabilities add up.

    The predicted group is the most probable one, which need not be that of the most probable
    label; without scores it is that of the predicted label.

    Args:
        grouping: group names in order, each with its members; every label is in exactly one.
    """
    names = predictions.label_names
    group_of = np.array(
        [next(i for i, own in enumerate(grouping.values()) if name in own) for name in names]
    )

    def grouped(indices: np.ndarray) -> np.ndarray:
        return np.where(indices < 0, -1, group_of[indices]).astype(np.int32)

    member = np.eye(len(grouping), dtype=np.float32)[group_of]
    scores, predicted = predictions.scores, grouped(predictions.predicted)
    if scores is not None:
        columns = [scores[:, group_of == group] for group in range(len(grouping))]
        scores = np.stack([np.logaddexp.reduce(column, axis=1) for column in columns], axis=1)
        predicted = scores.argmax(axis=1).astype(np.int32)
    return replace(
        predictions,
        labels=grouped(predictions.labels),
        distributions=predictions.distributions @ member,
        predicted=predicted,
        scores=scores,
        label_names=[*grouping],
        provenance={},
    )


def summarise(predictions: Mapping[str, Predictions]) -> dict[str, Any]:
    """The content of `metrics.json` for the splits of one run.

    Raises:
        InputError: the splits differ in their labels or their provenance.
    """
    (first, head), *others = predictions.items()
    for split, other in others:
        for field, a, b in (
            ("labels", head.label_names, other.label_names),
            ("provenance", head.provenance, other.provenance),
        ):
            if a != b:
                raise InputError(
                    f"predictions of {split!r}: expected the same {field} as of {first!r}, {a}; "
                    f"seen {b}; predict both with one run"
                )
    return {
        "splits": {split: compute(one) for split, one in predictions.items()},
        "labels": head.label_names,
        "provenance": head.provenance,
    }


def write_metrics(run_dir: Path) -> dict[str, Any]:
    """Measure all predictions of a finished run; writes `metrics.json` and returns its content.

    Raises:
        InputError: see `prediction_files`, `read_predictions` and `summarise`.
    """
    files = prediction_files(run_dir)
    result = summarise({split: read_predictions(path) for split, path in files.items()})
    with replacing(run_dir / "metrics.json") as temporary:
        text = json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    return result


def _of_level(
    predictions: Predictions, grouping: Mapping[str, Sequence[str]], samples: int, seed: int
) -> dict[str, Any]:
    found = compute(roll_up(predictions, grouping), bootstrap_samples=samples, seed=seed)
    return {"labels": [*grouping], "n": found["n"], **{key: found[key] for key in METRICS}}


def _rank(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """How many of a row's values come before the chosen one; [n, L], [n] -> [n]."""
    own = np.take_along_axis(values, chosen[:, None], axis=1)
    earlier = np.arange(values.shape[1]) < chosen[:, None]
    return (values > own).sum(axis=1) + ((values == own) & earlier).sum(axis=1)


def _in_gold_top(shares: np.ndarray, predicted: np.ndarray, k: int) -> np.ndarray:
    """[n] bool: the predicted label is among the at most k largest non-zero shares."""
    chosen = np.maximum(predicted, 0)
    nonzero = np.take_along_axis(shares, chosen[:, None], axis=1)[:, 0] > 0
    return (predicted >= 0) & nonzero & (_rank(shares, chosen) < k)


def _confusion(gold: np.ndarray, predicted: np.ndarray, count: int) -> np.ndarray:
    column = np.where(predicted < 0, count, predicted)
    cells = np.bincount(gold * (count + 1) + column, minlength=count * (count + 1))
    return cells.reshape(count, count + 1)


def _f1(confusion: np.ndarray) -> np.ndarray:
    """[..., L, L + 1] -> [..., L]; NaN for a label that is neither gold nor predicted."""
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    return _divide(2 * right, confusion.sum(axis=-1) + confusion.sum(axis=-2)[..., :-1])


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.full(np.shape(b), np.nan), where=b > 0)


class _Bootstrap:
    """Each metric with its interval; a metric's draws do not depend on which others are drawn."""

    def __init__(self, samples: int, seed: int) -> None:
        self.samples, self.seed = samples, seed

    def share(self, right: np.ndarray) -> dict[str, Any]:
        n, value = len(right), right.mean()
        return _with_interval(value, self._generator(0).binomial(n, value, self.samples) / n)

    def macro_f1(self, confusion: np.ndarray) -> dict[str, Any]:
        cells, n = np.flatnonzero(confusion), int(confusion.sum())
        generator, probabilities = self._generator(1), confusion.flat[cells] / n
        draws = []
        for size in self._chunks(confusion.size):
            drawn = np.zeros((size, confusion.size), dtype=np.int64)
            drawn[:, cells] = generator.multinomial(n, probabilities, size)
            draws.append(np.nanmean(_f1(drawn.reshape(size, *confusion.shape)), axis=1))
        return _with_interval(np.nanmean(_f1(confusion)), np.concatenate(draws))

    def ece(self, scores: np.ndarray, gold: np.ndarray) -> dict[str, Any]:
        # A bin's |confidence - accuracy|, weighted by its examples, is |the sum of the gaps| / n.
        relative = np.exp(scores - scores.max(axis=1, keepdims=True), dtype=np.float64)
        confidence = 1 / relative.sum(axis=1)
        gap = confidence - (scores.argmax(axis=1) == gold)
        bins = np.clip(np.ceil(confidence * _ECE_BINS).astype(np.int64) - 1, 0, _ECE_BINS - 1)
        n, generator, draws = len(gold), self._generator(2), []
        for size in self._chunks(n):
            rows = generator.integers(n, size=(size, n), dtype=np.int32)
            cell = bins[rows] + np.arange(size)[:, None] * _ECE_BINS
            draws.append(_sums(cell, gap[rows], size))
        value = np.abs(_sums(bins, gap, 1)).sum() / n
        return _with_interval(value, np.abs(np.concatenate(draws)).sum(axis=1) / n)

    def _generator(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, stream])

    def _chunks(self, width: int) -> list[int]:
        most = max(1, _CHUNK // width)
        return [min(most, self.samples - start) for start in range(0, self.samples, most)]


def _sums(cells: np.ndarray, gaps: np.ndarray, size: int) -> np.ndarray:
    totals = np.bincount(cells.ravel(), weights=gaps.ravel(), minlength=size * _ECE_BINS)
    return totals.reshape(size, _ECE_BINS)


def _with_interval(value: float, draws: np.ndarray) -> dict[str, Any]:
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"value": float(value), "ci95": [float(low), float(high)]}


def _per_class(confusion: np.ndarray, names: list[str]) -> dict[str, dict[str, Any]]:
    right, support = np.diagonal(confusion), confusion.sum(axis=1)
    columns = (
        _divide(right, confusion.sum(axis=0)[:-1]),
        _divide(right, support),
        _f1(confusion),
    )
    return {
        name: {
            **{
                key: None if np.isnan(column[index]) else float(column[index])
                for key, column in zip(("precision", "recall", "f1"), columns, strict=True)
            },
            "support": int(support[index]),
        }
        for index, name in enumerate(names)
    }


def _bars(
    gold: np.ndarray, shares: np.ndarray, support: np.ndarray, names: list[str]
) -> dict[str, Any]:
    n, count = len(gold), len(support)
    if n == 0:
        return {"majority": None, "chance": None}
    frequent = np.argsort(-support, kind="stable")
    constant = np.full(n, frequent[0])
    nonzero = (shares > 0).sum(axis=1)
    majority: dict[str, Any] = {"label": names[frequent[0]]}
    chance: dict[str, Any] = {}
    for k in (1, 3):
        majority[f"acc@{k}"] = float(_in_gold_top(shares, constant, k).mean())
        majority[f"hit@{k}"] = float(support[frequent[:k]].sum() / n)
        chance[f"acc@{k}"] = float(np.minimum(nonzero, k).mean() / count)
        chance[f"hit@{k}"] = min(k, count) / count
    majority["macro_f1"] = float(np.nanmean(_f1(_confusion(gold, constant, count))))
    return {"majority": majority, "chance": chance}
