"""A local server with the interfaces of the real site and SYNTHETIC content, for tests and demos.

It answers on 127.0.0.1 only, says in a header of every answer that it is synthetic, keeps a log of
requests, and misbehaves as its scenario says.
"""

import json
import re
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from data_prep.crawl.client import SYNTHETIC_HEADER
from data_prep.crawl.fake_content import (
    SEGMENT_MS,
    Content,
    FakeChat,
    element,
    list_item,
    newlist_item,
    view,
    xml_document,
    xml_row,
)
from data_prep.crawl.scenarios import (
    NOT_FOUND,
    OPEN_ROBOTS,
    REFUSED,
    SCENARIOS,
    WEB_PAGE,
    Fault,
    Reply,
    Route,
    json_reply,
)
from launcher.errors import InputError

_XML = {"Content-Type": "text/xml"}
_PROTOBUF = {"Content-Type": "application/octet-stream"}
_HTML = {"Content-Type": "text/html; charset=utf-8"}


class FakeSite(ThreadingHTTPServer):
    """The server; `address` is its base address, `log` one entry per request.

    An entry has `at` (seconds of the machine's monotonic clock when it came in), `host`, `path`,
    `agent` and `status` (0: none was sent); with `log_file` each is also a line of JSON there.
    Raises InputError for an unknown scenario or a port that is taken.
    """

    daemon_threads = True

    def __init__(
        self,
        content: Content,
        scenario: str = "normal",
        port: int = 0,
        log_file: Path | None = None,
    ) -> None:
        if scenario not in SCENARIOS:
            raise InputError(f"--scenario: {scenario!r}; expected one of {', '.join(SCENARIOS)}")
        self.content, self.scenario = content, SCENARIOS[scenario]
        self.log: list[dict[str, Any]] = []
        self.closing = threading.Event()
        self._log_file, self._lock = log_file, threading.Lock()
        self._asked: dict[Route, Counter[str]] = {}
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise InputError(f"--port: {port}: {error.strerror}; 0 takes a free one") from None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def server_close(self) -> None:
        self.closing.set()
        super().server_close()

    def record(self, entry: dict[str, Any]) -> None:
        """Keep an entry of the log."""
        with self._lock:
            self.log.append(entry)
            if self._log_file is not None:
                with self._log_file.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def fault(self, route: Route, resource: str) -> Fault | None:
        """The fault that befalls this request; counts it."""
        with self._lock:
            asked = self._asked.setdefault(route, Counter())
            asked[resource] += 1
            place, times = list(asked).index(resource), asked[resource]
        for fault in self.scenario.faults:
            hit = place == fault.first or (fault.onward and place > fault.first)
            if route == fault.route and hit and (fault.times is None or times <= fault.times):
                return fault
        return None

    def answer(self, path: str, host: str, agent: str) -> tuple[Route | None, str, Reply]:
        """Route, resource and the answer on a good day."""
        parts = urlsplit(path)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        if parts.path == "/robots.txt":
            local = host.startswith("localhost")
            return "robots", path, (not local and self.scenario.robots) or OPEN_ROBOTS
        if not agent or re.search("curl|python", agent, re.IGNORECASE):
            return None, path, REFUSED
        if parts.path == "/x/web-interface/ranking/v2":
            return "ranking", path, self._ranking(int(query.get("rid", "0")))
        if parts.path == "/x/web-interface/newlist_rank":
            return "newlist", path, self._newlist(query)
        if parts.path == "/x/web-interface/view":
            return "view", path, self._view(query.get("bvid", ""))
        if found := re.fullmatch(r"/video/(BV\w{10})/", parts.path):
            return "page", path, self._page(found[1])
        if found := re.fullmatch(r"/(\d+)\.xml", parts.path):
            return "xml", path, self._document(int(found[1]))
        if parts.path == "/x/v2/dm/web/seg.so":
            cid, number = int(query.get("oid", "0")), int(query.get("segment_index", "0"))
            return "segment", path, self._segment(cid, number)
        return None, path, NOT_FOUND

    def _ranking(self, rid: int) -> Reply:
        if self.scenario.content == "wrong_zone":
            rid = 0
        # The most played hundred, but not in that order.
        best = sorted(self.content.of_zone(rid), key=lambda v: (-v.plays, v.bvid))[:100]
        if self.scenario.content == "stale_ranking":
            best = [replace(v, pubdate=v.pubdate - 60 * 86_400) for v in best]
        if self.scenario.content == "two_zones":
            best += [v for v in self.content.videos[:1] if v not in best]
        return json_reply(0, {"list": [list_item(v) for v in sorted(best, key=lambda v: v.title)]})

    def _newlist(self, query: dict[str, str]) -> Reply:
        try:
            tid, page, size = (int(query[name]) for name in ("cate_id", "page", "pagesize"))
            first, last = query["time_from"], query["time_to"]
        except (KeyError, ValueError):
            return json_reply(-10)
        found = [
            video
            for video in self.content.of_zone(tid)
            if first <= time.strftime("%Y%m%d", time.gmtime(video.pubdate + 8 * 3600)) <= last
        ]
        if self.scenario.content == "two_zones":
            found += [v for v in self.content.videos[:1] if v not in found]
        found.sort(key=lambda v: (-v.plays, v.bvid))
        shown = found[(page - 1) * size : page * size]
        data = {"numResults": len(found), "page": page, "pagesize": size}
        return json_reply(0, data | {"result": [newlist_item(v) for v in shown] or None})

    def _view(self, bvid: str) -> Reply:
        video = self.content.by_bvid.get(bvid)
        if video is None:
            return json_reply(-404)
        return json_reply(0, view(video, extra_s=360 if self.scenario.content == "longer" else 0))

    def _page(self, bvid: str) -> Reply:
        video = self.content.by_bvid.get(bvid)
        error = {"trueCode": -404 if video is None else 0, "message": ""}
        if self.scenario.content == "private_page":
            video, error = None, {"trueCode": 62012, "message": ""}
        state = {"error": error, "videoData": view(video) if video else {}}
        script = f"window.__INITIAL_STATE__={json.dumps(state, ensure_ascii=False)};(function(){{}}"
        return Reply(
            200, _HTML, WEB_PAGE.replace(b"</body>", f"<script>{script}</script>".encode())
        )

    def _document(self, cid: int) -> Reply:
        if cid not in self.content.by_cid:
            return NOT_FOUND
        content, chats = self.scenario.content, self.content.chats(cid)
        if content in ("closed", "no_chats"):
            return self._packed(xml_document(cid, "", closed=content == "closed"))
        rows = []
        for chat in chats:
            text = None
            if content == "control_characters":
                text = f"\x08{chat.text[:1]}&#22;{chat.text[1:]}\x13&#x1c;"
            elif content == "bare_ampersand":
                text = f"{chat.text} & <3"
            rows.append(xml_row(chat, old=chat.key % 2 == 0, text=text))
        if content == "odd_rows":
            rows += _odd_rows(chats[0])
        if content == "duplicate_ids":
            rows += [xml_row(replace(chat, text="不该有"), old=False) for chat in chats[:5]]
        return self._packed(xml_document(cid, "".join(rows)))

    def _packed(self, document: bytes) -> Reply:
        headers = {"Content-Encoding": "deflate"}
        if self.scenario.encoding in ("plain", "unlabelled"):
            headers = {}
        if self.scenario.encoding in ("raw", "unlabelled"):
            packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
            document = packer.compress(document) + packer.flush()
        elif self.scenario.encoding == "zlib":
            document = zlib.compress(document)
        return Reply(200, _XML | headers, document)

    def _segment(self, cid: int, number: int) -> Reply:
        if cid not in self.content.by_cid:
            return json_reply(-404)
        if self.scenario.content == "closed":
            return Reply(200, _PROTOBUF, b"\x10\x01")
        chats = self.content.chats(cid)
        inside = [c for c in chats if c.milliseconds // SEGMENT_MS == number - 1]
        _, part = self.content.by_cid[cid]
        if number < 1 or (number - 1) * SEGMENT_MS >= part.duration * 1000:
            return Reply(304)
        if self.scenario.content == "duplicate_ids":
            inside = [c for c in chats if c.milliseconds // SEGMENT_MS < number - 1][-5:] + inside
        return Reply(200, _PROTOBUF, b"".join(map(element, inside)))


class _Handler(BaseHTTPRequestHandler):
    server: FakeSite
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave together
    disable_nagle_algorithm = True
    timeout = 60.0

    def do_GET(self) -> None:
        agent, host = self.headers.get("User-Agent", ""), self.headers.get("Host", "")
        entry = {"at": time.monotonic(), "host": host, "path": self.path, "agent": agent}
        route, resource, reply = self.server.answer(self.path, host, agent)
        fault = self.server.fault(route, resource) if route else None
        if fault and fault.act == "reply":
            reply = fault.reply
        elif fault and fault.act == "cut":
            plain = zlib.decompress(reply.body, -zlib.MAX_WBITS)
            reply = Reply(200, _XML, plain[: len(plain) * 2 // 3])
        elif fault and fault.act == "corrupt":
            reply = replace(reply, body=reply.body + fault.reply.body)
        broken = fault is not None and fault.act in ("hang", "reset")
        self.server.record(entry | {"status": 0 if broken else reply.status})
        if fault and fault.act == "hang":
            self.server.closing.wait(self.timeout)
            self.close_connection = True
            return
        self.send_response_only(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header(SYNTHETIC_HEADER, "invented texts of a built-in phrase bank")
        if reply.status != 304:
            self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if fault and fault.act == "reset":
            self.wfile.write(reply.body[:20])
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return
        if reply.status != 304:
            self.wfile.write(reply.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the log is the site's own."""


def _odd_rows(chat: FakeChat) -> list[str]:
    """None of them is a chat to keep."""
    odd = [
        xml_row(replace(chat, key=n, mode=mode, pool=pool, text="不该有"), old=False)
        for n, (mode, pool) in enumerate([(7, 0), (8, 0), (9, 2), (0, 0), (1, 1), (1, 2)])
    ]
    odd.append(xml_row(replace(chat, key=100, text=""), old=False))
    odd += [
        f'<d p="{p}">不该有</d>' for p in ("", "1,1,25", "x,1,25,0,0,0,0,7,5", "nan,1,25,0,0,0,0,8")
    ]
    return [*odd, "<d>不该有</d>", "<d/>"]
