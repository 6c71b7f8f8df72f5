"""Pretrained folders of transformers: read with readable errors, written whole or not at all."""

import hashlib
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, logging
from transformers.integrations import deepspeed

from launcher.cpu_linear import onednn_linear
from launcher.distributed import full_shape
from launcher.errors import InputError


def quiet() -> None:
    """Let transformers speak of errors only: loading and saving are told by the launcher."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def required_path(path: str | None) -> str:
    """`model.path`, which most methods can't do without."""
    if path is None:
        raise InputError("model.path: required by this method, not given")
    return path


def fingerprint(path: str, config: PretrainedConfig) -> dict[str, str]:
    """`path` and the SHA-256 of a model's weights; of a hub model, its commit."""
    folder = Path(path)
    if not folder.is_dir():
        return {"path": path, "sha256": str(getattr(config, "_commit_hash", None))}
    total = hashlib.sha256()
    kinds = (".safetensors", ".bin")
    for file in sorted(file for file in folder.iterdir() if file.suffix in kinds):
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return {"path": path, "sha256": total.hexdigest()}


@contextmanager
def unsharded() -> Iterator[None]:
    """Load whole models although ZeRO 3 is on, which refuses the device `meta`."""
    sharding = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = sharding


class readable_errors:
    """Turn what transformers raises for a bad folder into one line, and keep it quiet meanwhile."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        if Path(self.path).is_absolute() and not Path(self.path).is_dir():
            raise InputError(f"model.path {self.path}: no such folder")
        quiet()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (SafetensorError, EOFError, pickle.UnpicklingError)):
            reason = " ".join(str(error).split()).partition(". ")[0]
            raise InputError(
                f"model.path {self.path}: a weight file is truncated, corrupt or holds more than "
                f"tensors ({reason or 'it is empty'}): copy or convert it again"
            ) from error
        # Whatever the files hold, and transformers raises nearly everything for it.
        if isinstance(error, Exception) and not isinstance(error, InputError):
            text = " ".join(str(error).split())[:500]
            if not isinstance(error, (OSError, ValueError, ImportError)):
                text = f"not readable: {type(error).__name__}: {text}"
            raise InputError(f"model.path {self.path}: {text}") from error


def recompute_layers(model: PreTrainedModel) -> None:
    """Compute the layers' activations again in the backward pass.

    The second computation happens outside `loss`, so it is told to use the same kernels; shapes are
    not compared, because ZeRO 3 empties weights between the two.
    """
    model.gradient_checkpointing_enable(
        {
            "use_reentrant": False,
            "determinism_check": "none",
            "context_fn": lambda: (nullcontext(), onednn_linear(model)),
        }
    )


def skeleton(path: str, kind: Any, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model on the device `meta`, where no weight is read, and what transformers found amiss.

    Args:
        kind: the class of transformers to load it with.
        options: for its `from_pretrained`.

    Raises:
        InputError: a missing, truncated or corrupt file.
    """
    with readable_errors(path), unsharded():
        loaded: Any = kind.from_pretrained(
            path,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    model, info = loaded
    return model, info


def refuse(path: str, problems: Sequence[str]) -> None:
    """Raise an InputError that lists the first of these problems, if there are any."""
    if problems:
        more = f"\nmodel.path {path}: and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError("\n".join(f"model.path {path}: {p}" for p in problems[:5]) + more)


def assign(module: nn.Module, values: Mapping[str, Tensor], where: object) -> None:
    """Copy `values` into the parameters of these names, sharded ones too; collective under ZeRO 3.

    Raises:
        InputError: a name is no parameter's, or a shape differs.
    """
    parameters = dict(module.named_parameters())
    for name, value in values.items():
        expected = full_shape(parameters[name]) if name in parameters else None
        if expected != tuple(value.shape):
            raise InputError(
                f"{where}: {name} is of shape {tuple(value.shape)}, expected "
                f"{expected or 'no such weight'}: it belongs to another run or was changed"
            )
    for name, value in values.items():
        with writable(parameters[name]):
            parameters[name].data.copy_(value)


@contextmanager
def writable(parameter: Any) -> Iterator[None]:
    """The parameter whole; what rank 0 writes into it is kept."""
    import deepspeed

    sharded = [parameter] if hasattr(parameter, "ds_id") else []
    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0, enabled=bool(sharded)):
        yield
