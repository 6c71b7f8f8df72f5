"""Cleaning: the study's rule against Python's regular expressions, the gentle one by example."""

import re

import pyarrow as pa
import pytest

from data_prep.clean import clean, normal_form

CHATS = [
    "前方高能！！",
    "AWSL，啊我死了 2333",
    "㐂𠮷 is not kept, 々 neither",
    "龦鿿一",
    "ｈｅｌｌｏ１２３",
    "  ",
    "",
    "👍👍👍👍",
    "a\u200bb\tc\nd",
]


def test_study_rule() -> None:
    expected = [re.sub("[^\u4e00-\u9fffa-zA-Z0-9]", "", chat) for chat in CHATS]
    assert clean(pa.array(CHATS), "study").to_pylist() == expected


@pytest.mark.parametrize(
    ("chat", "expected"),
    [
        ("前方高能！！", "前方高能！！"),
        ("哈哈，笑死哈哈哈哈哈哈", "哈哈哈，笑死哈哈哈"),
        ("23333333 这是什么", "233 这是什么"),
        ("来了来了233", "来了来了233"),
        ("身高123333", "身高123333"),
        ("100000元", "100000元"),
        ("666666！！！！！", "666！！！"),
        ("啊啊啊啊啊我死了", "啊啊啊我死了"),
        ("ｈｅｌｌｏ　１２３", "hello 123"),
        (" \u200b好\t\n 看 ", "好 看"),
        ("\u202e\ufeff", ""),
    ],
)
def test_gentle_rule(chat: str, expected: str) -> None:
    assert clean(pa.array([chat]), "gentle").to_pylist() == [expected]


def test_chats_that_say_the_same_have_one_normal_form() -> None:
    said = ["ＡＷＳＬ！！！", "awsl", "A W S L~"]
    assert normal_form(pa.array(said)).to_pylist() == ["awsl"] * 3
    assert normal_form(pa.array(["哈哈哈哈", "哈哈", "哈", "？？？", "。"])).to_pylist() == [
        "哈哈",
        "哈哈",
        "哈",
        "??",
        "。",
    ]
