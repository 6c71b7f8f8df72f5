"""Compare runs: `python -m launcher.report RUN... --out DIR`.

Writes `report.html`, `report.md`, one CSV file per kind of table and `figures/`. Everything shown
is derived anew from the runs' predictions, so it is never out of date, and page, Markdown and CSV
are made from the same tables, so they can't disagree.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import InputError
from launcher.report.content import sections_of
from launcher.report.leaderboard import study_table
from launcher.report.page import overview, write_csv, write_figures, write_markdown, write_page
from launcher.report.runs import groups_of, read_runs


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m launcher.report", description="Compare runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--against",
        choices=["paper"],
        help="put the study's reported figures beside the runs of matching configs",
    )
    arguments = parser.parse_args(argv)
    try:
        for path in write_report(
            arguments.runs, arguments.out, against_paper=arguments.against == "paper"
        ):
            print(path)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def write_report(run_dirs: Sequence[Path], out: Path, *, against_paper: bool = False) -> list[Path]:
    """Write the report on runs into `out`; the same runs give the same bytes.

    Runs are compared in one table only where labels, split, ids and gold labels are the same.

    Returns:
        The Markdown file and the page.

    Raises:
        InputError: a run is missing, unfinished, without predictions or unreadable.
    """
    runs = read_runs(run_dirs)
    sections = sections_of(runs, against_paper=against_paper)
    title = "Comparison of runs" if len(runs) > 1 else runs[0].title
    write_figures(out / "figures", sections)
    write_csv(out, runs, sections)
    return [
        write_markdown(out / "report.md", title, runs, sections),
        write_page(out / "report.html", title, runs, sections),
    ]


def write_run_report(run_dir: Path) -> Path:
    """Write the run's own `report.html`; raises InputError as `write_report` does."""
    runs = read_runs([run_dir])
    sections = sections_of(runs, png=False, quick=True)
    return write_page(run_dir / "report.html", runs[0].title, runs, sections)


def prompts_table(run_dirs: Sequence[Path]) -> str:
    """The table in the study's form as Markdown: one row per config, then the bars to pass."""
    runs = read_runs(run_dirs)
    return overview(runs, [study_table(group) for group in groups_of(runs)])
