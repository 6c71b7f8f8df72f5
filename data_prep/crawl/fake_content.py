"""What the fake site shows: invented videos with SYNTHETIC chats of the phrase bank.

Senders and uploaders are planted constants, so that a test can look for them where they must not
be. Everything follows from the seed and the day; the chats from the seed alone.
"""

import functools
import html
import random
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from data_prep.phrases import (
    GENERAL_PHRASES,
    PREFIXES,
    SHARED_PHRASES,
    SUFFIXES,
    ZONE_PHRASES,
)
from data_prep.zones import FIRST_LEVEL_ZONES, zones

SENDER_HASH = "c0ffee5e"
SENDER_UID = 704_011_073_311
UPLOADER: dict[str, Any] = {
    "mid": 80_622_704_011,
    "name": "哨兵上传者",
    "face": "http://127.0.0.1/c0ffee5e.jpg",
}
FIRST_KEY = 1_038_631_579_162_865_664
SEGMENT_MS = 360_000
# Shares of chats that fit anywhere, fit two zones, or quote another zone: labels stay imperfect.
_GENERAL, _SHARED, _STRAY = 0.12, 0.08, 0.05
_V2 = {
    "动画": 1005,
    "国创": 1005,
    "音乐": 1003,
    "舞蹈": 1004,
    "游戏": 1008,
    "知识": 1010,
    "科技": 1012,
    "运动": 1018,
    "汽车": 1013,
    "生活": 1029,
    "美食": 1020,
    "动物圈": 1024,
    "鬼畜": 1007,
    "时尚": 1014,
    "资讯": 1009,
    "娱乐": 1002,
    "影视": 1001,
}


@dataclass(frozen=True)
class FakePart:
    """One part: chat id, length in seconds and how many chats it has."""

    cid: int
    duration: int
    chats: int


@dataclass(frozen=True)
class FakeVideo:
    """One video; `zone` is the name of its first-level zone."""

    bvid: str
    aid: int
    zone: str
    tid: int
    tid_v2: int
    title: str
    plays: int
    pubdate: int
    parts: tuple[FakePart, ...]


@dataclass(frozen=True)
class FakeChat:
    """One chat as the site keeps it."""

    key: int
    milliseconds: int
    text: str
    mode: int = 1
    pool: int = 0


class Content:
    """`videos_per_zone` videos for each first-level zone, `chats_per_video` chats for each."""

    def __init__(
        self, seed: int, videos_per_zone: int, chats_per_video: int, today: date | None = None
    ) -> None:
        self.seed, self.chats_per_video = seed, chats_per_video
        self.today = today or (datetime.now(UTC) + timedelta(hours=8)).date()
        self.videos = [
            self._video(index, zone, number)
            for index, zone in enumerate(FIRST_LEVEL_ZONES)
            for number in range(videos_per_zone)
        ]
        self.by_bvid = {video.bvid: video for video in self.videos}
        self.by_cid = {part.cid: (video, part) for video in self.videos for part in video.parts}

    def of_zone(self, tid: int) -> list[FakeVideo]:
        """The videos of a zone of either tree and level; of all zones for 0."""
        return [
            video
            for video in self.videos
            if tid == 0
            or tid in (video.tid, video.tid_v2)
            or tid in (zones("v1")[video.tid].parent, _parent_v2(video.tid_v2))
        ]

    @functools.lru_cache(maxsize=64)  # noqa: B019  one content lives as long as its server
    def chats(self, cid: int) -> tuple[FakeChat, ...]:
        """A part's chats in the order of the video."""
        video, part = self.by_cid[cid]
        rng = random.Random(f"{self.seed}/{cid}")
        times = sorted(rng.randrange(part.duration * 1000) for _ in range(part.chats))
        key = FIRST_KEY + cid * 10_000
        return tuple(
            FakeChat(key + n, at, self._text(rng, video.zone), mode=rng.choice((1, 1, 1, 4, 5)))
            for n, at in enumerate(times)
        )

    def _text(self, rng: random.Random, zone: str) -> str:
        kind = rng.random()
        if kind < _GENERAL:
            phrase = rng.choice(GENERAL_PHRASES)
        elif kind < _GENERAL + _SHARED:
            phrase = rng.choice(_shared_phrases(zone))
        elif kind < _GENERAL + _SHARED + _STRAY:
            phrase = rng.choice(ZONE_PHRASES[rng.choice(FIRST_LEVEL_ZONES)])
        else:
            phrase = rng.choice(ZONE_PHRASES[zone])
        decoration = rng.random()
        prefix = rng.choice(PREFIXES) if decoration < 0.4 else ""
        suffix = rng.choice(SUFFIXES) if 0.3 < decoration < 0.7 else ""
        return prefix + phrase + suffix

    def _video(self, index: int, zone: str, number: int) -> FakeVideo:
        rng = random.Random(f"{self.seed}/{zone}/{number}")
        serial = index * 1000 + number
        children = _children(zone)
        children_v2 = [z.tid for z in zones("v2").values() if z.parent == _V2.get(zone)]
        day = self.today - timedelta(days=1 + rng.randrange(60) * (number > 0))
        noon = datetime(day.year, day.month, day.day, 4, tzinfo=UTC)
        chats = self.chats_per_video
        cid = 90_000_000 + serial * 10
        parts: tuple[FakePart, ...] = (FakePart(cid + 1, rng.randrange(60, 1200), chats),)
        if number % 10 == 3:
            # Each part has two segments, their sum of 820 s has three.
            half = chats // 2
            parts = (FakePart(cid + 1, 400, half), FakePart(cid + 2, 420, chats - half))
        return FakeVideo(
            bvid=f"BV1fake{serial:05d}",
            aid=10_000_000 + serial,
            zone=zone,
            tid=children[number % len(children)],
            tid_v2=children_v2[number % len(children_v2)] if children_v2 else 0,
            title=f"合成视频{serial:05d}：{rng.choice(ZONE_PHRASES[zone])}",
            plays=int(10_000 * rng.paretovariate(0.8)) % 10**9,
            pubdate=int(noon.timestamp()),
            parts=parts,
        )


def list_item(video: FakeVideo) -> dict[str, Any]:
    """A video as rankings and `view` describe it, uploader and all."""
    return {
        "aid": video.aid,
        "bvid": video.bvid,
        "cid": video.parts[0].cid,
        "tid": video.tid,
        "tid_v2": video.tid_v2,
        "videos": len(video.parts),
        "title": video.title,
        "pubdate": video.pubdate,
        "duration": sum(part.duration for part in video.parts),
        "owner": UPLOADER,
        "stat": {"aid": video.aid, "view": video.plays, "danmaku": 10 * video.parts[0].chats},
    }


def view(video: FakeVideo, extra_s: int = 0) -> dict[str, Any]:
    """The full description with the parts, each `extra_s` longer than it is."""
    pages = [
        {"cid": part.cid, "page": page, "part": f"P{page}", "duration": part.duration + extra_s}
        for page, part in enumerate(video.parts, 1)
    ]
    return list_item(video) | {"pages": pages, "staff": [UPLOADER]}


def newlist_item(video: FakeVideo) -> dict[str, Any]:
    """A video as the lists of second-level zones describe it: plays as text, no parts."""
    return {
        "id": video.aid,
        "bvid": video.bvid,
        "title": video.title,
        "play": str(video.plays),
        "duration": sum(part.duration for part in video.parts),
        "senddate": video.pubdate,
        "author": UPLOADER["name"],
        "mid": UPLOADER["mid"],
    }


def xml_row(chat: FakeChat, old: bool, text: str | None = None) -> str:
    """A `<d>` with 8 values (old) or 9."""
    sent = 1_640_995_200 + chat.milliseconds
    values = f"{chat.milliseconds / 1000:.5f},{chat.mode},25,16777215,{sent},{chat.pool}"
    values += f",{SENDER_HASH},{chat.key}" + ("" if old else ",5")
    return f'<d p="{values}">{html.escape(chat.text) if text is None else text}</d>'


def xml_document(cid: int, rows: str, closed: bool = False) -> bytes:
    """A part's chat document."""
    return (
        f'<?xml version="1.0" encoding="UTF-8"?><i><chatserver>127.0.0.1</chatserver>'
        f"<chatid>{cid}</chatid><mission>0</mission><maxlimit>1500</maxlimit>"
        f"<state>{int(closed)}</state><real_name>0</real_name><source>k-v</source>{rows}</i>"
    ).encode()


def element(chat: FakeChat) -> bytes:
    """A protobuf DanmakuElem as field 1 of a segment, with the sender and unknown fields."""
    text, sender, key = chat.text.encode(), SENDER_HASH.encode(), str(chat.key).encode()
    body = b"".join(
        [
            _number(1, chat.key),
            _number(2, chat.milliseconds),
            _number(3, chat.mode),
            _number(4, 25),
            _bytes(6, sender),
            _bytes(7, text),
            _number(8, 1_640_995_200),
            _number(11, chat.pool),
            _bytes(12, key),
            _number(14, SENDER_UID),
            _bytes(22, b"animation"),
            varint(25 << 3 | 5) + b"\x00\x01\x02\x03",
            varint(26 << 3 | 1) + b"\x00\x01\x02\x03\x04\x05\x06\x07",
        ]
    )
    return _bytes(1, body)


def varint(number: int) -> bytes:
    """Protobuf's encoding of a number from 0."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value) if value else b""


def _bytes(field: int, value: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(value)) + value


@functools.cache
def _children(zone: str) -> list[int]:
    top = next(z.tid for z in zones("v1").values() if z.parent is None and z.name == zone)
    return [z.tid for z in zones("v1").values() if z.parent == top and "2025-04" in z.live]


@functools.cache
def _shared_phrases(zone: str) -> tuple[str, ...]:
    shared = [p for pair, phrases in SHARED_PHRASES.items() if zone in pair for p in phrases]
    return tuple(shared) or ZONE_PHRASES[zone]


def _parent_v2(tid: int) -> int | None:
    return zones("v2")[tid].parent if tid else None
