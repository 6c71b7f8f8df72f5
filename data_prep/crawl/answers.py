"""What is taken out of the site's answers: an allow-list of fields, checked, and nothing else."""

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import Any

from pydantic import BaseModel, Field, ValidationError, field_validator

from data_prep.zones import zones

BVID = r"BV[0-9A-Za-z]{10}"
_STALE = timedelta(days=21)


class Part(BaseModel):
    """One part of a video: its chats' id, number from 1, length in seconds (0 if unknown)."""

    cid: int = Field(gt=0, lt=2**63)
    page: int = Field(ge=1, le=10_000)
    duration: int = Field(default=0, ge=0, le=10**6)


class Video(BaseModel):
    """What is kept of a video. `parts` is empty where a list does not tell them."""

    bvid: str = Field(pattern=f"^{BVID}$")
    aid: int = Field(gt=0, lt=2**63)
    title: str = Field(max_length=500)
    tid: int = Field(ge=0, lt=2**31)
    tid_v2: int | None = Field(default=None, ge=0, lt=2**31)
    plays: int = Field(ge=0, lt=2**63)
    pubdate: date
    parts: list[Part] = []

    @field_validator("pubdate", mode="before")
    @classmethod
    def _day(cls, value: Any) -> Any:
        """A day in China from seconds since 1970: all the time of publication that is kept."""
        if isinstance(value, int) and 0 <= value < 2**33:
            return (datetime.fromtimestamp(value, UTC) + timedelta(hours=8)).date()
        return value


class AnswerError(ValueError):
    """An answer that is not what the site documents, or not what was asked for; one line."""


def read_ranking(data: Any, zone: int, today: date) -> list[Video]:
    """The videos of a zone's ranking.

    Raises AnswerError if it is another zone's, or stale: ids that a newer zone tree has replaced
    still get an answer, which is a month old.
    """
    found = _videos(data, "list", lambda item: _common(item, item["stat"]["view"]))
    ours = [video for video in found if _belongs(video, zone)]
    if found and 2 * len(ours) < len(found):
        raise AnswerError(f"{len(found) - len(ours)} of {len(found)} videos are of other zones")
    if ours and max(video.pubdate for video in ours) < today - _STALE:
        newest = max(video.pubdate for video in ours)
        raise AnswerError(f"stale: the newest video is of {newest}")
    return ours


def read_newlist(data: Any, zone: int) -> list[Video]:
    """One page of a second-level zone's most played videos in a window of time."""
    return _videos(
        data,
        "result",
        lambda item: {
            "bvid": item["bvid"],
            "aid": item["id"],
            "title": item["title"],
            "tid": zone,
            "plays": item["play"],
            "pubdate": item["senddate"],
        },
    )


def read_view(data: Any, bvid: str) -> Video:
    """A video with its parts. Raises AnswerError unless it is `bvid` with at least one part."""
    try:
        video = Video(**_common(data, data["stat"]["view"]))
        video.parts = [
            Part(cid=page["cid"], page=page["page"], duration=page["duration"])
            for page in data["pages"]
        ]
    except (ValidationError, KeyError, TypeError, AttributeError) as error:
        raise AnswerError(f"not a video's description: {_short(error)}") from None
    if video.bvid != bvid or not video.parts:
        raise AnswerError(f"{video.bvid} with {len(video.parts)} parts in place of {bvid}")
    return video


def _common(item: Any, plays: Any) -> dict[str, Any]:
    fields = {name: item[name] for name in ("bvid", "aid", "title", "tid", "pubdate")}
    # Lists tell the first part only; a video with more has to be looked at.
    whole = item.get("videos") == 1 and item.get("cid")
    parts = [{"cid": item["cid"], "page": 1, "duration": item["duration"]}] if whole else []
    return fields | {"tid_v2": item.get("tid_v2") or None, "plays": plays, "parts": parts}


def _videos(data: Any, member: str, convert: Callable[[Any], dict[str, Any]]) -> list[Video]:
    """The videos of a list; one odd item among good ones is left out."""
    found, wrong = [], AnswerError("not a list of videos")
    try:
        items = (data or {}).get(member) or []
        for item in items:
            try:
                found.append(Video(**convert(item)))
            except (ValidationError, KeyError, TypeError, AttributeError) as error:
                wrong = AnswerError(f"not a list of videos: {_short(error)}")
    except (TypeError, AttributeError):
        raise wrong from None
    if 2 * len(found) < len(items):
        raise wrong
    return found


def _belongs(video: Video, zone: int) -> bool:
    """Whether a video is of a zone of either tree; unknown new zones are believed."""
    tid = video.tid if zone in zones("v1") else video.tid_v2
    known = zones("v1" if zone in zones("v1") else "v2").get(tid or 0)
    return known is None or zone in (known.tid, known.parent)


def _short(error: Exception) -> str:
    """Where the answer differs, without what it says: it may name people."""
    if isinstance(error, ValidationError):
        first = error.errors(include_input=False, include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return f"{type(error).__name__} {error}"[:80]
