"""`python -m data_prep COMMAND`: make and inspect datasets."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow.compute as pc

from data_prep.dataset import write_dataset
from data_prep.sample import make_sample
from launcher.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 wrong input (one line on stderr)."""
    parser = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_sample(commands)
    options = parser.parse_args(arguments)
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
