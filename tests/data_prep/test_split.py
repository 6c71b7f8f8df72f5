"""Splits by their promises, relatives against all pairs compared."""

import itertools

import numpy as np
import pyarrow as pa
import pytest

from data_prep.clean import normal_form
from data_prep.near_duplicates import SIMILARITY, character_pairs, group_relatives, similarity
from data_prep.phrases import GENERAL_PHRASES, ZONE_PHRASES
from data_prep.split import drop_relatives, parse_ratios, split_at_random, split_videos
from launcher.errors import InputError


def test_ratios() -> None:
    assert parse_ratios("72,18,10") == pytest.approx((0.72, 0.18, 0.10))
    assert parse_ratios("1,0,0") == (1, 0, 0)
    for wrong in ("0.8,0.2", "a,b,c", "0,0.5,0.5", "1,-1,1", "nan,1,1", "inf,1,1"):
        with pytest.raises(InputError, match="--ratios"):
            parse_ratios(wrong)


def test_random_split_has_the_studys_sizes() -> None:
    split = split_at_random(np.arange(149_981), (0.72, 0.18, 0.10), seed=3)
    assert np.bincount(split).tolist() == [107_986, 26_997, 14_998]
    again = split_at_random(np.arange(149_981), (0.72, 0.18, 0.10), seed=3)
    assert (split == again).all()
    assert (split != split_at_random(np.arange(149_981), (0.72, 0.18, 0.10), seed=4)).any()


def test_groups_stay_together() -> None:
    groups = np.random.default_rng(0).integers(0, 300, 3000)
    groups = np.unique(groups, return_inverse=True)[1]
    split = split_at_random(groups, (0.8, 0.0, 0.2), seed=0)
    for group in range(groups.max() + 1):
        assert len(set(split[groups == group].tolist())) == 1
    assert np.bincount(split) == pytest.approx([2400, 0, 600], abs=20)


def test_videos_by_chance_and_by_date() -> None:
    draw = np.random.default_rng(0)
    chats = draw.integers(0, 50, 400)
    ratios = (0.8, 0.1, 0.1)
    for dates in (None, draw.integers(0, 100, 400)):
        split = split_videos(chats, ratios, seed=1, dates=dates)
        assert (split[chats == 0] == -1).all()
        shares = [chats[split == index].sum() / chats.sum() for index in range(3)]
        assert shares == pytest.approx(ratios, abs=0.01)
        if dates is not None:
            for earlier, later in ((0, 1), (1, 2)):
                assert dates[split == earlier].max() <= dates[split == later].min()


def test_relatives_stay_where_they_were_first() -> None:
    groups = np.array([0, 0, 1, 1, 2, 3, 3])
    split = np.array([0, 2, 1, 2, 2, 1, 1], np.int8)
    kept = drop_relatives(groups, split)
    assert kept.tolist() == [True, False, True, False, True, True, True]


def near_texts() -> list[str]:
    """Phrases with near duplicates: a character more, less or other."""
    phrases = [*GENERAL_PHRASES, *itertools.chain.from_iterable(ZONE_PHRASES.values())][:250]
    draw = np.random.default_rng(0)
    texts = list(phrases)
    for phrase in phrases:
        at = int(draw.integers(len(phrase)))
        texts.append(phrase[:at] + "的" * int(draw.integers(2)) + phrase[at + 1 :])
        texts.append(phrase + "！！哈哈哈哈"[: int(draw.integers(5))])
    return texts


@pytest.mark.parametrize("way", ["exact", "normalised", "near"])
def test_relatives(way: str) -> None:
    texts = near_texts()
    forms = texts if way == "exact" else normal_form(pa.array(texts)).to_pylist()
    expected = list(range(len(texts)))
    sets = [character_pairs(form) for form in forms]
    for one, other in itertools.combinations(range(len(texts)), 2):
        related = forms[one] == forms[other]
        if way == "near":
            related = related or similarity(sets[one], sets[other]) >= SIMILARITY
        if related and expected[one] != expected[other]:
            low, high = sorted((expected[one], expected[other]))
            expected = [low if group == high else group for group in expected]
    groups = group_relatives(pa.array(texts), way)
    numbers = {group: number for number, group in enumerate(dict.fromkeys(expected))}
    assert groups.tolist() == [numbers[group] for group in expected]
    assert len(numbers) < len(texts)
