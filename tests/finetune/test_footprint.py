"""What the planner is told of fine-tunes, against the methods on real weights."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

from data_prep.dataset import Dataset
from launcher.batching import micro_batches, step_order
from launcher.config import Config
from launcher.method import method_module

METHOD = {
    "bert": "encoder",
    "albert": "encoder",
    "gpt2": "decoder",
    "pangu": "decoder",
    "byt5": "seq2seq",
}
SETTINGS = ["train.global_batch=32", "train.micro_batch_tokens=128", "model.attention=eager"]


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("bert", []),
        ("bert", ["encoder.pooling=mean", "finetune.trains=head"]),
        ("bert", ["finetune.class_weights=balanced"]),
        ("albert", []),
        ("gpt2", ["finetune.trains=lora"]),
        ("pangu", []),
        ("byt5", []),
        ("byt5", ["seq2seq.objective=language_modelling", "finetune.trains=lora"]),
    ],
)
def test_weights_and_flops_are_those_of_the_method_itself(
    kind: str, own: list[str], model: Callable[[str], Path], pangu: Path, dataset: Dataset,
    configured: Callable[..., Config], built: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = pangu if kind == "pangu" else model(kind)
    config = configured(METHOD[kind], folder, *SETTINGS, *own)
    needs = method_module(config).footprint(config, dataset, 1)
    assert not list(tmp_path.iterdir()), "nothing is written where runs are kept"

    method = built(METHOD[kind], folder, *SETTINGS, *own)
    weights = [(p.numel(), p.requires_grad) for p in method.module.parameters()]
    assert needs.trained == sum(size for size, wants in weights if wants)
    assert needs.frozen == sum(size for size, wants in weights if not wants)
    assert needs.examples == 32 and needs.trains

    examples = method.training_set(dataset.splits["train"], 0)
    steps = step_order(examples.lengths, 32, config.run.seed)
    parts = [
        part
        for rows in steps
        if len(rows) == 32
        for part, _ in micro_batches(rows, examples.lengths, 128, 1, 0)
    ]
    padded = [len(part) * int(examples.lengths[part].max()) for part in parts]
    batch = examples.batch(parts[int(np.argmax(padded))].tolist())
    method.module.train()
    # torch's counter does not know oneDNN's linear layers.
    monkeypatch.setattr("finetune.method.onednn_linear", lambda _: nullcontext())
    with FlopCounterMode(display=False) as counter:
        method.loss(batch).backward()
    assert needs.heaviest[False].flops == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_recomputed_activations_take_less_memory_and_more_work(
    model: Callable[[str], Path], dataset: Dataset, configured: Callable[..., Config]
) -> None:
    config = configured("encoder", model("bert"), *SETTINGS)
    module = method_module(config)
    kept = module.footprint(config, dataset, 1).heaviest[False]
    config = configured(
        "encoder", model("bert"), *SETTINGS, "parallel.activation_checkpointing=true"
    )
    again = module.footprint(config, dataset, 1).heaviest[False]
    assert again.activations < 0.8 * kept.activations
    assert 1.2 * kept.flops < again.flops < 1.4 * kept.flops
