"""Fine-tuning of a causal language model, GPT-2, PanGu and their kind, with a head on the state of
each text's last token, which has seen all others."""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModel,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from finetune import checkpoints, method
from finetune.method import Finetuned, Network
from finetune.tokenization import load_tokenizer
from launcher.engine import DTYPES
from launcher.errors import InputError
from launcher.footprint import Footprint

TRAINS, CLASSIFIES = True, True


def trains_model(config: Any) -> bool:
    """Its weights, its head or LoRA's updates in it are."""
    return True


def prepare(config: Any, dataset: Any) -> Any:
    """Fix what depends on the data; see `method.prepare`."""
    _register_pangu()
    prepared = method.prepare(config, dataset)
    _check(config, dataset.labels)
    return prepared


def build(config: Any, labels: Sequence[str]) -> Finetuned:
    """The method, its model loaded and its head drawn."""
    _register_pangu()
    return _build(config, labels, checkpoints.source(config), checkpoints.load)


def footprint(config: Any, dataset: Any, ranks: int) -> Footprint:
    """What a step needs; see `launcher.footprint`."""
    return method.footprint(config, dataset, ranks, prepare, _build)


def _build(config: Any, labels: Sequence[str], path: str, load: checkpoints.Loader) -> Finetuned:
    model_config = _decoder_config(path)
    kind, changed = _kind(model_config, labels)
    model, _ = load(path, kind, config, config.run.seed, **changed)
    tokenizer = load_tokenizer(path, model_config)
    # By this transformers finds the last token where it reads what is exported.
    model.config.pad_token_id = tokenizer.pad_token_id
    head = None if kind is not AutoModel else _head(model, len(labels), config)
    network = DecoderNetwork(model, head, config.finetune.trains)
    return Finetuned(config, labels, tokenizer, network, checkpoints.head_names(model))


def check(config: Any, dataset: Any) -> list[str]:
    """Validate model files, tokenizer and settings; show one example with its ids."""
    _register_pangu()
    config = method.prepare(config, dataset)
    model = _check(config, dataset.labels)
    _, lines = method.read_texts(config, dataset)
    return [*lines, f"head on the last token, {model.num_parameters():,} parameters"]


def describe(config: Any) -> dict[str, str]:
    """How reports name this run."""
    return method.describe(config)


class DecoderNetwork(Network):
    """[rows, labels] logits of the last tokens' states.

    Padding stands on the right, where a causal model does not see it: no mask is needed.
    """

    def forward(self, ids: Tensor, mask: Tensor | None, lengths: Tensor) -> Tensor:
        """See `Finetuned`."""
        last = lengths[:, None] - 1
        base = self.model.base_model
        if "logits_to_keep" in inspect.signature(base.forward).parameters:
            # PanGu's query layer is computed where it is asked for.
            states = base(input_ids=ids, use_cache=False, logits_to_keep=last).last_hidden_state
        else:
            states = base(input_ids=ids, use_cache=False).last_hidden_state
            states = states.take_along_dim(last[:, :, None], dim=1)
        head = self.model.score if self.head is None else self.head
        return head(states[:, 0])


def _kind(config: PretrainedConfig, labels: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """transformers' class for sequence classification, where there is one, or the bare model."""
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return AutoModelForSequenceClassification, checkpoints.labelled(labels)
    return AutoModel, {}


def _check(config: Any, labels: Sequence[str]) -> PreTrainedModel:
    path = config.model.path
    kind, changed = _kind(_decoder_config(path), labels)
    model = checkpoints.check(path, kind, **changed)
    if kind is not AutoModel and not hasattr(model, "score"):
        raise InputError(
            f"model.path {path}: {type(model).__name__} has no head on the last token: use another "
            "model"
        )
    return model


def _decoder_config(path: str) -> PretrainedConfig:
    config = checkpoints.read_config(path)
    encoder = "BertConfig" in [kind.__name__ for kind in type(config).__mro__]
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder or encoder:
        raise InputError(
            f"model.path {path}: {config.model_type} is not a causal language model; expected "
            "GPT-2, PanGu or their kind: use method finetune.encoder or finetune.seq2seq"
        )
    return config


def _head(model: PreTrainedModel, labels: int, config: Any) -> nn.Module:
    """A linear layer without bias, as transformers' classes have it."""
    settings: Any = model.config
    width = settings.get_text_config().hidden_size
    head = nn.Linear(width, labels, bias=False).to(DTYPES[config.model.precision])
    std = float(getattr(settings, "initializer_range", 0.02))
    checkpoints.draw(head, {"weight"}, config.run.seed, std)
    return head


def _register_pangu() -> None:
    """Make the Auto classes know PanGu."""
    import prompting.pangu  # noqa: F401
