"""From a config to label scores: the whole path against sequences scored one at a time."""

import itertools
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch

from data_prep.dataset import SCHEMA, Dataset
from launcher.config import Config, parse_config
from launcher.errors import InputError
from prompting import discrete, scorer
from prompting.discrete import Discrete
from prompting.labels import LabelTrie
from prompting.question import Question
from prompting.settings import TEMPLATES, PromptSettings
from prompting.template import encode_pieces, leading_ids

KINDS = ["pangu", "gpt2", "llama"]
SHOWN = [{"text": "好看", "label": "影视"}, {"text": "音乐 好听", "label": "音乐舞蹈"}]
CALIBRATED = {"template": "few_shot", "demonstrations": SHOWN, "scoring": "pmi"}


@pytest.fixture
def config(folders):
    """`config(kind, prompt=..., other heading=...)`: a whole config for one of the models."""

    def make(kind: str, prompt: dict | None = None, **headings: dict) -> Config:
        return parse_config(
            {
                "method": "prompting.discrete",
                "run": {"name": "test", "seed": 5},
                "data": {"path": "nowhere", "evaluate": ["dev"]},
                "model": {"path": str(folders[kind]), "precision": "fp32"},
                "prompt": prompt or {},
            }
            | headings
        )

    return make


@pytest.fixture
def question(load_tokenizer, labels):
    """`question(kind, positions, labels, **prompt)`: prompt and labels as ids."""

    def make(kind: str = "pangu", positions: int = 160, names=labels, **prompt) -> Question:
        return Question(PromptSettings(**prompt), names, load_tokenizer(kind), positions, seed=5)

    return make


@pytest.fixture(scope="module")
def dataset(labels) -> Dataset:
    """The text of row i is i + 1 characters; every fourth has no label."""
    rows = [
        {"id": str(i), "text": "看" * (i + 1), "label": None if i % 4 == 3 else i % 4}
        for i in range(40)
    ]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    return Dataset(labels, {"train": table, "dev": table}, {}, None, {})


def all_scores(method: Discrete, texts) -> torch.Tensor:
    """[texts, labels], put together from the batches."""
    scores = torch.full((len(texts), len(method.asked.labels)), torch.nan)
    for batch in method.score_batches(texts):
        scores[batch.rows] = method.scores(batch)
    return scores


@pytest.mark.parametrize(
    "prompt",
    [
        {"template": "study_1"},
        {"template": "task", "scoring": "mean", "choice_order": "reversed"},
        CALIBRATED,
    ],
    ids=["study_1", "mean", "few_shot_pmi"],
)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_scores_equal_brute_force(config, load_tokenizer, brute_force, texts, labels, kind, prompt):
    """On ids put together here, with duplicates and all lengths in one call."""
    method = discrete.build(config(kind, prompt), labels)
    tokenizer = load_tokenizer(kind)
    if prompt["template"] == "study_1":
        head, tail = [], [" 属于哪个分区?\n选项: 动画,音乐舞蹈,知识,生活,影视\n答案:"]
    elif prompt["template"] == "task":
        head, tail = ["弹幕分类：\n"], ["\n选项：影视，生活，知识，音乐舞蹈，动画\n答案："]
    else:
        head = [
            "弹幕分类，选项：动画，音乐舞蹈，知识，生活，影视\n弹幕：",
            "好看",
            "\n答案：",
            "影视",
        ]
        head += ["\n弹幕：", "音乐 好听", "\n答案：", "音乐舞蹈", "\n弹幕："]
        tail = ["\n答案："]

    def ids(pieces, at_start: bool):
        first = encode_pieces(tokenizer, pieces[:1], first=at_start)
        return [i for own in first + encode_pieces(tokenizer, pieces[1:]) for i in own]

    repeated = [*texts, texts[2], texts[0]]
    prompts = [leading_ids(tokenizer) + ids([*head, text, *tail], True) for text in repeated]
    trie = LabelTrie(tuple(map(tuple, encode_pieces(tokenizer, labels))), tuple(range(5)))
    words = brute_force(method.module, prompts, trie)
    if prompt.get("scoring") == "mean":
        words = words / torch.tensor([len(word) for word in trie.words])
    if prompt.get("scoring") == "pmi":
        empty = leading_ids(tokenizer) + ids([*head, *tail], True)
        words = words - brute_force(method.module, [empty], trie)
    expected = words - words.logsumexp(1, keepdim=True)

    scores = all_scores(method, repeated)
    torch.testing.assert_close(scores, expected, atol=2e-4, rtol=0)
    assert torch.equal(scores[2], scores[-2])
    assert (expected[0] - expected[1]).abs().max() > 0.05, "too alike to prove anything"
    assert method.notes() == {"truncated_texts": 0}


def test_batches_keep_to_the_budget_with_the_trie(config, labels):
    """Two rows of what is fed, labels included, and not a token more."""
    method = discrete.build(config("gpt2"), labels)
    fed = len(method.asked.trie.tokens)
    assert fed == 1 + 3 + 1 + 1 + 1  # a token a character, and a word's last is not fed
    length = len(method.asked.suffixes(["好看"])[0])
    for spare, sizes in ((0, [2, 2]), (-1, [1, 1, 1, 1])):
        method.micro_batch_tokens = 2 * (length + fed) + spare
        assert [len(batch.rows) for batch in method.score_batches(["好看"] * 4)] == sizes
    method.asked.settings = method.asked.settings.model_copy(update={"scoring": "generate"})
    method.micro_batch_tokens = 2 * length
    assert [len(batch.rows) for batch in method.score_batches(["好看"] * 4)] == [2, 2]


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ("given", "动画,音乐舞蹈,知识,生活,影视"),
        ("reversed", "影视,生活,知识,音乐舞蹈,动画"),
        (["知识", "动画", "影视", "生活", "音乐舞蹈"], "知识,动画,影视,生活,音乐舞蹈"),
    ],
)
def test_choice_order_changes_the_prompt_and_not_the_columns(question, order, said):
    asked = question(template="study_2", choice_order=order)
    assert asked.prompt.text_with("甲") == f"文本分类: 甲\n选项: {said}\n答案:"
    assert asked.trie == question().trie
    assert asked.words == ["动画", "音乐舞蹈", "知识", "生活", "影视"]


def test_shuffled_choices_are_drawn_by_the_run_s_seed(load_tokenizer, labels):
    def said(seed: int) -> str:
        settings = PromptSettings(template=TEMPLATES["study_2"], choice_order="shuffled")
        text = Question(settings, labels, load_tokenizer("pangu"), 160, seed).prompt.text_with("")
        return text.split("\n")[1].removeprefix("选项: ")

    assert said(1) == said(1)
    assert len({said(seed) for seed in range(10)}) > 5
    assert all(sorted(said(seed).split(",")) == sorted(labels) for seed in range(10))


@pytest.mark.parametrize("order", [["动画"], ["动画", "动画", "知识", "生活", "影视"]])
def test_an_order_of_other_labels_is_refused(question, order):
    with pytest.raises(
        InputError, match=r"prompt\.choice_order: expected each of .* once; seen 动画"
    ):
        question(choice_order=order)


def test_the_verbalizer_is_shown_and_scored(question, load_tokenizer):
    asked = question(
        template="few_shot",
        verbalizer={"影视": "看", "知识": ["学", "知识"]},
        demonstrations=[{"text": "甲", "label": "影视"}],
    )
    said = "弹幕分类，选项：动画，音乐舞蹈，学，生活，看\n弹幕：甲\n答案：看\n弹幕：乙\n答案："
    assert asked.prompt.text_with("乙") == said
    assert asked.words == ["动画", "音乐舞蹈", "学", "知识", "生活", "看"]
    assert asked.owners == [0, 1, 2, 2, 3, 4]
    words = encode_pieces(load_tokenizer("pangu"), asked.words)
    assert asked.trie == LabelTrie(tuple(map(tuple, words)), (0, 1, 2, 2, 3, 4))


def test_a_suffix_closes_words_that_begin_others(question):
    """With a token for each character 动画 begins 动画片."""
    names = ("动画", "动画片")
    open_words = question("gpt2", names=names)
    assert len(open_words.warnings) == 1
    assert "'动画' begins '动画片'" in open_words.warnings[0]
    assert question("gpt2", names=names, scoring="generate").warnings == []
    closed = question("gpt2", names=names, label_suffix="。")
    assert closed.warnings == []
    tokens = [closed.tokenizer.convert_ids_to_tokens(list(word)) for word in closed.trie.words]
    assert tokens == [["动", "画", "。"], ["动", "画", "片", "。"]]


@pytest.mark.parametrize("scoring", ["sum", "generate"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_only_the_text_is_truncated(
    question, load_model, load_tokenizer, brute_force, texts, labels, kind, scoring
):
    """To the last position that the model has, which it then really uses."""
    asked = question(kind, template="task", scoring=scoring)
    long = "".join(texts) * 9
    short, cut = asked.suffixes(["好", long])
    whole = encode_pieces(load_tokenizer(kind), [long])[0]
    tail = asked.encoded.tail
    assert short == encode_pieces(load_tokenizer(kind), ["好"])[0] + tail
    assert cut == whole[: asked.room] + tail
    answer = 8 if scoring == "generate" else max(map(len, asked.trie.words)) - 1
    assert len(asked.encoded.head) + len(cut) + answer == 160
    assert asked.truncated == {long}

    method = Discrete(asked, load_model(kind), 4096, lockstep=True)
    scores = all_scores(method, [long, "好"])
    assert method.notes() == {"truncated_texts": 1}
    if scoring == "sum":
        words = brute_force(load_model(kind), [asked.encoded.head + cut], asked.trie)
        torch.testing.assert_close(scores[:1], words.log_softmax(1), atol=2e-4, rtol=0)


def test_a_text_that_just_fits_is_not_counted(question):
    asked = question("gpt2")
    asked.suffixes(["看" * asked.room])
    assert not asked.truncated
    asked.suffixes(["看" * (asked.room + 1)])
    assert asked.truncated == {"看" * (asked.room + 1)}


def test_no_room_for_a_text(question):
    asked = question()
    needed = 160 - asked.room + 1
    assert question(positions=needed).room == 1
    with pytest.raises(InputError, match=f"leave no room .* {needed - 1} positions: use fewer"):
        question(positions=needed - 1)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            {"demonstrations": [{"text": "好看", "label": "鬼畜"}]},
            r"prompt\.demonstrations: label '鬼畜' of '好看' is not one of 动画, ",
        ),
        (
            {"template": {"question": "分类", "choice": "", "answer": "{text}"}},
            "'custom': nothing follows the text",
        ),
        ({"verbalizer": {"动画": "龘"}}, "'龘' has the unknown id"),
        ({"verbalizer": {"动画": "影视"}}, "'影视' and '影视' have the same ids"),
        (
            {"scoring": "generate", "max_new_tokens": 3},
            "max_new_tokens: 3, but the label word '音乐舞蹈' has 4 tokens",
        ),
    ],
)
def test_questions_that_cannot_be_asked(question, prompt, message):
    with pytest.raises(InputError, match=message):
        question("gpt2", **prompt)


NAMES = ("动画", "动画片", "音乐舞蹈", "MAD")


@pytest.mark.parametrize(
    ("output", "named"),
    [
        ("动画", "动画"),
        ("是音乐舞蹈，不是动画", "音乐舞蹈"),  # the first named
        ("动画片真好看", "动画片"),  # the longest of those that begin there
        ("动画和动画片", "动画"),
        ("音乐 舞\n蹈", "音乐舞蹈"),
        ("ＭＡＤ", "MAD"),
        ("mad", None),
        ("音乐", None),
        ("", None),
    ],
)
def test_the_label_named_in_the_output(question, load_model, monkeypatch, output, named):
    asked = question(names=NAMES, scoring="generate")
    method = Discrete(asked, load_model("pangu"), 4096, lockstep=False)
    (batch,) = method.score_batches(["好", "好"])
    asked.tokenizer = SimpleNamespace(decode=lambda ids: {7: output, 8: "动画"}[ids[0]])
    monkeypatch.setattr(scorer, "generate", lambda *given, **options: [[8], [7]])
    scores = method.scores(batch)
    assert scores[0].tolist() == [0.0, -torch.inf, -torch.inf, -torch.inf]
    assert scores[1].tolist() == [0.0 if name == named else -torch.inf for name in NAMES]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_generated_labels_are_those_of_transformers(config, load_tokenizer, texts, kind):
    """Two labels that this model does say, in a prompt that their words don't change."""
    prompt = {"template": {"question": "弹幕分类: {text}", "choice": ""}, "scoring": "generate"}
    names = ("动画", "影视")
    method = discrete.build(config(kind, prompt), names)
    model: Any = method.module
    tokenizer = load_tokenizer(kind)
    texts = [text[:end] for text in texts for end in range(1, 8)]
    said = []
    for suffix in method.asked.suffixes(texts):
        ids = torch.tensor([[*method.asked.encoded.head, *suffix]])
        mask, length = torch.ones_like(ids), ids.shape[1]
        made = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=8)
        said.append(tokenizer.decode(made[0, length:]))
    characters = sorted({c for output in said for c in output if "\u4e00" <= c <= "\u9fff"})

    def named(pair: tuple[str, str]) -> list[str | None]:
        return [next((c for c in output if c in pair), None) for output in said]

    # The pair between which the texts are divided most evenly.
    pair = max(
        itertools.permutations(characters, 2),
        key=lambda pair: min(named(pair).count(pair[0]), named(pair).count(pair[1])),
    )
    assert {*pair} <= {*named(pair)}

    verbalizer = dict(zip(names, pair, strict=True))
    method = discrete.build(config(kind, prompt | {"verbalizer": verbalizer}), names)
    scores = all_scores(method, texts).tolist()
    expected = [[0.0 if c == first else -torch.inf for c in pair] for first in named(pair)]
    assert scores == expected


def test_demonstrations_are_drawn_once_and_stored(config, dataset):
    drawn = config("pangu", {"demonstrations": {"count": 6, "seed": 1}})
    fixed = discrete.prepare(drawn, dataset)
    shown = fixed.prompt.demonstrations
    assert [s.label for s in shown] != sorted(s.label for s in shown)
    assert sorted(s.label for s in shown) == sorted(["动画", "音乐舞蹈", "知识"] * 2)
    assert all(dataset.labels[(len(s.text) - 1) % 4] == s.label for s in shown)
    assert discrete.prepare(fixed, dataset) is fixed
    with pytest.raises(InputError, match="drawn from the train split, which the data does not"):
        discrete.prepare(drawn, Dataset(dataset.labels, {}, {}, None, {}))


def test_check_shows_the_prompt_with_its_ids(config, dataset, load_tokenizer):
    prompt = {"template": "few_shot", "demonstrations": {"count": 3}, "verbalizer": {"影视": "看"}}
    lines = discrete.check(config("gpt2", prompt), dataset)
    (ids,) = (line.removeprefix("  ids ") for line in lines if line.startswith("  ids "))
    decoded = load_tokenizer("gpt2").decode([int(i) for i in ids[1:-1].split(",")])
    shown = "".join(line[2:] for line in lines[2 : lines.index(f"  ids {ids}")])
    assert decoded.replace(" ", "") == "[CLS]" + shown
    answer = load_tokenizer("gpt2").convert_tokens_to_ids("看")
    assert f"label word 看: ids [{answer}]" in lines


def test_description_names_the_template(config):
    told = discrete.describe(config("pangu", {"template": "study_1"}))
    assert told == {"title": "study_1", "prompt": "{text} 属于哪个分区?"}
