"""`python -m data_prep build`: from chats to a dataset with label distributions."""

import argparse
import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.chats_folder import read_origin, read_videos
from data_prep.clean import RULES
from data_prep.counting import Rows, count_texts, read_rows, word_counter
from data_prep.dataset import SPLITS, Dataset, write_dataset
from data_prep.distribution import LabelSet, label_set
from data_prep.near_duplicates import WAYS, group_relatives
from data_prep.sources import digest, listed, read_bytes
from data_prep.split import drop_relatives, parse_ratios, split_at_random, split_videos
from data_prep.units import Units
from data_prep.zones import zone_name
from launcher.errors import InputError


@dataclass(frozen=True)
class Options:
    """What `build` does; the command's help says what each means. The last three don't change the
    result."""

    clean: str = "gentle"
    unit: str = "sentence"
    labels: str = "main5"
    general: int | None = None
    keep_unknown: bool = False
    stop_words: Path | None = None
    split: str = "video"
    ratios: tuple[float, ...] = (0.8, 0.1, 0.1)
    seed: int = 0
    keep_together: str | None = None
    processes: int = min(os.cpu_count() or 1, 8)  # each holds the dictionary: 200 MB
    ray: bool = False
    segmenter: str = "auto"


def build(source: Path, options: Options) -> Dataset:
    """Make a dataset of the chats in the folder `source`.

    A unit is a distinct cleaned chat or a word. Its distribution is the share of each label in its
    occurrences; with a split by video or time only those within its split count, so that a unit may
    stand in several splits with the distribution that it has there. `group` is the unit's video if
    it has but one. Chats of videos without a label are left out, and counted. The same folder and
    options give the same bytes, whatever `processes`, `ray` and `segmenter`.

    Raises InputError for wrong input, or if a split with a share of its own is empty.
    """
    labels = label_set(options.labels, general=options.general, keep_unknown=options.keep_unknown)
    if options.ray and options.unit == "sentence":
        raise InputError("--ray: segments and counts words; add --unit word or leave it out")
    stop_words = _stop_words(options.stop_words)
    file = source / "chats.parquet"
    videos = read_videos(source)
    names = videos["video"].combine_chunks()
    category = _categories(videos, labels)
    with word_counter(
        options.segmenter,
        stop_words,
        rows=_row_count(file) if options.unit == "word" else 0,
        processes=options.processes,
        ray=options.ray,
    ) as counter:
        rows = read_rows(file, names, category >= 0, options.clean)
        if not len(rows.text):
            raise InputError(
                f"{file}: of {rows.read:,} chats {rows.empty:,} are empty once cleaned and "
                f"{rows.outside.sum():,} are of videos whose zone is in no label"
            )
        by_video = options.split != "random"
        split = _video_splits(rows, videos, options) if by_video else np.zeros(len(videos), int)
        cells = (len(SPLITS) if by_video else 1) * len(labels.categories)
        counts = count_texts(rows, split * len(labels.categories) + category, cells)
        chats = len(counts.units)
        if options.unit == "word":
            counts = counter.count(counts, cells)
    units = Units(counts, labels, len(SPLITS) if by_video else 1)
    if not units.kept.any():
        raise InputError(f"{file}: none of {chats:,} distinct chats has a {options.unit} to label")
    dropped = _assign_splits(units, options)
    tables = {
        name: units.table(np.flatnonzero(units.split == index), name, names)
        for index, name in enumerate(SPLITS)
        if options.ratios[index] > 0
    }
    if empty := [name for name, table in tables.items() if not table.num_rows]:
        raise InputError(
            f"--ratios: {listed(empty)} would be empty: {chats:,} distinct chats of "
            f"{len(np.unique(rows.video)):,} videos; change --ratios or --split"
        )
    numbers = {
        "chats": rows.read,
        "empty_once_cleaned": rows.empty,
        "without_label": int(rows.outside.sum()),
        "without_label_by_zone": _outside_by_zone(rows, videos),
        "videos": len(np.unique(rows.video)),
        "distinct_chats": chats,
        "units": len(units.split),
        "not_among_the_classes": int((~units.kept).sum()),
        "relatives_left_out": dropped,
        "splits": {name: table.num_rows for name, table in tables.items()},
    }
    return Dataset(
        labels.labels, tables, _provenance(source, options, numbers), labels.label_grouping, {}
    )


def _assign_splits(units: Units, options: Options) -> int:
    """Set `units.split`; returns how many rows are left out for a relative in another split."""
    kept = np.flatnonzero(units.kept)
    units.split[~units.kept] = -1
    way = options.keep_together
    groups = np.arange(len(kept))
    if way is not None:
        groups = group_relatives(units.texts.take(pa.array(kept)), way)
    if options.split == "random":
        units.split[kept] = split_at_random(groups, options.ratios, options.seed)
        return 0
    if way is None:
        return 0
    stay = drop_relatives(groups, units.split[kept])
    units.split[kept[~stay]] = -1
    return int((~stay).sum())


def _video_splits(rows: Rows, videos: pa.Table, options: Options) -> np.ndarray:
    """Split index of each video, int64, by the number of its chats."""
    chats = np.bincount(rows.video, minlength=len(videos))
    dates = None
    if options.split == "time":
        dated = videos["pubdate"].cast(pa.int32())
        missing = int((dated.is_null().to_numpy() & (chats > 0)).sum())
        if missing:
            raise InputError(
                f"--split time: {missing:,} of {int((chats > 0).sum()):,} videos have no pubdate; "
                "add it to videos.parquet or use --split video"
            )
        dates = dated.fill_null(0).to_numpy()
    return split_videos(chats, options.ratios, seed=options.seed, dates=dates).astype(np.int64)


def _categories(videos: pa.Table, labels: LabelSet) -> np.ndarray:
    """Index of each video's category, -1 where it has none, int64."""
    found = [
        labels.category(tid, tid_v2)
        for tid, tid_v2 in zip(videos["tid"].to_pylist(), videos["tid_v2"].to_pylist(), strict=True)
    ]
    return np.array([-1 if index is None else index for index in found], np.int64)


def _outside_by_zone(rows: Rows, videos: pa.Table) -> dict[str, int]:
    """Chats that are left out for their video's zone, the largest number first."""
    chats: Counter[str] = Counter()
    zones = zip(videos["tid"].to_pylist(), videos["tid_v2"].to_pylist(), strict=True)
    for (tid, tid_v2), count in zip(zones, rows.outside.tolist(), strict=True):
        if count:
            tid = tid_v2 if tid is None else tid
            name = "no zone" if tid is None else f"{tid} {zone_name(tid) or '(unknown)'}"
            chats[name] += count
    return dict(sorted(chats.items(), key=lambda item: (-item[1], item[0])))


def _stop_words(file: Path | None) -> frozenset[str]:
    """One word a line."""
    if file is None:
        return frozenset()
    try:
        words = read_bytes(file).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"--stop-words: {file}: not UTF-8 at byte {error.start}") from None
    return frozenset(filter(None, map(str.strip, words)))


def _row_count(file: Path) -> int:
    """Number of rows, 0 of a file that can't be read: reading it tells why."""
    try:
        return pq.read_metadata(file).num_rows
    except (OSError, pa.ArrowException):
        return 0


def _provenance(source: Path, options: Options, numbers: dict[str, Any]) -> dict[str, Any]:
    origin = read_origin(source)
    files = {}
    for name in ("chats.parquet", "videos.parquet"):
        with (source / name).open("rb") as opened:
            files[name] = hashlib.file_digest(opened, "sha256").hexdigest()
    chosen: dict[str, Any] = {
        "clean": options.clean,
        "unit": options.unit,
        "labels": options.labels,
        "general": options.general,
        "keep_unknown": options.keep_unknown,
        "split": options.split,
        "ratios": list(options.ratios),
        "seed": options.seed,
        "keep_together": options.keep_together,
    }
    for name, file in (("labels", Path(options.labels)), ("stop_words", options.stop_words)):
        if file is not None and file.is_file():
            chosen[name] = {"file": file.name, "sha256": digest(read_bytes(file))}
    return {
        "synthetic": origin.get("synthetic") is True,
        "source": {"files": files, "origin": origin},
        "options": chosen,
        "counts": numbers,
    }


def add_build(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command line of `build`."""
    parser = commands.add_parser(
        "build", help="clean, count, label and split a chats folder into a dataset folder"
    )
    usual = Options()
    parser.add_argument("source", type=Path, metavar="SRC", help="chats folder (crawl, import)")
    parser.add_argument("out", type=Path, metavar="OUT", help="dataset folder to create")
    parser.add_argument(
        "--clean",
        choices=RULES,
        default=usual.clean,
        help="study: only Han characters, ASCII letters and digits stay; gentle: sentences as "
        "written, runs such as 23333 shortened (%(default)s)",
    )
    parser.add_argument(
        "--unit",
        choices=["sentence", "word"],
        default=usual.unit,
        help="whole chats, or the study's words: jieba's search mode (%(default)s)",
    )
    parser.add_argument(
        "--labels",
        default=usual.labels,
        metavar="SET",
        help="zones126, zones21, main5, zones31 (of 2025), study6, or a JSON file "
        '{"label": [zone ids or first-level names], ...} (%(default)s)',
    )
    parser.add_argument(
        "--general",
        type=int,
        metavar="N",
        help="a class for units that occur in more than N categories",
    )
    parser.add_argument(
        "--keep-unknown",
        action="store_true",
        help="a class for videos whose zone is in no label, instead of leaving them out",
    )
    parser.add_argument(
        "--stop-words", type=Path, metavar="FILE", help="words not to take, one a line"
    )
    parser.add_argument(
        "--split",
        choices=["random", "video", "time"],
        default=usual.split,
        help="deal units at random as the study did, whole videos at random, or whole videos by "
        "date (%(default)s)",
    )
    parser.add_argument(
        "--ratios", default="0.8,0.1,0.1", help="shares of train, dev and test (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=usual.seed)
    parser.add_argument(
        "--keep-together",
        choices=WAYS,
        help="keep relatives in one split: equal texts, equal normal forms, near duplicates; where "
        "videos are split, the relatives in later splits are left out",
    )
    parser.add_argument("--processes", type=int, default=usual.processes, metavar="N")
    parser.add_argument(
        "--ray", action="store_true", help="segment and count on Ray Data (RAY_ADDRESS or here)"
    )
    parser.add_argument(
        "--segmenter",
        choices=["auto", "jieba", "rjieba"],
        default=usual.segmenter,
        help="auto: rjieba if its output is known to equal jieba's (%(default)s)",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    if options.processes < 1:
        raise InputError(f"--processes: {options.processes}; expected 1 or more")
    if options.out.exists():
        raise InputError(f"{options.out}: already exists; choose another folder or remove it first")
    given = {name: getattr(options, name) for name in Options.__dataclass_fields__}
    made = Options(**given | {"ratios": parse_ratios(options.ratios)})
    dataset = build(options.source, made)
    write_dataset(options.out, dataset)
    _report(options.out, dataset)


def _report(out: Path, dataset: Dataset) -> None:
    counts = dataset.provenance["counts"]
    synthetic = "SYNTHETIC chats, " if dataset.provenance["synthetic"] else ""
    print(
        f"{out}: {synthetic}{counts['chats']:,} chats, {counts['empty_once_cleaned']:,} empty once "
        f"cleaned, {counts['distinct_chats']:,} distinct of {counts['videos']:,} videos"
    )
    if counts["without_label"]:
        zones = list(counts["without_label_by_zone"].items())
        shown = ", ".join(f"{zone}: {chats:,}" for zone, chats in zones[:5])
        more = f" and {len(zones) - 5} zones more" if len(zones) > 5 else ""
        print(f"left out for their zone: {counts['without_label']:,} chats ({shown}{more})")
    for reason in ("not_among_the_classes", "relatives_left_out"):
        if counts[reason]:
            print(f"{reason.replace('_', ' ')}: {counts[reason]:,} units")
    for split, table in dataset.splits.items():
        found = np.bincount(table["label"].to_numpy(), minlength=len(dataset.labels))
        top = np.argsort(-found, kind="stable")[:6]
        balance = "  ".join(
            f"{dataset.labels[index]} {found[index] / table.num_rows:.1%}" for index in top
        )
        print(f"{split:5} {table.num_rows:9,} units: {balance}")
