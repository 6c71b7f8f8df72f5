"""What reports conclude, against scipy, statsmodels, plain counting and simulated truth."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from launcher.metrics import compute
from launcher.predictions import Predictions
from launcher.report.compare import difference, holm, mcnemar, resample
from launcher.report.label_errors import label_errors
from launcher.report.neighbours import Neighbours
from launcher.report.runs import Answers, Examples
from launcher.report.slices import wilson

models: Any = pytest.importorskip("statsmodels.stats.contingency_tables")
multitest: Any = pytest.importorskip("statsmodels.stats.multitest")
proportion: Any = pytest.importorskip("statsmodels.stats.proportion")


def examples_of(gold: np.ndarray, shares: np.ndarray) -> Examples:
    names = tuple(f"label {label}" for label in range(shares.shape[1]))
    ids = np.array([str(row) for row in range(len(gold))], dtype=object)
    return Examples("dev", names, ids, ids, gold, shares)


def random_runs(seed: int, n: int = 120, labels: int = 3, runs: int = 2) -> list[Answers]:
    """Runs on shares with ties and zeros; some outputs named no label."""
    generator = np.random.default_rng(seed)
    shares = generator.integers(0, 3, size=(n, labels)).astype(np.float32)
    shares[np.arange(n), generator.integers(0, labels, n)] += 1
    examples = examples_of(shares.argmax(axis=1), shares)
    return [
        Answers(examples, generator.integers(-1, labels, n).astype(np.int32), None)
        for _ in range(runs)
    ]


def as_predictions(answers: Answers, rows: np.ndarray) -> Predictions:
    examples = answers.examples
    return Predictions(
        ids=examples.ids[rows],
        texts=examples.texts[rows],
        labels=examples.gold[rows].astype(np.int32),
        distributions=examples.shares[rows],
        predicted=answers.predicted[rows],
        scores=None,
        label_names=list(examples.labels),
        provenance={},
    )


@pytest.mark.parametrize("counts", [(0, 0), (0, 1), (3, 3), (1, 9), (40, 25), (3000, 3200)])
def test_mcnemar(counts: tuple[int, int]) -> None:
    a, b = counts
    reference = models.mcnemar([[5, a], [b, 7]], exact=True).pvalue if a + b else 1.0
    assert mcnemar(a, b) == pytest.approx(min(1.0, reference), rel=1e-9)
    assert mcnemar(b, a) == mcnemar(a, b)


def test_holm() -> None:
    p = np.random.default_rng(0).random(20) ** 3
    p[3] = p[7]
    assert holm(p) == pytest.approx(multitest.multipletests(p, method="holm")[1])


def test_mcnemar_with_holm_keeps_its_level() -> None:
    """Equal runs are told apart in at most 5 of 100 reports, whatever the number of pairs."""
    generator, wrong = np.random.default_rng(1), 0
    for _ in range(300):
        right = generator.random((4, 200)) < 0.5
        p = [
            mcnemar(int((right[a] & ~right[b]).sum()), int((right[b] & ~right[a]).sum()))
            for a in range(4)
            for b in range(a)
        ]
        wrong += holm(p).min() < 0.05
    assert wrong / 300 < 0.08


def test_wilson() -> None:
    for right, n in ((0, 1), (0, 12), (3, 7), (50, 100), (9, 9)):
        low, high = proportion.proportion_confint(right, n, method="wilson")
        interval = wilson(right, n)
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-12)
    hits = np.random.default_rng(2).binomial(25, 0.3, 1000)
    held = [bool(w.low <= 0.3 <= w.high) for w in map(wilson, hits, [25] * 1000)]  # type: ignore
    assert 0.93 <= np.mean(held) <= 0.98


def test_values_are_the_metrics() -> None:
    """On the examples themselves and on drawn ones, for Acc@k and macro-F1."""
    for seed in range(4):
        runs = random_runs(seed)
        n = len(runs[0].examples)
        drawn = resample(runs[0].examples, runs, draws=7, seed=seed)
        generator = np.random.default_rng(seed)
        samples = generator.integers(n, size=(7, n), dtype=np.int32)
        for place, one in enumerate(runs):
            found = compute(as_predictions(one, np.arange(n)), bootstrap_samples=1)
            for key in ("acc@1", "acc@3", "macro_f1"):
                assert drawn.values[key][place] == pytest.approx(found[key]["value"]), key
            for draw, rows in enumerate(samples):
                found = compute(as_predictions(one, rows), bootstrap_samples=1)
                for key in ("acc@1", "acc@3", "macro_f1"):
                    seen = drawn.draws[key][draw, place]
                    assert seen == pytest.approx(found[key]["value"], abs=1e-6), key


def test_difference_agrees_with_scipy() -> None:
    runs = random_runs(5, n=300)
    drawn = resample(runs[0].examples, runs, draws=6000)
    estimate, p = difference(drawn, "acc@1", [0], [1])
    a, b = (one.right().astype(float) for one in runs)
    reference = stats.bootstrap(
        (a, b),
        lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=6000,
        rng=np.random.default_rng(0),
    )
    low, high = reference.confidence_interval
    width = high - low
    assert estimate.value == pytest.approx(a.mean() - b.mean())
    assert abs(estimate.low - low) < 0.06 * width and abs(estimate.high - high) < 0.06 * width
    tail = min(
        (reference.bootstrap_distribution <= 0).mean(),
        (reference.bootstrap_distribution >= 0).mean(),
    )
    assert p == pytest.approx(2 * tail, abs=0.05)


def test_interval_of_a_difference_has_its_coverage() -> None:
    """Of correlated runs, whose true difference is known."""
    generator, held = np.random.default_rng(3), 0
    n, times = 150, 200
    for _ in range(times):
        hard = generator.random(n)
        right = [hard < share + 0.1 * generator.normal(size=n) for share in (0.6, 0.5)]
        gold = np.zeros(n, dtype=np.int64)
        examples = examples_of(gold, np.eye(2, dtype=np.float32)[gold])
        runs = [Answers(examples, np.where(one, 0, 1).astype(np.int32), None) for one in right]
        estimate, _ = difference(resample(examples, runs, draws=300), "acc@1", [0], [1])
        assert estimate.low is not None and estimate.high is not None
        held += estimate.low <= 0.1 <= estimate.high
    assert 0.90 <= held / times <= 0.985


def test_interval_over_seeds_covers_other_seeds() -> None:
    """The true difference is that of the mean over all seeds; few seeds are drawn of many."""
    generator, times = np.random.default_rng(4), 200
    held = {4: 0, 1: 0}
    n, spread = 300, 0.05
    for _ in range(times):
        hard = generator.random(n)
        gold = np.zeros(n, dtype=np.int64)
        examples = examples_of(gold, np.eye(2, dtype=np.float32)[gold])
        shares = np.repeat([0.6, 0.5], 4) + spread * generator.normal(size=8)
        runs = [Answers(examples, np.where(hard < s, 0, 1).astype(np.int32), None) for s in shares]
        drawn = resample(examples, runs, draws=300)
        for size in held:
            sides = [list(range(start, start + size)) for start in (0, 4)]
            estimate, _ = difference(drawn, "acc@1", *sides)
            assert estimate.low is not None and estimate.high is not None
            held[size] += estimate.low <= 0.1 <= estimate.high
    # Percentile intervals of four values are a little short; of a single seed they cannot know.
    assert held[4] / times >= 0.85
    assert held[1] / times < 0.75


def confident_by_definition(given: list[int], p: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Joint and suspects, read off the paper's definitions one example at a time."""
    labels, rows = range(p.shape[1]), range(len(given))
    thresholds = {}
    for label in labels:
        own = [p[row, label] for row in rows if given[row] == label]
        thresholds[label] = sum(own) / len(own) if own else math.inf
    counts = np.zeros((len(labels), len(labels)))
    margins = {}
    for row in rows:
        sure = [label for label in labels if p[row, label] >= thresholds[label] - 1e-9]
        if not sure:
            continue
        likely = max(sure, key=lambda label: (p[row, label], -label))
        counts[given[row], likely] += 1
        if likely != given[row]:
            rest = max(p[row, label] for label in labels if label != given[row])
            margins[row] = p[row, given[row]] - rest
    joint = np.zeros_like(counts)
    for label in labels:
        support = sum(one == label for one in given)
        if counts[label].sum():
            joint[label] = counts[label] / counts[label].sum() * support
        else:
            joint[label, label] = support
    return joint / joint.sum(), sorted(margins, key=lambda row: (margins[row], row))


@pytest.mark.parametrize("seed", range(5))
def test_confident_learning_equals_its_definition(seed: int) -> None:
    generator = np.random.default_rng(seed)
    # Label 3 is given to nobody.
    given = generator.integers(0, 3, 80)
    p = generator.dirichlet(np.full(4, 0.5), 80)
    joint, suspects = confident_by_definition(given.tolist(), p)
    found = label_errors(given, p)
    assert found.joint == pytest.approx(joint)
    assert found.suspects.tolist() == suspects
    assert (found.suggested != given[found.suspects]).all() and 3 not in found.suggested


def test_confident_learning_finds_flipped_labels() -> None:
    generator = np.random.default_rng(6)
    true = generator.integers(0, 4, 4000)
    given = np.where(generator.random(4000) < 0.1, (true + 1) % 4, true)
    p = np.full((4000, 4), 0.04)
    p[np.arange(4000), np.where(generator.random(4000) < 0.95, true, (true + 2) % 4)] = 0.88
    found = label_errors(given, p)
    assert found.share == pytest.approx((given != true).mean() + 0.05, abs=0.02)
    flipped = set(np.flatnonzero(given != true).tolist())
    assert len(flipped & set(found.suspects.tolist())) / len(flipped) > 0.9


def test_neighbours_equal_the_whole_search() -> None:
    generator = np.random.default_rng(7)

    def text() -> str:
        return "".join(generator.choice(list("天地人你我他"), generator.integers(1, 7)))

    def units(text: str) -> set[str]:
        return {*text, *(text[i : i + 2] for i in range(len(text) - 1))}

    train, labels = [text() for _ in range(200)], generator.integers(0, 3, 200)
    index = Neighbours(train, labels)
    for query in [text() for _ in range(50)] + ["火", "火天"]:
        similar = [
            2 * len(units(query) & units(other)) / (len(units(query)) + len(units(other)))
            for other in train
        ]
        best = sorted(range(200), key=lambda row: (-similar[row], row))[:3]
        expected = [(train[row], labels[row], similar[row]) for row in best if similar[row]]
        assert index.nearest(query) == expected
    assert index.nearest(train[0])[0][2] == 1
    assert Neighbours(["天"], np.array([0])).nearest("天地") == [("天", 0, 0.5)]
