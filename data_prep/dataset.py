"""One reader and one writer for every dataset a run can take.

A dataset is a set of labels in order and up to three splits, each an Arrow table with the columns
of `SCHEMA`. Whatever the file format, the same checks are made, and all that fail are reported
together, with file and line.
"""

import difflib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.sources import (
    Source,
    digest,
    is_name,
    is_saved_dataset,
    is_text,
    listed,
    noting,
    read_bytes,
    read_json,
    read_source,
    report_rows,
)
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


@dataclass(frozen=True)
class Dataset:
    """Labels in order and the splits read, each a table of `SCHEMA`.

    `label` is an index into `labels` or null; `distribution` one share per label, summing to 1, or
    null; `group` the video a text comes from, or null; `frequency` how often the text was seen.
    `provenance` is what `labels.json` says of the data's origin, else the names and hashes of the
    files; `grouping` partitions the labels into main categories; `sha256` has one entry per file.
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
        info = _Info(None, None, None)
    else:
        info, found = _open_folder(Path(str(path)))
    found = _select_splits(found, splits, str(path or "data"))

    problems: list[str] = []
    sources: dict[str, Source] = {}
    for split, file in found.items():
        with noting(problems):
            sources[split] = read_source(file)
    tables: dict[str, pa.Table] = {}
    with noting(problems):
        agreed = _agreed_labels(labels, info, sources.values())
        for split, source in sources.items():
            with noting(problems):
                tables[split] = _canonical(source, split, agreed, problems)
    if problems:
        raise InputError("\n".join(problems))
    sha256 = {} if info.file is None else {str(info.file): digest(read_bytes(info.file))}
    sha256 |= {name: value for source in sources.values() for name, value in source.sha256.items()}
    provenance = info.provenance
    if provenance is None:
        # By content: the same data has the same provenance wherever it lies.
        named = {split: source.sha256.items() for split, source in sources.items()}
        provenance = {"files": {s: {Path(f).name: v for f, v in named[s]} for s in named}}
    return Dataset(agreed, tables, provenance, info.grouping, sha256)


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
    provenance: dict[str, Any] | None
    file: Path | None = None


def _open_folder(folder: Path) -> tuple[_Info, dict[str, Path]]:
    if not folder.is_dir():
        seen = "is a file: name it under data.train, data.dev or data.test"
        raise InputError(f"data.path: {folder} {seen if folder.exists() else 'does not exist'}")
    if (folder / "labels.json").exists():
        found = {s: folder / f"{s}.parquet" for s in SPLITS if (folder / f"{s}.parquet").exists()}
        return _read_info(folder / "labels.json"), found
    info = _Info(None, None, None)
    if (folder / "dataset_dict.json").exists():
        saved = read_json(folder / "dataset_dict.json")["splits"]
        return info, {"dev" if s == "validation" else s: folder / s for s in saved}
    if is_saved_dataset(folder):
        return info, {read_json(folder / "state.json").get("_split") or "train": folder}
    raise InputError(
        f"{folder}: neither a dataset folder (no labels.json) nor one saved by Hugging Face "
        "`datasets` (no dataset_dict.json or state.json); single files go under data.train, "
        "data.dev, data.test"
    )


def _read_info(file: Path) -> _Info:
    info = read_json(file)
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
                f"{listed(members)}, the labels are {listed(labels)}"
            )
    provenance = info.get("provenance") or {}
    if not isinstance(provenance, dict):
        raise InputError(f"{file}: provenance: expected an object or null, got {provenance!r}")
    return _Info(tuple(labels), grouping, provenance, file)


def _check_labels(labels: Sequence[Any], where: str) -> None:
    if not labels or not all(isinstance(name, str) and name.strip() for name in labels):
        raise InputError(f"{where}: expected non-empty label names, got {labels}")
    if twice := sorted({name for name in labels if labels.count(name) > 1}):
        raise InputError(f"{where}: label names must be unique; more than once: {listed(twice)}")


def _select_splits(
    found: Mapping[str, Path], wanted: Sequence[str] | None, where: str
) -> dict[str, Path]:
    if missing := [split for split in wanted or () if split not in found]:
        raise InputError(f"{where}: no split {listed(missing)}; present: {listed(found)}")
    selected = {split: file for split, file in found.items() if wanted is None or split in wanted}
    if not selected or not selected.keys() <= set(SPLITS):
        raise InputError(f"{where}: splits are {listed(found)}; expected some of {listed(SPLITS)}")
    return selected


def _agreed_labels(
    given: Sequence[str] | None, info: _Info, sources: Iterable[Source]
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
                f"{first}: labels {listed(labels)}, but {where} has {listed(other)}; "
                "names and order must be the same"
            )
    return labels


def _canonical(source: Source, split: str, labels: Sequence[str], problems: list[str]) -> pa.Table:
    """The table of `SCHEMA` that `source` holds.

    Wrong rows go into `problems`; InputError is for a table whose rows can't be looked at.
    """
    raw, rows = source.raw, source.raw.num_rows
    seen = raw.column_names
    text_name = "text" if "text" in seen else "text_a"
    if twice := sorted({name for name in seen if seen.count(name) > 1}):
        raise InputError(f"{source.file}: columns given twice: {listed(twice)}")
    if text_name not in seen or not {"label", "distribution"} & set(seen):
        raise InputError(
            f"{source.file}: missing column; seen {listed(seen)}; expected text (or text_a) and "
            "label or distribution, named in the header of .tsv and .csv"
        )
    if rows == 0:
        raise InputError(f"{source.file}: no rows; expected at least one")

    def report(wrong: pa.ChunkedArray | np.ndarray, describe: Callable[[int], str]) -> None:
        report_rows(problems, source.file, source.place, np.flatnonzero(wrong).tolist(), describe)

    def column(name: str, kind: Callable[[pa.DataType], bool]) -> pa.ChunkedArray:
        wanted = SCHEMA.field("text" if name == text_name else name).type
        values = raw[name] if name in seen else pa.chunked_array([pa.nulls(rows, wanted)])
        if kind(values.type) or pa.types.is_null(values.type):
            try:
                return values.cast(wanted)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                pass
        raise InputError(f"{source.file}: {name} holds {values.type}; expected {wanted}")

    text = column(text_name, is_text)
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
        ids = column("id", is_name)
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

    columns = [ids, text, label, distribution, column("group", is_name), frequency]
    return pa.table(columns, schema=SCHEMA).combine_chunks()


def _label_indices(
    column: pa.ChunkedArray, labels: Sequence[str]
) -> tuple[pa.ChunkedArray, np.ndarray]:
    """Index of each label (null where it has none) and a mask of those that aren't in `labels`."""
    index = _integers(column)
    if is_text(column.type):
        named = pc.index_in(column.cast(pa.string()), value_set=pa.array(labels, pa.string()))
        # Where names are numbers themselves, a number is always a name.
        numbered = any(name.isdecimal() for name in labels)
        index = named if numbered else pc.coalesce(named.cast(pa.int64()), index)
    valid = pc.fill_null(pc.and_(pc.greater_equal(index, 0), pc.less(index, len(labels))), False)
    known = pc.if_else(valid, index, None).cast(pa.int32())
    return known, pc.and_(pc.is_valid(column), pc.invert(valid)).to_numpy()


def _integers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """`column` as int64, null where it holds no integer."""
    if is_text(column.type):
        column = column.cast(pa.string())
        written = pc.match_substring_regex(column, r"^-?[0-9]{1,18}$")
        return pc.if_else(written, column, None).cast(pa.int64())
    if pa.types.is_integer(column.type):
        return column.cast(pa.int64(), safe=False)
    return pa.chunked_array([pa.nulls(len(column), pa.int64())])


def _unknown_label(label: object, labels: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(label), labels, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"label {label!r} is not among 0-{len(labels) - 1} or {listed(labels)}{hint}"


def _wrong_distributions(column: pa.ChunkedArray, classes: int) -> np.ndarray:
    lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy()
    wrong = (lengths >= 0) & (lengths != classes)
    right = lengths == classes
    flat = pc.list_flatten(column.filter(pa.array(right))).to_numpy().reshape(-1, classes)
    sums = flat.sum(axis=1, dtype=np.float64)
    # Written so that NaN (a null share) is wrong too.
    wrong[right] = ~((flat >= 0).all(axis=1) & (np.abs(sums - 1) <= _SUM_TOLERANCE))
    return wrong
