"""Label words as a token trie, so that one pass scores every label exactly."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from launcher.errors import InputError


@dataclass(frozen=True)
class LabelTrie:
    """The token sequences of all label words, merged where they begin alike.

    Only nodes with a successor are fed to the model: the probability of a word's last token is
    read at the node before it. Source 0 is the end of the prompt, source i + 1 is fed node i.
    """

    words: tuple[tuple[int, ...], ...]
    """Token ids of each label word."""
    owners: tuple[int, ...]
    """Label index of each word."""

    @cached_property
    def fed(self) -> list[tuple[int, ...]]:
        """Fed nodes as token paths, parents before children."""
        paths = {word[:end] for word in self.words for end in range(1, len(word))}
        return sorted(paths, key=lambda path: (len(path), path))

    @cached_property
    def tokens(self) -> list[int]:
        """Token id of each fed node."""
        return [path[-1] for path in self.fed]

    @cached_property
    def depths(self) -> list[int]:
        """Distance of each fed node from the end of the prompt, 1 or more."""
        return [len(path) for path in self.fed]

    @cached_property
    def ancestors(self) -> torch.Tensor:
        """[fed, fed] bool: whether the row's node sees the column's node (itself included)."""
        sees = [[path[: len(other)] == other for other in self.fed] for path in self.fed]
        return torch.tensor(sees, dtype=torch.bool).reshape(len(self.fed), len(self.fed))

    @cached_property
    def edges(self) -> list[tuple[int, int]]:
        """(source, token id) of every distinct step on the way to a word's last token."""
        return sorted({edge for word in self.words for edge in self._edges_of(word)})

    @cached_property
    def steps(self) -> torch.Tensor:
        """[words, edges] float32: 1 where the word takes the edge."""
        place = {edge: i for i, edge in enumerate(self.edges)}
        taken = torch.zeros(len(self.words), len(self.edges))
        for row, word in enumerate(self.words):
            taken[row, [place[edge] for edge in self._edges_of(word)]] = 1.0
        return taken

    @cached_property
    def lengths(self) -> torch.Tensor:
        """[words] float32: tokens of each word."""
        return torch.tensor([float(len(word)) for word in self.words])

    def per_label(self, word_scores: torch.Tensor) -> torch.Tensor:
        """[examples, words] log-probabilities to [examples, labels]: words of a label add up."""
        labels = max(self.owners) + 1
        if len(self.owners) == labels:
            return word_scores
        columns = []
        for label in range(labels):
            own = [i for i, owner in enumerate(self.owners) if owner == label]
            columns.append(torch.logsumexp(word_scores[:, own], dim=1))
        return torch.stack(columns, dim=1)

    @cached_property
    def _sources(self) -> dict[tuple[int, ...], int]:
        return {(): 0} | {path: i + 1 for i, path in enumerate(self.fed)}

    def _edges_of(self, word: tuple[int, ...]) -> list[tuple[int, int]]:
        return [(self._sources[word[:i]], token) for i, token in enumerate(word)]


def label_words(
    labels: Sequence[str], verbalizer: Mapping[str, str | Sequence[str]]
) -> list[tuple[str, ...]]:
    """The words that stand for each label, in label order; by default its own name."""
    for name in verbalizer:
        if name not in labels:
            raise InputError(
                f"prompt.verbalizer: {name!r} is no label; the labels are {', '.join(labels)}"
            )
    chosen = [verbalizer.get(label, label) for label in labels]
    words = [(word,) if isinstance(word, str) else tuple(word) for word in chosen]
    for label, own in zip(labels, words, strict=True):
        if not own or not all(word.strip() for word in own):
            raise InputError(f"prompt.verbalizer: label {label!r} has an empty word")
    return words


def build_trie(
    words: Sequence[tuple[str, ...]], ids: Sequence[Sequence[Sequence[int]]], unknown_id: int | None
) -> LabelTrie:
    """The trie of all label words.

    Args:
        words: the words of each label.
        ids: token ids of each word, nested alike.
        unknown_id: the tokenizer's id for what it can't spell, if it has one.

    Raises:
        InputError: a word has no tokens or only unknown ones, or two labels have the same ids.
    """
    flat, owners = [], []
    taken: dict[tuple[int, ...], str] = {}
    problems = []
    for label, (own_words, own_ids) in enumerate(zip(words, ids, strict=True)):
        for word, sequence in zip(own_words, own_ids, strict=True):
            key = tuple(sequence)
            if not key or unknown_id in key:
                problems.append(
                    f"prompt.verbalizer: the label word {word!r} has "
                    f"{'no ids' if not key else f'the unknown id {unknown_id} in its ids'} "
                    f"{list(key)} in this vocabulary: choose another word"
                )
            elif key in taken:
                problems.append(
                    f"prompt.verbalizer: the label words {taken[key]!r} and {word!r} have the same "
                    f"ids {list(key)}: choose words that the vocabulary tells apart"
                )
            taken[key] = word
            flat.append(key)
            owners.append(label)
    if problems:
        raise InputError("\n".join(problems))
    return LabelTrie(tuple(flat), tuple(owners))


def prefix_pairs(trie: LabelTrie) -> list[tuple[int, int]]:
    """Pairs of words (shorter, longer) where one's ids begin the other's.

    The shorter one's log-probability can then never be the smaller of the two.
    """
    return [
        (a, b)
        for a, short in enumerate(trie.words)
        for b, long in enumerate(trie.words)
        if a != b and long[: len(short)] == short
    ]
