"""One reader and one writer for every dataset a run can take.

A dataset is a set of labels in order and up to three splits, each an Arrow table with the columns
of `SCHEMA`. Whatever the file format, the same checks are made, and all that fail are reported
together, with file and line.
"""

import csv
import difflib
import functools
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from launcher.errors import InputError

SPLITS = ("train", "dev", "test")
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "text": pa.string(),
        "label": pa.int32(),
        "distribution": pa.list_(pa.float32()),
        "group": pa.string(),
        "frequency": pa.int64(),
    }
)
_SUM_TOLERANCE = 1e-3
_SHOWN = 3


@dataclass(frozen=True)
class Dataset:
    """Labels in order and the splits read, each a table of `SCHEMA`.

    `label` is an index into `labels` or null; `distribution` one share per label, summing to 1, or
    null; `group` the video a text comes from, or null; `frequency` how often the text was seen.
    `grouping` partitions the labels into main categories. `sha256` has one entry per input file.
    """

    labels: tuple[str, ...]
    splits: dict[str, pa.Table]
    provenance: dict[str, Any]
    grouping: dict[str, list[str]] | None
    sha256: dict[str, str]


def read_dataset(
    path: Path | None = None,
    *,
    files: Mapping[str, Path] | None = None,
    labels: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
) -> Dataset:
    """Read a dataset folder, a Hugging Face `datasets` folder, or one file per split.

    `path` is a folder written by `write_dataset` or by `datasets`' `save_to_disk` (whose
    `validation` split is `dev` here). `files` maps split names to .tsv (UER: header, plain split on
    tabs), .csv, .jsonl or .parquet files or saved `datasets`. The text column is `text` or
    `text_a`; `label` holds indices or names (in text files a value equal to a label name is that
    name); `id`, `distribution`, `group` and `frequency` are optional, other columns are ignored.
    Missing ids become "<split>-<row number>".

    `labels` are the names in order: needed where the data don't carry them, otherwise they must
    agree. `splits` limits what is read. Raises InputError for whatever is wrong in the input.
    """
    if (path is None) == (files is None):
        raise InputError("data: give either path (a folder) or one file per split")
    if labels is not None:
        _check_labels(list(labels), "data.labels")
    if files is not None:
        found = {split: Path(file) for split, file in files.items()}
        info = _Info(None, None, {"files": {split: str(file) for split, file in found.items()}})
    else:
        info, found = _open_folder(Path(str(path)))
    found = _select_splits(found, splits, str(path or "data"))

    problems: list[str] = []
    sources: dict[str, _Source] = {}
    sha256 = {} if info.file is None else {str(info.file): _digest(_read_bytes(info.file))}
    for split, file in found.items():
        with _noting(problems):
            sources[split] = _read_source(file, sha256)
    tables: dict[str, pa.Table] = {}
    with _noting(problems):
        agreed = _agreed_labels(labels, info, sources.values())
        for split, source in sources.items():
            with _noting(problems):
                tables[split] = _canonical(source, split, agreed, problems)
    if problems:
        raise InputError("\n".join(problems))
    return Dataset(agreed, tables, info.provenance, info.grouping, sha256)


def write_dataset(folder: Path, dataset: Dataset) -> None:
    """Write `dataset` as a dataset folder, which appears whole or not at all.

    Raises InputError if `folder` exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder}: already exists; choose another folder or remove it first")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        for split, table in dataset.splits.items():
            pq.write_table(table.cast(SCHEMA), partial / f"{split}.parquet", compression="zstd")
        info = {
            "labels": list(dataset.labels),
            "grouping": dataset.grouping,
            "provenance": dataset.provenance,
        }
        text = json.dumps(info, ensure_ascii=False, indent=2) + "\n"
        (partial / "labels.json").write_text(text, encoding="utf-8")
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial)
        raise


@dataclass(frozen=True)
class _Info:
    """What a folder says about its labels; `file` is where it says so."""

    labels: tuple[str, ...] | None
    grouping: dict[str, list[str]] | None
    provenance: dict[str, Any]
    file: Path | None = None


@dataclass(frozen=True)
class _Source:
    """One split as its file holds it; `place(row)` names a row the way an editor would find it."""

    file: Path
    raw: pa.Table
    place: Callable[[int], str]
    labels: tuple[str, ...] | None = None


def _open_folder(folder: Path) -> tuple[_Info, dict[str, Path]]:
    if not folder.is_dir():
        seen = "is a file: name it under data.train, data.dev or data.test"
        raise InputError(f"data.path: {folder} {seen if folder.exists() else 'does not exist'}")
    if (folder / "labels.json").exists():
        found = {s: folder / f"{s}.parquet" for s in SPLITS if (folder / f"{s}.parquet").exists()}
        return _read_info(folder / "labels.json"), found
    info = _Info(None, None, {"datasets_folder": str(folder)})
    if (folder / "dataset_dict.json").exists():
        saved = _read_json(folder / "dataset_dict.json")["splits"]
        return info, {"dev" if s == "validation" else s: folder / s for s in saved}
    if _is_saved_dataset(folder):
        return info, {_read_json(folder / "state.json").get("_split") or "train": folder}
    raise InputError(
        f"{folder}: neither a dataset folder (no labels.json) nor one saved by Hugging Face "
        "`datasets` (no dataset_dict.json or state.json); single files go under data.train, "
        "data.dev, data.test"
    )


def _read_info(file: Path) -> _Info:
    info = _read_json(file)
    if not isinstance(info, dict) or not isinstance(info.get("labels"), list):
        raise InputError(f'{file}: expected {{"labels": [names in order], ...}}')
    labels, grouping = info["labels"], info.get("grouping")
    _check_labels(labels, str(file))
    if grouping is not None:
        if not isinstance(grouping, dict) or not all(
            isinstance(v, list) for v in grouping.values()
        ):
            raise InputError(
                f'{file}: grouping: expected {{"main category": [labels], ...}} or null'
            )
        members = [str(member) for group in grouping.values() for member in group]
        if sorted(members) != sorted(labels):
            raise InputError(
                f"{file}: grouping: each label must be in exactly one group; grouped are "
                f"{_listed(members)}, the labels are {_listed(labels)}"
            )
    return _Info(tuple(labels), grouping, info.get("provenance") or {}, file)


def _check_labels(labels: Sequence[Any], where: str) -> None:
    if not labels or not all(isinstance(name, str) and name.strip() for name in labels):
        raise InputError(f"{where}: expected non-empty label names, got {labels}")
    if twice := sorted({name for name in labels if labels.count(name) > 1}):
        raise InputError(f"{where}: label names must be unique; more than once: {_listed(twice)}")


def _select_splits(
    found: Mapping[str, Path], wanted: Sequence[str] | None, where: str
) -> dict[str, Path]:
    if missing := [split for split in wanted or () if split not in found]:
        raise InputError(f"{where}: no split {_listed(missing)}; present: {_listed(found)}")
    selected = {split: file for split, file in found.items() if wanted is None or split in wanted}
    if not selected or not selected.keys() <= set(SPLITS):
        raise InputError(
            f"{where}: splits are {_listed(found)}; expected some of {_listed(SPLITS)}"
        )
    return selected


def _agreed_labels(
    given: Sequence[str] | None, info: _Info, sources: Iterable[_Source]
) -> tuple[str, ...]:
    claims = [("data.labels", given), (str(info.file), info.labels)]
    claims += [(str(source.file), source.labels) for source in sources]
    claimed = [(where, tuple(labels)) for where, labels in claims if labels is not None]
    if not claimed:
        raise InputError("data.labels: the files carry no label names; give them, index 0 first")
    first, labels = claimed[0]
    for where, other in claimed[1:]:
        if other != labels:
            raise InputError(
                f"{first}: labels {_listed(labels)}, but {where} has {_listed(other)}; "
                "names and order must be the same"
            )
    return labels


def _read_source(file: Path, sha256: dict[str, str]) -> _Source:
    if _is_saved_dataset(file):
        return _read_saved_dataset(file, sha256)
    readers = {".tsv": _read_tsv, ".csv": _read_csv, ".jsonl": _read_jsonl}
    data = _read_bytes(file)
    if file.suffix not in {*readers, ".parquet"}:
        expected = _listed([*readers, ".parquet"])
        raise InputError(f"{file}: unknown format {file.suffix!r}; expected {expected}")
    if not data.strip():
        raise InputError(f"{file}: empty file; expected at least one row")
    sha256[str(file)] = _digest(data)
    if file.suffix == ".parquet":
        try:
            return _Source(file, pq.read_table(pa.BufferReader(data)), lambda row: f"row {row}")
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{file}: not a whole parquet file: {_first_line(error)}") from error
    text = _decode(file, data)
    return readers[file.suffix](file, text.encode(), text)


def _read_tsv(file: Path, data: bytes, text: str) -> _Source:
    options = {"delimiter": "\t", "quote_char": False, "ignore_empty_lines": False}

    def place(row: int) -> str:
        return f"line {row + 2}"

    return _Source(file, _parse_delimited(file, data, options, place), place)


def _read_csv(file: Path, data: bytes, text: str) -> _Source:
    @functools.cache
    def starts() -> list[int]:
        return _csv_row_starts(file, text)

    def place(row: int) -> str:
        return f"line {starts()[row + 1]}"

    if text.count('"') % 2:
        starts()  # a quote never closed would swallow the rest of the file as one text
    return _Source(file, _parse_delimited(file, data, {"newlines_in_values": True}, place), place)


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
            column_types=dict.fromkeys([*SCHEMA.names, "text_a"], pa.string()),
            strings_can_be_null=False,
        ),
    )
    if ragged:
        rows = {row.number - 2: row for row in ragged}
        problems: list[str] = []
        _report(
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


def _read_jsonl(file: Path, data: bytes, text: str) -> _Source:
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
        _report(problems, file, place, list(wrong), lambda row: wrong[row])
        raise InputError("\n".join(problems) or f"{file}: {_first_line(error)}") from error
    named = '"label"' in text  # all null is unlabelled, not named at all is a missing column
    kept = [
        name
        for name in table.column_names
        if table[name].null_count < table.num_rows or (name == "label" and named)
    ]
    return _Source(file, table.select(kept), place)


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
            if value is None or name not in {*SCHEMA.names, "text_a"}:
                continue
            kind = types.setdefault(name, type(value))
            if type(value) is not kind:
                wrong[row] = f"{name} is {value!r}; expected {kind.__name__}"
            elif isinstance(value, list) and any(isinstance(v, str | list | dict) for v in value):
                wrong[row] = f"{name} is {value!r}; expected a list of numbers"
    return wrong


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "state.json").exists() and (folder / "dataset_info.json").exists()


def _read_saved_dataset(folder: Path, sha256: dict[str, str]) -> _Source:
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
    sha256 |= {str(file): _digest(_read_bytes(file)) for file in sorted(folder.glob("*.arrow"))}
    names = getattr(saved.features.get("label"), "names", None)
    raw = saved.with_format("arrow")[:]
    return _Source(folder, raw, lambda row: f"row {row}", tuple(names) if names else None)


def _canonical(source: _Source, split: str, labels: Sequence[str], problems: list[str]) -> pa.Table:
    """The table of `SCHEMA` that `source` holds.

    Wrong rows go into `problems`; InputError is for a table whose rows can't be looked at.
    """
    raw, rows = source.raw, source.raw.num_rows
    seen = raw.column_names
    text_name = "text" if "text" in seen else "text_a"
    if twice := sorted({name for name in seen if seen.count(name) > 1}):
        raise InputError(f"{source.file}: columns given twice: {_listed(twice)}")
    if text_name not in seen or not {"label", "distribution"} & set(seen):
        raise InputError(
            f"{source.file}: missing column; seen {_listed(seen)}; expected text (or text_a) and "
            "label or distribution, named in the header of .tsv and .csv"
        )
    if rows == 0:
        raise InputError(f"{source.file}: no rows; expected at least one")

    def report(wrong: pa.ChunkedArray | np.ndarray, describe: Callable[[int], str]) -> None:
        _report(problems, source.file, source.place, np.flatnonzero(wrong).tolist(), describe)

    def column(name: str, kind: Callable[[pa.DataType], bool]) -> pa.ChunkedArray:
        wanted = SCHEMA.field("text" if name == text_name else name).type
        values = raw[name] if name in seen else pa.chunked_array([pa.nulls(rows, wanted)])
        if kind(values.type) or pa.types.is_null(values.type):
            try:
                return values.cast(wanted)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                pass
        raise InputError(f"{source.file}: {name} holds {values.type}; expected {wanted}")

    text = column(text_name, _is_text)
    report(
        pc.fill_null(pc.equal(pc.utf8_trim_whitespace(text), ""), True),
        lambda row: "empty text; remove the row",
    )

    label, wrong = _label_indices(raw["label"] if "label" in seen else pa.nulls(rows), labels)
    report(wrong, lambda row: _unknown_label(raw["label"][row].as_py(), labels))

    distribution = column("distribution", pa.types.is_nested)
    report(
        _wrong_distributions(distribution, len(labels)),
        lambda row: (
            f"distribution {distribution[row].as_py()}: expected {len(labels)} shares of at least "
            f"0 with sum 1 (within {_SUM_TOLERANCE})"
        ),
    )

    if "id" in seen:
        ids = column("id", _is_name)
        codes = pc.fill_null(ids.combine_chunks().dictionary_encode().indices, -1).to_numpy() + 1
        counts = np.bincount(codes)
        counts[0] = 2  # a null id names nothing
        report(counts[codes] > 1, lambda row: f"id {ids[row].as_py()!r} does not name one row")
    else:
        numbers = pa.array(np.arange(rows)).cast(pa.string())
        ids = pa.chunked_array([pc.binary_join_element_wise(split, numbers, "-")])

    if "frequency" in seen:
        frequency = _integers(raw["frequency"])
        report(
            pc.fill_null(pc.less(frequency, 1), True),
            lambda row: f"frequency {raw['frequency'][row].as_py()!r}; expected an integer from 1",
        )
    else:
        frequency = pa.chunked_array([np.ones(rows, np.int64)])

    columns = [ids, text, label, distribution, column("group", _is_name), frequency]
    return pa.table(columns, schema=SCHEMA).combine_chunks()


def _label_indices(
    column: pa.ChunkedArray, labels: Sequence[str]
) -> tuple[pa.ChunkedArray, np.ndarray]:
    """Index of each label (null where it has none) and a mask of those that aren't in `labels`."""
    index = _integers(column)
    if _is_text(column.type):
        named = pc.index_in(column.cast(pa.string()), value_set=pa.array(labels, pa.string()))
        # Where names are numbers themselves, a number is always a name.
        numbered = any(name.isdecimal() for name in labels)
        index = named if numbered else pc.coalesce(named.cast(pa.int64()), index)
    valid = pc.fill_null(pc.and_(pc.greater_equal(index, 0), pc.less(index, len(labels))), False)
    known = pc.if_else(valid, index, None).cast(pa.int32())
    return known, pc.and_(pc.is_valid(column), pc.invert(valid)).to_numpy()


def _integers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """`column` as int64, null where it holds no integer."""
    if _is_text(column.type):
        column = column.cast(pa.string())
        written = pc.match_substring_regex(column, r"^-?[0-9]{1,18}$")
        return pc.if_else(written, column, None).cast(pa.int64())
    if pa.types.is_integer(column.type):
        return column.cast(pa.int64(), safe=False)
    return pa.chunked_array([pa.nulls(len(column), pa.int64())])


def _unknown_label(label: object, labels: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(label), labels, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"label {label!r} is not among 0-{len(labels) - 1} or {_listed(labels)}{hint}"


def _wrong_distributions(column: pa.ChunkedArray, classes: int) -> np.ndarray:
    lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy()
    wrong = (lengths >= 0) & (lengths != classes)
    right = lengths == classes
    flat = pc.list_flatten(column.filter(pa.array(right))).to_numpy().reshape(-1, classes)
    sums = flat.sum(axis=1, dtype=np.float64)
    # Written so that NaN (a null share) is wrong too.
    wrong[right] = ~((flat >= 0).all(axis=1) & (np.abs(sums - 1) <= _SUM_TOLERANCE))
    return wrong


def _is_name(kind: pa.DataType) -> bool:
    return _is_text(kind) or pa.types.is_integer(kind)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


@contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        problems.append(str(error))


def _report(
    problems: list[str],
    file: Path,
    place: Callable[[int], str],
    rows: Sequence[int],
    describe: Callable[[int], str],
) -> None:
    problems += [f"{file} {place(row)}: {describe(row)}" for row in rows[:_SHOWN]]
    if len(rows) > _SHOWN:
        problems.append(f"{file}: {len(rows)} such rows in all, the first {_SHOWN} shown")


def _read_bytes(file: Path) -> bytes:
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


def _read_json(file: Path) -> Any:
    try:
        return json.loads(_decode(file, _read_bytes(file)))
    except json.JSONDecodeError as error:
        raise InputError(f"{file} line {error.lineno}: not JSON: {error.msg}") from error


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(str, names)) or "none"
