"""python -m prompting.pangu convert SRC DST"""

import argparse
import sys
from pathlib import Path

from launcher.errors import InputError
from prompting.pangu.conversion import DTYPES, convert


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m prompting.pangu")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser(
        "convert", help="a published checkpoint into sharded safetensors for transformers"
    )
    command.add_argument("source", type=Path, help="Megatron or Hugging Face folder")
    command.add_argument("destination", type=Path, help="folder to create")
    command.add_argument(
        "--vocab", dest="vocabulary", type=Path, metavar="FILE", help="sentencepiece vocab.model"
    )
    command.add_argument("--dtype", choices=DTYPES, default="keep")
    command.add_argument("--heads", type=int, help="attention heads, where the files don't say")
    command.add_argument(
        "--vocab-size", type=int, metavar="ROWS", help="rows kept of a padded word embedding"
    )
    command.add_argument("--max-shard-size", default="1GB", metavar="SIZE")
    command.add_argument(
        "--trust-pickle",
        action="store_true",
        help="read files that hold Python objects, which may run code",
    )
    options = vars(parser.parse_args(arguments))
    try:
        convert(**options)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
