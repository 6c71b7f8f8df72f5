"""The chats, and the pairs of characters, that a category uses more than the others do."""

from typing import Any

import numpy as np

from data_prep.audit.chats import Chats
from data_prep.log_odds import log_odds

SIGNIFICANT = 1.96
_SHOWN = 10
_BITS = 21  # of a code point


def characteristic_chats(names: tuple[str, ...], chats: Chats) -> dict[str, Any]:
    """Per category the chats with the largest z-scores of `log_odds`, of those above 1.96."""
    return _largest(names, chats.counts, chats.texts.__getitem__)


def characteristic_pairs(names: tuple[str, ...], chats: Chats) -> dict[str, Any]:
    """The same for two letters or digits side by side, which recur even where no chat does."""
    codes = np.frombuffer("\n".join(chats.texts).encode("utf-32-le"), np.uint32).astype(np.int64)
    ends = np.cumsum([len(text) + 1 for text in chats.texts])
    owner = np.searchsorted(ends, np.arange(len(codes) - 1), side="right")
    keys = codes[:-1] << _BITS | codes[1:]

    letters = np.unique(codes)
    letters = letters[[chr(code).isalnum() for code in letters.tolist()]]
    kept = np.isin(codes[:-1], letters) & np.isin(codes[1:], letters)
    pairs, unit = np.unique(keys[kept], return_inverse=True)
    owner = owner[kept]
    counts = np.stack(
        [np.bincount(unit, column[owner], len(pairs)) for column in chats.counts.T], axis=1
    )

    def name(index: int) -> str:
        pair = int(pairs[index])
        return chr(pair >> _BITS) + chr(pair & ((1 << _BITS) - 1))

    return _largest(names, counts, name)


def _largest(names: tuple[str, ...], counts: np.ndarray, name_of: Any) -> dict[str, Any]:
    # A unit seen once can't be significant. Together those are one more unit: the totals stay.
    often = np.flatnonzero(counts.sum(axis=1) >= 2)
    rest = counts.sum(axis=0, dtype=np.float64) - counts[often].sum(axis=0, dtype=np.float64)
    kept = np.vstack([counts[often], np.maximum(rest, 0.0)[None].astype(counts.dtype)])
    scores = log_odds(kept)[:-1]
    found = {}
    for category, name in enumerate(names):
        best = np.argsort(-scores[:, category], kind="stable")[:_SHOWN]
        found[name] = [
            {
                "text": name_of(int(often[index])),
                "z": float(scores[index, category]),
                "times": float(counts[often[index], category]),
            }
            for index in best.tolist()
            if scores[index, category] > SIGNIFICANT
        ]
    return found
