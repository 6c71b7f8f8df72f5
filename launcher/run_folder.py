"""The run folder: what is fixed before a run starts, and what is derived when it ends."""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import torch

from launcher import metrics, report
from launcher.config import Config, dump_config, read_text
from launcher.distributed import World, full_shape, max_over_ranks, on_rank_0, together
from launcher.engine import derived_config
from launcher.errors import InputError
from launcher.files import write_json, write_text
from launcher.training_log import peak_memory

_PACKAGES = ["torch", "deepspeed", "transformers", "peft", "ray", "sentencepiece", "jieba"]


@contextmanager
def opened(config: Config, world: World, *, resume: bool) -> Iterator[None]:
    """The run's folder, made or found again; a new one goes away if the block refuses the input.

    Raises:
        InputError: it exists and `resume` is false, or the other way round.
    """
    on_rank_0(world, lambda: _open(config, resume=resume))
    try:
        yield
    except InputError:
        if world.rank == 0 and not resume:
            shutil.rmtree(config.run_dir)
        raise


def kept_choices(config: Config) -> Config:
    """`config` with what is `auto` replaced by what it was when the run to be resumed began."""
    stored = read_config(config.run_dir)
    changed: dict[str, Any] = {}
    if config.model.precision == "auto":
        update = {"precision": stored.model.precision}
        changed["model"] = config.model.model_copy(update=update)
    if config.parallel.zero == "auto":
        changed["parallel"] = config.parallel.model_copy(update={"zero": stored.parallel.zero})
    return config.model_copy(update=changed)


def settle(config: Config, dataset: Any, module: ModuleType, *, resume: bool) -> str:
    """Let the method fix what depends on the data, and write down everything the run stands on.

    Gives the content of `config.yaml`; a resumed run's must be what it was.
    """
    config = module.prepare(config, dataset)
    kept_of = dataset.provenance.get("kept_of_labels")
    labels = {"labels": list(dataset.labels), "file_labels": kept_of}
    data = config.data.model_copy(update=labels)
    config = config.model_copy(update={"data": data})
    folder = config.run_dir
    if resume:
        stored = read_config(folder)
        differing = _differences(stored.model_dump(mode="json"), config.model_dump(mode="json"))
        if differing:
            raise InputError("\n".join(f"--resume: {line}" for line in differing))
        return dump_config(config)
    write_json(
        folder / "ds_config.json", derived_config(config, trains=module.trains_model(config))
    )
    write_json(folder / "environment.json", _environment(config, dataset))
    synthetic = bool(dataset.provenance.get("synthetic"))
    row = {**module.describe(config), "method": config.method, "synthetic": synthetic}
    write_json(folder / "report_row.json", row)
    write_text(folder / "config.yaml", dump_config(config))
    return dump_config(config)


def check_shared(config: Config, world: World) -> None:
    """Refuse a run's folder that not all nodes see, for runs that read there what rank 0 wrote.

    Called by every rank once rank 0 has settled the run.
    """

    def look() -> None:
        if not (config.run_dir / "config.yaml").exists():
            raise InputError(
                f"run.dir {config.run_dir}: not seen on {platform.node()}: ranks that train read "
                "there what rank 0 has saved, so choose a folder that all nodes share"
            )

    together(world, look)


def trained_parameters(learner: Any) -> int | None:
    """How many numbers a learner trains; None where it keeps them elsewhere than in a module."""
    network = learner.module if learner.replicated is None else learner.replicated
    trained = [full_shape(one) for one in network.parameters() if one.requires_grad]
    return sum(map(math.prod, trained)) or None


def check_space(config: Config, world: World, trained: int | None) -> None:
    """Refuse to train `trained` parameters whose checkpoints the disk can't hold.

    The last checkpoint, the best and the one that is being written, each with AdamW's moments and
    a float32 copy, and the weights that are exported in the end.
    """

    def look() -> None:
        needed = (3 * 16 + 4) * (trained or 0)
        free = shutil.disk_usage(config.run_dir).free
        if free < needed:
            raise InputError(
                f"run.dir {config.run_dir}: its disk has {free / 2**30:.2f} GiB free and the "
                f"checkpoints of {trained:,} trained parameters take up to {needed / 2**30:.2f} "
                "GiB: free some, or choose another folder"
            )

    on_rank_0(world, look)


def finish(config: Config, world: World, notes: dict[str, int], trained: int | None) -> None:
    """Add the cost to `environment.json`, derive `metrics.json` and `report.html` from the
    predictions, and tell the main figures. All ranks call it; rank 0 writes.

    Args:
        notes: counts to be told.
        trained: how many parameters were trained, None where it is not known.
    """
    cost = {
        "trained_parameters": trained,
        "memory_bytes": max_over_ranks(world, peak_memory(world.device)),
        # Of this launch: a resumed run has taken longer.
        "wall_seconds": round(time.time() - psutil.Process().create_time(), 1),
    }
    on_rank_0(world, lambda: _finish(config, notes, cost))


def _finish(config: Config, notes: dict[str, int], cost: dict[str, Any]) -> None:
    file = config.run_dir / "environment.json"
    write_json(file, {**json.loads(file.read_text(encoding="utf-8")), "cost": cost})
    result = metrics.write_metrics(config.run_dir)
    report.write_run_report(config.run_dir)
    for split, values in result["splits"].items():
        shown = [
            f"{name} {_percent(values[name])}" for name in ("acc@1", "acc@3", "hit@1", "hit@3")
        ]
        print(f"{split}: n {values['n']:,}, {', '.join(shown)}, unmatched {values['unmatched']:,}")
    for note, count in notes.items():
        if count:
            print(f"note: {note} {count:,}")


def read_config(folder: Path) -> Config:
    """The resolved config of a run.

    Raises:
        InputError: the folder holds none.
    """
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
    except OSError:
        raise InputError(f"{folder}: no run here (no config.yaml)") from None
    return read_text(text, source=str(folder / "config.yaml"))


def _open(config: Config, *, resume: bool) -> None:
    folder = config.run_dir
    begun = (folder / "config.yaml").exists()
    if resume and not begun:
        raise InputError(f"--resume: no run in {folder}; leave --resume out to start it")
    if not resume and folder.is_dir() and any(folder.iterdir()):
        what = "or --resume to go on" if begun else "or remove it: it holds no run to resume"
        raise InputError(f"run.name: {folder} exists already: give another run.name, {what}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"run.dir: {folder} can't be made: {error.strerror}") from None


def _percent(metric: dict[str, Any]) -> str:
    return "none" if metric["value"] is None else f"{100 * metric['value']:.1f} %"


def _differences(stored: Any, given: Any, where: str = "") -> list[str]:
    if isinstance(stored, dict) and isinstance(given, dict):
        return [
            line
            for key in sorted(stored.keys() | given.keys())
            for line in _differences(stored.get(key), given.get(key), f"{where}.{key}".lstrip("."))
        ]
    if stored == given:
        return []
    return [f"{where} is {stored!r} in the run and {given!r} now: a resumed run keeps its config"]


def _environment(config: Config, dataset: Any) -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "git_commit": _git_commit(),
        "hardware": {
            "world_size": int(os.environ["WORLD_SIZE"]),
            "gpus": gpus,
            "cpu": platform.processor() or platform.machine(),
            "cpu_cores": psutil.cpu_count(logical=False),
            "memory_bytes": psutil.virtual_memory().total,
        },
        "seed": config.run.seed,
        "data_sha256": dataset.sha256,
        "model_sha256": _hashes(config.model.path),
    }


def _git_commit() -> str | None:
    """The commit of this checkout; None where the project was installed without one."""
    root = Path(__file__).resolve().parent.parent
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def _hashes(path: str | None) -> dict[str, str]:
    """SHA-256 of a local model's weights, config and vocabulary; empty for hub models."""
    if path is None or not Path(path).is_dir():
        return {}
    kinds = {".safetensors", ".bin", ".model", ".txt", ".json"}
    hashes = {}
    for file in sorted(Path(path).iterdir()):
        if file.suffix in kinds:
            with file.open("rb") as stream:
                hashes[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes
