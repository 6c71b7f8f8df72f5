"""Every format gives the same tables; every bad input is named with its file and line."""

import csv
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.dataset import SCHEMA, Dataset, read_dataset, write_dataset
from launcher.errors import InputError

LABELS = ("动画", "生活", "知识")
TEXTS = ['"前方高能', "泪目，了", "2020-01-01", "233", "真香"]
INDICES = [0, 2, 1, 1, 0]


def plain_table(split: str = "train") -> pa.Table:
    """What TEXTS and INDICES are as a table, written out without the reader's help."""
    rows = len(TEXTS)
    return pa.table(
        {
            "id": [f"{split}-{row}" for row in range(rows)],
            "text": TEXTS,
            "label": INDICES,
            "distribution": [None] * rows,
            "group": [None] * rows,
            "frequency": [1] * rows,
        },
        schema=SCHEMA,
    )


def full_table() -> pa.Table:
    return pa.table(
        {
            "id": ["a", "b", "c"],
            "text": ["甲", "乙\n丙", "丁"],
            "label": [0, None, 2],
            "distribution": [[0.75, 0.25, 0.0], None, [0.0, 0.5, 0.5]],
            "group": ["v1", "v1", None],
            "frequency": [1, 7, 2],
        },
        schema=SCHEMA,
    )


def write_tsv(file: Path) -> None:
    rows = [f"{label}\t{text}\n" for label, text in zip(INDICES, TEXTS, strict=True)]
    file.write_text("label\ttext_a\n" + "".join(rows), encoding="utf-8")


def write_csv(file: Path) -> None:
    with file.open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.writer(stream)
        writer.writerow(["extra", "text", "label"])
        writer.writerows(
            ["x\ny", text, LABELS[label]] for label, text in zip(INDICES, TEXTS, strict=True)
        )


def write_jsonl(file: Path) -> None:
    records = [
        {"text": text, "label": LABELS[label], "extra": text if label else {"a": 1}}
        for label, text in zip(INDICES, TEXTS, strict=True)
    ]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    file.write_text("\n\n".join(lines), encoding="utf-8")


def write_parquet(file: Path) -> None:
    names = pa.array([LABELS[label] for label in INDICES]).dictionary_encode()
    pq.write_table(pa.table({"text": pa.array(TEXTS, pa.large_string()), "label": names}), file)


@pytest.mark.parametrize("write", [write_tsv, write_csv, write_jsonl, write_parquet])
def test_every_file_format_gives_the_same_table(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    file = tmp_path / f"in.{write.__name__.removeprefix('write_')}"
    write(file)
    dataset = read_dataset(files={"train": file, "dev": file}, labels=LABELS)
    assert dataset.splits == {"train": plain_table(), "dev": plain_table("dev")}
    assert dataset.labels == LABELS
    assert list(dataset.sha256) == [str(file)]


def test_jsonl_carries_every_column(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    records = full_table().to_pylist()
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    assert read_dataset(files={"test": file}, labels=LABELS).splits["test"] == full_table()


def test_dataset_folder_round_trip(tmp_path: Path) -> None:
    grouping = {"看": ["动画"], "学": ["生活", "知识"]}
    provenance = {"source": "试验", "seed": 3}
    written = Dataset(
        LABELS, {"train": plain_table(), "test": full_table()}, provenance, grouping, {}
    )
    write_dataset(tmp_path / "data", written)
    read = read_dataset(tmp_path / "data", labels=list(LABELS))
    assert read.splits == written.splits
    assert (read.labels, read.provenance, read.grouping) == (LABELS, provenance, grouping)
    assert {Path(name).name for name in read.sha256} == {
        "labels.json",
        "train.parquet",
        "test.parquet",
    }
    assert list(read_dataset(tmp_path / "data", splits=["test"]).splits) == ["test"]
    with pytest.raises(InputError, match="already exists"):
        write_dataset(tmp_path / "data", written)
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    dataset = Dataset(LABELS, {"train": plain_table()}, {"unwritable": object()}, None, {})
    with pytest.raises(TypeError):
        write_dataset(tmp_path / "data", dataset)
    assert not list(tmp_path.iterdir())


def test_saved_hugging_face_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(LABELS))}
    )
    doubled = datasets.Dataset.from_dict(
        {"text": TEXTS + TEXTS, "label": INDICES + INDICES}, features=features
    )
    saved = doubled.select(range(9, -1, -1)).select(range(9, 4, -1))  # an index mapping on top
    datasets.DatasetDict({"train": saved, "validation": saved}).save_to_disk(tmp_path / "both")
    saved.save_to_disk(tmp_path / "one")
    both = read_dataset(tmp_path / "both")
    assert both.splits == {"train": plain_table(), "dev": plain_table("dev")}
    assert both.labels == LABELS
    assert {Path(name).suffix for name in both.sha256} == {".arrow"}
    assert read_dataset(tmp_path / "one").splits == {"train": plain_table()}
    assert read_dataset(files={"dev": tmp_path / "one"}).splits == {"dev": plain_table("dev")}
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        read_dataset(tmp_path / "one")


def test_labels_that_are_numbers_are_names(tmp_path: Path) -> None:
    file = tmp_path / "in.csv"
    file.write_text("label,text\n5,好\n1,差\n", encoding="utf-8")
    dataset = read_dataset(files={"train": file}, labels=["1", "5"])
    assert dataset.splits["train"]["label"].to_pylist() == [1, 0]


BAD_FILES = {
    "not UTF-8": (
        "in.tsv",
        b"label\ttext_a\n0\tok\n1\t" + "弹幕".encode("gb18030"),
        ["line 3: not UTF-8 at byte 20; it may be GB18030: iconv -f GB18030 -t UTF-8 in.tsv"],
    ),
    "UTF-16": (
        "in.csv",
        "text,label\n".encode("utf-16"),
        ["not UTF-8 at byte 0; it may be UTF-16"],
    ),
    "empty": ("in.tsv", b"\n", ["empty file"]),
    "header only": ("in.csv", b"text,label\n", ["no rows"]),
    "no header": (
        "in.tsv",
        "0\t甲\n1\t乙\n".encode(),
        ["missing column; seen 0, 甲; expected text (or text_a) and label"],
    ),
    "column twice": ("in.csv", b"text,label,text\na,0,b\n", ["columns given twice: text"]),
    "unknown index": ("in.tsv", b"label\ttext_a\n0\ta\n3\tb\n", ["line 3: label '3' is not among"]),
    "unknown name": (
        "in.csv",
        'text,label\n"a\n\nb",动画\n\nc,动划片\nd,动画\ne,知识1\n'.encode(),
        [
            "line 6: label '动划片' is not among 0-2 or 动画, 生活, 知识",
            "line 8: label '知识1' is not among 0-2 or 动画, 生活, 知识; did you mean 知识?",
        ],
    ),
    "empty label": ("in.csv", b"text,label\na,\n", ["line 2: label '' is not among"]),
    "empty texts, counted": (
        "in.tsv",
        "label\ttext_a\n0\t\n0\t　\n0\tx\n1\t \n1\t\t\n\n".encode(),
        ["line 6: 3 fields, the header has 2"],
    ),
    "four empty texts": (
        "in.tsv",
        "label\ttext_a\n0\t\n0\t　\n0\tx\n1\t \n1\t\n".encode(),
        ["line 2: empty text", "line 3: empty", "line 5: empty", "4 such rows in all"],
    ),
    "two kinds of problem": (
        "in.tsv",
        b"label\ttext_a\n7\ta\n0\t\n",
        ["line 3: empty text", "line 2: label '7'"],
    ),
    "open quote": ("in.csv", b'text,label\na,0\n"b,1\nc,1\n', ["line 3: a quote opened here"]),
    "broken JSON": (
        "in.jsonl",
        b'{"text": "a", "label": 0}\n\n{"text": "b", \n[1]\n',
        ["line 3: not JSON", "line 4: expected an object"],
    ),
    "mixed types": (
        "in.jsonl",
        '{"text": "a", "label": null}\n{"text": "b", "label": 0}\n'
        '{"text": "c", "label": "动画"}\n'.encode(),
        ["line 3: label is '动画'; expected int"],
    ),
    "no label at all": (
        "in.jsonl",
        b'{"text": "a"}\n',
        ["missing column; seen text; expected text (or text_a) and label or distribution"],
    ),
    "no text at all": ("in.jsonl", b'{"txt": "a", "label": 0}\n', ["missing column; seen label"]),
    "group is a fraction": (
        "in.jsonl",
        b'{"text": "a", "label": 0, "group": 0.5}\n',
        ["group holds double; expected string"],
    ),
    "null text": ("in.jsonl", b'{"text": "a", "label": 0}\n{"label": 0}\n', ["line 2: empty"]),
    "text is a number": (
        "in.jsonl",
        b'{"text": 233, "label": 0}\n',
        ["line 1: text is 233; expected str"],
    ),
    "fractional label": (
        "in.jsonl",
        b'{"text": "a", "label": 0.5}\n',
        ["line 1: label 0.5 is not"],
    ),
    "distribution too short": (
        "in.jsonl",
        b'{"text": "a", "distribution": [0.5, 0.5]}\n',
        ["line 1: distribution [0.5, 0.5]: expected 3 shares"],
    ),
    "distribution negative, zero or not summing to 1": (
        "in.jsonl",
        b'{"text": "a", "distribution": [1, 0, 0]}\n'
        b'{"text": "a", "distribution": [1.5, -0.5, 0]}\n'
        b'{"text": "a", "distribution": [0, 0, 0]}\n'
        b'{"text": "a", "distribution": null}\n'
        b'{"text": "a", "distribution": [0.5, 0.5, 0.002]}\n'
        b'{"text": "a", "distribution": [0.5, 0.4995, 0]}\n',
        [
            "line 2: distribution [1.5, -0.5, 0.0]",
            "line 3: distribution [0.0, 0.0, 0.0]",
            "line 5: distribution [0.5, 0.5, 0.002",
        ],
    ),
    "distribution in a text file": (
        "in.csv",
        b'text,distribution\na,"[1, 0, 0]"\n',
        ["read from .jsonl and .parquet only"],
    ),
    "distribution of names": (
        "in.jsonl",
        b'{"text": "a", "distribution": ["x", "y", "z"]}\n',
        ["line 1: distribution is ['x', 'y', 'z']; expected a list of numbers"],
    ),
    "id twice": (
        "in.csv",
        b"id,text,label\n7,a,0\n8,b,0\n7,c,0\n",
        ["line 2: id '7' does not name one row", "line 4: id '7'"],
    ),
    "frequency": (
        "in.csv",
        b"text,label,frequency\na,0,1\nb,0,many\nc,0,0\n",
        ["line 3: frequency 'many'; expected an integer from 1", "line 4: frequency '0'"],
    ),
    "truncated parquet": ("in.parquet", b"PAR1 and no more", ["not a whole parquet file"]),
    "unknown format": ("in.xlsx", b"PK", ["unknown format '.xlsx'; expected .tsv, .csv, .jsonl"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(case: str, tmp_path: Path) -> None:
    name, content, expected = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as raised:
        read_dataset(files={"train": tmp_path / name}, labels=LABELS)
    lines = str(raised.value).split("\n")
    assert len(lines) == len(expected)
    for line, part in zip(lines, expected, strict=True):
        assert line.startswith(str(tmp_path / name)) and part in line


def test_problems_of_all_splits_are_reported_together(tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").write_text("label\ttext_a\n9\ta\n", encoding="utf-8")
    files = {"train": tmp_path / "none.tsv", "dev": tmp_path / "dev.tsv"}
    with pytest.raises(InputError) as raised:
        read_dataset(files=files)
    first, second = str(raised.value).split("\n")
    assert first == f"{tmp_path / 'none.tsv'}: no such file"
    assert second.startswith("data.labels: the files carry no label names")


def test_bad_labels_and_folders(tmp_path: Path) -> None:
    file = tmp_path / "in.tsv"
    write_tsv(file)

    def refusal(*args: object, **options: object) -> str:
        with pytest.raises(InputError) as raised:
            read_dataset(*args, **options)  # type: ignore[arg-type]
        return str(raised.value)

    assert "no label names" in refusal(files={"train": file})
    assert "more than once: 动画" in refusal(files={"train": file}, labels=["动画", "动画"])
    assert "no split dev; present: train" in refusal(
        files={"train": file}, labels=LABELS, splits=["dev"]
    )
    assert "expected some of train, dev, test" in refusal(files={"valid": file}, labels=LABELS)
    assert "either path" in refusal()
    assert "either path" in refusal(tmp_path, files={"train": file})
    assert "does not exist" in refusal(tmp_path / "none")
    assert "name it under data.train" in refusal(file)
    assert "neither a dataset folder" in refusal(tmp_path)

    folder = tmp_path / "data"
    write_dataset(folder, Dataset(LABELS, {"train": plain_table()}, {}, None, {}))
    assert "data.labels: labels 动画, 知识, 生活, but" in refusal(
        folder, labels=["动画", "知识", "生活"]
    )

    def refuse_info(info: str) -> str:
        (folder / "labels.json").write_text(info, encoding="utf-8")
        return refusal(folder)

    assert "labels.json line 2: not JSON" in refuse_info('{"labels":\n')
    assert 'expected {"labels"' in refuse_info('{"label": ["a"]}')
    assert "more than once: a" in refuse_info('{"labels": ["a", "b", "a"]}')
    assert "non-empty label names" in refuse_info('{"labels": ["a", 3]}')
    assert "each label must be in exactly one group" in refuse_info(
        '{"labels": ["a", "b"], "grouping": {"x": ["a", "a"]}}'
    )
    assert "row 1: label 2 is not among 0-1" in refuse_info('{"labels": ["a", "b"]}')
    whole = (folder / "train.parquet").read_bytes()
    (folder / "train.parquet").write_bytes(whole[: len(whole) // 2])
    assert "not a whole parquet file" in refuse_info('{"labels": ["a", "b", "c"]}')


def test_200k_rows_read_within_3_seconds(tmp_path: Path) -> None:
    file = tmp_path / "big.tsv"
    rows = [f"{row % 3}\t弹幕{row}哈哈哈\n" for row in range(200_000)]
    file.write_text("label\ttext_a\n" + "".join(rows), encoding="utf-8")
    start = time.perf_counter()
    table = read_dataset(files={"train": file}, labels=LABELS).splits["train"]
    assert time.perf_counter() - start < 3
    assert table.num_rows == 200_000
    assert table.slice(199_999).to_pylist()[0]["text"] == "弹幕199999哈哈哈"


def test_real_study_split(reference_data: Path) -> None:
    file = reference_data / "data" / "danmu6" / "dev.tsv"
    labels = ["动画", "游戏", "科技", "生活", "美食", "综合"]
    table = read_dataset(files={"dev": file}, labels=labels).splits["dev"]
    plain = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    assert table["text"].to_pylist() == [text for _, text in plain]
    assert table["label"].to_pylist() == [int(label) for label, _ in plain]
