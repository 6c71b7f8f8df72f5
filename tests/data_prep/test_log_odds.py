"""Log-odds with an informative prior, against the formula written out unit by unit."""

import math

import numpy as np
import pytest

from data_prep.log_odds import log_odds


def plain(counts: list[list[float]], scale: float) -> list[list[float]]:
    """Monroe et al.: log-odds of the smoothed counts, over the square root of their variance."""
    units, categories = range(len(counts)), range(len(counts[0]))
    prior = [scale * sum(row) for row in counts]
    result = []
    for unit in units:
        row = []
        for category in categories:
            y_i = counts[unit][category]
            y_j = sum(counts[unit][c] for c in categories if c != category)
            n_i = sum(counts[u][category] for u in units)
            n_j = sum(counts[u][c] for u in units for c in categories if c != category)
            odds_i = (y_i + prior[unit]) / (n_i + sum(prior) - y_i - prior[unit])
            odds_j = (y_j + prior[unit]) / (n_j + sum(prior) - y_j - prior[unit])
            variance = 1 / (y_i + prior[unit]) + 1 / (y_j + prior[unit])
            row.append((math.log(odds_i) - math.log(odds_j)) / math.sqrt(variance))
        result.append(row)
    return result


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_equals_the_formula_written_out(scale: float) -> None:
    counts = np.random.default_rng(0).poisson(2.0, (40, 5)) * 1.5
    counts[:, 0] += 1  # no unit unseen: the plain form can't take one
    np.testing.assert_allclose(log_odds(counts, scale), plain(counts.tolist(), scale), rtol=1e-9)


def test_frequent_and_exclusive_units_come_first_and_even_ones_are_zero() -> None:
    counts = np.array([[80, 0], [8, 0], [50, 50], [0, 88], [0, 0]])
    scores = log_odds(counts)
    assert scores[:, 0].argsort().tolist() == [3, 2, 4, 1, 0]
    np.testing.assert_allclose(scores[[2, 4]], 0, atol=1e-12)
    np.testing.assert_allclose(scores[:, 0], -scores[:, 1], atol=1e-12)


def test_one_unit_is_characteristic_of_nothing() -> None:
    assert not log_odds(np.array([[3, 1], [0, 0]])).any()


def test_rare_units_lumped_together_leave_the_others_scores_alone() -> None:
    counts = np.random.default_rng(1).integers(1, 9, (30, 4)).astype(np.float32)
    lumped = np.vstack([counts[:10], counts[10:].sum(axis=0)])
    np.testing.assert_allclose(log_odds(lumped)[:10], log_odds(counts)[:10], rtol=1e-6)
