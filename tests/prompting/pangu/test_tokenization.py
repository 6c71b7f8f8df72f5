"""The tokenizer against golden cases, and on vocabularies trained in the test."""

import io
import json
import logging
from pathlib import Path

import jieba
import pytest
import sentencepiece
from transformers import AutoTokenizer

from launcher.errors import InputError
from prompting.pangu import PanguTokenizer, train_vocabulary

SPECIAL = ["<unk>", "<s>", "</s>", "▃", "▂", "<sep>", "<pad>", "<mask>", "<eod>", "<eot>"]
TEXTS = [
    "这个动画片真好看，我看了三遍",
    "音乐 很好听 ，舞蹈也不错\n下一首",
    "今天学到了新的知识，谢谢老师",
    "生活就是这样，慢慢来",
    "影视剪辑做得真好，期待下一期",
] * 4


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.model"
    train_vocabulary(TEXTS, path, vocab_size=120)
    return path


@pytest.fixture(scope="module")
def tokenizer(vocabulary: Path) -> PanguTokenizer:
    return PanguTokenizer(vocabulary)


def test_golden_cases(reference_data: Path):
    tokenizer = PanguTokenizer(reference_data / "vocab/pangu_vocab.model")
    golden = json.loads((reference_data / "golden/pangu/tokenizer.json").read_text())
    cases = golden["cases"]
    assert len(cases) == 25
    assert len(tokenizer) == 40000
    for case in cases:
        assert tokenizer(case["text"])["input_ids"] == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
    assert tokenizer.encode_batch([case["text"] for case in cases]) == [c["ids"] for c in cases]


def test_encoding_is_jieba_then_sentencepiece(tokenizer, vocabulary):
    plain = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    for text in [*TEXTS[:5], "", " ", "a  b\r\n\tc", "没见过的龘字", "<eot> <pad>▂▃"]:
        words = [w.replace(" ", "▂").replace("\n", "▃") for w in jieba.Tokenizer().cut(text)]
        expected = plain.encode(" ".join(words))
        assert tokenizer.encode(text) == expected
        assert tokenizer.encode_batch([text]) == [expected]


def test_decode_restores_blanks(tokenizer):
    for text in TEXTS[:5]:
        normalised = text.replace("，", ",")
        assert tokenizer.decode(tokenizer.encode(text)) == normalised


def test_special_tokens_in_a_text_are_plain_unless_asked_for(tokenizer):
    assert not {6, 9} & set(tokenizer.encode("好<eot>看<pad>"))
    assert tokenizer.encode("好看<eot>", split_special_tokens=False)[-1] == 9
    ids = [9, *tokenizer.encode("真好看"), 9, 6]
    assert tokenizer.decode(ids) == "<eot>真好看<eot><pad>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "真好看"


def test_words_added_to_the_shared_jieba_do_not_change_ids(tokenizer):
    before = tokenizer.encode("慢慢来吧<eot>")
    jieba.add_word("<eot>")
    jieba.add_word("慢慢来吧")
    try:
        assert tokenizer.encode("慢慢来吧<eot>") == before
    finally:
        jieba.del_word("<eot>")
        jieba.del_word("慢慢来吧")


def test_batches_are_padded_with_6(tokenizer):
    batch = tokenizer(TEXTS[:2], padding=True, return_tensors="pt")
    ids = tokenizer.encode_batch(TEXTS[:2])
    for row, mask, expected in zip(
        batch["input_ids"].tolist(), batch["attention_mask"].tolist(), ids, strict=True
    ):
        padding = len(row) - len(expected)
        assert row == expected + [6] * padding
        assert mask == [1] * len(expected) + [0] * padding
    assert set(batch) == {"input_ids", "attention_mask"}


def test_saved_tokenizer_loads_through_the_auto_class(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "vocab.model").is_file()
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, PanguTokenizer)
    assert len(loaded) == len(tokenizer)
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (6, 9, 0)
    for text in [*TEXTS[:5], "好<eot>看"]:
        assert loaded.encode(text) == tokenizer.encode(text)


def test_trained_vocabulary_has_the_reference_layout(vocabulary, tokenizer):
    plain = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    assert [plain.id_to_piece(index) for index in range(10)] == SPECIAL
    assert plain.pad_id() == -1
    assert len(tokenizer) == plain.get_piece_size() <= 120
    assert plain.encode("（ｆ）") == plain.encode("(f)")  # NFKC


def test_training_is_deterministic_and_complete(vocabulary, tmp_path):
    again = tmp_path / "again.model"
    train_vocabulary(iter(TEXTS), again, vocab_size=120)
    assert again.read_bytes() == vocabulary.read_bytes()
    train_vocabulary(TEXTS, again, vocab_size=100_000)  # a limit, not a demand
    assert 10 < len(PanguTokenizer(again)) < 1000
    long = "好" * 3000 + "龘" * 3000  # longer than sentencepiece's default limit of 4192 bytes
    train_vocabulary([*TEXTS, long], again, vocab_size=200)
    assert 0 not in PanguTokenizer(again).encode("龘")
    assert [path.name for path in tmp_path.iterdir()] == ["again.model"]


def test_impossible_training_is_refused(tmp_path):
    for texts, size in [([], 100), ([""], 100), (TEXTS, 20)]:
        with pytest.raises(InputError, match=f"^vocabulary: can't train {size} pieces") as caught:
            train_vocabulary(texts, tmp_path / "vocab.model", size)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_wrong_vocabulary_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        PanguTokenizer(tmp_path / "vocab.model")
    (tmp_path / "vocab.model").write_bytes(b"not a model")
    with pytest.raises(InputError, match="not a sentencepiece model"):
        PanguTokenizer(tmp_path / "vocab.model")


def test_jieba_loads_silently(tokenizer, monkeypatch):
    from prompting.pangu import tokenization

    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger("jieba").addHandler(handler)
    tokenization._segmenter.cache_clear()
    tokenizer.encode("你好")
    logging.getLogger("jieba").removeHandler(handler)
    assert stream.getvalue() == ""
