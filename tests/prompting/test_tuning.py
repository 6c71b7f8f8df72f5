"""What is learned, its loss and its gradients, against plain PEFT and plain formulas."""

from typing import Any

import numpy as np
import peft
import pyarrow as pa
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from data_prep.dataset import SCHEMA, Dataset
from launcher.config import dump_config, read_text
from launcher.errors import InputError
from prompting import discrete, models, tuning
from prompting.template import encode_pieces

KINDS = ["pangu", "gpt2", "llama"]
LANGUAGE_MODELLING = {"kind": "prompt", "objective": "language_modelling"}
# Seven vectors in front, and words behind them; two words for one label, many tokens for another.
WORDS = {"动画": "动画片真好看", "知识": ["知识", "老师"]}
FRONT = {"template": {"question": "{soft:7:网络语言}弹幕: {text}"}, "verbalizer": WORDS}
TAIL = "\n选项: 动画片真好看,音乐舞蹈,知识,生活,影视\n答案:"
RANDOM = {"init": "random"}

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")


def learned_rows(method: Any) -> Tensor:
    """The table of learned vectors, a leaf with its gradient."""
    return method.replicated.get_submodule("embedding").weight


def plain_peft(folders, kind: str, learned: str, vectors: int) -> Any:
    """A model of PEFT's, its vectors of a size that shows in every score."""
    base = models.load_model(str(folders[kind]), "fp32", "sdpa", 0.0)
    make: Any = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[learned]
    model = peft.get_peft_model(base, make(task_type="CAUSAL_LM", num_virtual_tokens=vectors))
    with torch.no_grad():
        table = model.prompt_encoder["default"].embedding.weight
        table.normal_(std=0.3, generator=torch.Generator().manual_seed(7))
    return model.train()


def whole_batch(method: Any, examples: pa.Table, rows: list[int]) -> tuple[Tensor, float]:
    """Loss and denominator of `rows` as one micro batch."""
    chosen = method.training_set(examples, 0)
    return method.loss(chosen.batch(rows)), float(chosen.weights[rows].sum())


def close(own: Tensor | None, other: Tensor) -> bool:
    assert own is not None
    return bool((own - other).norm() <= 1e-4 * other.norm()) and float(other.norm()) > 0


def twins(tune, folders, kind: str, learned: str, settings: dict) -> tuple:
    """Our method in training and plain PEFT's model with the same vectors; its table of them."""
    method = tune(kind, FRONT, tuning=settings | RANDOM | {"kind": learned})
    theirs = plain_peft(folders, kind, learned, 7)
    table = theirs.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        learned_rows(method).copy_(table)
    method.module.train()
    return method, theirs, table


@pytest.mark.parametrize("learned", ["prompt", "prefix"])
@pytest.mark.parametrize("kind", KINDS)
def test_language_modelling_equals_plain_peft(tune, folders, examples, kind, learned):
    """PEFT pads on the right and computes every example's vectors again; loss and gradient."""
    method, theirs, table = twins(tune, folders, kind, learned, LANGUAGE_MODELLING)
    train = examples.splits["train"]
    texts, gold = train["text"].to_pylist(), train["label"].to_pylist()
    encode = method.asked.tokenizer
    opening, tail = encode_pieces(encode, ["弹幕: ", TAIL])
    spoken = ["动画片真好看", *examples.labels[1:]]
    answers = encode_pieces(encode, [spoken[label] for label in gold])
    prompts = [[*opening, *own, *tail] for own in encode_pieces(encode, texts)]
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.zeros(len(texts), longest, dtype=torch.int64)
    mask, targets = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, :end], mask[row, :end] = torch.tensor(prompt + answer), 1
        targets[row, len(prompt) : end] = torch.tensor(answer)
    expected = theirs(input_ids=ids, attention_mask=mask, labels=targets).loss
    expected.backward()

    loss, weight = whole_batch(method, train, [*range(len(texts))])
    (loss / weight).backward()
    assert len({len(prompt) for prompt in prompts}) > 3, "of one length nothing is padded"
    assert weight == sum(map(len, answers)) > len(texts)
    assert float(loss.detach()) / weight == pytest.approx(float(expected.detach()), abs=1e-5)
    assert close(learned_rows(method).grad, table.grad)


@pytest.mark.parametrize("learned", ["prompt", "prefix"])
@pytest.mark.parametrize("kind", KINDS)
def test_classification_equals_brute_force(
    tune, folders, examples, brute_force, score, kind, learned
):
    """One whole sequence of PEFT's per label word, softmax over the labels, cross-entropy."""
    method, theirs, table = twins(tune, folders, kind, learned, {})
    train = examples.splits["train"]
    texts, gold = train["text"].to_pylist(), train["label"].to_pylist()
    opening, tail = encode_pieces(method.asked.tokenizer, ["弹幕: ", TAIL])
    encoded = encode_pieces(method.asked.tokenizer, texts)
    words = brute_force(theirs, [[*opening, *own, *tail] for own in encoded], method.asked.trie)
    assert method.asked.words[2:4] == ["知识", "老师"]
    both = words[:, 2:4].logsumexp(1, keepdim=True)
    scores = torch.cat([words[:, :2], both, words[:, 4:]], dim=1).log_softmax(1)
    expected = cross_entropy(scores, torch.tensor(gold))
    expected.backward()

    loss, weight = whole_batch(method, train, [*range(len(texts))])
    (loss / weight).backward()
    assert weight == len(texts)
    assert float(loss.detach()) / weight == pytest.approx(float(expected.detach()), abs=1e-5)
    assert close(learned_rows(method).grad, table.grad)
    torch.testing.assert_close(score(method, texts), scores.detach(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("template", ["study_1", "study_2", "task"])
@pytest.mark.parametrize("kind", KINDS)
def test_words_start_where_the_discrete_prompt_stands(
    tune, tuning_config, texts, labels, score, kind, template
):
    """Also behind the text (study_1), and in front where BOS or [CLS] becomes soft, too."""
    told = {"template": template}
    asked = discrete.build(tuning_config(kind, told), labels)
    expected = score(asked, texts)
    soft = tune(kind, told)
    torch.testing.assert_close(score(soft, texts), expected, atol=1e-5, rtol=0)
    assert soft.vectors >= 3
    if template != "study_1":
        prefix = tune(kind, told, tuning={"kind": "prefix"})
        torch.testing.assert_close(score(prefix, texts), expected, atol=1e-5, rtol=0)
        assert prefix.vectors == soft.vectors
    # What is learned is what is scored with.
    with torch.no_grad():
        learned_rows(soft)[1] *= -1
    assert (score(soft, texts) - expected).abs().max() > 1e-2


def test_other_first_values(tune, load_model, load_tokenizer):
    """Of label words, of tokens, at random as wide as the embeddings; [CLS] stays in front."""
    template = {"template": {"question": "{soft:9}{text}{soft:4}"}}
    table = load_model("gpt2").get_input_embeddings().weight.detach()
    ids = load_tokenizer("gpt2").convert_tokens_to_ids([*"动画音乐舞蹈知识生活影视"])
    made = {
        init: learned_rows(tune("gpt2", template, tuning={"init": init})).detach()
        for init in ("labels", "vocabulary", "random")
    }
    assert torch.equal(made["labels"], table[[2, *ids[:8], *ids[:4]]])
    drawn = (made["vocabulary"][:, None] == table).all(2)
    assert drawn.any(1).all()
    assert len(drawn.int().argmax(1).unique()) > 5
    assert not (made["random"][1:, None] == table).all(2).any()
    assert made["random"][1:].std() == pytest.approx(float(table.std()), rel=0.1)
    for vectors in made.values():
        assert torch.equal(vectors[0], table[2])


def test_words_are_repeated_or_cut_to_the_length(tune, load_model, load_tokenizer):
    table = load_model("gpt2").get_input_embeddings().weight.detach()
    method = tune("gpt2", {"template": {"question": "{text}{soft:5:好看}{soft:1:好看}"}})
    ids = load_tokenizer("gpt2").convert_tokens_to_ids([*"好看好看好好"])
    assert torch.equal(learned_rows(method).detach(), table[ids])


def test_words_of_a_model_that_scales_its_embeddings(
    tmp_path, folders, tune, tuning_config, load_model, texts, labels, score
):
    """Gemma multiplies what its table holds, also where an id stands."""
    for file in folders["llama"].glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = Gemma3TextConfig(
        vocab_size=load_model("llama").config.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=160,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    heading = {"model": {"path": str(tmp_path), "precision": "fp32"}}
    expected = score(discrete.build(tuning_config("llama", **heading), labels), texts)
    for kind in ("prompt", "prefix"):
        told = {"kind": kind}
        torch.testing.assert_close(
            score(tune("llama", tuning=told, **heading), texts), expected, atol=1e-5, rtol=0
        )


def mean_loss(method: Any, examples: pa.Table) -> Tensor:
    rows = [*range(len(examples))]
    loss, weight = whole_batch(method, examples, rows)
    return loss.detach() / weight


@pytest.fixture(scope="module")
def log_shares(tune, score, examples) -> np.ndarray:
    """[texts, labels] float64, what the untrained prompt says."""
    texts = examples.splits["train"]["text"].to_pylist()
    return score(tune("pangu", FRONT, tuning=RANDOM), texts).double().numpy()


WEIGHTS = {"动画": 3.0, "知识": 0.0, "影视": 0.5}


def test_soft_targets_are_learned_by_divergence(tune, examples, log_shares):
    """KL(target || prompt), where a share of 0 adds nothing; weights count shares."""
    train = examples.splits["train"]
    target = np.array(train["distribution"].to_pylist(), dtype=np.float64)
    assert (target == 0).sum() > 5
    each = np.array([3.0, 1.0, 0.0, 1.0, 0.5])
    terms = np.zeros_like(target)
    for row, label in zip(*np.nonzero(target), strict=True):
        share = target[row, label]
        terms[row, label] = share * (np.log(share) - log_shares[row, label])
    for weights, per_label in (("none", np.ones(5)), (WEIGHTS, each)):
        told = RANDOM | {"soft_targets": True, "class_weights": weights}
        method = tune("pangu", FRONT, tuning=told)
        expected, denominator = (terms * per_label).sum(), (target * per_label).sum()
        loss, weight = whole_batch(method, train, [*range(len(train))])
        assert weight == pytest.approx(denominator, rel=1e-6)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    # Shares given as counts are shares all the same.
    doubled = pa.array((2 * target).tolist(), pa.list_(pa.float32()))
    counted = train.set_column(
        train.schema.get_field_index("distribution"), "distribution", doubled
    )
    assert mean_loss(method, counted) == pytest.approx(expected / denominator, rel=1e-5)


def test_class_weights(tune, examples, log_shares):
    train = examples.splits["train"]
    gold = np.array(train["label"].to_pylist())
    each = np.array([3.0, 1.0, 0.0, 1.0, 0.5])[gold]
    expected = -(each * log_shares[np.arange(6), gold]).sum()
    method = tune("pangu", FRONT, tuning=RANDOM | {"class_weights": WEIGHTS})
    loss, weight = whole_batch(method, train, [*range(6)])
    assert weight == each.sum()
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_balanced_weights_are_those_of_the_train_split(tuning_config, labels, texts):
    """n / (labels x count), as scikit-learn has it; unlabelled examples don't count."""
    gold = [0] * 6 + [1] * 3 + [2] + [3] + [4] + [None] * 5
    rows = [{"id": str(i), "text": texts[0], "label": label} for i, label in enumerate(gold)]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    balanced = tuning_config("pangu", tuning={"class_weights": "balanced"})
    prepared = tuning.prepare(balanced, Dataset(labels, {"train": table}, {}, None, {}))
    weights = [12 / (5 * 6), 12 / (5 * 3), 12 / 5, 12 / 5, 12 / 5]
    assert prepared.tuning.class_weights == pytest.approx(dict(zip(labels, weights, strict=True)))
    missing = Dataset(labels, {"train": table.slice(0, 11)}, {}, None, {})
    with pytest.raises(InputError, match=r"tuning\.class_weights: balanced.* no example of '影视'"):
        tuning.prepare(balanced, missing)


def test_language_modelling_is_cross_entropy_of_the_answers_tokens(tune, load_model, examples):
    """Over all answers laid end to end; of a label's words, the first is the answer."""
    told = LANGUAGE_MODELLING | RANDOM | {"class_weights": WEIGHTS}
    template = {
        "template": {"question": "{text}{soft:3}"},
        "verbalizer": {"影视": ["老师好", "影视"]},
    }
    method, model = tune("gpt2", template, tuning=told), load_model("gpt2")
    train = examples.splits["train"]
    gold = train["label"].to_pylist()
    spoken = ["动画", "音乐舞蹈", "知识", "生活", "老师好"]
    encode = method.asked.tokenizer
    tail = encode_pieces(encode, ["\n选项: 动画,音乐舞蹈,知识,生活,老师好\n答案:"])[0]
    table, vectors = model.get_input_embeddings().weight, learned_rows(method)
    logits, tokens, weights = [], [], []
    for text, label in zip(train["text"].to_pylist(), gold, strict=True):
        own, answer = encode_pieces(encode, [text, spoken[label]])
        parts = [table[[2, *own]], vectors, table[[*tail, *answer]]]
        with torch.no_grad():
            out = model(inputs_embeds=torch.cat(parts)[None], use_cache=False).logits
        logits.append(out[0, -len(answer) - 1 : -1])
        tokens += answer
        weights += [WEIGHTS.get(examples.labels[label], 1.0)] * len(answer)
    each = cross_entropy(torch.cat(logits), torch.tensor(tokens), reduction="none")
    loss, weight = whole_batch(method, train, [*range(6)])
    assert weight == pytest.approx(sum(weights))
    assert float(loss.detach()) == pytest.approx(float(each @ torch.tensor(weights)), rel=1e-5)


@pytest.mark.parametrize(
    ("column", "told", "message"),
    [
        ("label", {}, r"data: 1 of 6 examples to learn from have no label: leave them out"),
        ("distribution", {"soft_targets": True}, r"tuning\.soft_targets: 1 of 6 .* leave soft_t"),
    ],
)
def test_examples_without_a_target_are_refused(tune, examples, column, told, message):
    train = examples.splits["train"]
    values = train[column].to_pylist()
    values[3] = None
    place = train.schema.get_field_index(column)
    cut = train.set_column(place, column, pa.array(values, train.schema.field(place).type))
    method = tune("pangu", tuning=told)
    with pytest.raises(InputError, match=message):
        method.training_set(cut, 0)


LEARNERS: dict[str, dict[str, Any]] = {
    "prompt": {"kind": "prompt"},
    "mlp": {"kind": "p_tuning"},
    "lstm": {"kind": "p_tuning", "encoder": "lstm", "encoder_hidden_size": 24},
    "prefix": {"kind": "prefix"},
    "projection": {"kind": "prefix", "prefix_projection": True, "encoder_hidden_size": 24},
    "lora": {"kind": "lora"},
}


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_lower_the_loss_of_what_is_learned_alone(
    tune, examples, score, texts, tmp_path, kind, learner
):
    """The model keeps every bit; what is exported scores as it did, without its network."""
    prompt = {"template": "study_2"} if learner == "lora" else FRONT
    method = tune(kind, prompt, tuning=LEARNERS[learner])
    model = method.module.model
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert wanted == {n for n, _ in model.named_parameters() if learner == "lora" and "lora_" in n}
    learns = model if learner == "lora" else method.replicated
    frozen = {n: p.clone() for n, p in model.named_parameters() if n not in wanted}
    optimizer = torch.optim.AdamW([p for p in learns.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        method.module.train()
        loss, weight = whole_batch(method, examples.splits["train"], [*range(6)])
        optimizer.zero_grad()
        (loss / weight).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    for name, parameter in model.named_parameters():
        assert name in wanted or torch.equal(parameter, frozen[name]), name

    trained = score(method, texts)
    state = {n: p.detach().clone() for n, p in method.module.named_parameters() if p.requires_grad}
    method.export(state, tmp_path)
    again = tune(kind, prompt, tuning=LEARNERS[learner])
    assert not torch.allclose(score(again, texts), trained, atol=1e-2)
    again.load_export(tmp_path)
    torch.testing.assert_close(score(again, texts), trained, atol=1e-5, rtol=0)
    if learner != "lora":
        assert [n for n, _ in again.replicated.named_parameters()] == ["embedding.weight"]


@pytest.mark.parametrize("learner", ["prompt", "prefix", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_changes_nothing(tune, examples, kind, learner):
    """Dropout included, with layers computed twice; the prefix' states are those of the first."""
    told = LEARNERS[learner] | ({} if learner == "lora" else RANDOM) | {"dropout": 0.2}
    prompt = {"template": "study_2"} if learner == "lora" else FRONT
    found, passes = {}, {}
    for checkpoints in (False, True):
        method = tune(kind, prompt, tuning=told, parallel={"activation_checkpointing": checkpoints})
        model = method.module.model
        learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if learner != "lora":
            learned = {"rows": learned_rows(method)}
        with torch.no_grad():
            for place, parameter in enumerate(learned.values()):
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(place))
        norms = [m for n, m in model.named_modules() if n.endswith(("ln_2", "attention_layernorm"))]
        runs: list[int] = []
        for norm in norms:
            norm.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        method.module.train()
        torch.manual_seed(3)
        loss, _ = whole_batch(method, examples.splits["train"], [*range(6)])
        loss.backward()
        found[checkpoints] = {"loss": loss.detach()} | {n: p.grad for n, p in learned.items()}
        passes[checkpoints] = len(runs)
        assert passes[False] == 2 * len(norms) > 0
    assert passes[True] == 2 * passes[False], "nothing was computed again"
    for name, value in found[False].items():
        torch.testing.assert_close(found[True][name], value, atol=1e-6, rtol=1e-6, msg=name)
        assert value.abs().max() > 0


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"length": 3, "init": "vocabulary"},
        {"kind": "p_tuning"},
        {"kind": "prefix", "prefix_projection": True},
        {"kind": "lora"},
        {"class_weights": "balanced"},
    ],
)
def test_a_prepared_config_stays_what_it_is(tuning_config, labels, texts, told):
    """Written out and read again, as a run that goes on and `launcher.predict` do."""
    rows = [{"id": str(i), "text": texts[i], "label": i % 5} for i in range(6)]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    dataset = Dataset(labels, {"train": table}, {}, None, {})
    prepared = tuning.prepare(tuning_config("gpt2", tuning=told), dataset)
    assert tuning.prepare(prepared, dataset) == prepared
    read = read_text(dump_config(prepared))
    assert (read.section("prompt"), read.section("tuning")) == (prepared.prompt, prepared.tuning)


@pytest.mark.parametrize(
    ("prompt", "told", "message"),
    [
        ({"scoring": "mean"}, {}, r"prompt\.scoring: mean, but .* leave prompt\.scoring out"),
        ({"template": {"question": "{soft:3}{text}"}}, {}, r"init: text.*\{soft:3\}.*\{soft:3:WOR"),
        (
            {"template": {"question": "{soft:3}{text}"}},
            {"length": 4},
            r"tuning\.length: 4, but .*'custom' gives the lengths.*: leave tuning\.length out",
        ),
        (
            {"template": {"question": "{text}{soft:5: }"}},
            {},
            r"init: text, but the words of .*\{soft:5: \} have no tokens",
        ),
        ({"template": {"question": "{text}"}}, {}, r"'custom': .* no words .* give it a span"),
        (
            {"template": {"question": "{soft:3}{text}"}},
            {"kind": "lora"},
            r"'custom': kind lora learns no soft spans",
        ),
        (
            {"template": "study_1"},
            {"kind": "prefix"},
            r"'study_1': kind prefix .* in front .* one soft span there, as in \{soft:20\}\{text\}",
        ),
        (
            {"template": {"question": "{soft:3}{text}{soft:2}"}},
            {"kind": "prefix", "init": "labels"},
            r"'custom': kind prefix .* one soft span there",
        ),
        (
            {},
            {"class_weights": {"鬼畜": 2}},
            r"tuning\.class_weights: '鬼畜' is no label; .* 动画,",
        ),
        ({}, {"length": 150}, r"\(150 of them soft\) .* 160 positions: use fewer soft vectors"),
        (
            {"demonstrations": [{"text": "好看", "label": "影视"}]},
            {},
            "'task': demonstrations would repeat its soft spans; use one or the other",
        ),
    ],
)
def test_what_cannot_be_learned_is_refused(tuning_config, examples, prompt, told, message):
    """By a run, and before it by --check, on one line."""
    config = tuning_config("gpt2", prompt or {"template": "study_2"}, tuning=told)
    for refuses in (
        lambda: tuning.build(tuning.prepare(config, examples), examples.labels),
        lambda: tuning.check(config, examples),
    ):
        with pytest.raises(InputError, match=message) as raised:
            refuses()
        assert "\n" not in str(raised.value)


def test_a_discrete_prompt_has_no_soft_spans(tuning_config, examples):
    config = tuning_config(
        "gpt2",
        {"template": {"question": "{text}", "answer": "{soft:2}"}},
        method="prompting.discrete",
    )
    with pytest.raises(
        InputError, match=r"'custom': it has soft spans, .* method prompting\.tuning"
    ):
        discrete.prepare(config, examples)


def test_lora_of_layers_that_are_not_there(tune):
    told = {"kind": "lora", "lora": {"target_modules": ["q_proj", "query"]}}
    with pytest.raises(
        InputError, match=r"lora\.target_modules: seen .*'query'\].* o_proj, q_proj"
    ):
        tune("pangu", tuning=told)


def test_what_another_kind_is_told_does_not_matter(tuning_config, examples):
    """`prefix_projection` is the prefix' own: a plain prompt still starts from its words."""
    config = tuning_config("pangu", tuning={"prefix_projection": True})
    assert tuning.prepare(config, examples).tuning.init == "text"


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"kind": "p_tuning", "init": "text"}, "tuning: init 'text' can't be: .* leave init out"),
        ({"kind": "lora", "init": "text"}, "tuning: init 'text' can't be: .* leave init out"),
        ({"kind": "p_tuning", "init_from": "x"}, "init_from can't be: .*; go on with kind prompt"),
        (
            {"soft_targets": True, "objective": "language_modelling"},
            "soft_targets are shares of labels: use objective classification",
        ),
        ({"length": 0}, r"tuning\.length: .* greater than 0"),
    ],
)
def test_settings_that_contradict_each_other(tuning_config, told, message):
    with pytest.raises(InputError, match=message):
        tuning_config("pangu", tuning=told)


def test_check_shows_what_is_learned(tuning_config, examples):
    lines = tuning.check(tuning_config("gpt2", tuning={"length": 4}), examples)
    assert "learned: prompt, 4 soft vectors" in lines
    assert "  [4 soft: 文本分类: ]这个动画片真好看，我看了三遍！" in lines


def test_vectors_get_a_rate_of_their_own(tuning_config, examples):
    """Unless one is given, also if it is the default of the others."""
    for kind, given, expected in (
        ("prompt", {}, 1e-2),
        ("prefix", {}, 1e-2),
        ("lora", {}, 1e-3),
        ("prompt", {"lr": 1e-3}, 1e-3),
    ):
        config = tuning_config("pangu", tuning={"kind": kind}, train=given)
        assert tuning.prepare(config, examples).train.lr == expected
