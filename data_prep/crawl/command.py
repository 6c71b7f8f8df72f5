"""`python -m data_prep crawl` and `python -m data_prep fake-site`."""

import argparse
import contextlib
import sys
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from data_prep.crawl.client import Manners, Stopped, check_manners
from data_prep.crawl.crawl import crawl
from data_prep.crawl.fake_content import Content
from data_prep.crawl.fake_site import FakeSite
from data_prep.crawl.plan import Hosts, describe_plan, make_plan
from data_prep.crawl.scenarios import SCENARIOS
from launcher.errors import InputError

STOPPED = 75
_PORT = 8233
_BASES = ("api", "comment", "www")


def add_crawl(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add both commands to those of `python -m data_prep`."""
    parser = commands.add_parser(
        "crawl",
        help="fetch the chats of the most played videos, politely, resumably",
        epilog="Exit codes: 0 done, 2 wrong input or refused by robots.txt, 75 stopped and "
        "resumable. Without addresses it asks the fake site (fake-site) on this machine.",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="journal and corpus")
    parser.add_argument(
        "--zones",
        nargs="+",
        default=[],
        metavar="ZONE",
        help="ids, or names of first-level zones (default: the study's 21)",
    )
    parser.add_argument("--videos-per-zone", type=int, default=20, metavar="N")
    parser.add_argument(
        "--from",
        dest="first_day",
        type=_day,
        metavar="DAY",
        help="lists of second-level zones: published since (default: 90 days ago)",
    )
    parser.add_argument("--to", dest="last_day", type=_day, metavar="DAY", help="and until")
    parser.add_argument(
        "--bvid-file", type=Path, metavar="FILE", help="videos to fetch, one bvid a line"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, ask for nothing")
    parser.add_argument("--budget", type=int, default=1000, metavar="N", help="most requests ever")
    parser.add_argument(
        "--min-spacing",
        type=float,
        default=3.0,
        metavar="S",
        help="least seconds between requests (%(default)s); at least 1 beyond this machine",
    )
    parser.add_argument("--contact", metavar="TEXT", help="e-mail or web page for the User-Agent")
    parser.add_argument(
        "--ignore-robots-because",
        metavar="REASON",
        help="go on where robots.txt refuses; the reason is kept in the journal",
    )
    for base in _BASES:
        parser.add_argument(
            f"--{base}-base", default=f"http://127.0.0.1:{_PORT}", metavar="URL", help="%(default)s"
        )
    parser.set_defaults(run=_crawl)

    parser = commands.add_parser("fake-site", help="a local site with synthetic chats to crawl")
    parser.add_argument("--port", type=int, default=_PORT, help="0 takes a free one (%(default)s)")
    parser.add_argument("--scenario", default="normal", metavar="NAME", help=", ".join(SCENARIOS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--videos-per-zone", type=int, default=40, metavar="N")
    parser.add_argument("--chats-per-video", type=int, default=60, metavar="N")
    parser.add_argument("--log", type=Path, metavar="FILE", help="a line of JSON for each request")
    parser.set_defaults(run=_fake_site)


def _crawl(options: argparse.Namespace) -> None:
    hosts = Hosts(*(getattr(options, f"{base}_base").rstrip("/") for base in _BASES))
    plan = make_plan(
        hosts,
        zone_names=options.zones,
        bvid_file=options.bvid_file,
        videos_per_zone=options.videos_per_zone,
        first_day=options.first_day,
        last_day=options.last_day,
        today=(datetime.now(UTC) + timedelta(hours=8)).date(),
    )
    manners = Manners(
        spacing_s=options.min_spacing,
        budget=options.budget,
        contact=options.contact,
        ignore_robots_because=options.ignore_robots_because,
    )
    check_manners(manners, {f"--{base}-base": getattr(hosts, base) for base in _BASES})
    if options.dry_run:
        print(describe_plan(plan, manners.spacing_s, manners.budget))
        return
    try:
        summary = crawl(options.out, plan, manners)
    except Stopped as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        raise SystemExit(STOPPED) from None
    except KeyboardInterrupt:
        print("stopped: the same command goes on where it was", file=sys.stderr)
        raise SystemExit(STOPPED) from None
    kind = "SYNTHETIC chats of the fake site" if summary["synthetic"] else "chats"
    print(f"{options.out}: {summary['chats']:,} {kind} of {summary['videos']} videos")
    for what, states in summary["states"].items():
        if states:
            print(f"{what}: " + ", ".join(f"{count} {state}" for state, count in states.items()))


def _fake_site(options: argparse.Namespace) -> None:
    for name, most in (("videos_per_zone", 999), ("chats_per_video", 9999)):
        if not 1 <= (value := getattr(options, name)) <= most:
            raise InputError(f"--{name.replace('_', '-')}: {value}; expected 1 to {most}")
    content = Content(options.seed, options.videos_per_zone, options.chats_per_video)
    with FakeSite(content, options.scenario, options.port, options.log) as site:
        print(site.address, flush=True)
        about = SCENARIOS[options.scenario].about
        print(f"SYNTHETIC videos and chats, seed {options.seed}; {about}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            site.serve_forever()


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a day such as 2026-01-31") from None
