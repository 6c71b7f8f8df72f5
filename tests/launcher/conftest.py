"""A small dataset, a small PanGu, and runs of the launcher that cost a second instead of ten."""

import contextlib
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml

from data_prep.dataset import SCHEMA, Dataset, write_dataset
from data_prep.sample import make_sample
from launcher.predictions import Predictions, read_predictions
from prompting.pangu import PanguConfig, PanguForCausalLM, PanguTokenizer, train_vocabulary
from prompting.settings import TEMPLATES

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
_PRELOADED = ["deepspeed", "launcher.run_folder", "launcher.training", "launcher.predict"]
_PRELOADED += ["data_prep.dataset", "prompting.discrete", "prompting.pretrain"]
# Each of `commands` is a module with a `main` and its arguments; all run in one process.
_CHILD = """
import importlib, os, resource, sys
for number, file in ((1, out), (2, err)):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
os.environ.update(environment)
if stdin is not None:
    sys.stdin = open(stdin)
codes = []
for module, arguments in commands:
    codes.append(importlib.import_module(module).main(arguments))
    print(end="\\0", flush=True)
    print(end="\\0", file=sys.stderr, flush=True)
with open(peak, "w") as file:
    file.write(str(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
sys.exit(codes[0] if len(codes) == 1 else any(code != 2 for code in codes))
"""


@dataclass
class Job:
    """A running command, one process per rank."""

    processes: list[Any]
    out_file: Path
    err_file: Path

    def wait(self, seconds: float = 180) -> "Job":
        """Wait for the end of all ranks."""
        for process in self.processes:
            process.join(seconds)
            assert process.exitcode is not None, f"still running after {seconds} s"
        return self

    @property
    def codes(self) -> list[int]:
        """Exit code of each rank; minus the signal's number where it was killed."""
        return [process.exitcode for process in self.processes]

    @property
    def peak_bytes(self) -> int:
        """Most memory that a rank which ended by itself has had."""
        return int(self.out_file.with_name("peak").read_text(encoding="utf-8"))

    @property
    def out(self) -> str:
        """What all ranks wrote on the standard output."""
        return self.out_file.read_text(encoding="utf-8").replace("\0", "")

    @property
    def err(self) -> str:
        """What all ranks wrote on the standard error."""
        return self.err_file.read_text(encoding="utf-8").replace("\0", "")


@pytest.fixture(scope="session")
def launch_environment() -> dict[str, str]:
    """Environment of commands: CPU only, one thread, the programs of this interpreter first."""
    return {**os.environ, **ENVIRONMENT}


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    """`start(arguments, ranks=1, module="launcher.run")`: a `Job`, forked off a process that has
    the libraries loaded. What `deepspeed` and the like would set is set for each rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        warm_up = context.Process(target=int)
        warm_up.start()
        warm_up.join()

    def start(
        arguments: Sequence[str] = (),
        *,
        commands: Sequence[tuple[str, list[str]]] | None = None,
        ranks: int = 1,
        module: str = "launcher.run",
        stdin: Path | None = None,
    ) -> Job:
        folder = tmp_path_factory.mktemp("job")
        shared: dict[str, Any] = {
            "commands": commands or [(module, list(arguments))],
            "out": str(folder / "out"),
            "err": str(folder / "err"),
            "peak": str(folder / "peak"),
            "stdin": stdin,
        }
        port, job = str(_free_port()), Job([], folder / "out", folder / "err")
        for rank in range(ranks):
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment |= dict.fromkeys(["RANK", "LOCAL_RANK"], str(rank))
            environment |= dict.fromkeys(["WORLD_SIZE", "LOCAL_WORLD_SIZE"], str(ranks))
            names = {**shared, "environment": environment if ranks > 1 else {}}
            job.processes.append(context.Process(target=exec, args=(_CHILD, names)))
            job.processes[-1].start()
        return job

    return start


@pytest.fixture(scope="session")
def sample() -> Dataset:
    """Synthetic chats: 37 with duplicates in dev, so that no number of ranks divides them, and a
    single one in test."""
    whole = make_sample(size=400, seed=3)
    dev = whole.splits["dev"].slice(0, 33).to_pylist()
    dev += [{**dev[row], "id": f"again-{row}"} for row in (0, 7, 7 + 1, 32)]
    dev = [dev[row] for row in np.random.default_rng(0).permutation(len(dev))]
    splits = {
        "train": whole.splits["train"],
        "dev": pa.Table.from_pylist(dev, schema=SCHEMA),
        "test": whole.splits["test"].slice(0, 1),
    }
    return Dataset(whole.labels, splits, whole.provenance, None, {})


@pytest.fixture(scope="session")
def data(sample: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sample` as a dataset folder."""
    folder = tmp_path_factory.mktemp("data") / "sample"
    write_dataset(folder, sample)
    return folder


@pytest.fixture(scope="session")
def pangu(sample: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PanGu of 2 layers x 32 with weights so large that its scores are far apart."""
    folder = tmp_path_factory.mktemp("models") / "pangu"
    folder.mkdir()
    words = [template.question + template.choice for template in TEMPLATES.values()]
    texts = sample.splits["train"]["text"].to_pylist()
    train_vocabulary([*texts, *sample.labels, *words, "答案:："], folder / "vocab.model", 1200)
    tokenizer = PanguTokenizer(folder / "vocab.model")
    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = PanguForCausalLM(
        PanguConfig(vocab_size=len(tokenizer), max_position_embeddings=96, **shape)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float(name.endswith("layernorm.weight")), 0.2, generator=generator)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all runs."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def discrete(data: Path, pangu: Path, runs: Path) -> list[str]:
    """Arguments of a run that scores dev and test; a test adds its own `run.name`."""
    values = {
        "method": "prompting.discrete",
        "run": {"name": "unnamed", "dir": str(runs)},
        "data": {"path": str(data), "evaluate": ["dev", "test"]},
        "model": {"path": str(pangu)},
        "prompt": {"template": "study_2"},
        "evaluation": {"micro_batch_tokens": 256},
    }
    return ["--config", str(_written(runs / "discrete.yaml", values))]


@pytest.fixture(scope="session")
def pretrain(data: Path, runs: Path) -> list[str]:
    """Arguments of a run that trains for 15 steps of an epoch of 5; a test adds its `run.name`."""
    values = {
        "method": "prompting.pretrain",
        "run": {"name": "unnamed", "dir": str(runs), "seed": 5},
        "data": {"path": str(data)},
        "train": {
            "epochs": 3,
            "global_batch": 70,
            "micro_batch_tokens": 512,
            "lr": 1e-3,
            "checkpoint_every": 3,
        },
        "pretrain": {
            "shape": {
                "hidden_size": 32,
                "layers": 2,
                "heads": 2,
                "max_position_embeddings": 96,
                "vocabulary_size": 1200,
            }
        },
    }
    return ["--config", str(_written(runs / "pretrain.yaml", values))]


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """A function that gives a port no one listens on."""
    return _free_port


@pytest.fixture(scope="session")
def predictions_of(runs: Path) -> Callable[..., Predictions]:
    """`predictions_of(run name, split="dev")`."""

    def read(name: str, split: str = "dev") -> Predictions:
        return read_predictions(runs / name / "predictions" / f"{split}.parquet")

    return read


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _written(file: Path, values: dict[str, Any]) -> Path:
    file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return file
