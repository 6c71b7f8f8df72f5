"""What a crawl would ask for, what robots.txt allows, and the tables of zones."""

import json
from datetime import date, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from data_prep.__main__ import main
from data_prep.crawl.plan import Hosts, make_plan
from data_prep.crawl.robots import read_robots
from data_prep.zones import (
    FIRST_LEVEL_ZONES,
    first_level_of,
    first_level_of_v2,
    zone_ids,
    zone_name,
    zones,
)
from launcher.errors import InputError

TODAY = date(2026, 3, 1)


def plan(**options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "zone_names": [],
        "bvid_file": None,
        "videos_per_zone": 20,
        "first_day": None,
        "last_day": None,
        "today": TODAY,
    }
    return make_plan(Hosts("http://a", "http://c", "http://w"), **given | options)


def test_zones_with_a_ranking_and_without() -> None:
    lists = plan(zone_names=["游戏", "1008", "138", "资讯"])["lists"]
    queries = [(zone, parse_qs(urlsplit(paths[0]).query)) for zone, paths in lists]
    assert [(zone, q.get("rid")) for zone, q in queries[:2]] == [(4, ["4"]), (1008, ["1008"])]
    by_lists = [(zone, int(q["cate_id"][0])) for zone, q in queries[2:]]
    assert by_lists == [(138, 138), (202, 203), (202, 204), (202, 205), (202, 206)]
    assert {zone for zone, _ in plan()["lists"]} == {
        zone.tid for zone in zones("v1").values() if zone.name in FIRST_LEVEL_ZONES
        and zone.parent is None
    }  # fmt: skip


def test_windows_tile_the_days_in_at_most_90() -> None:
    first, last = date(2025, 1, 1), date(2025, 12, 31)
    options = {"zone_names": ["17"], "first_day": first, "last_day": last, "videos_per_zone": 61}
    covered: list[date] = []
    for _, paths in plan(**options)["lists"]:
        assert len(paths) == 3
        query = parse_qs(urlsplit(paths[0]).query)
        start, end = (
            date.fromisoformat(f"{d[:4]}-{d[4:6]}-{d[6:]}")
            for d in (query["time_from"][0], query["time_to"][0])
        )
        assert (end - start).days < 90
        covered += [start + timedelta(days=n) for n in range((end - start).days + 1)]
    assert covered == [first + timedelta(days=n) for n in range(365)]
    assert plan(zone_names=["17"])["from"] is None  # resumable on another day


def test_wrong_plans(tmp_path: Path) -> None:
    def refusal(**options: Any) -> str:
        with pytest.raises(InputError) as raised:
            plan(**options)
        return str(raised.value)

    assert "'电竞'; expected an id or one of 动画, 番剧" in refusal(zone_names=["电竞"])
    assert "999 is no zone id" in refusal(zone_names=["999"])
    assert "2037 is a second-level zone of 2025" in refusal(zone_names=["2037"])
    assert "1006 绘画 has no ranking" in refusal(zone_names=["1006"])
    assert "--videos-per-zone: 0" in refusal(videos_per_zone=0)
    assert "is after --to" in refusal(first_day=date(2027, 1, 1))
    file = tmp_path / "bvids"
    assert "No such file" in refusal(bvid_file=file)
    file.write_text("BV1xx411c7mD\n\nhttps://x/BV1xx411c7mD\n", encoding="utf-8")
    assert refusal(bvid_file=file).startswith(f"{file} line 3: 'https://x/BV1xx411c7mD'; expected")
    assert "leave --zones out" in refusal(bvid_file=file, zone_names=["4"])


def test_dry_run_asks_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    bases = [f"--{name}-base=http://127.0.0.1:9" for name in ("api", "comment", "www")]
    command = ["crawl", f"--out={out}", "--dry-run", *bases, "--zones", "4", "138"]
    assert main([*command, "--videos-per-zone=5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "up to 10 videos (2 zones, 0 named ones)"
    assert lines[1] == "http://127.0.0.1:9/robots.txt"
    # robots, a ranking, a list, 5 views, 10 documents
    assert lines[-2].startswith("about 18 requests") and lines[-1].startswith("about 1.2 minutes")
    assert not out.exists()
    assert main([*command[:2], "--api-base=http://example.org"]) == 2
    assert "give --contact" in capsys.readouterr().err


ROBOTS = """
# comment
User-Agent: other
Disallow: /

User-agent: *
Disallow: /private   # trailing
Allow: /private/open
Disallow: /*.pdf$
Disallow: /a*b*c
Disallow:
Crawl-delay: 7
User-agent: danmu-prompt
Disallow: /x/
Allow: /x/$
"""


@pytest.mark.parametrize(
    ("agent", "path", "refused"),
    [
        ("someone", "/", False),
        ("someone", "/private", True),
        ("someone", "/privateer", True),
        ("someone", "/private/open/1", False),
        ("someone", "/d.pdf", True),
        ("someone", "/d.pdf?x=1", False),
        ("someone", "/a1b2c3", True),
        ("someone", "/a1c2b", False),
        ("someone", "/x/y", False),
        ("danmu-prompt", "/x/y", True),
        ("Danmu-Prompt", "/x/", False),
        ("danmu-prompt", "/private", False),
        ("other", "/anything", True),
    ],
)
def test_robots(agent: str, path: str, refused: bool) -> None:
    robots = read_robots(ROBOTS, agent)
    assert (robots.refusal(path) is not None) == refused
    assert robots.delay == (7 if agent == "someone" else 0)


def test_robots_that_say_nothing_or_much() -> None:
    assert read_robots("", "x").refusal("/") is None
    assert read_robots("<html>Disallow: /</html>", "x").refusal("/") is None
    assert read_robots("User-agent: *\nDisallow: /\n", "x").refusal("/a") == "Disallow: /"
    many = "User-agent: *\nDisallow: /" + "*a" * 5000
    assert read_robots(many, "x").refusal("/" + "a" * 4999) is None


def test_zone_tables() -> None:
    study = zone_ids("2021-08")
    assert len(study) == len(set(study)) == 126
    assert [zone_name(tid) for tid in study if zones("v1")[tid].parent is None] == list(
        FIRST_LEVEL_ZONES
    )
    assert len(zone_ids("2022-04")) == 129 and len(zone_ids("2025-04")) == 149
    assert [len(zones(tree)) for tree in ("v1", "v2")] == [165, 236]
    assert not zones("v1").keys() & zones("v2").keys()
    assert [first_level_of(tid) for tid in (27, 214, 160, 17, 195, 2037, 0)] == [
        "动画", "美食", "生活", "游戏", "国创", None, None,
    ]  # fmt: skip
    assert (first_level_of_v2(2064), first_level_of_v2(1008), first_level_of_v2(17)) == (
        "游戏", "游戏", None,
    )  # fmt: skip
    assert (zone_name(2037), zone_name(47), zone_name(3000)) == ("同人动画", "同人·手书", None)


def test_zone_tables_are_those_of_the_reference(reference_data: Path) -> None:
    facts = json.loads((reference_data / "facts" / "zones.json").read_text(encoding="utf-8"))
    for tree in ("v1", "v2"):
        rows = facts[tree]["first_level"] + facts[tree]["second_level"]
        ours = zones(tree)
        assert ours.keys() == {row["tid"] for row in rows}
        for row in rows:
            zone = ours[row["tid"]]
            assert (zone.name, zone.parent) == (row["name_zh"], row.get("parent"))
            if tree == "v1":
                live = [s for s in ("2021_08", "2022_04", "2025_04") if row[f"in_{s}"]]
                assert list(zone.live) == [s.replace("_", "-") for s in live]
