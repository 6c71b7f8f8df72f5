"""Parts of a dataset hold the examples that they are said to hold."""

import pyarrow as pa
import pytest

from data_prep.dataset import SCHEMA, Dataset
from data_prep.subset import hold_out, keep_labels
from launcher.errors import InputError


def row(number: int, label: int | None, shares: list[float] | None = None) -> dict[str, object]:
    return {
        "id": f"t-{number}",
        "text": f"文{number}",
        "label": label,
        "distribution": shares,
        "group": None,
        "frequency": 1,
    }


@pytest.fixture
def dataset() -> Dataset:
    train = [row(0, 0), row(1, 2, [0.1, 0.3, 0.6]), row(2, 2), row(3, 1), row(4, 1), row(5, 2)]
    dev = [row(6, 0), row(7, 2), row(8, None, [0.5, 0.5, 0]), row(9, None, [1, 0, 0])]
    splits = {
        name: pa.Table.from_pylist(rows, schema=SCHEMA)
        for name, rows in [("train", train), ("dev", dev)]
    }
    grouping = {"甲组": ["甲"], "余": ["乙", "丙"]}
    return Dataset(("甲", "乙", "丙"), splits, {"synthetic": True}, grouping, {})


def test_the_most_frequent_labels_stay_with_their_shares(dataset: Dataset) -> None:
    kept = keep_labels(dataset, 2)
    assert kept.labels == ("乙", "丙")
    assert kept.grouping == {"余": ["乙", "丙"]}
    assert kept.provenance == {"synthetic": True, "kept_of_labels": ["甲", "乙", "丙"]}
    train, dev = kept.splits["train"], kept.splits["dev"]
    assert train.schema.equals(SCHEMA)
    assert train["id"].to_pylist() == ["t-1", "t-2", "t-3", "t-4", "t-5"]
    assert train["label"].to_pylist() == [1, 1, 0, 0, 1]
    assert train["distribution"][0].as_py() == pytest.approx([1 / 3, 2 / 3])
    assert train["distribution"].to_pylist()[1:] == [None] * 4
    # Without a label, what is left of the shares decides.
    assert dev["id"].to_pylist() == ["t-7", "t-8"]
    assert dev["label"].to_pylist() == [1, None]
    assert dev["distribution"].to_pylist() == [None, [1.0, 0.0]]


def test_labels_are_kept_by_name_in_the_data_s_order(dataset: Dataset) -> None:
    assert keep_labels(dataset, ["丙", "甲"]).labels == ("甲", "丙")
    # 乙 and 丙 are more frequent; of equals the first one stays.
    assert keep_labels(dataset, 1).labels == ("丙",)
    with pytest.raises(InputError, match="丁: no such label; the labels are 甲, 乙, 丙"):
        keep_labels(dataset, ["丁"])
    with pytest.raises(InputError, match="the 4 most frequent of 3 labels"):
        keep_labels(dataset, 4)
    with pytest.raises(InputError, match="no example is left in dev"):
        only = {"train": dataset.splits["train"], "dev": dataset.splits["dev"].slice(0, 1)}
        keep_labels(Dataset(dataset.labels, only, {}, None, {}), ["乙"])


def test_a_held_out_part_takes_the_place_of_dev(dataset: Dataset) -> None:
    held = hold_out(dataset, 0.5)
    parts = [held.splits[name]["id"].to_pylist() for name in ("train", "dev")]
    assert [len(part) for part in parts] == [3, 3]
    assert sorted(parts[0] + parts[1]) == [f"t-{number}" for number in range(6)]
    assert parts == [sorted(part) for part in parts]
    assert held.provenance["dev_held_out_of_train"] == 0.5
    assert hold_out(dataset, 0.5).splits["dev"].equals(held.splits["dev"])
    with pytest.raises(InputError, match="expected at least one on both sides"):
        hold_out(dataset, 0.01)
    with pytest.raises(InputError, match=r"data\.hold_out: 0.5 of 0 train examples"):
        hold_out(Dataset(dataset.labels, {"dev": dataset.splits["dev"]}, {}, None, {}), 0.5)
