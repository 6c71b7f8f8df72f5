"""Personal data in chats: what is masked, and what only looks like it."""

import re
import time

import pytest

from data_prep.privacy import MASKS, kinds, mask


@pytest.mark.parametrize(
    "text, masked, found",
    [
        ("打13812345678找我", "打[phone]找我", ["phone number"]),
        ("打138 1234 5678", "打[phone]", ["phone number"]),
        ("+86-199-1234-5678!", "[phone]!", ["phone number"]),
        ("１３８１２３４５６７８", "[phone]", ["phone number"]),
        ("13333333333", "[phone]", ["phone number"]),
        ("客服010-12345678", "客服[phone]", ["phone number"]),
        ("写信a.b+c@mail.qq.com。", "写信[e-mail]。", ["e-mail"]),
        ("123456＠qq。com", "[e-mail]", ["e-mail"]),
        ("qq123456@qq.com", "[e-mail]", ["e-mail"]),
        ("13812345678@163.com", "[e-mail]", ["e-mail"]),
        ("加我QQ：123456", "加我QQ：[account]", ["account"]),
        ("群号是 54321，来", "群号是 [account]，来", ["account"]),
        ("微信abc_1234 ", "微信[account] ", ["account"]),
        ("@老番茄 快来@harry-1！", "@[name] 快来@[name]！", ["name after @", "name after @"]),
        ("＠雪碧", "@[name]", ["name after @"]),
        ("1234567", "[digits]", ["long digit run"]),
        ("2333334", "[digits]", ["long digit run"]),
        ("11010519491231002X", "[digits]", ["long digit run"]),
        ("138123456789", "[digits]", ["long digit run"]),
        (
            "@a 13912345678 x@y.cn",
            "@[name] [phone] [e-mail]",
            ["name after @", "phone number", "e-mail"],
        ),
    ],
)
def test_found_and_masked(text: str, masked: str, found: list[str]) -> None:
    assert kinds(text) == found
    assert mask(text) == masked
    assert mask(masked) == masked


@pytest.mark.parametrize(
    "text",
    [
        "233333",
        "2333333333333",
        "66666666",
        "23336666",
        "0000000000",
        "123456",
        "12345",
        "QQ飞车12345",
        "QQ音乐可以听了",
        "aqq12345",
        "微信红包2021",
        "微信wechat",
        "@",
        "&@#%#%@#",
        "400-500",
        "2021-11-30",
        "第1399集",
        "哈哈哈",
        "",
    ],
)
def test_left_alone(text: str) -> None:
    assert kinds(text) == []
    assert mask(text) == text


@pytest.mark.parametrize("space", ["", " ", "-"])
def test_every_mobile_prefix_is_found_and_no_other(space: str) -> None:
    for prefix in range(100, 200):
        text = f"我{prefix}{space}1203{space}4567吧"
        mobile = prefix >= 130
        assert ("phone number" in kinds(text)) == mobile
        assert (re.search(r"\d", mask(text)) is None) == (mobile or not space)


def test_every_kind_has_a_mask_that_says_nothing_personal() -> None:
    for tag in MASKS.values():
        assert mask(f"字{tag}字") == f"字{tag}字"


def test_long_texts_take_no_more_than_a_moment() -> None:
    begun = time.process_time()
    for piece in ("a", "1-", "qq", "@", "1@a", "86 ", "微信a", "a.", "6", "666 "):
        mask(piece * 20_000 + "1")
    assert time.process_time() - begun < 3
