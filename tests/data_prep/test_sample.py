"""The synthetic sample: deterministic, disjoint, learnable but not trivial; the zones' grouping."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from data_prep import phrases
from data_prep.__main__ import main
from data_prep.dataset import Dataset, read_dataset
from data_prep.sample import make_sample
from data_prep.zones import FIRST_LEVEL_ZONES, MAIN_CATEGORIES, group_distribution
from launcher.errors import InputError


@pytest.fixture(scope="module")
def sample() -> Dataset:
    return make_sample()


def all_of(dataset: Dataset, column: str) -> list:
    return [value for table in dataset.splits.values() for value in table[column].to_pylist()]


def test_grouping_sums_equal_brute_force() -> None:
    shares = np.random.default_rng(0).dirichlet(np.ones(21), size=7).astype(np.float32)
    expected = np.zeros((7, 5))
    for row in range(7):
        for column, zone in enumerate(FIRST_LEVEL_ZONES):
            for index, members in enumerate(MAIN_CATEGORIES.values()):
                if zone in members:
                    expected[row, index] += shares[row, column]
    grouped = group_distribution(shares, FIRST_LEVEL_ZONES, MAIN_CATEGORIES)
    assert grouped.dtype == np.float32
    np.testing.assert_allclose(grouped, expected, rtol=1e-6)
    np.testing.assert_array_equal(
        group_distribution(shares[0], FIRST_LEVEL_ZONES, MAIN_CATEGORIES), grouped[0]
    )
    with pytest.raises(ValueError, match="exactly once"):
        group_distribution(shares, FIRST_LEVEL_ZONES, {"动画": ["动画"]})


def test_zones_are_those_of_the_site_in_2021(reference_data: Path) -> None:
    zones = json.loads((reference_data / "facts" / "zones.json").read_text(encoding="utf-8"))
    live = [z["name_zh"] for z in zones["v1"]["first_level"] if z["in_2021_08"]]
    assert list(FIRST_LEVEL_ZONES) == live


def test_phrase_bank() -> None:
    assert tuple(phrases.ZONE_PHRASES) == FIRST_LEVEL_ZONES
    pools = [*phrases.ZONE_PHRASES.values(), *phrases.SHARED_PHRASES.values()]
    assert min(map(len, phrases.ZONE_PHRASES.values())) >= 40
    assert len(phrases.GENERAL_PHRASES) >= 40
    every = [phrase for pool in pools for phrase in pool]
    assert all(3 <= len(phrase) <= 12 for phrase in every)
    every += phrases.GENERAL_PHRASES
    assert len(set(every)) == len(every)
    for text in [*every, *phrases.PREFIXES, *phrases.SUFFIXES]:
        assert re.fullmatch(r"[\u4e00-\u9fffA-Za-z0-9]+", text)


def test_same_seed_same_sample(sample: Dataset) -> None:
    assert make_sample() == sample
    assert make_sample(seed=1).splits["dev"] != sample.splits["dev"]


@pytest.mark.parametrize("size", [210, 6000])
def test_texts_are_unique_and_splits_disjoint(size: int) -> None:
    dataset = make_sample(size=size)
    texts = all_of(dataset, "text")
    assert len(set(texts)) == len(texts) == size
    assert all(text.strip() for text in texts)
    groups = [set(table["group"].to_pylist()) for table in dataset.splits.values()]
    assert len(set.union(*groups)) == sum(map(len, groups))
    sizes = np.array([table.num_rows for table in dataset.splits.values()]) / size
    np.testing.assert_allclose(sizes, [0.8, 0.1, 0.1], atol=0.01)


def test_some_phrases_are_in_one_split_only(sample: Dataset) -> None:
    zone_phrases = [p for pool in phrases.ZONE_PHRASES.values() for p in pool]
    used = {
        split: {p for p in zone_phrases if any(p in text for text in table["text"].to_pylist())}
        for split, table in sample.splits.items()
    }
    unseen = len(used["dev"] - used["train"]) / len(used["dev"])
    assert 0.03 < unseen < 0.2


def test_labels_are_the_largest_share_and_the_two_label_sets_agree(sample: Dataset) -> None:
    zones = make_sample(labels="zones21")
    assert all_of(zones, "text") == all_of(sample, "text")
    shares, fine = np.array(all_of(sample, "distribution")), np.array(all_of(zones, "distribution"))
    assert shares.shape == (6000, 5) and fine.shape == (6000, 21)
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(
        group_distribution(fine, zones.labels, zones.grouping or {}), shares, atol=1e-6
    )
    assert all_of(sample, "label") == shares.argmax(axis=1).tolist()
    assert all_of(zones, "label") == fine.argmax(axis=1).tolist()


@pytest.mark.parametrize("seed", [0, 1])
def test_learnable_but_not_trivial(seed: int) -> None:
    dataset = make_sample(seed=seed)
    train, dev = dataset.splits["train"], dataset.splits["dev"]
    model = make_pipeline(
        TfidfVectorizer(analyzer="char", ngram_range=(1, 4), sublinear_tf=True),
        LogisticRegression(C=10, max_iter=300),
    )
    model.fit(train["text"].to_pylist(), train["label"].to_numpy())
    accuracy = model.score(dev["text"].to_pylist(), dev["label"].to_numpy())
    assert 0.85 < accuracy < 0.95
    majority = np.bincount(dev["label"].to_numpy()).max() / dev.num_rows
    assert majority < 0.5


def test_size_out_of_range() -> None:
    with pytest.raises(InputError, match="size: 10; expected 210 to"):
        make_sample(size=10)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data"
    command = ["sample", str(out), "--size", "420", "--seed", "3", "--labels", "zones21"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "SYNTHETIC" in printed and re.search(r"train +336 texts: 动画 \d", printed)
    written, made = read_dataset(out), make_sample(size=420, seed=3, labels="zones21")
    assert written.splits == made.splits
    assert written.grouping == MAIN_CATEGORIES
    assert written.provenance == made.provenance
    assert main(command) == 2
    assert capsys.readouterr().err == (
        f"{out}: already exists; choose another folder or remove it first\n"
    )
