"""Fine-tuning of an encoder, BERT and its kind, with a classification head."""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
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
    prepared = method.prepare(config, dataset)
    _check(config, dataset.labels)
    return prepared


def build(config: Any, labels: Sequence[str]) -> Finetuned:
    """The method, its model loaded and its head drawn."""
    return _build(config, labels, checkpoints.source(config), checkpoints.load)


def footprint(config: Any, dataset: Any, ranks: int) -> Footprint:
    """What a step needs; see `launcher.footprint`."""
    return method.footprint(config, dataset, ranks, prepare, _build)


def _build(config: Any, labels: Sequence[str], path: str, load: checkpoints.Loader) -> Finetuned:
    model_config = _encoder_config(path)
    kind, changed = _kind(config, model_config, labels)
    model, _ = load(path, kind, config, config.run.seed, **changed)
    tokenizer = load_tokenizer(path, model_config)
    trains = config.finetune.trains
    head = None if config.encoder.pooling == "cls" else _head(model, len(labels), config)
    network = EncoderNetwork(model, head, trains)
    return Finetuned(config, labels, tokenizer, network, checkpoints.head_names(model))


def check(config: Any, dataset: Any) -> list[str]:
    """Validate model files, tokenizer and settings; show one example with its ids."""
    config = method.prepare(config, dataset)
    model = _check(config, dataset.labels)
    _, lines = method.read_texts(config, dataset)
    return [*lines, f"pooling: {config.encoder.pooling}, {model.num_parameters():,} parameters"]


def describe(config: Any) -> dict[str, str]:
    """How reports name this run."""
    return method.describe(config)


class EncoderNetwork(Network):
    """[rows, labels] logits: of transformers' own class, or of the mean of all states."""

    def forward(self, ids: Tensor, mask: Tensor | None, lengths: Tensor) -> Tensor:
        """See `Finetuned`."""
        outputs = self.model(input_ids=ids, attention_mask=mask)
        if self.head is None:
            logits: Tensor = outputs.logits
            return logits
        states = outputs.last_hidden_state
        if mask is not None:
            states = states * mask[:, :, None].to(states.dtype)
        return self.head(states.sum(dim=1) / lengths[:, None].to(states.dtype))


def _kind(
    config: Any, model_config: PretrainedConfig, labels: Sequence[str]
) -> tuple[Any, dict[str, Any]]:
    """The class of transformers for the chosen pooling, and what is changed in its config."""
    if config.encoder.pooling == "cls":
        return AutoModelForSequenceClassification, checkpoints.labelled(labels)
    named: Any = AutoModel._model_mapping[type(model_config)]
    # An unused pooler would be trained by weight decay alone.
    has_pooler = "add_pooling_layer" in inspect.signature(named.__init__).parameters
    return AutoModel, {"add_pooling_layer": False} if has_pooler else {}


def _check(config: Any, labels: Sequence[str]) -> PreTrainedModel:
    path = config.model.path
    kind, changed = _kind(config, _encoder_config(path), labels)
    return checkpoints.check(path, kind, **changed)


def _encoder_config(path: str) -> PretrainedConfig:
    config = checkpoints.read_config(path)
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING or config.is_encoder_decoder:
        raise InputError(
            f"model.path {path}: {config.model_type} is not an encoder; expected BERT or its kind: "
            "use method finetune.decoder or finetune.seq2seq"
        )
    return config


def _head(model: PreTrainedModel, labels: int, config: Any) -> nn.Module:
    """Dropout and a linear layer, as above BERT's pooler."""
    settings: Any = model.config
    share: Any = getattr(settings, "classifier_dropout", None)
    if share is None:
        share = getattr(settings, "hidden_dropout_prob", 0.0)
    linear = nn.Linear(settings.hidden_size, labels).to(DTYPES[config.model.precision])
    head = nn.Sequential(nn.Dropout(share), linear)
    std = float(getattr(settings, "initializer_range", 0.02))
    checkpoints.draw(head, {"1.weight", "1.bias"}, config.run.seed, std)
    return head
