"""What a crawl is going to ask for, fixed before the first request."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from data_prep.crawl.answers import BVID
from data_prep.zones import FIRST_LEVEL_ZONES, zones
from launcher.errors import InputError

PAGE = 30
"""Videos on one page of a second-level zone's list."""
_WINDOW = timedelta(days=90)


@dataclass(frozen=True)
class Hosts:
    """Addresses without a slash at the end: lists and segments, chat documents, video pages."""

    api: str
    comment: str
    www: str


def make_plan(
    hosts: Hosts,
    *,
    zone_names: Sequence[str],
    bvid_file: Path | None,
    videos_per_zone: int,
    first_day: date | None,
    last_day: date | None,
    today: date,
) -> dict[str, Any]:
    """The plan as the journal keeps it.

    `zones` are ids, `lists` holds (zone, paths of the pages of one list), `bvids` videos named by
    the operator. A first-level zone with a ranking is found by that, others by the lists of their
    second-level zones between the two days, in windows of at most 90: by default the last 90 days.
    Raises InputError for a zone that is unknown or has neither, and for a `bvid_file` with anything
    but one bvid a line.
    """
    last = last_day or today
    first = first_day or last - _WINDOW + timedelta(days=1)
    if bvid_file is not None and zone_names:
        raise InputError("--bvid-file: names the videos itself; leave --zones out")
    if videos_per_zone < 1:
        raise InputError(f"--videos-per-zone: {videos_per_zone}; expected at least 1")
    if first > last:
        raise InputError(f"--from: {first} is after --to {last}")
    ids = [] if bvid_file else [_zone_id(name) for name in zone_names or FIRST_LEVEL_ZONES]
    lists: list[tuple[int, list[str]]] = []
    for zone in dict.fromkeys(ids):
        for tid in _listed_by(zone):
            if zones("v2").get(tid) or zones("v1")[tid].ranked:
                lists.append((zone, [f"/x/web-interface/ranking/v2?rid={tid}&type=all"]))
                continue
            for start, end in _windows(first, last):
                pages = range(1, 1 + -(-videos_per_zone // PAGE))
                lists.append((zone, [_newlist(tid, start, end, page) for page in pages]))
    # Through JSON it comes back as lists.
    return {
        "zones": list(dict.fromkeys(ids)),
        "videos_per_zone": videos_per_zone,
        "from": first_day and first_day.isoformat(),
        "to": last_day and last_day.isoformat(),
        "hosts": [hosts.api, hosts.comment, hosts.www],
        "lists": [[zone, paths] for zone, paths in lists],
        "bvids": _read_bvids(bvid_file) if bvid_file else [],
    }


def describe_plan(plan: dict[str, Any], spacing_s: float, budget: int) -> str:
    """The plan in words: what would be fetched, how many requests, how long it takes."""
    api, comment, www = plan["hosts"]
    pages = sum(len(paths) for _, paths in plan["lists"])
    videos = len(plan["zones"]) * plan["videos_per_zone"] + len(plan["bvids"])
    described = len(plan["bvids"]) + plan["videos_per_zone"] * len(
        {zone for zone, paths in plan["lists"] if "newlist_rank" in paths[0]}
    )
    hosts = {comment, www if plan["bvids"] else api}
    most = len(hosts) + pages + described + videos
    lines = [f"{host}/robots.txt" for host in sorted(hosts)]
    lines += [f"{api}{paths[0]}  ({_pages(paths)})" for _, paths in plan["lists"]]
    lines += [f"{www}/video/{bvid}/" for bvid in plan["bvids"]]
    if described > len(plan["bvids"]):
        lines.append(f"{api}/x/web-interface/view?bvid=...  (videos whose list tells no parts)")
    lines.append(f"{comment}/CID.xml  (one for each part of each video)")
    return "\n".join(
        [
            f"up to {videos} videos ({len(plan['zones'])} zones, {len(plan['bvids'])} named ones)",
            *lines,
            f"about {most} requests, more where videos have several parts; the budget is {budget}",
            f"about {most * spacing_s * 1.3 / 60:.1f} minutes at {spacing_s} s and more a request",
        ]
    )


def zone_of(path: str) -> int:
    """The zone that a list's path asks for."""
    found = re.search(r"(?:rid|cate_id)=(\d+)", path)
    assert found
    return int(found[1])


def _zone_id(name: str) -> int:
    """An id of either tree, or a first-level name of the older one."""
    if name.isascii() and name.isdigit():
        tid = int(name)
        second_v2 = tid in zones("v2") and zones("v2")[tid].parent is not None
        if (tid in zones("v1") or tid in zones("v2")) and not second_v2:
            return tid
        seen = "is a second-level zone of 2025, for which the site has no list" if second_v2 else ""
        raise InputError(
            f"--zones: {name} {seen or 'is no zone id'}; see data_prep/zones_table.json"
        )
    for zone in zones("v1").values():
        if zone.parent is None and zone.name == name:
            return zone.tid
    known = ", ".join(FIRST_LEVEL_ZONES)
    raise InputError(f"--zones: {name!r}; expected an id or one of {known}")


def _listed_by(zone: int) -> list[int]:
    """The zones whose lists make up a zone's: itself, or its live children without a ranking."""
    known = zones("v1").get(zone) or zones("v2")[zone]
    if known.ranked or known.parent is not None:
        return [zone]
    children = [z.tid for z in zones("v1").values() if z.parent == zone and "2025-04" in z.live]
    if not children:
        raise InputError(f"--zones: {zone} {known.name} has no ranking and no list of its own")
    return children


def _windows(first: date, last: date) -> list[tuple[date, date]]:
    windows = []
    while first <= last:
        end = min(last, first + _WINDOW - timedelta(days=1))
        windows.append((first, end))
        first = end + timedelta(days=1)
    return windows


def _newlist(tid: int, start: date, end: date, page: int) -> str:
    query = {
        "search_type": "video",
        "view_type": "hot_rank",
        "order": "click",
        "cate_id": tid,
        "page": page,
        "pagesize": PAGE,
        "time_from": f"{start:%Y%m%d}",
        "time_to": f"{end:%Y%m%d}",
    }
    return f"/x/web-interface/newlist_rank?{urlencode(query)}"


def _read_bvids(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--bvid-file: {file}: {error}") from None
    named = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    wrong = [
        f"{file} line {number}: {name[:40]!r}; expected one bvid, such as BV1xx411c7mD"
        for number, name in named
        if not re.fullmatch(BVID, name)
    ]
    if wrong or not named:
        raise InputError("\n".join(wrong[:3]) or f"--bvid-file: {file}: no line in it")
    return list(dict.fromkeys(name for _, name in named))


def _pages(paths: Sequence[str]) -> str:
    return f"{len(paths)} page{'s' if len(paths) > 1 else ''}"
