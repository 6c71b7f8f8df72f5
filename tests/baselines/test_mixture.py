"""Mixtures are what the formula says, and fitted ones cannot be bettered nearby."""

import numpy as np
import torch

from baselines.mixture import fit_mixture, mix


def test_a_mixture_is_the_softmax_of_weighted_sums() -> None:
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(7, 2, 3)).astype(np.float32)
    weights, bias = generator.normal(size=(2, 3)), generator.normal(size=3)
    by_hand = [
        [row[:, label] @ weights[:, label] + bias[label] for label in range(3)] for row in scores
    ]
    expected = torch.tensor(by_hand).log_softmax(dim=1).numpy()
    found = mix(scores, weights, bias)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_fitted_weights_are_those_that_the_labels_were_drawn_with() -> None:
    generator = np.random.default_rng(1)
    scores = generator.normal(size=(60_000, 2, 3))
    weights, bias = np.array([[1.5, 1.0, 0.5], [-0.5, 0.0, 0.5]]), np.array([0.5, 0.0, -0.5])
    chances = np.exp(mix(scores, weights, bias).astype(np.float64))
    gold = (chances.cumsum(axis=1) < generator.random((len(chances), 1))).sum(axis=1).clip(max=2)
    found_weights, found_bias = fit_mixture(scores, gold)
    # Only differences between labels matter to the bias.
    np.testing.assert_allclose(found_weights, weights, rtol=0, atol=0.05)
    np.testing.assert_allclose(found_bias - found_bias.mean(), bias, rtol=0, atol=0.05)


def test_no_weights_nearby_are_more_likely() -> None:
    generator = np.random.default_rng(2)
    scores, gold = generator.normal(size=(50, 2, 3)), generator.integers(2, size=50)

    def cost(weights: np.ndarray, bias: np.ndarray) -> float:
        log_probs = torch.tensor(np.einsum("nml,ml->nl", scores, weights) + bias).log_softmax(dim=1)
        likely = float(log_probs[range(50), gold].sum())
        return -likely + 0.5 * float(((weights - 0.5) ** 2).sum() + (bias**2).sum())

    weights, bias = fit_mixture(scores, gold)
    # No example has the last label, but the prior keeps its bias from running away.
    assert bias[2] < bias[:2].min() and np.isfinite(bias).all()
    for _ in range(50):
        step = generator.normal(size=(3, 3)) * 0.05
        assert cost(weights, bias) < cost(weights + step[:2], bias + step[2])
