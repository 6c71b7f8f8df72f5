"""What a text is made of: its character n-grams, its words and what a dictionary says of them."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from launcher.errors import InputError
from launcher.files import write_json

_EDGES = (1, 2, 3)
_KEPT_CUTS = 1 << 18
_TEXTS_AT_A_TIME = 4096


@dataclass(frozen=True)
class TextBatch:
    """Texts that are scored together."""

    rows: list[int]
    """Where each stood in what was batched."""
    texts: list[str]


def text_batches(texts: Sequence[str]) -> list[TextBatch]:
    """Batches in the order of the texts."""
    starts = range(0, len(texts), _TEXTS_AT_A_TIME)
    parts = [range(start, min(start + _TEXTS_AT_A_TIME, len(texts))) for start in starts]
    return [TextBatch([*part], [texts[row] for row in part]) for part in parts]


class Features:
    """Lists of names for texts, such as `characters:弹幕`, each as often as it comes.

    Case is ignored but in words. Jieba is asked with its own dictionary, in its accurate mode, and
    loaded only for the kinds that need it.
    """

    def __init__(self, kinds: Sequence[str], ngrams: tuple[int, int]) -> None:
        """For `kinds` and `ngrams` see `baselines.settings`."""
        parts: dict[str, Callable[[str], Iterator[str]]] = {
            "characters": lambda text: _ngrams(text.lower(), *ngrams),
            "edges": _edges,
            "shape": _shape,
        }
        own: dict[str, Callable[[Dictionary, str, list[Any]], Iterator[str]]] = {
            "tokens": lambda _, text, cut: (word for word, _ in cut),
            "words": lambda known, text, cut: known.words(cut),
            "tags": lambda _, text, cut: _tags(cut),
            "frequency": lambda known, text, cut: known.frequencies(text, cut),
        }
        self._plain = [(kind, parts[kind]) for kind in kinds if kind in parts]
        self._cut = [(kind, own[kind]) for kind in kinds if kind in own]

    def of(self, text: str) -> list[str]:
        """The features of one text."""
        found = [f"{kind}:{part}" for kind, parts in self._plain for part in parts(text)]
        if self._cut:
            known = dictionary()
            cut = known.cut(text)
            found += [f"{k}:{part}" for k, parts in self._cut for part in parts(known, text, cut)]
        return found


def vocabulary(features: Features, texts: Sequence[str], min_count: int) -> list[str]:
    """The features of at least `min_count` of the texts, the most frequent first.

    Raises:
        InputError: there are none.
    """
    counts = Counter(feature for text in texts for feature in dict.fromkeys(features.of(text)))
    kept = [feature for feature, count in counts.items() if count >= min_count]
    if not kept:
        raise InputError(f"min_count: no feature is in {min_count} texts: lower it")
    return sorted(kept, key=lambda feature: (-counts[feature], feature))


def encode(
    features: Features, texts: Sequence[str], places: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Known features of each text, each as often as it comes.

    Returns:
        [texts + 1] int64, where each text's features begin; [features of all texts] int64 places.
    """
    found: list[int] = []
    starts = [0]
    for text in texts:
        found += [places[feature] for feature in features.of(text) if feature in places]
        starts.append(len(found))
    return np.array(starts, dtype=np.int64), np.array(found, dtype=np.int64)


def write_vocabulary(path: Path, names: Sequence[str]) -> None:
    """Write a vocabulary, as JSON: a list of features by place."""
    write_json(path, list(names))


def read_vocabulary(path: Path) -> dict[str, int]:
    """Place of each feature.

    Raises:
        InputError: the file is missing or holds no vocabulary.
    """
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: no readable vocabulary ({reason}): run it again") from None
    return {name: place for place, name in enumerate(names)}


@cache
def dictionary() -> "Dictionary":
    """Jieba with its own dictionary, loaded once."""
    return Dictionary()


class Dictionary:
    """Jieba's words, their parts of speech and how frequent they are."""

    def __init__(self) -> None:
        import jieba
        import jieba.posseg

        jieba.setLogLevel("WARNING")
        # Not the module's own, which other code may have told words.
        self._tokenizer = jieba.Tokenizer()
        self._tokenizer.initialize()
        self._tagger = jieba.posseg.POSTokenizer(self._tokenizer)
        # Most of the time goes here, and texts are looked at twice: for a vocabulary, then by it.
        self.cut = lru_cache(_KEPT_CUTS)(self._cut)
        """Words of a text and their parts of speech."""

    def words(self, cut: list[tuple[str, str]]) -> Iterator[str]:
        """The words and, as in jieba's search mode, shorter ones inside them."""
        for word, _ in cut:
            yield word
            for size in (2, 3):
                if len(word) > size:
                    yield from (part for part in _ngrams(word, size, size) if self.frequency(part))

    def frequency(self, word: str) -> int:
        """How often jieba's corpus has it; 0 if never."""
        return int(self._tokenizer.FREQ.get(word) or 0)

    def frequencies(self, text: str, cut: list[tuple[str, str]]) -> Iterator[str]:
        """In powers of two, of the text itself and of its rarest word; and its number of words."""
        yield f"whole {self.frequency(text).bit_length()}"
        rarest = min((self.frequency(word) for word, _ in cut), default=0)
        yield f"rarest {rarest.bit_length()}"
        yield f"words {len(cut)}"

    def _cut(self, text: str) -> list[tuple[str, str]]:
        return [(pair.word, pair.flag) for pair in self._tagger.cut(text)]


def _ngrams(text: str, shortest: int, longest: int) -> Iterator[str]:
    for size in range(shortest, longest + 1):
        for start in range(len(text) - size + 1):
            yield text[start : start + size]


def _edges(text: str) -> Iterator[str]:
    text = text.lower()
    for size in _EDGES:
        yield f"^{text[:size]}"
        yield f"{text[-size:]}$"


def _shape(text: str) -> Iterator[str]:
    """Its length, and the class of each character."""
    yield str(len(text))
    classes = re.sub("[\u3400-\u4dbf\u4e00-\u9fff]", "汉", text)
    yield re.sub("[a-z]", "a", re.sub("[0-9]", "0", classes.lower()))


def _tags(cut: list[tuple[str, str]]) -> Iterator[str]:
    """Each part of speech, and all of them with the lengths of their words."""
    yield from (tag for _, tag in cut)
    yield " ".join(f"{tag}{len(word)}" for word, tag in cut)
