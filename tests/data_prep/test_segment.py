"""Words: rjieba against jieba, and the study's selection against a plain loop."""

import json
import random
from collections import defaultdict
from pathlib import Path

import jieba
import pyarrow as pa
import pytest

from data_prep import segment
from data_prep.clean import clean
from data_prep.phrases import GENERAL_PHRASES, ZONE_PHRASES
from data_prep.segment import Jieba, Rjieba, open_segmenter, self_test, study_words
from launcher.errors import InputError

PHRASES = [*GENERAL_PHRASES, *(phrase for phrases in ZONE_PHRASES.values() for phrase in phrases)]


def words_of(segmenter: segment.Segmenter, texts: list[str]) -> list[list[str]]:
    """The words of each text."""
    words, text = segmenter.cut(texts)
    found: dict[int, list[str]] = defaultdict(list)
    for index, word in zip(text.tolist(), words.to_pylist(), strict=True):
        found[index].append(word)
    return [found[index] for index in range(len(texts))]


def expected_words(texts: list[str]) -> list[list[str]]:
    return [list(jieba.cut_for_search(text)) for text in texts]


def difficult_texts() -> list[str]:
    """Texts in which cuts tie: runs, repetitions, few different characters, rare ones; and mixes
    with what the two engines' patterns see differently."""
    rng = random.Random(0)
    common = "".join(PHRASES)
    texts = [rng.choice(common) * rng.randint(2, 100) for _ in range(600)]
    texts += [(rng.choice(PHRASES) * 30)[: rng.randint(20, 100)] for _ in range(600)]
    for _ in range(1200):
        few = rng.choices(common, k=rng.randint(1, 4))
        texts.append("".join(rng.choices(few, k=rng.randint(4, 14))))
        rare = [chr(rng.randint(0x4E00, 0x9FFF)) for _ in range(rng.randint(2, 20))]
        texts.append("".join(rare))
        mixed = "".join(rng.choices([*PHRASES, *"a1.-+#&_% ，㐂𠮷🙂", "B超", "T恤", "6.6w"], k=4))
        texts.append(mixed)
    return texts


def test_rjieba_cuts_as_jieba_does() -> None:
    texts = ["", *PHRASES, *difficult_texts(), ""]
    assert words_of(Rjieba(), texts) == expected_words(texts)
    assert words_of(Jieba(), texts[:50]) == expected_words(texts[:50])


def test_rjieba_cuts_all_real_chats_as_jieba_does(reference_data: Path) -> None:
    lines = (reference_data / "data/danmaku_unlabelled.jsonl").read_text(encoding="utf-8")
    chats = pa.array([json.loads(line)["text"] for line in lines.splitlines()])
    rules = [clean(chats, rule) for rule in ("study", "gentle")]
    texts = pa.concat_arrays(rules).unique().to_pylist()
    assert words_of(Rjieba(), texts) == expected_words(texts)


def test_self_test_finds_what_is_made_good(monkeypatch: pytest.MonkeyPatch) -> None:
    assert self_test(Rjieba()) == self_test(Jieba()) == ""
    with monkeypatch.context() as patch:
        patch.setattr(Rjieba, "_agree", lambda self, run: True)
        assert "感感感感感" in self_test(Rjieba())
    with monkeypatch.context() as patch:
        patch.setattr(segment, "_COUNTED_TWICE", 0)
        assert "kikikiki" in self_test(Rjieba())


def test_choice_of_segmenter_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, which = open_segmenter()
    assert isinstance(chosen, Rjieba) and "passed the self-test" in which
    assert isinstance(open_segmenter("jieba")[0], Jieba)
    monkeypatch.setitem(segment.SELF_TEST, "前方高能", "前方 高 能")
    chosen, which = open_segmenter()
    assert isinstance(chosen, Jieba) and "前方高能" in which
    with pytest.raises(InputError, match="--segmenter rjieba: it cuts 前方高能"):
        open_segmenter("rjieba")
    monkeypatch.setattr(segment, "RJIEBA", "9.9")
    assert "rjieba 0.2.2 is installed, known is 9.9" in open_segmenter()[1]


def test_study_words() -> None:
    texts = [
        "简直不敢",
        "哈哈哈",
        "滑铁卢了吧这",
        "我来到北京清华大学",
        "",
        "啊吗",
        "王者荣耀王者荣耀",
    ]
    stop_words = {"清华大学"}
    expected = []
    for index, text in enumerate(texts):
        found = list(jieba.cut_for_search(text))
        if len(text) <= 6:
            found.append(text)
        for word in found:
            if len(word) > 2 and len(set(word)) > 1 and word not in stop_words:
                expected.append((index, word))
    words = study_words(pa.array(texts), Rjieba(), stop_words)
    vocabulary = words.vocabulary.to_pylist()
    seen = [(text, vocabulary[word]) for text, word in zip(words.text, words.word, strict=True)]
    assert sorted(seen) == sorted(expected)
    assert len(set(vocabulary)) == len(vocabulary) == len({word for _, word in expected})
    # A chat that is one of its own words counts twice, as in the study.
    assert [word for _, word in seen].count("简直不敢") == 1 + expected_words(["简直不敢"])[
        0
    ].count("简直不敢")
