"""Soft prompts: learned vectors in place of words; how they start, and how they are kept.

The networks are PEFT's (`PromptEmbedding`, `PromptEncoder`, `PrefixEncoder`) and so are the files:
`adapter_model.safetensors` and `adapter_config.json`. Beside them `soft_prompt.json` says for which
base model, prompt and label words the vectors were learned.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from launcher.errors import InputError
from launcher.files import replacing, write_json
from prompting.question import Question
from prompting.scorer import NO_PREFIX, Prefix, compute_prefix
from prompting.settings import SOFT, TemplateSettings, TuningSettings
from prompting.template import SoftSpan, build_prompt, leading_ids, span_ids

WEIGHTS, PEFT_CONFIG, IDENTITY = (
    "adapter_model.safetensors", "adapter_config.json", "soft_prompt.json",
)  # fmt: skip
_PEFT_TYPES = {"prompt": "PROMPT_TUNING", "p_tuning": "P_TUNING", "prefix": "PREFIX_TUNING"}


def soften(
    template: TemplateSettings, tokenizer: PreTrainedTokenizerBase, length: int | None
) -> TemplateSettings:
    """The template with every soft span's length written out.

    Without soft spans of its own, the words of its [question] segment become soft: `length`
    vectors each run of words, or as many as the words have tokens.

    Raises:
        InputError: there are no words to soften, or a length for spans that have their own.
    """
    if not SOFT.search("".join(template.segments.values())):
        before, slot, after = template.question.partition("{text}")
        if not before + after:
            raise InputError(
                f"prompt.template {template.name!r}: its question has no words that could become "
                "soft: give it a span, as in {soft:20}{text}"
            )
        number = f"{length}:" if length else ""
        runs = [f"{{soft:{number}{words}}}" if words else "" for words in (before, after)]
        template = _with_segments(template, {"question": slot.join(runs)})
    elif length is not None:
        raise InputError(
            f"tuning.length: {length}, but prompt.template {template.name!r} gives the lengths of "
            "its soft spans itself: leave tuning.length out"
        )
    prompt = build_prompt(template, ["-"])
    lengths = iter([s.length or len(span_ids(prompt, s, tokenizer)) for s in prompt.spans])

    def written(found: Any) -> str:
        return f"{{soft:{next(lengths)}{':' if found['words'] else ''}{found['words'] or ''}}}"

    return _with_segments(
        template, {name: SOFT.sub(written, text) for name, text in template.segments.items()}
    )


def check_words(template: TemplateSettings) -> None:
    """Refuse a soft span that is to start from its words and has none."""
    for found in SOFT.finditer("".join(template.segments.values())):
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
    table: Any = model.get_input_embeddings().weight
    with gathered([table]):
        weights = table.detach().cpu()
        rows = []
        for span in spans:
            begin = leading_ids(asked.tokenizer) if span is _front(asked) else []
            if settings.init == "random":
                own = torch.randn(span.length, weights.shape[1], generator=generator)
                vectors = own * weights.float().std()
                vectors[: len(begin)] = weights[begin].float()[: span.length]
            else:
                ids = begin + _initial_ids(asked, settings, span, len(weights), generator)
                repeats = -(-span.length // len(ids))
                vectors = weights[(ids * repeats)[: span.length]].float()
            rows.append(vectors)
    return torch.cat(rows)


def make_network(
    settings: TuningSettings, config: PretrainedConfig, vectors: int, seed: int
) -> nn.Module:
    """PEFT's network for `vectors` virtual tokens, float32, its own initialisation by `seed`."""
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


def save(folder: Path, tensors: dict[str, Tensor], peft: Any, identity: dict[str, Any]) -> None:
    """Write an adapter, then open it again and compare.

    Args:
        tensors: float32 on the CPU, named as PEFT names them.
        peft: PEFT's config; None: the vectors do not all stand in front, so PEFT must not load it.
        identity: what they were learned for; `load` compares it.

    Raises:
        InputError: what was read is not what was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PEFT_CONFIG).unlink(missing_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing(folder / WEIGHTS) as temporary:
        save_file(tensors, str(temporary), metadata={"format": "pt"})
    if peft is not None:
        values = {k: sorted(v) if isinstance(v, set) else v for k, v in peft.to_dict().items()}
        write_json(folder / PEFT_CONFIG, values)
    write_json(folder / IDENTITY, {**identity, "tensors": _summary(tensors)})
    for name, tensor in load(folder, identity).items():
        if not torch.equal(tensor, tensors[name]):
            raise InputError(f"{folder / WEIGHTS}: {name} reads back otherwise: check the disk")


def load(folder: Path, identity: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of an adapter, float32 on the CPU.

    Raises:
        InputError: it is missing or corrupt, or was learned for another base, prompt or label set.
    """
    try:
        tensors = load_file(str(folder / WEIGHTS))
        stored = _read_json(folder / IDENTITY)
        peft = _read_json(folder / PEFT_CONFIG)
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{folder}: no readable adapter: {' '.join(str(error).split())}") from None
    if stored is not None:
        problems = [
            f"{folder}: learned for {what} {stored[key]!r}, asked to run with {identity[key]!r}"
            for key, what in _IDENTITY.items()
            if stored.get(key) != identity[key]
        ]
        if stored["base"]["sha256"] != identity["base"]["sha256"]:
            problems.append(
                f"{folder}: learned for the base model {stored['base']['path']} with the hash "
                f"{stored['base']['sha256'][:12]}; model.path {identity['base']['path']} has "
                f"{identity['base']['sha256'][:12]}: use the base it was learned for"
            )
        if stored["tensors"] != _summary(tensors):
            problems.append(
                f"{folder / WEIGHTS}: shape, norm or hash differ from {IDENTITY}: the file was "
                "changed or damaged; copy or train it again"
            )
    elif peft is None:
        problems = [f"{folder}: expected {IDENTITY} or PEFT's {PEFT_CONFIG}, seen neither"]
    else:
        problems = _foreign_problems(folder, peft, tensors, identity)
    if problems:
        raise InputError("\n".join(problems))
    return {name: tensor.float() for name, tensor in tensors.items()}


@contextmanager
def gathered(parameters: Sequence[Any]) -> Iterator[None]:
    """Parameters whole while the context lasts, where ZeRO 3 has sharded them; collective."""
    import deepspeed

    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        yield


_IDENTITY = {"kind": "the kind", "prompt": "the prompt", "labels": "the label words"}


def identity(kind: str, base: dict[str, str], asked: Question) -> dict[str, Any]:
    """What learned vectors belong to."""
    words = zip(asked.owners, asked.words, strict=True)
    return {
        # What comes out of a network is kept without it, as plain vectors.
        "kind": "prompt" if kind == "p_tuning" else kind,
        "base": base,
        "prompt": asked.prompt.text_with("{text}"),
        "labels": [[asked.labels[owner], word] for owner, word in words],
    }


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


def _summary(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {
        name: {
            "shape": list(tensor.shape),
            "norm": float(tensor.double().norm()),
            "sha256": hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest(),
        }
        for name, tensor in sorted(tensors.items())
    }


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _foreign_problems(
    folder: Path, peft: dict[str, Any], tensors: dict[str, Tensor], identity: dict[str, Any]
) -> list[str]:
    """What speaks against an adapter that PEFT wrote, which knows less about itself."""
    problems = []
    kind = identity["kind"]
    kinds = {_PEFT_TYPES.get(kind), "P_TUNING" if kind == "prompt" else None, kind.upper()}
    if peft.get("peft_type") not in kinds:
        problems.append(f"{folder}: seen {peft.get('peft_type')}, expected tuning.kind {kind}")
    base, named = str(identity["base"]["path"]), str(peft.get("base_model_name_or_path"))
    if Path(base).name != Path(named).name:
        problems.append(
            f"{folder}: learned for the base model {named}, asked to run with model.path {base}"
        )
    return problems
