"""Adapters on disk, in PEFT's format, and what they belong to.

`adapter_model.safetensors` and `adapter_config.json` are PEFT's; `soft_prompt.json` beside them
says for which base model, prompt and label words the vectors were learned.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from launcher.config import LoraSettings
from launcher.errors import InputError
from launcher.files import replacing, write_json
from prompting.question import Question

WEIGHTS, PEFT_CONFIG, IDENTITY = (
    "adapter_model.safetensors", "adapter_config.json", "soft_prompt.json",
)  # fmt: skip
_PEFT_TYPES = {"prompt": "PROMPT_TUNING", "p_tuning": "P_TUNING", "prefix": "PREFIX_TUNING"}
_IDENTITY = {"kind": "the kind", "prompt": "the prompt", "labels": "the label words"}


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
    if (folder / IDENTITY).exists():
        try:
            problems = _own_problems(folder, stored, tensors, identity)
        except (AttributeError, KeyError, TypeError):
            problems = [f"{folder / IDENTITY}: damaged, not what belongs there: copy it again"]
    elif peft is None:
        problems = [f"{folder}: expected {IDENTITY} or PEFT's {PEFT_CONFIG}, seen neither"]
    else:
        problems = _foreign_problems(folder, peft, tensors, identity)
    if problems:
        raise InputError("\n".join(problems))
    return {name: tensor.float() for name, tensor in tensors.items()}


def check_shapes(
    folder: Path, tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]]
) -> None:
    """Refuse tensors of other names or shapes than `expected`."""
    seen = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if seen != expected:
        name = next(n for n in sorted(seen | expected) if seen.get(n) != expected.get(n))
        raise InputError(
            f"{folder}: {name} has the shape {seen.get(name)}, expected {expected.get(name)}: an "
            "adapter for another base model, or for a prompt of another length"
        )


def check_scale(folder: Path, lora: LoraSettings) -> None:
    """Refuse LoRA updates that are multiplied by something else than `lora` says."""
    stored = _read_json(folder / PEFT_CONFIG) or {}
    expected: dict[str, Any] = {"lora_alpha": lora.alpha, "use_rslora": False, "use_dora": False}
    expected |= {"alpha_pattern": {}, "rank_pattern": {}}
    for name, value in expected.items():
        if stored.get(name, value) != value or (name == "lora_alpha" and name not in stored):
            wanted = f"tuning.lora.alpha {value:g}" if name == "lora_alpha" else value
            raise InputError(
                f"{folder / PEFT_CONFIG}: seen {name} {stored.get(name)}, expected {wanted}: the "
                "updates would have another scale"
            )


def identity(kind: str, base: dict[str, str], asked: Question) -> dict[str, Any]:
    """What learned vectors belong to."""
    words = zip(asked.owners, asked.words, strict=True)
    suffix = asked.settings.label_suffix
    return {
        # What comes out of a network is kept without it, as plain vectors.
        "kind": "prompt" if kind == "p_tuning" else kind,
        "base": base,
        "prompt": asked.prompt.text_with("{text}"),
        "labels": [[asked.labels[owner], word + suffix] for owner, word in words],
    }


def _own_problems(
    folder: Path, stored: Any, tensors: dict[str, Tensor], identity: dict[str, Any]
) -> list[str]:
    """What speaks against an adapter that `save` wrote."""
    problems = [
        f"{folder}: learned for {what} {stored[key]!r}, asked to run with {identity[key]!r}"
        for key, what in _IDENTITY.items()
        if stored[key] != identity[key]
    ]
    base, asked = stored["base"], identity["base"]
    if base["sha256"] != asked["sha256"]:
        problems.append(
            f"{folder}: learned for the base model {base['path']} with the hash "
            f"{base['sha256'][:12]}; model.path {asked['path']} has {asked['sha256'][:12]}: use "
            "the base it was learned for"
        )
    hashes = [
        {name: (tensor["shape"], tensor["sha256"]) for name, tensor in summary.items()}
        for summary in (stored["tensors"], _summary(tensors))
    ]
    if hashes[0] != hashes[1]:
        problems.append(
            f"{folder / WEIGHTS}: shape or hash differ from {IDENTITY}: the file was changed or "
            "damaged; copy or train it again"
        )
    return problems


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
