"""The file formats a dataset can come in: each reader gives one split as its file holds it."""

import csv
import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from launcher.errors import InputError

COLUMNS = ("id", "text", "text_a", "label", "distribution", "group", "frequency")
"""Columns that mean something; others are ignored."""
_SHOWN = 3


_Rows = tuple[pa.Table, Callable[[int], str]]
"""A table as it stands in the file, and how to name the place of a row."""


@dataclass(frozen=True)
class Source:
    """One split as its file holds it.

    `place(row)` names a row the way an editor would find it; `sha256` has one entry per file read;
    `labels` are the names that the file itself gives.
    """

    file: Path
    raw: pa.Table
    place: Callable[[int], str]
    sha256: dict[str, str]
    labels: tuple[str, ...] | None = None


def read_source(file: Path) -> Source:
    """Read a .tsv, .csv, .jsonl or .parquet file or a saved Hugging Face dataset.

    Raises:
        InputError: it is missing, unreadable, empty or of another format; a line for each row that
            can't be read.
    """
    if is_saved_dataset(file):
        return _read_saved_dataset(file)
    readers = {".tsv": _read_tsv, ".csv": _read_csv, ".jsonl": _read_jsonl}
    data = read_bytes(file)
    if file.suffix not in {*readers, ".parquet"}:
        expected = listed([*readers, ".parquet"])
        raise InputError(f"{file}: unknown format {file.suffix!r}; expected {expected}")
    if not data.strip():
        raise InputError(f"{file}: empty file; expected at least one row")
    if file.suffix == ".parquet":
        table, place = _read_parquet(file, data)
    else:
        text = _decode(file, data)
        table, place = readers[file.suffix](file, text.encode(), text)
    return Source(file, table, place, {str(file): digest(data)})


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets`' `save_to_disk` wrote this folder."""
    return (folder / "state.json").exists() and (folder / "dataset_info.json").exists()


def _read_parquet(file: Path, data: bytes) -> _Rows:
    try:
        return pq.read_table(pa.BufferReader(data)), lambda row: f"row {row}"
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file}: not a whole parquet file: {_first_line(error)}") from error


def _read_tsv(file: Path, data: bytes, text: str) -> _Rows:
    options = {"delimiter": "\t", "quote_char": False, "ignore_empty_lines": False}

    def place(row: int) -> str:
        return f"line {row + 2}"

    return _parse_delimited(file, data, options, place), place


def _read_csv(file: Path, data: bytes, text: str) -> _Rows:
    @functools.cache
    def starts() -> list[int]:
        return _csv_row_starts(file, text)

    def place(row: int) -> str:
        return f"line {starts()[row + 1]}"

    if text.count('"') % 2:
        starts()  # a quote never closed would swallow the rest of the file as one text
    return _parse_delimited(file, data, {"newlines_in_values": True}, place), place


def _csv_row_starts(file: Path, text: str) -> list[int]:
    """Line on which each row starts, the header's first."""
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    starts, start = [], 1
    try:
        for row in rows:
            if row:
                starts.append(start)
            start = rows.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{file} line {start}: a quote opened here is not closed: {error}"
        ) from error
    return starts


def _parse_delimited(
    file: Path, data: bytes, options: dict[str, Any], place: Callable[[int], str]
) -> pa.Table:
    ragged: list[Any] = []

    def note(row: Any) -> str:
        ragged.append(row)
        return "skip"

    table = pa.csv.read_csv(
        pa.BufferReader(data),
        # One block and one thread: no row straddles blocks, and invalid rows know their number.
        read_options=pa.csv.ReadOptions(use_threads=False, block_size=len(data) + 1),
        parse_options=pa.csv.ParseOptions(invalid_row_handler=note, **options),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(COLUMNS, pa.string()),
            strings_can_be_null=False,
        ),
    )
    if ragged:
        rows = {row.number - 2: row for row in ragged}
        problems: list[str] = []
        report_rows(
            problems,
            file,
            place,
            list(rows),
            lambda row: (
                f"{rows[row].actual_columns} fields, the header has {rows[row].expected_columns}"
            ),
        )
        raise InputError("\n".join(problems))
    if "distribution" in table.column_names:
        raise InputError(f"{file}: column distribution is read from .jsonl and .parquet only")
    return table


def _read_jsonl(file: Path, data: bytes, text: str) -> _Rows:
    lines = text.split("\n")

    @functools.cache
    def filled() -> list[int]:
        return [index for index, line in enumerate(lines) if line.strip()]

    def place(row: int) -> str:
        return f"line {filled()[row] + 1}"

    try:
        schema = _json_schema(line for line in lines if line.strip())
        table = pa.json.read_json(
            pa.BufferReader(data),
            read_options=pa.json.ReadOptions(use_threads=False, block_size=len(data) + 1),
            parse_options=pa.json.ParseOptions(
                explicit_schema=schema, unexpected_field_behavior="ignore"
            ),
        )
    except (ValueError, TypeError, AttributeError) as error:  # ArrowInvalid is a ValueError too
        problems: list[str] = []
        wrong = _wrong_json_rows([lines[index] for index in filled()])
        report_rows(problems, file, place, list(wrong), lambda row: wrong[row])
        raise InputError("\n".join(problems) or f"{file}: {_first_line(error)}") from error
    named = '"label"' in text  # all null is unlabelled, not named at all is a missing column
    kept = [
        name
        for name in table.column_names
        if table[name].null_count < table.num_rows or (name == "label" and named)
    ]
    return table.select(kept), place


def _json_schema(lines: Iterable[str]) -> pa.Schema:
    """Types of the columns read; where names or numbers will do, those of the first value.

    Left to itself Arrow takes the text 2020-01-01 for a date and stumbles over unused columns.
    """
    types = {
        "text": pa.string(),
        "text_a": pa.string(),
        "distribution": pa.list_(pa.float64()),
        "frequency": pa.int64(),
    }
    kinds = {int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    open_names: set[str] | None = None
    for line in lines:
        record = json.loads(line)
        if open_names is None:
            open_names = {"id", "group", "label"} & record.keys()
        for name in [name for name in open_names if record.get(name) is not None]:
            types[name] = kinds.get(type(record[name]), pa.string())
            open_names.remove(name)
        if not open_names:
            break
    return pa.schema({"id": pa.string(), "group": pa.string(), "label": pa.string()} | types)


def _wrong_json_rows(lines: Sequence[str]) -> dict[int, str]:
    """What is wrong with which row: no JSON object, or a value of the wrong type."""
    wrong: dict[int, str] = {}
    types: dict[str, type] = {"text": str, "text_a": str, "distribution": list, "frequency": int}
    for row, line in enumerate(lines):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            wrong[row] = f"not JSON: {error.msg} (column {error.colno})"
            continue
        if not isinstance(record, dict):
            wrong[row] = (
                f'expected an object such as {{"text": ..., "label": ...}}, got {line[:40]}'
            )
            continue
        for name, value in record.items():
            if value is None or name not in COLUMNS:
                continue
            kind = types.setdefault(name, type(value))
            if type(value) is not kind:
                wrong[row] = f"{name} is {value!r}; expected {kind.__name__}"
            elif isinstance(value, list) and any(isinstance(v, str | list | dict) for v in value):
                wrong[row] = f"{name} is {value!r}; expected a list of numbers"
    return wrong


def _read_saved_dataset(folder: Path) -> Source:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{folder}: saved by Hugging Face `datasets`, which is not installed: "
            "pip install datasets"
        ) from error
    try:
        saved = datasets.load_from_disk(str(folder))
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"{folder}: not a whole saved dataset: {_first_line(error)}") from error
    # Not every .arrow file there is the dataset's: maps and filters leave their caches beside it.
    files = [Path(entry["filename"]) for entry in saved.cache_files]
    sha256 = {str(folder / file.name): digest(read_bytes(folder / file.name)) for file in files}
    names = getattr(saved.features.get("label"), "names", None)
    raw = saved.with_format("arrow")[:]
    return Source(folder, raw, lambda row: f"row {row}", sha256, tuple(names) if names else None)


def report_rows(
    problems: list[str],
    file: Path,
    place: Callable[[int], str],
    rows: Sequence[int],
    describe: Callable[[int], str],
) -> None:
    """Add a line for each of the first wrong rows, and one that counts them if there are more."""
    problems += [f"{file} {place(row)}: {describe(row)}" for row in rows[:_SHOWN]]
    if len(rows) > _SHOWN:
        problems.append(f"{file}: {len(rows)} such rows in all, the first {_SHOWN} shown")


@contextmanager
def noting(problems: list[str]) -> Iterator[None]:
    """Add the InputError of the block, if there is one, to `problems` and go on."""
    try:
        yield
    except InputError as error:
        problems.append(str(error))


def is_name(kind: pa.DataType) -> bool:
    """Whether a column of this type can name things."""
    return is_text(kind) or pa.types.is_integer(kind)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings, also as a dictionary."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def read_bytes(file: Path) -> bytes:
    """The content of a file that the user named."""
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{file}: no such file") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error


def _decode(file: Path, data: bytes) -> str:
    """The text of `data` without a byte order mark."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        guess = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "GB18030"
        raise InputError(
            f"{file} line {line}: not UTF-8 at byte {error.start}; it may be {guess}: "
            f"iconv -f {guess} -t UTF-8 {file.name} > converted{file.suffix}"
        ) from error


def read_json(file: Path) -> Any:
    """The value in a JSON file that the user named."""
    try:
        return json.loads(_decode(file, read_bytes(file)))
    except json.JSONDecodeError as error:
        raise InputError(f"{file} line {error.lineno}: not JSON: {error.msg}") from error


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def listed(names: Iterable[str]) -> str:
    """Names for a message."""
    return ", ".join(map(str, names)) or "none"
