"""Which texts have a relative among others: one that they contain or that contains them.

A segmenter that cuts one chat into overlapping words gives such relatives, mostly of one label. A
random split leaves some of them on both sides, which flatters methods that remember.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np


def has_relative(texts: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """Whether each text contains, or is contained in, one of `others`; equal texts count.

    Looks up every substring that is as long as a text of the other side, so the time grows with the
    number of substrings and not with the number of pairs.

    Returns:
        [texts] bool.
    """
    wanted, known = set(texts), set(others)
    inside = wanted.intersection(_substrings(known, {len(text) for text in wanted}))
    sizes = {len(other) for other in known}
    return np.array(
        [text in inside or not known.isdisjoint(_substrings([text], sizes)) for text in texts],
        dtype=bool,
    )


def _substrings(texts: Iterable[str], sizes: set[int]) -> Iterator[str]:
    """Every substring of `texts` that has one of the lengths `sizes`."""
    for text in texts:
        for size in sizes:
            for start in range(len(text) - size + 1):
                yield text[start : start + size]
