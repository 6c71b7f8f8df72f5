"""Classify lines with a finished run: `python -m launcher.predict RUN [FILE|-]`.

One text a line in, one JSON object a line out, in the same order: `text`, `label` (null where the
output named none) and `scores`, log-probabilities by label (null where the run has none). A line
without a text gives `{"text": "", "error": "empty text"}`.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from launcher import distributed, engine, run_folder
from launcher.config import Config
from launcher.distributed import World
from launcher.errors import InputError
from launcher.method import Classifier, method_module

_LINES_AT_A_TIME = 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    parser = argparse.ArgumentParser(prog="launcher.predict", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("file", nargs="?", default="-", help="UTF-8 text, one a line; -: stdin")
    arguments = parser.parse_args(argv)
    try:
        with _open(arguments.file) as lines:
            for answer in predict(arguments.run, lines):
                print(json.dumps(answer, ensure_ascii=False), flush=True)
    except InputError as error:
        return distributed.fail(error)
    except UnicodeDecodeError as error:
        return distributed.fail(InputError(f"{arguments.file}: not UTF-8: {error}"))
    except BrokenPipeError:
        return 0
    finally:
        distributed.stop()
    return 0


def predict(run_dir: Path, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The answer to each line, by the method of the run in `run_dir`.

    Raises:
        InputError: the folder holds no run that classifies, or its model is gone.
    """
    run_folder.read_config(run_dir)  # before the seconds that joining a group takes
    config, method = open_run(run_dir, distributed.start())
    labels = config.data.labels or []
    stream = (line.rstrip("\r\n") for line in lines)
    while chunk := list(islice(stream, _LINES_AT_A_TIME)):
        yield from _answers(method, chunk, labels)


def open_run(run_dir: Path, world: World) -> tuple[Config, Any]:
    """The config of a finished run and its method, on the world's device and ready to score.

    Raises:
        InputError: the folder holds no run that classifies, or its model is gone.
    """
    config = run_folder.read_config(run_dir)
    module = method_module(config)
    if not module.CLASSIFIES:
        raise InputError(
            f"{run_dir}: a run of {config.method} classifies nothing; classify with another method "
            f"whose model.path is {run_dir / 'model'}"
        )
    # Each process has the whole model, whatever number of ranks the run was sharded over.
    parallel = config.parallel.model_copy(update={"zero": 0})
    config = config.model_copy(update={"parallel": parallel})
    method: Any = module.build(config, config.data.labels or [])
    engine.place_for_scoring(config, method, world)
    if hasattr(method, "load_export"):
        method.load_export(run_dir)
    return config, method


def scores_of(method: Classifier, texts: Sequence[str], labels: int) -> np.ndarray:
    """[texts, labels] float32 log-probabilities by a method that is ready to score.

    Raises:
        InputError: they are not numbers.
    """
    scores = np.empty((len(texts), labels), dtype=np.float32)
    for batch in method.score_batches(texts) if texts else []:
        scores[batch.rows] = method.scores(batch).float().cpu().numpy()
    engine.check_scores(scores, texts)
    return scores


def _answers(method: Classifier, texts: list[str], labels: list[str]) -> Iterator[dict[str, Any]]:
    asked = sorted({text for text in texts if text.strip()})
    scores = scores_of(method, asked, len(labels))
    place = {text: row for row, text in enumerate(asked)}
    for text in texts:
        if text not in place:
            yield {"text": text, "error": "empty text"}
            continue
        row = scores[place[text]]
        named = np.isfinite(row)
        yield {
            "text": text,
            "label": labels[int(row.argmax())] if named.any() else None,
            "scores": dict(zip(labels, row.tolist(), strict=True)) if named.all() else None,
        }


def _open(file: str) -> TextIO:
    if file == "-":
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")  # type: ignore[union-attr]
        return sys.stdin
    try:
        return Path(file).open(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{file}: can't be read: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())
