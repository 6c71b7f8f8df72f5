"""`python -m data_prep audit DATASET --out DIR`: write the data card of a dataset."""

import argparse
from pathlib import Path

from data_prep.audit.card import make_card, write_card
from data_prep.dataset import SPLITS, read_dataset
from launcher.errors import InputError


def add_audit(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to those of `python -m data_prep`."""
    parser = commands.add_parser("audit", help="write the data card of a dataset (HTML and JSON)")
    parser.add_argument("dataset", nargs="?", type=Path, metavar="DATASET", help="dataset folder")
    for split in SPLITS:
        parser.add_argument(f"--{split}", type=Path, metavar="FILE", help=f"the {split} split")
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="names in order, index 0 first")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    parser.set_defaults(run=_audit)


def _audit(options: argparse.Namespace) -> None:
    named = {split: getattr(options, split) for split in SPLITS}
    files = {split: file for split, file in named.items() if file is not None}
    if (options.dataset is None) == (not files):
        seen = "both" if files else "neither"
        raise InputError(
            f"audit: {seen} DATASET and --train, --dev or --test; give a dataset folder, or files"
        )
    dataset = read_dataset(options.dataset, files=files or None, labels=options.labels)
    name = ", ".join(file.name for file in files.values()) or options.dataset.absolute().name
    card = make_card(dataset, name)
    for leak in card["leaks"]:
        shares = ", ".join(
            f"{kind} {leak[kind] / leak['texts']:.1%}"
            for kind in ("exact", "normalised", "substring", "video")
            if leak[kind] is not None
        )
        print(f"{leak['split']} against {leak['against']}: {shares}")
    for path in write_card(options.out, card):
        print(path)
