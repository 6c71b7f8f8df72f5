"""Training sequences as documented, and their loss against plain cross-entropy."""

import copy
import itertools
import random

import numpy as np
import pyarrow as pa
import pytest
import torch

from data_prep.dataset import SCHEMA, Dataset
from launcher import pretrained
from launcher.config import parse_config
from launcher.errors import InputError
from prompting import models, pretrain
from prompting.pangu import PanguForCausalLM
from prompting.pretrain import Pretraining, end_of_text
from prompting.settings import TEMPLATES, PretrainSettings
from prompting.template import build_prompt, encode_pieces, encode_prompt

LABELS = ("动画", "音乐舞蹈", "影视")
KINDS = ["pangu", "llama"]


def table(texts, labels) -> pa.Table:
    rows = [
        {"id": str(i), "text": text, "label": label}
        for i, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


@pytest.fixture(scope="module")
def examples(texts) -> pa.Table:
    """Every label and none, twice over each text."""
    return table(texts * 4, [0, 1, 2, None] * 6)


@pytest.fixture
def method(load_model, load_tokenizer):
    """`method(kind, seed, **pretrain settings)`."""

    def make(kind: str = "pangu", seed: int = 1, **fields) -> Pretraining:
        settings = PretrainSettings(**fields)
        return Pretraining(settings, LABELS, load_model(kind), load_tokenizer(kind), seed)

    return make


def sequence(epoch, row: int) -> tuple[list[int], list[int], list[float]]:
    """Ids, targets and weights of one example by itself."""
    batch = epoch.batch([row])
    return batch.ids[0].tolist(), batch.targets[0, :, 0].tolist(), batch.weights[0].tolist()


@pytest.mark.parametrize("loss_on", ["content", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_is_prompt_label_and_end(method, load_tokenizer, examples, kind, loss_on):
    fields = {"templates": ["study_3"], "shuffle_choices": False, "loss_on": loss_on}
    epoch = method(kind, answer_weight=7.0, **fields).training_set(examples, 0)
    tokenizer = load_tokenizer(kind)
    begin = [1] if kind == "llama" else []
    for row, (text, label) in enumerate(
        zip(examples["text"].to_pylist(), examples["label"].to_pylist(), strict=True)
    ):
        # A plain text is the first thing the model reads.
        said = encode_pieces(tokenizer, [text], first=label is None)[0]
        end = [tokenizer.eos_token_id]
        if label is None:
            full = [*begin, *said, *end]
            counts = [1.0] * len(full)
        else:
            head = begin + encode_pieces(tokenizer, ["弹幕分类: "], first=True)[0]
            tail = encode_pieces(tokenizer, ["\n选项: 动画,音乐舞蹈,影视\n答案:"])[0]
            answer = encode_pieces(tokenizer, [LABELS[label]])[0] + end
            full = [*head, *said, *tail, *answer]
            template = 1.0 if loss_on == "all" else 0.0
            counts = [template] * len(head) + [1.0] * len(said)
            counts += [template] * len(tail) + [7.0] * len(answer)
        ids, targets, weights = sequence(epoch, row)
        assert ids == full
        assert targets[:-1] == full[1:]
        assert weights == [*counts[1:], 0.0]
        assert epoch.lengths[row] == len(full)
        assert epoch.weights[row] == sum(counts[1:])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_loss_is_weighted_cross_entropy(method, examples, kind):
    """Of a padded batch of all forms, against whole logits of one row after the other."""
    made = method(kind, raw_text_share=0.3, answer_weight=3.5)
    epoch = made.training_set(examples, 0)
    rows = list(range(12))
    expected = torch.tensor(0.0)
    for row in rows:
        ids, targets, weights = sequence(epoch, row)
        said = made.module.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for place, (target, weight) in enumerate(zip(targets, weights, strict=True)):
            expected -= weight * said[place, target]
    batch = epoch.batch(rows)
    assert len({*epoch.lengths[rows]}) > 1, "nothing is padded"
    torch.testing.assert_close(made.loss(batch), expected, rtol=1e-5, atol=0)
    assert float(batch.weights.sum()) == pytest.approx(epoch.weights[rows].sum())


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_changes_no_gradient(method, examples, kind):
    gradients = []
    for recomputes in (False, True):
        made = method(kind, templates=["study_3"])
        # The model is shared by all tests: neither its mode nor its gradients may stay.
        made.module = copy.deepcopy(made.module)
        if recomputes:
            pretrained.recompute_layers(made.module.model)
        made.module.train()
        epoch = made.training_set(examples, 0)
        torch.manual_seed(0)  # dropout
        made.loss(epoch.batch(range(6))).backward()
        gradients.append([p.grad for p in made.module.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.allclose(plain, recomputed, atol=1e-5)


def test_every_example_has_one_of_the_forms(method, load_tokenizer, examples):
    """Templates and orders of the choices are drawn; none is made up and none is left out."""
    tokenizer, names = load_tokenizer("pangu"), ("study_2", "task")
    forms = {}
    for name, order in itertools.product(names, itertools.permutations(LABELS)):
        said = TEMPLATES[name].choice_separator.join(order)
        if name == "study_2":
            head, tail = "文本分类: ", f"\n选项: {said}\n答案:"
        else:
            head, tail = "弹幕分类：\n", f"\n选项：{said}\n答案："
        forms[name, order] = encode_pieces(tokenizer, [head, tail])
    drawn = set()
    made = method(templates=[*names])
    for number in range(6):
        epoch = made.training_set(examples, number)
        for row, label in enumerate(examples["label"].to_pylist()):
            if label is None:
                continue
            text = encode_pieces(tokenizer, [examples["text"][row].as_py()])[0]
            answer = encode_pieces(tokenizer, [LABELS[label]])[0]
            fitting = [
                form
                for form, (head, tail) in forms.items()
                if sequence(epoch, row)[0] == [*head, *text, *tail, *answer, 9]
            ]
            assert len(fitting) == 1
            drawn.add(fitting[0])
    assert drawn == {*forms}


def ids_of(epoch) -> list[list[int]]:
    return [sequence(epoch, row)[0] for row in range(len(epoch.lengths))]


def test_forms_change_between_epochs_and_seeds_but_not_between_ranks(method, examples):
    one, other_rank = method(), method()
    first = ids_of(one.training_set(examples, 0))
    second = ids_of(one.training_set(examples, 1))
    assert first != second
    # The other rank starts with the second epoch, as after a resume.
    assert ids_of(other_rank.training_set(examples, 1)) == second
    assert ids_of(other_rank.training_set(examples, 0)) == first
    assert ids_of(method(seed=2).training_set(examples, 0)) != first


def plain_rows(made, examples, epoch: int) -> set[int]:
    """Rows that hold their text and nothing else."""
    texts = encode_pieces(made.tokenizer, examples["text"].to_pylist())
    sequences = ids_of(made.training_set(examples, epoch))
    return {row for row, text in enumerate(texts) if sequences[row] == [*text, 9]}


def test_labels_that_may_not_be_seen_never_are(method):
    many = table([f"看{'好' * (i % 7)}" for i in range(400)], [i % 3 for i in range(400)])
    made = method(labelled_share=0.25)
    plain = [plain_rows(made, many, epoch) for epoch in range(5)]
    assert all(rows == plain[0] for rows in plain)
    assert 270 <= len(plain[0]) <= 330  # 300 expected, standard deviation 8.7
    assert plain_rows(method(labelled_share=0.25, seed=2), many, 0) != plain[0]


def test_raw_text_is_drawn_anew_each_epoch(method):
    many = table([f"看{'好' * (i % 7)}" for i in range(400)], [i % 3 for i in range(400)])
    made = method(raw_text_share=0.25)
    first, second = (plain_rows(made, many, epoch) for epoch in (0, 1))
    assert first != second
    assert 70 <= len(first) <= 130
    assert 70 <= len(second) <= 130
    assert len(plain_rows(method(raw_text_share=1.0), many, 0)) == 400
    assert len(plain_rows(method(templates=[]), many, 0)) == 400


@pytest.mark.parametrize("label", [1, None])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_only_the_text_is_truncated(method, load_tokenizer, texts, kind, label):
    long = table(["".join(texts) * 9], [label])
    made = method(kind, templates=["study_3"], shuffle_choices=False)
    epoch = made.training_set(long, 0)
    ids = sequence(epoch, 0)[0]
    tokenizer = load_tokenizer(kind)
    text = encode_pieces(tokenizer, long["text"].to_pylist(), first=label is None)[0]
    assert len(ids) == epoch.lengths[0] == 160 == made.limit
    if label is None:
        assert ids == ([1] * (kind == "llama") + text)[:160]
    else:
        after = encode_pieces(tokenizer, ["\n选项: 动画,音乐舞蹈,影视\n答案:", LABELS[label]])
        tail = [*after[0], *after[1], tokenizer.eos_token_id]
        assert ids[-len(tail) :] == tail
        kept = 160 - len(tail)
        assert " ".join(map(str, text[: kept - 30])) in " ".join(map(str, ids[:kept]))
    assert torch.isfinite(made.loss(epoch.batch([0])))


@pytest.fixture
def from_nothing(tmp_path):
    """`from_nothing(model=..., **pretrain)`: a config that starts a nano in a run folder."""
    (tmp_path / "nano").mkdir()

    def make(model: dict | None = None, **fields):
        shape = {"hidden_size": 16, "heads": 2, "layers": 2, "vocabulary_size": 260}
        return parse_config(
            {
                "method": "prompting.pretrain",
                "run": {"name": "nano", "dir": str(tmp_path), "seed": 3},
                "data": {"path": "nowhere"},
                "model": {"precision": "fp32"} | (model or {}),
                "pretrain": {"shape": shape | {"max_position_embeddings": 64}} | fields,
            }
        )

    return make


def test_a_nano_from_nothing_is_exported_whole(from_nothing, examples, tmp_path):
    dataset = Dataset(LABELS, {"train": examples}, {}, None, {})
    config = pretrain.prepare(from_nothing(), dataset)
    assert config.pretrain.shape.vocabulary == str(tmp_path / "nano/vocab.model")
    method, again = (pretrain.build(config, LABELS) for _ in range(2))
    model = method.module.model
    assert isinstance(model, PanguForCausalLM)
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (16, 2)
    for name, weight in again.module.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name

    with torch.no_grad():
        model.lm_head.weight.add_(1.0)  # trained since
    method.export(method.module.state_dict(), tmp_path)
    path = str(tmp_path / "model")
    tokenizer = models.load_tokenizer(path, models.check_checkpoint(path))
    loaded = models.load_model(path, "fp32", "auto")
    for name, weight in loaded.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    texts = examples["text"].to_pylist()
    assert encode_pieces(tokenizer, texts) == encode_pieces(method.tokenizer, texts)
    spelled = [*texts, *LABELS, "弹幕分类：\n选项：，答案:"]
    assert not any(tokenizer.unk_token_id in ids for ids in encode_pieces(tokenizer, spelled))


def test_preparing_again_keeps_the_vocabulary(from_nothing, examples, tmp_path):
    """A resumed run must not learn another one from other data."""
    dataset = Dataset(LABELS, {"train": examples}, {}, None, {})
    pretrain.prepare(from_nothing(), dataset)
    before = (tmp_path / "nano/vocab.model").read_bytes()
    config = pretrain.prepare(from_nothing(), dataset)
    assert (tmp_path / "nano/vocab.model").read_bytes() == before
    assert pretrain.prepare(config, dataset) is config


@pytest.mark.parametrize(
    ("model", "shape", "seen"), [({"path": "a"}, {}, "both"), ({}, None, "neither")]
)
def test_either_a_shape_or_a_model(from_nothing, model, shape, seen):
    config = from_nothing(model) if shape == {} else from_nothing(model, shape=None)
    with pytest.raises(InputError, match=f"either pretrain.shape .* seen {seen}"):
        pretrain.prepare(config, Dataset(LABELS, {}, {}, None, {}))


def test_sizes_are_told_as_numbers(method, examples):
    epoch = method().training_set(examples, 0)
    assert epoch.lengths.dtype == np.int64
    assert epoch.weights.dtype == np.float64
    assert epoch.lengths.shape == epoch.weights.shape == (len(examples),)


def test_a_text_at_the_very_start_has_the_ids_that_it_is_scored_with(
    method, load_tokenizer, examples
):
    """A Llama kind spells the beginning of a string with a space of its own."""
    made = method("llama", templates=["study_1"], shuffle_choices=False)
    epoch = made.training_set(examples, 0)
    tokenizer = load_tokenizer("llama")
    prompt = build_prompt(TEMPLATES["study_1"], LABELS)
    asked = encode_prompt(prompt, tokenizer)
    for row, text in enumerate(examples["text"].to_pylist()):
        if examples["label"][row].is_valid:
            expected = [*asked.head, *encode_pieces(tokenizer, [text], first=True)[0], *asked.tail]
            assert sequence(epoch, row)[0][: len(expected)] == expected


def test_a_template_without_room_for_a_text_is_refused(method):
    with pytest.raises(InputError, match="no room for a text in the model's 160 positions"):
        method(templates=[{"question": "长" * 400 + "{text}"}])


def test_a_bert_vocabulary_closes_answers_with_its_separator(load_tokenizer):
    tokenizer = load_tokenizer("gpt2")
    assert tokenizer.eos_token_id is None
    assert end_of_text(tokenizer) == tokenizer.sep_token_id


@pytest.mark.parametrize("related", [False, True])
def test_plain_texts_are_joined_in_blocks(method, load_tokenizer, examples, related):
    """Every text once, closed, in a new order each epoch; labelled ones stay by themselves."""
    made = method("llama", block_tokens=16, templates=["study_3"], related_blocks=related)
    tokenizer = load_tokenizer("llama")
    texts, labels = examples["text"].to_pylist(), examples["label"].to_pylist()
    plain = [text for text, label in zip(texts, labels, strict=True) if label is None]
    expected = [[1, *ids, 2] for ids in encode_pieces(tokenizer, plain, first=True)]
    orders = []
    for number in range(2):
        epoch = made.training_set(examples, number)
        labelled = sum(label is not None for label in labels)
        blocks = [sequence(epoch, row) for row in range(labelled, len(epoch.lengths))]
        joined = [i for ids, _, _ in blocks for i in ids]
        assert [len(ids) for ids, _, _ in blocks[:-1]] == [16] * (len(blocks) - 1)
        assert all(weights == [1.0] * (len(ids) - 1) + [0.0] for ids, _, weights in blocks)
        starts = [place for place, i in enumerate(joined) if i == 1] + [len(joined)]
        parts = [joined[a:b] for a, b in itertools.pairwise(starts)]
        assert sorted(parts) == sorted(expected)
        assert epoch.names[labelled] == "block 0"
        orders.append(parts)
    assert orders[0] != orders[1]


def test_related_texts_are_neighbours():
    texts = ["王者", "番茄", "高数", "舞蹈"] * 3
    order = pretrain._related([*range(12)], texts, random.Random(0))
    assert sorted(order) == [*range(12)]
    grouped = [texts[place] for place in order]
    assert [len([*own]) for _, own in itertools.groupby(grouped)] == [3] * 4


RECALL = {"name": "recall", "question": "", "choice": "", "answer": "{text}\n答案:"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_recalled_text_is_asked_for_its_own_words(method, load_tokenizer, examples, kind):
    """Without its label; each word is as right as the next, and one is drawn to stand there."""
    made = method(kind, raw_text_share=1.0, recall_share=1.0, templates=[RECALL], answer_weight=7.0)
    tokenizer = load_tokenizer(kind)
    begin = [1] if kind == "llama" else []
    tail = encode_pieces(tokenizer, ["\n答案:"])[0]
    texts = encode_pieces(tokenizer, examples["text"].to_pylist(), first=True)
    # As they are written behind other words, where the answer stands.
    inside = encode_pieces(tokenizer, examples["text"].to_pylist())
    stood = [set[int]() for _ in texts]
    for number in range(40):
        epoch = made.training_set(examples, number)
        for row, text in enumerate(texts):
            batch = epoch.batch([row])
            *head, word = batch.ids[0].tolist()
            assert head == [*begin, *text, *tail]
            words = [own for own in inside[row] if tokenizer.decode([own]).strip()]
            assert word in words
            targets = batch.targets[0].tolist()
            assert [own[0] for own in targets[: len(head) - 1]] == head[1:]
            assert all(own == -1 for many in targets[: len(head) - 1] for own in many[1:])
            assert sorted(targets[len(head) - 1]) == sorted(words)
            counts = [0.0] * len(begin) + [1.0] * len(text) + [0.0] * len(tail) + [7.0]
            assert batch.weights[0].tolist() == [*counts[1:], 0.0]
            stood[row].add(word)
    for row, text in enumerate(inside):
        words = {word for word in text if tokenizer.decode([word]).strip()}
        assert stood[row] == words if len(words) < 4 else len(stood[row]) > 2


@pytest.mark.parametrize("kind", KINDS)
def test_recall_is_the_mean_over_the_words(method, load_model, load_tokenizer, kind):
    """Texts of different numbers of words in one batch, each word scored by itself."""
    texts = table(["看看看番番剧", "好", "厨师"], [0, 1, 2])
    made = method(kind, raw_text_share=1.0, recall_share=1.0, templates=[RECALL], answer_weight=3.0)
    epoch = made.training_set(texts, 0)
    tokenizer, model = load_tokenizer(kind), load_model(kind)
    expected = 0.0
    with torch.no_grad():
        for row, text in enumerate(texts["text"].to_pylist()):
            *prompt, _ = epoch.batch([row]).ids[0].tolist()
            logs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
            words = [own for own in encode_pieces(tokenizer, [text])[0] if own not in made.blanks]
            expected -= 3.0 * float(logs[-1, words].mean())
            begin = int(kind == "llama")
            first = encode_pieces(tokenizer, [text], first=True)[0]
            for place in range(max(1, begin), begin + len(first)):
                expected -= float(logs[place - 1, prompt[place]])
        assert float(made.loss(epoch.batch(range(3)))) == pytest.approx(expected, rel=1e-5)


def test_recall_needs_a_template():
    with pytest.raises(ValueError, match=r"^1 validation.*\n.*recall_share 0.5 asks texts"):
        PretrainSettings(recall_share=0.5, templates=[])


def test_what_is_not_recalled_stays_as_it_was(method):
    many = table([f"看{'好' * (i % 7)}" for i in range(400)], [i % 3 for i in range(400)])
    fields = {"templates": ["study_3"], "labelled_share": 0.5}
    as_before = method(**fields).training_set(many, 0)
    made = method(recall_share=0.25, **fields).training_set(many, 0)
    plain = plain_rows(method(**fields), many, 0)
    still = plain_rows(method(recall_share=0.25, **fields), many, 0)
    assert still < plain
    assert 0.65 < len(still) / len(plain) < 0.85
    labelled = [answer for row, answer in enumerate(as_before.answers) if row not in plain]
    assert labelled == [answer for row, answer in enumerate(made.answers) if row not in plain]


def test_recalled_texts_are_joined_in_blocks_with_what_they_count(method, examples):
    """Each closed by the end of text, with its answer's words and what they count beside it."""
    fields = {"raw_text_share": 1.0, "recall_share": 1.0, "templates": [RECALL]}
    alone = method(**fields).training_set(examples, 0)
    epoch = method(block_tokens=20, **fields).training_set(examples, 0)
    joined: list[tuple] = []
    for row in range(len(epoch.lengths)):
        batch = epoch.batch([row])
        ids, weights = batch.ids[0].tolist(), batch.weights[0].tolist()
        targets = [sorted(own for own in many if own >= 0) for many in batch.targets[0].tolist()]
        # The first id of a block is predicted by nothing.
        before = zip([None, *weights[:-1]], [None, *targets[:-1]], strict=True)
        joined += [(i, *seen) for i, seen in zip(ids, before, strict=True)]
    end = alone.method.end
    expected = {}
    for parts in zip(alone.forms, alone.texts, alone.answers, strict=True):
        ids, weights, right = alone.method.sequence(*parts)
        words = [*map(sorted, right), [end]]
        expected[*ids, end] = [*zip([*ids, end], [*weights, 10.0], words, strict=True)]
    place, many = 0, 0
    while place < len(joined):
        ids = tuple(i for i, *_ in joined[place:])
        size = next(n for n in range(1, len(ids) + 1) if ids[:n] in expected)
        for seen, wanted in zip(joined[place : place + size], expected[ids[:size]], strict=True):
            assert seen == (wanted if seen[1] is not None else (wanted[0], None, None))
            many += seen[2] is not None and len(seen[2]) > 1
        place += size
    assert many > 12
    assert place == sum(int(length) + 1 for length in alone.lengths)


@torch.no_grad()
def test_sequences_begin_where_they_were_shifted_to(method, examples):
    """Anywhere that leaves them room, elsewhere in the next epoch; the loss against row by row."""
    made = method("pangu", templates=["study_3"], shift_positions=True)
    epochs = [made.training_set(examples, number) for number in range(2)]
    begins = [epoch.batch(range(24)).positions[:, 0].tolist() for epoch in epochs]
    assert begins[0] != begins[1]
    assert len({*begins[0]}) > 12
    batch, expected = epochs[0].batch(range(24)), torch.tensor(0.0)
    assert int(batch.positions.max()) < made.limit
    for row, begin in enumerate(begins[0]):
        ids, targets, weights = sequence(epochs[0], row)
        positions = torch.arange(begin, begin + len(ids))
        assert batch.positions[row, : len(ids)].tolist() == positions.tolist()
        said = (
            made.module.model(input_ids=torch.tensor([ids]), position_ids=positions[None])
            .logits[0]
            .log_softmax(-1)
        )
        for place, (target, weight) in enumerate(zip(targets, weights, strict=True)):
            expected -= weight * said[place, target]
    torch.testing.assert_close(made.loss(batch), expected, rtol=1e-5, atol=0)
    still = method("pangu", templates=["study_3"]).training_set(examples, 0).batch(range(24))
    assert not still.positions[:, 0].any()


@torch.no_grad()
def test_sequences_that_are_not_shifted_need_no_mask(method, examples):
    """Given positions that stop at pads, transformers would make one and lose its fast kernels."""
    made, given = method("llama", templates=["study_3"]), []
    hook = made.module.model.register_forward_pre_hook(
        lambda model, args, kwargs: given.append(kwargs), with_kwargs=True
    )
    made.loss(made.training_set(examples, 0).batch(range(12)))
    hook.remove()
    assert given[0].get("position_ids") is None


@pytest.mark.parametrize("whole", [True, False])
def test_label_words_are_pieces_of_their_own_where_asked_for(from_nothing, examples, whole):
    labels = ("动画", "综合")
    dataset = Dataset(labels, {"train": examples}, {}, None, {})
    config = from_nothing(templates=[])
    shape = config.pretrain.shape.model_copy(update={"whole_labels": whole})
    settings = config.pretrain.model_copy(update={"shape": shape})
    config = config.model_copy(update={"pretrain": settings})
    tokenizer = pretrain.build(pretrain.prepare(config, dataset), labels).tokenizer
    said = encode_pieces(tokenizer, labels)
    assert [len(ids) == 1 for ids in said] == [True, whole]
    if whole:
        assert said[1][0] in encode_pieces(tokenizer, ["这是综合。"])[0]
