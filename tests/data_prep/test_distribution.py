"""Label sets and distributions against plain counting."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.distribution import LabelSet, label_set, label_units
from data_prep.zones import FIRST_LEVEL_ZONES, MAIN_CATEGORIES, group_distribution
from launcher.errors import InputError


def test_sets_over_the_zones() -> None:
    assert [len(label_set(name).labels) for name in ("zones126", "zones21", "main5")] == [
        126,
        21,
        5,
    ]
    assert label_set("zones31").labels[7] == "游戏"
    zones126 = label_set("zones126")
    assert zones126.labels[zones126.category(214, None)] == "美食/田园美食"
    assert zones126.labels[zones126.category(220, None)] == "动物圈/大熊猫"  # its name in 2021
    assert zones126.category(257, None) is None  # opened after the study
    assert zones126.grouping and list(zones126.grouping) == list(FIRST_LEVEL_ZONES)
    zones21 = label_set("zones21")
    for tid, name in ((27, "动画"), (257, "动画"), (1, "动画"), (17, "游戏"), (187, "电视剧")):
        assert zones21.labels[zones21.category(tid, None)] == name
    for missing in (None, 166, 999_999, 2064):
        assert zones21.category(missing, 2064) is None
    main5 = label_set("main5", keep_unknown=True)
    assert main5.labels == (*MAIN_CATEGORIES, "unknown")
    assert main5.category(None, None) == 5
    assert main5.category(17, None) == 0
    zones31 = label_set("zones31")
    assert zones31.labels[zones31.category(17, 2064)] == "游戏"


def test_main5_is_the_sum_of_zones21() -> None:
    one, five = label_set("zones21"), label_set("main5")
    for tid, category in one.of_zone.items():
        share = np.eye(21)[category]
        expected = group_distribution(share, FIRST_LEVEL_ZONES, MAIN_CATEGORIES).argmax()
        assert five.of_zone[tid] == expected


def test_set_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "labels.json"
    file.write_text(json.dumps({"play": ["游戏", 2064], "watch": [1, "影视"], "sing": [30]}))
    labels = label_set(str(file))
    assert labels.labels == ("play", "watch", "sing")
    seen = [labels.category(*ids) for ids in ((17, None), (27, None), (30, None), (None, 2064))]
    assert seen == [0, 1, 2, 0]
    assert labels.category(31, None) is None
    for content, message in (
        ({"a": [1], "b": [1]}, "zone 1 stands under two labels"),
        ({"a": [1], "b": ["游 戏"]}, "b: '游 戏' is neither a zone id nor one of 动画"),
        ({"a": [1], "b": []}, "expected {"),
        ([1], "expected {"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(InputError, match=message):
            label_set(str(file))
    with pytest.raises(InputError, match="no such file, and not one of zones126"):
        label_set("zones12")
    with pytest.raises(InputError, match="--general: 0"):
        label_set("main5", general=0)
    with pytest.raises(InputError, match="leave out --general"):
        label_set("study6", general=2)


def random_counts(categories: int) -> np.ndarray:
    draw = np.random.default_rng(0)
    counts = draw.integers(0, 5, (500, categories)) * (draw.random((500, categories)) < 0.2)
    return counts[counts.sum(axis=1) > 0]


def plainly(counts: list[int], labels: LabelSet) -> tuple[int, list[float]] | None:
    """Label and shares of one unit, None if it isn't kept."""
    names = labels.categories
    if labels.general is not None and sum(count > 0 for count in counts) > labels.general:
        return len(labels.labels) - 1, [0.0] * (len(labels.labels) - 1) + [1.0]
    best = max(range(len(names)), key=lambda index: (counts[index], -index))
    chosen = labels.chosen or names
    if names[best] not in chosen:
        return None
    own = [counts[names.index(name)] for name in chosen]
    shares = [count / sum(own) for count in own] + [0.0] * (labels.general is not None)
    return chosen.index(names[best]), shares


@pytest.mark.parametrize(("name", "general"), [("zones21", None), ("main5", 2), ("study6", None)])
def test_distributions(name: str, general: int | None) -> None:
    labels = label_set(name, general=general)
    counts = random_counts(len(labels.categories))
    kept, label, shares = label_units(counts, labels)
    expected = [plainly(row, labels) for row in counts.tolist()]
    assert kept.tolist() == [each is not None for each in expected]
    assert kept.sum() > 0 and (name == "study6") == (not kept.all())
    known = [each for each in expected if each is not None]
    assert label.tolist() == [index for index, _ in known]
    np.testing.assert_array_equal(shares, np.array([each for _, each in known], np.float32))
    assert len(np.unique(label)) == len(labels.labels)
    assert (shares.argmax(axis=1) == label).all()
