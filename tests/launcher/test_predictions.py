"""The predictions file: what goes in comes out, in parts or whole, and nothing else is accepted."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.errors import InputError
from launcher.predictions import (
    METADATA_KEY,
    finished_parts,
    make_table,
    merge_parts,
    prediction_files,
    read_predictions,
    write_part,
)

LABELS = ["动画", "音乐舞蹈", "知识"]
PROVENANCE = {"synthetic": True, "source": "词库"}


def log_softmax(values: np.ndarray) -> np.ndarray:
    return values - np.log(np.exp(values).sum(axis=1, keepdims=True))


def example_table(start: int = 0, n: int = 4, **changes: Any) -> pa.Table:
    generator = np.random.default_rng(start)
    arguments: dict[str, Any] = {
        "ids": [f"弹幕-{start + i}" for i in range(n)],
        "texts": [f"前方高能{start + i}" for i in range(n)],
        "labels": [i % 3 for i in range(n)],
        "distributions": generator.dirichlet(np.ones(3), n),
        "scores": log_softmax(generator.normal(size=(n, 3))),
        "predicted": None,
        "label_names": LABELS,
        "provenance": PROVENANCE,
    }
    return make_table(**(arguments | changes))


def test_round_trip(tmp_path: Path) -> None:
    # A folder named like a Parquet partition must not add a column.
    folder = tmp_path / "lr=0.1"
    scores = log_softmax(np.array([[0.0, 1, 2], [3, 3, 0], [1, 0, 0], [0, 0, 0]]))
    table = example_table(
        labels=[2, None, None, -1],
        distributions=[None, [0.5, 0.25, 0.25], None, np.array([0, 0, 1])],
        scores=scores,
    )
    write_part(folder, "dev", 0, table)
    path = merge_parts(folder, "dev")
    assert path == folder / "predictions" / "dev.parquet"
    read = read_predictions(path)
    assert read.ids.tolist() == [f"弹幕-{i}" for i in range(4)]
    assert read.texts.tolist() == [f"前方高能{i}" for i in range(4)]
    assert read.labels.tolist() == [2, -1, -1, -1]
    assert read.distributions.tolist() == [[0, 0, 1], [0.5, 0.25, 0.25], [0, 0, 0], [0, 0, 1]]
    assert read.predicted.tolist() == [2, 0, 0, 0]
    assert read.scores is not None and np.array_equal(read.scores, scores.astype(np.float32))
    assert (read.label_names, read.provenance) == (LABELS, PROVENANCE)
    stored = pq.ParquetFile(path).schema_arrow
    assert stored.names == ["id", "text", "label", "distribution", "predicted"] + [
        f"score/{name}" for name in LABELS
    ]
    assert stored.types == [
        pa.string(),
        pa.string(),
        pa.int32(),
        pa.list_(pa.float32()),
        pa.int32(),
        *[pa.float32()] * 3,
    ]


def test_generation_has_no_scores(tmp_path: Path) -> None:
    table = example_table(scores=None, predicted=np.array([0, -1, 2, -1]), distributions=None)
    assert table["predicted"].to_pylist() == [0, None, 2, None]
    write_part(tmp_path, "dev", 0, table)
    read = read_predictions(merge_parts(tmp_path, "dev"))
    assert read.scores is None
    assert read.predicted.tolist() == [0, -1, 2, -1]
    assert read.distributions.tolist() == np.eye(3)[[0, 1, 2, 0]].tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": np.full((4, 3), np.nan)}, "scores.*nan"),
        ({"scores": np.zeros((4, 3))}, "normalised"),
        ({"scores": np.zeros((4, 2))}, "shape"),
        ({"scores": None}, "predicted: required"),
        ({"labels": [0, 1, 2, 3]}, "label: expected 0 to 2"),
        ({"labels": [0, 1, 2]}, "expected 4 values"),
        ({"distributions": np.ones((4, 2))}, "distribution: expected 3 shares"),
        ({"distributions": -np.ones((4, 3))}, "distribution: .*negative"),
        ({"predicted": np.array([0, 1, 2, -2])}, "predicted: expected 0 to 2"),
        ({"ids": ["a", "b", "a", "c"]}, "id: expected a different one"),
        ({"label_names": ["a", "a", "b"]}, "labels: .*different"),
    ],
)
def test_broken_contract_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        example_table(**changes)


def test_parts_merge_to_the_whole_and_resume(tmp_path: Path) -> None:
    tables = [example_table(start=10 * index, n=10) for index in range(4)]
    assert finished_parts(tmp_path, "dev") == 0
    for index, table in enumerate(tables[:3]):
        write_part(tmp_path, "dev", index, table)
    assert finished_parts(tmp_path, "dev") == 3
    with pytest.raises(InputError, match=r"unfinished: predictions/dev\.parts"):
        prediction_files(tmp_path)
    with pytest.raises(ValueError, match="expected part 3 first"):
        write_part(tmp_path, "dev", 4, tables[3])

    # An earlier attempt's part 2 must not survive a new part 1.
    write_part(tmp_path, "dev", 1, tables[1])
    assert finished_parts(tmp_path, "dev") == 2
    for index in (2, 3):
        write_part(tmp_path, "dev", index, tables[index])
    path = merge_parts(tmp_path, "dev")
    merged = pq.ParquetFile(path).read()
    assert merged.equals(pa.concat_tables(tables), check_metadata=True)
    assert [file.name for file in path.parent.iterdir()] == ["dev.parquet"]
    assert prediction_files(tmp_path) == {"dev": path}


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    write_part(tmp_path, "dev", 0, example_table())
    write_part(tmp_path, "dev", 1, example_table(start=4, provenance={"synthetic": False}))
    with pytest.raises(InputError, match=r"00001\.parquet: labels or provenance differ"):
        merge_parts(tmp_path, "dev")
    assert finished_parts(tmp_path, "dev") == 2
    (tmp_path / "predictions/dev.parts/00000.parquet").unlink()
    with pytest.raises(InputError, match=r"expected 00000\.parquet"):
        merge_parts(tmp_path, "dev")
    assert not (tmp_path / "predictions/dev.parquet").exists()


def test_empty_split(tmp_path: Path) -> None:
    write_part(tmp_path, "dev", 0, example_table(n=0))
    read = read_predictions(merge_parts(tmp_path, "dev"))
    assert len(read.ids) == 0 and read.distributions.shape == (0, 3)


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_part(tmp_path, "dev", 0, example_table())

    def full(self: pq.ParquetWriter, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(InputError, match=r"00001\.parquet: not written: no space left"):
        write_part(tmp_path, "dev", 1, example_table(start=4))
    with pytest.raises(InputError, match=r"dev\.parquet: not written: no space left"):
        merge_parts(tmp_path, "dev")
    left = [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()]
    assert left == ["predictions/dev.parts/00000.parquet"]


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such run folder"):
        prediction_files(tmp_path / "none")
    with pytest.raises(InputError, match=r"no predictions/\*\.parquet"):
        prediction_files(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        read_predictions(tmp_path / "none.parquet")

    path = tmp_path / "dev.parquet"
    pq.write_table(pa.table({"id": ["a"]}), path)
    with pytest.raises(InputError, match="not a predictions file"):
        read_predictions(path)
    table = example_table()
    pq.write_table(table.drop_columns(["predicted"]), path)
    with pytest.raises(InputError, match="columns: expected id string"):
        read_predictions(path)
    one_missing = pa.array([None, -1.0, -1.0, -1.0], pa.float32())
    pq.write_table(table.set_column(5, table.schema.field(5), one_missing), path)
    with pytest.raises(InputError, match="scores: expected all of them or none, seen 1 missing"):
        read_predictions(path)
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: b"{"}), path)
    with pytest.raises(InputError, match="not a predictions file"):
        read_predictions(path)


def test_corrupt_bytes_are_noticed(tmp_path: Path) -> None:
    write_part(tmp_path, "dev", 0, example_table(n=500))
    path = merge_parts(tmp_path, "dev")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not readable as Parquet"):
        read_predictions(path)
    # One bit of the scores: the file still parses, only the page's checksum can tell.
    path.write_bytes(whole)
    scores = pq.ParquetFile(path).metadata.row_group(0).column(5)
    end = scores.dictionary_page_offset or scores.data_page_offset
    end += scores.total_compressed_size - 1
    path.write_bytes(whole[:end] + bytes([whole[end] ^ 1]) + whole[end + 1 :])
    with pytest.raises(InputError, match=r"not readable as Parquet: .*CRC"):
        read_predictions(path)
