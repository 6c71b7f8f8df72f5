"""Files that are either the old or the new one, never half of it."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from launcher.errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`, which takes its place when the block ends well.

    Raises:
        InputError: it can't be written, for example because the disk is full.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "no space left on this disk; free some" if full else error.strerror or error
        raise InputError(f"{path}: not written: {reason}") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Around a library that writes into `folder` and whose own errors tell little.

    Raises:
        InputError: it can't be written, for example because the disk is full.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(folder.parent).free if folder.parent.exists() else 0
        raise InputError(
            f"{folder}: not written, with {free:,} bytes left on its disk: free some "
            f"({' '.join(str(error).split())[:200]})"
        ) from None


def write_text(path: Path, text: str) -> None:
    """Write a whole file; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON; see `replacing`."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")
