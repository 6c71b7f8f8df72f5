"""The fake site's scenarios: each is one way in which the real site has been seen to behave."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from data_prep.crawl.signals import VOUCHER_HEADER

Route = Literal["robots", "ranking", "newlist", "view", "page", "xml", "segment"]


@dataclass(frozen=True)
class Reply:
    """An answer over HTTP."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True)
class Fault:
    """What happens on a route instead of the answer, or to it.

    It befalls the `first` resource asked for there (counted from 0, however often it is asked for)
    and, if `onward`, all later ones; each at its first `times` requests, or always if None.
    `act`: "reply" sends `reply`; "hang" sends nothing; "reset" breaks the connection in the middle;
    "cut" leaves out the end of the document; "corrupt" appends `reply.body` to it.
    """

    route: Route
    reply: Reply = Reply()
    act: Literal["reply", "hang", "reset", "cut", "corrupt"] = "reply"
    first: int = 1
    onward: bool = False
    times: int | None = None


@dataclass(frozen=True)
class Scenario:
    """One way to behave.

    `content` changes every document (see `fake_site`), `encoding` how they are compressed:
    "raw" deflate without header, "zlib", "plain", "mislabelled" (says deflate, is not) or
    "unlabelled" (raw deflate, does not say so). `robots` replaces robots.txt for the host 127.0.0.1
    (localhost stays open).
    """

    about: str
    faults: tuple[Fault, ...] = ()
    content: str = ""
    encoding: str = "raw"
    robots: Reply | None = None


_TEXT = {"Content-Type": "text/plain; charset=utf-8"}
_HTML = {"Content-Type": "text/html; charset=utf-8"}
_JSON = {"Content-Type": "application/json; charset=utf-8"}
WEB_PAGE = b"<!DOCTYPE html><html><body>SYNTHETIC page: something else than asked for</body></html>"
OPEN_ROBOTS = Reply(200, _TEXT, b"User-agent: *\nDisallow: /medialist/detail/\n")
REFUSED = Reply(412, _HTML, WEB_PAGE)
NOT_FOUND = Reply(404, _HTML, WEB_PAGE)


def json_reply(code: int = 0, data: Any = None, **headers: str) -> Reply:
    """The envelope in which the site sends JSON."""
    value = {"code": code, "message": str(code), "ttl": 1, "data": data}
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Reply(200, _JSON | named, json.dumps(value, ensure_ascii=False).encode())


def _codes(about: str, route: Route, *codes: int, **fault: Any) -> dict[str, Scenario]:
    return {
        f"code_{abs(code)}": Scenario(
            f"{about}: code {code}", (Fault(route, json_reply(code), **fault),)
        )
        for code in codes
    }


_VOUCHER = {"v_voucher": "voucher_synthetic"}
_NO_XML = Fault("xml", NOT_FOUND, first=0, onward=True)

SCENARIOS: dict[str, Scenario] = {
    "normal": Scenario("as the site is on a good day"),
    # robots.txt
    "robots_disallow": Scenario(
        "robots.txt refuses everything", robots=Reply(200, _TEXT, b"User-agent: *\nDisallow: /\n")
    ),
    "robots_html": Scenario("a web page as robots.txt", robots=Reply(200, _HTML, WEB_PAGE)),
    "robots_missing": Scenario("no robots.txt", robots=NOT_FOUND),
    # documents
    "deflate_zlib": Scenario("deflate with its header", encoding="zlib"),
    "deflate_not": Scenario("says deflate, is plain", encoding="mislabelled"),
    "deflate_unlabelled": Scenario("deflate, does not say so", encoding="unlabelled"),
    "plain": Scenario("documents uncompressed", encoding="plain"),
    "control_characters": Scenario("raw and as &#22;", content="control_characters"),
    "bare_ampersand": Scenario("XML with bare & and <", content="bare_ampersand"),
    "odd_rows": Scenario("bad values, empty texts, all modes and pools", content="odd_rows"),
    "duplicate_ids": Scenario("chats sent twice in a document", content="duplicate_ids"),
    "truncated_once": Scenario("a document cut off", (Fault("xml", act="cut", times=1),)),
    "truncated": Scenario("a document always cut off", (Fault("xml", act="cut"),)),
    "closed": Scenario("chats switched off", content="closed"),
    "xml_304": Scenario("a document without content", (Fault("xml", Reply(304)),)),
    "no_chats": Scenario("a document without chats", content="no_chats"),
    # protobuf, where there is no XML
    "segments": Scenario("no XML at all: protobuf", (_NO_XML,)),
    "segments_duplicates": Scenario("chats again in the next one", (_NO_XML,), "duplicate_ids"),
    "segments_closed": Scenario("chats switched off", (_NO_XML,), "closed"),
    "segments_304": Scenario("nothing behind the last one", (_NO_XML,), "longer"),
    "segments_empty": Scenario("0 bytes", (_NO_XML, Fault("segment", Reply()))),
    "segments_bad_varint": Scenario(
        "a number without end",
        (_NO_XML, Fault("segment", Reply(body=b"\x08" + b"\xff" * 11), "corrupt", times=1)),
    ),
    "segments_wire_type_3": Scenario(
        "a group", (_NO_XML, Fault("segment", Reply(body=b"\x0b"), "corrupt"))
    ),
    "segments_html": Scenario(
        "a web page as protobuf", (_NO_XML, Fault("segment", Reply(200, _HTML, WEB_PAGE)))
    ),
    # stop
    "http_412": Scenario("blocked", (Fault("xml", REFUSED),)),
    **_codes("risk control", "ranking", -412, -401, first=0),
    "code_352": Scenario(
        "risk control, with a voucher",
        (Fault("view", json_reply(-352, _VOUCHER, **{VOUCHER_HEADER: "voucher_synthetic"})),),
    ),
    "voucher_only": Scenario(
        "code 0 and nothing but a voucher", (Fault("ranking", json_reply(0, _VOUCHER), first=0),)
    ),
    "html_for_json": Scenario(
        "a web page as JSON", (Fault("ranking", Reply(200, _HTML, WEB_PAGE), first=0),)
    ),
    "html_for_xml": Scenario("a web page as XML", (Fault("xml", Reply(200, _HTML, WEB_PAGE)),)),
    # slower
    **_codes("too frequent, once", "view", -799, -702, -509, times=1),
    "http_429": Scenario(
        "too frequent, once, come back in 90 s",
        (Fault("xml", Reply(429, {"Retry-After": "90"}), times=1),),
    ),
    "http_429_always": Scenario("too frequent, always", (Fault("xml", Reply(429)),)),
    # again
    "http_500_once": Scenario("server error, then well", (Fault("xml", Reply(500), times=1),)),
    "http_500_always": Scenario("server error on one document", (Fault("xml", Reply(500)),)),
    "http_500_down": Scenario("server errors only", (Fault("xml", Reply(500), onward=True),)),
    **_codes("server error, once", "view", -500, -503, -504, -8888, times=1),
    "hang": Scenario("no answer, once", (Fault("xml", act="hang", times=1),)),
    "reset": Scenario("connection broken, once", (Fault("xml", act="reset", times=1),)),
    "bad_deflate": Scenario(
        "broken compression, once",
        (Fault("xml", Reply(200, {"Content-Encoding": "deflate"}, b"\xff\x00\xff"), times=1),),
    ),
    # skip
    "code_403": Scenario("one video forbidden", (Fault("view", json_reply(-403)),)),
    "code_403_always": Scenario("all forbidden", (Fault("view", json_reply(-403), onward=True),)),
    **_codes("one video gone or restricted", "view", -404, 62002, 62004, 62012, -688, -689),
    **_codes("needs a login, or our mistake", "view", -101, -10),
    "code_400": Scenario("a zone without ranking", (Fault("ranking", json_reply(-400), first=0),)),
    "page_62012": Scenario("a video's page says private", content="private_page"),
    # lists that look well and are not
    "stale_ranking": Scenario("an old zone id answers with old data", content="stale_ranking"),
    "wrong_zone": Scenario("the zone is ignored: the whole site's list", content="wrong_zone"),
    "two_zones": Scenario("one video in two zones' lists", content="two_zones"),
}
