"""Which texts are relatives: equal, equal in normal form, or nearly equal."""

import itertools
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from data_prep.clean import normal_form
from launcher.errors import InputError

WAYS = ("exact", "normalised", "near")
SIMILARITY = 0.6
"""Least similarity of near duplicates: three characters are one of four with one added, 0.67."""
_PERMUTATIONS, _BANDS = 128, 32
_AT_A_TIME = 20_000


def group_relatives(texts: pa.Array, way: str) -> np.ndarray:
    """Number of each text's group of relatives, from 0 in order of appearance, int64 [texts].

    exact: equal texts. normalised: equal `normal_form`. near: normal forms whose sets of character
    pairs have a Jaccard similarity of at least `SIMILARITY`, and relatives of relatives; candidates
    come from MinHash (rensa; it finds 99 of 100 pairs at the least similarity, nearly all above)
    and each is checked exactly. Raises InputError if rensa is needed and not installed.
    """
    if way == "exact":
        return texts.dictionary_encode().indices.to_numpy().astype(np.int64)
    forms = normal_form(texts).dictionary_encode()
    indices = forms.indices.to_numpy().astype(np.int64)
    if way == "normalised":
        return indices
    return _connected(forms.dictionary.to_pylist())[indices]


def similarity(one: frozenset[str], other: frozenset[str]) -> float:
    """Jaccard similarity of two sets, not both empty."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


def character_pairs(text: str) -> frozenset[str]:
    """The pairs of neighbouring characters, or the text itself if it is one character."""
    return frozenset(map("".join, itertools.pairwise(text))) or frozenset([text])


def _connected(forms: list[str]) -> np.ndarray:
    """Number of each form's group, in order of appearance."""
    earlier = list(range(len(forms)))  # a relative that comes before, at last the group's first

    def first_of(form: int) -> int:
        while earlier[form] != form:
            earlier[form] = earlier[earlier[form]]
            form = earlier[form]
        return form

    for pair in _similar(forms):
        low, high = sorted(map(first_of, pair))
        earlier[high] = low
    return np.unique([first_of(form) for form in range(len(forms))], return_inverse=True)[1]


def _similar(forms: list[str]) -> Iterator[tuple[int, int]]:
    """Indices of similar forms, each pair once."""
    try:
        from rensa import RMinHash, RMinHashLSH
    except ImportError:
        raise InputError("--keep-together near: needs rensa: pip install rensa") from None
    sets = [character_pairs(form) for form in forms]
    # Sorted: the hashes of a set don't depend on the order, but the order on PYTHONHASHSEED does.
    hashes = RMinHash.from_token_sets([sorted(pairs) for pairs in sets], _PERMUTATIONS, 0)
    index = RMinHashLSH(SIMILARITY, _PERMUTATIONS, _BANDS)
    index.insert_many(hashes)
    for start in range(0, len(forms), _AT_A_TIME):
        found = index.query_all(hashes[start : start + _AT_A_TIME])
        for one, candidates in enumerate(found, start):
            for other in candidates:
                if other > one and similarity(sets[one], sets[other]) >= SIMILARITY:
                    yield one, other
