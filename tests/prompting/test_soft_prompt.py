"""Soft spans from their template to an adapter on disk that plain PEFT loads, and back."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.errors import InputError
from prompting import adapter as adapters
from prompting import models, soft_prompt
from prompting.settings import TemplateSettings
from prompting.template import encode_pieces, leading_ids

KINDS = ["pangu", "gpt2", "llama"]
FRONT = {"template": {"question": "{soft:7:网络语言}弹幕: {text}"}}
HARD = {"template": {"question": "弹幕: {text}"}}
TAIL = "\n选项: 动画,音乐舞蹈,知识,生活,影视\n答案:"
LEARNERS: dict[str, dict[str, Any]] = {
    "prompt": {"kind": "prompt"},
    "p_tuning": {"kind": "p_tuning"},
    "prefix": {"kind": "prefix"},
    "whitened": {"kind": "prefix", "init": "whitened"},
    "projection": {"kind": "prefix", "prefix_projection": True},
    "lora": {"kind": "lora", "lora": {"rank": 4, "alpha": 32}},
}

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")


def changed(method: Any) -> Any:
    """With values that are no longer the first ones, so that nothing is equal by chance."""
    learns = method.replicated or method.module.model
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in learns.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return method


def export(method: Any, folder: Path) -> Path:
    named = method.module.named_parameters()
    method.export({n: p.detach().clone() for n, p in named if p.requires_grad}, folder)
    return folder / "adapter"


def plain_model(folders, kind: str) -> Any:
    return models.load_model(str(folders[kind]), "fp32", "sdpa")


def prompts(method: Any, texts, *, front: bool) -> list[list[int]]:
    """Ids behind the vectors in front, or behind nothing."""
    encode, opening = method.asked.tokenizer, ["弹幕: "]
    begin = [] if front else leading_ids(encode)
    head = begin + encode_pieces(encode, opening, first=not front)[0]
    tail = encode_pieces(encode, [TAIL])[0]
    return [[*head, *own, *tail] for own in encode_pieces(encode, texts)]


@pytest.mark.parametrize(
    ("kind", "learner"),
    [(k, learner) for k in KINDS for learner in LEARNERS if learner != "whitened" or k == "pangu"],
)
@torch.no_grad()
def test_plain_peft_loads_what_is_saved(
    tune, folders, texts, brute_force, score, tmp_path, kind, learner
):
    """And says the same of every label word; networks stay behind."""
    lora = learner == "lora"
    method = changed(tune(kind, HARD if lora else FRONT, tuning=LEARNERS[learner]))
    adapter = export(method, tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain_model(folders, kind), str(adapter)).eval()
    words = brute_force(theirs, prompts(method, texts, front=not lora), method.asked.trie)
    expected = words.log_softmax(1)
    torch.testing.assert_close(score(method, texts), expected, atol=1e-4, rtol=0)
    untrained = tune(kind, HARD if lora else FRONT, tuning=LEARNERS[learner])
    assert (score(untrained, texts) - expected).abs().max() > 0.05, "too alike to prove anything"


def trained_by_peft(folders, kind: str, learner: str, folder: Path, **told) -> Any:
    """PEFT's own adapter, saved by PEFT."""
    common: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if learner != "lora":
        common["num_virtual_tokens"] = 7
    names = ["c_attn"] if kind == "gpt2" else ["q_proj", "v_proj"]
    made: dict[str, Any] = {
        "prompt": peft.PromptTuningConfig,
        "p_tuning": peft.PromptEncoderConfig,
        "prefix": peft.PrefixTuningConfig,
        "lora": peft.LoraConfig,
    }
    if learner == "lora":
        common |= {"r": 4, "lora_alpha": 32, "target_modules": names}
        common["fan_in_fan_out"] = kind == "gpt2"
    torch.manual_seed(2)
    model = peft.get_peft_model(plain_model(folders, kind), made[learner](**common | told))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(str(folder))
    return model.eval()


@pytest.mark.parametrize("learner", ["prompt", "p_tuning", "prefix", "lora"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_peft_saved_is_a_start(
    tune, folders, texts, brute_force, score, tmp_path, kind, learner
):
    theirs = trained_by_peft(folders, kind, learner, tmp_path)
    told = LEARNERS["prompt" if learner == "p_tuning" else learner]
    lora = learner == "lora"
    method = tune(kind, HARD if lora else FRONT, tuning=told | {"init_from": str(tmp_path)})
    words = brute_force(theirs, prompts(method, texts, front=not lora), method.asked.trie)
    torch.testing.assert_close(score(method, texts), words.log_softmax(1), atol=1e-4, rtol=0)


def test_a_start_of_our_own_is_what_was_exported(tune, score, texts, tmp_path):
    """Also what a network gave goes on as plain vectors, in any place of the prompt."""
    prompt = {"template": {"question": "{soft:4}{text}{soft:3}"}}
    first = changed(tune("llama", prompt, tuning=LEARNERS["p_tuning"]))
    adapter = export(first, tmp_path)
    again = tune("llama", prompt, tuning={"kind": "prompt", "init_from": str(adapter)})
    torch.testing.assert_close(score(again, texts), score(first, texts), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "question", ["{text}{soft:3}", "弹幕{soft:3}{text}", "{soft:3}{text}{soft:2}"]
)
def test_vectors_behind_words_are_not_for_peft(tune, folders, tmp_path, question):
    """Which would put them in front without a word; an older adapter there does not mislead it."""
    export(tune("gpt2", FRONT), tmp_path)
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    prompt = {"template": {"question": question}}
    adapter = export(tune("gpt2", prompt, tuning={"init": "labels"}), tmp_path)
    assert sorted(file.name for file in adapter.iterdir()) == [
        "adapter_model.safetensors",
        "soft_prompt.json",
    ]
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json'"):
        peft.PeftModel.from_pretrained(plain_model(folders, "gpt2"), str(adapter))


@pytest.fixture
def adapter(tune, tmp_path) -> Path:
    return export(changed(tune("gpt2", FRONT)), tmp_path / "run")


OTHERS = {
    "template": (
        {"template": {"question": "{soft:7:网络语言}弹幕分类: {text}"}},
        {},
        r"learned for the prompt '\[7 soft: 网络语言\]弹幕: .*'\[7 soft: 网络语言\]弹幕分类: ",
    ),
    "choices": (FRONT | {"choice_order": "reversed"}, {}, "learned for the prompt .*影视,生活"),
    "length": (
        {"template": {"question": "{soft:6:网络语言}弹幕: {text}"}},
        {},
        r"learned for the prompt '\[7 soft.*'\[6 soft",
    ),
    "label word": (
        FRONT | {"verbalizer": {"影视": ["影视", "老师"]}},
        {},
        "learned for the label w",
    ),
    "suffix": (FRONT | {"label_suffix": "。"}, {}, "learned for the label words .*。"),
    "kind": (FRONT, {"kind": "prefix"}, "learned for the kind 'prompt', .* 'prefix'"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_an_adapter_of_another_prompt_is_refused(tune, adapter, other):
    prompt, told, message = OTHERS[other]
    with pytest.raises(InputError, match=message) as raised:
        tune("gpt2", prompt, tuning=told | {"init_from": str(adapter)})
    assert str(adapter) in str(raised.value)


def test_an_adapter_of_another_base_is_refused(tune, folders, adapter, tmp_path, score, texts):
    """Known by the weights: the same model elsewhere is the same base."""
    moved = tmp_path / "moved" / "other_name"
    shutil.copytree(folders["gpt2"], moved)
    heading = {"model": {"path": str(moved), "precision": "fp32"}}
    told = {"tuning": {"init_from": str(adapter)}}
    same = score(tune("gpt2", FRONT, **told), texts)
    assert torch.equal(score(tune("gpt2", FRONT, **told, **heading), texts), same)

    weights = load_file(moved / "model.safetensors")
    weights["transformer.h.1.mlp.c_fc.bias"][0] += 1
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"learned for the base model .*gpt2 with the hash .* use"):
        tune("gpt2", FRONT, **told, **heading)


@pytest.mark.parametrize(
    ("learner", "made_for", "told", "message"),
    [
        ("prompt", "gpt2", {"kind": "prefix"}, "seen PROMPT_TUNING, expected tuning.kind prefix"),
        ("lora", "gpt2", {"kind": "prompt"}, "seen LORA, expected tuning.kind prompt"),
        ("prompt", "pangu", {"kind": "prompt"}, "learned for the base model .*pangu, .*gpt2"),
        ("prefix", "gpt2", {"kind": "prefix", "length": 8}, r"\(7, 128\), expected \(8, 128\)"),
        (
            "lora",
            "gpt2",
            {"kind": "lora"},
            r"lora_A\S* has the shape \(4, 32\), expected \(8, 32\)",
        ),
        ("lora", "gpt2", {"kind": "lora", "lora": {"rank": 4}}, "lora_alpha 32.*alpha 16"),
    ],
)
def test_an_adapter_of_peft_s_that_does_not_fit(
    tune, folders, tmp_path, learner, made_for, told, message
):
    """Also where every tensor does, as with LoRA of another alpha."""
    trained_by_peft(folders, made_for, learner, tmp_path)
    prompt = HARD if told["kind"] == "lora" else FRONT
    if "length" in told:
        prompt, told = {"template": {"question": "{soft:8}{text}"}}, {"kind": told["kind"]}
    with pytest.raises(InputError, match=message) as raised:
        tune("gpt2", prompt, tuning=told | {"init_from": str(tmp_path)})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("told", [{"alpha": 16}, {"rank": 8}])
def test_lora_of_our_own_with_another_scale_is_refused(tune, tmp_path, told):
    adapter = export(changed(tune("gpt2", HARD, tuning=LEARNERS["lora"])), tmp_path)
    other = {"kind": "lora", "lora": {"rank": 4, "alpha": 32} | told}
    with pytest.raises(InputError, match="alpha|shape"):
        tune("gpt2", HARD, tuning=other | {"init_from": str(adapter)})


def test_use_rslora_is_another_scale_too(tune, folders, tmp_path):
    trained_by_peft(folders, "gpt2", "lora", tmp_path, use_rslora=True)
    with pytest.raises(InputError, match="use_rslora"):
        tune("gpt2", HARD, tuning=LEARNERS["lora"] | {"init_from": str(tmp_path)})


def test_damage_is_refused(tune, adapter):
    """Wherever a byte of the vectors is another, and wherever the file ends early."""
    method = tune("gpt2", FRONT)
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    assert len(whole) > 7 * 32 * 4
    damaged = [whole[:cut] for cut in (0, 7, 60, len(whole) - 400, len(whole) - 1)]
    for place in (len(whole) - 7 * 32 * 4, len(whole) - 301, len(whole) - 1):
        damaged.append(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    for contents in [*damaged, whole + b"\0"]:
        weights.write_bytes(contents)
        with pytest.raises(InputError, match=str(adapter)):
            method.load_adapter(adapter)
    weights.write_bytes(whole)
    method.load_adapter(adapter)

    identity = adapter / "soft_prompt.json"
    said = identity.read_text(encoding="utf-8")
    for text in ("", said[:-9], "[]", "{}", said.replace('"base"', '"bose"'), "null"):
        identity.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=str(adapter)):
            method.load_adapter(adapter)
    identity.write_bytes(b"\xff" + said.encode())
    with pytest.raises(InputError, match=str(adapter)):
        method.load_adapter(adapter)
    identity.unlink()
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(InputError, match="expected soft_prompt.json or PEFT's adapter_config.json"):
        method.load_adapter(adapter)
    with pytest.raises(InputError, match="no readable adapter"):
        method.load_adapter(adapter / "nowhere")


def test_a_norm_summed_up_by_another_processor_is_the_same(tune, adapter):
    """Its last digits depend on how wide the processor adds; the hash does not."""
    identity = adapter / "soft_prompt.json"
    said = json.loads(identity.read_text(encoding="utf-8"))
    said["tensors"]["prompt_embeddings"]["norm"] *= 1 + 1e-10
    identity.write_text(json.dumps(said), encoding="utf-8")
    tune("gpt2", FRONT).load_adapter(adapter)


def test_a_full_disk_s_half_file_is_noticed(tune, tmp_path, monkeypatch):
    """What was written is read again before the run goes on."""

    def half(tensors, path, metadata):
        save_file(tensors, path, metadata=metadata)
        Path(path).write_bytes(Path(path).read_bytes()[:-1])

    monkeypatch.setattr(adapters, "save_file", half)
    with pytest.raises(InputError, match="adapter"):
        export(tune("gpt2", FRONT), tmp_path)


@pytest.mark.parametrize(
    ("question", "length", "softened"),
    [
        ("弹幕{text}", None, "{soft:3:弹幕}{text}"),  # [CLS] among them
        ("{text}弹幕", None, "{text}{soft:2:弹幕}"),
        ("弹幕{text}分类", 20, "{soft:20:弹幕}{text}{soft:20:分类}"),
        ("{text}{soft:弹幕}{soft:5}", None, "{text}{soft:2:弹幕}{soft:5}"),
        ("{soft:9:弹幕}{text}", None, "{soft:9:弹幕}{text}"),
        # Words that look like the syntax, that have no tokens, or that could not be written.
        ("3:{text}", None, "{soft:3:3:}{text}"),
        ("233{text}", None, "{soft:4:233}{text}"),
        ("弹幕{text} ", None, "{soft:3:弹幕}{text} "),
        ("弹幕{text} ", 5, "{soft:5:弹幕}{text} "),
    ],
)
def test_words_become_soft(load_tokenizer, question, length, softened):
    template = TemplateSettings(question=question)
    made = soft_prompt.soften(template, load_tokenizer("gpt2"), length)
    assert made == template.model_copy(update={"question": softened})


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("{text}\n", "its question has no words that could become soft: give it a span"),
        ("弹}{text}", "its question holds braces, .*: give it a span"),
        ("{弹 幕}{text}", "its question holds braces, .*: give it a span"),
        ("{text}{soft: }", "the words of its soft span {soft: } have no tokens .*: give other"),
    ],
)
def test_words_that_cannot_become_soft(load_tokenizer, question, message):
    template = TemplateSettings(question=question)
    with pytest.raises(InputError, match=f"^prompt.template 'custom': {message}"):
        soft_prompt.soften(template, load_tokenizer("gpt2"), None)


def test_spans_in_every_segment_get_their_own_lengths(load_tokenizer):
    """In the template's order, which need not be that of its fields."""
    template = TemplateSettings(
        question="{soft:问题}{text}",
        choice="{soft:可以选}{choices}",
        answer="{soft:2}答案{soft:答}",
        order=("choice", "question", "answer"),
    )
    made = soft_prompt.soften(template, load_tokenizer("gpt2"), None)
    assert made.choice == "{soft:4:可以选}{choices}"
    assert made.question == "{soft:2:问题}{text}"
    assert made.answer == "{soft:2}答案{soft:1:答}"
