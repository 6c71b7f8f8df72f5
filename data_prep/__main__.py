"""`python -m data_prep COMMAND`: make and inspect datasets."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow.compute as pc

from data_prep.dataset import write_dataset
from data_prep.sample import make_sample
from launcher.errors import InputError

# Imported when asked for: what one command needs takes longer to load than another to run.
_OTHERS = {
    "data_prep.crawl.command": (("crawl", "fake-site"), "add_crawl"),
    "data_prep.importers": (("import",), "add_import"),
    "data_prep.build": (("build",), "add_build"),
    "data_prep.audit.command": (("audit",), "add_audit"),
}
_NAMES = {"sample"}.union(*(names for names, _ in _OTHERS.values()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 wrong input (one line on stderr)."""
    parser = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    given = list(sys.argv[1:] if arguments is None else arguments)
    _add_sample(commands)
    for module, (names, add) in _OTHERS.items():
        if not given or given[0] in names or given[0] not in _NAMES:
            getattr(importlib.import_module(module), add)(commands)
    options = parser.parse_args(given)
    try:
        options.run(options)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _add_sample(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("sample", help="write a synthetic dataset folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    parser.add_argument("--size", type=int, default=6000, help="texts in all splits (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--labels", choices=["main5", "zones21"], default="main5")
    parser.set_defaults(run=_sample)


def _sample(options: argparse.Namespace) -> None:
    dataset = make_sample(size=options.size, seed=options.seed, labels=options.labels)
    write_dataset(options.out, dataset)
    print(f"{options.out}: SYNTHETIC texts from the built-in phrase bank, seed {options.seed}")
    for split, table in dataset.splits.items():
        counts = {
            count["values"]: count["counts"]
            for count in pc.value_counts(table["label"]).to_pylist()
        }
        balance = "  ".join(
            f"{name} {counts.get(index, 0) / table.num_rows:.1%}"
            for index, name in enumerate(dataset.labels)
        )
        print(f"{split:5} {table.num_rows:6} texts: {balance}")


if __name__ == "__main__":
    sys.exit(main())
