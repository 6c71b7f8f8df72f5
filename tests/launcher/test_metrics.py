"""Metrics against their definitions, item by item, and intervals against plain resampling."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

from launcher.errors import InputError
from launcher.metrics import METRICS, compute, write_metrics
from launcher.predictions import Predictions, make_table, merge_parts, write_part


def random_predictions(
    seed: int, n: int = 300, count: int = 5, *, sharpness: float = 1.0
) -> Predictions:
    """Coarse values, so that ties, zero shares, unmatched and unlabelled rows are common."""
    generator = np.random.default_rng(seed)
    shares = generator.integers(0, 4, size=(n, count)).astype(np.float32)
    labels = generator.integers(-1, count, size=n).astype(np.int32)
    one_hot = generator.random(n) < 0.3
    shares[one_hot] = 0
    rows = np.flatnonzero(one_hot & (labels >= 0))
    shares[rows, labels[rows]] = 1
    scores = (generator.integers(0, 6, size=(n, count)) * sharpness).astype(np.float32)
    scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return Predictions(
        ids=np.array([str(i) for i in range(n)], dtype=object),
        texts=np.array(["x"] * n, dtype=object),
        labels=labels,
        distributions=shares,
        predicted=generator.integers(-1, count, size=n).astype(np.int32),
        scores=scores,
        label_names=[f"label {i}" for i in range(count)],
        provenance={},
    )


def gold_of(p: Predictions, row: int) -> int | None:
    """The gold label of a row by the definition, None where there is none."""
    if p.labels[row] >= 0:
        return int(p.labels[row])
    return int(p.distributions[row].argmax()) if p.distributions[row].any() else None


def by_definition(p: Predictions) -> dict[str, float]:
    """The metrics, read off their definitions one example at a time."""
    assert p.scores is not None
    right: dict[str, list[bool]] = {key: [] for key in ("acc@1", "acc@3", "hit@1", "hit@3")}
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    labels = range(len(p.label_names))
    for row in range(len(p.ids)):
        gold = gold_of(p, row)
        if gold is None:
            continue
        shares, scores = p.distributions[row].tolist(), p.scores[row].tolist()
        largest = sorted((i for i in labels if shares[i] > 0), key=lambda i: (-shares[i], i))
        best = sorted(labels, key=lambda i: (-scores[i], i))
        for k in (1, 3):
            right[f"acc@{k}"].append(p.predicted[row] in largest[:k])
            right[f"hit@{k}"].append(gold in best[:k])
        confidence = np.exp(scores[best[0]]) / np.exp(scores).sum()
        index = next(i for i in range(15) if confidence <= (i + 1) / 15 or i == 14)
        bins[index].append((confidence, best[0] == gold))
    n = len(right["acc@1"])
    ece = sum(abs(sum(c for c, _ in b) - sum(r for _, r in b)) for b in bins) / n
    return {key: sum(values) / n for key, values in right.items()} | {"ece": ece, "n": n}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [2, 5])
def test_equal_to_the_definitions(seed: int, count: int) -> None:
    p = random_predictions(seed, count=count)
    measured, expected = compute(p, bootstrap_samples=10), by_definition(p)
    for key in ("acc@1", "acc@3", "hit@1", "hit@3", "ece"):
        assert measured[key]["value"] == pytest.approx(expected[key], abs=1e-6), key

    gold = [gold_of(p, row) for row in range(len(p.ids))]
    known = [row for row, label in enumerate(gold) if label is not None]
    true = [gold[row] for row in known]
    given = p.predicted[known]
    assert measured["n"] == len(known) == expected["n"]
    assert measured["unlabelled"] == len(p.ids) - len(known) > 0
    assert measured["unmatched"] == (given == -1).sum() > 0
    largest = max(true, key=true.count)
    assert measured["majority"] == true.count(largest) / len(true)
    assert measured["chance"] == 1 / count

    # scikit-learn has no "unmatched": to it that is one more label, last in order.
    column = np.where(given == -1, count, given)
    assert measured["confusion"] == confusion_matrix(true, column)[:count].tolist()
    reference = precision_recall_fscore_support(true, column, labels=range(count))
    for name, *values in zip(p.label_names, *reference, strict=True):
        assert list(measured["per_class"][name].values()) == pytest.approx(values)
    macro = f1_score(true, column, labels=range(count), average="macro")
    assert measured["macro_f1"]["value"] == pytest.approx(macro)


def test_acc_grows_with_the_gold_set_only() -> None:
    p = random_predictions(0, n=3)
    shares = np.array([[0.5, 0.3, 0.2, 0, 0], [0.6, 0.4, 0, 0, 0], [0.4, 0.4, 0.1, 0.1, 0]])
    changes = {"labels": np.zeros(3, np.int32), "distributions": shares.astype(np.float32)}
    # Third gold share; a share of zero; fourth of four after a tie with the third.
    measured = compute(changed(p, **changes, predicted=np.array([2, 2, 3])))
    assert (measured["acc@1"]["value"], measured["acc@3"]["value"]) == (0, 1 / 3)
    # Of two equal largest shares the first is the top one.
    measured = compute(changed(p, **changes, predicted=np.array([0, -1, 1])))
    assert (measured["acc@1"]["value"], measured["acc@3"]["value"]) == (1 / 3, 2 / 3)


def test_bars_are_what_such_answers_reach() -> None:
    p = random_predictions(3)
    measured = compute(p, bootstrap_samples=10)
    index = p.label_names.index(measured["bars"]["majority"]["label"])
    constant = compute(changed(p, predicted=np.full(len(p.ids), index)), bootstrap_samples=10)
    support = np.array([one["support"] for one in constant["per_class"].values()])
    frequency = np.tile(np.log(support / support.sum()).astype(np.float32), (len(p.ids), 1))
    ranked = compute(changed(p, scores=frequency), bootstrap_samples=10)
    for key in ("acc@1", "acc@3", "macro_f1"):
        assert measured["bars"]["majority"][key] == pytest.approx(constant[key]["value"]), key
    for key in ("hit@1", "hit@3"):
        assert measured["bars"]["majority"][key] == pytest.approx(ranked[key]["value"]), key
    # A guess is each label equally often: the mean over all constant answers.
    guesses = [changed(p, predicted=np.full(len(p.ids), label)) for label in range(5)]
    for key in ("acc@1", "acc@3"):
        mean = np.mean([compute(one, bootstrap_samples=1)[key]["value"] for one in guesses])
        assert measured["bars"]["chance"][key] == pytest.approx(mean), key
    assert (measured["bars"]["chance"]["hit@1"], measured["bars"]["chance"]["hit@3"]) == (0.2, 0.6)


def test_labels_that_do_not_occur_do_not_count() -> None:
    p = random_predictions(0, n=4)
    p = changed(p, labels=np.array([0, 0, 1, 1]), predicted=np.array([0, 1, 1, -1]))
    measured = compute(p)
    assert measured["per_class"]["label 4"] == {
        "precision": None,
        "recall": None,
        "f1": None,
        "support": 0,
    }
    assert measured["macro_f1"]["value"] == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_without_scores_or_labels() -> None:
    p = random_predictions(0)
    full, generated = compute(p), compute(changed(p, scores=None))
    for key in ("hit@1", "hit@3", "ece"):
        assert generated[key] == {"value": None, "ci95": None}
    for key in ("acc@1", "acc@3", "macro_f1"):
        assert generated[key] == full[key]

    nothing = {"labels": np.full(300, -1), "distributions": np.zeros((300, 5), np.float32)}
    measured = compute(changed(p, **nothing))
    assert (measured["n"], measured["unlabelled"], measured["majority"]) == (0, 300, None)
    assert all(measured[key] == {"value": None, "ci95": None} for key in METRICS)
    json.dumps(measured, allow_nan=False)


def test_intervals_equal_plain_resampling() -> None:
    p = random_predictions(7, n=400, sharpness=0.3)
    measured = compute(p, bootstrap_samples=4000)
    generator = np.random.default_rng(1)
    fields = ("ids", "labels", "distributions", "predicted", "scores")
    known = np.array([row for row in range(len(p.ids)) if gold_of(p, row) is not None])
    draws: dict[str, list[float]] = {key: [] for key in METRICS}
    for _ in range(1500):
        rows = generator.choice(known, len(known))
        drawn = changed(p, **{name: getattr(p, name)[rows] for name in fields})
        values = compute(drawn, bootstrap_samples=1)
        for key in METRICS:
            draws[key].append(values[key]["value"])
    for key in METRICS:
        reference = np.percentile(draws[key], [2.5, 97.5])
        width = reference[1] - reference[0]
        assert np.abs(reference - measured[key]["ci95"]).max() < 0.12 * width, key
    assert measured == compute(p, bootstrap_samples=4000)
    assert measured["acc@1"]["ci95"] != compute(p, bootstrap_samples=4000, seed=1)["acc@1"]["ci95"]


@pytest.mark.parametrize("key", ["acc@1", "macro_f1"])
def test_coverage(key: str) -> None:
    """The interval holds the true value about 95 times in 100."""
    generator = np.random.default_rng(5)
    p, covered = random_predictions(0, n=200, count=2), 0
    for _ in range(200):
        labels = np.arange(200) % 2
        predicted = np.where(generator.random(200) < 0.7, labels, 1 - labels)
        shares = np.eye(2, dtype=np.float32)[labels]
        drawn = changed(p, labels=labels, distributions=shares, predicted=predicted, scores=None)
        low, high = compute(drawn, bootstrap_samples=500)[key]["ci95"]
        covered += low <= 0.7 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_write_metrics(tmp_path: Path) -> None:
    def store(split: str, provenance: dict[str, Any]) -> None:
        scores = np.log(np.full((2, 2), 0.5))
        table = make_table(
            ["a", "b"], ["x", "y"], [0, 1], None, scores, None, ["对", "错"], provenance
        )
        write_part(tmp_path, split, 0, table)
        merge_parts(tmp_path, split)

    store("test", {"synthetic": True})
    store("dev", {"synthetic": True})
    result = write_metrics(tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8")) == result
    assert list(result["splits"]) == ["dev", "test"]
    assert (result["labels"], result["provenance"]) == (["对", "错"], {"synthetic": True})
    assert result["splits"]["dev"]["acc@1"]["value"] == 0.5

    store("dev", {"synthetic": False})
    with pytest.raises(InputError, match="same provenance"):
        write_metrics(tmp_path)


def changed(p: Predictions, **fields: Any) -> Predictions:
    make: Callable[..., Predictions] = type(p)
    return make(**(vars(p) | fields))
