"""A crawl cut off anywhere goes on where it was: files, requests and limits prove it."""

import itertools
import json
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_prep.__main__ import main
from data_prep.crawl import fake_content
from data_prep.crawl.client import FLOOR_S, Client, Manners, Stopped, check_manners
from data_prep.crawl.journal import Journal
from data_prep.zones import FIRST_LEVEL_ZONES
from launcher.errors import InputError

KILLS = 20
SPACING_S = 0.002


@dataclass
class Site:
    """The fake site as a program of its own."""

    address: str
    log_file: Path

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log_file.read_text().splitlines()]

    def asked(self) -> int:
        return self.log_file.read_bytes().count(b"\n") if self.log_file.exists() else 0

    def command(self, out: Path, *more: str) -> list[str]:
        bases = [f"--{name}-base={self.address}" for name in ("api", "comment", "www")]
        return ["crawl", f"--out={out}", *bases, f"--min-spacing={SPACING_S}", *more]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    log_file = tmp_path_factory.mktemp("site") / "log.jsonl"
    command = [sys.executable, "-m", "data_prep", "fake-site", "--port=0", f"--log={log_file}"]
    command += ["--videos-per-zone=25", "--chats-per-video=20"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield Site(process.stdout.readline().strip(), log_file)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


def crawl_in_a_process(arguments: list[str]) -> Any:
    """A forked process that runs the command: it starts without importing everything again."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(arguments,))
    process.start()
    return process


def _run(arguments: list[str]) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    sys.exit(main(arguments))


def gaps(log: list[dict[str, Any]]) -> list[float]:
    times = [entry["at"] for entry in log]
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def test_killed_at_20_random_moments(site: Site, tmp_path: Path) -> None:
    zones = ["--zones", *FIRST_LEVEL_ZONES[:20], "--videos-per-zone=20"]
    whole = crawl_in_a_process(site.command(tmp_path / "whole", *zones))
    whole.join()
    assert whole.exitcode == 0
    first = site.log()
    total = len(first)
    assert total > 20 * 20 and len({entry["path"] for entry in first}) == total

    rng = random.Random(0)
    out, command = tmp_path / "killed", site.command(tmp_path / "killed", *zones)
    for stop in sorted(rng.sample(range(1, total), KILLS)):
        process = crawl_in_a_process(command)
        while site.asked() < total + stop and process.is_alive():
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.004))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        written = b"".join(file.read_bytes() for file in out.iterdir())
        assert fake_content.SENDER_HASH.encode() not in written
        time.sleep(0.01)  # for the log entry of a request that was under way
    assert not (out / "chats.parquet").exists()
    last = crawl_in_a_process(command)
    last.join()
    assert last.exitcode == 0

    for name in ("chats.parquet", "videos.parquet"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    videos = pq.read_table(out / "videos.parquet")["video"].to_pylist()
    assert len(set(videos)) == len(videos) == 20 * 20
    second = site.log()[total:]
    repeated = Counter(entry["path"] for entry in second)
    assert repeated.keys() == {entry["path"] for entry in first}
    # At most the request in flight, at most once a kill.
    assert sum(count - 1 for count in repeated.values()) <= KILLS
    assert min(gaps(first)) >= SPACING_S and min(gaps(second)) >= SPACING_S
    counted = json.loads((out / "crawl.json").read_text())["requests"]
    assert len(second) <= counted <= len(second) + KILLS
    assert fake_content.SENDER_HASH not in site.log_file.read_text()


def test_budget_holds_across_restarts(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = site.asked()
    command = site.command(tmp_path / "out", "--zones", "4", "--videos-per-zone", "6")
    for budget, requests in (("3", 3), ("3", 0), ("5", 2)):
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--budget", budget])
        assert stopped.value.code == 75
        assert f"budget of {budget} requests is spent" in capsys.readouterr().err
        before += requests
        assert site.asked() == before
    assert main(command) == 0
    assert "SYNTHETIC chats of the fake site of 6 videos" in capsys.readouterr().out
    assert main(site.command(tmp_path / "at_once", "--zones", "4", "--videos-per-zone", "6")) == 0
    for name in ("chats.parquet", "videos.parquet"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "at_once" / name).read_bytes()
    assert main([*command[:-1], "7"]) == 2
    assert "belongs to a crawl with another videos_per_zone" in capsys.readouterr().err


def test_one_crawl_at_a_time(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = site.command(tmp_path, "--zones", "4", "--videos-per-zone", "1")
    assert main(command) == 0
    held = Journal(tmp_path / "journal.sqlite", _plan_of(tmp_path / "journal.sqlite"))
    try:
        assert main(command) == 2
        assert "is another crawl running with the same --out?" in capsys.readouterr().err
    finally:
        held.close()
    (tmp_path / "journal.sqlite").write_bytes(b"not a database" * 100)
    assert main(command) == 2
    assert "not a crawl's journal" in capsys.readouterr().err


def test_waits_are_kept(tmp_path: Path) -> None:
    """A cool-down outlives the process, and a day ends the longest one."""
    plan = {"lists": [], "bvids": [], "zones": [], "videos_per_zone": 1, "hosts": ["a", "b", "c"]}
    now = [1e9]
    manners = Manners(spacing_s=1, budget=9, now=lambda: now[0], sleep=lambda s: None)
    pauses = []
    for _ in range(7):
        journal = Journal(tmp_path / "journal.sqlite", plan)
        client = Client(journal, manners)
        with pytest.raises(Stopped, match="no request for"):
            client._trip("a test")
        pauses.append(journal.get("not_before") - now[0])
        client.close()
        journal.close()
    assert pauses == [1800, 3600, 7200, 14_400, 28_800, 57_600, 86_400]


def test_manners_beyond_this_machine() -> None:
    live = {"--api-base": "https://api.example.org"}
    polite = Manners(spacing_s=FLOOR_S, budget=1, contact="mail@example.org")
    check_manners(polite, live)
    check_manners(Manners(spacing_s=0, budget=1), {"--api-base": "http://127.0.0.1:1"})
    check_manners(Manners(spacing_s=0, budget=1), {"--api-base": "http://localhost:1"})

    def refusal(manners: Manners, bases: dict[str, str] = live) -> str:
        with pytest.raises(InputError) as raised:
            check_manners(manners, bases)
        return str(raised.value)

    fast = Manners(spacing_s=0.99, budget=1, contact="mail@example.org")
    assert "--min-spacing: 0.99; expected at least 1.0 s for https://api" in refusal(fast)
    assert "give --contact" in refusal(Manners(spacing_s=3, budget=1))
    silent = Manners(spacing_s=3, budget=0, contact="a@b", ignore_robots_because=" ")
    assert len(refusal(silent).splitlines()) == 2
    assert "expected an address" in refusal(polite, {"--api-base": "api.example.org"})


def _plan_of(journal: Path) -> dict[str, Any]:
    with closing(sqlite3.connect(journal)) as database:
        (text,) = database.execute("SELECT value FROM state WHERE key = 'plan'").fetchone()
    return json.loads(text)
