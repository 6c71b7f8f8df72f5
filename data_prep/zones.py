"""The zones of the study (2021) and how it grouped them into main categories, as data.

`zones_table.json` has the site's two zone trees: v1, in use from 2020 to 2025 and still sent with
every video, and v2, in use since 2025 (ids from 1001). Ids of the two never coincide.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal

import numpy as np

FIRST_LEVEL_ZONES: tuple[str, ...] = (
    "动画",
    "番剧",
    "国创",
    "音乐",
    "舞蹈",
    "游戏",
    "知识",
    "科技",
    "运动",
    "汽车",
    "生活",
    "美食",
    "动物圈",
    "鬼畜",
    "时尚",
    "资讯",
    "娱乐",
    "影视",
    "纪录片",
    "电影",
    "电视剧",
)

MAIN_CATEGORIES: dict[str, list[str]] = {
    "动画": ["动画", "番剧", "国创", "游戏", "鬼畜"],
    "音乐舞蹈": ["音乐", "舞蹈"],
    "知识": ["知识", "科技"],
    "生活": ["运动", "汽车", "生活", "美食", "动物圈", "时尚", "资讯", "娱乐"],
    "影视": ["影视", "电影", "电视剧", "纪录片"],
}


def group_distribution(
    shares: np.ndarray, names: Sequence[str], grouping: Mapping[str, Sequence[str]]
) -> np.ndarray:
    """Sum the shares of each group's members, as the study does for its five main categories.

    `shares` is [..., len(names)]; the result [..., len(grouping)] has its dtype and the order of
    `grouping`. Raises ValueError unless `grouping` has every name exactly once.
    """
    members = [member for group in grouping.values() for member in group]
    if sorted(members) != sorted(names):
        raise ValueError(f"grouping has {members}, expected each of {list(names)} exactly once")
    columns = [[names.index(member) for member in group] for group in grouping.values()]
    return np.stack([shares[..., column].sum(axis=-1) for column in columns], axis=-1)


@dataclass(frozen=True)
class Zone:
    """One zone of either tree; `parent` is the id of its first-level zone, None if it is one.

    For v1: `first_seen` and `last_seen` (only of retired zones) are days; `named` has earlier names
    by snapshot; `live` the snapshots that list it. `ranked`: the site has a ranking for it.
    """

    tid: int
    name: str
    parent: int | None = None
    first_seen: str | None = None
    last_seen: str | None = None
    live: tuple[str, ...] = ()
    named: Mapping[str, str] | None = None
    ranked: bool = False
    licensed: bool = False
    hidden: bool = False


def first_level_of(tid: int) -> str | None:
    """Name of the first-level v1 zone that a v1 zone of either level belongs to.

    None if no v1 zone has this id. Every name is in `FIRST_LEVEL_ZONES` but 广告, closed in 2020.
    Some second-level zones moved before July 2021; the parent given is the one since then.
    """
    return _first_level(zones("v1"), tid)


def first_level_of_v2(tid_v2: int) -> str | None:
    """Name of the first-level v2 zone that a v2 zone belongs to; None if the id is unknown."""
    return _first_level(zones("v2"), tid_v2)


def zone_name(tid: int) -> str | None:
    """Newest name of a zone of either tree and level; None if the id is unknown."""
    zone = zones("v1").get(tid) or zones("v2").get(tid)
    return None if zone is None else zone.name


def zone_ids(snapshot: Literal["2021-08", "2022-04", "2025-04"]) -> tuple[int, ...]:
    """Ids of the v1 zones of both levels live at the time: each first-level one, then its own.

    2021-08 is what the study crawled: 126 ids, 21 of them first-level.
    """
    live = [zone for zone in zones("v1").values() if snapshot in zone.live]
    return tuple(
        zone.tid
        for top in live
        if top.parent is None
        for zone in live
        if top.tid in (zone.tid, zone.parent)
    )


@functools.cache
def zones(tree: Literal["v1", "v2"]) -> dict[int, Zone]:
    """All zones of a tree by id, first level first."""
    table = json.loads(resources.files("data_prep").joinpath("zones_table.json").read_bytes())[tree]
    found = {}
    for row in table["first_level"] + table["second_level"]:
        found[row["tid"]] = Zone(**row | {"live": tuple(row.get("live", ()))})
    return found


def _first_level(tree: Mapping[int, Zone], tid: int) -> str | None:
    zone = tree.get(tid)
    if zone is None:
        return None
    return zone.name if zone.parent is None else tree[zone.parent].name
