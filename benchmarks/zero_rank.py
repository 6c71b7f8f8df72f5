"""A rank that runs a config's steps and measures: `python -m benchmarks.zero_rank FILE`.

FILE is JSON with `config`, the config's values, and `out`, a folder for `RANK.json`. What counts
is private memory, of which the libraries, whose files are mapped, take none: its most, seen every
two milliseconds, less what there was before the model was made.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jieba
import numpy as np
import torch

from data_prep.dataset import read_dataset
from launcher import distributed, engine, machine
from launcher.batching import micro_batches, step_order
from launcher.config import Config, parse_config
from launcher.files import write_json
from launcher.method import method_module
from launcher.optimizer import make_optimizer

_INTERVAL_S = 0.002
_SHARE_FOR_TIME = 3
"""Of all steps or batches one in so many is timed, of all lengths."""


gathered: list[int] = []
"""Bytes of each weight that was gathered, or of several at once."""


class Memory:
    """Follows this process's private memory."""

    def __init__(self) -> None:
        self.before, self.most = private(), 0
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        while True:
            self.most = max(self.most, private() - self.before)
            time.sleep(_INTERVAL_S)


def main(file: str) -> None:
    """Run, and write what was measured."""
    job = json.loads(Path(file).read_text(encoding="utf-8"))
    _count_gathered()
    config = parse_config(job["config"])
    module, world = method_module(config), distributed.start()
    dataset = read_dataset(config.data.path)
    card = machine.cpu(0.0) if job["timed"] else None
    config = module.prepare(engine.resolve(config, world, module, dataset), dataset)
    jieba.initialize()
    if world.size > 1:
        torch.distributed.all_reduce(torch.ones(1))
    memory = Memory()
    alive: list[Any] = [engine.zero_3_loading(config, trains=module.trains_model(config))]
    method = module.build(config, dataset.labels)
    figures: dict[str, Any] = {}
    if module.TRAINS:
        figures = train(config, method, world, dataset, timed=job["timed"])
    else:
        alive.append(engine.place_for_scoring(config, method, world))
    if module.CLASSIFIES:
        figures |= score(config, method, dataset, timed=job["timed"] and not module.TRAINS)
    figures["peak"] = memory.most
    if card is not None:
        figures["card"] = asdict(card)
    write_json(Path(job["out"]) / f"{world.rank}.json", figures)
    distributed.stop()


def train(
    config: Config, method: Any, world: distributed.World, dataset: Any, *, timed: bool
) -> dict[str, Any]:
    """The step with the largest micro batch twice, because AdamW's moments come with the first;
    then some steps against the clock: seconds of processor time of one on average."""
    optimizer = make_optimizer(config, method, world)
    method.module = optimizer.module
    method.start(dataset.splits["train"])
    epoch = method.training_set(dataset.splits["train"], 0)
    tokens = config.train.micro_batch_tokens

    def parts(rows: np.ndarray) -> list[np.ndarray]:
        shares = micro_batches(rows, epoch.lengths, tokens, world.size, world.rank)
        return [part for part, _ in shares]

    def size(rows: np.ndarray) -> int:
        return max(len(part) * int(epoch.lengths[part].max()) for part in parts(rows))

    def step(rows: np.ndarray) -> None:
        optimizer.module.train()
        for place, part in enumerate(own := parts(rows)):
            loss = method.loss(epoch.batch(part.tolist())) / len(rows)
            optimizer.backward(loss, last=place == len(own) - 1)
        optimizer.step(1e-4)

    steps = step_order(epoch.lengths, config.train.global_batch, config.run.seed)
    steps = [rows for rows in steps if len(rows) == config.train.global_batch]
    steps.sort(key=size)
    for _ in range(2):
        gathered.clear()
        step(steps[-1])
    if not timed:
        return {"gathered": sum(gathered) / len(parts(steps[-1]))}
    some = steps[_SHARE_FOR_TIME // 2 :: _SHARE_FOR_TIME]
    return {"seconds": sum(_cpu_seconds(partial(step, rows)) for rows in some) / len(some)}


def score(config: Config, method: Any, dataset: Any, *, timed: bool) -> dict[str, Any]:
    """The batches with the most tokens and with the most rows; then some against the clock:
    seconds of processor time of a text."""
    method.module.eval()
    texts = dataset.splits[config.data.evaluate[0]]["text"].to_pylist()
    batches = method.score_batches(texts)
    method.scores(max(batches, key=lambda batch: batch.ids.numel()))
    gathered.clear()
    method.scores(max(batches, key=lambda batch: len(batch.rows)))
    if not timed:
        return {"gathered_to_score": sum(gathered)}
    some = batches[_SHARE_FOR_TIME // 2 :: _SHARE_FOR_TIME]
    seconds = _cpu_seconds(lambda: [method.scores(batch) for batch in some])
    return {"a_text": seconds / sum(len(batch.rows) for batch in some)}


def private() -> int:
    """Bytes of this process's memory behind which there is no file."""
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")


def _count_gathered() -> None:
    """Before DeepSpeed looks up the collective that it calls."""
    gather = torch.distributed.all_gather_into_tensor

    def counted(output_tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        gathered.append(output_tensor.nbytes)
        return gather(output_tensor, *args, **kwargs)

    torch.distributed.all_gather_into_tensor = counted


def _cpu_seconds(work: Callable[[], Any]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


if __name__ == "__main__":
    main(sys.argv[1])
    distributed.leave(0)
