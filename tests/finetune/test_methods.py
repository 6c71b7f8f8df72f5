"""Fine-tunes give what plain transformers gives, however texts are batched, and keep it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ByT5Tokenizer,
)

from data_prep.dataset import Dataset
from finetune.method import layer_depths
from launcher.errors import InputError
from prompting.pangu import PanguModel, PanguTokenizer
from tests.finetune.models import LABELS, NO_DROPOUT, export, score, train, write_model

Built = Callable[..., Any]
Model = Callable[[str], Path]
METHOD = {"bert": "encoder", "albert": "encoder", "gpt2": "decoder", "byt5": "seq2seq"}


@pytest.fixture(scope="session")
def texts(dataset: Dataset) -> list[str]:
    """Ten of different lengths."""
    found = dataset.splits["dev"]["text"].to_pylist()
    return sorted(found, key=len)[:: max(1, len(found) // 10)][:10]


@pytest.fixture(scope="session")
def rows(dataset: Dataset) -> list[int]:
    """Six examples of different lengths."""
    lengths = [len(text) for text in dataset.splits["train"]["text"].to_pylist()]
    return np.argsort(lengths)[:: len(lengths) // 6][:6].tolist()


@pytest.mark.parametrize("kind", ["bert", "albert", "gpt2"])
def test_logits_and_loss_are_those_of_plain_transformers(
    kind: str, built: Built, model: Model, dataset: Dataset, tmp_path: Path,
    texts: list[str], rows: list[int],
) -> None:  # fmt: skip
    method = built(METHOD[kind], model(kind))
    train(method, dataset.splits["train"], lr=3e-2)
    export(method, tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert plain.config.id2label == dict(enumerate(LABELS))
    wanted = ["input_ids", "attention_mask"]  # GPT-2 would add embeddings of token types

    def padded(own: list[str]) -> dict[str, torch.Tensor]:
        return {k: v for k, v in tokenizer(own, padding=True, return_tensors="pt").items()
                if k in wanted}  # fmt: skip

    with torch.no_grad():
        expected = plain(**padded(texts)).logits.log_softmax(1).numpy()
    np.testing.assert_allclose(score(method, texts), expected, rtol=0, atol=1e-5)
    assert np.ptp(expected, axis=0).max() > 1e-3

    table = dataset.splits["train"]
    labels = torch.tensor([table["label"][row].as_py() for row in rows])
    own = [table["text"][row].as_py() for row in rows]
    expected_loss = plain(**padded(own), labels=labels).loss
    expected_loss.backward()
    examples = method.training_set(table, 0)
    loss = method.loss(examples.batch(rows)) / examples.weights[rows].sum()
    loss.backward()
    assert float(loss) == pytest.approx(float(expected_loss), abs=1e-5)
    gradients = dict(plain.named_parameters())
    for name, parameter in method.module.model.named_parameters():
        if (expected_gradient := gradients[name].grad) is not None:
            torch.testing.assert_close(
                parameter.grad, expected_gradient, rtol=0, atol=1e-5, msg=name
            )


def test_label_words_score_and_learn_as_in_plain_transformers(
    built: Built, model: Model, dataset: Dataset, texts: list[str], rows: list[int]
) -> None:
    """Each word alone behind each text, and transformers' own loss of the right one."""
    plain: Any = AutoModelForSeq2SeqLM.from_pretrained(model("byt5")).eval()
    plain.config.decoder_start_token_id = 0
    tokenizer = ByT5Tokenizer()
    method = built("seq2seq", model("byt5"))
    assert not torch.equal(plain.lm_head.weight, plain.shared.weight)
    expected = np.empty((len(texts), len(LABELS)), np.float32)
    with torch.no_grad():
        for row, text in enumerate(texts):
            given = tokenizer(text, return_tensors="pt")
            for column, label in enumerate(LABELS):
                answer = tokenizer(label, return_tensors="pt").input_ids
                loss = plain(**given, labels=answer).loss
                expected[row, column] = -float(loss) * answer.numel()
    expected -= np.logaddexp.reduce(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(score(method, texts), expected, rtol=0, atol=1e-4)

    method = built("seq2seq", model("byt5"), "seq2seq.objective=language_modelling")
    table = dataset.splits["train"]
    own = [table["text"][row].as_py() for row in rows]
    answers = [LABELS[table["label"][row].as_py()] for row in rows]
    given = tokenizer(own, padding=True, return_tensors="pt")
    labels = tokenizer(answers, padding=True, return_tensors="pt").input_ids
    expected_loss = plain(**given, labels=labels.masked_fill(labels == 0, -100)).loss
    examples = method.training_set(table, 0)
    loss = method.loss(examples.batch(rows)) / examples.weights[rows].sum()
    assert float(loss.detach()) == pytest.approx(float(expected_loss), rel=1e-5)


def test_the_mean_of_all_states(
    built: Built, model: Model, dataset: Dataset, tmp_path: Path, texts: list[str]
) -> None:
    method = built("encoder", model("bert"), "encoder.pooling=mean")
    train(method, dataset.splits["train"])
    export(method, tmp_path)
    bare = AutoModel.from_pretrained(tmp_path / "model", add_pooling_layer=False).eval()
    head = load_file(tmp_path / "model" / "head.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        for text, own in zip(texts, score(method, texts), strict=True):
            states = bare(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            logits = head["1.weight"] @ states.mean(0) + head["1.bias"]
            np.testing.assert_allclose(own, logits.log_softmax(0), rtol=0, atol=1e-5)


def test_pangu_is_classified_by_its_query_layer(
    built: Built, pangu: Path, dataset: Dataset, tmp_path: Path, texts: list[str]
) -> None:
    method = built("decoder", pangu)
    train(method, dataset.splits["train"])
    export(method, tmp_path)
    bare = PanguModel.from_pretrained(tmp_path / "model").eval()
    head = load_file(tmp_path / "model" / "head.safetensors")["weight"]
    tokenizer = PanguTokenizer(tmp_path / "model" / "vocab.model")
    with torch.no_grad():
        for text, own in zip(texts, score(method, texts), strict=True):
            states = bare(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            expected = (head @ states[-1]).log_softmax(0)
            np.testing.assert_allclose(own, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "mean", "albert", "gpt2", "byt5"])
def test_padding_and_batches_change_no_score(
    kind: str, built: Built, model: Model, dataset: Dataset, rows: list[int]
) -> None:
    pooling = ["encoder.pooling=mean"] if kind == "mean" else []
    kind = "bert" if kind == "mean" else kind
    method = built(METHOD[kind], model(kind), *pooling)
    method.module.eval()
    table = dataset.splits["train"]
    batch = method.training_set(table, 0).batch(rows)
    assert batch.mask is not None and len(set(batch.lengths.tolist())) > 3
    alone = score(method, [table["text"][row].as_py() for row in rows])
    np.testing.assert_allclose(method.scores(batch).numpy(), alone, rtol=1e-6, atol=1e-5)
    few = built(METHOD[kind], model(kind), *pooling, "evaluation.micro_batch_tokens=1")
    assert max(len(one.rows) for one in few.score_batches(["生活"] * 3)) == 1
    many = score(few, [table["text"][row].as_py() for row in rows])
    np.testing.assert_allclose(many, alone, rtol=1e-6, atol=1e-5)


T5_SMALL = {"num_layers": 2, "num_decoder_layers": 1, "d_kv": 64, "num_heads": 6}
TRUE = {
    "albert": ("albert", {
        "hidden_size": 768, "embedding_size": 128, "num_attention_heads": 12,
        "intermediate_size": 3072, "hidden_act": "relu"}),
    "bert": ("bert", NO_DROPOUT),
    "gpt2": ("gpt2", {"n_embd": 768, "n_head": 12}),
    "byt5": ("byt5", {**T5_SMALL, "d_model": 1472, "d_ff": 3584}),
    "mt5": ("mt5", {**T5_SMALL, "d_model": 512, "d_ff": 1024}),
}  # fmt: skip


@pytest.mark.parametrize("name", TRUE)
def test_true_architectures_train_and_reload_alike(
    name: str, built: Built, dataset: Dataset, vocabulary: Path, tmp_path: Path, texts: list[str]
) -> None:
    """The studied models' widths, with two of their layers and random weights."""
    kind, shape = TRUE[name]
    folder = tmp_path / "pretrained"
    folder.mkdir()
    write_model(kind, folder, None if kind == "byt5" else vocabulary, shape)
    own = METHOD.get(kind, "seq2seq")
    cheaper = ["seq2seq.objective=language_modelling"] if kind == "byt5" else []
    method = built(own, folder, *cheaper)
    losses = train(method, dataset.splits["train"], steps=4, lr=3e-4)
    assert losses[-1] < losses[0]
    before = score(method, texts)
    export(method, tmp_path / "run")
    again = built(own, folder, *cheaper)
    np.testing.assert_array_equal(score(again, texts), before)
    again.load_export(tmp_path / "run")
    np.testing.assert_array_equal(score(again, texts), before)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_lora_loads_in_plain_peft(
    kind: str, built: Built, model: Model, dataset: Dataset, tmp_path: Path, texts: list[str]
) -> None:
    method = built(METHOD[kind], model(kind), "finetune.trains=lora", "finetune.lora.rank=2")
    frozen = {n: p.clone() for n, p in method.module.named_parameters() if not p.requires_grad}
    train(method, dataset.splits["train"], lr=1e-2)
    now = dict(method.module.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    assert any("base_layer" in name for name in frozen)
    before = score(method, texts)
    export(method, tmp_path / "run")
    again = built(METHOD[kind], model(kind), "finetune.trains=lora", "finetune.lora.rank=2")
    assert np.abs(score(again, texts) - before).max() > 0.1
    again.load_export(tmp_path / "run")
    np.testing.assert_array_equal(score(again, texts), before)

    base = AutoModelForSequenceClassification.from_pretrained(model(kind), num_labels=len(LABELS))
    plain = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    with torch.no_grad():
        for text, own in zip(texts, before, strict=True):
            ids = torch.tensor([method.tokenizer(text)["input_ids"]])
            expected = plain(input_ids=ids).logits[0].log_softmax(0)
            np.testing.assert_allclose(own, expected, rtol=0, atol=1e-5)


def test_a_frozen_model_stays_as_it_was(
    built: Built, model: Model, dataset: Dataset, tmp_path: Path
) -> None:
    method = built("encoder", model("bert"), "finetune.trains=head")
    method.module.train()
    assert not method.module.model.bert.encoder.training
    assert method.module.model.dropout.training
    losses = train(method, dataset.splits["train"], lr=1e-2)
    assert losses[-1] < losses[0]
    export(method, tmp_path)
    stored, first = (load_file(folder / "model.safetensors") for folder in
                     (tmp_path / "model", model("bert")))  # fmt: skip
    kept = [name for name in stored if name.startswith(("bert.encoder", "bert.embeddings"))]
    assert kept and all(torch.equal(stored[name], first[name]) for name in kept)
    assert stored["classifier.weight"].shape == (5, 32)


def test_lower_layers_learn_slower(built: Built, model: Model) -> None:
    method = built("encoder", model("bert"), "finetune.layer_decay=0.5")
    assert method.lr_factor("model.classifier.weight") == 1
    assert method.lr_factor("model.bert.pooler.dense.weight") == 1
    assert method.lr_factor("model.bert.encoder.layer.1.output.dense.weight") == 0.5
    assert method.lr_factor("model.bert.encoder.layer.0.output.dense.weight") == 0.25
    assert method.lr_factor("model.bert.embeddings.word_embeddings.weight") == 0.125
    names = ["shared.weight", "encoder.block.0.layer.0.q", "encoder.block.1.layer.1.wi",
             "encoder.final_layer_norm", "decoder.block.0.layer.2.wo"]  # fmt: skip
    depths = layer_depths([*names, "lm_head.weight"], {"lm_head.weight"})
    assert [*depths.values()] == [0, 1, 2, 2, 3, 4]


def test_a_head_for_other_labels_is_drawn_anew(
    built: Built, model: Model, dataset: Dataset, tmp_path: Path
) -> None:
    """And one for the same labels is gone on with."""
    method = built("encoder", model("bert"))
    train(method, dataset.splits["train"], lr=1e-2)
    export(method, tmp_path / "other")
    trained = method.module.model.classifier.weight
    same = built("encoder", tmp_path / "other" / "model")
    assert torch.equal(same.module.model.classifier.weight, trained)
    renamed = Dataset(
        ("a", *dataset.labels[1:]), dataset.splits, dataset.provenance, None, dataset.sha256
    )
    other = built("encoder", tmp_path / "other" / "model", data=renamed)
    drawn = other.module.model.classifier.weight
    assert not torch.isclose(drawn, trained).any()
    assert float(drawn.detach().std()) == pytest.approx(0.02, rel=0.2)


def test_more_layers_than_the_config_has_are_refused(
    built: Built, model: Model, tmp_path: Path
) -> None:
    folder = tmp_path / "cut"
    plain = AutoModel.from_pretrained(model("bert"))
    plain.config.num_hidden_layers = 1
    plain.save_pretrained(folder)
    (folder / "vocab.txt").write_bytes((model("bert") / "vocab.txt").read_bytes())
    with pytest.raises(InputError, match=r"layer\.1\..*: more layers in the checkpoint"):
        built("encoder", folder)
    with pytest.raises(InputError, match="gpt2 is not an encoder"):
        built("encoder", model("gpt2"))
    with pytest.raises(InputError, match="bert is not a causal language model"):
        built("decoder", model("bert"))


def test_what_a_model_without_a_head_can_not_do(
    configured: Callable[..., Any], built: Built, model: Model
) -> None:
    for override, message in {
        "model.precision=fp16": "model.precision: fp16, in which t5 overflows",
        "finetune.trains=head": "finetune.trains: head, but t5 answers with words",
        "seq2seq.label_words.x=y": "'x' is no label",
        "seq2seq.label_words.动画=知识": "'知识' and '知识' have the same ids",
        "finetune.lora.target_modules=[x]": None,
    }.items():
        if message is None:
            with pytest.raises(InputError, match=r"finetune\.lora\.target_modules: seen \['x'\]"):
                built("seq2seq", model("byt5"), override, "finetune.trains=lora")
            continue
        with pytest.raises(InputError, match=message):
            built("seq2seq", model("byt5"), override)
