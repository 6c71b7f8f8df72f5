"""The readers of chats against other readers, against damaged and hostile input, and real files."""

import dataclasses
import re
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import danmaku
from data_prep.danmaku import (
    MAX_BYTES,
    MAX_CHATS,
    MAX_TEXT,
    Chat,
    Chats,
    DanmakuError,
    inflate,
    read_segment,
    read_xml,
)

CLEAN_TEXT = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Cn"], exclude_characters="\ufffd"), max_size=40
)
CHAT = st.tuples(
    st.integers(0, 2**62),
    st.integers(0, 10**8),
    st.integers(1, 9),
    st.integers(0, 2),
    CLEAN_TEXT,
)
Row = tuple[int, int, int, int, str]


def plain(rows: list[Row]) -> list[Chat]:
    """The rules once more, as plainly as can be."""
    kept: dict[int, Chat] = {}
    for key, milliseconds, mode, pool, text in rows:
        if mode <= 6 and pool == 0 and text.strip() and key not in kept:
            kept[key] = Chat(key, milliseconds / 1000, mode, text.strip())
    return list(kept.values())


def document(rows: list[Row], nine: bool = True) -> str:
    chats = "".join(
        f'<d p="{ms / 1000:.5f},{mode},25,16777215,1640995200,{pool},c0ffee5e,{key}'
        f'{",5" if nine else ""}">{escape(text)}</d>\n'
        for key, ms, mode, pool, text in rows
    )
    head = "<chatserver>x</chatserver><chatid>1</chatid><state>0</state><source>k-v</source>"
    return f'<?xml version="1.0" encoding="UTF-8"?><i>{head}{chats}</i>\n'


@settings(max_examples=300, deadline=None)
@given(st.lists(CHAT, max_size=6), st.booleans())
def test_xml_equals_the_standard_parser(rows: list[Row], nine: bool) -> None:
    text = document(rows, nine)
    parsed = [
        (element.attrib["p"].split(","), element.text or "")
        for element in ElementTree.fromstring(text.encode()).iter("d")
    ]
    again = [(int(p[7]), round(float(p[0]) * 1000), int(p[1]), int(p[5]), t) for p, t in parsed]
    read = read_xml(text.encode())
    assert read.chats == plain(again)
    assert (read.partial, read.closed) == (False, False)
    assert len(read.chats) + read.dropped.total() == len(rows)


def protobuf_reply() -> Callable[[], Any]:
    """Google's own class for the segment, made from its description."""
    descriptor_pb2 = pytest.importorskip("google.protobuf.descriptor_pb2")
    from google.protobuf import descriptor_pool, message_factory

    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="dm.proto", package="dm", syntax="proto3")
    chat = file.message_type.add(name="Elem")
    fields = {1: ("id", kind.TYPE_INT64), 2: ("progress", kind.TYPE_INT32)}
    fields |= {3: ("mode", kind.TYPE_INT32), 6: ("midHash", kind.TYPE_STRING)}
    fields |= {7: ("content", kind.TYPE_STRING), 11: ("pool", kind.TYPE_INT32)}
    fields |= {13: ("attr", kind.TYPE_INT32), 14: ("uid", kind.TYPE_INT64)}
    fields |= {15: ("real", kind.TYPE_DOUBLE), 16: ("small", kind.TYPE_FLOAT)}
    for number, (name, type_) in fields.items():
        chat.field.add(name=name, number=number, type=type_, label=kind.LABEL_OPTIONAL)
    reply = file.message_type.add(name="Reply")
    reply.field.add(name="elems", number=1, type=kind.TYPE_MESSAGE, type_name=".dm.Elem", label=3)
    reply.field.add(name="state", number=2, type=kind.TYPE_INT32, label=kind.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("dm.Reply"))


@pytest.fixture(scope="module")
def reply_class() -> Callable[[], Any]:
    return protobuf_reply()


@settings(max_examples=300, deadline=None)
@given(rows=st.lists(CHAT, max_size=6), state=st.integers(0, 2))
def test_segment_equals_googles_protobuf(
    reply_class: Callable[[], Any], rows: list[Row], state: int
) -> None:
    reply = reply_class()
    reply.state = state
    for key, milliseconds, mode, pool, text in rows:
        reply.elems.add(
            id=key, progress=milliseconds, mode=mode, pool=pool, content=text, midHash="c0ffee5e",
            uid=key, attr=-1, real=0.5, small=0.5,
        )  # fmt: skip
    read = read_segment(reply.SerializeToString())
    assert read.chats == plain(rows)
    assert (read.partial, read.closed) == (False, state == 1)


def test_a_segment_made_elsewhere() -> None:
    data = "0a2808e90710dc0b1801201928ffffff073201303a06e5a5bde880b64080b3be8e064805620431303031"
    assert read_segment(bytes.fromhex(data)) == Chats([Chat(1001, 1.5, 1, "好耶")])
    assert read_segment(b"\x10\x01") == Chats(closed=True)
    assert read_segment(b"") == Chats()
    assert [field.name for field in dataclasses.fields(Chat)] == ["key", "second", "mode", "text"]


def test_damaged_xml_keeps_what_can_be_read() -> None:
    rows: list[Row] = [(n, n, 1, 0, f"第{n}条") for n in range(5)]
    whole = document(rows)
    assert read_xml(whole[: whole.index("第3条")].encode()) == Chats(
        plain(rows)[:3], partial=True, dropped=danmaku.Counter(row=1)
    )

    def texts(data: str | bytes) -> list[str]:
        return [c.text for c in read_xml(data if isinstance(data, bytes) else data.encode()).chats]

    odd = whole.replace("第1条", "A&B &amp;lt; <b> \x08哈&#22;\x1c\x7f&#xFFFE;\ufffe")
    assert texts(odd)[1] == "A&B &lt; <b> 哈"
    assert texts(whole.replace("第1条</d>", "未完")) == ["第0条", "第2条", "第3条", "第4条"]
    assert texts(whole.replace("第1条", "x" * (MAX_TEXT + 1)))[1] == "第2条"
    assert texts(whole.replace('p="', 'user="a>b" raw="{&quot;}" p="'))[1] == "第1条"
    assert texts(whole.replace('p="', "p='").replace('">', "'>"))[1] == "第1条"
    assert texts(whole.encode().replace("第1条".encode(), b"\xff\xe5"))[1] == "第2条"
    packer = zlib.compressobj(wbits=-15)
    for packed in (zlib.compress(whole.encode()), packer.compress(whole.encode()) + packer.flush()):
        assert read_xml(packed).chats == plain(rows)
        with pytest.raises(DanmakuError, match="nor whole deflated data"):
            read_xml(packed[:-6])
    assert read_xml(b"<i><state>1</state></i>").closed
    for other in (b"<html><d p='1'>a</d></html>", b"", b"<i", b'{"code":-412}'):
        with pytest.raises(DanmakuError):
            read_xml(other)


EDIT = st.tuples(st.floats(0, 1), st.integers(0, 12), st.binary(max_size=8))
TOKENS = (b"<d ", b"</d>", b'p="', b"&#x", b"&#9999999999;", b"\xff" * 10, b"\x0b", b"\x0a\xff\x7f")


@pytest.fixture(scope="module")
def bases() -> list[bytes]:
    """Ten documents to damage, half of them meant for each reader."""
    rows: list[Row] = [(n, n * 997, 1 + n % 8, n % 2, "好" * (n % 4)) for n in range(8)]
    xml = document(rows).encode()
    element = bytes.fromhex("08e90710dc0b1801201932013a06e5a5bde880b65800")
    segment = (b"\x0a" + bytes([len(element)]) + element) * 4 + b"\x10\x00"
    packer = zlib.compressobj(wbits=-15)
    return [
        xml,
        document(rows, nine=False).replace("<d", "\n <d").encode(),
        b"<i>" + xml * 2,
        zlib.compress(xml),
        packer.compress(xml) + packer.flush(),
        segment,
        segment[:30],
        b"\x0a\x80\x01" + segment[:128],
        b"\x22\x05hello" + segment + b"\x2a\x00",
        b"\x0a\xff\xff\xff\xff\x0f" + segment,
    ]


def test_20000_damaged_inputs(bases: list[bytes]) -> None:
    read = crashed = 0

    @settings(
        max_examples=2000,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(EDIT, min_size=1, max_size=4))
    def damage(edits: list[tuple[float, int, bytes]]) -> None:
        nonlocal read, crashed
        for index, base in enumerate(bases):
            data = base
            for place, kind, filling in edits:
                at = int(place * len(data))
                token = TOKENS[kind] if kind < len(TOKENS) else filling
                keep = at + (len(filling) if kind % 2 else 0)
                data = data[:at] + token + (b"" if kind == 12 else data[keep:])
            start = time.thread_time()
            try:
                found = (read_xml if index < 5 else read_segment)(data)
            except DanmakuError as error:
                crashed += 1
                assert "\n" not in str(error) and len(str(error)) < 200
            else:
                for chat in found.chats:
                    assert chat.text == chat.text.strip() and 0 < len(chat.text) <= MAX_TEXT
                    assert 0 <= chat.second <= danmaku.MAX_SECOND and 1 <= chat.mode <= 6
                    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]", chat.text)
            read += 1
            assert time.thread_time() - start < 1

    damage()
    assert read >= 20_000 and 0 < crashed < read / 2


def hostile() -> dict[str, tuple[Callable[[bytes], Chats], bytes]]:
    size = MAX_BYTES
    row = b'<d p="0,1,25,0,0,0,0,%d">a</d>'
    chat = b"\x0a\x07\x08\x01\x18\x01\x3a\x01a"
    return {
        "a bomb": (read_xml, zlib.compress(b"<i>" + bytes(1 << 27))),
        "too large": (read_xml, b"<i>" + b" " * size),
        "too large a segment": (read_segment, bytes(size + 1)),
        "rows opened": (read_xml, b"<i>" + b'<d p="">' * (size // 8 - 1)),
        "quotes opened": (read_xml, b"<i>" + b'<d p="' * (size // 6 - 1)),
        "blocks": (read_xml, b"<i>" + (b'<d p="">' * 1200 + b"</d>") * (size // 9700)),
        "many rows": (read_xml, b"<i>" + b"".join(row % n for n in range(size // 40))),
        "attributes": (read_xml, b"<i><d" + b" p=" * (size // 3 - 9) + b"></d>"),
        "wide characters": (read_xml, "<i>😀".encode() + b"a" * (size - 50)),
        "long number": (read_xml, row.replace(b"%d", b"9" * 9000).join([b"<i>", b"</i>"])),
        "long reference": (read_xml, b'<i><d p="0,1,2,3,4,0,6,7">&#' + b"9" * 9000 + b";</d>"),
        "many chats": (read_segment, chat * (size // len(chat))),
        "many fields": (read_segment, b"\x10\x01" * (size // 2)),
        "a chat of fields": (read_segment, b"\x0a\xf0\xff\xff\x07" + b"\x08\x01" * (size // 2 - 8)),
        "a length of 2**62": (read_segment, b"\x0a" + b"\x80" * 8 + b"\x40"),
    }


def test_hostile_input_stays_within_time_and_memory() -> None:
    for name, (reader, data) in hostile().items():
        tracemalloc.start()
        start = time.thread_time()
        try:
            found = reader(data)
            assert len(found.chats) + found.dropped.total() <= MAX_CHATS, name
        except DanmakuError:
            pass
        seconds, peak = time.thread_time() - start, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert seconds < 10, f"{name}: {seconds:.1f} s"
        assert peak < 160 << 20, f"{name}: {peak >> 20} MiB"


def test_inflate_refuses_what_grows_too_large() -> None:
    assert inflate(zlib.compress(bytes(MAX_BYTES))) == bytes(MAX_BYTES)
    with pytest.raises(DanmakuError, match="inflates to more than"):
        inflate(zlib.compress(bytes(MAX_BYTES + 1)))


def test_real_files(reference_data: Path, reply_class: Callable[[], Any]) -> None:
    folder = reference_data / "fixtures" / "danmaku"
    equal = 0
    for file in sorted((folder / "xml").glob("*.xml")):
        data = file.read_bytes()
        xml = read_xml(data)
        assert len(xml.chats) + xml.dropped.total() == data.count(b"<d p=")
        found: list[Chat] = []
        dropped = 0
        for segment in sorted((folder / "protobuf").glob(f"{file.stem}-*.pb")):
            reply = reply_class()
            reply.ParseFromString(segment.read_bytes())
            rows = [(e.id, e.progress, e.mode, e.pool, e.content) for e in reply.elems]
            read = read_segment(segment.read_bytes())
            assert read.chats == plain(rows)
            assert len(read.chats) + read.dropped.total() == len(rows)
            found += read.chats
            dropped += read.dropped.total()
        # XML holds the newest chats up to the pool's limit; below it both hold the same.
        by_key = {chat.key: chat for chat in found}
        common = [chat for chat in xml.chats if chat.key in by_key]
        assert len(common) >= 0.9 * min(len(xml.chats), len(found))
        for chat in common:
            other = by_key[chat.key]
            assert (chat.text, chat.mode) == (other.text, other.mode)
            assert chat.second == pytest.approx(other.second, abs=0.0011)
        limit = int(re.findall(rb"<maxlimit>(\d+)", data)[0])
        if data.count(b"<d p=") < limit:
            assert (len(xml.chats), xml.dropped.total()) == (len(found), dropped)
            equal += 1
    assert equal == 2
    assert len(read_segment((folder / "seg_2021.so").read_bytes()).chats) == 4067
