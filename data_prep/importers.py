"""`python -m data_prep import`: bring chats of other origins into a chats folder.

Only the columns named here are read, so that no sender gets in.
"""

import argparse
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.chats_folder import CHATS, VIDEOS
from data_prep.danmaku import MAX_BYTES, Chats, DanmakuError, read_segment, read_xml
from data_prep.records import COLUMNS, Row, records, text_lines, to_date, to_number, to_whole
from data_prep.sources import listed
from launcher.errors import InputError
from launcher.files import write_json

_VIDEO_FIELDS = ("title", "tid", "tid_v2", "plays", "pubdate")
_AT_A_TIME = 100_000


def import_chats(
    source: Path,
    out: Path,
    *,
    videos: Path | None = None,
    columns: Mapping[str, str] | None = None,
    label_zones: Sequence[int | None] | None = None,
) -> dict[str, Any]:
    """Write the chats of `source` as a chats folder; returns what `import.json` says of it.

    `source` is a folder of danmaku XML (`CID.xml`) or protobuf segments (`CID-N.pb`; the XML is
    taken where a part has both), a .csv or .jsonl file with a chat per record, or a UER .tsv.
    `videos`, a .csv or .jsonl file, tells what is known of each video; its `cid` column names the
    parts that belong to a video (without it a part is a video of its own). `columns` gives the
    names of columns that are not among `COLUMNS`. Of a UER file, label n becomes the video
    `label-n`, whose zone is `label_zones[n]`.

    Raises InputError for what is missing, unreadable or ambiguous, and if `out` exists.
    """
    if out.exists():
        raise InputError(f"{out}: already exists; choose another folder or remove it first")
    if unknown := [name for name in columns or {} if name not in COLUMNS]:
        raise InputError(f"--column: {listed(unknown)}; expected some of {listed(COLUMNS)}")
    columns, used = columns or {}, set[str]()
    known = _Videos()
    if videos is not None:
        for row in records(videos, columns, used):
            known.add(row, videos)
    counts: Counter[str] = Counter()
    if source.is_dir():
        kind, rows = "danmaku", _folder_rows(source, known, counts)
    elif source.suffix == ".tsv":
        kind, rows = "uer", _uer_rows(source, known, label_zones)
    else:
        kind, rows = (
            source.suffix[1:],
            _file_rows(source, records(source, columns, used), known, counts),
        )
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        counts["chats"] = _write_chats(partial / "chats.parquet", rows)
        if not counts["chats"]:
            raise InputError(f"{source}: no chat found; dropped were {dict(counts)}")
        if unused := columns.keys() - used:
            raise InputError(
                f"--column: no file has {listed(columns[name] for name in sorted(unused))}"
            )
        pq.write_table(known.table(), partial / "videos.parquet", compression="zstd")
        summary = {
            "synthetic": False,
            "source": source.name,
            "kind": kind,
            "videos": len(known.fields),
            "without_zone": known.without_zone(),
            "counts": dict(sorted(counts.items())),
        }
        write_json(partial / "import.json", summary)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial)
        raise
    return summary


def _write_chats(file: Path, rows: Iterator[dict[str, Any]]) -> int:
    """Write the rows a part at a time; returns how many."""
    written = 0
    schema = CHATS.append(pa.field("frequency", pa.int64()))
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        while batch := list(islice(rows, _AT_A_TIME)):
            writer.write_table(pa.Table.from_pylist(batch, schema))
            written += len(batch)
    return written


class _Videos:
    """What is known of each video, in the order of their first mention."""

    def __init__(self) -> None:
        self.fields: dict[str, dict[str, Any]] = {}
        self.of_part: dict[str, str] = {}

    def add(self, row: Row, file: Path) -> str:
        """Take what a record says of its video; what was said first stays. Returns its id."""
        video = str(row.get("video") or row.get("cid") or "").strip()
        if not video:
            raise InputError(f"{file}: a record has neither a video nor a cid: {dict(row)}")
        said = self.fields.setdefault(video, {})
        for name in _VIDEO_FIELDS:
            if name in row and name not in said:
                said[name] = _VALUES[name](row[name], f"{file}: {name}")
        if row.get("cid"):
            self.of_part[str(row["cid"])] = video
        return video

    def table(self) -> pa.Table:
        rows = [{"video": video, **said} for video, said in self.fields.items()]
        return pa.Table.from_pylist(rows, VIDEOS)

    def without_zone(self) -> int:
        return sum(
            said.get("tid") is None and said.get("tid_v2") is None for said in self.fields.values()
        )


def _folder_rows(folder: Path, known: _Videos, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """The chats of each part, by cid; of protobuf segments in the order of their numbers."""
    parts: dict[str, list[Path]] = {file.stem: [file] for file in folder.glob("*.xml")}
    segments: dict[str, list[tuple[int, Path]]] = {}
    for file in folder.glob("*.pb"):
        cid, dash, number = file.stem.rpartition("-")
        if not dash or not number.isdigit():
            raise InputError(f"{file}: expected CID-N.pb, N the number of the segment")
        segments.setdefault(cid, []).append((int(number), file))
    for cid, files in segments.items():
        if cid in parts:
            counts["parts with XML whose segments were left out"] += 1
        else:
            parts[cid] = [file for _, file in sorted(files)]
    if not parts:
        raise InputError(f"{folder}: no CID.xml and no CID-N.pb in it")
    for cid in sorted(parts, key=lambda cid: (len(cid), cid)):
        video = known.of_part.get(cid) or known.add({"cid": cid}, folder)
        seen: set[int] = set()
        for file in parts[cid]:
            found = _read_danmaku(file)
            counts.update({f"dropped: {reason}": n for reason, n in found.dropped.items()})
            counts.update(["damaged files, read as far as possible"] * found.partial)
            for chat in found.chats:
                if chat.key in seen:
                    counts["dropped: duplicate"] += 1
                    continue
                seen.add(chat.key)
                yield {"video": video, "second": chat.second, "text": chat.text, "frequency": 1}


def _read_danmaku(file: Path) -> Chats:
    if file.stat().st_size > MAX_BYTES:
        raise InputError(f"{file}: {file.stat().st_size:,} bytes; expected at most {MAX_BYTES:,}")
    try:
        return (read_xml if file.suffix == ".xml" else read_segment)(file.read_bytes())
    except DanmakuError as error:
        raise InputError(f"{file}: {error}") from None


def _file_rows(
    file: Path, rows: Iterable[Row], known: _Videos, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """The chats of a file with one a record; a video's part leads to it if `--videos` said so."""
    for number, row in enumerate(rows, 1):
        if "text" not in row:
            raise InputError(
                f"{file}: record {number} has no text; expected one of the columns "
                f"{listed(COLUMNS['text'])}, or --column text=NAME"
            )
        if row["text"] is None or not str(row["text"]).strip():
            counts["dropped: empty"] += 1
            continue
        part = known.of_part.get(str(row.get("cid") or ""))
        video = part if part is not None and not row.get("video") else known.add(row, file)
        where = f"{file}: record {number}"
        second = to_number(row.get("second"), f"{where}: second")
        if second is None and row.get("millisecond") not in (None, ""):
            second = (to_number(row["millisecond"], f"{where}: millisecond") or 0) / 1000
        frequency = to_whole(row.get("frequency"), f"{where}: frequency")
        if frequency is not None and frequency < 1:
            raise InputError(f"{where}: frequency: {frequency}; expected 1 or more")
        text = str(row["text"])
        yield {"video": video, "second": second, "text": text, "frequency": frequency or 1}


def _uer_rows(
    file: Path, known: _Videos, zones: Sequence[int | None] | None
) -> Iterator[dict[str, Any]]:
    """The texts of a UER file: header with label and text_a, split on tabs, no quoting."""
    lines = text_lines(file)
    header = next(lines, "").split("\t")
    if "label" not in header or "text_a" not in header:
        raise InputError(f"{file}: header {header}; expected the columns label and text_a")
    for number, line in enumerate(lines, 2):
        values = line.split("\t")
        if len(values) != len(header):
            raise InputError(
                f"{file} line {number}: {len(values)} fields, the header has {len(header)}"
            )
        row = dict(zip(header, values, strict=True))
        zone = None
        if zones is not None:
            label = to_whole(row["label"], f"{file} line {number}: label")
            if label is None or not 0 <= label < len(zones):
                raise InputError(
                    f"{file} line {number}: label {row['label']!r}; --label-zones has "
                    f"{len(zones)}, for 0 to {len(zones) - 1}"
                )
            zone = zones[label]
        video = known.add({"video": f"label-{row['label']}", "tid": zone}, file)
        yield {"video": video, "second": None, "text": row["text_a"], "frequency": 1}


_VALUES: dict[str, Callable[[Any, str], Any]] = {
    "title": lambda value, where: None if value is None else str(value),
    "tid": to_whole,
    "tid_v2": to_whole,
    "plays": to_whole,
    "pubdate": to_date,
}


def add_import(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command line of `import`."""
    parser = commands.add_parser(
        "import", help="make a chats folder of danmaku files, CSV, JSONL or UER TSV"
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="folder of CID.xml or CID-N.pb, or a .csv, .jsonl or UER .tsv file",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="chats folder to create")
    parser.add_argument(
        "--videos",
        type=Path,
        metavar="FILE",
        help="CSV or JSONL with video, cid, title, tid, tid_v2, plays, pubdate, as far as known",
    )
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME=COLUMN",
        help=f"what a column is called in the files; NAME is one of {listed(COLUMNS)}",
    )
    parser.add_argument(
        "--label-zones",
        metavar="TID,TID,...",
        help="zone ids of labels 0, 1, ... of a UER file; nothing between commas: no zone",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    columns = dict(given.partition("=")[::2] for given in options.column)
    if not all(columns.values()):
        raise InputError(f"--column: {listed(options.column)}; expected NAME=COLUMN")
    zones = None
    if options.label_zones is not None:
        zones = [to_whole(part, "--label-zones") for part in options.label_zones.split(",")]
    summary = import_chats(
        options.source, options.out, videos=options.videos, columns=columns, label_zones=zones
    )
    dropped = {reason: n for reason, n in summary["counts"].items() if reason != "chats" and n}
    print(f"{options.out}: {summary['counts']['chats']:,} chats of {summary['videos']:,} videos")
    for reason, number in dropped.items():
        print(f"{reason}: {number:,}")
    if summary["without_zone"]:
        print(
            f"{summary['without_zone']:,} videos without a zone; build leaves them out unless "
            "--videos tells their tid",
            file=sys.stderr,
        )
