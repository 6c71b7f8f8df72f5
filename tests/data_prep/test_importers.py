"""Imports: what gets into the chats folder, and that no sender does."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_prep.__main__ import main
from data_prep.build import Options, build
from data_prep.chats_folder import VIDEOS
from data_prep.importers import import_chats
from launcher.errors import InputError

SENDER = "5e4d3c2b"
XML = ('<?xml version="1.0" encoding="UTF-8"?><i><state>0</state>{}</i>').format(
    "".join(
        f'<d p="{second},{mode},25,16777215,1645660800,0,{SENDER},{key},10">{text}</d>'
        for second, mode, key, text in (
            (1.5, 1, 11, "前方高能"),
            (2.0, 7, 12, "[positioned]"),
            (3.25, 4, 13, "A &amp; B"),
            (4.0, 1, 11, "前方高能"),
        )
    )
)


def chats_of(folder: Path) -> list[tuple[Any, ...]]:
    rows = pq.read_table(folder / "chats.parquet").to_pylist()
    return [(row["video"], row["second"], row["text"], row["frequency"]) for row in rows]


def videos_of(folder: Path) -> dict[str, dict[str, Any]]:
    table = pq.read_table(folder / "videos.parquet")
    assert table.schema.equals(VIDEOS)
    return {row.pop("video"): row for row in table.to_pylist()}


def segment_with(*chats: tuple[int, int, str]) -> bytes:
    """A protobuf segment of (id, milliseconds, text), with a sender."""

    def varint(value: int) -> bytes:
        out = bytearray()
        while value >= 0x80:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        return bytes(out) + bytes([value])

    def text(number: int, value: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(value)) + value

    elements = []
    for key, milliseconds, content in chats:
        head = b"".join(
            varint(number << 3) + varint(value)
            for number, value in ((1, key), (2, milliseconds), (3, 1))
        )
        elements.append(head + text(6, SENDER.encode()) + text(7, content.encode()))
    return b"".join(text(1, element) for element in elements)


def test_folders_of_danmaku(tmp_path: Path) -> None:
    source = tmp_path / "danmaku"
    source.mkdir()
    (source / "101.xml").write_text(XML, encoding="utf-8")
    (source / "101-1.pb").write_bytes(segment_with((99, 5, "left out")))
    (source / "9-2.pb").write_bytes(segment_with((3, 2500, "哈哈"), (2, 1000, "来了")))
    (source / "9-1.pb").write_bytes(segment_with((1, 500, "第一"), (2, 1000, "来了")))
    videos = tmp_path / "videos.csv"
    videos.write_text("BVID,cid,title,tid,pubdate\nBV1,101,A,17,2022-02-24\nBV2,9,,,\n")
    summary = import_chats(source, tmp_path / "out", videos=videos)

    assert chats_of(tmp_path / "out") == [
        ("BV2", 0.5, "第一", 1),
        ("BV2", 1.0, "来了", 1),
        ("BV2", 2.5, "哈哈", 1),
        ("BV1", 1.5, "前方高能", 1),
        ("BV1", 3.25, "A & B", 1),
    ]
    found = videos_of(tmp_path / "out")
    assert found["BV1"]["tid"] == 17 and str(found["BV1"]["pubdate"]) == "2022-02-24"
    assert found["BV2"]["tid"] is None
    assert summary["without_zone"] == 1
    assert summary["counts"] == {
        "chats": 5,
        "dropped: duplicate": 2,
        "dropped: mode": 1,
        "parts with XML whose segments were left out": 1,
    }
    for file in (tmp_path / "out").iterdir():
        assert SENDER.encode() not in file.read_bytes()


def test_real_files_give_equal_chats(reference_data: Path, tmp_path: Path) -> None:
    counts = {}
    for kind in ("xml", "protobuf"):
        import_chats(reference_data / "fixtures/danmaku" / kind, tmp_path / kind)
        table = pq.read_table(tmp_path / kind / "chats.parquet")
        counts[kind] = table.group_by("video").aggregate([("text", "count")]).to_pydict()
    # XML stops at the most that the site sends in one document, the segments don't.
    assert set(counts["xml"]["video"]) == set(counts["protobuf"]["video"])
    assert sum(counts["xml"]["text_count"]) == 4501
    assert sum(counts["protobuf"]["text_count"]) == 6849


def test_the_studys_csv(tmp_path: Path) -> None:
    file = tmp_path / "danmu.csv"
    file.write_text(
        "\ufeff,danmu,Frequency,BVID,Source Video Title,Category ID,Channel ID,midHash\n"
        f'0,"前方,高能",3,BV1,甲,27.0,{SENDER},{SENDER}\n'
        f"1,来了来了,1,BV2,乙,214,{SENDER},{SENDER}\n"
        f"2, ,1,BV2,乙,214,{SENDER},{SENDER}\n",
        encoding="utf-8",
    )
    import_chats(file, tmp_path / "out")
    assert chats_of(tmp_path / "out") == [
        ("BV1", None, "前方,高能", 3),
        ("BV2", None, "来了来了", 1),
    ]
    assert {video: row["tid"] for video, row in videos_of(tmp_path / "out").items()} == {
        "BV1": 27,
        "BV2": 214,
    }
    for made in (tmp_path / "out").iterdir():
        assert SENDER.encode() not in made.read_bytes()
    options = Options(split="random", ratios=(1, 0, 0), clean="study", labels="zones21")
    rows = build(tmp_path / "out", options).splits["train"].to_pylist()
    assert [(row["text"], row["label"], row["frequency"]) for row in rows] == [
        ("前方高能", 0, 3),
        ("来了来了", 11, 1),
    ]


def test_jsonl_with_columns_named(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    records = [
        {"said": "好", "oid": 7, "progress": 1500, "uid": SENDER},
        {"said": "看", "bvid": "BV9", "progress": None},
    ]
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    file.write_text(lines + "\n\n", encoding="utf-8")
    videos = tmp_path / "videos.jsonl"
    videos.write_text('{"bvid": "BV8", "cid": 7, "tid_v2": 2064, "pubdate": 1645660800}\n')
    import_chats(file, tmp_path / "out", videos=videos, columns={"text": "said"})
    assert chats_of(tmp_path / "out") == [("BV8", 1.5, "好", 1), ("BV9", None, "看", 1)]
    row = videos_of(tmp_path / "out")["BV8"]
    assert row["tid_v2"] == 2064 and str(row["pubdate"]) == "2022-02-24"
    with pytest.raises(InputError, match="--column: no file has typo"):
        import_chats(file, tmp_path / "b", columns={"text": "said", "plays": "typo"})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "chats.jsonl",
        "out",
        "videos.jsonl",
    ]


def test_uer(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "train.tsv"
    file.write_text('label\ttext_a\n1\t他说"好\n5\t啊这\n', encoding="utf-8")
    arguments = ["import", str(file), str(tmp_path / "out"), "--label-zones", "1,4,188,160,211,"]
    assert main(arguments) == 0
    assert chats_of(tmp_path / "out") == [
        ("label-1", None, '他说"好', 1),
        ("label-5", None, "啊这", 1),
    ]
    zones = {video: row["tid"] for video, row in videos_of(tmp_path / "out").items()}
    assert zones == {"label-1": 4, "label-5": None}
    assert "1 videos without a zone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "danmu,BVID\n好\n", "line 2: 1 fields, the header has 2"),
        ("a.csv", "words,BVID\n好,BV1\n", "no text; expected one of the columns text"),
        ("a.csv", "danmu\n好\n", "neither a video nor a cid"),
        ("a.csv", "danmu,BVID,tid\n好,BV1,游戏\n", "tid: '游戏'; expected a number"),
        ("a.csv", "danmu,BVID,Frequency\n好,BV1,0\n", "frequency: 0; expected 1"),
        ("a.csv", "danmu,BVID,pubdate\n好,BV1,soon\n", "pubdate: 'soon'"),
        ("a.csv", 'danmu,BVID\n"好,BV1\n', "line 2: unexpected end"),
        ("a.jsonl", '{"text": "好"\n', "line 1: not JSON"),
        ("a.jsonl", "[1]\n", "line 1: expected an object"),
        ("a.tsv", "label\ttext\n", "expected the columns label and text_a"),
        ("a.tsv", "label\ttext_a\n1\n", "line 2: 1 fields"),
        ("a.txt", "好", "expected a folder of danmaku files"),
    ],
)
def test_wrong_files(tmp_path: Path, capsys: Any, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert main(["import", str(tmp_path / name), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        import_chats(tmp_path / "a.csv", tmp_path / "out")
    source = tmp_path / "danmaku"
    source.mkdir()
    with pytest.raises(InputError, match=r"no CID.xml and no CID-N.pb"):
        import_chats(source, tmp_path / "out")
    (source / "1.xml").write_text("<html>")
    with pytest.raises(InputError, match=r"1.xml: no chat list"):
        import_chats(source, tmp_path / "out")
    (source / "1.xml").rename(source / "1.pb")
    with pytest.raises(InputError, match=r"1.pb: expected CID-N.pb"):
        import_chats(source, tmp_path / "out")
    (tmp_path / "gb.csv").write_bytes("danmu,BVID\n好,BV1\n".encode("gb18030"))
    with pytest.raises(InputError, match=r"not UTF-8 after line 0.*iconv"):
        import_chats(tmp_path / "gb.csv", tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="already exists"):
        import_chats(source, tmp_path / "out")
