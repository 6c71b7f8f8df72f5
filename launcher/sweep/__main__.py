"""Many runs: `python -m launcher.sweep --config C [key=value ...] [--resume | --dry-run]`.

On a cluster: `ray job submit --working-dir . -- python -m launcher.sweep --config C`.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import InputError
from launcher.watchdog import RESUMABLE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code: 0 done, 1 done with failed runs, 2 wrong input, 75
    stopped, to go on with --resume."""
    arguments = _parser().parse_intermixed_args(argv)
    from launcher.sweep.settings import load_sweep

    try:
        sweep = load_sweep(arguments.config, arguments.overrides)
        # Imported here: seconds of imports should not stand before a mistake in the config.
        from launcher.sweep import driver, summary

        if arguments.dry_run:
            for line in summary.dry_run(sweep):
                print(line, flush=True)
            return 0
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        driver.connect()
        trials = driver.run_sweep(sweep, resume=arguments.resume)
        print("\n".join([*summary.leaderboard(trials), *summary.write_summary(sweep, trials)]))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on from here", file=sys.stderr)
        return RESUMABLE
    return int(any(trial.state == "failed" for trial in trials))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launcher.sweep", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="sweep's YAML")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override, as in search.samples=50"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="go on with a sweep that was stopped")
    mode.add_argument("--dry-run", action="store_true", help="list the runs, start nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
