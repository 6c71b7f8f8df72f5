"""`python -m finetune convert SRC.bin DST --config uer_config.json --vocab vocab.txt`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune.uer import convert
from launcher.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    parser = argparse.ArgumentParser(prog="python -m finetune")
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser(
        "convert", help="a UER-py checkpoint of BERT, RoBERTa, ALBERT or GPT-2 to a model folder"
    )
    command.add_argument("source", type=Path, metavar="SRC.bin", help="UER-py checkpoint")
    command.add_argument("folder", type=Path, metavar="DST", help="folder to make")
    command.add_argument("--config", type=Path, required=True, help="UER-py's JSON of the model")
    command.add_argument("--vocab", type=Path, required=True, help="vocab.txt, one token a line")
    given = parser.parse_args(argv)
    try:
        kind = convert(given.source, given.folder, given.config, given.vocab)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{given.folder}: {kind}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
