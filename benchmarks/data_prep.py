"""The study's words and label distributions: `build` against a plain loop over the rows.

The corpus is drawn with repetition from real chats (from the phrase bank where there are none),
every fourth with one character more, less or other. The loop cleans, segments with jieba and counts
one row after another, as the study did, in one process. Ours is the command as a user starts it, on
two processes, from the start of Python to the written dataset. Words, frequencies, distributions
and single labels must be equal before a ratio is printed.

    OMP_NUM_THREADS=1 python -m benchmarks.data_prep          # 3 minutes on a quiet machine, 4 GB
    python -m benchmarks.data_prep --quick                    # equality only, 20,000 rows
"""

import argparse
import contextlib
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.common import Claim, Seconds, conclude, machine, median, timed
from data_prep.chats_folder import CHATS
from data_prep.sample import make_sample
from data_prep.zones import FIRST_LEVEL_ZONES, first_level_of, zone_ids, zones

ROWS, MANY_ROWS, QUICK_ROWS = 1_000_000, 10_000_000, 20_000
VIDEOS, EDITED, PROCESSES, ROUNDS = 2_000, 0.25, 2, 3
GOAL, GIB_LIMIT, GROWTH_LIMIT = 10.0, 4.0, 1.1
_AT_A_TIME = 500_000

Words = dict[str, list[int]]
"""How often each word occurs in each first-level zone."""


@dataclass(frozen=True)
class Run:
    """One run of the command: time, and the most memory that its processes held together."""

    wall: float
    cpu: float
    gib: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_prep", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="equality only, on few rows")
    parser.add_argument("--rows", type=int, help=f"instead of {ROWS:,}; then without the large run")
    options = parser.parse_args(arguments)
    rows = options.rows or (QUICK_ROWS if options.quick else ROWS)
    folder = os.environ.get("REFERENCE_DATA")
    texts, source = _texts(None if options.quick or not folder else Path(folder))
    print(f"{rows:,} rows drawn from {source}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus"
        write_corpus(corpus, texts, rows)
        expected, loop = timed(lambda: plain_loop(corpus))
        runs = []
        for turn in range(1 if options.quick else ROUNDS):
            out = Path(scratch) / f"dataset-{turn}"
            runs.append(build(corpus, out))
            compare(expected, out)
        print(f"{len(expected):,} words, their frequencies, distributions and labels are equal")
        if options.quick:
            print("no ratio is measured with --quick")
            return 0
        del expected
        large = None
        if options.rows is None:
            write_corpus(Path(scratch) / "large", texts, MANY_ROWS)
            large = build(Path(scratch) / "large", Path(scratch) / "dataset-large")
    _print_table(rows, loop, runs, large)
    figures: dict[str, Any] = {
        "machine": machine(["jieba", "rjieba", "pyarrow", "numpy"]),
        "data": f"{source}, {EDITED:.0%} edited, {VIDEOS:,} videos",
        "rows": rows,
        "loop": {"wall_s": loop.wall, "cpu_s": loop.cpu},
        "build": [vars(run) for run in runs],
        "build_large": large and {"rows": MANY_ROWS, **vars(large)},
    }
    return conclude("data_prep", _claims(rows, loop, runs, large), figures)


def plain_loop(corpus: Path) -> Words:
    """The study's procedure, a row at a time."""
    import jieba

    jieba.setLogLevel("WARNING")
    jieba.initialize()
    videos = pq.read_table(corpus / "videos.parquet").to_pydict()
    names = {tid: first_level_of(tid) for tid in set(videos["tid"])}
    zone = {
        video: FIRST_LEVEL_ZONES.index(str(names[tid]))
        for video, tid in zip(videos["video"], videos["tid"], strict=True)
    }
    words: Words = {}
    for batch in pq.ParquetFile(corpus / "chats.parquet").iter_batches():
        for video, text in zip(batch["video"].to_pylist(), batch["text"].to_pylist(), strict=True):
            text = re.sub("[^\u4e00-\u9fffa-zA-Z0-9]", "", text)
            if not text:
                continue
            found = list(jieba.cut_for_search(text))
            if len(text) <= 6:
                found.append(text)
            for word in found:
                if len(word) > 2 and len(set(word)) > 1:
                    if word not in words:
                        words[word] = [0] * len(FIRST_LEVEL_ZONES)
                    words[word][zone[video]] += 1
    return words


def build(corpus: Path, out: Path) -> Run:
    """The command, which must succeed."""
    command = [sys.executable, "-m", "data_prep", "build", str(corpus), str(out)]
    command += ["--unit", "word", "--clean", "study", "--labels", "zones21", "--split", "random"]
    command += ["--processes", str(PROCESSES)]
    used, peak = resource.getrusage(resource.RUSAGE_CHILDREN), 0
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        while process.poll() is None:
            peak = max(peak, _resident_bytes(process.pid))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        wall = time.perf_counter() - start
        said.seek(0)
        assert process.returncode == 0, said.read()
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = spent.ru_utime + spent.ru_stime - used.ru_utime - used.ru_stime
    return Run(wall, cpu, peak / 2**30)


def compare(expected: Words, dataset: Path) -> None:
    """Whether a dataset holds the same words, frequencies, distributions and single labels.

    Raises:
        AssertionError: something differs; says what.
    """
    table = pa.concat_tables([pq.read_table(file) for file in sorted(dataset.glob("*.parquet"))])
    texts = table["text"].to_pylist()
    assert len(texts) == len(set(texts)), "a word stands in two rows"
    missing, more = expected.keys() - set(texts), set(texts) - expected.keys()
    assert not missing and not more, f"missing: {list(missing)[:5]}, too many: {list(more)[:5]}"
    counts = np.array([expected[text] for text in texts])
    totals = counts.sum(axis=1)
    shares = (counts / totals[:, None]).astype(np.float32)
    flat = pc.list_flatten(table["distribution"]).to_numpy().reshape(shares.shape)
    for what, same in (
        ("frequency", table["frequency"].to_numpy() == totals),
        ("distribution", (flat == shares).all(axis=1)),
        ("label", table["label"].to_numpy() == counts.argmax(axis=1)),
    ):
        assert same.all(), f"{what} of {texts[int(np.argmin(same))]} differs"


def write_corpus(folder: Path, texts: Sequence[str], rows: int, seed: int = 0) -> None:
    """A chats folder of `rows` chats drawn from `texts`, of invented videos of all zones."""
    folder.mkdir()
    draw = np.random.default_rng(seed)
    characters = "".join(texts)
    tids = [tid for tid in zone_ids("2021-08") if zones("v1")[tid].parent is not None]
    names = [f"video-{number:05d}" for number in range(VIDEOS)]
    zone = pa.array([tids[number % len(tids)] for number in range(VIDEOS)], pa.int32())
    pq.write_table(pa.table({"video": names, "tid": zone}), folder / "videos.parquet")
    with pq.ParquetWriter(folder / "chats.parquet", CHATS, compression="zstd") as writer:
        for start in range(0, rows, _AT_A_TIME):
            count = min(_AT_A_TIME, rows - start)
            chosen = [texts[index] for index in draw.integers(len(texts), size=count).tolist()]
            edited = np.flatnonzero(draw.random(count) < EDITED).tolist()
            kinds, places, others = (
                draw.integers(limit, size=len(edited)).tolist()
                for limit in (3, 1 << 30, len(characters))
            )
            for row, kind, place, other in zip(edited, kinds, places, others, strict=True):
                text = chosen[row]
                at = place % (len(text) + 1)
                added = "" if kind == 0 else characters[other]
                chosen[row] = text[:at] + added + text[at + (kind < 2) :]
            video = pa.array(draw.integers(VIDEOS, size=count)).cast(pa.int32())
            columns = {
                "video": pa.array(names).take(video),
                "second": draw.random(count, np.float32) * 300,
                "text": chosen,
            }
            writer.write_table(pa.table(columns, CHATS))


def _texts(folder: Path | None) -> tuple[list[str], str]:
    if folder is not None:
        lines = (folder / "data/danmaku_unlabelled.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["text"] for line in lines], f"{len(lines):,} real chats"
    splits = make_sample(seed=0).splits.values()
    texts = [text for split in splits for text in split["text"].to_pylist()]
    return texts, f"{len(texts):,} synthetic chats from the phrase bank (no REFERENCE_DATA)"


def _resident_bytes(pid: int) -> int:
    """Of a process and its children; what they share is counted more than once."""
    try:
        process = psutil.Process(pid)
        return sum(each.memory_info().rss for each in [process, *process.children(recursive=True)])
    except psutil.NoSuchProcess:
        return 0


def _exponent(rows: int, runs: Sequence[Run], large: Run) -> float:
    """p where time grows as rows to the power p."""
    ratio = large.wall / median([run.wall for run in runs])
    return math.log(ratio) / math.log(MANY_ROWS / rows)


def _claims(rows: int, loop: Seconds, runs: Sequence[Run], large: Run | None) -> list[Claim]:
    ratio = loop.wall / median([run.wall for run in runs])
    claims = [Claim(f"build, {rows:,} rows, faster than a plain loop", ratio, GOAL)]
    if large is not None:
        growth = _exponent(rows, runs, large)
        name = f"build, {MANY_ROWS:,} rows"
        claims += [
            Claim(f"{name}, peak memory", large.gib, GIB_LIMIT, at_most=True, unit=" GiB"),
            Claim(f"{name}, exponent of growth", growth, GROWTH_LIMIT, at_most=True, unit=""),
        ]
    return claims


def _print_table(rows: int, loop: Seconds, runs: Sequence[Run], large: Run | None) -> None:
    print("                    rows    wall s     cpu s   rows/s   peak GiB")
    print(f"{'loop':12}{rows:12,}{loop.wall:10.2f}{loop.cpu:10.2f}{rows / loop.wall:9,.0f}")
    for count, run in [*((rows, run) for run in runs), *([(MANY_ROWS, large)] if large else [])]:
        print(f"{'build':12}{count:12,}{run.wall:10.2f}{run.cpu:10.2f}", end="")
        print(f"{count / run.wall:9,.0f}{run.gib:11.2f}")


if __name__ == "__main__":
    sys.exit(main())
