"""The config: every mistake in one answer, and a stored config that reads back as it was."""

from pathlib import Path

import pytest
import yaml

from launcher.config import deepspeed_config, dump_config, load_config, parse_config, read_text
from launcher.errors import InputError

DISCRETE = """
method: prompting.discrete
run: {name: a, dir: /r}
data: {path: /d}
model: {path: /m}
"""


def refusal(text: str, *overrides: str) -> list[str]:
    with pytest.raises(InputError) as raised:
        read_text(text, overrides)
    return str(raised.value).removeprefix("config: ").split("\nconfig: ")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("run.nmae=b", "run.nmae: unknown key, did you mean 'name'?; known here: dir, name, seed"),
        ("promt={}", "promt: unknown key, did you mean 'prompt'?"),
        ("train.zzz=1", "train.zzz: unknown key; known here: checkpoint_every"),
        ("data.max_examples.devv=3", "data.max_examples.devv: "),
        (
            "prompt.template={question: '{text}', anwser: x}",
            "prompt.template.anwser: unknown key, did you mean 'answer'?",
        ),
        (
            "prompt.demonstrations=[{text: x, label: y}, {text: x, lable: y, label: z}]",
            "prompt.demonstrations.1.lable: unknown key, did you mean 'label'?; known here: label, "
            "text",
        ),
        (
            "prompt.demonstrations={count: 2, sede: 1}",
            "prompt.demonstrations.sede: unknown key, did you mean 'seed'?; known here: count, "
            "seed",
        ),
        ("method=prompting.discreet", "method: 'prompting.discreet' is not a method, did you mean"),
        ("train.global_batch=0", "train.global_batch: Input should be greater than 0, seen 0"),
        ("train.lr=fast", "train.lr: Input should be a valid number"),
        ("model.precision=fp64", "model.precision: Input should be 'auto', 'fp32', 'bf16' or"),
        ("run.name=a/b", "run.name: "),
        ("run.name=", "run.name: "),
        ("data.train=/x", "data: expected either data.path (a dataset folder) or files"),
        ("data.evaluate=[]", "data.evaluate: "),
        ("parallel.zero=4", "parallel.zero: "),
        ("run=5", "run: "),
        ("data=null", "data: "),
    ],
)
def test_a_wrong_value_is_named_with_its_place(override: str, line: str) -> None:
    (answer,) = refusal(DISCRETE, override)
    assert answer.startswith(line)
    assert "\n" not in answer


def test_all_mistakes_are_told_at_once() -> None:
    text = "method: prompting.discreet\nrun: {seed: -1}\ntrain: {lrr: 1}\nevaluation: {}\n"
    lines = refusal(text)
    assert [line.split(":")[0] for line in lines] == [
        *["method", "run.name", "run.seed", "data", "train.lrr"]
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "expected headings such as run:, method:, data:; seen an empty file"),
        ("- a\n", "expected headings such as run:, method:, data:; seen list"),
        ("run: {name: a\n", "not readable as YAML: "),
        ("\trun: a\n", "not readable as YAML: "),
        ("run: {name: a}\ndata: {}\nrun: {}\n", "line 3: the key 'run' stands here again"),
        ("run:\n  name: a\n  seed: 1\n  name: b\n", "line 4: the key 'name' stands here again"),
        ("run: !!python/object:os.system {}\n", "not readable as YAML: "),
        ("[a]: b\n", "not readable as YAML: "),
        ("1: b\n", ""),
    ],
)
def test_text_that_is_no_config(text: str, line: str) -> None:
    assert line in refusal(text)[0]


@pytest.mark.parametrize("override", ["train.lr", "=3", "--train.lr", "train.lr:3", ""])
def test_overrides_without_a_key_or_value(override: str) -> None:
    (line,) = str_lines(override)
    assert line == f"override {override!r}: expected key=value, as in train.lr=1.0e-3"


@pytest.mark.parametrize("override", ["train.lr=[1", "run.name={a", "data.train=${", "a[=1"])
def test_overrides_that_are_no_yaml(override: str) -> None:
    assert len(str_lines(override)) == 1


def str_lines(override: str) -> list[str]:
    with pytest.raises(InputError) as raised:
        read_text(DISCRETE, [override])
    return str(raised.value).split("\n")


def test_overrides_reach_every_depth() -> None:
    config = read_text(
        DISCRETE,
        [
            *["train.lr=1e-3", "data.max_examples.dev=7", "data.evaluate=[test,dev]"],
            *["prompt.template=study_3", "run.name=x=y", "train.schedule=linear"],
        ],
    )
    assert (config.train.lr, config.data.first("dev"), config.data.first("test")) == (1e-3, 7, None)
    assert config.data.evaluate == ["test", "dev"]
    assert config.section("prompt").template.question == "弹幕分类: {text}"
    assert (config.run.name, config.train.schedule) == ("x=y", "linear")
    # What is not overridden stays, beside what is.
    assert str(config.run.dir) == "/r"


def test_numbers_as_people_write_them() -> None:
    for written in ("1e-3", "1.0e-3", "0.001", ".001", "'0.001'"):
        assert read_text(f"{DISCRETE}\ntrain: {{lr: {written}}}").train.lr == 1e-3
        assert read_text(DISCRETE, [f"train.lr={written}"]).train.lr == 1e-3


@pytest.mark.parametrize(
    "more",
    [
        "",
        "prompt: {template: few_shot, demonstrations: {count: 4, seed: 2}}",
        "prompt: {template: {question: ' {text}\\n「」:# ', choice: '', answer: 'a: b'}}",
        "prompt: {verbalizer: {动画: [二次元, 番], 'yes': 'no'}, choice_order: [b, a]}",
        # Chats are no code, whatever they hold.
        "prompt: {demonstrations: [{text: '${run.name} \\${x} ${', label: '${oc.env:HOME}'}]}",
        "data: {train: a.tsv, dev: b.tsv, labels: ['1', 'null', 'on'], max_examples: {dev: 3}}",
    ],
)
def test_a_stored_config_reads_back_equal(more: str) -> None:
    values = {**yaml.safe_load(DISCRETE), **(yaml.safe_load(more) or {})}
    config = parse_config(values)
    again = read_text(dump_config(config))
    assert again.model_dump() == config.model_dump()
    assert dump_config(again) == dump_config(config)


def test_a_pretraining_config_reads_back_equal() -> None:
    text = "method: prompting.pretrain\nrun: {name: a}\ndata: {path: d}\npretrain: {shape: {}}\n"
    config = read_text(text, ["pretrain.templates=[task, study_1]"])
    assert read_text(dump_config(config)).model_dump() == config.model_dump()
    assert [template.name for template in config.section("pretrain").templates] == [
        "task",
        "study_1",
    ]


def test_the_text_of_the_user_is_kept_as_it_is() -> None:
    text = f"{DISCRETE}\nprompt: {{demonstrations: [{{text: '${{run.name}}', label: x}}]}}"
    assert read_text(text).section("prompt").demonstrations[0].text == "${run.name}"


def test_stored_paths_can_be_used_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    config = read_text(
        "method: prompting.discrete\nrun: {name: a}\ndata: {path: d/e}\nmodel: {path: m}\n"
    )
    assert config.run_dir == tmp_path / "runs" / "a"
    assert config.data.path == tmp_path / "d" / "e"
    assert config.model.path == str(tmp_path / "m")
    hub = read_text(DISCRETE, ["model.path=owner/name"])
    assert hub.model.path == "owner/name"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for file, content, said in (
        ("none.yaml", None, "no such file"),
        ("gb.yaml", "运行".encode("gb18030"), "not readable: "),
    ):
        if content is not None:
            (tmp_path / file).write_bytes(content)
        with pytest.raises(InputError, match=f"^--config {tmp_path / file}: {said}"):
            load_config(tmp_path / file)
    with pytest.raises(InputError, match="not readable: "):
        load_config(tmp_path)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_the_deepspeed_config_follows(stage: int, precision: str, offload: str) -> None:
    config = read_text(DISCRETE, [f"parallel.offload={offload}", "train.clip_norm=0.5"])
    derived = deepspeed_config(config, precision=precision, stage=stage, trains=True)
    zero = derived["zero_optimization"]
    assert zero["stage"] == stage
    assert ("offload_optimizer" in zero) == (offload == "cpu")
    assert ("offload_param" in zero) == (offload == "cpu" and stage == 3)
    enabled = {name for name in ("bf16", "fp16") if derived[name]["enabled"]}
    assert enabled == {precision} - {"fp32"}
    assert derived["gradient_clipping"] == 0.5
    scoring = deepspeed_config(config, precision=precision, stage=stage, trains=False)
    assert "gradient_clipping" not in scoring
