"""Soft prompts: learned vectors in place of words, and how they start.

The networks are PEFT's `PromptEmbedding`, `PromptEncoder`, `PrefixEncoder`, and `WhitenedPrefix`.
"""

import re
from typing import Any

import torch
from peft import (
    PrefixEncoder,
    PrefixTuningConfig,
    PromptEmbedding,
    PromptEncoder,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
)
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from launcher.distributed import gathered
from launcher.errors import InputError
from prompting.question import Question
from prompting.scorer import NO_PREFIX, Prefix, compute_prefix
from prompting.settings import SOFT, TemplateSettings, TuningSettings
from prompting.template import SoftSpan, build_prompt, encode_pieces, leading_ids, span_ids
from prompting.whitened_prefix import WhitenedPrefix


def soften(
    template: TemplateSettings, tokenizer: PreTrainedTokenizerBase, length: int | None
) -> TemplateSettings:
    """The template with every soft span's length written out.

    Without soft spans of its own, the words of its [question] segment become soft: `length`
    vectors each run of words, or as many as the words have tokens.

    Raises:
        InputError: there are no words to soften, or a length for spans that have their own.
    """
    softens = not template.soft_spans
    if softens:
        before, slot, after = template.question.partition("{text}")
        runs = (before, after)
        spoken = [bool(words and encode_pieces(tokenizer, [words])[0]) for words in runs]
        if not any(spoken):
            raise InputError(
                f"prompt.template {template.name!r}: its question has no words that could become "
                "soft: give it a span, as in {soft:20}{text}"
            )
        if re.search(r"[{}]", before + after):
            raise InputError(
                f"prompt.template {template.name!r}: its question holds braces, which words that "
                "become soft can't: give it a span, as in {soft:20}{text}"
            )
        # Always with a number: words may begin with one themselves.
        softened = [
            f"{{soft:{length or 1}:{words}}}" if yes else words
            for words, yes in zip(runs, spoken, strict=True)
        ]
        template = _with_segments(template, {"question": slot.join(softened)})
    elif length is not None:
        raise InputError(
            f"tuning.length: {length}, but prompt.template {template.name!r} gives the lengths of "
            "its soft spans itself: leave tuning.length out"
        )
    prompt = build_prompt(template, ["-"])
    written_out = []
    for span in prompt.spans:
        counted = not span.length or (softens and length is None)
        written_out.append(len(span_ids(prompt, span, tokenizer)) if counted else span.length)
        if not written_out[-1]:
            raise InputError(
                f"prompt.template {template.name!r}: the words of its soft span "
                f"{{soft:{span.words}}} have no tokens in this vocabulary: give other words, or "
                "a number of vectors"
            )
    lengths = iter(written_out)

    def written(found: Any) -> str:
        return f"{{soft:{next(lengths)}{':' if found['words'] else ''}{found['words'] or ''}}}"

    return _with_segments(
        template, {name: SOFT.sub(written, text) for name, text in template.segments.items()}
    )


def check_words(template: TemplateSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a soft span that is to start from its words and has none."""
    for found in template.soft_spans:
        if found["words"] and not encode_pieces(tokenizer, [found["words"]])[0]:
            raise InputError(
                f"tuning.init: text, but the words of the soft span {found[0]} have no tokens in "
                "this vocabulary: give other words, or choose labels, vocabulary or random"
            )
        if not found["words"]:
            raise InputError(
                f"tuning.init: text, but the soft span {found[0]} has no words to start from: "
                f"write {{soft:{found['length']}:WORDS}}, or choose labels, vocabulary or random"
            )


def initial_vectors(
    model: PreTrainedModel, asked: Question, settings: TuningSettings, seed: int
) -> Tensor:
    """[vectors, hidden] float32, the embeddings from which the soft spans start.

    A span that stands at the front, where the tokenizer would put BOS or [CLS], starts with it.
    Collective under ZeRO 3: the embedding is gathered for the moment.
    """
    generator = torch.Generator().manual_seed(seed)
    spans = asked.prompt.spans
    embeddings: Any = model.get_input_embeddings()
    table = embeddings.weight
    with gathered([table]):
        # Gemma multiplies its table's rows.
        scale = torch.as_tensor(getattr(embeddings, "embed_scale", 1.0)).to(table.dtype)
        tokens, width = table.shape
        rows = []
        for span in spans:
            begin = leading_ids(asked.tokenizer) if span is _front(asked) else []
            if settings.init == "random":
                spread = (table.detach().cpu() * scale.cpu()).float().std()
                vectors = torch.randn(span.length, width, generator=generator) * spread
                ids = begin[: span.length]
            else:
                vectors = torch.empty(span.length, width)
                ids = begin + _initial_ids(asked, settings, span, tokens, generator)
                repeats = -(-span.length // len(ids))
                ids = (ids * repeats)[: span.length]
            # Only the rows that are wanted: the table is the largest of all weights.
            vectors[: len(ids)] = (table.detach()[ids].cpu() * scale.cpu()).float()
            rows.append(vectors)
    return torch.cat(rows)


def make_network(
    settings: TuningSettings, config: PretrainedConfig, vectors: int, seed: int
) -> nn.Module:
    """The network for `vectors` virtual tokens, PEFT's or `WhitenedPrefix`, float32, with its own
    initialisation by `seed`."""
    if settings.init == "whitened" and not settings.init_from:
        return WhitenedPrefix(config, vectors, seed)
    torch.manual_seed(seed)
    described = peft_config(settings, config, vectors, base="", inference=False)
    if settings.kind == "p_tuning":
        return PromptEncoder(described).float()
    if settings.kind == "prefix":
        return PrefixEncoder(described).float()
    return PromptEmbedding(described, None).float()


def peft_config(
    settings: TuningSettings, config: PretrainedConfig, vectors: int, *, base: str, inference: bool
) -> Any:
    """PEFT's description of the adapter; `inference` leaves the network out, as in saved ones."""
    text: Any = config.get_text_config()
    heads = text.num_attention_heads
    width = text.hidden_size
    if settings.kind == "prefix":
        head_size = getattr(text, "head_dim", None) or width // heads
        heads = getattr(text, "num_key_value_heads", None) or heads
        width = heads * head_size
    common: dict[str, Any] = {
        "task_type": TaskType.CAUSAL_LM,
        "base_model_name_or_path": base,
        "num_virtual_tokens": vectors,
        "token_dim": width,
        "num_layers": text.num_hidden_layers,
        "num_attention_heads": heads,
        "num_transformer_submodules": 1,
        "inference_mode": inference,
    }
    hidden = settings.encoder_hidden_size or width
    if settings.kind == "p_tuning":
        kind = settings.encoder.upper()
        return PromptEncoderConfig(
            **common, encoder_reparameterization_type=kind, encoder_hidden_size=hidden
        )
    if settings.kind == "prefix":
        projects = settings.prefix_projection and not inference
        return PrefixTuningConfig(**common, prefix_projection=projects, encoder_hidden_size=hidden)
    return PromptTuningConfig(**common)


def learned_prefix(flat: Tensor, config: PretrainedConfig) -> Prefix:
    """The keys and values in PEFT's [vectors, layers x (key, value) x width], in float32."""
    text: Any = config.get_text_config()
    layers = text.num_hidden_layers
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    states = flat.view(len(flat), 2 * layers, heads, -1).permute(1, 2, 0, 3)[:, None]
    return Prefix(len(flat), [*states[0::2]], [*states[1::2]])


def flat_prefix(prefix: Prefix) -> Tensor:
    """[vectors, layers x (key, value) x width] float32: the reverse of `learned_prefix`."""
    pairs = zip(prefix.keys, prefix.values, strict=True)
    states = torch.stack([state[0].float() for pair in pairs for state in pair])
    return states.permute(2, 0, 1, 3).flatten(1)


def computed_prefix(model: PreTrainedModel, vectors: Tensor) -> Tensor:
    """[vectors, layers x (key, value) x width] that acts like the input `vectors` at the front."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = range(vocabulary, vocabulary + len(vectors))
    with torch.no_grad():
        return flat_prefix(compute_prefix(model, ids, vectors.to(model.device), NO_PREFIX))


def is_in_front(asked: Question) -> bool:
    """Whether all soft vectors stand in front of everything, the only place that PEFT knows."""
    return len(asked.prompt.spans) == 1 and _front(asked) is not None


def _front(asked: Question) -> SoftSpan | None:
    first = asked.prompt.head[0] if asked.prompt.head else None
    return first if isinstance(first, SoftSpan) else None


def _initial_ids(
    asked: Question,
    settings: TuningSettings,
    span: SoftSpan,
    vocabulary: int,
    generator: torch.Generator,
) -> list[int]:
    if settings.init == "labels":
        return [i for word in asked.trie.words for i in word]
    if settings.init == "vocabulary":
        tokens = min(vocabulary, len(asked.tokenizer))
        return torch.randint(tokens, (span.length,), generator=generator).tolist()
    begin = leading_ids(asked.tokenizer) if span is _front(asked) else []
    return span_ids(asked.prompt, span, asked.tokenizer)[len(begin) :]


def _with_segments(template: TemplateSettings, texts: dict[str, str]) -> TemplateSettings:
    return TemplateSettings.model_validate({**template.model_dump(), **texts})
