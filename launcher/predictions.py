"""The predictions file of a run: what each text was, what it is, and how likely each label was.

Everything a metric or a report needs is in the file, label names and provenance included, so both
can be made again from it alone.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from launcher.errors import InputError
from launcher.files import replacing

METADATA_KEY = b"danmu"
"""Key of the Arrow schema metadata that holds `{"labels": [...], "provenance": {...}}` as JSON."""

# Named as Parquet names it, so that a table is the same before and after it is stored.
_SHARES = pa.list_(pa.field("element", pa.float32()))
_SCORE_TOLERANCE = 1e-2
"""How far a row of scores may be from adding up to one, in log space; covers half precision."""


@dataclass(frozen=True)
class Predictions:
    """One predictions file in memory; n examples, L labels."""

    ids: np.ndarray  # [n] str, all different
    texts: np.ndarray  # [n] str
    labels: np.ndarray  # [n] int32 gold label; -1 where none is stored
    distributions: np.ndarray  # [n, L] float32; one-hot of the label where no shares are stored
    predicted: np.ndarray  # [n] int32; -1 where the output named no label
    scores: np.ndarray | None  # [n, L] float32 log-probabilities; None where none exist
    label_names: list[str]
    provenance: dict[str, Any]


def make_table(
    ids: Sequence[str],
    texts: Sequence[str],
    labels: Sequence[int | None] | np.ndarray,
    distributions: Sequence[Sequence[float] | np.ndarray | None] | np.ndarray | None,
    scores: np.ndarray | None,
    predicted: np.ndarray | None,
    label_names: Sequence[str],
    provenance: Mapping[str, Any],
) -> pa.Table:
    """The table to write for n examples; missing labels are None or -1.

    Args:
        distributions: gold share per label, [n, L], with None for examples that have none.
        scores: [n, L] log-probabilities, normalised over the labels; None in generation mode.
        predicted: [n] label indices, -1 for an output that named no label; by default the label
            with the highest score, the first one of equals.

    Raises:
        ValueError: the arguments break the contract of the file, for example a NaN score.
    """
    n, names = len(ids), list(label_names)
    if scores is not None:
        # The prediction is taken from what is stored, or near ties could contradict the file.
        scores = np.asarray(scores, dtype=np.float32)
        if scores.shape != (n, len(names)):
            raise ValueError(f"scores: expected shape {(n, len(names))}, seen {scores.shape}")
        predicted = scores.argmax(axis=1) if predicted is None else predicted
    if predicted is None:
        raise ValueError("predicted: required where there are no scores")
    shares = [None] * n if distributions is None else list(distributions)
    blank = pa.nulls(n, pa.float32())
    columns = [
        pa.array(ids, pa.string()),
        pa.array(texts, pa.string()),
        _indices([-1 if label is None else label for label in labels]),
        pa.array(shares, _SHARES),
        _indices(predicted),
        *([blank] * len(names) if scores is None else map(pa.array, scores.T.copy())),
    ]
    if lengths := sorted({len(column) for column in columns} - {n}):
        raise ValueError(f"expected {n} values, one per id, in each argument; seen {lengths}")
    table = pa.Table.from_arrays(columns, schema=_schema(names, provenance))
    if problem := _problem(table, names):
        raise ValueError(problem)
    return table


def write_part(folder: Path, split: str, index: int, table: pa.Table) -> None:
    """Write part `index` of a split's predictions into the run folder `folder`.

    Parts are written in order. Parts behind this one belong to an earlier attempt and go away.

    Raises:
        InputError: it can't be written; nothing of it is left.
        ValueError: an earlier part is missing.
    """
    finished = finished_parts(folder, split)
    if index > finished:
        raise ValueError(f"part {index} of {split}: expected part {finished} first")
    for later in range(finished - 1, index, -1):
        _part(folder, split, later).unlink()
    with (
        replacing(_part(folder, split, index)) as temporary,
        _writer(temporary, table.schema) as writer,
    ):
        writer.write_table(table)


def finished_parts(folder: Path, split: str) -> int:
    """How many parts of a split are written without a gap from the first; the next one's index."""
    count = 0
    while _part(folder, split, count).exists():
        count += 1
    return count


def merge_parts(folder: Path, split: str) -> Path:
    """Join a split's parts, in order, into `predictions/<split>.parquet`; then remove them.

    Holds one row group at a time. Stopped at any point, it can be called again.

    Raises:
        InputError: there are no parts, a part is missing, unreadable or of another table, or the
            file can't be written; the parts stay.
    """
    parts = _part(folder, split, 0).parent
    count = finished_parts(folder, split)
    if count == 0 or count != len(list(parts.glob("*.parquet"))):
        raise InputError(f"{parts}: expected {count:05d}.parquet; run this split again")
    path = parts.with_suffix(".parquet")
    merged = parts.with_name(f".{split}.parts.merged")
    shutil.rmtree(merged, ignore_errors=True)
    schema = next(_row_groups(_part(folder, split, 0))).schema
    with replacing(path) as temporary, _writer(temporary, schema) as writer:
        for index in range(count):
            for rows in _row_groups(_part(folder, split, index)):
                if not rows.schema.equals(schema, check_metadata=True):
                    raise InputError(
                        f"{_part(folder, split, index)}: labels or provenance differ from those of "
                        "00000.parquet; run this split again from its start"
                    )
                if len(rows):
                    writer.write_table(rows)
    # One rename takes all parts away: stopped while deleting, no half set of them looks unfinished.
    os.rename(parts, merged)
    shutil.rmtree(merged)
    return path


def read_predictions(path: Path) -> Predictions:
    """Read a predictions file and check all of its contract.

    Raises:
        InputError: it is missing, corrupt, or not a predictions file.
    """
    table = pa.concat_tables(_row_groups(path))
    try:
        stored = json.loads((table.schema.metadata or {})[METADATA_KEY])
        names, provenance = list(stored["labels"]), dict(stored["provenance"])
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{path}: not a predictions file: expected the Arrow metadata key "
            f"{METADATA_KEY.decode()!r} with labels and provenance"
        ) from None
    if problem := _problem(table, names):
        raise InputError(f"{path}: {problem}; predict this split again")
    labels, distributions = gold_of(table, len(names))
    scores = np.stack([table[f"score/{name}"].to_numpy() for name in names], axis=1)
    return Predictions(
        ids=table["id"].to_numpy(),
        texts=table["text"].to_numpy(),
        labels=labels,
        distributions=distributions,
        predicted=table["predicted"].fill_null(-1).to_numpy(),
        scores=None if np.isnan(scores).any() else scores,
        label_names=names,
        provenance=provenance,
    )


def gold_of(table: pa.Table, labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Gold of a table's columns `label` and `distribution`.

    Returns:
        [rows] label indices, -1 for none; [rows, labels] float32 shares: the distribution where
        there is one, else 1 for the label.
    """
    indices = table["label"].fill_null(-1).to_numpy()
    distributions = np.zeros((len(table), labels), dtype=np.float32)
    known = np.flatnonzero(indices >= 0)
    distributions[known, indices[known]] = 1
    shares = pc.list_flatten(table["distribution"]).to_numpy().reshape(-1, labels)
    distributions[table["distribution"].is_valid().to_numpy()] = shares
    return indices, distributions


def prediction_files(run_dir: Path) -> dict[str, Path]:
    """The predictions files of a finished run by split, in alphabetical order.

    Raises:
        InputError: there is no such run, it is unfinished, or it has no predictions.
    """
    if not run_dir.is_dir():
        raise InputError(f"{run_dir}: no such run folder")
    for parts in sorted((run_dir / "predictions").glob("*.parts")):
        raise InputError(
            f"{run_dir}: the run is unfinished: predictions/{parts.name} is not merged yet; "
            "finish it with --resume"
        )
    files = {path.stem: path for path in sorted((run_dir / "predictions").glob("*.parquet"))}
    if not files:
        raise InputError(f"{run_dir}: no predictions/*.parquet in this run folder; run it first")
    return files


def _part(folder: Path, split: str, index: int) -> Path:
    return folder / "predictions" / f"{split}.parts" / f"{index:05d}.parquet"


def _schema(names: list[str], provenance: Mapping[str, Any]) -> pa.Schema:
    stored = json.dumps({"labels": names, "provenance": dict(provenance)}, ensure_ascii=False)
    fields = [
        ("id", pa.string()),
        ("text", pa.string()),
        ("label", pa.int32()),
        ("distribution", _SHARES),
        ("predicted", pa.int32()),
        *((f"score/{name}", pa.float32()) for name in names),
    ]
    return pa.schema(fields, metadata={METADATA_KEY: stored.encode()})


def _indices(values: Sequence[int] | np.ndarray) -> pa.Array:
    """Label indices with null for -1."""
    indices = np.asarray(values, dtype=np.int32)
    return pa.array(indices, mask=indices == -1)


def _problem(table: pa.Table, names: list[str]) -> str | None:
    """What of the file's contract the table breaks, if anything."""
    count, n = len(names), len(table)
    if not names or len(set(names)) != count:
        return f"labels: expected one or more different names, seen {names}"
    expected = _schema(names, {})
    if not table.schema.equals(expected):
        wanted, seen = (
            ", ".join(f"{field.name} {field.type}" for field in schema)
            for schema in (expected, table.schema)
        )
        return f"columns: expected {wanted}; seen {seen}"
    if table["id"].null_count or table["text"].null_count:
        return "id, text: expected a value in every row, seen null"
    if (distinct := pc.count_distinct(table["id"]).as_py()) != n:
        return f"id: expected a different one in every row, seen {distinct} in {n} rows"
    for column in ("label", "predicted"):
        low, high = pc.min_max(table[column]).as_py().values()
        if low is not None and not 0 <= low <= high < count:
            return f"{column}: expected 0 to {count - 1}, seen {low} to {high}"
    lengths = set(pc.list_value_length(table["distribution"]).unique().to_pylist()) - {None}
    if lengths - {count}:
        return f"distribution: expected {count} shares in every row, seen {sorted(lengths)}"
    shares = pc.list_flatten(table["distribution"]).to_numpy()
    if not (np.isfinite(shares) & (shares >= 0)).all():
        return "distribution: expected shares of 0 or more, seen a negative or undefined one"
    scores = [table[f"score/{name}"] for name in names]
    if any(column.null_count for column in scores):
        missing = sum(column.null_count for column in scores)
        partly = f"scores: expected all of them or none, seen {missing} missing"
        return partly if missing != n * count else None
    with np.errstate(invalid="ignore"):
        totals = np.logaddexp.reduce([column.to_numpy() for column in scores])
    # Written so that a NaN, which compares as false, is wrong too.
    if (wrong := ~(np.abs(totals) <= _SCORE_TOLERANCE)).any():
        row = int(wrong.argmax())
        return (
            "scores: expected log-probabilities normalised over the labels, seen a log-sum-exp of "
            f"{totals[row]} in row {row}"
        )
    return None


def _row_groups(path: Path) -> Iterator[pa.Table]:
    """An empty table, for its schema, then the rows group by group."""
    try:
        # Not pq.read_table: it takes a folder such as "lr=0.1" for a partition, adding a column.
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file.schema_arrow.empty_table()
            for group in range(file.num_row_groups):
                yield file.read_row_group(group)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not readable as Parquet: {reason}") from None


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)
