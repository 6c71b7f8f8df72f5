"""Log-linear mixtures: log-probabilities, or other scores, weighted, added up and normalised."""

import numpy as np
from scipy.optimize import minimize


def mix(scores: np.ndarray, weights: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Log-probabilities of a mixture.

    Args:
        scores: [examples, members, labels], finite.
        weights: [members, labels]; bias: [labels].

    Returns:
        [examples, labels] float32, normalised over the labels.
    """
    logits = np.einsum("nml,ml->nl", scores.astype(np.float64), weights) + bias
    return _normalised(logits).astype(np.float32)


def fit_mixture(scores: np.ndarray, gold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights and bias of the mixture under which the gold labels are most likely.

    Each parameter has a normal prior of variance 1 around the even mixture, without which the
    weights of a label that is rare, or missing, would run away. With one member it calibrates that
    member's scores: Platt scaling for several labels (Guo et al. 2017, section 4.2, "vector
    scaling").

    Args:
        scores: [examples, members, labels], finite.
        gold: [examples] label indices.

    Returns:
        [members, labels] weights, [labels] bias, float64.
    """
    examples, members, labels = scores.shape
    scores = scores.astype(np.float64)
    even = np.zeros((members + 1, labels))
    even[:members] = 1 / members

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = flat.reshape(even.shape)
        logits = np.einsum("nml,ml->nl", scores, parameters[:members]) + parameters[members]
        log_probs = _normalised(logits)
        wrong = np.exp(log_probs)
        wrong[np.arange(examples), gold] -= 1
        gradient = np.vstack([np.einsum("nml,nl->ml", scores, wrong), wrong.sum(axis=0)])
        distance = parameters - even
        value = -log_probs[np.arange(examples), gold].sum() + 0.5 * (distance**2).sum()
        return value / examples, (gradient + distance).ravel() / examples

    found = minimize(loss, even.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    parameters = found.x.reshape(even.shape)
    return parameters[:members], parameters[members]


def _normalised(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
