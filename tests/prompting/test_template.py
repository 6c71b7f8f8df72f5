"""Prompts as the study wrote them, and their pieces as ids that never depend on neighbours."""

import json
from collections import Counter

import pytest
import sentencepiece
from pydantic import ValidationError
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from launcher.errors import InputError
from prompting.pangu import PanguTokenizer
from prompting.settings import TEMPLATES, Demonstration, TemplateSettings
from prompting.soft_prompt import soften
from prompting.template import (
    SoftSpan,
    build_prompt,
    draw_demonstrations,
    encode_pieces,
    encode_prompt,
    leading_ids,
    span_ids,
)

CHOICES = ("动画", "音乐舞蹈", "知识", "生活", "影视")
SHOWN = [Demonstration(text="甲", label="动画"), Demonstration(text="乙", label="影视")]
# How Qwen 2 cuts a text: a run of line breaks is one token, with the blanks before it.
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def byte_level():
    """`byte_level(name)`: a byte-level BPE that cuts like `gpt2` or `qwen`."""

    def train(name: str) -> PreTrainedTokenizerFast:
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name == "gpt2")
        cut = [] if name == "gpt2" else [pre_tokenizers.Split(Regex(QWEN), "isolated")]
        tokenizer = Tokenizer(tokenizer_models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cut, plain])
        tokenizer.decoder = decoders.ByteLevel()
        lines = [f"{template.question}\n\n{template.choice}" for template in TEMPLATES.values()]
        tokenizer.train_from_iterator(
            [*lines, "hello\n\n\nbilibili  看  "] * 3,
            trainers.BpeTrainer(
                vocab_size=400,
                show_progress=False,
                special_tokens=["<|endoftext|>"],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            ),
        )
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")

    return train


@pytest.mark.parametrize(
    ("name", "question"),
    [
        ("study_1", "[A] 属于哪个分区?"),
        ("study_2", "文本分类: [A]"),
        ("study_3", "弹幕分类: [A]"),
        ("study_4", "网络语言分类: [A]"),
    ],
)
def test_the_study_s_prompts(name, question):
    prompt = build_prompt(TEMPLATES[name], CHOICES)
    assert prompt.text_with("[A]") == f"{question}\n选项: 动画,音乐舞蹈,知识,生活,影视\n答案:"


def test_task_form():
    prompt = build_prompt(TEMPLATES["task"], CHOICES)
    expected = "弹幕分类：\n内容\n选项：动画，音乐舞蹈，知识，生活，影视\n答案："
    assert prompt.text_with("内容") == expected


def test_demonstrations_stand_whole_before_the_text():
    prompt = build_prompt(TEMPLATES["study_1"], ["动画", "影视"], SHOWN)
    assert prompt.text_with("丙") == (
        "甲 属于哪个分区?\n选项: 动画,影视\n答案:动画\n"
        "乙 属于哪个分区?\n选项: 动画,影视\n答案:影视\n"
        "丙 属于哪个分区?\n选项: 动画,影视\n答案:"
    )


def test_few_shot_says_the_choices_once_and_all_of_it_is_common():
    prompt = build_prompt(TEMPLATES["few_shot"], ["动画", "影视"], SHOWN, {"影视": "电影"})
    head = "弹幕分类，选项：动画，影视\n弹幕：甲\n答案：动画\n弹幕：乙\n答案：电影\n弹幕："
    assert "".join(map(str, prompt.head)) == head
    assert "".join(map(str, prompt.tail)) == "\n答案："


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (("question", "choice", "answer"), "问<甲>|选a b|答"),
        (("choice", "question", "answer"), "选a b|问<甲>|答"),
        (("choice", "demonstrations", "question", "answer"), "选a b|问<甲>|答"),
    ],
)
def test_order_and_separators(order, expected):
    template = TemplateSettings(
        question="问<{text}>",
        choice="选{choices}",
        answer="答",
        order=order,
        separator="|",
        choice_separator=" ",
    )
    assert build_prompt(template, ["a", "b"]).text_with("甲") == expected


def test_empty_segments_leave_no_separator():
    template = TemplateSettings(question="{text}", choice="", answer="是")
    prompt = build_prompt(template, CHOICES)
    assert (prompt.head, prompt.tail) == ((), ("\n是",))


def test_the_text_may_stand_in_any_segment():
    template = TemplateSettings(question="分类", answer="{text}是")
    assert build_prompt(template, ["a"]).text_with("甲") == "分类\n选项: a\n甲是"


def test_demonstrations_without_a_place_are_refused():
    template = TemplateSettings(
        name="bare", question="{text}", order=("question", "choice", "answer")
    )
    with pytest.raises(InputError, match=r"'bare'.*no place.*2 given.*add 'demonstrations'"):
        build_prompt(template, CHOICES, SHOWN)


def test_the_text_in_front_of_the_demonstrations_is_refused():
    template = TemplateSettings(
        question="{text}", order=("question", "demonstrations", "choice", "answer")
    )
    with pytest.raises(InputError, match=r"'custom'.*before the demonstrations"):
        build_prompt(template, CHOICES)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question": "分类"}, "seen 0 times"),
        ({"question": "{text}", "answer": "{text}"}, "seen 2 times"),
        ({"question": "{text}", "choice": "{choice}"}, "seen {choice}"),
        ({"question": "{text}是{choices}吗"}, "{choices} in question"),
        ({"question": "{text}", "order": ("question", "answer")}, "once each"),
        ({"question": "{text}", "order": ("question", "question", "choice", "answer")}, "once"),
        ({"question": "{text}", "order": ("answer", "question", "choice")}, "end with answer"),
        ({"question": "{text}{soft}"}, "{soft}"),
        ({"question": "{text}{soft:}"}, "{soft:}"),
        ({"question": "{text}{soft:0}"}, "no length, seen {soft:0}: give a number of vectors"),
        ({"question": "{text}{soft:00:词}"}, "no length, seen {soft:00:词}: give a number"),
        ({"question": "{text}", "answer": "{soft:{soft:2}}"}, "no slots but"),
        # What is nearly a span must not be words.
        ({"question": "{text}{soft:20"}, "seen {soft:20"),
        ({"question": "{text}{soft：20}"}, "seen {soft：20}"),
        ({"question": "{text}{soft :20}"}, "seen {soft :20}"),
        ({"question": "{text}{Soft:20}"}, "seen {Soft:20}"),
        ({"question": "{text}{ soft:20}"}, "seen { soft:20}"),
        ({"question": "{text}{soft: 20}"}, "seen {soft: 20}: write {soft:20}"),
        ({"question": "{text}{soft:20:}"}, "seen {soft:20:}: write {soft:20}"),
        ({"question": "{text}{soft:-5}"}, "seen {soft:-5}: write {soft:20}"),
    ],
)
def test_templates_that_cannot_work_are_refused(fields, message):
    with pytest.raises(ValidationError) as raised:
        TemplateSettings(**fields)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("question", "answer", "head", "tail"),
    [
        ("{soft:20}{text}", "答", (SoftSpan(20, ""),), ("\n答",)),
        ("{text}{soft:词}", "答", (), (SoftSpan(0, "词"), "\n答")),
        ("前{soft:20:词}后{text}", "答", ("前", SoftSpan(20, "词"), "后"), ("\n答",)),
        ("{soft:2:2:1}{text}", "答", (SoftSpan(2, "2:1"),), ("\n答",)),
        ("{soft:1}{soft:词}{text}", "答", (SoftSpan(1, ""), SoftSpan(0, "词")), ("\n答",)),
        ("{text}", "答{soft:3}", (), ("\n答", SoftSpan(3, ""))),
        (
            "{soft:1}",
            "{soft:2}{text}{soft:3}",
            (SoftSpan(1, ""), "\n", SoftSpan(2, "")),
            (SoftSpan(3, ""),),
        ),
    ],
)
def test_soft_spans_are_pieces(question, answer, head, tail):
    template = TemplateSettings(question=question, choice="", answer=answer)
    prompt = build_prompt(template, CHOICES)
    assert (prompt.head, prompt.tail) == (head, tail)
    assert prompt.spans == [piece for piece in (*head, *tail) if isinstance(piece, SoftSpan)]


@pytest.mark.parametrize("kind", ["pangu", "gpt2", "llama"])
def test_soft_vectors_have_the_ids_past_the_vocabulary(load_tokenizer, kind):
    """In order; at the very front they stand in place of BOS or [CLS]."""
    tokenizer = load_tokenizer(kind)

    def encoded(question: str) -> tuple[list[int], list[int]]:
        template = TemplateSettings(question=question, choice="", answer="是{soft:2}")
        own = encode_prompt(build_prompt(template, CHOICES), tokenizer, 5000)
        return own.head, own.tail

    one, yes = encode_pieces(tokenizer, ["动画", "\n是"])
    assert encoded("{soft:2}动画{text}{soft:1}") == (
        [5000, 5001, *one],
        [5002, *yes, 5003, 5004],
    )
    opening = encode_pieces(tokenizer, ["动画"], first=True)[0]
    begin = [*leading_ids(tokenizer), *opening]
    assert encoded("动画{soft:1}{text}") == ([*begin, 5000], [*yes, 5001, 5002])
    assert encoded("{text}{soft:1}") == (leading_ids(tokenizer), [5000, *yes, 5001, 5002])


# Tokenizers join its words to those beside them unless they are kept apart.
TOUCHING = TemplateSettings(
    name="touching",
    question="弹{text}好",
    choice="看: {choices}",
    separator="",
)
SOFTENED = [*TEMPLATES.values(), TOUCHING]


@pytest.mark.parametrize("kind", ["pangu", "gpt2", "llama", "byte-level gpt2", "byte-level qwen"])
@pytest.mark.parametrize("template", SOFTENED, ids=lambda template: template.name)
def test_softening_changes_no_other_id(load_tokenizer, byte_level, kind, template):
    """With the ids of the words put back, it is the discrete prompt."""
    tokenizer = byte_level(kind[11:]) if kind.startswith("byte") else load_tokenizer(kind)
    discrete = encode_prompt(build_prompt(template, CHOICES), tokenizer)
    softened = build_prompt(soften(template, tokenizer, None), CHOICES)
    own = encode_prompt(softened, tokenizer, 5000)
    words = [i for span in softened.spans for i in span_ids(softened, span, tokenizer)]
    assert len(words) == sum(span.length for span in softened.spans) > 0

    def put_back(ids: list[int]) -> list[int]:
        return [words[i - 5000] if i >= 5000 else i for i in ids]

    assert (put_back(own.head), put_back(own.tail)) == (discrete.head, discrete.tail)
    assert sum(i >= 5000 for i in own.head + own.tail) == len(words)


def test_pieces_of_pangu_are_the_ids_of_each_alone(load_tokenizer, folders):
    pieces = sentencepiece.SentencePieceProcessor(str(folders["pangu"] / "vocab.model"))
    tokenizer = load_tokenizer("pangu")
    encoded = encode_prompt(build_prompt(TEMPLATES["study_3"], CHOICES, SHOWN[:1]), tokenizer)
    tail = "▃ 选项 : ▂ 动画 , 音乐舞蹈 , 知识 , 生活 , 影视 ▃ 答案 :"
    said = ["弹幕 分类 : ▂", "甲", tail, "动画", "▃ 弹幕 分类 : ▂"]
    assert encoded.head == [i for piece in said for i in pieces.encode(piece)]
    assert encoded.tail == pieces.encode(tail)


def test_bert_pieces_begin_with_cls_and_have_no_sep(load_tokenizer):
    tokenizer = load_tokenizer("gpt2")
    encoded = encode_prompt(build_prompt(TEMPLATES["study_3"], ["动画"]), tokenizer)
    assert tokenizer.convert_ids_to_tokens(encoded.head) == ["[CLS]", *"弹幕分类:"]
    assert tokenizer.convert_ids_to_tokens(encoded.tail) == [*"选项:动画答案:"]
    # No wordpiece goes on across a border: the text is a word of its own.
    assert tokenizer.convert_ids_to_tokens(encode_pieces(tokenizer, ["bi"])[0]) == ["b", "##i"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_llama_pieces_hold_no_stray_space(load_tokenizer, template):
    """Its tokenizer puts a space before a string: here at the prompt's very start only."""
    tokenizer = load_tokenizer("llama")
    prompt = build_prompt(TEMPLATES[template], CHOICES, SHOWN)
    encoded = encode_prompt(prompt, tokenizer)
    text = encode_pieces(tokenizer, ["这个好看"], first=not prompt.head)[0]
    answer = encode_pieces(tokenizer, ["动画"])[0]
    ids = [*encoded.head, *text, *encoded.tail, *answer]
    assert ids[0] == tokenizer.bos_token_id
    spelled = "".join(_bytes_as_text(tokenizer.convert_ids_to_tokens(ids[1:])))
    assert spelled == "▁" + (prompt.text_with("这个好看") + "动画").replace(" ", "▁")
    assert tokenizer.decode(ids[1:]) == prompt.text_with("这个好看") + "动画"


def _bytes_as_text(tokens: list[str]) -> str:
    """Sentencepiece tokens joined, byte tokens as the characters that they spell."""
    raw = b"".join(bytes([int(t[3:5], 16)]) if t.startswith("<0x") else t.encode() for t in tokens)
    return raw.decode()


def test_a_llama_text_at_the_very_start_is_begun_like_a_string(load_tokenizer):
    tokenizer = load_tokenizer("llama")
    prompt = build_prompt(TEMPLATES["study_1"], CHOICES)
    assert prompt.head == ()
    assert encode_prompt(prompt, tokenizer).head == [tokenizer.bos_token_id]
    at_start, inside = (
        encode_pieces(tokenizer, ["动画"], first=first)[0] for first in (True, False)
    )
    assert tokenizer.convert_ids_to_tokens(at_start)[0].startswith("▁")
    assert at_start == tokenizer.encode("动画", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(inside) == ["动画"]


@pytest.mark.parametrize("cut", ["gpt2", "qwen"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_byte_level_pieces_add_up_to_the_prompt(byte_level, cut, template):
    """Also where a piece begins with the line break that Qwen joins to one before it."""
    tokenizer = byte_level(cut)
    prompt = build_prompt(TEMPLATES[template], CHOICES, SHOWN)
    encoded = encode_prompt(prompt, tokenizer)
    text = encode_pieces(tokenizer, ["哈哈 233"], first=not prompt.head)[0]
    ids = [*encoded.head, *text, *encoded.tail]
    assert tokenizer.decode(ids) == prompt.text_with("哈哈 233")


@pytest.mark.parametrize("cut", ["gpt2", "qwen"])
def test_any_piece_comes_back_whole(byte_level, cut):
    tokenizer = byte_level(cut)
    pieces = [
        "\n选项",
        "\n\n选项",
        "\n",
        " 选项",
        "  \n看",
        "\t选",
        "\u3000看",
        "hello",
        "看\n\n",
        "",
        "1a",
    ]
    for piece, ids in zip(pieces, encode_pieces(tokenizer, pieces), strict=True):
        assert tokenizer.decode(ids) == piece
        if piece and not piece[0].isspace():
            assert ids == tokenizer.encode(piece), "this tokenizer adds nothing to a string"


def test_a_tokenizer_that_merges_across_the_border_is_refused():
    """One without a pre-tokenizer, that learnt a line break and the sign after it as one token."""
    tokenizer = Tokenizer(
        tokenizer_models.BPE({"\n": 0, "动": 1, "\n动": 2}, [("\n", "动")], unk_token=None)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    with pytest.raises(InputError, match=r"model\.path.*merges '.n' with '动动'"):
        encode_pieces(fast, ["动动"])


@pytest.mark.parametrize("kind", ["pangu", "gpt2", "llama"])
def test_pieces_do_not_depend_on_each_other(load_tokenizer, texts, kind):
    tokenizer = load_tokenizer(kind)
    assert encode_pieces(tokenizer, []) == []
    together = encode_pieces(tokenizer, texts)
    assert together == [encode_pieces(tokenizer, [text])[0] for text in texts]
    assert all(together)


def test_leading_ids(load_tokenizer, byte_level):
    assert leading_ids(load_tokenizer("pangu")) == []
    assert leading_ids(load_tokenizer("gpt2")) == [2]  # [CLS], and not the [SEP] that ends it
    assert leading_ids(load_tokenizer("llama")) == [1]
    assert leading_ids(byte_level("gpt2")) == []


def test_drawn_demonstrations_are_even_and_seeded():
    texts = [f"文{i}" for i in range(60)]
    labels = ["多"] * 50 + ["少"] * 8 + ["稀"] * 2
    drawn = draw_demonstrations(texts, labels, 9, seed=3)
    assert Counter(shown.label for shown in drawn) in (
        {"多": 4, "少": 3, "稀": 2},
        {"多": 3, "少": 4, "稀": 2},
    )
    assert len({shown.text for shown in drawn}) == 9
    assert all(labels[texts.index(shown.text)] == shown.label for shown in drawn)
    assert draw_demonstrations(texts, labels, 9, seed=3) == drawn
    assert draw_demonstrations(texts, labels, 9, seed=4) != drawn
    assert Counter(s.label for s in draw_demonstrations(texts, labels, 60, 0)) == Counter(labels)


def test_a_draw_larger_than_the_data_is_refused():
    with pytest.raises(InputError, match=r"count: 3 wanted.* 2 labelled examples: lower it"):
        draw_demonstrations(["a", "b"], ["x", "y"], 3, 0)


def test_one_draw_favours_no_label():
    """With one demonstration, whose label it is depends on the seed and not on the names."""
    seen = {draw_demonstrations(["a", "b"], ["x", "y"], 1, seed)[0].label for seed in range(20)}
    assert seen == {"x", "y"}


def test_real_chats_in_every_prompt(reference_data):
    """What tokenizing by piece costs with the real vocabulary, against the whole string at once.

    Guaranteed for any text: the template's ids are the same around every text, and a text's the
    same in every template. They are those of the whole string too wherever a blank or a sign parts
    the pieces, as in all built-in templates: the word segmenter never looks across one. Where Han
    characters touch, a few texts differ.
    """
    tokenizer = PanguTokenizer(reference_data / "vocab/pangu_vocab.model")
    with (reference_data / "data/danmaku_unlabelled.jsonl").open(encoding="utf-8") as lines:
        chats = [json.loads(next(lines))["text"] for _ in range(2000)]
    texts, answer = encode_pieces(tokenizer, chats), encode_pieces(tokenizer, ["动画"])[0]
    touching = TemplateSettings(name="touching", question="弹幕{text}属于哪个分区?")
    differ = {}
    for template in [*TEMPLATES.values(), touching]:
        prompt = build_prompt(template, CHOICES)
        own = encode_prompt(prompt, tokenizer)
        whole = tokenizer.encode_batch([prompt.text_with(chat) + "动画" for chat in chats])
        pieces = [[*own.head, *ids, *own.tail, *answer] for ids in texts]
        differ[template.name] = sum(a != b for a, b in zip(pieces, whole, strict=True))
    assert differ == dict.fromkeys(TEMPLATES, 0) | {"touching": 4}
