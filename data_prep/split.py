"""Who goes into train, dev and test: units at random, or whole videos by chance or by date."""

from collections.abc import Sequence

import numpy as np

from data_prep.dataset import SPLITS
from data_prep.sources import listed
from launcher.errors import InputError


def parse_ratios(text: str) -> tuple[float, ...]:
    """Shares of train, dev and test from `0.8,0.1,0.1` or `72,18,10`, summing to 1.

    Raises InputError unless there are three numbers, none negative, the first above 0.
    """
    try:
        parts = [float(part) for part in text.split(",")]
    except ValueError:
        parts = []
    if len(parts) != len(SPLITS) or min(parts) < 0 or parts[0] == 0 or not np.isfinite(sum(parts)):
        raise InputError(
            f"--ratios: {text!r}; expected shares of {listed(SPLITS)} such as 0.8,0.1,0.1"
        )
    return tuple(part / sum(parts) for part in parts)


def split_at_random(groups: np.ndarray, ratios: Sequence[float], seed: int) -> np.ndarray:
    """Split index of each unit, int8 [units]; units of one group stay together.

    `groups` numbers each unit's group from 0, int64 [units]. The groups are dealt in a random order
    until a split has its share of the units.
    """
    sizes = np.bincount(groups)
    order = np.random.default_rng(seed).permutation(len(sizes))
    return _deal(order, sizes, ratios)[groups]


def split_videos(
    chats: np.ndarray, ratios: Sequence[float], *, seed: int, dates: np.ndarray | None = None
) -> np.ndarray:
    """Split index of each video, int8 [videos], -1 of those without chats.

    The videos are dealt in a random order, or by their `dates` (int64, the earliest into train; the
    order is random among equal ones), until a split has its share of the `chats`, int64 [videos].
    """
    order = np.random.default_rng(seed).permutation(len(chats))
    if dates is not None:
        order = order[np.argsort(dates[order], kind="stable")]
    split = _deal(order, chats, ratios)
    split[chats == 0] = -1
    return split


def drop_relatives(groups: np.ndarray, split: np.ndarray) -> np.ndarray:
    """Which rows stay if each group is to be in one split only: the first that has it; bool [rows].

    Where whole videos are split, a relative can't change sides without its video, so it goes.
    """
    first = np.full(int(groups.max(initial=-1)) + 1, len(SPLITS), np.int8)
    np.minimum.at(first, groups, split)
    return split == first[groups]


def _deal(order: np.ndarray, sizes: np.ndarray, ratios: Sequence[float]) -> np.ndarray:
    """Split index of each group, int8: by where the group's middle lies in `order`."""
    ends = np.cumsum(sizes[order])
    middles = ends - sizes[order] / 2
    bounds = np.round(np.cumsum(ratios)[:-1] * ends[-1])
    split = np.searchsorted(bounds, middles, side="right").astype(np.int8)
    dealt = np.empty(len(order), np.int8)
    dealt[order] = split
    return dealt
