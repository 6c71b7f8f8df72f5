"""Features are those that can be listed by hand."""

from pathlib import Path

import jieba
import pytest

from baselines.features import (
    Features,
    dictionary,
    encode,
    read_vocabulary,
    vocabulary,
    write_vocabulary,
)
from launcher.errors import InputError


def test_features_of_a_text_by_hand() -> None:
    of = lambda kind, text: [  # noqa: E731
        feature.removeprefix(f"{kind}:") for feature in Features([kind], (1, 3)).of(text)
    ]
    assert of("characters", "AB弹b") == [*"ab弹b", "ab", "b弹", "弹b", "ab弹", "b弹b"]
    assert of("edges", "好看A") == ["^好", "a$", "^好看", "看a$", "^好看a", "好看a$"]
    assert of("shape", "2B弹幕x") == ["5", "0a汉汉a"]
    assert of("tokens", "北京清华大学") == ["北京", "清华大学"]
    cut = ["北京", "清华大学", "清华", "华大", "大学"]
    assert sorted(of("words", "北京清华大学")) == sorted(cut)
    assert sorted(cut) == sorted(jieba.cut_for_search("北京清华大学"))
    assert sorted(of("words", "T恤衫")) == sorted(jieba.cut_for_search("T恤衫"))
    assert of("tags", "北京清华大学") == ["ns", "nt", "ns2 nt4"]
    frequencies = [jieba.dt.FREQ[word] for word in ("北京", "清华大学")]
    assert of("frequency", "北京清华大学") == [
        "whole 0",
        f"rarest {min(frequencies).bit_length()}",
        "words 2",
    ]
    assert Features(["shape", "tokens"], (1, 1)).of("北京") == [
        "shape:2",
        "shape:汉汉",
        "tokens:北京",
    ]
    # A prefix of words that is none itself stands in jieba's dictionary with frequency 0.
    assert dictionary().frequency("北京大") == 0


def test_a_vocabulary_counts_texts_and_reads_back(tmp_path: Path) -> None:
    features = Features(["characters"], (1, 1))
    texts = ["好好好", "好看", "看见", "见"]
    names = vocabulary(features, texts, 2)
    assert names == sorted(["characters:好", "characters:看", "characters:见"])
    assert vocabulary(features, ["一二", "二"], 1) == ["characters:二", "characters:一"]
    with pytest.raises(InputError, match="min_count: no feature is in 3 texts"):
        vocabulary(features, texts, 3)
    write_vocabulary(tmp_path / "vocabulary.json", names)
    places = read_vocabulary(tmp_path / "vocabulary.json")
    starts, found = encode(features, ["好好一", "一", "看见"], places)
    assert starts.tolist() == [0, 2, 2, 4]
    assert [names[place].removeprefix("characters:") for place in found] == [*"好好看见"]
    (tmp_path / "vocabulary.json").write_text("[")
    with pytest.raises(InputError, match="no readable vocabulary"):
        read_vocabulary(tmp_path / "vocabulary.json")
