"""Fine-tuning of a BERT against its peers: equal losses and updates first, then how much faster.

Every method gets the same BERT of 12 layers x 768 with the same random weights, the same words
tokenized beforehand, one thread, 120 words a step (the study's batch) and AdamW at a constant rate,
and trains every weight. Nothing is dropped out, so that results can be compared.

- ours: `finetune.encoder` with the launcher's order, micro batches and optimizer (DeepSpeed);
- fixed 128: transformers' Trainer, every word padded to 128 tokens, the study's way;
- dynamic: Trainer, padded to the longest word of a random batch;
- grouped: Trainer, batches grouped by length;
- grouped oneDNN: the same on the kernels that ours uses (`launcher.cpu_linear`): what is left of
  the ratio is not the kernels' doing.

Trainer's sampler groups all words and ours orders all of them; of each order's batches, some are
timed that are spread evenly over the lengths. Trainer takes them in sequence: a short run of its
own would begin with the longest.

    OMP_NUM_THREADS=1 python -m benchmarks.finetune             # 5 minutes, 6 GB
    python -m benchmarks.finetune --quick                       # equality only, tiny model
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification

from benchmarks import trainer
from benchmarks.common import Claim, Timings, conclude, machine, timed
from benchmarks.finetune_peers import PEERS, Feature
from data_prep.dataset import SCHEMA, read_dataset
from data_prep.sample import make_sample
from finetune import encoder, tokenization
from launcher import distributed
from launcher.batching import micro_batches, step_order
from launcher.config import Config, parse_config
from launcher.optimizer import ShardedOptimizer

LABELS = ["动画", "游戏", "科技", "生活", "美食", "综合"]
EXAMPLES, QUICK_EXAMPLES = 24_000, 600
BATCH, ROUNDS, LR, WEIGHT_DECAY, CLIP = 120, 3, 5e-5, 0.01, 1.0
STEPS = {"ours": 3, "dynamic": 2, "grouped": 3, "grouped oneDNN": 3, "fixed 128": 1}
"""How many are timed a round."""
FIXED_EXAMPLES = 24
"""Of a step of 120: the others would take as long, and the optimizer's share is 1 % already."""
CHECKED_ROWS, CHECKED_STEPS, ROWS_A_CHECKED_STEP = 6, 2, 3
LOSS_TOLERANCE, GRADIENT_TOLERANCE, UPDATE_TOLERANCE = 1e-5, 1e-4, 5e-3

EPOCHS, SENTENCES, STUDY_DAYS = 10, 935_917, 37
CARD_FLOPS = 40.3e12
"""An RTX 2080's tensor cores, fp16 summed in fp32: 368 cores x 64 multiply-adds x 2 x 1.71 GHz,
halved because GeForce cards sum in fp32 at half the rate."""
UTILISATION = 0.35


@dataclass
class Figures(Timings):
    """What one method did."""

    examples: int = 0
    tokens: int = 0
    loss_difference: float = 0.0
    gradient_difference: float = 0.0
    update_difference: float = 0.0


class Subject:
    """Ours and a plain model with the same weights to start from."""

    def __init__(self, folder: Path, examples: pa.Table, quick: bool) -> None:
        self.config = _config(folder, quick)
        self.method = encoder.build(self.config, LABELS)
        self.plain = BertForSequenceClassification.from_pretrained(
            folder, attn_implementation="sdpa"
        )
        self.examples = self.method.training_set(examples, 0)
        labels = examples["label"].to_pylist()
        tokens = self.examples.tokens
        self.features: list[Feature] = [
            {"input_ids": tokens[row].tolist(), "labels": labels[row]} for row in range(len(tokens))
        ]
        self.initial = {name: value.clone() for name, value in self.plain.state_dict().items()}
        world = distributed.start()
        self.optimizer = ShardedOptimizer(self.config, self.method, world)
        # By these Trainer would take itself for one of several ranks, and wrap its model.
        for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(variable, None)
        self.own: BertForSequenceClassification = self.method.module.model
        self.method.module = self.optimizer.module

    def step(self, rows: np.ndarray) -> list[Feature]:
        """What Trainer is given of the examples `rows`."""
        return [self.features[row] for row in rows.tolist()]

    def reset(self) -> None:
        """Let both start again, the optimizer's moments apart."""
        for model in (self.own, self.plain):
            model.load_state_dict(self.initial)
            model.zero_grad()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="equality only, on a tiny model")
    quick = parser.parse_args(arguments).quick
    try:
        return _run(quick)
    finally:
        distributed.stop()


def _run(quick: bool) -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    named = os.environ.get("REFERENCE_DATA")
    reference = None if quick or not named else Path(named)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bert"
        examples, source = _data(reference, QUICK_EXAMPLES if quick else EXAMPLES)
        _write_model(folder, reference, examples, quick)
        print(f"{source}; processor time of one thread, medians of {ROUNDS} rounds on other words")
        subject = Subject(folder, examples, quick)
        results = {name: Figures() for name in STEPS}
        for name in PEERS:
            compare(subject, name, results[name])
        print("losses, gradients and updates are equal", flush=True)
        for turn in range(0 if quick else ROUNDS):
            for name, count in STEPS.items():
                measure(subject, name, count, turn, results[name])
        _print_table(results, timings=not quick)
        if quick:
            print("no ratio is measured with --quick")
            return 0
        hours = project(subject, reference)
    return conclude("finetune", _claims(results), _record(results, source, hours))


def compare(subject: Subject, name: str, figures: Figures) -> None:
    """Give a peer and ours the same rows: mean loss, its gradient, and the weights after steps.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    # Of all lengths, so that there is something to pad.
    by_length = np.argsort(subject.examples.lengths, kind="stable")
    spread = by_length[np.linspace(0, len(by_length) - 1, CHECKED_ROWS).astype(int)]
    subject.reset()
    mean = accumulate(subject, spread)
    loss = plain_loss(subject, name, spread)
    loss.backward()
    figures.loss_difference = abs(float(mean) - float(loss.detach())) / (
        1 + abs(float(loss.detach()))
    )
    gradients = [_flat(model, lambda p: p.grad) for model in (subject.own, subject.plain)]
    figures.gradient_difference = _relative(gradients[0], gradients[1])
    for what, seen, limit in (
        ("mean loss", figures.loss_difference, LOSS_TOLERANCE),
        ("gradient", figures.gradient_difference, GRADIENT_TOLERANCE),
    ):
        assert seen <= limit, f"{name}: the {what} differs from ours by {seen:.1e}"

    subject.reset()
    _forget_moments(subject.optimizer)
    rows = np.random.default_rng(0).permutation(len(by_length))
    steps = np.split(rows[: CHECKED_STEPS * ROWS_A_CHECKED_STEP], CHECKED_STEPS)
    train(subject, "ours", steps)
    train(subject, name, steps)
    start = torch.cat([subject.initial[n].flatten() for n, _ in subject.plain.named_parameters()])
    updates = [_flat(model, lambda p: p.detach()) - start for model in (subject.own, subject.plain)]
    # Adam moves an entry whose gradient is nothing but rounding as far as any other: such entries
    # are few, but would be most of the squares' sum.
    figures.update_difference = _relative(updates[0], updates[1], order=1)
    assert figures.update_difference <= UPDATE_TOLERANCE, (
        f"{name}: after {CHECKED_STEPS} steps the weights' updates differ from ours by "
        f"{figures.update_difference:.1e}"
    )


def plain_loss(subject: Subject, name: str, rows: np.ndarray) -> Tensor:
    """The mean loss of the plain model on what the peer gives it."""
    subject.plain.train()
    loss: Tensor = subject.plain(**PEERS[name].collate(subject.step(rows))).loss
    return loss


def accumulate(subject: Subject, rows: np.ndarray) -> Tensor:
    """Our mean loss over `rows`, and its gradient, as in the launcher's steps."""
    method, examples = subject.method, subject.examples
    method.module.train()
    weight = float(examples.weights[rows].sum())
    mean = torch.zeros(())
    tokens = subject.config.train.micro_batch_tokens
    parts = micro_batches(rows, examples.lengths, tokens, world_size=1, rank=0)
    for place, (part, _) in enumerate(parts):
        loss = method.loss(examples.batch(part.tolist())) / weight
        subject.optimizer.backward(loss, last=place == len(parts) - 1)
        mean += loss.detach()
    return mean


def train(subject: Subject, name: str, steps: Sequence[np.ndarray]) -> None:
    """An optimizer step for the rows in each of `steps`; ours as the launcher does on one rank."""
    if name != "ours":
        given = [subject.step(rows) for rows in steps]
        PEERS[name].train(subject.plain, given, LR, WEIGHT_DECAY, CLIP)
        return
    for rows in steps:
        accumulate(subject, rows)
        subject.optimizer.step(LR)


def measure(subject: Subject, name: str, count: int, turn: int, figures: Figures) -> None:
    """Time `count` steps, other ones each turn; a first turn is preceded by a short run."""
    lengths = subject.examples.lengths
    batches = step_order(lengths, BATCH, 0) if name == "ours" else PEERS[name].order(lengths, BATCH)
    steps = spread_over_lengths(batches, lengths, count)[turn]
    if name == "fixed 128":
        steps = [rows[:FIXED_EXAMPLES] for rows in steps]
    if turn == 0:
        train(subject, name, [steps[0][:2]])
    subject.reset()
    with _counting(subject, name, figures):
        _, spent = timed(lambda: train(subject, name, steps))
    examples = sum(map(len, steps))
    figures.seconds.append((spent, examples))
    figures.examples += examples


def spread_over_lengths(
    batches: Sequence[np.ndarray], lengths: np.ndarray, count: int
) -> list[list[np.ndarray]]:
    """For each round `count` whole batches, in the middles of `count` equal parts by length."""
    return trainer.spread(
        batches, lambda rows: float(lengths[rows].mean()), count, batch=BATCH, rounds=ROUNDS
    )


def project(subject: Subject, reference: Path | None) -> dict[str, Any]:
    """Hours of ten epochs over the study's chats on its card, from the FLOPs of whole chats.

    The FLOPs of each length are counted as PyTorch runs forward and backward, matrix products and
    attention alike, on the device `meta`.
    """
    if reference is None:
        splits = make_sample(seed=0).splits.values()
        texts = [text for split in splits for text in split["text"].to_pylist()]
    else:
        lines = (reference / "data/danmaku_unlabelled.jsonl").read_text(encoding="utf-8")
        texts = [json.loads(line)["text"] for line in lines.splitlines()]
    tokens = tokenization.encode(subject.method.tokenizer, texts, subject.method.limit)
    counts = Counter(tokens.lengths.tolist())
    model: Any = subject.plain
    model.to("meta").train()
    total = sum(times * example_flops(model, length) for length, times in counts.items())
    mean, mean_tokens = total / len(texts), float(tokens.lengths.mean())
    seconds = EPOCHS * SENTENCES * mean / (UTILISATION * CARD_FLOPS)
    print(
        f"{len(texts):,} whole chats of {mean_tokens:.1f} tokens: {mean / 1e9:.2f} GFLOP each, "
        f"forward and backward\n"
        f"{EPOCHS} epochs x {SENTENCES:,} chats x {mean / 1e9:.2f} GFLOP / ({UTILISATION:.0%} of "
        f"{CARD_FLOPS / 1e12:.1f} TFLOP/s) = {seconds / 3600:.2f} h on an RTX 2080, where the "
        f"study took {STUDY_DAYS} days"
    )
    return {
        "chats": len(texts),
        "tokens_per_chat": mean_tokens,
        "flops_per_chat": mean,
        "epochs": EPOCHS,
        "sentences": SENTENCES,
        "card_flops_per_s": CARD_FLOPS,
        "utilisation": UTILISATION,
        "hours": seconds / 3600,
    }


def example_flops(model: nn.Module, length: int) -> float:
    """FLOPs of forward and backward on one text of `length` tokens; the model is on `meta`."""
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    return float(counter.get_total_flops())


def _claims(results: Mapping[str, Figures]) -> list[Claim]:
    return [
        Claim("fine-tuning, faster than padding to 128", _ratio(results, "fixed 128"), 12.0),
        Claim("fine-tuning, faster than dynamic padding", _ratio(results, "dynamic"), 2.0),
        Claim("fine-tuning, faster than grouping by length", _ratio(results, "grouped"), 1.1),
    ]


def _ratio(results: Mapping[str, Figures], name: str) -> float:
    return results[name].per_item("cpu") / results["ours"].per_item("cpu")


def _relative(seen: Tensor, expected: Tensor, order: int = 2) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((seen - expected).norm(p=order) / expected.norm(p=order))


def _flat(model: nn.Module, of: Callable[[nn.Parameter], Tensor | None]) -> Tensor:
    """One vector of what `of` gives for each parameter."""
    found = [(of(parameter), parameter) for parameter in model.parameters()]
    return torch.cat([(torch.zeros_like(p) if v is None else v).flatten() for v, p in found])


def _forget_moments(optimizer: ShardedOptimizer) -> None:
    """Let Adam begin anew, as in each of Trainer's runs."""
    optimizer.engine.optimizer.state.clear()


def _config(folder: Path, quick: bool) -> Config:
    values = {
        "method": "finetune.encoder",
        "run": {"name": "benchmark", "dir": str(folder.parent)},
        "data": {"path": "unused", "labels": LABELS},
        "model": {"path": str(folder), "precision": "fp32"},
        "parallel": {"zero": 0},
        "train": {
            "global_batch": BATCH,
            "lr": LR,
            "weight_decay": WEIGHT_DECAY,
            "schedule": "constant",
            "clip_norm": CLIP,
        },
    }
    # Two rows a pass or so, so that what is compared was added up.
    return parse_config(values, ["train.micro_batch_tokens=32"] if quick else [])


def _data(folder: Path | None, count: int) -> tuple[pa.Table, str]:
    """Words with their labels, and where they are from."""
    if folder is not None:
        file = folder / "data/danmu6/train.tsv"
        table = read_dataset(files={"train": file}, labels=LABELS).splits["train"]
        source = f"{count:,} real words"
    else:
        dataset = make_sample(seed=0, size=max(count, 6000) // 4)
        rows = dataset.splits["train"].to_pylist()
        rows = [{**rows[i % len(rows)], "id": str(i)} for i in range(count)]
        table = pa.Table.from_pylist([{**row, "distribution": None} for row in rows], SCHEMA)
        source = f"{count:,} synthetic texts (no REFERENCE_DATA)"
    chosen = np.random.default_rng(0).permutation(len(table))[:count]
    return table.take(chosen), source


def _write_model(folder: Path, reference: Path | None, examples: pa.Table, quick: bool) -> None:
    """Random weights of BERT's shape with the real vocabulary, or one of single characters."""
    folder.mkdir()
    if reference is not None:
        shutil.copy(reference / "vocab/google_zh_vocab.txt", folder / "vocab.txt")
    else:
        letters = sorted({*"".join(examples["text"].to_pylist()).lower()})
        tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
        (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    size = len((folder / "vocab.txt").read_text(encoding="utf-8").splitlines())
    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 64} if quick else {}  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **shape
    )
    config.id2label = dict(enumerate(LABELS))
    BertForSequenceClassification(config).save_pretrained(folder)


@contextmanager
def _counting(subject: Subject, name: str, figures: Figures) -> Iterator[None]:
    """Count tokens that go through the layers, padding included."""

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        figures.tokens += inputs[0].shape[:-1].numel()

    model = subject.own if name == "ours" else subject.plain
    hook = model.bert.encoder.layer[0].register_forward_pre_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _print_table(results: Mapping[str, Figures], timings: bool) -> None:
    print(
        "method           loss diff  gradient   updates"
        + ("  examples  tokens/ex  cpu ms/ex  examples/s  times ours" * timings)
    )
    for name, own in results.items():
        differences = own.loss_difference, own.gradient_difference, own.update_difference
        line = f"{name:15}"
        line += "".join(f"{'' if name == 'ours' else f'{gap:.1e}':>11}" for gap in differences)
        if timings:
            spent = own.per_item("cpu")
            line += f"{own.examples:9}{own.tokens / own.examples:11.1f}{spent:11.1f}"
            line += f"{1e3 / spent:12.2f}{_ratio(results, name):12.2f}"
        print(line)


def _record(
    results: Mapping[str, Figures], source: str, projection: dict[str, Any]
) -> dict[str, Any]:
    methods = {
        name: {
            "examples": own.examples,
            "examples_per_second": 1e3 / own.per_item("cpu"),
            "cpu_ms_per_example": own.per_item("cpu"),
            "wall_ms_per_example": own.per_item("wall"),
            "cpu_seconds_per_round": [spent.cpu for spent, _ in own.seconds],
            "times_ours": _ratio(results, name),
            "tokens_per_example": own.tokens / own.examples,
            "loss_difference": own.loss_difference,
            "gradient_difference": own.gradient_difference,
            "update_difference": own.update_difference,
        }
        for name, own in results.items()
    }
    packages = ["torch", "transformers", "accelerate", "deepspeed", "tokenizers"]
    return {
        "machine": machine(packages),
        "data": source,
        "methods": methods,
        "projection": projection,
    }


if __name__ == "__main__":
    sys.exit(main())
