"""The ways of training a soft prompt that `benchmarks.tuning` times ours against, all by PEFT."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks import trainer
from launcher.cpu_linear import onednn_linear
from prompting.question import Question

Feature = dict[str, list[int]]
"""An example behind its virtual tokens: `input_ids`, and `labels`, -100 but for the answer."""
Collate = Callable[[Sequence[Feature], int], dict[str, Tensor]]
"""From examples and the number of virtual tokens in front to what PEFT's model is called with."""
Train = Callable[[PeftModel, Sequence[Sequence[Feature]], Collate, float, float], None]
"""Take an optimizer step for each list of examples, at a learning rate and a clipping norm."""

POSITIONS = 1024
_IGNORED, _PAD = -100, 6
_PADDED_MICRO_BATCH = 2
"""Sequences of 1024 a pass: their logits over 40,000 tokens take 330 MB."""


@dataclass(frozen=True)
class Peer:
    """How examples are put together, and the loop that learns from them."""

    collate: Collate
    train: Train


def make_peft(model: PreTrainedModel, initial: Tensor) -> PeftModel:
    """PEFT's prompt tuning of `model`, now frozen, starting from `initial` [vectors, hidden]."""
    described = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=len(initial),
        prompt_tuning_init="RANDOM",
    )
    peft = get_peft_model(model, described)
    assert isinstance(peft, PeftModel)
    set_prompt(peft, initial)
    return peft


def prompt_of(peft: PeftModel) -> nn.Parameter:
    """The learned vectors [vectors, hidden]."""
    (prompt,) = (p for p in peft.parameters() if p.requires_grad)
    return prompt


def set_prompt(peft: PeftModel, vectors: Tensor) -> None:
    """Go on from `vectors` [vectors, hidden], without a gradient."""
    with torch.no_grad():
        prompt_of(peft).copy_(vectors)
    prompt_of(peft).grad = None


def features(asked: Question, texts: Sequence[str], labels: Sequence[int]) -> list[Feature]:
    """The ids that ours is given behind its soft vectors, with the label's word."""
    words = [asked.trie.words[asked.owners.index(label)] for label in labels]
    return [
        {"input_ids": [*prompt, *word], "labels": [_IGNORED] * len(prompt) + [*word]}
        for prompt, word in zip(asked.suffixes(texts), words, strict=True)
    ]


def answer_tokens(step: Sequence[Feature]) -> int:
    """How many tokens the mean loss is over."""
    return sum(label != _IGNORED for feature in step for label in feature["labels"])


def pad_to_longest(step: Sequence[Feature], vectors: int) -> dict[str, Tensor]:
    return _padded(step, max(len(feature["input_ids"]) for feature in step))


def pad_to_positions(step: Sequence[Feature], vectors: int) -> dict[str, Tensor]:
    return _padded(step, POSITIONS - vectors)


def keep_answers(step: Sequence[Feature], vectors: int) -> dict[str, Tensor]:
    """As `pad_to_longest`, and the head is computed only where an answer is predicted."""
    ends = torch.tensor([len(feature["input_ids"]) for feature in step])
    longest = max(answer_tokens([feature]) for feature in step)
    # A token is predicted one place before it.
    places = vectors + ends[:, None] - 1 - torch.arange(longest, 0, -1)
    return {**pad_to_longest(step, vectors), "logits_to_keep": places}


def train_by_trainer(
    peft: PeftModel, steps: Sequence[Sequence[Feature]], collate: Collate, lr: float, clip: float
) -> None:
    """transformers' Trainer with nothing beside the training."""
    vectors = len(prompt_of(peft))
    trainer.train(
        peft, steps, lambda step: collate(step, vectors), lr=lr, weight_decay=0.0, clip=clip
    )


def train_by_trainer_onednn(
    peft: PeftModel, steps: Sequence[Sequence[Feature]], collate: Collate, lr: float, clip: float
) -> None:
    """`train_by_trainer` with our linear layers: what is left of the ratio is the method's own."""
    model: Any = peft.get_base_model()
    with onednn_linear(model):
        train_by_trainer(peft, steps, collate, lr, clip)


def train_by_loop(
    peft: PeftModel, steps: Sequence[Sequence[Feature]], collate: Collate, lr: float, clip: float
) -> None:
    """A plain loop that adds up the gradients of small micro batches."""
    prompt = prompt_of(peft)
    optimizer = torch.optim.AdamW([prompt], lr=lr, weight_decay=0.0)
    peft.train()
    for step in steps:
        for start in range(0, len(step), _PADDED_MICRO_BATCH):
            part = step[start : start + _PADDED_MICRO_BATCH]
            loss = peft(**collate(part, len(prompt))).loss
            (loss * (answer_tokens(part) / answer_tokens(step))).backward()
        nn.utils.clip_grad_norm_([prompt], clip)
        optimizer.step()
        optimizer.zero_grad()


PEERS = {
    "Trainer": Peer(pad_to_longest, train_by_trainer),
    "Trainer oneDNN": Peer(pad_to_longest, train_by_trainer_onednn),
    "Trainer kept oneDNN": Peer(keep_answers, train_by_trainer_onednn),
    "padded": Peer(pad_to_positions, train_by_loop),
}


def _padded(step: Sequence[Feature], length: int) -> dict[str, Tensor]:
    """Right-padded to `length`, each [rows, length]."""

    def stacked(name: str, filler: int) -> Tensor:
        rows = [feature[name] for feature in step]
        return torch.tensor([row + [filler] * (length - len(row)) for row in rows])

    seen = [[1] * len(f["input_ids"]) + [0] * (length - len(f["input_ids"])) for f in step]
    return {
        "input_ids": stacked("input_ids", _PAD),
        "labels": stacked("labels", _IGNORED),
        "attention_mask": torch.tensor(seen),
    }
