"""PanGu's tokenizer: jieba words, then a sentencepiece unigram model.

Lossy by design: the model's NFKC normalisation turns full-width signs into half-width ones and
drops tabs, so decoded text can't be cut by the length of the prompt; cut ids instead.
"""

import functools
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import sentencepiece
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from launcher.errors import InputError

if TYPE_CHECKING:
    import jieba

# Sentencepiece would swallow blanks; PanGu spells them with these two pieces (ids 4 and 3).
_SPACE, _NEWLINE = "▂", "▃"
_SPELLED = str.maketrans({" ": _SPACE, "\n": _NEWLINE})
_SYMBOLS = [_NEWLINE, _SPACE, "<sep>", "<pad>", "<mask>", "<eod>", "<eot>"]  # ids 3 to 9


class PanguTokenizer(SentencePieceBackend):
    """Loads from a folder with `vocab.model`, or from the path of such a file as `vocab_file`.

    Neither bos nor eos is added. "<eot>" and the like in a text are plain characters, as in the
    reference; `split_special_tokens=False` makes them the special ids.
    """

    vocab_files_names = {"vocab_file": "vocab.model"}  # noqa: RUF012 (the base class's spelling)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        vocab_file: str | os.PathLike,
        unk_token: str = "<unk>",
        eos_token: str = "<eot>",
        pad_token: str = "<pad>",
        split_special_tokens: bool = True,
        **kwargs,
    ):
        if not Path(vocab_file).is_file():
            raise InputError(f"{vocab_file}: no such file, expected a sentencepiece vocab.model")
        try:
            super().__init__(
                vocab_file=str(vocab_file),
                unk_token=unk_token,
                eos_token=eos_token,
                pad_token=pad_token,
                split_special_tokens=split_special_tokens,
                **kwargs,
            )
        except RuntimeError as error:
            raise InputError(f"{vocab_file}: not a sentencepiece model ({error})") from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; the same as `self(texts)["input_ids"]`, without its overhead."""
        return self.sp_model.encode([segment(text) for text in texts])

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return self.sp_model.encode(segment(text), out_type=str)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        text = self.sp_model.decode(tokens)
        return text.replace(" ", "").replace(_SPACE, " ").replace(_NEWLINE, "\n")


def segment(text: str) -> str:
    """The string handed to sentencepiece: words parted by one space, blanks spelled out."""
    return " ".join(word.translate(_SPELLED) for word in _segmenter().cut(text, cut_all=False))


def train_vocabulary(
    texts: Iterable[str], path: Path, vocab_size: int, whole: Iterable[str] = ()
) -> None:
    """Write a `vocab.model` learnt from `texts`, of the kind and with the special ids of PanGu's.

    The same texts in the same order give the same file. `vocab_size` is a limit: a small corpus
    yields fewer pieces, so take the size of a model from `len(PanguTokenizer(path))`. The words
    `whole` are pieces of their own wherever a word begins, if jieba knows them as words.

    Raises `InputError` if there is no text, or if `vocab_size` can't hold the special pieces and
    the characters of the texts.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=map(segment, texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=0.9995,
            normalization_rule_name="nmt_nfkc",
            user_defined_symbols=[*_SYMBOLS, *(f"\u2581{word}" for word in whole)],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=1 << 24,  # bytes; longer ones would be left out without a word
            num_threads=1,  # the sums of several threads come in no fixed order
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(
            f"vocabulary: can't train {vocab_size} pieces on these texts ({error}): "
            "give more text or another vocab_size"
        ) from error
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(model.getvalue())
    os.replace(temporary, path)


@functools.cache
def _segmenter() -> "jieba.Tokenizer":
    """A segmenter of our own: words that other code adds to jieba's shared one must not leak in."""
    import logging
    import warnings

    with warnings.catch_warnings():
        # It imports pkg_resources, which warns of its own removal; jieba does without it as well.
        warnings.simplefilter("ignore")
        import jieba

    jieba.setLogLevel(logging.WARNING)
    return jieba.Tokenizer()
