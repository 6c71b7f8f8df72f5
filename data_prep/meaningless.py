"""Chats that say nothing a classifier could use, recognised from the text alone."""

import re
import unicodedata
from collections.abc import Sequence
from itertools import groupby

REPETITION = "repetition"
NO_HAN = "no Han character"

_HAN = re.compile("[\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def reasons(texts: Sequence[str]) -> list[str | None]:
    """Why each text says nothing, or None where it may say something.

    Only letters and digits count, without regard to case and width. "repetition": the text is one
    unit over and over, the last time perhaps cut short (哈哈哈, 啊吗啊吗, 6666; one character at
    least three times, a longer unit at least twice), or nothing but runs of at least three equal
    characters (哈哈哈啊啊啊). "no Han character": it has none, and is no repetition either (2333,
    awsl, or punctuation only).
    """
    return [_reason(text) for text in texts]


def _reason(text: str) -> str | None:
    said = "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text).casefold()))
    if _is_repetition(said):
        return REPETITION
    return None if _HAN.search(said) else NO_HAN


def _is_repetition(said: str) -> bool:
    length = len(said)
    if length < 3 or len(set(said)) > length // 2:  # most texts: no unit can occur twice
        return False
    if all(len(list(run)) >= 3 for _, run in groupby(said)):
        return True
    return any(said.startswith(said[period:]) for period in range(2, length // 2 + 1))
