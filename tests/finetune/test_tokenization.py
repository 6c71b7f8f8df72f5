"""The tokenizer that a model needs, and texts tokenized once."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import (
    AlbertConfig,
    BertConfig,
    BertTokenizer,
    ByT5Tokenizer,
    GPT2Config,
    T5Config,
    T5ForConditionalGeneration,
)

from data_prep.dataset import Dataset
from finetune import tokenization
from finetune.tokenization import encode, encode_once, load_tokenizer, longest_text
from launcher.errors import InputError

TEXTS = ["生活", "我在B站看动画", "2333", "生活"]


def folder_of(config: Any, tmp_path: Path, vocabulary: Path | None) -> Path:
    config.save_pretrained(tmp_path)
    if vocabulary is not None:
        shutil.copy(vocabulary, tmp_path / "vocab.txt")
    return tmp_path


@pytest.mark.parametrize("kind", [AlbertConfig, BertConfig, GPT2Config])
def test_a_bare_chinese_vocabulary_is_berts(kind: Any, vocabulary: Path, tmp_path: Path) -> None:
    size = len(vocabulary.read_text(encoding="utf-8").splitlines())
    folder = folder_of(kind(vocab_size=size), tmp_path, vocabulary)
    tokenizer = load_tokenizer(str(folder), kind(vocab_size=size))
    assert len(tokenizer) == size
    assert tokenizer.convert_ids_to_tokens(tokenizer("生活")["input_ids"]) == [
        "[CLS]", "生", "活", "[SEP]"
    ]  # fmt: skip


def test_byt5_needs_no_file(tmp_path: Path) -> None:
    config = T5Config(vocab_size=384)
    tokenizer = load_tokenizer(str(folder_of(config, tmp_path, None)), config)
    assert tokenizer("动画")["input_ids"] == [b + 3 for b in "动画".encode()] + [1]


def test_another_models_tokenizer_is_refused(vocabulary: Path, tmp_path: Path) -> None:
    size = len(vocabulary.read_text(encoding="utf-8").splitlines())
    config = BertConfig(vocab_size=2 * size)
    folder = folder_of(config, tmp_path, vocabulary)
    with pytest.raises(InputError, match=rf"has {size} ids and the model {2 * size}"):
        load_tokenizer(str(folder), config)


def test_t5_can_not_read_chinese(
    reference_data: Path, configured: Callable[..., Any], built: Callable[..., Any],
    dataset: Dataset, tmp_path: Path,
) -> None:  # fmt: skip
    """Refused with the reason; the override goes on to the label words, which look alike, too."""
    folder = tmp_path / "t5"
    folder.mkdir()
    shutil.copy(reference_data / "vocab" / "t5_spiece.model", folder / "spiece.model")
    shape: dict[str, Any] = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_heads": 2, "num_layers": 1}
    config = T5Config(vocab_size=32128, decoder_start_token_id=0, **shape)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    with pytest.raises(InputError, match=r"does not know \d\d% of the training text's tokens"):
        built("seq2seq", folder)
    allowed = "finetune.allow_unknown_tokens=true"
    with pytest.raises(InputError, match=r"does not know '动画', ids \[3, 2, 1\]: give another"):
        built("seq2seq", folder, allowed)
    words = "{动画: animation, 音乐舞蹈: music, 知识: knowledge, 生活: life, 影视: film}"
    method = built("seq2seq", folder, allowed, f"seq2seq.label_words={words}")
    assert len(method.training_set(dataset.splits["train"], 0).lengths) > 100


def test_the_real_vocabulary_knows_the_texts(reference_data: Path, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=21128)
    folder = folder_of(config, tmp_path, reference_data / "vocab" / "google_zh_vocab.txt")
    tokenizer = load_tokenizer(str(folder), config)
    tokens = encode(tokenizer, TEXTS, 512)
    assert tokenizer.convert_ids_to_tokens(tokens[2].tolist()) == ["[CLS]", "233", "##3", "[SEP]"]
    assert tokenization.unknown_share(tokenizer, tokens) == 0


def test_long_texts_keep_their_special_ids(vocabulary: Path) -> None:
    tokenizer = BertTokenizer(str(vocabulary))
    long, short = "生活" * 10, "生活"
    tokens = encode(tokenizer, [long, short], 7)
    assert tokens[0].tolist() == [2, *tokenizer("生活生活生")["input_ids"][1:-1], 3]
    assert tokens.lengths.tolist() == [7, 4]
    assert tokenization.truncated(tokenizer, [long, short], tokens, 7) == {long}
    assert encode(ByT5Tokenizer(), [long], 9)[0].tolist()[-1] == 1


def test_positions_limit_a_text() -> None:
    assert longest_text(BertConfig(max_position_embeddings=40), None) == 40
    assert longest_text(BertConfig(max_position_embeddings=40), 8) == 8
    assert longest_text(T5Config(), None) == 512
    with pytest.raises(InputError, match="finetune.max_tokens: 41, but the model has 40"):
        longest_text(BertConfig(max_position_embeddings=40), 41)


def test_texts_are_tokenized_once_for_all_runs(
    vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other texts, limits and tokenizers are other files; the same content elsewhere is not."""
    tokenizer = BertTokenizer(str(vocabulary))
    first = encode_once(tokenizer, TEXTS, 512, tmp_path / "kept")
    copied = tmp_path / "copy.txt"
    copied.write_bytes(vocabulary.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(tokenization, "encode", None)
        again = encode_once(BertTokenizer(str(copied)), TEXTS, 512, tmp_path / "kept")
    np.testing.assert_array_equal(again.ids, first.ids)
    np.testing.assert_array_equal(again.starts, first.starts)
    assert len([*(tmp_path / "kept").iterdir()]) == 1
    encode_once(tokenizer, TEXTS, 5, tmp_path / "kept")
    encode_once(tokenizer, TEXTS[::-1], 512, tmp_path / "kept")
    encode_once(BertTokenizer(str(vocabulary), do_lower_case=False), TEXTS, 512, tmp_path / "kept")
    assert len([*(tmp_path / "kept").iterdir()]) == 4
    for file in (tmp_path / "kept").iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(InputError, match="not readable: remove it"):
        encode_once(tokenizer, TEXTS, 512, tmp_path / "kept")
