"""The crawl: from zones or named videos to their chats, one answer at a time.

Every answer is dealt with in one change of the journal, so a crawl can be cut off anywhere: started
again, it asks for nothing that it has, and ends with the same files.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.chats_folder import CHATS, VIDEOS
from data_prep.crawl.answers import AnswerError, Video, read_newlist, read_ranking, read_view
from data_prep.crawl.client import Client, Manners
from data_prep.crawl.journal import Journal, ListTask, PartTask
from data_prep.crawl.plan import PAGE, zone_of
from data_prep.danmaku import Chats, DanmakuError, read_segment, read_xml
from launcher.files import replacing, write_json
from launcher.progress import Progress

SEGMENT_S = 360
"""Length of video that one protobuf segment covers."""


def crawl(out: Path, plan: dict[str, Any], manners: Manners) -> dict[str, Any]:
    """Fetch what `plan` names and is not in `out`/journal.sqlite yet, and write the corpus.

    `chats.parquet` (`CHATS`: by video, part and place in the document) and `videos.parquet`
    (`VIDEOS`) depend on the answers alone, not on interruptions; `crawl.json`, which is returned,
    says where they come from and what is missing. Raises InputError and
    `data_prep.crawl.client.Stopped` as `Client.get` does.
    """
    with closing(Journal(out / "journal.sqlite", plan)) as journal:
        with closing(Client(journal, manners)) as client:
            journal.retry_failed()
            _Crawl(journal, client, manners).run()
        return _export(out, journal)


class _Crawl:
    def __init__(self, journal: Journal, client: Client, manners: Manners) -> None:
        self.journal, self.client, self.manners = journal, client, manners
        self.api, self.comment, self.www = journal.get("plan")["hosts"]
        self.named = bool(journal.get("plan")["bvids"])

    def run(self) -> None:
        left, done = self.journal.progress()
        progress = Progress("crawl", left + done, "answers", done=done)
        while self._step():
            left, done = self.journal.progress()
            progress.total = left + done
            progress.advance(done - progress.done)
        progress.finish()

    def _step(self) -> bool:
        """Fetch and keep one thing; False if nothing is left."""
        if task := self.journal.next_list():
            self._list(task)
        elif video := self.journal.next_video():
            self._video(*video)
        elif part := self.journal.next_part():
            if part.source == "xml":
                self._document(part)
            else:
                self._segment(part)
        else:
            return False
        return True

    def _list(self, task: ListTask) -> None:
        signal = self.client.get(self.api, task.path, "json")
        if signal.meaning != "ok":
            self.journal.finish_list(task, _state(signal.meaning, signal.reason))
            return
        try:
            if "newlist_rank" in task.path:
                videos = read_newlist(signal.data, zone_of(task.path))
                self.journal.finish_list(task, "done", videos, last=len(videos) < PAGE)
            else:
                videos = read_ranking(signal.data, zone_of(task.path), self._today())
                self.journal.finish_list(task, "done", videos)
        except AnswerError as error:
            self.journal.finish_list(task, f"gone: {error}")

    def _video(self, row: int, bvid: str) -> None:
        if self.named:
            signal = self.client.get(self.www, f"/video/{bvid}/", "page")
        else:
            signal = self.client.get(self.api, f"/x/web-interface/view?bvid={bvid}", "json")
        video: Video | None = None
        state = _state(signal.meaning, signal.reason)
        if signal.meaning == "ok":
            try:
                video = read_view(signal.data, bvid)
            except AnswerError as error:
                state = f"gone: {error}"
        self.journal.finish_video(row, state, video)

    def _document(self, part: PartTask) -> None:
        """A part's chats as XML: all in one answer."""
        signal = self.client.get(self.comment, f"/{part.cid}.xml", "xml")
        if signal.meaning in ("retry", "empty"):
            self.journal.finish_part(part, _state(signal.meaning, signal.reason))
            return
        chats = Chats(partial=True)
        reason = signal.reason
        if signal.meaning == "ok":
            try:
                chats = read_xml(signal.data)
            except DanmakuError as error:
                reason = str(error)
        if signal.meaning == "ok" and chats.partial and part.tries == 0:
            self.journal.finish_part(part, "pending", tries=1)  # once more
        elif chats.chats or not chats.partial:
            state = "closed" if chats.closed else "partial" if chats.partial else "done"
            self.journal.finish_part(part, state, chats, tries=part.tries)
        elif not self.named and part.aid is not None:
            self.journal.finish_part(part, "pending", source="segments")
        else:
            self.journal.finish_part(part, f"gone: {reason or 'no chat in a broken document'}")

    def _segment(self, part: PartTask) -> None:
        """The next of a part's protobuf segments: fewer chats than XML, but better than none."""
        number = part.tries + 1
        path = f"/x/v2/dm/web/seg.so?type=1&oid={part.cid}&pid={part.aid}&segment_index={number}"
        signal = self.client.get(self.api, path, "protobuf")
        if signal.meaning in ("retry", "skip"):
            state = _state(signal.meaning, signal.reason)
            self.journal.finish_part(part, state, source=part.source, tries=part.tries)
            return
        chats = read_segment(signal.data) if signal.meaning == "ok" else Chats()
        if chats.partial and part.source == "segments":
            self.journal.finish_part(part, "pending", source="segments again", tries=part.tries)
            return
        if chats.partial:
            chats.dropped["rest of a segment"] += 1
        last = chats.closed or number >= max(1, math.ceil(part.duration / SEGMENT_S))
        state = ("closed" if chats.closed else "done") if last else "pending"
        self.journal.finish_part(part, state, chats, source="segments", tries=number)

    def _today(self) -> date:
        return (datetime.fromtimestamp(self.manners.now(), UTC) + timedelta(hours=8)).date()


def _state(meaning: str, reason: str) -> str:
    states = {"ok": "done", "empty": "empty", "skip": "gone", "retry": "failed"}
    return f"{states[meaning]}: {reason}" if meaning in ("skip", "retry") else states[meaning]


def _export(out: Path, journal: Journal) -> dict[str, Any]:
    videos = _table(journal.videos(), VIDEOS)
    with replacing(out / "videos.parquet") as temporary:
        pq.write_table(videos, temporary, compression="zstd")
    rows, chats = 0, journal.chats()
    with (
        replacing(out / "chats.parquet") as temporary,
        pq.ParquetWriter(temporary, CHATS, compression="zstd") as writer,
    ):
        while (batch := _table(islice(chats, 100_000), CHATS)).num_rows:
            writer.write_table(batch)
            rows += batch.num_rows
    api, comment, www = journal.get("plan")["hosts"]
    summary = {
        "synthetic": not journal.get("real", False),
        "hosts": {"api": api, "comment": comment, "www": www},
        "zones": journal.get("plan")["zones"],
        "videos": videos.num_rows,
        "chats": rows,
        "requests": journal.get("spent", 0),
        "states": journal.counts(),
        "notes": journal.notes(),
    }
    write_json(out / "crawl.json", summary)
    return summary


def _table(rows: Iterable[Sequence[Any]], schema: pa.Schema) -> pa.Table:
    names = schema.names
    return pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], schema)
