"""Reports on runs: `python -m launcher.report RUN... --out DIR`; see `command`."""

from launcher.report.command import main, prompts_table, write_report, write_run_report
from launcher.report.runs import SYNTHETIC

__all__ = ["SYNTHETIC", "main", "prompts_table", "write_report", "write_run_report"]
