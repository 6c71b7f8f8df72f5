"""What an answer of the site means: one place for every way it says yes, no, later or stop.

The site says most of it with status 200: an error code in JSON, an answer whose only content is a
voucher for a captcha, or a web page where data should be.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["json", "xml", "protobuf", "page", "robots"]
"""What is asked for; `page` is a video's web page."""

Meaning = Literal["ok", "empty", "skip", "forbidden", "rate", "retry", "risk"]
"""`ok` use it; `empty` nothing there; `skip` never ask again; `forbidden` leave it for now, but
several in a row are a risk; `rate` slow down; `retry` the server's trouble; `risk` stop."""

RISK_CODES = (-412, -352, -401)
RATE_CODES = (-799, -702, -509)
RETRY_CODES = (-500, -503, -504, -8888)
SKIP_CODES = {
    -404: "gone",
    62002: "hidden",
    62004: "under review",
    62012: "private",
    -688: "not in this region",
    -689: "copyright",
    -400: "bad parameter",
    -10: "bad parameter",
    -101: "needs a login",
}
VOUCHER_HEADER = "x-bili-gaia-vvoucher"


@dataclass(frozen=True)
class Signal:
    """Meaning of an answer and why; `data` is what was asked for.

    It is the `data` member of JSON, the video's state of a page, else the bytes.
    """

    meaning: Meaning
    reason: str = ""
    data: Any = None


def read_signal(status: int, headers: Mapping[str, str], body: bytes, kind: Kind) -> Signal:
    """The meaning of an answer; `headers` has names in lower case."""
    content_type = headers.get("content-type", "").lower()
    if VOUCHER_HEADER in headers:
        return Signal("risk", f"header {VOUCHER_HEADER}")
    if status != 200:
        return _status_signal(status)
    is_page = "text/html" in content_type or body.lstrip()[:14].lower().startswith(
        (b"<!doctype html", b"<html")
    )
    if kind == "page":
        return _page_signal(body) if is_page else Signal("risk", f"{content_type} in place of HTML")
    if kind == "robots":
        if "text/plain" in content_type and not is_page:
            return Signal("ok", data=body)
        return Signal("skip", f"{content_type or 'no content type'} in place of text/plain")
    if is_page:
        return Signal("risk", f"a web page in place of {kind}")
    if kind == "json" or "json" in content_type:
        return _json_signal(body, kind)
    if not body:
        return Signal("empty") if kind == "protobuf" else Signal("retry", "no content")
    return Signal("ok", data=body)


def _status_signal(status: int) -> Signal:
    reason = f"HTTP {status}"
    if status in (401, 412):
        return Signal("risk", reason)
    if status == 429:
        return Signal("rate", reason)
    if status >= 500:
        return Signal("retry", reason)
    if status == 403:
        return Signal("forbidden", reason)
    return Signal("empty" if status == 304 else "skip", reason)


def _json_signal(body: bytes, kind: Kind) -> Signal:
    try:
        envelope = json.loads(body)
        code, data = int(envelope["code"]), envelope.get("data")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Signal("retry", "not the JSON expected")
    if code != 0:
        return _code_signal(code)
    if isinstance(data, dict) and data.keys() == {"v_voucher"}:
        return Signal("risk", "code 0 with nothing but a voucher")
    return Signal("ok", data=data) if kind == "json" else Signal("retry", f"JSON, not {kind}")


def _code_signal(code: int) -> Signal:
    reason = f"code {code}"
    if code in RISK_CODES:
        return Signal("risk", reason)
    if code in RATE_CODES:
        return Signal("rate", reason)
    if code in RETRY_CODES:
        return Signal("retry", reason)
    if code == -403:
        return Signal("forbidden", reason)
    if code == -304:
        return Signal("empty", reason)
    return Signal("skip", f"{reason}: {SKIP_CODES.get(code, 'unknown')}")


def _page_signal(body: bytes) -> Signal:
    _, found, rest = body.partition(b"window.__INITIAL_STATE__")
    try:
        text = rest.decode("utf-8", errors="replace")
        state, _ = json.JSONDecoder().raw_decode(text, text.index("{"))
    except (ValueError, RecursionError):
        found = b""
    if not found:
        return Signal("risk", "a page without a video's data: perhaps a captcha")
    error = state.get("error")
    code = error.get("trueCode") if isinstance(error, dict) else None
    if isinstance(code, int) and code != 0:
        return _code_signal(code)
    return Signal("ok", data=state.get("videoData"))
