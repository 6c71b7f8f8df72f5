"""Readers of bullet chats (弹幕) as the site sends them: XML documents and protobuf segments.

Both read an allow-list of fields and nothing else: time in the video, mode, text, pool, and the
comment's id, which serves to drop duplicates and is not to be written anywhere. The sender (a hash
that can be reversed in a second, in protobuf also the plain number) is never taken out of the
bytes. Whatever the input, the readers end in time linear in its size, within the caps below.
"""

import html
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

MAX_BYTES = 16 * 1024 * 1024
"""Most bytes that one document may have, compressed or not."""
MAX_CHATS = 100_000
"""Most chats looked at in one document; the site sends up to 10,000."""
MAX_TEXT = 1000
"""Most characters of one chat; viewers can send about 100."""
MAX_SECOND = 1e6
"""Latest second in a video that is believed."""


class DanmakuError(ValueError):
    """Bytes that are no document of bullet chats; one line."""


@dataclass(frozen=True, slots=True)
class Chat:
    """One chat: seconds from the start of the video, mode 1-6, text.

    `key` is the site's id of the comment: for dropping duplicates only.
    """

    key: int
    second: float
    mode: int
    text: str


@dataclass
class Chats:
    """What a document holds: its chats in order, each id once.

    `closed`: the video has no chats because they are switched off. `partial`: the document breaks
    off or is damaged, and `chats` is what could be read. `dropped` counts what was left out:
    `mode` (positioned, code and unknown ones), `pool` (subtitles, scripts), `duplicate`, `empty`,
    `long`, `row` (unreadable).
    """

    chats: list[Chat] = field(default_factory=list)
    closed: bool = False
    partial: bool = False
    dropped: Counter[str] = field(default_factory=Counter)


def read_xml(data: bytes) -> Chats:
    """Read a chat list (`<i><d p="second,mode,size,colour,time,pool,sender,id,weight">text</d>…`).

    No XML parser: each `<d>` is read on its own, because one bare `&` or control character, and
    chats have them, would cost the rest of the document. Control characters are left out of the
    texts; entities are not expanded beyond HTML's own. Deflated documents are inflated. Raises
    DanmakuError if it is too large or no chat list.
    """
    if data.lstrip(_BLANK)[:1] != b"<":
        data = inflate(data)
    if len(data) > MAX_BYTES:
        raise DanmakuError(f"{len(data):,} bytes of XML; expected at most {MAX_BYTES:,}")
    text = data.decode("utf-8", errors="replace")
    head = text[:1000]
    if not _ROOT.search(head):
        raise DanmakuError(f"no chat list: starts with {head[:40]!r}; expected <i>")
    found = _Collector()
    _scan(text, found)
    found.result.closed = "<state>1</state>" in head
    found.result.partial |= found.full or not text.endswith("</i>", 0, len(text.rstrip()))
    return found.result


def read_segment(data: bytes) -> Chats:
    """Read a protobuf segment (DmSegMobileReply: 1 chats, 2 state).

    Raises DanmakuError if it is too large.
    """
    if len(data) > MAX_BYTES:
        raise DanmakuError(f"{len(data):,} bytes of protobuf; expected at most {MAX_BYTES:,}")
    found = _Collector()
    try:
        for number, value in _fields(data, most=MAX_CHATS):
            if number == 1 and isinstance(value, bytes):
                _add_element(found, value)
            elif number == 2:
                found.result.closed = value == 1
    except ValueError:
        found.result.partial = True
    return found.result


def inflate(data: bytes) -> bytes:
    """Undo deflate with or without its header, or gzip.

    Raises DanmakuError if it is none of them, breaks off, or grows beyond MAX_BYTES.
    """
    for window in (-zlib.MAX_WBITS, zlib.MAX_WBITS | 32):
        stream = zlib.decompressobj(window)
        try:
            plain = stream.decompress(data, MAX_BYTES + 1)
        except zlib.error:
            continue
        if len(plain) > MAX_BYTES:
            raise DanmakuError(f"inflates to more than {MAX_BYTES:,} bytes")
        if stream.eof:
            return plain
    raise DanmakuError(f"{len(data):,} bytes that are neither text nor whole deflated data")


class _Collector:
    """Takes chats that pass the rules, counts the others."""

    def __init__(self) -> None:
        self.result = Chats()
        self._keys: set[int] = set()
        self._rows = 0

    @property
    def full(self) -> bool:
        return self._rows >= MAX_CHATS

    def drop_row(self) -> None:
        self._rows += 1
        self.result.dropped["row"] += 1

    def add(self, key: int, second: float, mode: int, pool: int, text: str) -> None:
        self._rows += 1
        text = _NOT_TEXT.sub("", text).strip()
        if reason := self._why_not(key, second, mode, pool, text):
            self.result.dropped[reason] += 1
        else:
            self._keys.add(key)
            self.result.chats.append(Chat(key, second, mode, text))

    def _why_not(self, key: int, second: float, mode: int, pool: int, text: str) -> str | None:
        if not 0 <= second <= MAX_SECOND:
            return "row"
        if not 1 <= mode <= 6:
            return "mode"
        if pool != 0:
            return "pool"
        if not text:
            return "empty"
        if len(text) > MAX_TEXT:
            return "long"
        return "duplicate" if key in self._keys else None

    def add_row(self, parameters: str, text: str) -> None:
        """A `<d>` with its `p`: 8 values or more, of which the seventh (the sender) is skipped."""
        values = parameters.split(",", 8)
        try:
            second, mode, pool, key = float(values[0]), int(values[1]), int(values[5]), values[7]
            self.add(int(key), second, mode, pool, html.unescape(text))
        except (ValueError, IndexError):
            self.drop_row()


def _scan(text: str, found: _Collector) -> None:
    """Read each `<d>` on its own: no mistake in one costs another."""
    at, close = 0, -1
    while not found.full and (opened := _ROW.search(text, at)):
        at = opened.end()
        if close < at:
            close = text.find("</d>", at)
        if close < 0:
            found.drop_row()
            return
        whole = close - at <= 10 * MAX_TEXT and text.find("<d ", at, close) < 0
        parameters = _PARAMETERS.search(opened[0])
        if whole and parameters:
            found.add_row(parameters[2], text[at:close])
            at = close + 4
        else:
            found.drop_row()


_BLANK = b"\xef\xbb\xbf \t\r\n"
_ROOT = re.compile(r"<i[\s>]")
# Possessive, and no "<" inside: a search fails at the next "<" and never goes back.
_ROW = re.compile(r"""<d\s(?:[^<>"']|"[^"<]*+"|'[^'<]*+')*+>""")
_PARAMETERS = re.compile(r"""\sp=(["'])(.*?)\1""")
_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffd-\uffff]")


def _add_element(found: _Collector, data: bytes) -> None:
    """A DanmakuElem: 1 id, 2 milliseconds, 3 mode, 7 text, 11 pool. No other field is looked at."""
    key = milliseconds = mode = pool = 0
    text = b""
    try:
        for number, value in _fields(data, most=100):
            if isinstance(value, bytes):
                text = value if number == 7 else text
            elif number == 1:
                key = value
            elif number == 2:
                milliseconds = value
            elif number == 3:
                mode = value
            elif number == 11:
                pool = value
        found.add(key, milliseconds / 1000, mode, pool, text.decode("utf-8"))
    except ValueError:
        found.drop_row()


def _fields(data: bytes, most: int) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a protobuf message; values of fixed size are skipped.

    Raises ValueError where the bytes are no message, or one of more than `most` fields.
    """
    at, size = 0, len(data)
    while at < size:
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        most -= 1
        if number == 0 or most < 0:
            raise ValueError("no field number, or too many fields")
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
        elif wire == 2:
            length, at = _varint(data, at)
            if length > size - at:
                raise ValueError("field beyond the end")
            yield number, data[at : at + length]
            at += length
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
    if at > size:
        raise ValueError("field beyond the end")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
    raise ValueError("varint without end")
