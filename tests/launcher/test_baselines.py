"""Baselines are runs like all others: ranks, predictions, single texts, combinations."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from data_prep.dataset import Dataset


@pytest.fixture(scope="session")
def given(data: Path, runs: Path) -> list[str]:
    """Arguments of a linear run; a test adds its own `run.name`."""
    values = {
        "method": "baselines.linear",
        "run": {"name": "unnamed", "dir": str(runs)},
        "data": {"path": str(data), "evaluate": ["dev", "test"]},
        "linear": {"features": {"characters": 1.0, "shape": 0.5}, "ngrams": [1, 2]},
    }
    file = runs / "linear.yaml"
    file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return ["--config", str(file)]


@pytest.fixture(scope="session")
def mlp(data: Path, runs: Path) -> list[str]:
    """Arguments of a network's run."""
    values = {
        "method": "baselines.mlp",
        "run": {"name": "unnamed", "dir": str(runs)},
        "data": {"path": str(data), "evaluate": ["dev", "test"]},
        "train": {"epochs": 5, "max_steps": 12, "global_batch": 64, "lr": 1e-2},
        "mlp": {"hidden": [16, 16], "features": ["characters"]},
    }
    file = runs / "mlp.yaml"
    file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return ["--config", str(file)]


@pytest.fixture(scope="session")
def members(given: list[str], mlp: list[str], start: Any, runs: Path) -> list[Path]:
    """A linear run and a network's, and those of them that held out a part of train."""
    held = ["data.hold_out=0.2", "data.evaluate=[dev]"]
    linear = [[*given, "run.name=linear"], [*given, "run.name=linear_held", *held]]
    jobs = [
        *(start(arguments) for arguments in linear),
        start([*mlp, "run.name=mlp"]),
        start([*mlp, "run.name=mlp_held", *held]),
    ]
    for job in jobs:
        job.wait()
        assert job.codes == [0], job.err
    return [runs / name for name in ("linear", "mlp", "linear_held", "mlp_held")]


def test_ranks_score_alike_and_single_texts_as_the_run(
    members: list[Path],
    given: list[str],
    start: Any,
    sample: Dataset,
    predictions_of: Any,
    tmp_path: Path,
) -> None:
    job = start([*given, "run.name=linear_2"], ranks=2).wait()
    assert job.codes == [0, 0], job.err
    stored = {name: predictions_of(name) for name in ("linear", "linear_2", "mlp")}
    scores = [stored[name].scores for name in ("linear", "linear_2")]
    np.testing.assert_allclose(scores[0], scores[1], rtol=0, atol=1e-5)
    gold = stored["linear"].labels
    majority = np.bincount(gold).max() / len(gold)
    assert (stored["linear"].predicted == gold).mean() > majority + 0.1
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(stored["mlp"].texts), encoding="utf-8")
    for folder in members[:2]:
        job = start([str(folder), str(file)], module="launcher.predict").wait()
        assert job.codes == [0], job.err
        answers = [json.loads(line) for line in job.out.splitlines()]
        scores = [list(answer["scores"].values()) for answer in answers]
        expected = stored[folder.name].scores
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)


def test_a_run_ends_with_its_last_step_and_looks_at_dev_there(members: list[Path]) -> None:
    lines = (members[1] / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    seen = [json.loads(line) for line in lines]
    # 280 examples are 5 steps an epoch.
    assert [line["step"] for line in seen if "dev_loss" in line] == [0, 5, 10, 12]
    assert [line["step"] for line in seen if "loss" in line][-1] == 12


def test_an_ensemble_is_the_mixture_of_what_its_members_said(
    members: list[Path],
    given: list[str],
    start: Any,
    runs: Path,
    data: Path,
    predictions_of: Any,
    tmp_path: Path,
) -> None:
    values: dict[str, Any] = {
        "method": "baselines.ensemble",
        "run": {"name": "ensemble", "dir": str(runs)},
        "data": {"path": str(data), "evaluate": ["dev", "test"]},
        "ensemble": {
            "members": [str(folder) for folder in members[:2]],
            "fit_on": "dev",
            "fit_members": [str(folder) for folder in members[2:]],
        },
    }
    file = tmp_path / "ensemble.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    job = start(["--config", str(file)]).wait()
    assert job.codes == [0], job.err
    assert "scored anew" not in job.out
    stored = yaml.safe_load((runs / "ensemble" / "config.yaml").read_text(encoding="utf-8"))
    fitted = stored["ensemble"]["fitted"]
    weights, bias = np.array(fitted["weights"]), np.array(fitted["bias"])
    assert weights.shape == (2, 5) and np.ptp(weights) > 0.01
    said = [predictions_of(folder.name).scores.astype(np.float64) for folder in members[:2]]
    logits = said[0] * weights[0] + said[1] * weights[1] + bias
    expected = torch.tensor(logits).log_softmax(dim=1).numpy()
    np.testing.assert_allclose(predictions_of("ensemble").scores, expected, rtol=0, atol=1e-5)

    # Texts that no member has predicted are scored by the members themselves.
    new = tmp_path / "new.txt"
    new.write_text("从没见过的弹幕\n", encoding="utf-8")
    answers = []
    for folder in (*members[:2], runs / "ensemble"):
        job = start([str(folder), str(new)], module="launcher.predict").wait()
        assert job.codes == [0], job.err
        answers.append(np.array([*json.loads(job.out)["scores"].values()]))
    logits = answers[0] * weights[0] + answers[1] * weights[1] + bias
    expected = torch.tensor(logits).log_softmax(dim=0).numpy()
    np.testing.assert_allclose(answers[2], expected, rtol=0, atol=1e-5)


def test_an_ensemble_that_would_mislead_is_refused(
    members: list[Path], start: Any, runs: Path, data: Path, tmp_path: Path
) -> None:
    folders = [str(folder) for folder in members]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"members": folders[:2], "fit_on": "dev"}, "37 examples of dev, which is evaluated"),
        ({"members": [], "weights": None}, "ensemble.members: required"),
        ({"members": folders[:2], "weights": [1.0]}, "weights: 1 of them for 2 members"),
        ({"members": [folders[0], str(tmp_path)]}, f"{tmp_path}: no run here"),
        (
            {"members": folders[:2], "fit_on": "dev", "fit_members": [folders[2], folders[1]]},
            "have predicted other examples of dev",
        ),
        (
            {"members": folders[:2], "fit_on": "test", "fit_members": folders[2:]},
            "has no predictions of test, only of dev",
        ),
    ]
    files = []
    for number, (settings, _) in enumerate(cases):
        values = {
            "method": "baselines.ensemble",
            "run": {"name": "refused", "dir": str(runs)},
            "data": {"path": str(data)},
            "ensemble": settings,
        }
        files.append(tmp_path / f"{number}.yaml")
        files[-1].write_text(yaml.safe_dump(values), encoding="utf-8")
    job = start(commands=[("launcher.run", ["--config", str(f), "--check"]) for f in files]).wait()
    assert job.codes == [0], job.err
    messages = job.err_file.read_text(encoding="utf-8").split("\0")
    for (_, expected), message in zip(cases, messages, strict=False):
        assert expected in message
        assert message.count("\n") == 1


def test_labels_are_kept_and_the_stored_config_runs_again(
    given: list[str], start: Any, runs: Path, predictions_of: Any, sample: Dataset
) -> None:
    stored = str(runs / "kept" / "config.yaml")
    first = [*given, "run.name=kept", "data.keep_labels=3", "data.evaluate=[dev]"]
    again = ["--config", stored, "run.name=kept_again"]
    for arguments in (first, again):
        job = start(arguments).wait()
        assert job.codes == [0], job.err
    counts = np.bincount(sample.splits["train"]["label"].to_numpy(), minlength=5)
    largest = sorted(np.argsort(-counts, kind="stable")[:3].tolist())
    kept = predictions_of("kept")
    assert kept.label_names == [sample.labels[label] for label in largest]
    known = np.isin(sample.splits["dev"]["label"].to_numpy(), largest)
    assert kept.texts.tolist() == np.array(sample.splits["dev"]["text"])[known].tolist()
    np.testing.assert_array_equal(predictions_of("kept_again").scores, kept.scores)
