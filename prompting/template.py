"""From a template to token ids: what is common to all texts, and where each text goes."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from launcher.errors import InputError
from prompting.settings import Demonstration, TemplateSettings

_SLOT = "{text}"


@dataclass(frozen=True)
class Prompt:
    """A prompt around its text slot.

    Each piece is tokenized by itself, so the ids of a piece never depend on its neighbours: no
    token spans the border between the prompt and a text or a label.
    """

    head: tuple[str, ...]
    """Pieces before the text, the same for every text."""
    tail: tuple[str, ...]
    """Pieces between the text and the label word."""

    def text_with(self, text: str) -> str:
        """The prompt as a reader sees it."""
        return "".join(self.head) + text + "".join(self.tail)


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of a prompt around its text slot."""

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
        "question": template.question,
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
    head = [opening + before]
    for shown in demonstrations:
        word = (verbalizer or {}).get(shown.label, shown.label)
        head += [shown.text, after, word, template.separator + before]
    return Prompt(tuple(piece for piece in head if piece), (after,) if after else ())


def encode_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> EncodedPrompt:
    """Token ids of the prompt, begun by BOS or [CLS] where the tokenizer adds one."""
    head = leading_ids(tokenizer)
    for place, piece in enumerate(prompt.head):
        head += encode_pieces(tokenizer, [piece], first=place == 0)[0]
    tail = [i for piece in prompt.tail for i in encode_pieces(tokenizer, [piece])[0]]
    return EncodedPrompt(head, tail)


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


def _anchor(piece: str) -> str:
    """What `piece` is encoded behind: pre-tokenizers join blanks (Qwen, Llama 3 and GPT-2 make one
    token of two line breaks) and letters, but never a letter and a blank after it."""
    return "a" if piece[:1].isspace() else "\n"
