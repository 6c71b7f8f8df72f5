"""From a template to token ids: what is common to all texts, and where each text goes."""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice

from transformers import PreTrainedTokenizerBase

from launcher.errors import InputError
from prompting.settings import SOFT, Demonstration, TemplateSettings

_SLOT = "{text}"
# Ends of the question segment while a prompt is put together; a control character no text has.
_BORDER = "\x00"


@dataclass(frozen=True)
class SoftSpan:
    """Learned vectors that stand in a prompt like words."""

    length: int
    """How many vectors."""
    words: str
    """What they may start from; empty: nothing in particular."""

    def __str__(self) -> str:
        return f"[{self.length} soft{': ' if self.words else ''}{self.words}]"


Piece = str | SoftSpan


@dataclass(frozen=True)
class Prompt:
    """A prompt around its text slot.

    Each piece is tokenized by itself, so the ids of a piece never depend on its neighbours: no
    token spans the border between the prompt and a text or a label, nor an end of the question
    segment, whose words can therefore become soft without a change to any other id.
    """

    head: tuple[Piece, ...]
    """Pieces before the text, the same for every text."""
    tail: tuple[Piece, ...]
    """Pieces between the text and the label word."""

    @property
    def spans(self) -> list[SoftSpan]:
        """The soft spans, in order."""
        return [piece for piece in (*self.head, *self.tail) if isinstance(piece, SoftSpan)]

    def text_with(self, text: str) -> str:
        """The prompt as a reader sees it."""
        return "".join(map(str, self.head)) + text + "".join(map(str, self.tail))


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of a prompt around its text slot; ids past the vocabulary are soft vectors."""

    head: list[int]
    tail: list[int]


def build_prompt(
    template: TemplateSettings,
    choices: Sequence[str],
    demonstrations: Sequence[Demonstration] = (),
    verbalizer: Mapping[str, str] | None = None,
) -> Prompt:
    """Fill everything but the text into a template.

    Args:
        choices: label words in the order in which `{choices}` lists them.
        demonstrations: examples to show, in order; dropped silently by no template: one whose
            `order` lacks `demonstrations` refuses them.
        verbalizer: label name to the word shown in demonstrations; a missing name stands for
            itself.
    """
    if demonstrations and "demonstrations" not in template.order:
        raise InputError(
            f"prompt.template {template.name!r}: its order has no place for demonstrations, "
            f"{len(demonstrations)} given: add 'demonstrations' to order"
        )
    said = template.choice_separator.join(choices)
    segments = {
        "question": f"{_BORDER}{template.question}{_BORDER}" if template.question else "",
        "choice": template.choice.replace("{choices}", said),
        "answer": template.answer,
    }
    place = template.order.index("demonstrations") if "demonstrations" in template.order else 0
    named = [segments[name] for name in template.order if name != "demonstrations"]
    once = [segment for segment in named[:place] if segment]
    each = template.separator.join(segment for segment in named[place:] if segment)
    before, _, after = each.partition(_SLOT)
    if _SLOT not in each:
        raise InputError(
            f"prompt.template {template.name!r}: the slot {{text}} stands before the "
            "demonstrations: move the segment that holds it behind them"
        )
    opening = "".join(segment + template.separator for segment in once)
    head = _pieces(opening + before)
    for shown in demonstrations:
        word = (verbalizer or {}).get(shown.label, shown.label)
        head += [shown.text, *_pieces(after), word, *_pieces(template.separator + before)]
    prompt = Prompt(tuple(head), tuple(_pieces(after)))
    if prompt.spans and demonstrations:
        raise InputError(
            f"prompt.template {template.name!r}: demonstrations would repeat its soft spans; use "
            "one or the other"
        )
    return prompt


def encode_prompt(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, vocabulary: int = 0
) -> EncodedPrompt:
    """Token ids of the prompt, begun by BOS or [CLS] where the tokenizer adds one.

    A soft span at the very front takes their place. The n-th soft vector of the prompt (from 0)
    has the id `vocabulary` + n, which no token has.
    """
    softs = count(vocabulary)

    def ids(piece: Piece, first: bool) -> list[int]:
        if isinstance(piece, SoftSpan):
            return list(islice(softs, piece.length))
        return encode_pieces(tokenizer, [piece], first=first)[0]

    opens_soft = bool(prompt.head) and isinstance(prompt.head[0], SoftSpan)
    head = [] if opens_soft else leading_ids(tokenizer)
    for place, piece in enumerate(prompt.head):
        head += ids(piece, place == 0)
    return EncodedPrompt(head, [i for piece in prompt.tail for i in ids(piece, False)])


def span_ids(prompt: Prompt, span: SoftSpan, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a span's words where they stand, with BOS or [CLS] if that is at the front."""
    front = bool(prompt.head) and prompt.head[0] is span
    words = encode_pieces(tokenizer, [span.words], first=front)[0] if span.words else []
    return [*(leading_ids(tokenizer) if front else []), *words]


def encode_pieces(
    tokenizer: PreTrainedTokenizerBase, pieces: Sequence[str], *, first: bool = False
) -> list[list[int]]:
    """Token ids of pieces that stand inside a prompt, or `first` at its beginning.

    Some tokenizers (Llama's sentencepiece) mark the start of a string with a space that must not
    appear inside a prompt. So a piece is encoded behind an anchor that every pre-tokenizer in use
    splits off, and the anchor's own ids are cut away.

    Raises:
        InputError: the tokenizer merges the anchor with the piece.
    """
    fast = getattr(tokenizer, "encode_batch", None)
    if fast is not None:  # PanguTokenizer, where words are separate by construction.
        return fast(pieces)
    if not pieces:
        return []
    anchors = ["" if first else _anchor(piece) for piece in pieces]
    skipped = {
        anchor: tokenizer.encode(anchor, add_special_tokens=False) if anchor else []
        for anchor in set(anchors)
    }
    encoded = tokenizer(
        [anchor + piece for anchor, piece in zip(anchors, pieces, strict=True)],
        add_special_tokens=False,
    )["input_ids"]
    for anchor, piece, ids in zip(anchors, pieces, encoded, strict=True):
        if ids[: len(skipped[anchor])] != skipped[anchor]:
            raise InputError(
                f"model.path: {type(tokenizer).__name__} merges {anchor!r} with {piece[:20]!r} "
                "after it, so pieces of a prompt can't be told apart; use another tokenizer"
            )
    return [ids[len(skipped[anchor]) :] for anchor, ids in zip(anchors, encoded, strict=True)]


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that the model expects before any text: BOS or [CLS] where the tokenizer adds it."""
    ids = tokenizer.encode("")
    return ids[:1] if ids and ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id) else []


def draw_demonstrations(
    texts: Sequence[str], labels: Sequence[str], count: int, seed: int
) -> list[Demonstration]:
    """`count` examples, as even over the labels as can be, in random order."""
    if count > len(texts):
        raise InputError(
            f"prompt.demonstrations.count: {count} wanted, the train split has {len(texts)} "
            "labelled examples: lower it"
        )
    generator = random.Random(seed)
    by_label: dict[str, list[int]] = {}
    for row in generator.sample(range(len(texts)), len(texts)):
        by_label.setdefault(labels[row], []).append(row)
    names = sorted(by_label)
    generator.shuffle(names)
    chosen: list[int] = []
    while len(chosen) < count:
        for name in names:
            if by_label[name] and len(chosen) < count:
                chosen.append(by_label[name].pop())
    generator.shuffle(chosen)
    return [Demonstration(text=texts[row], label=labels[row]) for row in chosen]


def _pieces(text: str) -> list[Piece]:
    """`text` cut at its soft spans and at the ends of the question segment."""
    pieces: list[Piece] = []
    for part in re.split(rf"(\{{soft[^{{}}]*\}}|{_BORDER})", text):
        if found := SOFT.fullmatch(part):
            pieces.append(SoftSpan(int(found["length"] or 0), found["words"] or ""))
        elif part not in ("", _BORDER):
            pieces.append(part)
    return pieces


def _anchor(piece: str) -> str:
    """What `piece` is encoded behind: pre-tokenizers join blanks (Qwen, Llama 3 and GPT-2 make one
    token of two line breaks) and letters, but never a letter and a blank after it."""
    return "a" if piece[:1].isspace() else "\n"
