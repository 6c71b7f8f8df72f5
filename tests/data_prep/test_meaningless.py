"""Chats that say nothing, against a plain reading of the rule."""

import itertools
import time

import pytest

from data_prep.meaningless import reasons


@pytest.mark.parametrize(
    "text, reason",
    [
        ("哈哈哈哈", "repetition"),
        ("啊吗啊吗", "repetition"),
        ("啊吗啊吗啊", "repetition"),
        ("哈，哈，哈！", "repetition"),
        ("哈哈哈啊啊啊", "repetition"),
        ("ＡａAa", "repetition"),
        ("666", "repetition"),
        ("哈哈", None),
        ("谢谢", None),
        ("啊吗啊", None),
        ("高高兴兴", None),
        ("笑死哈哈哈哈", None),
        ("233", "no Han character"),
        ("awsl", "no Han character"),
        ("かわいい", "no Han character"),
        ("？？？", "no Han character"),
        ("", "no Han character"),
        ("𠮷n", None),
        ("A站", None),
    ],
)
def test_reason(text: str, reason: str | None) -> None:
    assert reasons([text, "正常的话"]) == [reason, None]


def test_every_short_string_against_a_plain_reading() -> None:
    def repeats(text: str) -> bool:
        units = [(text[:size], size) for size in range(1, len(text))]
        over = any(
            (unit * len(text))[: len(text)] == text and len(text) >= size * (3 if size == 1 else 2)
            for unit, size in units
        )
        runs = [len(list(run)) for _, run in itertools.groupby(text)]
        return over or min(runs) >= 3

    texts = ["".join(t) for n in range(1, 9) for t in itertools.product("啊吗哦", repeat=n)]
    expected = ["repetition" if repeats(text) else None for text in texts]
    assert reasons(texts) == expected
    assert 100 < sum(map(bool, expected)) < len(texts) / 2


def test_long_texts_take_no_more_than_a_moment() -> None:
    begun = time.process_time()
    assert reasons(["哈" * 20_000 + "啊", "哈啊" * 10_000]) == [None, "repetition"]
    assert time.process_time() - begun < 2
