"""Records of CSV and JSONL files that other tools wrote, and the values in them."""

import csv
import datetime
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.danmaku import MAX_BYTES
from launcher.errors import InputError

COLUMNS: dict[str, tuple[str, ...]] = {
    "video": ("video", "bvid", "BVID", "bv", "bv_id", "video_id", "aid", "avid"),
    "cid": ("cid", "oid"),
    "second": ("second", "seconds", "video_time", "danmu_time", "dm_time"),
    "millisecond": ("progress", "stime_ms", "milliseconds"),
    "text": ("text", "content", "danmu", "danmaku", "message", "comment", "弹幕", "弹幕内容"),
    "frequency": ("frequency", "Frequency", "count"),
    "title": ("title", "Source Video Title", "标题"),
    "tid": ("tid", "Category ID", "category_id", "typeid"),
    "tid_v2": ("tid_v2", "tidv2"),
    "plays": ("plays", "play", "view", "views", "Source Video View Count", "播放量"),
    "pubdate": ("pubdate", "pub_date"),
}
"""What is read, by the names that other tools give it; the first that a file has is taken."""
Row = Mapping[str, Any]
"""One record: the keys of `COLUMNS` that its file has."""


def records(file: Path, columns: Mapping[str, str], used: set[str]) -> Iterator[Row]:
    """The records of a .csv or .jsonl file, by the keys of `COLUMNS`; other columns are skipped.

    `columns` gives names that aren't among the usual ones; its keys that a record has go into
    `used`. Raises InputError for a file that can't be read as what its ending says.
    """
    if file.suffix not in (".csv", ".jsonl"):
        raise InputError(f"{file}: expected a folder of danmaku files, .csv, .jsonl or .tsv")
    named: dict[str, str] = {}
    fields: tuple[str, ...] = ()
    for record in _csv_records(file) if file.suffix == ".csv" else _json_records(file):
        if record.keys() != set(fields):
            fields = tuple(record)
            named = _found_columns(record.keys(), columns)
            used.update(columns.keys() & named.keys())
        yield {name: record[column] for name, column in named.items()}


def _found_columns(fields: Iterable[str], columns: Mapping[str, str]) -> dict[str, str]:
    """The column of each key of `COLUMNS` that there is."""
    present = set(fields)
    found = {
        name: next(guess for guess in guesses if guess in present)
        for name, guesses in COLUMNS.items()
        if name not in columns and present.intersection(guesses)
    }
    return found | {name: column for name, column in columns.items() if column in present}


def _csv_records(file: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(MAX_BYTES)
    rows = csv.reader(text_lines(file, keep_ends=True), strict=True)
    try:
        header = next(rows, [])
        for row in rows:
            if len(row) != len(header):
                raise InputError(
                    f"{file} line {rows.line_num}: {len(row)} fields, the header has {len(header)}"
                )
            yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise InputError(f"{file} line {rows.line_num}: {error}") from None


def _json_records(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text_lines(file), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{file} line {number}: not JSON: {error.msg}") from None
        if not isinstance(record, dict):
            raise InputError(f"{file} line {number}: expected an object, got {line[:40]}")
        yield record


def text_lines(file: Path, keep_ends: bool = False) -> Iterator[str]:
    """The lines of a UTF-8 file, with or without a byte order mark."""
    number = 0
    try:
        with file.open(encoding="utf-8-sig", newline="" if keep_ends else None) as opened:
            for number, line in enumerate(opened, 1):  # noqa: B007
                yield line if keep_ends else line.rstrip("\n")
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except UnicodeDecodeError:
        raise InputError(
            f"{file}: not UTF-8 after line {number}; if it is GB18030: iconv -f GB18030 -t UTF-8"
        ) from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None


def to_number(value: Any, where: str) -> float | None:
    """A finite number, None where there is nothing."""
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{where}: {value!r}; expected a number")
    return number


def to_whole(value: Any, where: str) -> int | None:
    """A whole number, None where there is nothing; CSV writers often make it 27.0."""
    number = to_number(value, where)
    if number is not None and number != int(number):
        raise InputError(f"{where}: {value!r}; expected a whole number")
    return None if number is None else int(number)


def to_date(value: Any, where: str) -> datetime.date | None:
    """A day from ISO 8601 or from seconds since 1970, in the site's time zone."""
    text = "" if value is None else str(value).strip()
    if not text:
        return None
    try:
        if text.replace(".", "", 1).isdigit():
            zone = datetime.timezone(datetime.timedelta(hours=8))
            return datetime.datetime.fromtimestamp(float(text), zone).date()
        return datetime.datetime.fromisoformat(text.replace("/", "-")).date()
    except (ValueError, OverflowError, OSError):
        raise InputError(
            f"{where}: {value!r}; expected a day such as 2022-02-24 or seconds since 1970"
        ) from None
