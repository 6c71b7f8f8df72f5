"""Likely label errors by confident learning.

Northcutt, Jiang and Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels", Journal
of Artificial Intelligence Research 70 (2021).
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LabelErrors:
    """What the probabilities of a model say about given labels."""

    joint: np.ndarray  # [L, L] estimated share of examples by given and true label; sums to 1
    suspects: np.ndarray  # rows of likely errors, the most certain first
    suggested: np.ndarray  # the label that each suspect likely has

    @property
    def share(self) -> float:
        """Estimated share of wrong labels."""
        return float(1 - np.trace(self.joint))


def label_errors(given: np.ndarray, probabilities: np.ndarray) -> LabelErrors:
    """Estimate which labels are wrong, from predictions for examples the model did not train on.

    An example counts as confidently of label j where its probability of j reaches the mean
    probability of j among the examples labelled j (section 3.1); of several such labels the most
    likely one. Suspects are the examples off the diagonal of these counts (section 3.2, method 2),
    ordered by the probability of the given label minus that of the most likely other one.

    Args:
        given: [n] labels, n at least 1.
        probabilities: [n, L], rows that sum to 1.
    """
    labels = probabilities.shape[1]
    support = np.bincount(given, minlength=labels)
    own = probabilities[np.arange(len(given)), given]
    sums = np.bincount(given, weights=own, minlength=labels)
    # A label that nobody was given is confidently of no example.
    thresholds = np.divide(sums, support, out=np.full(labels, np.inf), where=support > 0)
    reaches = probabilities >= thresholds - 1e-6
    confident = np.where(reaches, probabilities, -1).argmax(axis=1)
    counted = reaches.any(axis=1)
    counts = np.zeros((labels, labels))
    np.add.at(counts, (given[counted], confident[counted]), 1)

    # Rows are scaled to the labels' true support; one without any counts is taken as right.
    empty = counts.sum(axis=1) == 0
    counts[empty, empty] = support[empty]
    rows = counts.sum(axis=1, keepdims=True)
    scaled = np.divide(counts, rows, out=np.zeros_like(counts), where=rows > 0)
    joint = scaled * support[:, None] / len(given)

    off = np.flatnonzero(counted & (confident != given))
    others = probabilities[off].copy()
    others[np.arange(len(off)), given[off]] = -1
    margin = own[off] - others.max(axis=1, initial=-1)
    order = np.argsort(margin, kind="stable")
    return LabelErrors(joint, off[order], confident[off[order]])
