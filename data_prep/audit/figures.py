"""The figures of the data card, each a JSON-ready value made from the counted chats."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from data_prep.audit.chats import Chats
from data_prep.audit.leaks import duplicates
from data_prep.dataset import Dataset
from data_prep.meaningless import NO_HAN, REPETITION, reasons
from data_prep.privacy import MASKS, kinds

USUAL_LENGTH = (3, 6)
"""Characters; 97.6 % of the study's words lie in this range."""
GENERAL_ABOVE = 3
"""A chat that occurs in more categories says nothing about them: the study's "general" class."""
TOO_GENERAL = "too general"
_EXAMPLES = 8
_ENTROPY_BINS = 10


def sizes(dataset: Dataset, chats: Chats) -> dict[str, Any]:
    """Per split: rows, distinct texts, rows without a label, occurrences, videos, duplicates."""
    doubles = duplicates(chats)
    return {
        split: {
            "texts": table.num_rows,
            "distinct": table.num_rows - doubles[split]["exact"],
            "unlabelled": int((chats.labels[split] < 0).sum()),
            "occurrences": int(table["frequency"].to_numpy().sum()),
            "videos": len(table["group"].drop_null().unique()),
            "duplicates": doubles[split],
        }
        for split, table in dataset.splits.items()
    }


def balance(names: Sequence[str], chats: Chats) -> dict[str, Any]:
    """Labelled rows per category, by split and `all`, and the entropy of each split's labels."""
    labels = {**chats.labels, "all": np.concatenate(list(chats.labels.values()))}
    counts = {split: _label_counts(known, len(names)) for split, known in labels.items()}
    return {
        "counts": {
            name: {split: int(count[index]) for split, count in counts.items()}
            for index, name in enumerate(names)
        },
        "entropy_bits": {split: float(_entropy(count[None])[0]) for split, count in counts.items()},
        "entropy_bits_at_most": float(np.log2(len(names))),
    }


def lengths(chats: Chats) -> dict[str, Any]:
    """Characters per text, by split and `all`: mean, median, share of the usual, histogram."""
    per_text = np.array([len(text) for text in chats.texts])
    rows = {**chats.rows, "all": np.concatenate(list(chats.rows.values()))}
    found = {}
    for split, indices in rows.items():
        length = per_text[indices]
        histogram = np.bincount(length)
        usual = (length >= USUAL_LENGTH[0]) & (length <= USUAL_LENGTH[1])
        found[split] = {
            "mean": float(length.mean()),
            "median": float(np.median(length)),
            "longest": int(length.max()),
            "share_3_to_6": float(usual.mean()),
            "histogram": _bins((size, size, histogram[size]) for size in range(1, len(histogram))),
        }
    return found


def frequencies(chats: Chats) -> dict[str, Any]:
    """How often the distinct texts were seen."""
    seen = np.sort(chats.frequency)[::-1]
    top = -(-len(seen) // 100)
    doublings = np.bincount(np.frexp(seen)[1] - 1)
    return {
        "mean": float(seen.mean()),
        "median": float(np.median(seen)),
        "largest": int(seen[0]),
        "share_of_the_top_percent": float(seen[:top].sum() / seen.sum()),
        "histogram": _bins(
            (2**power, 2 ** (power + 1) - 1, count) for power, count in enumerate(doublings)
        ),
    }


def appearances(chats: Chats) -> dict[str, Any]:
    """In how many categories the distinct labelled texts occur (`_spread`), and how evenly.

    The entropy of a text is that of its counts over the categories: 0 where one has them all.
    """
    labelled = chats.counts.any(axis=1)
    counts = chats.counts[labelled]
    most = counts.shape[1]
    in_categories = np.bincount(_spread(chats)[labelled], minlength=most + 1)
    entropy = _entropy(counts)
    share = entropy / max(np.log2(most), 1.0)
    uneven = share[share > 0]
    binned, edges = np.histogram(uneven, _ENTROPY_BINS, (0.0, 1.0))
    return {
        "texts": len(counts),
        "categories": _bins((size, size, in_categories[size]) for size in range(1, most + 1)),
        "entropy_bits": {
            "mean": float(entropy.mean()) if len(entropy) else None,
            "at_most": float(np.log2(most)),
            "one_category": len(counts) - len(uneven),
            "histogram_of_share_of_most": _bins(zip(edges[:-1], edges[1:], binned, strict=True)),
        },
    }


def meaningless(chats: Chats) -> dict[str, Any]:
    """Rows by the first reason that makes their text say nothing, with frequent examples."""
    general = _spread(chats) > GENERAL_ABOVE
    found = [
        reason or (TOO_GENERAL if spread else None)
        for reason, spread in zip(reasons(chats.texts), general.tolist(), strict=True)
    ]
    return {
        reason: _flagged(chats, [reason == one for one in found])
        for reason in (REPETITION, NO_HAN, TOO_GENERAL)
    }


def privacy(chats: Chats) -> dict[str, Any]:
    """Rows that hold each kind of personal data; the examples are masked when published."""
    found = [kinds(text) for text in chats.texts]
    return {kind: _flagged(chats, [kind in kinds for kinds in found]) for kind in MASKS}


def _spread(chats: Chats) -> np.ndarray:
    """In how many categories each text occurs, [texts].

    That is, to the nearest whole number, at least once: where distributions are counts, the study's
    rule exactly; smoothed ones have a share of every category, which is no occurrence. Where
    frequencies are not known, every share counts.
    """
    occurs = chats.counts >= 0.5 if chats.frequency_known else chats.counts > 0
    return np.maximum(occurs.sum(axis=1), chats.counts.any(axis=1))


def _flagged(chats: Chats, flags: Sequence[bool]) -> dict[str, Any]:
    """Number of rows whose text is flagged, by split and `all`; its most frequent texts."""
    flagged = np.array(flags)
    per_split = {split: int(flagged[rows].sum()) for split, rows in chats.rows.items()}
    indices = np.flatnonzero(flagged)
    frequent = indices[np.argsort(-chats.frequency[indices], kind="stable")][:_EXAMPLES]
    return {
        "texts": {**per_split, "all": sum(per_split.values())},
        "examples": [chats.texts[index] for index in frequent.tolist()],
    }


def _label_counts(labels: np.ndarray, count: int) -> np.ndarray:
    return np.bincount(labels[labels >= 0], minlength=count)


def _entropy(counts: np.ndarray) -> np.ndarray:
    """Entropy in bits of each row of counts; 0 for a row of zeros."""
    totals = np.maximum(counts.sum(axis=1, dtype=np.float64), np.finfo(np.float64).tiny)
    entropy = np.zeros(len(counts))
    for column in counts.T:  # one at a time: [texts, labels] in float64 may be large
        share = column / totals
        entropy -= share * np.log2(np.where(share > 0, share, 1.0))
    return np.maximum(entropy, 0.0)


def _bins(bins: Iterable[tuple[Any, Any, Any]]) -> list[dict[str, Any]]:
    """A histogram as a list: lower and upper end, both inside for integers, and the texts."""
    return [{"from": low, "to": high, "texts": int(count)} for low, high, count in bins]
