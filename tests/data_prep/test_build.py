"""`build` against a plain implementation that goes through the chats one by one."""

import datetime
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import jieba
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import counting
from data_prep.__main__ import main
from data_prep.build import Options, build
from data_prep.chats_folder import CHATS, VIDEOS
from data_prep.clean import clean, normal_form
from data_prep.dataset import Dataset, read_dataset, write_dataset
from data_prep.distribution import label_set
from data_prep.phrases import GENERAL_PHRASES, ZONE_PHRASES
from launcher.errors import InputError

TIDS = [27, 17, 95, 138, 214, 30, 20, 201, 83, 257, None, 999_999]
PHRASES = [*GENERAL_PHRASES, *(phrase for phrases in ZONE_PHRASES.values() for phrase in phrases)]


def write_chats(folder: Path, chats: list[dict[str, Any]], videos: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    schema = CHATS
    if "frequency" in chats[0]:
        schema = CHATS.append(pa.field("frequency", pa.int64()))
    pq.write_table(pa.Table.from_pylist(chats, schema), folder / "chats.parquet")
    pq.write_table(pa.Table.from_pylist(videos, VIDEOS), folder / "videos.parquet")
    return folder


@pytest.fixture(scope="module")
def corpus() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """3,000 chats of 60 videos, one of each of its own; some empty once cleaned, some of unknown
    zones."""
    rng = random.Random(0)
    first = datetime.date(2022, 1, 1)
    videos = [
        {
            "video": f"v{number}",
            "tid": TIDS[number % len(TIDS)],
            "pubdate": first + datetime.timedelta(days=rng.randrange(100)),
        }
        for number in range(60)
    ]
    chats = [
        {"video": f"v{number}", "text": f"编号{number}哦", "frequency": 1} for number in range(60)
    ]
    for _ in range(2940):
        text = rng.choice(PHRASES[:150]) + rng.choice(["", "", "！！", "哈哈哈哈", "2333333"])
        text = rng.choice(["", "？！"]) if rng.random() < 0.05 else text
        video = rng.choice(videos)["video"]
        chats.append({"video": video, "text": text, "frequency": rng.randint(1, 4)})
    return chats, videos


@pytest.fixture(scope="module")
def source(corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("source") / "chats", *corpus)


def units_of(text: str, options: Options) -> list[str]:
    text = clean(pa.array([text]), options.clean)[0].as_py()
    if options.unit == "sentence":
        return [text] if text else []
    found = list(jieba.cut_for_search(text)) + [text] * (len(text) <= 6)
    return [word for word in found if len(word) > 2 and len(set(word)) > 1]


def plainly(
    corpus: Any, options: Options, split_of_video: dict[str, str]
) -> dict[tuple[str | None, str], tuple[int, list[float], int, str | None]]:
    """Label, shares, frequency and group by split (None where units are split) and unit."""
    chats, videos = corpus
    labels = label_set(options.labels, general=options.general, keep_unknown=options.keep_unknown)
    category = {video["video"]: labels.category(video["tid"], None) for video in videos}
    counts: dict[Any, list[int]] = defaultdict(lambda: [0] * len(labels.categories))
    seen: dict[Any, set[str]] = defaultdict(set)
    for chat in chats:
        video = chat["video"]
        if category[video] is None:
            continue
        for unit in units_of(chat["text"], options):
            key = (split_of_video.get(video), unit)
            counts[key][category[video]] += chat["frequency"]
            seen[key].add(video)
    result = {}
    for key, row in counts.items():
        group = next(iter(seen[key])) if len(seen[key]) == 1 else None
        general = options.general and sum(count > 0 for count in row) > options.general
        shares = [count / sum(row) for count in row]
        if options.general:
            shares = [0.0] * len(row) + [1.0] if general else [*shares, 0.0]
        result[key] = shares.index(max(shares)), shares, sum(row), group
    return result


def rows_of(dataset: Dataset, by_split: bool) -> dict[Any, Any]:
    rows = {
        (split if by_split else None, row["text"]): (
            row["label"],
            row["distribution"],
            row["frequency"],
            row["group"],
        )
        for split, table in dataset.splits.items()
        for row in table.to_pylist()
    }
    assert len(rows) == sum(table.num_rows for table in dataset.splits.values())
    return rows


def assert_same_rows(seen: dict[Any, Any], expected: dict[Any, Any]) -> None:
    assert seen.keys() == expected.keys()
    for key, (label, shares, frequency, group) in expected.items():
        assert seen[key][0] == label
        assert np.array_equal(np.float32(seen[key][1]), np.float32(shares))
        assert seen[key][2:] == (frequency, group)


@pytest.mark.parametrize(
    "options",
    [
        Options(split="random"),
        Options(split="random", unit="word", clean="study", labels="zones21"),
        Options(split="random", unit="word", labels="main5", general=2),
        Options(split="random", labels="zones126", keep_unknown=True),
    ],
    ids=["sentences", "words", "general", "unknown"],
)
def test_units_labels_and_frequencies(source: Path, corpus: Any, options: Options) -> None:
    dataset = build(source, options)
    assert_same_rows(rows_of(dataset, by_split=False), plainly(corpus, options, {}))
    assert (
        dataset.labels
        == label_set(
            options.labels, general=options.general, keep_unknown=options.keep_unknown
        ).labels
    )


@pytest.mark.parametrize("split", ["video", "time"])
def test_splits_by_video(source: Path, corpus: Any, split: str) -> None:
    options = Options(split=split, labels="zones21", unit="word", seed=5, ratios=(0.6, 0.2, 0.2))
    dataset = build(source, options)
    split_of_video: dict[str, str] = {}
    for name, table in dataset.splits.items():
        for video in set(table["group"].to_pylist()) - {None}:
            assert split_of_video.setdefault(video, name) == name
    assert_same_rows(rows_of(dataset, by_split=True), plainly(corpus, options, split_of_video))
    if split == "time":
        days = {video["video"]: video["pubdate"] for video in corpus[1]}
        by_split = {
            name: [days[video] for video, where in split_of_video.items() if where == name]
            for name in ("train", "dev", "test")
        }
        assert max(by_split["train"]) <= min(by_split["dev"])
        assert max(by_split["dev"]) <= min(by_split["test"])


@pytest.mark.parametrize("way", ["exact", "normalised", "near"])
@pytest.mark.parametrize("split", ["random", "video"])
def test_relatives_are_kept_together(source: Path, way: str, split: str) -> None:
    alone = build(source, Options(split=split))
    together = build(source, Options(split=split, keep_together=way))
    kinds = [
        set(table["text"].to_pylist() if way == "exact" else _forms(table))
        for table in together.splits.values()
    ]
    assert not kinds[0] & kinds[1] and not kinds[0] & kinds[2] and not kinds[1] & kinds[2]
    left_out = together.provenance["counts"]["relatives_left_out"]
    sizes = [
        sum(table.num_rows for table in dataset.splits.values()) for dataset in (alone, together)
    ]
    assert sizes[0] - sizes[1] == left_out
    assert (left_out > 0) == (split == "video")


def _forms(table: pa.Table) -> list[str]:
    return normal_form(table["text"].combine_chunks()).to_pylist()


def test_study6(source: Path, corpus: Any) -> None:
    """The study's classes: general above 3 zones, else only the five zones."""
    options = Options(split="random", labels="study6", unit="word", clean="study")
    seen = rows_of(build(source, options), by_split=False)
    chosen = ["动画", "游戏", "科技", "生活", "美食"]
    zones = label_set("zones21").categories
    expected = {}
    in_zones = Options(split="random", labels="zones21", unit="word", clean="study")
    for key, (label, shares, _, _) in plainly(corpus, in_zones, {}).items():
        if sum(share > 0 for share in shares) > 3:
            expected[key] = 5
        elif zones[label] in chosen:
            expected[key] = chosen.index(zones[label])
    assert {key: row[0] for key, row in seen.items()} == expected
    assert set(expected.values()) == set(range(6))


def test_stop_words(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "stop.txt"
    options = Options(split="random", unit="word", clean="study")
    words = [
        row["text"] for table in build(source, options).splits.values() for row in table.to_pylist()
    ]
    file.write_text("\n".join(words[:40]) + "\n", encoding="utf-8")
    less = build(source, Options(split="random", unit="word", clean="study", stop_words=file))
    left = [text for table in less.splits.values() for text in table["text"].to_pylist()]
    assert sorted(left) == sorted(words[40:])


def written(source: Path, out: Path, options: Options) -> dict[str, bytes]:
    write_dataset(out, build(source, options))
    return {file.name: file.read_bytes() for file in sorted(out.iterdir())}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the few chats of a test make several batches and blocks, and start processes."""
    monkeypatch.setattr(counting, "BLOCK", 37)
    monkeypatch.setattr(counting, "_BATCH", 500)
    monkeypatch.setattr(counting, "_FEW_ROWS", 0)


def test_same_bytes_however_it_is_run(source: Path, tmp_path: Path, small_blocks: None) -> None:
    def options(**how: Any) -> Options:
        return Options(unit="word", clean="study", labels="zones21", split="video", **how)

    one = written(source, tmp_path / "one", options(processes=1))
    assert written(source, tmp_path / "two", options(processes=2)) == one
    assert written(source, tmp_path / "jieba", options(processes=1, segmenter="jieba")) == one
    assert set(one) == {"train.parquet", "dev.parquet", "test.parquet", "labels.json"}


def test_blocks_and_batches_change_no_row(source: Path, corpus: Any, small_blocks: None) -> None:
    options = Options(split="random", unit="word", clean="study", labels="zones21", processes=1)
    assert_same_rows(rows_of(build(source, options), by_split=False), plainly(corpus, options, {}))


def test_on_ray(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(counting, "BLOCK", 150)  # a task each
    options: dict[str, Any] = {"unit": "word", "clean": "study", "split": "random"}
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        seen = written(source, tmp_path / "ray", Options(**options, ray=True))
    finally:
        ray.shutdown()
    assert seen == written(source, tmp_path / "here", Options(**options, processes=1))


def test_command_says_what_it_did(source: Path, tmp_path: Path, capsys: Any) -> None:
    (source / "crawl.json").write_text(json.dumps({"synthetic": True}), encoding="utf-8")
    out = tmp_path / "dataset"
    try:
        assert main(["build", str(source), str(out), "--labels", "zones126"]) == 0
    finally:
        (source / "crawl.json").unlink()
    printed = capsys.readouterr().out
    assert "SYNTHETIC chats, 3,000 chats" in printed
    counts = read_dataset(out).provenance["counts"]
    assert counts["without_label_by_zone"].keys() == {"no zone", "257 配音", "999999 (unknown)"}
    assert f"left out for their zone: {counts['without_label']:,} chats" in printed
    dataset = read_dataset(out)
    assert dataset.provenance["synthetic"] is True
    assert dataset.provenance["options"]["labels"] == "zones126"
    total = counts["empty_once_cleaned"] + counts["without_label"]
    assert 0 < total < counts["chats"] == 3000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "zones12"], "no such file"),
        (["--ratios", "1,2"], "--ratios"),
        (["--ratios", "1,0,0.00001", "--labels", "zones31", "--keep-unknown"], "test would be"),
        (["--labels", "zones31"], "whose zone is in no label"),
        (["--ray"], "--ray"),
        (["--processes", "0"], "--processes: 0"),
        (["--stop-words", "nowhere.txt", "--unit", "word"], "nowhere.txt: no such file"),
    ],
)
def test_wrong_options(
    source: Path, tmp_path: Path, capsys: Any, arguments: list[str], message: str
) -> None:
    assert main(["build", str(source), str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_wrong_input(tmp_path: Path, capsys: Any) -> None:
    chat = {"video": "v1", "text": "前方高能"}
    for number, (chats, videos, message) in enumerate(
        [
            ([chat], [{"video": "v2", "tid": 27}], "videos that videos.parquet lacks, such as v1"),
            ([chat], [{"video": "v1", "tid": 27}] * 2, "null or more than once: v1"),
            ([{**chat, "frequency": 0}], [{"video": "v1", "tid": 27}], "column frequency"),
        ]
    ):
        folder = write_chats(tmp_path / str(number), chats, videos)
        with pytest.raises(InputError, match=message):
            build(folder, Options())
    with pytest.raises(InputError, match="1 of 1 videos have no pubdate"):
        build(
            write_chats(tmp_path / "a", [chat], [{"video": "v1", "tid": 27}]), Options(split="time")
        )
    short = write_chats(tmp_path / "b", [{**chat, "text": "好看"}], [{"video": "v1", "tid": 27}])
    with pytest.raises(InputError, match="none of 1 distinct chats has a word to label"):
        build(short, Options(unit="word"))
    with pytest.raises(InputError, match=r"videos.parquet: no such file"):
        build(tmp_path / "nowhere", Options())
    (tmp_path / "a" / "chats.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"chats.parquet: not a whole parquet file"):
        build(tmp_path / "a", Options(unit="word"))
