"""Training of a soft prompt against its peers: equal gradients first, then how much faster.

Every method gets the same frozen model, the same initial vectors, the same examples tokenized
beforehand, one thread, 64 examples a step, AdamW at a constant rate, and learns the answer's tokens
behind `{soft:N}{text}` with the study's choices and answer:

- ours: `prompting.tuning` with the launcher's order, micro batches and optimizer;
- Trainer: PEFT's prompt tuning under transformers' Trainer, grouped by length, padded to the
  longest of a batch;
- Trainer oneDNN: the same on the kernels that ours uses (`launcher.cpu_linear`);
- Trainer kept oneDNN: the same, and the head computed for the answers only, which needs a model
  that can do so: what is left of the ratio is what ours shares between examples;
- padded: PEFT in a plain loop, all sequences padded to 1024 tokens with their virtual tokens, the
  study's way.

Trainer's sampler groups all examples and ours orders all of them; of each order's batches, some are
timed that are spread evenly over the lengths. Trainer takes them in sequence: a short run of its
own would begin with the longest.

    OMP_NUM_THREADS=1 python -m benchmarks.tuning             # 8 to 10 minutes, 8 GB
    python -m benchmarks.tuning --quick                       # equality only, tiny model
"""

import argparse
import json
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers
from torch import Tensor, nn

from benchmarks import trainer
from benchmarks.common import Claim, Timings, conclude, machine, timed
from benchmarks.scoring import FIVE_LABELS
from benchmarks.tuning_peers import (
    PEERS,
    POSITIONS,
    Feature,
    features,
    make_peft,
    prompt_of,
    set_prompt,
)
from data_prep.sample import make_sample
from launcher.batching import micro_batches, step_order
from launcher.config import Config, parse_config
from launcher.distributed import World
from launcher.optimizer import ReplicatedOptimizer
from prompting.pangu.configuration import PanguConfig
from prompting.pangu.modeling import PanguForCausalLM
from prompting.pangu.tokenization import PanguTokenizer, train_vocabulary
from prompting.question import Question
from prompting.settings import TEMPLATES
from prompting.template import build_prompt
from prompting.tuning import Tuning

VOCABULARY = 40_000
EXAMPLES, QUICK_EXAMPLES = 12_800, 600
"""12,800 are the fewest with which Trainer's sampler groups as well as it ever does."""
BATCH, ROUNDS, LR, CLIP = 64, 3, 1e-2, 1.0
PADDED_EXAMPLES = 4
CHECKED_ROWS, CHECKED_STEPS, ROWS_A_CHECKED_STEP = 4, 3, 2
LOSS_TOLERANCE, GRADIENT_TOLERANCE, UPDATE_TOLERANCE = 1e-5, 1e-4, 1e-3


@dataclass(frozen=True)
class Setting:
    """How many virtual tokens, and which methods are timed on how many steps a round."""

    vectors: int
    steps: Mapping[str, int]
    """`padded` takes one, of few examples."""


@dataclass
class Figures(Timings):
    """What one method did in one setting."""

    examples: int = 0
    tokens: int = 0
    head_rows: int = 0
    loss_difference: float = 0.0
    gradient_difference: float = 0.0
    update_difference: float = 0.0


SETTINGS = (
    # Nothing would be learned, hence no gradient computed, without any: one is the least.
    Setting(1, {"ours": 2}),
    Setting(100, {"ours": 2, "Trainer": 2, "Trainer kept oneDNN": 2}),
    Setting(20, {"ours": 3, "Trainer": 3, "Trainer oneDNN": 3, "Trainer kept oneDNN": 3,
                 "padded": 1}),
)  # fmt: skip

Results = dict[int, dict[str, Figures]]
"""By virtual tokens and method."""


class Subject:
    """Ours and PEFT's on one frozen model, with the same vectors to start from."""

    def __init__(
        self, config: Config, model: PanguForCausalLM, tokenizer: PanguTokenizer, examples: pa.Table
    ) -> None:
        self.config, self.model = config, model
        prompt, vocabulary = config.section("prompt"), model.config.vocab_size
        asked = Question(prompt, FIVE_LABELS, tokenizer, POSITIONS, 0, vocabulary)
        self.method = Tuning(config, asked, model, identity={})
        self.method.start(examples)
        self.examples = self.method.training_set(examples, 0)
        assert self.method.replicated is not None
        (self.prompt,) = self.method.replicated.parameters()
        self.initial = self.prompt.detach().clone()
        self.peft = make_peft(model, self.initial)
        self.features = features(asked, examples["text"].to_pylist(), examples["label"].to_pylist())

    def step(self, rows: np.ndarray) -> list[Feature]:
        """What PEFT's methods are given of the examples `rows`."""
        return [self.features[row] for row in rows.tolist()]

    def reset(self) -> None:
        """Let both start again."""
        set_prompt(self.peft, self.initial)
        with torch.no_grad():
            self.prompt.copy_(self.initial)
        self.prompt.grad = None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="equality only, on a tiny model")
    quick = parser.parse_args(arguments).quick
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # PEFT's, of names in transformers
    transformers.logging.set_verbosity_error()
    folder = os.environ.get("REFERENCE_DATA")
    tokenizer, examples, source = _data(
        None if quick or not folder else Path(folder), QUICK_EXAMPLES if quick else EXAMPLES
    )
    print(f"{source}; processor time of one thread, medians of {ROUNDS} rounds on other examples")
    model = _model(len(tokenizer) if quick else VOCABULARY, quick)
    subjects = [Subject(_config(s.vectors, quick), model, tokenizer, examples) for s in SETTINGS]
    results: Results = {s.vectors: {name: Figures() for name in s.steps} for s in SETTINGS}
    for setting, subject in zip(SETTINGS, subjects, strict=True):
        for name in setting.steps.keys() & PEERS.keys():
            compare(subject, name, results[setting.vectors][name])
    print("losses, gradients and updates are equal", flush=True)
    for turn in range(0 if quick else ROUNDS):
        for setting, subject in zip(SETTINGS, subjects, strict=True):
            for name, count in setting.steps.items():
                measure(subject, name, count, turn, results[setting.vectors][name])
    _print_table(results, timings=not quick)
    if quick:
        print("no ratio is measured with --quick")
        return 0
    return conclude("tuning", _claims(results), _record(results, source))


def compare(subject: Subject, name: str, figures: Figures) -> None:
    """Give a peer and ours the same rows: mean loss, its gradient, and the prompt after steps.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    # Of all lengths, so that there is something to pad.
    by_length = np.argsort(subject.examples.lengths, kind="stable")
    spread = by_length[np.linspace(0, len(by_length) - 1, CHECKED_ROWS).astype(int)]
    subject.reset()
    mean = accumulate(subject, spread, lambda loss: loss.backward())
    loss, gradient = peft_gradient(subject, name, spread)
    figures.loss_difference = abs(float(mean - loss)) / (1 + abs(float(loss)))
    assert subject.prompt.grad is not None
    figures.gradient_difference = _relative(subject.prompt.grad, gradient)
    for what, seen, limit in (
        ("mean loss", figures.loss_difference, LOSS_TOLERANCE),
        ("gradient of the prompt", figures.gradient_difference, GRADIENT_TOLERANCE),
    ):
        assert seen <= limit, f"{name}: the {what} differs from ours by {seen:.1e}"

    subject.reset()
    rows = np.random.default_rng(0).permutation(len(by_length))
    steps = np.split(rows[: CHECKED_STEPS * ROWS_A_CHECKED_STEP], CHECKED_STEPS)
    train(subject, "ours", steps)
    train(subject, name, steps)
    own, theirs = subject.prompt.detach(), prompt_of(subject.peft).detach()
    # Adam moves an entry whose gradient is nothing but rounding as far as any other: such entries
    # are few, but would be most of the squares' sum.
    updates = own - subject.initial, theirs - subject.initial
    figures.update_difference = _relative(*updates, order=1)
    assert figures.update_difference <= UPDATE_TOLERANCE, (
        f"{name}: after {CHECKED_STEPS} steps the prompt's updates differ from ours by "
        f"{figures.update_difference:.1e}"
    )


def peft_gradient(subject: Subject, name: str, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """The mean loss of PEFT's model over the answers' tokens, and its prompt's gradient."""
    subject.peft.train()
    loss = subject.peft(**PEERS[name].collate(subject.step(rows), len(subject.initial))).loss
    (gradient,) = torch.autograd.grad(loss, [prompt_of(subject.peft)])
    return loss.detach(), gradient


def accumulate(subject: Subject, rows: np.ndarray, backward: Callable[[Tensor], None]) -> Tensor:
    """Our mean loss over `rows`, and its gradient into the prompt, as in the launcher's steps."""
    method, examples = subject.method, subject.examples
    method.module.train()
    weight = float(examples.weights[rows].sum())
    mean = torch.zeros(())
    tokens = subject.config.train.micro_batch_tokens
    for part, _ in micro_batches(rows, examples.lengths, tokens, world_size=1, rank=0):
        loss = method.loss(examples.batch(part.tolist())) / weight
        backward(loss)
        mean += loss.detach()
    return mean


def train(subject: Subject, name: str, steps: Sequence[np.ndarray]) -> None:
    """An optimizer step for the rows in each of `steps`; ours as the launcher does on one rank."""
    if name != "ours":
        given = [subject.step(rows) for rows in steps]
        PEERS[name].train(subject.peft, given, PEERS[name].collate, LR, CLIP)
        return
    world = World(rank=0, size=1, device=torch.device("cpu"))
    optimizer = ReplicatedOptimizer(subject.config, subject.method, world)
    for rows in steps:
        accumulate(subject, rows, partial(optimizer.backward, last=True))
        optimizer.step(LR)


def measure(subject: Subject, name: str, count: int, turn: int, figures: Figures) -> None:
    """Time `count` steps, other ones each turn; a first turn is preceded by a short run."""
    lengths = subject.examples.lengths
    batches = (
        step_order(lengths, BATCH, seed=0)
        if name == "ours"
        else trainer.grouped_by_length(lengths, BATCH)
    )
    steps = spread_over_lengths(batches, lengths, count)[turn]
    if name == "padded":
        steps = [rows[:PADDED_EXAMPLES] for rows in steps]
    if turn == 0:
        train(subject, name, [steps[0][:2]])
    subject.reset()
    with _counting(subject.model, figures):
        _, spent = timed(lambda: train(subject, name, steps))
    examples = sum(map(len, steps))
    figures.seconds.append((spent, examples))
    figures.examples += examples


def spread_over_lengths(
    batches: Sequence[np.ndarray], lengths: np.ndarray, count: int
) -> list[list[np.ndarray]]:
    """For each round `count` whole batches, in the middles of `count` equal parts by length."""
    return trainer.spread(
        batches, lambda rows: int(lengths[rows].max()), count, batch=BATCH, rounds=ROUNDS
    )


def _claims(results: Results) -> list[Claim]:
    step = results[100]["ours"].per_item("cpu") / results[1]["ours"].per_item("cpu")
    return [
        Claim("tuning, 20 vectors, faster than Trainer", _ratio(results[20], "Trainer"), 2.0),
        Claim("tuning, 100 vectors, faster than Trainer", _ratio(results[100], "Trainer"), 4.0),
        Claim("tuning, 20 vectors, faster than padded", _ratio(results[20], "padded"), 30.0),
        Claim("tuning, a step of 100 vectors to one of 1", step, 1.4, at_most=True),
    ]


def _ratio(figures: dict[str, Figures], name: str) -> float:
    return figures[name].per_item("cpu") / figures["ours"].per_item("cpu")


def _relative(seen: Tensor, expected: Tensor, order: int = 2) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((seen - expected).norm(p=order) / expected.norm(p=order))


def _config(vectors: int, quick: bool) -> Config:
    template = TEMPLATES["study_1"].model_dump()
    template |= {"name": f"soft_{vectors}", "question": f"{{soft:{vectors}}}{{text}}"}
    values = {
        "method": "prompting.tuning",
        "run": {"name": "benchmark"},
        "data": {"path": "unused"},
        "model": {"precision": "fp32"},
        "parallel": {"zero": 0},
        "prompt": {"template": template},
        "tuning": {"init": "vocabulary", "objective": "language_modelling"},
        "train": {"global_batch": BATCH, "lr": LR, "schedule": "constant", "clip_norm": CLIP},
    }
    # Two rows a pass at most, so that what is compared was added up.
    return parse_config(values, ["train.micro_batch_tokens=64"] if quick else [])


def _data(folder: Path | None, count: int) -> tuple[PanguTokenizer, pa.Table, str]:
    """The tokenizer, examples with labels drawn at random, and where they are from."""
    generator = random.Random(0)
    if folder is not None:
        lines = (folder / "data/danmaku_unlabelled.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in generator.sample(lines, count)]
        tokenizer = PanguTokenizer(folder / "vocab/pangu_vocab.model")
        source = f"{count} real chats, PanGu's vocabulary of {len(tokenizer)}"
    else:
        splits = make_sample(seed=0).splits.values()
        rows = [row for split in splits for row in split.to_pylist()]
        weights = [row["frequency"] for row in rows]
        texts = [row["text"] for row in generator.choices(rows, weights, k=count)]
        prompt = build_prompt(TEMPLATES["study_1"], FIVE_LABELS).text_with("")
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "vocab.model"
            train_vocabulary([*(row["text"] for row in rows), *FIVE_LABELS, prompt], path, 4000)
            tokenizer = PanguTokenizer(path)
        source = f"{count} synthetic chats from the phrase bank (no REFERENCE_DATA)"
    labels = [generator.randrange(len(FIVE_LABELS)) for _ in texts]
    ids = [str(row) for row in range(len(texts))]
    examples = pa.table({"id": ids, "text": texts, "label": labels})
    return tokenizer, examples, f"{source}, labels at random"


def _model(vocabulary: int, quick: bool) -> PanguForCausalLM:
    """Random weights, large enough that a prompt's vectors matter; no dropout."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32 if quick else 512,
        "num_hidden_layers": 2 if quick else 8,
        "num_attention_heads": 2 if quick else 8,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.3 if quick else 0.05,
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0),
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    return PanguForCausalLM(PanguConfig(**shape))


@contextmanager
def _counting(model: PanguForCausalLM, figures: Figures) -> Iterator[None]:
    """Count tokens that go through the layers, and rows of the head, padding included."""

    def count_tokens(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        figures.tokens += inputs[0].shape[:-1].numel()

    def count_rows(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        figures.head_rows += inputs[0].shape[:-1].numel()

    hooks = [
        model.model.layers[0].register_forward_pre_hook(count_tokens),
        model.get_output_embeddings().register_forward_pre_hook(count_rows),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _print_table(results: Results, timings: bool) -> None:
    print(
        "vectors  method                 loss diff  gradient   updates"
        + ("  examples  tokens/ex  head rows/ex  cpu ms/ex  examples/s  times ours" * timings)
    )
    for vectors, figures in results.items():
        for name, own in figures.items():
            line = f"{vectors:7}  {name:21}"
            differences = own.loss_difference, own.gradient_difference, own.update_difference
            line += "".join(f"{'' if name == 'ours' else f'{gap:.1e}':>11}" for gap in differences)
            if timings:
                spent = own.per_item("cpu")
                line += f"{own.examples:9}{own.tokens / own.examples:11.1f}"
                line += f"{own.head_rows / own.examples:14.2f}{spent:11.1f}{1e3 / spent:12.2f}"
                line += f"{_ratio(figures, name):12.2f}"
            print(line)


def _record(results: Results, source: str) -> dict[str, Any]:
    packages = ["torch", "transformers", "peft", "accelerate", "sentencepiece", "jieba"]
    settings = {
        f"{vectors} vectors": {
            name: {
                "examples": own.examples,
                "examples_per_second": 1e3 / own.per_item("cpu"),
                "cpu_ms_per_example": own.per_item("cpu"),
                "wall_ms_per_example": own.per_item("wall"),
                "cpu_seconds_per_round": [spent.cpu for spent, _ in own.seconds],
                "times_ours": _ratio(figures, name),
                "tokens_per_example": own.tokens / own.examples,
                "head_rows_per_example": own.head_rows / own.examples,
                "loss_difference": own.loss_difference,
                "gradient_difference": own.gradient_difference,
                "update_difference": own.update_difference,
            }
            for name, own in figures.items()
        }
        for vectors, figures in results.items()
    }
    return {"machine": machine(packages), "data": source, "settings": settings}


if __name__ == "__main__":
    sys.exit(main())
