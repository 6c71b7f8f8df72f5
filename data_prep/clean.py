"""What is left of a chat: by the study's rule, or by a gentler one that keeps sentences."""

import re
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc


def clean(texts: pa.Array, rule: str) -> pa.Array:
    """`texts` cleaned by a rule of `RULES`, one for one; "" where nothing is left.

    study: only Han characters (U+4E00 to U+9FFF), ASCII letters and digits are kept. gentle: the
    chat is kept as written, but without control and format characters, with full-width letters and
    digits made ASCII, white space one blank, and runs shortened: 233 for 23333, 哈哈哈 for two 哈
    or more, three of any other character or lone digit repeated longer.
    """
    return RULES[rule](texts)


def normal_form(texts: pa.Array) -> pa.Array:
    """What chats that say the same have in common: NFKC, lower case, letters and digits only, no
    character more than twice in a row. A chat without letters and digits keeps its signs."""
    folded = pc.utf8_lower(pc.utf8_normalize(texts, form="NFKC"))
    said = pc.replace_substring_regex(folded, r"[^\p{L}\p{N}]+", "")
    said = pc.if_else(pc.equal(said, ""), folded, said)
    return _each(said, lambda text: _REPEATED.sub(r"\1\1", text))


def _study(texts: pa.Array) -> pa.Array:
    return pc.replace_substring_regex(texts, r"[^\x{4e00}-\x{9fff}a-zA-Z0-9]+", "")


def _gentle(texts: pa.Array) -> pa.Array:
    for pattern, replacement in (
        (r"[\p{Cc}\p{Zs}\p{Zl}\p{Zp}]+", " "),
        (r"[\p{Cf}\p{Cs}\p{Co}]+", ""),
        (r" {2,}", " "),
    ):
        texts = pc.replace_substring_regex(texts, pattern, replacement)
    # RE2, Arrow's engine, can't refer back to what a group matched.
    return _each(pc.utf8_trim(texts, " "), _shorten_runs)


def _shorten_runs(text: str) -> str:
    text = _LAUGHS.sub("哈哈哈", _LONG_233.sub("233", text.translate(_HALF_WIDTH)))
    return _LONE_DIGIT_RUN.sub(r"\1\1\1", _RUN.sub(r"\1\1\1", text))


def _each(texts: pa.Array, change: Callable[[str], str]) -> pa.Array:
    return pa.array([change(text) for text in texts.to_pylist()], texts.type)


RULES: dict[str, Callable[[pa.Array], pa.Array]] = {"study": _study, "gentle": _gentle}

_HALF_WIDTH = {
    full: full - 0xFEE0
    for first, last in ("０９", "ＡＺ", "ａｚ")
    for full in range(ord(first), ord(last) + 1)
}
_LONG_233 = re.compile(r"(?<!\d)23{2,}(?!\d)")
_LAUGHS = re.compile("哈{2,}")
_RUN = re.compile(r"(\D)\1{3,}")
_LONE_DIGIT_RUN = re.compile(r"(?<!\d)(\d)\1{3,}(?!\d)")  # 666666, but not the one in 100000
_REPEATED = re.compile(r"(.)\1{2,}", re.DOTALL)
