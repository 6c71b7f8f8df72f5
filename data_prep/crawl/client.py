"""Requests to the site: one at a time, slowly, as the site's robots.txt allows, and never again
after it has said stop.

No login, no cookies, no signed requests, no proxies, no borrowed identity: an honest User-Agent,
and where the site wants more than that, the answer is taken as a no.
"""

import ipaddress
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import httpx

from data_prep.crawl.journal import Journal
from data_prep.crawl.robots import Robots, read_robots
from data_prep.crawl.signals import Kind, Signal, read_signal
from data_prep.danmaku import MAX_BYTES, DanmakuError, inflate
from launcher.errors import InputError

AGENT = "danmu-prompt"
SYNTHETIC_HEADER = "x-synthetic"
"""Header by which the fake site says what its texts are."""
FLOOR_S = 1.0
"""Least seconds between requests to hosts that are not this machine."""
TRIES = 4
_MINUTE, _DAY = 60.0, 86_400.0
_LONGEST_WAIT_S = 10 * _MINUTE


class Stopped(Exception):
    """The crawl has to end here and can be resumed; one line."""


@dataclass(frozen=True)
class Manners:
    """How requests are made.

    `spacing_s`: least seconds between an answer and the next request, which comes up to 1.6 times
    as late. `budget`: most requests in the whole crawl, however often it is resumed. `contact`:
    address or web page in the User-Agent. `ignore_robots_because`: the operator's reason to go on
    where robots.txt refuses. `now` and `sleep` are the clock, in seconds since 1970.
    """

    spacing_s: float
    budget: int
    contact: str | None = None
    ignore_robots_because: str | None = None
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 30.0
    now: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep


@dataclass
class Client:
    """Asks the site and tells what its answers mean; see `get`. Close it after use."""

    journal: Journal
    manners: Manners
    _robots: dict[str, Robots | None] = field(default_factory=dict)
    _last: float | None = None

    def __post_init__(self) -> None:
        about = f" (+{self.manners.contact})" if self.manners.contact else ""
        timeout = httpx.Timeout(self.manners.read_timeout_s, connect=self.manners.connect_timeout_s)
        self._http = httpx.Client(
            headers={
                "User-Agent": f"{AGENT}/0.1 bullet-chat study{about}",
                "Accept-Encoding": "gzip, deflate",
            },
            timeout=timeout,
            limits=httpx.Limits(max_connections=1, max_keepalive_connections=1),
            trust_env=False,  # no proxies from the environment
        )
        self._last = self.manners.now()  # a request of a process before this one may be just over

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def get(self, base: str, path: str, kind: Kind) -> Signal:
        """The answer to GET `base` + `path`: "ok", "empty", "skip" or "retry" (given up for now).

        Waits as long as manners, robots.txt and earlier answers ask for. Raises InputError where
        robots.txt refuses, Stopped where the site or the budget says stop.
        """
        robots = self._allowed(base, path)
        signal = self._ask(base + path, kind, robots.delay if robots else 0.0)
        if signal.meaning == "forbidden":
            # In a row they are a risk signal, and then nothing was wrong with the first ones.
            self._count("forbidden", signal.reason)
            return Signal("retry", signal.reason)
        if signal.meaning == "retry":
            self._count("failed", signal.reason)
            return signal
        if any(self.journal.get(name) for name in ("forbidden", "failed", "trips")):
            self.journal.set(forbidden=0, failed=0, trips=0)
        return signal

    def _allowed(self, base: str, path: str) -> Robots | None:
        if base not in self._robots:
            self._robots[base] = self._read_robots(base)
        robots = self._robots[base]
        refusal = robots.refusal(urlsplit(base).path + path) if robots else "can't be read as such"
        if refusal is None:
            return robots
        because = self.manners.ignore_robots_because
        if because is None:
            raise InputError(
                f"{base}/robots.txt: {refusal}; so {path} must not be fetched. Leave this host "
                "out, ask the site for permission, or give --ignore-robots-because REASON"
            )
        overridden = f"{base}/robots.txt overridden ({refusal}) because: {because}"
        if overridden not in self.journal.notes():
            self._note(overridden)
        return robots

    def _read_robots(self, base: str) -> Robots | None:
        """The host's rules, at most a day old; None if what it sends are no rules."""
        now = self.manners.now()
        kept = self.journal.robots(base, since=now - _DAY)
        if kept is None:
            signal = self._ask(f"{base}/robots.txt", "robots", 0.0)
            if signal.meaning == "retry":
                raise Stopped(f"{base}/robots.txt: {signal.reason}; try again later")
            if signal.meaning == "ok":
                content = signal.data[:500_000].decode("utf-8", errors="replace")
            else:
                content = "" if signal.reason in ("HTTP 404", "HTTP 410") else None
            self.journal.set_robots(base, now, content)
        else:
            content = kept[0]
        return None if content is None else read_robots(content, AGENT)

    def _ask(self, url: str, kind: Kind, delay: float) -> Signal:
        """One question, asked again while the site is busy or in trouble."""
        failures = 0
        while True:
            self._wait(delay)
            signal, headers = self._send(url, kind)
            self._last = self.manners.now()
            if signal.meaning == "risk":
                self._trip(signal.reason)
            elif signal.meaning == "rate":
                self._slow_down(signal.reason, headers)
            elif signal.meaning == "retry" and failures + 1 < TRIES:
                pause = random.uniform(0, min(600, 5 * 2**failures))
                failures += 1
                self.journal.set(not_before=self._last + max(pause, _retry_after(headers, self)))
            else:
                if self.journal.get("rates"):
                    self.journal.set(rates=0)
                return signal

    def _wait(self, delay: float) -> None:
        """Sleep until the next request may go out, and count it."""
        spent = self.journal.get("spent", 0)
        if spent >= self.manners.budget:
            raise Stopped(
                f"the budget of {self.manners.budget} requests is spent; a larger --budget goes on"
            )
        now = self.manners.now()
        spacing = max(self.manners.spacing_s, delay) * self.journal.get("slowness", 1)
        pace = (self._last or now) + spacing * random.uniform(1.0, 1.6)
        until = max(pace, self.journal.get("not_before", 0.0))
        if until - now > _LONGEST_WAIT_S:
            at = time.strftime("%Y-%m-%d %H:%M", time.localtime(until))
            raise Stopped(f"cooling down; run the same command again after {at}")
        if until > now:
            self.manners.sleep(until - now)
        self.journal.set(spent=spent + 1)

    def _send(self, url: str, kind: Kind) -> tuple[Signal, Mapping[str, str]]:
        body = bytearray()
        deadline = time.monotonic() + 4 * self.manners.read_timeout_s
        try:
            with self._http.stream("GET", url) as response:
                for chunk in response.iter_raw(65_536):
                    body += chunk
                    if len(body) > MAX_BYTES:
                        return Signal("skip", f"more than {MAX_BYTES:,} bytes"), {}
                    if time.monotonic() > deadline:
                        return Signal("retry", "too slow"), {}
        except httpx.TransportError as error:
            return Signal("retry", type(error).__name__), {}
        finally:
            self._http.cookies.clear()
        headers = {name.lower(): value for name, value in response.headers.items()}
        if SYNTHETIC_HEADER not in headers and not self.journal.get("real"):
            self.journal.set(real=True)
        try:
            content = _decoded(bytes(body), headers.get("content-encoding", ""))
        except DanmakuError as error:
            return Signal("retry", str(error)), headers
        return read_signal(response.status_code, headers, content, kind), headers

    def _trip(self, reason: str) -> None:
        """The breaker: half an hour without a request, twice as long each time, up to a day."""
        trips = self.journal.get("trips", 0) + 1
        pause = min(_DAY, 30 * _MINUTE * 2 ** (trips - 1))
        self._note(f"breaker opened: {reason}")
        self.journal.set(trips=trips, not_before=self.manners.now() + pause)
        raise Stopped(
            f"the site refuses ({reason}): no request for {pause / _MINUTE:.0f} minutes; then the "
            "same command goes on where it stopped"
        )

    def _slow_down(self, reason: str, headers: Mapping[str, str]) -> None:
        rates = self.journal.get("rates", 0) + 1
        if rates >= 3:
            self.journal.set(rates=0)
            self._trip(f"{reason}, three times in a row")
        pause = max(_MINUTE, _retry_after(headers, self))
        slowness = min(64, 2 * self.journal.get("slowness", 1))
        self._note(f"slower: {reason}")
        self.journal.set(rates=rates, slowness=slowness, not_before=self.manners.now() + pause)

    def _count(self, name: str, reason: str) -> None:
        count = self.journal.get(name, 0) + 1
        if count >= 3:
            self.journal.set(**{name: 0})
            self._trip(f"{reason}, three times in a row")
        self.journal.set(**{name: count})

    def _note(self, what: str) -> None:
        self.journal.note(self.manners.now(), what)


def check_manners(manners: Manners, bases: Mapping[str, str]) -> None:
    """Raise InputError unless every base is a plain http(s) address and the manners suit it.

    Hosts other than this machine need a spacing of `FLOOR_S` at least and a contact.
    """
    problems = []
    for option, base in bases.items():
        parts = urlsplit(base)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            problems.append(
                f"{option}: {base!r}; expected an address such as http://127.0.0.1:8233"
            )
        elif not is_loopback(base) and not manners.contact:
            problems.append(
                f"{option}: {parts.hostname} is not this machine; give --contact with an e-mail "
                "address or web page, which goes into the User-Agent"
            )
    away = [base for base in bases.values() if not is_loopback(base)]
    if manners.spacing_s < (FLOOR_S if away else 0.0):
        problems.append(
            f"--min-spacing: {manners.spacing_s}; expected at least {FLOOR_S if away else 0} s"
            + (f" for {away[0]}" if away else "")
        )
    if manners.budget < 1:
        problems.append(f"--budget: {manners.budget}; expected at least 1 request")
    because = manners.ignore_robots_because
    if because is not None and not because.strip():
        problems.append(
            "--ignore-robots-because: empty; give the reason, it is kept in the journal"
        )
    if problems:
        raise InputError("\n".join(problems))


def is_loopback(base: str) -> bool:
    """Whether an address is on this machine."""
    host = urlsplit(base).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _decoded(body: bytes, encoding: str) -> bytes:
    """The content, whichever deflate it is, also where the header says deflate and it isn't."""
    if not body or encoding in ("", "identity"):
        return body
    try:
        return inflate(body)
    except DanmakuError:
        if body.lstrip()[:1] in (b"<", b"{"):
            return body
        raise


def _retry_after(headers: Mapping[str, str], client: Client) -> float:
    """Seconds that Retry-After asks for, at most a day."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return min(float(value[:9]), _DAY)
    try:
        seconds = parsedate_to_datetime(value).timestamp() - client.manners.now()
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), _DAY)
