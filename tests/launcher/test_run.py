"""Runs: the same under every launcher, refused with one line, and finished after any stop."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.dataset import Dataset
from launcher.config import load_config
from launcher.metrics import write_metrics
from launcher.run import main

ROOT = Path(__file__).resolve().parents[2]
PYTHON = [sys.executable, str(ROOT / "launcher" / "run.py")]


@pytest.fixture(scope="session")
def command(launch_environment: dict[str, str], tmp_path_factory: Any) -> Callable[..., Any]:
    """Run a command line as a user does, from a folder that is not the project's."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            arguments,
            cwd=elsewhere,
            env={k: v for k, v in launch_environment.items() if k != "PYTHONPATH"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def one_rank(command: Any, discrete: list[str], runs: Path) -> Path:
    """The run that others are compared with."""
    ended = command(*PYTHON, *discrete, "run.name=one_rank")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == f"done: {runs / 'one_rank'}"
    return runs / "one_rank"


def launchers(port: int) -> dict[str, list[str]]:
    return {
        "deepspeed": [
            *["deepspeed", "--num_accelerators", "2", "--master_port", str(port)],
            *["--log_level", "error", PYTHON[1]],
        ],
        "mpirun": ["mpirun", "-n", "2", "--oversubscribe", *PYTHON],
        "torchrun": [
            *["torchrun", "--nproc_per_node", "2", "--master_port", str(port), PYTHON[1]],
        ],
    }


@pytest.mark.parametrize("launcher", ["deepspeed", "mpirun", "torchrun"])
def test_every_launcher_gives_the_same_predictions(
    launcher: str,
    one_rank: Path,
    command: Any,
    discrete: list[str],
    predictions_of: Any,
    free_port: Callable[[], int],
) -> None:
    name = f"by_{launcher}"
    ended = command(*launchers(free_port())[launcher], *discrete, f"run.name={name}")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("done: ") == 1
    assert_same_predictions(name, predictions_of)


def test_three_ranks_and_sharded_weights_give_the_same_predictions(
    one_rank: Path, start: Any, discrete: list[str], predictions_of: Any
) -> None:
    job = start([*discrete, "run.name=sharded", "parallel.zero=3"], ranks=3).wait()
    assert job.codes == [0, 0, 0], job.err
    assert_same_predictions("sharded", predictions_of)


def test_sharded_ranks_generate_in_step(
    start: Any, discrete: list[str], predictions_of: Any
) -> None:
    """Outputs end at different lengths, and ranks have different numbers of batches."""
    generated = [*discrete, "prompt.scoring=generate", "prompt.max_new_tokens=3"]
    for name, ranks, stage in (("generated", 1, 0), ("generated_sharded", 2, 3)):
        own = [f"run.name={name}", f"parallel.zero={stage}"]
        job = start([*generated, *own], ranks=ranks).wait()
        assert job.codes == [0] * ranks, job.err
    expected, given = predictions_of("generated"), predictions_of("generated_sharded")
    assert expected.scores is None
    assert given.predicted.tolist() == expected.predicted.tolist()


def test_chunks_do_not_change_the_predictions(
    one_rank: Path, start: Any, discrete: list[str], predictions_of: Any
) -> None:
    job = start([*discrete, "run.name=chunked", "evaluation.chunk_examples=5"], ranks=2).wait()
    assert job.codes == [0, 0], job.err
    assert_same_predictions("chunked", predictions_of)


def assert_same_predictions(name: str, predictions_of: Any) -> None:
    for split, texts in (("dev", 37), ("test", 1)):
        given, expected = predictions_of(name, split), predictions_of("one_rank", split)
        assert len(expected.ids) == texts
        assert given.ids.tolist() == expected.ids.tolist()
        assert given.texts.tolist() == expected.texts.tolist()
        np.testing.assert_allclose(given.scores, expected.scores, rtol=0, atol=1e-4)
        assert given.predicted.tolist() == expected.predicted.tolist()


def test_predictions_are_those_of_the_texts(
    one_rank: Path, sample: Dataset, predictions_of: Any
) -> None:
    dev, stored = sample.splits["dev"], predictions_of("one_rank")
    assert stored.ids.tolist() == dev["id"].to_pylist()
    assert stored.texts.tolist() == dev["text"].to_pylist()
    assert stored.labels.tolist() == dev["label"].to_pylist()
    # Texts that say the same score the same, others differ: no row has another's scores.
    distinct = {text: tuple(row) for text, row in zip(stored.texts, stored.scores, strict=True)}
    assert len(distinct) == 33 == len(set(distinct.values()))
    for text, row in zip(stored.texts, stored.scores, strict=True):
        assert distinct[text] == tuple(row)


def test_a_run_keeps_all_that_it_stands_on(
    one_rank: Path, data: Path, pangu: Path, discrete: list[str]
) -> None:
    files = {str(path.relative_to(one_rank)) for path in one_rank.rglob("*") if path.is_file()}
    assert files == {
        *["config.yaml", "ds_config.json", "environment.json", "report_row.json"],
        *["predictions/dev.parquet", "predictions/test.parquet", "metrics.json", "report.html"],
    }
    stored = load_config(one_rank / "config.yaml")
    given = load_config(Path(discrete[1]), ["run.name=one_rank"])
    assert stored.model.precision == "fp32" and stored.parallel.zero == 0
    assert stored.section("prompt") == given.section("prompt")
    environment = json.loads((one_rank / "environment.json").read_text(encoding="utf-8"))
    for folder, recorded in (
        (data, environment["data_sha256"]),
        (pangu, {str(pangu / name): v for name, v in environment["model_sha256"].items()}),
    ):
        assert recorded == {
            str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()
        }
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["hardware"]["world_size"] == 1


def test_metrics_can_be_made_again_from_the_predictions(
    one_rank: Path, predictions_of: Any, tmp_path: Path
) -> None:
    stored = (one_rank / "metrics.json").read_bytes()
    shutil.copytree(one_rank / "predictions", tmp_path / "predictions")
    write_metrics(tmp_path)
    assert (tmp_path / "metrics.json").read_bytes() == stored
    dev = predictions_of("one_rank")
    assert json.loads(stored)["splits"]["dev"]["hit@1"]["value"] == pytest.approx(
        np.mean(dev.scores.argmax(axis=1) == dev.labels)
    )


def test_check_shows_an_example_with_its_ids_and_touches_nothing(
    discrete: list[str],
    runs: Path,
    sample: Dataset,
    pangu: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from prompting.pangu import PanguTokenizer

    assert main([*discrete, "--check", "run.name=checked"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "ok"
    assert "data: dev, 37 texts" in lines
    text = sample.splits["dev"]["text"][0].as_py()
    assert f"  文本分类: {text}" in lines
    shown = json.loads(next(line for line in lines if line.startswith("  ids "))[6:])
    tokenizer = PanguTokenizer(pangu / "vocab.model")
    ids = tokenizer(text)["input_ids"]
    assert any(shown[i : i + len(ids)] == ids for i in range(len(shown)))
    words = {f"label word {w}: ids {tokenizer(w)['input_ids']}" for w in sample.labels}
    assert words <= set(lines)
    assert not (runs / "checked").exists()


# Refusals -----------------------------------------------------------------------------------


def bad_inputs(folder: Path, data: Path, pangu: Path) -> Iterator[tuple[str, list[str], str]]:
    """(case, overrides, what the message says); the files are made in `folder`."""

    def table(name: str, content: bytes) -> list[str]:
        (folder / name).write_bytes(content)
        labels = "data.labels=[动画,音乐舞蹈,知识,生活,影视]"
        return ["data.path=null", labels, "data.evaluate=[dev]", f"data.dev={folder / name}"]

    def model(name: str) -> Path:
        shutil.copytree(pangu, folder / name)
        return folder / name

    def edited(name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> list[str]:
        file = model(name) / "model.safetensors"
        state = load_file(file)
        change(state)
        save_file(state, file, metadata={"format": "pt"})
        return [f"model.path={file.parent}"]

    yield "missing file", [*table("x.tsv", b"")[:-1], f"data.dev={folder}/no.tsv"], "no such file"
    yield "empty file", table("empty.tsv", b""), "empty file"
    gbk = "label\ttext_a\n0\t弹幕\n".encode("gb18030")
    yield "wrong encoding", table("gbk.tsv", gbk), "not UTF-8"
    yield "label", table("label.tsv", b"label\ttext_a\n5\tx\n"), "label '5' is not among 0-4"
    yield "empty text", table("text.tsv", b"label\ttext_a\n0\t \n"), "line 2: empty text"
    yield "no data folder", [f"data.path={folder}/none"], "does not exist"
    without_test = shutil.copytree(data, folder / "without_test")
    (without_test / "test.parquet").unlink()
    yield "missing split", [f"data.path={without_test}"], "this run needs the split 'test'"
    (without_test / "train.parquet").unlink()
    draws = [f"data.path={without_test}", "data.evaluate=[dev]", "prompt.template=few_shot"]
    draws += ["prompt.demonstrations={count: 2}"]
    yield "no train split", draws, "drawn from the train split"
    yield "no slot", ["prompt.template={question: 分类}"], "expected the slot {text} exactly once"
    words = ["prompt.verbalizer={动画: 知识}"]
    yield "same ids", words, "have the same ids"
    yield "no model", [f"model.path={folder}/no/model"], "no such folder"
    yield "no model, relative", ["model.path=no_model_of_this_name"], "no_model_of_this_name"
    small = model("small_vocabulary")
    settings = json.loads((small / "config.json").read_text())
    state = load_file(small / "model.safetensors")
    for key, value in state.items():
        if len(value) == settings["vocab_size"]:
            state[key] = value[:500].clone()
    settings["vocab_size"] = 500
    (small / "config.json").write_text(json.dumps(settings))
    save_file(state, small / "model.safetensors", metadata={"format": "pt"})
    yield "tokenizer", [f"model.path={small}"], "ids and the model 500"
    cut = model("truncated")
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[:-1000])
    yield "truncated", [f"model.path={cut}"], "a weight file is truncated"
    noise = model("corrupt")
    (noise / "model.safetensors").write_bytes(b"\xff" * 2000)
    yield "corrupt", [f"model.path={noise}"], "a weight file is truncated"
    (model("no_weights") / "model.safetensors").unlink()
    yield "no weights", [f"model.path={folder / 'no_weights'}"], str(folder / "no_weights")
    shards = model("shards")
    state, halves = load_file(shards / "model.safetensors"), ("a.safetensors", "b.safetensors")
    index = {key: halves[i % 2] for i, key in enumerate(sorted(state))}
    for half in halves:
        part = {key: state[key] for key in state if index[key] == half}
        save_file(part, shards / half, metadata={"format": "pt"})
    (shards / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
    )
    (shards / "model.safetensors").unlink()
    (shards / "b.safetensors").unlink()
    yield "missing shard", [f"model.path={shards}"], "b.safetensors"
    key = "model.layers.0.self_attn.q_proj.weight"
    shape = edited("shapes", lambda state: state.update({key: torch.zeros(32, 31)}))
    yield "shape", shape, f"{key}: shape (32, 31) in the checkpoint, (32, 32) by config.json"
    yield "weight", edited("gone", lambda state: state.__delitem__(key)), f"{key}: not in the"
    yield "template's name", ["prompt.template=study_9"], "no built-in template of this name"


CASES = [
    *["missing file", "empty file", "wrong encoding", "label", "empty text", "no data folder"],
    *["missing split", "no train split", "no slot", "same ids", "no model"],
    *["no model, relative", "tokenizer", "truncated", "corrupt", "no weights", "missing shard"],
    *["shape", "weight", "template's name"],
]


@pytest.fixture(scope="session")
def refusals(
    start: Any,
    discrete: list[str],
    data: Path,
    pangu: Path,
    runs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, Any]]:
    """What a run and a check of every bad input answer, all of them in one process."""
    cases = list(bad_inputs(tmp_path_factory.mktemp("bad"), data, pangu))
    commands = []
    for place, (_, overrides, _) in enumerate(cases):
        arguments = [*discrete, f"run.name=refused_{place}", *overrides]
        commands += [("launcher.run", arguments), ("launcher.run", [*arguments, "--check"])]
    job = start(commands=commands).wait()
    assert job.codes == [0], job.err
    answers = job.err_file.read_text(encoding="utf-8").split("\0")
    return {
        case: {
            "run": answers[2 * place],
            "check": answers[2 * place + 1],
            "expected": expected,
            "folder": runs / f"refused_{place}",
        }
        for place, (case, _, expected) in enumerate(cases)
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", ["run", "check"])
def test_bad_input_is_refused_in_one_line(
    case: str, way: str, refusals: dict[str, dict[str, Any]]
) -> None:
    answer = refusals[case]
    lines = answer[way].strip().split("\n")
    assert len(lines) == 1, answer[way]
    assert answer["expected"] in lines[0]
    assert not answer["folder"].exists()


def test_every_case_is_tried(refusals: dict[str, dict[str, Any]]) -> None:
    assert sorted(refusals) == sorted(CASES)


def test_two_ranks_refuse_once(
    command: Any, discrete: list[str], runs: Path, free_port: Callable[[], int]
) -> None:
    launcher = launchers(free_port())["deepspeed"]
    ended = command(*launcher, *discrete, "run.name=refused", "data.path=/no/such/folder")
    assert ended.returncode == 2
    output = ended.stdout + ended.stderr
    assert output.count("data.path: /no/such/folder does not exist") == 1
    assert "Traceback" not in output
    assert not (runs / "refused").exists()


def test_a_run_is_neither_overwritten_nor_resumed_with_another_config(
    one_rank: Path, start: Any, discrete: list[str]
) -> None:
    before = {path: path.read_bytes() for path in one_rank.rglob("*") if path.is_file()}
    named = [*discrete, "run.name=one_rank"]
    changed = ["--resume", "prompt.template=study_3", "evaluation.chunk_examples=9"]
    commands = [
        ("launcher.run", named),
        ("launcher.run", [*named, *changed]),
        ("launcher.run", [*discrete, "run.name=never_begun", "--resume"]),
    ]
    job = start(commands=commands).wait()
    assert job.codes == [0], job.err
    exists, differs, none, _ = job.err_file.read_text(encoding="utf-8").split("\0")
    assert exists.count("\n") == 1 and "give another run.name, or --resume to go on" in exists
    assert "--resume: prompt.template.question is '文本分类: {text}' in the run" in differs
    assert "--resume: evaluation.chunk_examples is 16384 in the run and 9 now" in differs
    assert none.count("\n") == 1 and "leave --resume out to start it" in none
    assert before == {path: path.read_bytes() for path in one_rank.rglob("*") if path.is_file()}


def test_options_and_overrides_may_be_mixed(
    discrete: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = ["data.evaluate=[test]", *discrete, "run.name=mixed", "--check", "prompt.scoring=pmi"]
    assert main(mixed) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ok"


# Texts and labels at the edge ----------------------------------------------------------------


def test_long_texts_are_cut_inside_their_slot_and_counted(
    start: Any, discrete: list[str], tmp_path: Path, sample: Dataset, predictions_of: Any
) -> None:
    text = "".join(sample.splits["train"]["text"].to_pylist()[:40])
    rows = [text, text + "结尾不同", "短"]
    write_texts(tmp_path / "long.jsonl", rows)
    arguments = own_texts(discrete, sample, tmp_path / "long.jsonl", "long")
    job = start([*arguments, "evaluation.chunk_examples=2"]).wait()
    assert job.codes == [0], job.err
    assert "note: truncated_texts 2" in job.out
    scores = predictions_of("long").scores
    # What follows the text, answer and labels, is not cut: only the texts' ends are gone.
    np.testing.assert_allclose(scores[0], scores[1], rtol=0, atol=1e-4)
    assert np.abs(scores[0] - scores[2]).max() > 0.01


def test_a_label_that_begins_another_is_told_and_scored(
    start: Any, discrete: list[str], sample: Dataset, predictions_of: Any, capsys: Any
) -> None:
    words = "prompt.verbalizer={动画: 知识生活}"
    assert main([*discrete, words, "--check"]) == 0
    warnings = [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning: ")]
    assert len(warnings) == 1 and "'知识' begins '知识生活'" in warnings[0]
    job = start([*discrete, words, "run.name=prefix"]).wait()
    assert job.codes == [0], job.err
    scores = predictions_of("prefix").scores
    names = list(sample.labels)
    assert (scores[:, names.index("动画")] <= scores[:, names.index("知识")]).all()
    assert np.isfinite(scores).all()


def test_scores_that_are_no_numbers_are_refused(
    start: Any, discrete: list[str], pangu: Path, tmp_path: Path, runs: Path
) -> None:
    shutil.copytree(pangu, tmp_path / "nan")
    state = load_file(tmp_path / "nan" / "model.safetensors")
    state["model.layers.0.self_attn.q_proj.weight"][:] = float("nan")
    save_file(state, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    job = start([*discrete, "run.name=no_numbers", f"model.path={tmp_path / 'nan'}"]).wait()
    assert job.codes == [2]
    assert job.err.strip().split("\n")[-1].startswith("model.path: the model's scores of ")
    assert "Traceback" not in job.err
    assert not list((runs / "no_numbers").rglob("*.parquet"))


# Stops ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def in_parts(discrete: list[str]) -> list[str]:
    """Arguments of a run that scores the train split in 40 parts."""
    return [*discrete, "data.evaluate=[train]", "evaluation.chunk_examples=8"]


@pytest.fixture(scope="session")
def uninterrupted(start: Any, in_parts: list[str], runs: Path) -> Path:
    job = start([*in_parts, "run.name=uninterrupted"]).wait()
    assert job.codes == [0], job.err
    return runs / "uninterrupted"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_is_finished_by_resume(
    number: signal.Signals, uninterrupted: Path, start: Any, in_parts: list[str], runs: Path
) -> None:
    arguments = [*in_parts, f"run.name=scoring_{number.name}"]
    run, job = runs / f"scoring_{number.name}", start(arguments)
    third = run / "predictions" / "train.parts" / "00002.parquet"
    while not third.exists():
        assert job.processes[0].is_alive(), job.err
        time.sleep(0.002)
    os.kill(job.processes[0].pid, number)
    job.wait()
    assert job.codes == [75 if number == signal.SIGTERM else -number], job.err
    assert third.exists() and not (run / "metrics.json").exists()
    written = third.stat().st_mtime_ns
    os.link(third, run / "third.parquet")
    resumed = start([*arguments, "--resume"]).wait()
    assert resumed.codes == [0], resumed.err
    assert (run / "third.parquet").stat().st_mtime_ns == written
    assert same_results(run, uninterrupted)


def test_a_full_disk_is_told_and_resume_finishes(
    uninterrupted: Path, start: Any, in_parts: list[str], tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "128k") as (disk, resize):
        arguments = [*in_parts, "run.name=full", f"run.dir={disk}"]
        job = start(arguments).wait()
        assert job.codes == [2], job.err
        message = job.err.strip().split("\n")[-1]
        assert "no space left on this disk; free some" in message
        assert "Traceback" not in job.err
        parts = disk / "full" / "predictions" / "train.parts"
        kept = {path: path.read_bytes() for path in parts.iterdir()}
        assert len(kept) > 2
        assert sorted(path.name for path in kept) == [
            f"{part:05d}.parquet" for part in range(len(kept))
        ]
        resize("4m")
        resumed = start([*arguments, "--resume"]).wait()
        assert resumed.codes == [0], resumed.err
        assert same_results(disk / "full", uninterrupted)


def test_a_full_disk_in_training_is_told(start: Any, pretrain: list[str], tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "600k") as (disk, resize):
        job = start([*pretrain, "run.name=small", f"run.dir={disk}"]).wait()
        assert job.codes == [2], job.err
        assert "trained parameters take up to 0.00 GiB: free some" in job.err
        assert "Traceback" not in job.err
        resize("16m")
        job = start([*pretrain, "run.name=full", f"run.dir={disk}"])
        deadline = time.monotonic() + 60
        while not (disk / "full/train_log.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        # Others fill the disk while it trains.
        resize("600k")
        job.wait()
        assert job.codes == [2], job.err
        message = job.err.strip().split("\n")[-1]
        assert message.startswith(f"{disk / 'full/checkpoints/last/step_3'}: not written, with ")
        assert "free some" in message
        assert "Traceback" not in job.err


@pytest.mark.slow
def test_memory_does_not_grow_with_the_texts(
    start: Any, discrete: list[str], sample: Dataset, tmp_path: Path
) -> None:
    peaks = []
    for chunks in (5, 30):
        file = tmp_path / f"{chunks}.jsonl"
        # Chunks alike: what kernels keep for each new shape of a batch is not what is asked here.
        write_texts(file, [f"第{n}条弹幕" for n in range(2000)] * chunks)
        arguments = own_texts(discrete, sample, file, f"memory_{chunks}")
        arguments += ["evaluation.chunk_examples=2000", "evaluation.micro_batch_tokens=8192"]
        job = start(arguments).wait(600)
        assert job.codes == [0], job.err
        peaks.append(job.peak_bytes)
    # 50,000 more texts, their ids and labels are held, and for the metrics five scores each.
    assert peaks[1] - peaks[0] < 60e6


def write_texts(file: Path, texts: list[str]) -> None:
    lines = [json.dumps({"text": text, "label": 0}, ensure_ascii=False) + "\n" for text in texts]
    file.write_text("".join(lines), encoding="utf-8")


def own_texts(discrete: list[str], sample: Dataset, file: Path, name: str) -> list[str]:
    """Arguments to score the texts of a file."""
    labels = f"data.labels=[{','.join(sample.labels)}]"
    data = ["data.path=null", f"data.dev={file}", labels, "data.evaluate=[dev]"]
    return [*discrete, *data, f"run.name={name}"]


def same_results(run: Path, other: Path) -> bool:
    files = ["predictions/train.parquet", "metrics.json"]
    return all((run / file).read_bytes() == (other / file).read_bytes() for file in files)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A disk of its own at `folder`, and a function that gives it another size."""
    folder.mkdir()

    def mount(options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        with contextlib.suppress(OSError):
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        return False

    if not mount(f"size={size}"):
        pytest.skip("a disk can't be mounted here")
    try:
        yield folder, lambda larger: (mount(f"remount,size={larger}"), None)[1]
    finally:
        subprocess.run(["umount", str(folder)], check=True)
