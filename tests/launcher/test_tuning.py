"""Soft prompts trained by the launcher: the same however the frozen model is held."""

import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from data_prep.dataset import Dataset
from launcher.config import load_config
from launcher.predictions import read_predictions
from prompting.pangu import PanguConfig
from prompting.question import read_question
from prompting.settings import TuningSettings
from prompting.soft_prompt import make_network
from prompting.tuning import prepare


@pytest.fixture(scope="session")
def tuning(data: Path, pangu: Path, runs: Path) -> list[str]:
    """Arguments of a run that trains a soft prompt for 20 steps; a test adds its `run.name`."""
    values = {
        "method": "prompting.tuning",
        "run": {"name": "unnamed", "dir": str(runs), "seed": 5},
        "data": {"path": str(data)},
        "model": {"path": str(pangu)},
        "prompt": {"template": "study_2"},
        "train": {
            "epochs": 4,
            "global_batch": 70,
            "micro_batch_tokens": 512,
            "lr": 1e-2,
            "checkpoint_every": 3,
            "keep": "last",
        },
    }
    file = runs / "tuning.yaml"
    file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return ["--config", str(file)]


def learned(run: Path) -> torch.Tensor:
    return load_file(str(run / "adapter" / "adapter_model.safetensors"))["prompt_embeddings"]


def log_of(run: Path) -> list[dict[str, Any]]:
    lines = (run / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def whole(start: Any, tuning: list[str], runs: Path) -> Path:
    """The run on one rank without sharding that others are compared with."""
    job = start([*tuning, "run.name=tuned", "parallel.zero=0"]).wait()
    assert job.codes == [0], job.err
    return runs / "tuned"


WAYS = {
    "one-rank-3": (1, ["parallel.zero=3"]),
    "two-ranks-0": (2, ["parallel.zero=0"]),
    "two-ranks-1": (2, ["parallel.zero=1"]),
    "two-ranks-2": (2, ["parallel.zero=2"]),
    "two-ranks-3": (2, ["parallel.zero=3"]),
    "offload-0": (2, ["parallel.zero=0", "parallel.offload=cpu"]),
    "offload-2": (2, ["parallel.zero=2", "parallel.offload=cpu"]),
    "offload-3": (2, ["parallel.zero=3", "parallel.offload=cpu"]),
    "checkpointing-0": (1, ["parallel.zero=0", "parallel.activation_checkpointing=true"]),
    "checkpointing-3": (2, ["parallel.zero=3", "parallel.activation_checkpointing=true"]),
    "all-3": (2, ["parallel.zero=3", "parallel.offload=cpu",
                  "parallel.activation_checkpointing=true"]),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_stages_and_ranks_train_alike(
    start: Any, tuning: list[str], runs: Path, whole: Path, way: str
) -> None:
    ranks, changed = WAYS[way]
    job = start([*tuning, f"run.name={way}", *changed], ranks=ranks).wait()
    assert job.codes == [0] * ranks, job.err
    first, other = log_of(whole), log_of(runs / way)
    assert [line["step"] for line in first] == [line["step"] for line in other]
    for key in ("loss", "dev_loss"):
        start_of = [next(line[key] for line in log if key in line) for log in (first, other)]
        assert start_of[1] == pytest.approx(start_of[0], abs=1e-5)
    torch.testing.assert_close(learned(runs / way), learned(whole), atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", ["p_tuning", "prefix", "whitened", "lora"])
def test_other_kinds_train_alike(start: Any, tuning: list[str], runs: Path, kind: str) -> None:
    """Sharded over two ranks as whole on one, from the first look to the predictions."""
    told = ["tuning.kind=prefix", "tuning.init=whitened"]
    told = told if kind == "whitened" else [f"tuning.kind={kind}"]
    arguments = [*tuning, *told, "train.lr=1e-3", "train.epochs=2"]
    whole, sharded = f"{kind}-whole", f"{kind}-sharded"
    one = start([*arguments, f"run.name={whole}", "parallel.zero=0"])
    assert one.wait().codes == [0], one.err
    two = start([*arguments, f"run.name={sharded}", "parallel.zero=3"], ranks=2)
    assert two.wait().codes == [0, 0], two.err
    for line, other in zip(log_of(runs / whole), log_of(runs / sharded), strict=True):
        name = "loss" if "loss" in line else "dev_loss"
        assert line[name] == pytest.approx(other[name], abs=1e-4)
    first, second = (
        read_predictions(runs / name / "predictions" / "dev.parquet").scores
        for name in (whole, sharded)
    )
    np.testing.assert_allclose(first, second, rtol=0, atol=2e-3)


def test_the_frozen_model_stays_as_it_was(whole: Path, pangu: Path) -> None:
    """Nothing of it is written, and the run knows it by its hash."""
    total = hashlib.sha256(hashlib.sha256((pangu / "model.safetensors").read_bytes()).digest())
    kept = json.loads((whole / "adapter" / "soft_prompt.json").read_text(encoding="utf-8"))
    assert kept["base"] == {"path": str(pangu), "sha256": total.hexdigest()}
    sizes = {file.name: file.stat().st_size for file in whole.rglob("*") if file.is_file()}
    assert max(sizes[name] for name in sizes if name.startswith(("state", "adapter"))) < 40_000


@pytest.mark.parametrize("vectors", [20, 100])
def test_a_checkpoint_of_the_largest_model_is_small(vectors: int, tmp_path: Path) -> None:
    """What a run of PanGu 2.6B keeps: the vectors and AdamW's moments."""
    network = make_network(TuningSettings(), PanguConfig(), vectors, seed=0)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.arange(vectors)).sum().backward()
    optimizer.step()
    state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, tmp_path / "state.pt")
    assert network(torch.arange(vectors)).shape == (vectors, 2560)
    assert (tmp_path / "state.pt").stat().st_size < 5_000_000


def test_it_learns_and_is_what_predicts(
    whole: Path, start: Any, sample: Dataset, tmp_path: Path
) -> None:
    lines = log_of(whole)
    dev = [line for line in lines if "dev_loss" in line]
    assert [line["step"] for line in dev] == [0, 5, 10, 15, 20]
    assert dev[-1]["dev_loss"] < 0.8 * dev[0]["dev_loss"]
    stored = read_predictions(whole / "predictions" / "dev.parquet")
    assert stored.scores is not None
    loss = -stored.scores[np.arange(len(stored.labels)), stored.labels].mean()
    assert loss == pytest.approx(dev[-1]["dev_loss"], abs=1e-4)
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(stored.texts), encoding="utf-8")
    # The folder may have moved since.
    moved = shutil.copytree(whole, tmp_path / "moved")
    job = start([str(moved), str(file)], module="launcher.predict").wait()
    assert job.codes == [0], job.err
    scores = [list(json.loads(line)["scores"].values()) for line in job.out.splitlines()]
    np.testing.assert_allclose(scores, stored.scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_goes_on_as_if_it_had_not(
    number: signal.Signals, whole: Path, start: Any, tuning: list[str], runs: Path
) -> None:
    run = runs / f"tuning_stopped_by_{number.name}"
    arguments = [*tuning, f"run.name={run.name}", "parallel.zero=0"]
    job = start(arguments)
    while not (run / "checkpoints" / "last" / "step_3").exists():
        assert job.processes[0].is_alive(), job.err
        time.sleep(0.002)
    os.kill(job.processes[0].pid, number)
    assert job.wait().codes == [75 if number == signal.SIGTERM else -number], job.err
    job = start([*arguments, "--resume"]).wait()
    assert job.codes == [0], job.err
    assert torch.equal(learned(run), learned(whole))


def test_the_best_is_kept_and_patience_ends(start: Any, tuning: list[str], runs: Path) -> None:
    """A learning rate far too high: the first look stays the best."""
    arguments = [*tuning, "run.name=impatient", "train.keep=best", "train.patience=2"]
    job = start([*arguments, "train.lr=1000", "train.warmup=0", "train.evaluate_every=2"]).wait()
    assert job.codes == [0], job.err
    dev = [line for line in log_of(runs / "impatient") if "dev_acc@1" in line]
    best = max(dev, key=lambda line: (line["dev_acc@1"], -line["dev_loss"]))
    assert dev[-1]["step"] - best["step"] == 4 < 20
    stored = read_predictions(runs / "impatient" / "predictions" / "dev.parquet")
    assert (stored.predicted == stored.labels).mean() == pytest.approx(best["dev_acc@1"])


def test_a_collapse_is_told(start: Any, tuning: list[str]) -> None:
    weights = "tuning.class_weights={动画: 1000}"
    job = start([*tuning, "run.name=collapsed", "train.lr=0.1", weights]).wait()
    assert job.codes == [0], job.err
    assert "nearly every dev text is given '动画'" in job.out


def test_a_range_test_leaves_a_plot_and_a_rate(start: Any, tuning: list[str], runs: Path) -> None:
    test = ["train.lr_range_test.lowest=1e-4", "train.lr_range_test.steps=40"]
    job = start([*tuning, "run.name=range", *test], ranks=2).wait()
    assert job.codes == [0, 0], job.err
    assert "try train.lr=" in job.out
    assert (runs / "range" / "lr_range_test.svg").exists()
    assert not (runs / "range" / "adapter").exists()


@pytest.fixture(scope="session")
def poisoned(
    pangu: Path, tuning: list[str], sample: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """A model without a number for positions that no dev text reaches, and the ids of train texts
    that do."""
    folder = shutil.copytree(pangu, tmp_path_factory.mktemp("models") / "poisoned")
    config = prepare(load_config(Path(tuning[1]), ["run.name=x"]), sample)
    asked, _ = read_question(config, sample.labels)
    deepest = len(asked.encoded.head) - 1 + max(asked.trie.depths, default=0)
    last = {
        split: np.array([len(ids) + deepest for ids in asked.suffixes(table["text"].to_pylist())])
        for split, table in sample.splits.items()
    }
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_positions.weight"][last["dev"].max() + 1 :] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    rows = np.flatnonzero(last["train"] > last["dev"].max())
    return folder, sample.splits["train"]["id"].take(rows).to_pylist()


@pytest.mark.parametrize("ranks", [1, 2])
def test_texts_without_a_finite_loss_are_named(
    poisoned: Any, start: Any, tuning: list[str], runs: Path, ranks: int
) -> None:
    folder, having = poisoned
    name = f"not_finite_{ranks}"
    zero = f"parallel.zero={3 if ranks == 2 else 0}"
    arguments = [*tuning, f"run.name={name}", f"model.path={folder}", zero]
    job = start(arguments, ranks=ranks).wait()
    assert job.codes == [2] * ranks, job.err
    assert "no finite loss by themselves" in job.err and "Traceback" not in job.err
    found = json.loads((runs / name / "not_finite.json").read_text(encoding="utf-8"))
    assert {example["id"] for example in found["examples"]} <= set(having)
    assert found["examples"]


def test_overflow_in_fp16_ends_the_run(
    pangu: Path, start: Any, tuning: list[str], runs: Path, tmp_path: Path
) -> None:
    """Steps are skipped while the scale falls; what no scale can help is said after k of them."""
    folder = shutil.copytree(pangu, tmp_path / "loud")
    weights = load_file(folder / "model.safetensors")
    weights["model.query_layer.mlp.down_proj.weight"] *= 300
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    half = ["model.precision=fp16", "train.max_skipped_steps=3"]
    job = start([*tuning, "run.name=loud", f"model.path={folder}", *half]).wait()
    assert job.codes == [2], job.err
    assert "fp16 overflow in 3 steps in a row, up to step 3" in job.err
    assert "Traceback" not in job.err
    job = start([*tuning, "run.name=half", *half[:1], "train.max_skipped_steps=10"]).wait()
    assert job.codes == [0], job.err
    lines = [line for line in log_of(runs / "half") if "skipped_steps" in line]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_an_adapter_can_be_asked_again_and_nothing_else_may_be(
    whole: Path, start: Any, tuning: list[str], runs: Path, pangu: Path
) -> None:
    again = [*tuning, "train.epochs=0", f"tuning.init_from={whole / 'adapter'}"]
    job = start([*again, "run.name=again"]).wait()
    assert job.codes == [0], job.err
    first, second = (
        read_predictions(runs / name / "predictions" / "dev.parquet") for name in ("tuned", "again")
    )
    np.testing.assert_allclose(first.scores, second.scores, rtol=0, atol=1e-4)
    job = start([*again, "run.name=other", "prompt.template=study_3"]).wait()
    assert job.codes == [2]
    assert "learned for the prompt" in job.err


def test_it_starts_from_the_discrete_prompt(
    start: Any, tuning: list[str], discrete: list[str], runs: Path
) -> None:
    job = start([*tuning, "run.name=untrained", "train.epochs=0", "parallel.zero=3"], ranks=2)
    assert job.wait().codes == [0, 0], job.err
    job = start([*discrete, "run.name=asked_in_words", "data.evaluate=[dev]"]).wait()
    assert job.codes == [0], job.err
    untrained, asked = (
        read_predictions(runs / name / "predictions" / "dev.parquet").scores
        for name in ("untrained", "asked_in_words")
    )
    np.testing.assert_allclose(untrained, asked, rtol=0, atol=1e-4)
