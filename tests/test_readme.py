"""The READMEs' commands run, their configs load, and the documentation is what the code is."""

import argparse
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.dataset import Dataset, read_dataset, write_dataset
from data_prep.sample import make_sample
from launcher import run
from launcher.config import dump_config, load_config, parse_config
from launcher.metrics import METRICS
from launcher.predictions import read_predictions
from prompting.pangu import PanguConfig, PanguForCausalLM, PanguTokenizer, train_vocabulary

ROOT = Path(__file__).resolve().parent.parent
READMES = [ROOT / "README.md", ROOT / "README.zh.md"]
DOCUMENTS = [*READMES, *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
RUN_CONFIGS = [file for file in CONFIGS if file.parent.name != "sweeps"]
REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")


def blocks(file: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", file.read_text("utf-8"), re.M | re.S)


COMMANDS = [line for block in blocks(READMES[0], "sh") for line in block.splitlines()]
LAUNCHERS = ("deepspeed", "mpirun", "torchrun")


def launched(command: str) -> tuple[str, list[str]]:
    """(launcher, what each rank's run.py is given), by the launcher's own parser if it has one."""
    launcher, *given = shlex.split(command)
    if launcher == "deepspeed":
        parser = importlib.import_module("deepspeed.launcher.runner")
        parsed = parser.parse_args(given)
        script, rest = parsed.user_script, parsed.user_args
    elif launcher == "torchrun":
        parser = importlib.import_module("torch.distributed.run")
        parsed = parser.get_args_parser().parse_args(given)
        assert parsed.nproc_per_node == "8"
        script, rest = parsed.training_script, parsed.training_script_args
    elif launcher == "python":
        script, *rest = given
    else:
        assert given[:3] == ["-n", "8", "python"]
        _, _, _, script, *rest = given
    assert script == "launcher/run.py"
    return launcher, rest


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the commands run: the project's own code and configs, beside tiny stand-ins for the
    files that the README says are needed."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("launcher", "prompting", "finetune", "baselines", "data_prep", "configs"):
        (folder / name).symlink_to(ROOT / name)
    sample = make_sample(size=210)
    sample.splits["test"] = sample.splits["test"].slice(0, 8)
    (folder / "data").mkdir()
    write_dataset(folder / "data/danmu5", sample)
    write_words(folder / "data/danmu6", sample)
    (folder / "chats.jsonl").write_text(blocks(READMES[0], "jsonl")[0], encoding="utf-8")
    (folder / "my.yaml").write_text(blocks(READMES[0], "yaml")[0], encoding="utf-8")

    words = folder / "small.model"
    texts = sample.splits["train"]["text"].to_pylist()
    # Often enough that no character of a label word is left out of the vocabulary.
    train_vocabulary([*texts, *[*sample.labels, "游戏", "电竞", "美食"] * 50], words, 1000)
    torch.manual_seed(0)
    write_nano(folder / "models/any-causal-lm", words)
    write_demo_run(folder / "runs/demo/prompt_1", folder / "models/any-causal-lm", sample.labels)
    write_vocabulary(folder / "vocab.model", words, 40_000)
    write_megatron(folder / "pangu-alpha-evolution_2.6B_fp16", vocabulary=40_000)
    return folder


def write_words(folder: Path, sample: Dataset) -> None:
    """Files as the study's, of a few texts and six labels."""
    folder.mkdir()
    for split, table in sample.splits.items():
        rows = [f"{n % 6}\t{text}" for n, text in enumerate(table["text"].to_pylist())]
        (folder / f"{split}.tsv").write_text("\n".join(["label\ttext_a", *rows, ""]), "utf-8")


def write_nano(folder: Path, words: Path) -> None:
    tokenizer = PanguTokenizer(words)
    config = PanguConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    PanguForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_demo_run(folder: Path, model: Path, labels: tuple[str, ...]) -> None:
    """What `make demo` leaves of a run, as far as predicting needs it."""
    values: dict[str, Any] = {
        "method": "prompting.discrete",
        "run": {"name": folder.name, "dir": str(folder.parent)},
        "data": {"path": str(folder.parent / "data"), "labels": list(labels)},
        "model": {"path": str(model), "precision": "fp32"},
        "parallel": {"zero": 0},
        "prompt": {"template": "study_1"},
    }
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(parse_config(values)), encoding="utf-8")


def write_vocabulary(path: Path, small: Path, size: int) -> None:
    """`small` filled up with pieces of private characters that occur nowhere."""
    model: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()
    model.ParseFromString(small.read_bytes())
    for number in range(size - len(model.pieces)):
        model.pieces.add(piece=chr(0xF0000 + number), score=-100.0)
    path.write_bytes(model.SerializeToString())


def write_megatron(folder: Path, vocabulary: int) -> None:
    """An Evolution checkpoint as published, of PanGu's smallest known width and two layers."""
    config = PanguConfig(
        vocab_size=vocabulary, hidden_size=1024, num_hidden_layers=2, num_attention_heads=16,
        max_position_embeddings=128, intermediate_size=64,
    )  # fmt: skip
    names = [
        (r"model\.embed_tokens", "embedding.word_embeddings"),
        (r"model\.embed_positions", "embedding.position_embeddings"),
        (r"model\.embed_queries", "task_embedding.top_query_embeddings"),
        (r"model\.query_layer", "transformer.topQueryLayer"),
        (r"model\.", "transformer."),
        (r"self_attn\.([qkv])_proj", r"attention.\1"),
        (r"self_attn\.o_proj", "attention.dense"),
        (r"mlp\.up_proj", "mlp.dense_h_to_4h"),
        (r"mlp\.down_proj", "mlp.dense_4h_to_h"),
        (r"attention\.q\.", "attention.query."),
        (r"attention\.k\.", "attention.key."),
        (r"attention\.v\.", "attention.value."),
    ]
    weights = {}
    for name, tensor in PanguForCausalLM(config).half().state_dict().items():
        if name != "lm_head.weight":
            for ours, theirs in names:
                name = re.sub(ours, theirs, name)
            weights[f"language_model.{name}"] = tensor
    rank = folder / "iter_0001000/mp_rank_00"
    rank.mkdir(parents=True)
    torch.save({"model": weights, "iteration": 1000}, rank / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("1000\n")


@pytest.fixture(scope="module")
def outputs(folder) -> dict[str, str]:
    """What each command that a CPU can run prints, run in the README's order, unchanged.

    The launches on 8 GPUs stand for one another: the plain `python` one runs, and the run that the
    report compares with it is its copy.
    """
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    outputs = {}
    beside = []
    for command in COMMANDS:
        if command.startswith(("make ", *LAUNCHERS)):
            continue
        if command.endswith(" &"):
            words = shlex.split(command.removesuffix("&"))
            beside.append(
                subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.PIPE)
            )
            # It says where it listens.
            outputs[command] = beside[-1].stdout.readline().decode()
            continue
        if command.startswith("python -m launcher.report"):
            runs = folder / "runs"
            shutil.copytree(runs / "pangu_2_6b_score", runs / "pangu_2_6b_pmi")
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        outputs[command] = done.stdout
    for process in beside:
        process.terminate()
        process.wait(30)
    return outputs


def test_both_readmes_say_the_same():
    english, chinese = READMES
    for language in ("sh", "json", "jsonl", "yaml"):
        assert blocks(english, language) == blocks(chinese, language) != []
    table = re.compile(r"^> \|.*$", re.M)
    rows = [table.findall(file.read_text("utf-8")) for file in READMES]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 11


def test_every_command_is_run_or_parsed(outputs):
    """Nothing is left out but make's targets and the launches, which other tests look at."""
    others = [c for c in COMMANDS if c not in outputs]
    assert {c.split()[0] for c in others} == {"make", *LAUNCHERS}
    assert len(outputs) == 13


@pytest.mark.parametrize("target", [c.split()[1] for c in COMMANDS if c.startswith("make ")])
def test_make_targets_exist(target):
    done = subprocess.run(
        ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert {"demo": "launcher.demo", "test": "pytest"}[target] in done.stdout


def test_predict_prints_what_the_readme_shows(outputs):
    (printed,) = (out for command, out in outputs.items() if "launcher.predict" in command)
    answer, shown = json.loads(printed), json.loads(blocks(READMES[0], "json")[0])
    assert answer.keys() == shown.keys()
    assert answer["text"] == shown["text"]
    assert answer["scores"].keys() == shown["scores"].keys()


def test_pangu_is_converted_checked_and_run(outputs, folder):
    checks = [out for command, out in outputs.items() if command.endswith("--check")]
    assert all(out.endswith("\nok\n") for out in checks)
    pangu, own = checks
    assert "model: pangu, 128 positions, 40000 ids" in pangu
    assert "网络语言分类: " in pangu
    assert "  弹幕：三分绝杀\n" in own
    assert "label word 电竞" in own
    predictions = read_predictions(folder / "runs/pangu_2_6b_score/predictions/test.parquet")
    test = read_dataset(folder / "data/danmu5").splits["test"]
    assert predictions.texts.tolist() == test["text"].to_pylist()
    assert predictions.scores is not None
    (compared,) = (out for command, out in outputs.items() if "launcher.report" in command)
    assert compared.split() == ["runs/compare/report.md", "runs/compare/report.html"]
    (planned,) = (out for command, out in outputs.items() if command.endswith("--plan"))
    assert planned.startswith("hardware: ") and "parallel.zero=0" in planned
    assert (folder / "runs/compare/report.md").read_text("utf-8").count("| study_4 ") == 2


def test_launches_are_understood(folder, monkeypatch):
    monkeypatch.chdir(folder)
    seen = []
    for command in COMMANDS:
        if command.startswith(LAUNCHERS):
            launcher, given = launched(command)
            options = run._parser().parse_args(given)
            config = load_config(options.config, options.overrides)
            asked = config.method.startswith("prompting.")
            scoring = config.section("prompt").scoring if asked else config.method
            if asked:
                assert str(config.model.path).endswith("models/pangu-alpha-evolution-2.6B")
            seen.append((launcher, config.run.name, scoring))
    plain = [(launcher, "pangu_2_6b_score", "sum") for launcher in LAUNCHERS]
    others = [("pangu_2_6b_pmi", "pmi"), ("range", "sum"), ("pangu_2_6b_soft_prompt", "sum")]
    others += [("recommended_roberta", "finetune.encoder")]
    assert sorted(seen) == sorted([*plain, *[("deepspeed", *other) for other in others]])


@pytest.mark.parametrize("file", RUN_CONFIGS, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_configs_header_launches_it(file):
    text = file.read_text("utf-8")
    commands = re.findall(r"^#   ((?:deepspeed|python) (?:.*\\\n#)*.*)$", text, re.M)
    (command,) = [one for one in commands if f"--config {file.relative_to(ROOT)}" in one]
    _, given = launched(command.replace("\\\n#", " "))
    options = run._parser().parse_args(given)
    assert options.config == file.relative_to(ROOT)
    load_config(file, options.overrides)


@pytest.mark.parametrize(("row", "acc_1", "acc_3"), [
    (1, "0.093", "0.118"), (2, "0.131", "0.143"), (3, "0.098", "0.104"), (4, "0.145", "0.158"),
])  # fmt: skip
def test_a_config_for_each_row_of_the_study(row, acc_1, acc_3):
    file = ROOT / f"configs/paper/prompt_{row}.yaml"
    assert f"Acc@1 {acc_1} and Acc@3 {acc_3}" in file.read_text("utf-8")
    config = load_config(file)
    assert config.section("prompt").template.name == f"study_{row}"
    assert config.section("prompt").scoring == "generate"


def test_own_data_of_the_readme_is_read(folder):
    config = load_config(folder / "my.yaml")
    data = read_dataset(files={"test": folder / "chats.jsonl"}, labels=config.data.labels)
    assert data.splits["test"]["label"].to_pylist() == [0, None]
    assert data.splits["test"]["distribution"].to_pylist()[1] == pytest.approx([0.1, 0.9])


def test_reference_is_generated_from_the_config():
    generator = runpy.run_path(str(ROOT / "docs/generate_reference.py"))
    assert generator["render"](REFERENCE) == REFERENCE, "run python docs/generate_reference.py"
    for sure in (
        "| `lr` | number > 0 | `0.001` |",
        "| `zero` | `auto` \\| `0` \\| `1` \\| `2` \\| `3` | `auto` | ZeRO stage;",
        "### `prompt.demonstrations[]`",
        "| `templates` | list of `prompt.template` | `study_1`, ",
    ):
        assert sure in REFERENCE


@pytest.mark.parametrize(
    "module", ["launcher.run", "launcher.predict", "launcher.report.command", "data_prep.__main__",
               "prompting.pangu.__main__", "launcher.sweep.__main__", "finetune.__main__"]
)  # fmt: skip
def test_reference_has_every_option(module, monkeypatch):
    parsers = captured_parsers(importlib.import_module(module).main, monkeypatch)
    options = [
        option
        for parser in parsers
        for action in parser._actions
        if action.help is not argparse.SUPPRESS
        for option in action.option_strings
        if option not in ("-h", "--help")
    ]
    assert [option for option in options if f"{option}" not in REFERENCE] == []
    assert options or module == "launcher.predict"


def captured_parsers(
    main: Callable[[list[str]], int], monkeypatch: pytest.MonkeyPatch
) -> list[argparse.ArgumentParser]:
    """Every parser that a command builds, those of its subcommands too."""
    made: list[argparse.ArgumentParser] = []
    plain = argparse.ArgumentParser.__init__

    def noting(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        made.append(self)
        plain(self, *args, **kwargs)

    monkeypatch.setattr(argparse.ArgumentParser, "__init__", noting)
    with pytest.raises(SystemExit):
        main(["--help"])
    return made


def test_reference_has_every_metric():
    for name in METRICS:
        assert f"`{name}`" in REFERENCE


def links(document: Path) -> Iterator[tuple[Path, str]]:
    """(file, anchor) of each relative link."""
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text("utf-8")):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            yield (document.parent / path if path else document), anchor


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    titles = re.findall(r"^#+ (.*)$", document.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_no_link_is_dead(document):
    for file, anchor in links(document):
        assert file.exists(), file
        if anchor:
            assert anchor in anchors(file), f"{file}#{anchor}"


def test_links_are_seen():
    """The test above would pass on documents in which it finds no link."""
    assert len([*links(READMES[0])]) > 5
    assert "two-kinds-of-accuracy" in anchors(ROOT / "docs/concepts.md")


@pytest.mark.parametrize("file", [*DOCUMENTS, *CONFIGS], ids=lambda file: file.name)
def test_no_path_of_a_machine(file):
    text = file.read_text("utf-8")
    assert re.findall(r"shared/|/(?:work|tmp|home|root|mnt|Users)/", text) == []
