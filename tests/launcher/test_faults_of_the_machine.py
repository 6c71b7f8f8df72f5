"""What the machine itself does to a run: a GPU that vanishes, a disk too small for checkpoints."""

import multiprocessing
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launcher import distributed, run_folder
from launcher.config import parse_config
from launcher.distributed import World
from launcher.errors import InputError

# A rank of a run whose second one loses its GPU while it scores.
_RANK = """
import os, sys, torch
os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
os.environ.update(environment)
from launcher.run import main
from prompting.discrete import Discrete

def scores(self, batch):
    if os.environ["RANK"] == "1":
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\\nhint")
    return kept(self, batch)

kept = Discrete.scores
Discrete.scores = scores
sys.exit(main(arguments))
"""


def test_a_gpu_that_vanishes_ends_all_ranks_with_its_name(
    start: Any, discrete: list[str], free_port: Callable[[], int], tmp_path: Path
) -> None:
    context = multiprocessing.get_context("forkserver")
    err, port = tmp_path / "err", str(free_port())
    processes: list[Any] = []
    for rank in ("0", "1"):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        names = {"err": str(err), "environment": environment}
        names["arguments"] = [*discrete, "run.name=gpu_lost"]
        processes.append(context.Process(target=exec, args=(_RANK, names)))
        processes[-1].start()
    for process in processes:
        process.join(60)
    said = err.read_text(encoding="utf-8")
    assert [process.exitcode for process in processes] == [75, 75], said
    assert re.search(
        r"^rank 1 \(host \S+\) has lost its GPU 1: CUDA error: unspecified launch failure; "
        r"[^\n]*--resume[^\n]*$",
        said,
        re.M,
    )
    # The other rank is told by the end of this one.
    assert re.search(r"^rank 1 \(host [^\n]* is gone: ", said, re.M)
    assert "Traceback" not in said and "hint" not in said


@pytest.mark.parametrize(
    ("error", "is_device"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_mistakes_are_not_taken_for_a_lost_gpu(error: RuntimeError, is_device: bool) -> None:
    assert distributed.is_device_failure(error) == is_device


def test_a_folder_that_is_not_seen_is_refused(tmp_path: Path) -> None:
    values = {"method": "prompting.pretrain", "data": {"path": "nowhere"}}
    config = parse_config(values | {"run": {"name": "seen", "dir": str(tmp_path)}})
    world = World(0, 1, torch.device("cpu"))
    with pytest.raises(InputError, match=f"^run.dir {tmp_path / 'seen'}: not seen on [^\n]*$"):
        run_folder.check_shared(config, world)
    config.run_dir.mkdir()
    (config.run_dir / "config.yaml").touch()
    run_folder.check_shared(config, world)


def test_too_little_disk_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"method": "prompting.pretrain", "data": {"path": "nowhere"}}
    config = parse_config(values | {"run": {"name": "small", "dir": str(tmp_path)}})
    world = World(0, 1, torch.device("cpu"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    run_folder.check_space(config, world, 2**30 // 52)
    run_folder.check_space(config, world, None)
    with pytest.raises(InputError) as raised:
        run_folder.check_space(config, world, 2**30)
    message = str(raised.value)
    assert message.startswith(f"run.dir {tmp_path / 'small'}: its disk has 1.00 GiB free and ")
    assert "1,073,741,824 trained parameters take up to 52.00 GiB" in message
    assert "\n" not in message
