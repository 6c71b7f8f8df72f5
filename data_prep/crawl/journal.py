"""The crawl's memory: one SQLite file in which chats and progress change in the same transaction.

Whenever the process dies, the file says exactly what has been fetched. It holds no sender, no
uploader and no answer as it came; comment ids only as keyed hashes, and those only until all
segments of a video's part are in.
"""

import hashlib
import json
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from data_prep.crawl.answers import Part, Video
from data_prep.danmaku import Chats
from launcher.errors import InputError

_SCHEMA = """
CREATE TABLE state (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE event (id INTEGER PRIMARY KEY, at REAL NOT NULL, what TEXT NOT NULL);
CREATE TABLE robots (origin TEXT PRIMARY KEY, fetched REAL NOT NULL, content TEXT);
CREATE TABLE list (id INTEGER PRIMARY KEY, zone INTEGER NOT NULL, series INTEGER NOT NULL,
    path TEXT NOT NULL, state TEXT NOT NULL DEFAULT 'pending');
CREATE TABLE candidate (zone INTEGER NOT NULL, bvid TEXT NOT NULL, plays INTEGER NOT NULL,
    video TEXT NOT NULL, PRIMARY KEY (zone, bvid)) WITHOUT ROWID;
CREATE TABLE video (id INTEGER PRIMARY KEY, bvid TEXT NOT NULL UNIQUE, aid INTEGER, title TEXT,
    tid INTEGER, tid_v2 INTEGER, plays INTEGER, pubdate TEXT, state TEXT NOT NULL);
CREATE TABLE part (id INTEGER PRIMARY KEY, video INTEGER NOT NULL, cid INTEGER NOT NULL UNIQUE,
    page INTEGER NOT NULL, duration INTEGER NOT NULL, source TEXT NOT NULL DEFAULT 'xml',
    tries INTEGER NOT NULL DEFAULT 0, state TEXT NOT NULL DEFAULT 'pending');
CREATE TABLE chat (id INTEGER PRIMARY KEY, part INTEGER NOT NULL, key BLOB, second REAL NOT NULL,
    text TEXT NOT NULL, UNIQUE (part, key));
CREATE TABLE dropped (reason TEXT PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class ListTask:
    """One page of a zone's list of videos, still to be fetched."""

    id: int
    zone: int
    path: str


@dataclass(frozen=True)
class PartTask:
    """One part of a video whose chats are still to be fetched.

    `source` is "xml", "segments", or "segments again" where the next one came broken; `tries`
    counts broken documents, or segments fetched.
    """

    id: int
    bvid: str
    aid: int | None
    cid: int
    duration: int
    source: str
    tries: int


class Journal:
    """Opens or makes the journal of a crawl; only one process can have it open.

    Raises InputError if another process has it, or if it belongs to a crawl with another plan.
    """

    def __init__(self, file: Path, plan: dict[str, Any]) -> None:
        self.file, self._opened = file, False
        file.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(file, timeout=0, isolation_level=None)
        try:
            self._open(plan)
        except sqlite3.OperationalError as error:
            raise InputError(
                f"{file}: {error}; is another crawl running with the same --out?"
            ) from None
        except sqlite3.DatabaseError as error:
            raise InputError(f"{file}: not a crawl's journal: {error}") from None
        finally:
            if not self._opened:
                self._db.close()

    def close(self) -> None:
        """Close the file; what was changed is in it already."""
        self._db.close()

    def get(self, key: str, default: Any = None) -> Any:
        """A value of `set`."""
        row = self._db.execute("SELECT value FROM state WHERE key = ?", (key,)).fetchone()
        return default if row is None else json.loads(row[0])

    def set(self, **values: Any) -> None:
        """Keep small values, all or none."""
        with self._change():
            self._set(values)

    def note(self, at: float, what: str) -> None:
        """Keep a line of history; `at` in seconds since 1970."""
        with self._change():
            self._db.execute("INSERT INTO event (at, what) VALUES (?, ?)", (at, what))

    def notes(self) -> list[str]:
        """The lines of history."""
        return [what for (what,) in self._db.execute("SELECT what FROM event ORDER BY id")]

    def robots(self, origin: str, since: float) -> tuple[str | None] | None:
        """What `set_robots` kept at or after `since`, in a tuple of one; None if nothing."""
        query = "SELECT content FROM robots WHERE origin = ? AND fetched >= ?"
        return self._db.execute(query, (origin, since)).fetchone()

    def set_robots(self, origin: str, at: float, content: str | None) -> None:
        """Keep a host's robots.txt; None is one that can't be read."""
        with self._change():
            self._db.execute(
                "INSERT OR REPLACE INTO robots VALUES (?, ?, ?)", (origin, at, content)
            )

    def retry_failed(self) -> None:
        """Make pending again what failed for reasons that may have passed."""
        with self._change():
            for table in ("list", "video", "part"):
                self._db.execute(f"UPDATE {table} SET state = 'pending' WHERE state LIKE 'failed%'")

    def next_list(self) -> ListTask | None:
        """The first list still to be fetched."""
        query = "SELECT id, zone, path FROM list WHERE state = 'pending' ORDER BY id LIMIT 1"
        row = self._db.execute(query).fetchone()
        return row and ListTask(*row)

    def next_video(self) -> tuple[int, str] | None:
        """Row and bvid of the first video whose parts are still unknown."""
        query = "SELECT id, bvid FROM video WHERE state = 'pending' ORDER BY id LIMIT 1"
        return self._db.execute(query).fetchone()

    def next_part(self) -> PartTask | None:
        """The first part whose chats are still to be fetched."""
        row = self._db.execute(
            "SELECT part.id, bvid, aid, cid, duration, source, tries FROM part "
            "JOIN video ON video.id = part.video WHERE part.state = 'pending' "
            "ORDER BY video.id, page LIMIT 1"
        ).fetchone()
        return row and PartTask(*row)

    def finish_list(
        self, task: ListTask, state: str, videos: Sequence[Video] = (), last: bool = False
    ) -> None:
        """Keep a list's videos; `last`: further pages of its series are not needed.

        With a zone's last list its most played videos are chosen, and stay chosen.
        """
        with self._change():
            self._db.execute("UPDATE list SET state = ? WHERE id = ?", (state, task.id))
            if last:
                self._db.execute(
                    "UPDATE list SET state = 'not needed' WHERE state = 'pending' AND series = "
                    "(SELECT series FROM list WHERE id = ?)",
                    (task.id,),
                )
            self._db.executemany(
                "INSERT OR IGNORE INTO candidate VALUES (?, ?, ?, ?)",
                [(task.zone, v.bvid, v.plays, v.model_dump_json()) for v in videos],
            )
            open_lists = self._db.execute(
                "SELECT 1 FROM list WHERE zone = ? AND (state = 'pending' OR state LIKE 'failed%')",
                (task.zone,),
            ).fetchone()
            if open_lists is None:
                self._choose(task.zone)

    def finish_video(self, row: int, state: str, video: Video | None = None) -> None:
        """Keep what is known of a video, and its parts."""
        with self._change():
            if video is not None:
                self._db.execute(
                    "UPDATE video SET aid = ?, title = ?, tid = ?, tid_v2 = ?, plays = ?, "
                    "pubdate = ? WHERE id = ?",
                    (*_columns(video), row),
                )
                self._add_parts(row, video.parts)
            self._db.execute("UPDATE video SET state = ? WHERE id = ?", (state, row))

    def finish_part(
        self,
        task: PartTask,
        state: str,
        chats: Chats | None = None,
        *,
        source: str = "xml",
        tries: int = 0,
    ) -> None:
        """Keep a part's chats, or those of one of its segments if `state` is "pending" still."""
        with self._change():
            if chats is not None:
                keyed = state == "pending" or source != "xml"
                secret = bytes.fromhex(self.get("secret"))
                self._db.executemany(
                    "INSERT OR IGNORE INTO chat (part, key, second, text) VALUES (?, ?, ?, ?)",
                    [
                        (task.id, _hash(secret, c.key) if keyed else None, c.second, c.text)
                        for c in chats.chats
                    ],
                )
                self._db.executemany(
                    "INSERT INTO dropped VALUES (?, ?) "
                    "ON CONFLICT (reason) DO UPDATE SET count = count + excluded.count",
                    chats.dropped.items(),
                )
            if state != "pending":
                self._db.execute(
                    "UPDATE chat SET key = NULL WHERE part = ? AND key IS NOT NULL", (task.id,)
                )
            self._db.execute(
                "UPDATE part SET state = ?, source = ?, tries = ? WHERE id = ?",
                (state, source, tries, task.id),
            )

    def progress(self) -> tuple[int, int]:
        """How many lists, videos and parts are still to be dealt with, and how many are."""
        left = done = 0
        for table in ("list", "video", "part"):
            rows = self._db.execute(
                f"SELECT COUNT(*), COUNT(CASE state WHEN 'pending' THEN 1 END) FROM {table}"
            )
            every, pending = rows.fetchone()
            left, done = left + pending, done + every - pending
        return left, done

    def counts(self) -> dict[str, dict[str, int]]:
        """Of lists, videos and parts: how many are in which state; of chats: why dropped."""
        counted: dict[str, dict[str, int]] = {}
        for table in ("list", "video", "part"):
            rows = self._db.execute(f"SELECT state, COUNT(*) FROM {table} GROUP BY state")
            counted[f"{table}s"] = dict(sorted(rows))
        rows = self._db.execute("SELECT reason, count FROM dropped ORDER BY reason")
        return counted | {"dropped": dict(rows)}

    def videos(self) -> Iterator[tuple[Any, ...]]:
        """bvid, title, tid, tid_v2, plays, pubdate of each video with a part, in order."""
        rows = self._db.execute(
            "SELECT bvid, title, tid, tid_v2, plays, pubdate FROM video "
            "WHERE EXISTS (SELECT 1 FROM part WHERE part.video = video.id) ORDER BY id"
        )
        return ((*row[:5], date.fromisoformat(row[5])) for row in rows)

    def chats(self) -> Iterator[tuple[str, float, str]]:
        """bvid, second and text of each chat: by video, part and place in the document."""
        return self._db.execute(
            "SELECT bvid, second, text FROM video JOIN part ON part.video = video.id "
            "JOIN chat ON chat.part = part.id ORDER BY video.id, page, chat.id"
        )

    def _open(self, plan: dict[str, Any]) -> None:
        # Exclusive: the lock of a killed process is gone with it, and there is no -shm file.
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute("PRAGMA secure_delete = ON")
        with self._change():
            if self._db.execute("SELECT name FROM sqlite_master").fetchone() is None:
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                self._begin(plan)
        before = self.get("plan", {})
        # The lists follow from the rest, and where no days are given from the day of the start.
        if changed := sorted(k for k in plan if k != "lists" and before.get(k) != plan[k]):
            raise InputError(
                f"{self.file}: belongs to a crawl with another {', '.join(changed)}; give the same "
                "options to resume it, or another --out to start anew"
            )
        self._opened = True

    def _begin(self, plan: dict[str, Any]) -> None:
        self._set({"plan": plan, "secret": secrets.token_hex(16)})
        for series, (zone, paths) in enumerate(plan["lists"]):
            self._db.executemany(
                "INSERT INTO list (zone, series, path) VALUES (?, ?, ?)",
                [(zone, series, path) for path in paths],
            )
        self._db.executemany(
            "INSERT INTO video (bvid, state) VALUES (?, 'pending')",
            [(bvid,) for bvid in plan["bvids"]],
        )

    def _choose(self, zone: int) -> None:
        wanted = self.get("plan")["videos_per_zone"]
        rows = self._db.execute(
            "SELECT video FROM candidate WHERE zone = ? "
            "AND bvid NOT IN (SELECT bvid FROM video) ORDER BY plays DESC, bvid LIMIT ?",
            (zone, wanted),
        ).fetchall()
        for (text,) in rows:
            video = Video.model_validate_json(text)
            added = self._db.execute(
                "INSERT INTO video (bvid, aid, title, tid, tid_v2, plays, pubdate, state) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (video.bvid, *_columns(video), "done" if video.parts else "pending"),
            )
            self._add_parts(added.lastrowid or 0, video.parts)
        self._db.execute("DELETE FROM candidate WHERE zone = ?", (zone,))

    def _add_parts(self, video: int, parts: Iterable[Part]) -> None:
        self._db.executemany(
            "INSERT OR IGNORE INTO part (video, cid, page, duration) VALUES (?, ?, ?, ?)",
            [(video, part.cid, part.page, part.duration) for part in parts],
        )

    def _set(self, values: dict[str, Any]) -> None:
        rows = [(key, json.dumps(value, ensure_ascii=False)) for key, value in values.items()]
        self._db.executemany("INSERT OR REPLACE INTO state VALUES (?, ?)", rows)

    @contextmanager
    def _change(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def _columns(video: Video) -> tuple[Any, ...]:
    return video.aid, video.title, video.tid, video.tid_v2, video.plays, video.pubdate.isoformat()


def _hash(secret: bytes, key: int) -> bytes:
    return hashlib.blake2b(str(key).encode(), key=secret, digest_size=16).digest()
