"""What a dataset says of its origin depends on its content alone."""

import json
import shutil
from pathlib import Path

import pytest

from data_prep.dataset import read_dataset
from launcher.errors import InputError


def test_provenance_is_the_same_wherever_the_files_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    (here / "a.csv").write_text("text,label\nx,0\n", encoding="utf-8")
    shutil.copytree(here, there)
    monkeypatch.chdir(there)
    given = [
        read_dataset(files={"train": file}, labels=["甲"]).provenance
        for file in (here / "a.csv", there / "a.csv", Path("a.csv"))
    ]
    assert given[0] == given[1] == given[2]
    (there / "a.csv").write_text("text,label\ny,0\n", encoding="utf-8")
    assert read_dataset(files={"train": there / "a.csv"}, labels=["甲"]).provenance != given[0]


def test_provenance_of_saved_datasets_ignores_caches_and_place(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]})
    saved.save_to_disk(tmp_path / "one")
    before = read_dataset(tmp_path / "one", labels=["甲", "乙"])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    loaded = datasets.load_from_disk(str(tmp_path / "two"))
    loaded.map(lambda row: {"text": row["text"] + "!"}, load_from_cache_file=False)
    assert len(list((tmp_path / "two").glob("*.arrow"))) == 2
    after = read_dataset(tmp_path / "two", labels=["甲", "乙"])
    assert after.provenance == before.provenance
    assert len(after.sha256) == 1


def test_provenance_that_is_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(
        json.dumps({"labels": ["a"], "provenance": ["crawl"]}), encoding="utf-8"
    )
    with pytest.raises(InputError, match="provenance: expected an object or null"):
        read_dataset(tmp_path)
