"""The study's words: jieba's search mode, by jieba itself or by a faster engine of equal output.

rjieba (jieba in Rust) differs from jieba 0.42.1 in four ways, each met here:

- It counts a word that stands twice in jieba's dictionary once. The total frequency is put right,
  after which paths of equal probability are chosen alike.
- It adds up the hidden Markov model's terms in another order, so that it may choose another one of
  several equally good cuts of a run of single characters. Such a run has five characters or more;
  those that can have equally good cuts are cut by jieba's own model.
- It keeps numbers and words together that are joined by a dot or hyphen, and knows Han characters
  outside the block that jieba knows. Chats with either are left to jieba.
"""

import importlib.metadata
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from launcher.errors import InputError

JIEBA, RJIEBA = "0.42.1", "0.2.2"
"""The versions whose outputs are known to be equal."""
WHOLE_CHAT = 6
"""Most characters of a chat that is a word of its own besides."""


class Segmenter(Protocol):
    """Cuts texts as `jieba.cut_for_search` does; texts must not contain line feeds."""

    def cut(self, texts: Sequence[str]) -> tuple[pa.Array, np.ndarray]:
        """All words, and for each the index of its text, int32; in order within a text."""
        ...


@dataclass(frozen=True)
class Words:
    """Occurrences of words, sorted by text: index of the text and of the word, int32 [n] each."""

    text: np.ndarray
    word: np.ndarray
    vocabulary: pa.Array


def study_words(texts: pa.Array, segmenter: Segmenter, stop_words: Collection[str] = ()) -> Words:
    """The words of each chat as the study took them.

    Those of jieba's search mode and, from a chat of at most `WHOLE_CHAT` characters, the chat; each
    as often as it comes, if it has more than two characters, not all the same, and is no stop word.
    """
    tokens, text = segmenter.cut(texts.to_pylist())
    long = np.flatnonzero(pc.greater(pc.utf8_length(tokens), 2))
    sizes = pc.utf8_length(texts)
    whole = np.flatnonzero(pc.and_(pc.greater(sizes, 2), pc.less_equal(sizes, WHOLE_CHAT)))
    both = pa.concat_arrays([tokens.take(pa.array(long)), texts.take(pa.array(whole))])
    text = np.concatenate([text[long], whole.astype(np.int32)])
    encoded = both.dictionary_encode()
    kept = np.array(
        [len(set(word)) > 1 and word not in stop_words for word in encoded.dictionary.to_pylist()],
        dtype=bool,
    )
    word = encoded.indices.to_numpy()
    chosen = np.flatnonzero(kept[word])
    chosen = chosen[np.argsort(text[chosen], kind="stable")]
    renumbered = np.cumsum(kept, dtype=np.int32) - 1
    return Words(text[chosen], renumbered[word[chosen]], encoded.dictionary.filter(pa.array(kept)))


def open_segmenter(engine: str = "auto") -> tuple[Segmenter, str]:
    """The fastest segmenter that passes the self-test, and a line that says which and why.

    `engine`: auto, jieba or rjieba. Raises InputError if the one named can't be used.
    """
    version = importlib.metadata.version("jieba")
    if engine == "jieba":
        return Jieba(), f"jieba {version}"
    reason = _other_versions()
    if not reason:
        fast = Rjieba()
        reason = self_test(fast)
        if not reason:
            return fast, f"rjieba {RJIEBA}, which passed the self-test against jieba {JIEBA}"
    if engine == "rjieba":
        raise InputError(f"--segmenter rjieba: {reason}; install rjieba=={RJIEBA} or use jieba")
    return Jieba(), f"jieba {version} (rjieba would be faster, but: {reason})"


def self_test(segmenter: Segmenter) -> str:
    """What `segmenter` cuts otherwise than jieba, "" if nothing in `SELF_TEST`."""
    for text, words in SELF_TEST.items():
        seen = " ".join(segmenter.cut([text])[0].to_pylist())
        if seen != words:
            return f"it cuts {text} as {seen}, jieba as {words}"
    return ""


def _other_versions() -> str:
    """How the installed versions differ from those known to be equal, or ""."""
    for name, known in (("jieba", JIEBA), ("rjieba", RJIEBA)):
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"{name} is not installed"
        if installed != known:
            return f"{name} {installed} is installed, known is {known}"
    return ""


class Jieba:
    """The reference."""

    def __init__(self) -> None:
        self._cut = jieba_cut()

    def cut(self, texts: Sequence[str]) -> tuple[pa.Array, np.ndarray]:
        return _one_after_another(range(len(texts)), map(self._cut, texts))


class Rjieba:
    """rjieba with the differences from jieba made good."""

    def __init__(self) -> None:
        import rjieba
        from jieba import finalseg

        self._all = rjieba.Jieba()
        self._all.add_word(_NEVER_SEEN, _COUNTED_TWICE, None)
        self._model_only = rjieba.Jieba.empty()  # no dictionary: everything is cut by the model
        self._jieba_model: Callable[[str], Iterator[str]] = finalseg.cut
        emissions: Any = finalseg.emit_P.values()
        self._common = {
            character
            for state in emissions
            for character, log_probability in state.items()
            if log_probability > _COMMON
        }
        self._agreed: dict[str, bool] = {}
        self._reference: Callable[[str], Iterator[str]] | None = None

    def cut(self, texts: Sequence[str]) -> tuple[pa.Array, np.ndarray]:
        plain = list(range(len(texts)))
        if _LEFT_TO_JIEBA.search("\t".join(texts)):
            plain = [index for index in plain if not _LEFT_TO_JIEBA.search(texts[index])]
        given = [texts[index] for index in plain]
        words = pa.array(self._all.cut_for_search("\n".join(given)), pa.string())
        text = np.array(plain, dtype=np.int32)[_text_of_each(words)] if plain else _NO_TEXTS
        recut: dict[int, Iterable[str]] = {
            plain[index]: self._recut(given[index]) for index in self._doubtful(given)
        }
        for index in sorted(set(range(len(texts))).difference(plain)):
            self._reference = self._reference or jieba_cut()
            recut[index] = self._reference(texts[index])
        kept = pc.not_equal(words, "\n").to_numpy(zero_copy_only=False)
        given_up = np.zeros(len(texts), dtype=bool)
        given_up[[*recut]] = True
        kept &= ~given_up[text]
        other_words, other_text = _one_after_another(recut, recut.values())
        return (
            pa.concat_arrays([words.filter(pa.array(kept)), other_words]),
            np.concatenate([text[kept], other_text]),
        )

    def _doubtful(self, texts: list[str]) -> list[int]:
        """Indices of texts with a run of single characters that jieba's model cuts otherwise."""
        route = self._all.cut("\n".join(texts), False)
        words = pa.array(route, pa.string())
        single = pc.and_(
            pc.equal(pc.utf8_length(words), 1),
            pc.and_(pc.greater_equal(words, _FIRST_HAN), pc.less_equal(words, _LAST_HAN)),
        ).to_numpy(zero_copy_only=False)
        edges = np.flatnonzero(np.diff(single.astype(np.int8), prepend=0, append=0))
        starts, ends = edges[::2], edges[1::2]
        long = ends - starts >= _SHORTEST_TIE
        differing = [
            start
            for start, end in zip(starts[long].tolist(), ends[long].tolist(), strict=True)
            if not self._agree("".join(route[start:end]))
        ]
        return np.unique(_text_of_each(words)[differing]).tolist()

    def _agree(self, run: str) -> bool:
        """Whether both models cut a run of single characters alike."""
        agreed = self._agreed.get(run)
        if agreed is None:
            # Cuts are equally good where characters change places: the same one twice, or such as
            # are so rare that their counts have small ratios.
            characters = set(run)
            tie = len(characters) < len(run) or len(characters - self._common) >= 3
            agreed = not tie or [*self._jieba_model(run)] == self._model_only.cut(run)
            self._agreed[run] = agreed
        return agreed

    def _recut(self, text: str) -> list[str]:
        """`text` in search mode, its runs of single characters cut by jieba's model."""
        runs: dict[int, str] = {}
        at, start = 0, 0
        for word in [*self._all.cut(text, False), "\n"]:
            if not (len(word) == 1 and _FIRST_HAN <= word <= _LAST_HAN):
                if at - start >= _SHORTEST_TIE:
                    runs[start] = text[start:at]
                start = at + len(word)
            at += len(word)
        words: list[str] = []
        at = done = 0
        for word in self._all.cut(text):
            if at in runs:
                words += self._jieba_model(runs[at])
                done = at + len(runs[at])
            if at >= done:
                words.append(word)
            at += len(word)
        return [part for word in words for part in self._search_mode(word)]

    def _search_mode(self, word: str) -> Iterator[str]:
        for size in (2, 3):
            if len(word) > size:
                parts = [word[start : start + size] for start in range(len(word) - size + 1)]
                yield from filter(self._all.has_word, parts)
        yield word


def jieba_cut() -> Callable[[str], Iterator[str]]:
    """`jieba.cut_for_search`, with its dictionary loaded and nothing told about it."""
    import jieba

    jieba.setLogLevel("WARNING")
    jieba.initialize()
    return jieba.cut_for_search


def _one_after_another(
    texts: Collection[int], words: Iterable[Iterable[str]]
) -> tuple[pa.Array, np.ndarray]:
    """The words of all texts in one array, and the index in `texts` of each one's text."""
    lists = [list(each) for each in words]
    index = np.fromiter(texts, np.int32, len(texts))
    flat = pa.array(itertools.chain.from_iterable(lists), pa.string())
    return flat, np.repeat(index, np.fromiter(map(len, lists), np.int64, len(lists)))


def _text_of_each(words: pa.Array) -> np.ndarray:
    """Index of the text of each word, where line feeds stand between texts; int64 [words]."""
    feeds = pc.equal(words, "\n").to_numpy(zero_copy_only=False)
    return np.cumsum(feeds)


_NEVER_SEEN, _COUNTED_TWICE = "\ue000\ue001", 3  # B超 stands twice in jieba's dictionary
_FIRST_HAN, _LAST_HAN = "\u4e00", "\u9fd5"  # all that jieba's patterns know
_LEFT_TO_JIEBA = re.compile(
    "[+#&._%\\-\r\n\u3400-\u4dbf\u9fd6-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_SHORTEST_TIE = 5
_NO_TEXTS = np.zeros(0, np.int32)
_COMMON = -10.0

SELF_TEST = {
    "我来到北京清华大学": "我 来到 北京 清华 华大 大学 清华大学",
    "对不起不知道你当时是这个情况": "对不起 不 知道 你 当时 是 这个 情况",
    "小明毕业于中国科学院": "小明 毕业 于 中国 科学 学院 科学院 中国科学院",
    "第37届AMV大赛B超": "第 37 届 AMV 大赛 B超",
    "感感感感感": "感感 感感感",
    "炫炫炫炫炫炫炫炫炫炫炫炫炫炫炫炫": "炫炫炫 炫炫炫炫 炫炫炫 炫炫炫 炫炫炫",
    "啊啊啊啊啊kikikiki啊啊啊啊啊kikikiki啊啊啊啊啊kikikiki": (
        "啊啊啊 啊 啊 kikikiki 啊啊啊 啊 啊 kikikiki 啊啊啊 啊 啊 kikikiki"
    ),
    "女粉气抖冷女粉气抖冷女粉气抖冷女粉气抖冷女粉气抖冷女粉气抖冷女粉气抖冷": (
        "女粉 气抖 冷女 粉气 抖 冷 女粉 气抖 冷女 粉气 抖 冷 女粉 气抖 冷女 粉气抖 冷女 粉气 抖 冷"
    ),
    "66.6w的e-mail": "66.6 w 的 e - mail",
}
"""Chats and what jieba 0.42.1 makes of them, among them such that rjieba alone cuts otherwise."""
