"""A synthetic data set drawn from the built-in phrase bank: no download, no real chats."""

import random
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from data_prep.dataset import SCHEMA, SPLITS, Dataset
from data_prep.phrases import (
    GENERAL_PHRASES,
    PREFIXES,
    SHARED_PHRASES,
    SUFFIXES,
    ZONE_PHRASES,
)
from data_prep.zones import FIRST_LEVEL_ZONES, MAIN_CATEGORIES, group_distribution
from launcher.errors import InputError

GENERAL_SHARE = 0.10
SHARED_SHARE = 0.08
UNSEEN_SHARE = 0.15  # of each pool's phrases: half only in dev, half only in test
SIZES = (
    210,
    60_000,
)  # one text per zone and tenth of the videos; about a tenth of the bank's reach
_TEXTS_PER_VIDEO = 28


def make_sample(
    *, size: int = 6000, seed: int = 0, labels: Literal["main5", "zones21"] = "main5"
) -> Dataset:
    """`size` distinct synthetic chats of invented videos, 80/10/10 in train, dev and test by video.

    Every video has a zone. Most of its chats are phrases of that zone with decorations around them;
    `SHARED_SHARE` fit a second zone too; `GENERAL_SHARE` fit anywhere, with spread-out
    distributions and labels close to noise, so that no model can be perfect. Some phrases occur in
    only one of dev and test. `label` is the largest share of `distribution`.

    `labels` is "main5" (the study's main categories) or "zones21" (the zones, with the grouping).
    Raises InputError for a size outside `SIZES`.
    """
    if not SIZES[0] <= size <= SIZES[1]:
        raise InputError(f"size: {size}; expected {SIZES[0]} to {SIZES[1]} synthetic texts")
    rng = random.Random(seed)
    bank = _Bank(rng)
    videos = 210 * max(1, round(size / (210 * _TEXTS_PER_VIDEO)))
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    for index in range(size):
        video = index % videos
        # 10 and 21 share no factor: any 210 videos in a row have each zone in each tenth once.
        split = {8: "dev", 9: "test"}.get(video % 10, "train")
        text, shares = bank.draw(split, zone=video % 21)
        while text in seen:
            text, shares = bank.draw(split, zone=video % 21)
        seen.add(text)
        rows[split].append(
            {
                "id": f"{split}-{len(rows[split])}",
                "text": text,
                "distribution": shares,
                "group": f"synthetic-video-{video:05d}",
                "frequency": min(999, int(rng.paretovariate(1.2))),
            }
        )
    five = labels == "main5"
    return Dataset(
        labels=tuple(MAIN_CATEGORIES) if five else FIRST_LEVEL_ZONES,
        splits={split: _table(rows[split], five) for split in SPLITS},
        provenance={
            "synthetic": True,
            "source": "built-in phrase bank",
            "seed": seed,
            "size": size,
        },
        grouping=None if five else MAIN_CATEGORIES,
        sha256={},
    )


class _Bank:
    """The phrases each split may use, and draws of decorated texts from them."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._general = self._pools(GENERAL_PHRASES)
        self._typical = [self._pools(ZONE_PHRASES[zone]) for zone in FIRST_LEVEL_ZONES]
        self._shared: list[list[tuple[str, int]]] = [[] for _ in FIRST_LEVEL_ZONES]
        for pair, phrases in SHARED_PHRASES.items():
            one, two = map(FIRST_LEVEL_ZONES.index, pair)
            self._shared[one] += [(phrase, two) for phrase in phrases]
            self._shared[two] += [(phrase, one) for phrase in phrases]

    def draw(self, split: str, zone: int) -> tuple[str, np.ndarray]:
        """A text for a video of `zone` and its shares over the zones, float64 [21]."""
        rng, kind = self._rng, self._rng.random()
        shares = np.array([rng.gammavariate(0.5, 1) for _ in FIRST_LEVEL_ZONES])
        if kind < GENERAL_SHARE:
            return self._decorated(rng.choice(self._general[split])), shares / shares.sum()
        if kind < GENERAL_SHARE + SHARED_SHARE:
            phrase, other = rng.choice(self._shared[zone])
            own, others = rng.uniform(0.51, 0.6), 0.35
        else:
            phrase, other = rng.choice(self._typical[zone][split]), zone
            own, others = rng.uniform(0.55, 0.95), 0.0
        shares *= (1 - own - others) / shares.sum()
        shares[zone] += own
        shares[other] += others
        return self._decorated(phrase), shares

    def _pools(self, phrases: Sequence[str]) -> dict[str, list[str]]:
        shuffled = self._rng.sample(phrases, len(phrases))
        cut = round(len(phrases) * UNSEEN_SHARE / 2)
        dev, test, common = shuffled[:cut], shuffled[cut : 2 * cut], shuffled[2 * cut :]
        return {"train": common, "dev": common + dev, "test": common + test}

    def _decorated(self, phrase: str) -> str:
        kind = self._rng.random()
        prefix = self._rng.choice(PREFIXES) if kind < 0.4 else ""
        suffix = self._rng.choice(SUFFIXES) if 0.3 < kind < 0.7 else ""
        return prefix + phrase + suffix


def _table(rows: list[dict[str, Any]], five: bool) -> pa.Table:
    shares = np.stack([row["distribution"] for row in rows])
    if five:
        shares = group_distribution(shares, FIRST_LEVEL_ZONES, MAIN_CATEGORIES)
    labelled = [
        {**row, "label": int(share.argmax()), "distribution": share.tolist()}
        for row, share in zip(rows, shares, strict=True)
    ]
    return pa.Table.from_pylist(labelled, schema=SCHEMA)
