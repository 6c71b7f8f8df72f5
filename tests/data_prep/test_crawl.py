"""Every scenario of the fake site ends as it should; waits are on a clock of the test's own."""

import functools
import json
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest

from data_prep.crawl import fake_content
from data_prep.crawl.client import Manners, Stopped
from data_prep.crawl.crawl import CHATS, VIDEOS, crawl
from data_prep.crawl.fake_content import Content
from data_prep.crawl.fake_site import FakeSite
from data_prep.crawl.plan import Hosts, make_plan
from data_prep.crawl.scenarios import SCENARIOS
from launcher.errors import InputError

TODAY = date(2026, 1, 15)
ZONES = ["17", "171", "4", "3"]
Texts = list[tuple[str, float, str]]


@dataclass
class Clock:
    """A clock that jumps over waits and remembers them."""

    time: float = 1_768_478_400.0  # noon of TODAY
    waits: list[float] = field(default_factory=list)

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.waits.append(seconds)
        self.time += seconds


@dataclass
class Attempt:
    """One crawl of one scenario: what it wrote, and how it can go on."""

    out: Path
    site: FakeSite
    clock: Clock
    options: dict[str, Any]

    def run(self, **manners: Any) -> dict[str, Any]:
        address = self.site.address
        options: dict[str, Any] = {
            "zone_names": ZONES,
            "bvid_file": None,
            "videos_per_zone": 4,
            "first_day": None,
            "last_day": None,
            "today": TODAY,
            "hosts": Hosts(address, address, address),
        }
        given: dict[str, Any] = {"spacing_s": 3.0, "budget": 1000}
        given |= {"now": self.clock.now, "sleep": self.clock.sleep}
        plan = make_plan(**options | self.options)
        return crawl(self.out, plan, Manners(**given | manners))

    def texts(self) -> Texts:
        table = pq.read_table(self.out / "chats.parquet")
        assert table.schema == CHATS
        return list(zip(*(table[name].to_pylist() for name in CHATS.names), strict=True))

    def paths(self) -> list[str]:
        return [entry["path"] for entry in self.site.log]

    def journal(self, query: str) -> list[Any]:
        with closing(sqlite3.connect(self.out / "journal.sqlite")) as database:
            return [row[0] for row in database.execute(query)]

    def heal(self) -> None:
        self.site.scenario = SCENARIOS["normal"]


@pytest.fixture
def attempt(tmp_path: Path) -> Iterator[Callable[..., Attempt]]:
    sites: list[FakeSite] = []

    def start(scenario: str, **options: Any) -> Attempt:
        content = Content(seed=1, videos_per_zone=4, chats_per_video=12, today=TODAY)
        sites.append(FakeSite(content, scenario))
        threading.Thread(target=sites[-1].serve_forever, args=(0.01,), daemon=True).start()
        return Attempt(tmp_path / scenario, sites[-1], Clock(), options)

    yield start
    for site in sites:
        site.shutdown()
        site.server_close()


def expected_texts(content: Content) -> Texts:
    """The corpus as the site's content says: in each zone of ZONES the most played first."""
    games, music = content.of_zone(4), content.of_zone(3)
    order = [*content.of_zone(17), *content.of_zone(171)]
    for zone in (games, music):
        order += [v for v in sorted(zone, key=lambda v: (-v.plays, v.bvid)) if v not in order]
    return [
        (video.bvid, float(np.float32(chat.milliseconds / 1000)), chat.text)
        for video in order
        for part in video.parts
        for chat in content.chats(part.cid)
    ]


def test_normal(attempt: Callable[..., Attempt]) -> None:
    run = attempt("normal")
    summary = run.run()
    content = run.site.content
    assert run.texts() == expected_texts(content)
    videos = pq.read_table(run.out / "videos.parquet")
    assert videos.schema == VIDEOS
    known = {video.bvid: video for video in content.videos}
    for row in videos.to_pylist():
        video = known[row["video"]]
        assert (row["tid"], row["tid_v2"]) == (video.tid, video.tid_v2)
        assert (row["title"], row["plays"]) == (video.title, video.plays)
        assert (row["pubdate"] - date(1970, 1, 1)).days == video.pubdate // 86_400
    assert videos.num_rows == summary["videos"] == 8
    assert summary["synthetic"] and summary["states"]["dropped"] == {}
    # robots, 2 lists + 2 rankings; parts known from rankings are not asked for again.
    paths = run.paths()
    assert len(set(paths)) == len(paths) == summary["requests"] == 1 + 4 + 4 + 10
    assert sum("/view?" in path for path in paths) == 4
    assert len(run.clock.waits) == len(paths) and min(run.clock.waits) >= 3
    assert len({round(wait, 3) for wait in run.clock.waits}) > len(paths) / 2
    assert max(run.clock.waits) <= 3 * 1.6
    run.run()
    assert run.paths() == paths  # nothing left to ask


SAME = {
    "robots_missing": 0,
    "deflate_zlib": 0,
    "deflate_not": 0,
    "deflate_unlabelled": 0,
    "plain": 0,
    "control_characters": 0,
    "odd_rows": 0,
    "duplicate_ids": 0,
    "two_zones": 0,
    "truncated_once": 1,
    "segments": None,
    "segments_duplicates": None,
    "segments_304": None,
    "segments_bad_varint": None,
    "segments_wire_type_3": None,
    "code_799": 1,
    "code_702": 1,
    "code_509": 1,
    "http_429": 1,
    "http_500_once": 1,
    "code_500": 1,
    "code_503": 1,
    "code_504": 1,
    "code_8888": 1,
    "hang": 1,
    "reset": 1,
    "bad_deflate": 1,
}
"""Scenarios that cost nothing but requests: how many more than on a good day."""


@pytest.mark.parametrize("scenario", SAME)
def test_nothing_is_lost(scenario: str, attempt: Callable[..., Attempt]) -> None:
    run = attempt(scenario)
    summary = run.run(**{"read_timeout_s": 1.0} if scenario == "hang" else {})
    assert {state for states in summary["states"].items() if states[0] != "dropped"
            for state in states[1]} <= {"done"}  # fmt: skip
    expected = expected_texts(run.site.content)
    if scenario == "two_zones":
        run.options["zone_names"] = ["24"]  # the guest is of another zone, and is taken once
        guest = run.site.content.videos[0]
        assert Counter(run.paths())[f"/{guest.parts[0].cid}.xml"] == 1
        assert [row for row in run.texts() if row[0] != guest.bvid] == expected
        return
    assert run.texts() == expected
    more = len(run.paths()) - 19
    if SAME[scenario] is not None:
        assert more == SAME[scenario]
    dropped = summary["states"]["dropped"]
    wanted: dict[str, dict[str, int]] = {
        "odd_rows": {"duplicate": 0, "empty": 10, "mode": 40, "pool": 20, "row": 40},
        "duplicate_ids": {"duplicate": 50},
        "segments_wire_type_3": {"rest of a segment": 1},
    }
    if scenario != "segments_duplicates":
        assert Counter(dropped) == Counter(wanted.get(scenario, {}))
    slow = SCENARIOS[scenario].about.startswith("too frequent")
    longest = max(run.clock.waits)
    if slow:
        assert longest >= (90 if scenario == "http_429" else 60)
        assert run.clock.waits[-1] >= 6 and summary["notes"][0].startswith("slower: ")
    else:
        assert longest <= 3 * 1.6 + 5 and not summary["notes"]


def test_segments_follow_the_parts_not_their_sum(attempt: Callable[..., Attempt]) -> None:
    run = attempt("segments")
    run.run()
    asked = Counter(path.split("oid=")[1].split("&")[0] for path in run.paths() if "oid=" in path)
    for cid, number in asked.items():
        _, part = run.site.content.by_cid[int(cid)]
        assert number == -(-part.duration // 360)
    assert run.journal("SELECT COUNT(*) FROM chat WHERE key IS NOT NULL") == [0]


def test_bare_ampersands_are_text(attempt: Callable[..., Attempt]) -> None:
    run = attempt("bare_ampersand")
    run.run()
    expected = expected_texts(run.site.content)
    assert run.texts() == [(video, second, f"{text} & <3") for video, second, text in expected]


BREAKERS = [
    "http_412",
    "code_412",
    "code_401",
    "code_352",
    "voucher_only",
    "html_for_json",
    "html_for_xml",
    "segments_html",
    "http_429_always",
    "code_403_always",
    "http_500_down",
]


@pytest.mark.parametrize("scenario", BREAKERS)
def test_risk_opens_the_breaker(scenario: str, attempt: Callable[..., Attempt]) -> None:
    run = attempt(scenario)
    with pytest.raises(Stopped, match="no request for 30 minutes"):
        run.run()
    asked = len(run.paths())
    refusals = {"http_429_always": 3, "code_403_always": 3, "http_500_down": 12}.get(scenario, 1)
    about = [entry["path"] for entry in run.site.log][-refusals:]
    assert len(set(about)) == {"code_403_always": 3, "http_500_down": 3}.get(scenario, 1)
    # A restart does not shorten it, not even a minute before its end.
    for seconds in (0, 1200 - 60):
        run.clock.time += seconds
        with pytest.raises(Stopped, match="cooling down; run the same command again after"):
            run.run()
    assert len(run.paths()) == asked
    # One probe; the site still refuses: twice as long.
    run.clock.time += 1000
    if refusals == 1:
        with pytest.raises(Stopped, match="no request for 60 minutes"):
            run.run()
        assert len(run.paths()) == asked + 1
        run.clock.time += 3700
    run.heal()
    run.run()
    assert run.texts() == expected_texts(run.site.content)
    assert [note for note in json.loads((run.out / "crawl.json").read_text())["notes"]
            if note.startswith("breaker opened: ")]  # fmt: skip
    assert run.journal("SELECT value FROM state WHERE key = 'trips'") == ["0"]


LOSSES = {
    "closed": ("part", "closed", 10),
    "no_chats": ("part", "done", 10),
    "xml_304": ("part", "empty", 1),
    "truncated": ("part", "partial", 1),
    "segments_closed": ("part", "closed", 10),
    "segments_empty": ("part", "done", 10),
    "http_500_always": ("part", "failed: HTTP 500", 1),
    "code_403": ("video", "failed: code -403", 1),
    "code_404": ("video", "gone: code -404: gone", 1),
    "code_62002": ("video", "gone: code 62002: hidden", 1),
    "code_62004": ("video", "gone: code 62004: under review", 1),
    "code_62012": ("video", "gone: code 62012: private", 1),
    "code_688": ("video", "gone: code -688: not in this region", 1),
    "code_689": ("video", "gone: code -689: copyright", 1),
    "code_101": ("video", "gone: code -101: needs a login", 1),
    "code_10": ("video", "gone: code -10: bad parameter", 1),
    "code_400": ("list", "gone: code -400: bad parameter", 1),
    "stale_ranking": ("list", "gone: stale: the newest video is of 2025-11-15", 2),
    "wrong_zone": ("list", "gone: 80 of 84 videos are of other zones", 2),
}


@pytest.mark.parametrize("scenario", LOSSES)
def test_what_is_gone_is_skipped_once_and_counted(
    scenario: str, attempt: Callable[..., Attempt]
) -> None:
    run = attempt(scenario)
    summary = run.run()
    table, state, count = LOSSES[scenario]
    states = Counter(run.journal(f"SELECT state FROM {table}"))
    assert states[state] == count == summary["states"][f"{table}s"][state]
    assert all(key in (state, "done") for key in states)
    whole, got = expected_texts(run.site.content), run.texts()
    assert len(got) < len(whole) and all(row in whole for row in got)
    if count == 1:
        assert got
    tries = {"truncated": 2, "http_500_always": 4}.get(scenario, 1)
    assert max(Counter(run.paths()).values()) == tries
    before = run.paths()
    run.heal()
    run.run()
    if state.startswith("failed"):  # the site's trouble may have passed: what failed is tried again
        assert run.texts() == whole and len(set(run.paths())) == 19
        assert len(run.paths()) == len(before) + (2 if table == "video" else 1)
    else:
        assert run.paths() == before


def test_every_scenario_is_tested() -> None:
    elsewhere = {"normal", "robots_disallow", "robots_html", "page_62012", "bare_ampersand"}
    assert sorted([*SAME, *BREAKERS, *LOSSES, *elsewhere]) == sorted(SCENARIOS)


@pytest.mark.parametrize("scenario", ["robots_disallow", "robots_html"])
def test_robots_refuse(scenario: str, attempt: Callable[..., Attempt]) -> None:
    run = attempt(scenario)
    with pytest.raises(
        InputError, match=r"robots\.txt: .*; so /x/web-interface/.* --ignore-robots"
    ):
        run.run()
    assert run.paths() == ["/robots.txt"]
    summary = run.run(ignore_robots_because="the site's owner allowed it by mail")
    assert run.texts() == expected_texts(run.site.content)
    assert run.paths().count("/robots.txt") == 1
    (note,) = summary["notes"]
    assert note.endswith("because: the site's owner allowed it by mail") and "overridden" in note


def test_named_videos_need_no_refusing_host(
    attempt: Callable[..., Attempt], tmp_path: Path
) -> None:
    names = ["BV1fake05003", "BV1fake00001", "BV1fake99999", "BV1fake05003"]
    file = tmp_path / "bvids.txt"
    file.write_text("\n".join(names) + "\n\n", encoding="utf-8")
    run = attempt("robots_disallow", bvid_file=file, zone_names=[])
    port = run.site.server_address[1]
    open_host = f"http://localhost:{port}"
    run.options["hosts"] = Hosts(run.site.address, open_host, open_host)
    summary = run.run()
    assert [row[0] for row in run.texts()] == 12 * ["BV1fake05003"] + 12 * ["BV1fake00001"]
    assert summary["states"]["videos"] == {"done": 2, "gone: code -404: gone": 1}
    assert {entry["host"] for entry in run.site.log} == {f"localhost:{port}"}
    private = attempt("page_62012", bvid_file=file, zone_names=[])
    assert private.run()["states"]["videos"] == {"gone: code 62012: private": 3}


def test_honest_user_agent_and_no_cookies(attempt: Callable[..., Attempt]) -> None:
    run = attempt("normal", zone_names=["17"])
    run.run(contact="mail@example.org")
    (agent,) = {entry["agent"] for entry in run.site.log}
    assert agent == "danmu-prompt/0.1 bullet-chat study (+mail@example.org)"
    default = httpx.get(f"{run.site.address}/90050001.xml", trust_env=False)
    assert default.status_code == 412 and "html" in default.headers["content-type"]


class Crash(BaseException):
    """The process is gone."""


class CrashingConnection(sqlite3.Connection):
    """Dies at the statement with the number `at`, and executes nothing afterwards."""

    at = 0
    done = 0

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        self.count()
        return super().execute(*arguments)

    def executemany(self, *arguments: Any) -> sqlite3.Cursor:
        self.count()
        return super().executemany(*arguments)

    @classmethod
    def count(cls) -> None:
        cls.done += 1
        if cls.at and cls.done >= cls.at:
            raise Crash


@pytest.mark.parametrize("scenario", ["normal", "segments"])
def test_cut_off_at_every_change(
    scenario: str, attempt: Callable[..., Attempt], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = attempt(scenario, zone_names=["65"])  # a video of two parts with two segments each
    connect = functools.partial(sqlite3.connect, factory=CrashingConnection)
    monkeypatch.setattr("data_prep.crawl.journal.sqlite3.connect", connect)
    CrashingConnection.at = CrashingConnection.done = 0
    run.run()
    expected, requests, statements = run.texts(), run.paths(), CrashingConnection.done
    assert len(expected) == 12
    for at in range(1, statements + 1, 3):
        run.out, before = tmp_path / str(at), len(run.site.log)
        CrashingConnection.at, CrashingConnection.done = at, 0
        with pytest.raises(Crash):
            run.run()
        CrashingConnection.at = 0
        run.run()
        assert run.texts() == expected
        assert Counter(run.paths()[before:]).keys() == Counter(requests).keys()
        assert len(run.site.log) - before - len(requests) in (0, 1)


@pytest.mark.parametrize("scenario", ["segments", "normal"])
def test_senders_reach_no_file(scenario: str, attempt: Callable[..., Attempt]) -> None:
    run = attempt(scenario)
    content = run.site.content
    videos = [*content.of_zone(4), *content.of_zone(3)]
    keys = [chat.key for v in videos for part in v.parts for chat in content.chats(part.cid)]
    uid, mid = fake_content.SENDER_UID, int(fake_content.UPLOADER["mid"])
    secret = [fake_content.SENDER_HASH, fake_content.UPLOADER["name"], str(uid), str(mid)]
    secret += [str(key) for key in keys]
    forbidden = [text.encode() for text in secret] + [fake_content.varint(uid)]
    forbidden += [n.to_bytes(size, "big") for n in (uid, mid) for size in (5, 6)]
    forbidden += [key.to_bytes(8, "big") for key in keys]
    looked = []

    def look(seconds: float) -> None:
        """Before each request: what a killed process would leave, the write-ahead log too."""
        run.clock.time += seconds
        written = b"".join(file.read_bytes() for file in sorted(run.out.iterdir()))
        assert not [text for text in forbidden if text in written]
        looked.append("合成视频".encode() in written)

    run.run(sleep=look)
    look(0)
    assert sum(looked) > 10
    for name in ("chats", "videos"):  # compressed: once more as text
        rows = pq.read_table(run.out / f"{name}.parquet").to_pylist()
        text = json.dumps(rows, default=str, ensure_ascii=False).encode()
        assert not [text for part in forbidden if part in text]
    assert len(run.texts()) == len(keys)
