"""Search spaces, early stopping and what a sweep tells, without Ray."""

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from data_prep.dataset import read_dataset
from launcher.errors import InputError
from launcher.sweep import driver
from launcher.sweep.board import Board
from launcher.sweep.driver import planned
from launcher.sweep.search import Study, grid, stops
from launcher.sweep.settings import Arm, EarlyStopping, SearchSettings, SweepConfig, load_sweep
from launcher.sweep.summary import best_point, dry_run
from launcher.sweep.trial import Trial
from tests.launcher.sweeps import RUN, sweep_file, written


def test_a_grid_has_every_combination_once_and_conditions_hold() -> None:
    space = {
        "kind": ["x", "y"],
        "size": {"values": [1, 2], "when": {"kind": "y"}},
        "lr": [0.1, 0.2],
    }
    arm = Arm.model_validate({"config": "c", "space": space})
    assert grid(arm) == [
        {"kind": "x", "lr": 0.1},
        {"kind": "x", "lr": 0.2},
        {"kind": "y", "size": 1, "lr": 0.1},
        {"kind": "y", "size": 1, "lr": 0.2},
        {"kind": "y", "size": 2, "lr": 0.1},
        {"kind": "y", "size": 2, "lr": 0.2},
    ]


def test_arms_take_turns_and_the_seeds_of_a_point_follow_each_other(tmp_path: Path) -> None:
    config = str(written(tmp_path, RUN))
    sweep = SweepConfig.model_validate(
        {
            "name": "s",
            "arms": {
                "a": {"config": config, "space": {"prompt.template": ["study_1", "study_2"]}},
                "b": {"config": config},
            },
            "seeds": [3, 5],
        }
    )
    studies = {name: Study(arm, sweep.search) for name, arm in sweep.arms.items()}
    names = [trial.name for trial in planned(sweep, studies)]
    assert names == ["a-000-s3", "a-000-s5", "b-000-s3", "b-000-s5", "a-001-s3", "a-001-s5"]


@pytest.mark.parametrize("method", ["random", "tpe"])
def test_drawn_points_stay_inside_and_a_resumed_sweep_draws_the_same(method: str) -> None:
    space = {
        "lr": {"log_uniform": [1e-4, 1e-1]},
        "kind": ["x", ["a", "list"], {"a": "mapping"}],
        "size": {"integers": [1, 9], "when": {"kind": "x"}},
        "share": {"uniform": [0.0, 1.0]},
    }
    arm = Arm.model_validate({"config": "c", "space": space})
    search = SearchSettings(method=method, samples=30)  # type: ignore[arg-type]

    def draw(study: Study, numbers: range) -> list[dict[str, Any]]:
        points = []
        for number in numbers:
            trial, point = study.begin(number)
            study.end(trial, point["share"])
            points.append(point)
        return points

    whole = draw(Study(arm, search), range(30))
    for point in whole:
        assert 1e-4 <= point["lr"] <= 1e-1 and 0 <= point["share"] <= 1
        assert point["kind"] in space["kind"]
        assert ("size" in point) == (point["kind"] == "x") and 1 <= point.get("size", 1) <= 9
    assert len({json.dumps(point) for point in whole}) == 30
    later = Study(arm, search)
    for number, point in enumerate(whole[:12]):
        trial, again = later.begin(number, point)
        assert again == point
        later.end(trial, point["share"])
    assert draw(later, range(12, 30)) == whole[12:]
    if method == "tpe":
        shares = [point["share"] for point in whole]
        assert sum(shares[15:]) > sum(shares[:15]), "it looks where the metric is high"


def test_early_stopping_ends_hopeless_runs_and_keeps_the_best() -> None:
    """27 runs of 9 looks, two at a time; every run ends at the quality it was given."""
    qualities = [round(0.3 + 0.02 * n, 2) for n in range(27)]
    random.Random(4).shuffle(qualities)
    arm = Arm.model_validate({"config": "c", "space": {"quality": qualities}})
    study = Study(arm, SearchSettings(early_stopping=EarlyStopping(first_rung=1, reduction=3)))
    waiting, running = list(range(27)), []
    finished, stopped, looked = {}, {}, 0
    while waiting or running:
        while waiting and len(running) < 2:
            number = waiting.pop(0)
            running.append((study.begin(number), list[float]()))
        for (told, point), looks in list(running):
            looks.append(point["quality"] * (1 - 0.5 ** (len(looks) + 1)))
            looked += 1
            if stops(told, looks, len(looks) - 1):
                study.end(told, None, pruned=True)
                stopped[point["quality"]] = len(looks)
            elif len(looks) == 9:
                study.end(told, looks[-1])
                finished[point["quality"]] = looks[-1]
            else:
                continue
            running.remove(((told, point), looks))
    hopeless = [quality for quality in qualities if quality < 0.56]
    assert sum(quality in stopped for quality in hopeless) >= len(hopeless) / 3
    assert max(finished) == max(qualities)
    assert looked < 27 * 9 / 2


def test_the_best_point_is_best_on_average_over_all_its_seeds() -> None:
    def trial(number: int, seed: int, value: float) -> Trial:
        name = f"a-{number:03d}-s{seed}"
        return Trial(name, "a", number, seed, {"n": number}, "finished", value=value)

    trials = [trial(0, 0, 0.9), trial(0, 1, 0.1), trial(1, 0, 0.6), trial(1, 1, 0.6)]
    name, mean, best = best_point([*trials, trial(2, 0, 0.99)])
    assert (name, mean, best.name) == ("a-001", pytest.approx(0.6), "a-001-s0")


@pytest.mark.parametrize(
    ("space", "others", "expected"),
    [
        (
            {"prompt.tmplate": ["study_1"]},
            {},
            "prompt.tmplate: unknown key, did you mean 'template'?",
        ),
        ({"train.lr": [1e-3, "fast"]}, {}, "train.lr: Input should be a valid number"),
        ({"prompt.template": []}, {}, "arms.a.space.prompt.template"),
        ({"train.lr": {"log_uniform": [1e-4, 1e-2]}}, {}, "a grid needs a list of values"),
        (
            {"train.lr": {"uniform": [2, 1]}},
            {"search": {"method": "random"}},
            "expected the lower number first",
        ),
        (
            {"train.lr": {"values": [1], "when": {"train.epochs": 1}}},
            {},
            "train.epochs must be a key of the space before it",
        ),
        ({"run.seed": [0, 1]}, {}, "run.seed is set by the sweep"),
        ({}, {"search": {"split": "test"}}, "search.split is test, but the config evaluates dev"),
        ({}, {"serch": {}}, "serch: unknown key, did you mean 'search'?"),
        ({}, {"arms": {}}, "arms: Dictionary should have at least 1 item"),
    ],
)
def test_a_wrong_sweep_is_refused_at_once(
    tmp_path: Path, space: dict[str, Any], others: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InputError) as refused:
        load_sweep(sweep_file(tmp_path, space, **others))
    assert expected in str(refused.value)


def test_a_dry_run_lists_every_run_and_why_it_has_no_estimate(tmp_path: Path) -> None:
    templates = ["study_1", "study_2"]
    sweep = load_sweep(sweep_file(tmp_path, {"prompt.template": templates}, seeds=[0, 1]))
    *lines, total = dry_run(sweep)
    names = [line.split()[0] for line in lines[::2]]
    assert names == ["a-000-s0", "a-000-s1", "a-001-s0", "a-001-s1"]
    assert "prompt.template=study_2" in lines[4]
    assert all(line.startswith("  no estimate: data.path") for line in lines[1::2])
    assert total.startswith("4 runs of 1 ranks") and total.endswith("; 4 without an estimate")


def test_a_dry_run_tells_the_planned_memory_and_time(
    data: Path, pangu: Path, tmp_path: Path
) -> None:
    named = {"card": "RTX 2080"}
    run = {**RUN, "model": {"path": str(pangu)}, "hardware": named}
    run["data"] = {"path": str(data), "evaluate": ["dev"]}
    tuned = {**run, "method": "prompting.tuning", "train": {"epochs": 3, "global_batch": 50}}
    linear = {k: v for k, v in run.items() if k not in ("model", "prompt")}
    linear["method"] = "baselines.linear"
    space = {"train.global_batch": {"integers": [50, 60]}}
    arms = {
        "asked": {"config": str(written(tmp_path, run, "asked"))},
        "soft": {"config": str(written(tmp_path, tuned, "soft")), "space": space, "samples": 1},
        "linear": {"config": str(written(tmp_path, linear, "linear"))},
    }
    search = {"method": "random", "samples": 1}
    values = {"name": "s", "dir": str(tmp_path), "arms": arms, "search": search}
    values["resources"] = {"ranks": 2, "gpus_per_rank": 1}
    *lines, total = dry_run(load_sweep(written(tmp_path, values, "sweep")))
    assert [line.split()[0] for line in lines[::2]] == ["asked-000", "linear-000", "soft-000"]
    assert re.fullmatch(r"  ZeRO 0, 1\.5\d GB a rank, scoring 0:00, \d+ steps of .* s", lines[1])
    examples = len(read_dataset(data).splits["train"])
    steps = 3 * math.ceil(examples / 50)
    assert re.fullmatch(rf"  ZeRO 0, 1\.5\d GB a rank, training .*, {steps} steps of .*", lines[5])
    assert lines[3] == "  no estimate: method baselines.linear does not tell its shapes"
    assert total.startswith("3 runs of 2 ranks") and total.endswith("; 1 without an estimate")


def test_out_of_memory_halves_the_micro_batch_and_is_no_failed_attempt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = load_sweep(sweep_file(tmp_path, {"prompt.template": ["study_1"]}))
    run = driver._Driver(sweep)
    run.board = Board(sweep, run.trials)
    run.folder.mkdir(parents=True)
    (trial,) = run.trials
    before = driver.trial_config(sweep, trial)
    for halvings in range(1, 7):  # 4096 to 64 tokens
        trial.attempts += 1
        (run.folder / trial.name).mkdir()
        run._failed(trial, "exit codes 1\ntorch.OutOfMemoryError: CUDA out of memory.")
        assert (trial.state, trial.attempts, trial.halvings) == ("waiting", 0, halvings)
        assert run.queue == [trial] and not (run.folder / trial.name).exists()
        run.queue.clear()
        after = driver.trial_config(sweep, trial)
        assert after.train.micro_batch_tokens == before.train.micro_batch_tokens >> halvings
        assert (
            after.evaluation.micro_batch_tokens == before.evaluation.micro_batch_tokens >> halvings
        )
        assert after.train.global_batch == before.train.global_batch
        assert f"micro batches of {4096 >> halvings} tokens" in capsys.readouterr().err
    trial.attempts = sweep.retries + 1
    run._failed(trial, "exit codes 1\ntorch.OutOfMemoryError: CUDA out of memory.")
    assert trial.state == "failed", "smaller micro batches there are none"
