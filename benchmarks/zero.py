"""What the planner foretells against what is measured, and how much of the processor is used.

- Memory: prompts, prompt tuning and language modelling on a small PanGu, and the fine-tune of a
  BERT of its shape, on one rank and two, under ZeRO 0 to 3, with large and small micro batches,
  with and without activation checkpointing. Each case runs in processes of its own, from a
  checkpoint in bfloat16, in float32. The C library is told to give back what is freed
  (`MALLOC_MMAP_THRESHOLD_`): by itself it keeps gaps, which come on top of what tensors take.
- Time: processor time of steps of the cases on one rank, against the estimate from this machine's
  speed, measured in the same process.
- Speed: a soft prompt's step at the width of PanGu 2.6B, with one ordinary layer and with four,
  real chats and the study's template: the model's FLOP/s, forward and with the backward pass
  through the frozen model, against those of products of large square matrices by oneDNN, which the
  model uses, and by torch, whichever is faster here.

    OMP_NUM_THREADS=1 python -m benchmarks.zero             # 5 minutes of two cores, 6 GB
    python -m benchmarks.zero --quick                       # two cases of memory, no speed
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import transformers
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from benchmarks.common import Claim, conclude, machine
from benchmarks.scoring import FIVE_LABELS
from data_prep.dataset import Dataset, read_dataset, write_dataset
from data_prep.sample import make_sample
from launcher.config import parse_config
from launcher.counting import count
from launcher.hardware import LOOPBACK, Card
from launcher.machine import CPU_RESERVED
from launcher.method import method_module
from launcher.planner import BYTES, Hardware, estimate
from prompting.pangu.configuration import PanguConfig
from prompting.pangu.modeling import PanguForCausalLM
from prompting.pangu.tokenization import PanguTokenizer, train_vocabulary
from prompting.question import Question
from prompting.settings import TEMPLATES
from prompting.tuning import Tuning

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12}
QUICK_SHAPE = {"hidden_size": 384, "num_hidden_layers": 3, "num_attention_heads": 6}
WIDE = {"hidden_size": 2560, "num_attention_heads": 32, "vocab_size": 40_000}
CHATS, VECTORS, REPETITIONS = 24, 20, 2
MEMORY_ERROR, SENT_ERROR, TIME_ERROR = 1.10, 1.05, 1.25
FORWARD, BOTH = 0.70, 0.60


@dataclass(frozen=True)
class Case:
    """A run, and how it is shared."""

    method: str
    ranks: int
    zero: int
    tokens: int
    """Of a micro batch."""
    checkpointing: bool = False
    timed: bool = False

    @property
    def name(self) -> str:
        kept = ", checkpointing" if self.checkpointing else ""
        method = self.method.split(".")[1]
        return f"{method}, {self.ranks} ranks, ZeRO {self.zero}, {self.tokens} tokens{kept}"


CASES = [
    Case("prompting.discrete", 1, 0, 4096, timed=True),
    Case("prompting.discrete", 2, 0, 1024),
    Case("prompting.discrete", 2, 3, 4096),
    Case("prompting.tuning", 1, 0, 2048, timed=True),
    Case("prompting.tuning", 1, 0, 4096, checkpointing=True),
    Case("prompting.tuning", 2, 0, 1024),
    Case("prompting.tuning", 2, 3, 2048),
    Case("prompting.tuning", 2, 3, 2048, checkpointing=True),
    Case("prompting.pretrain", 1, 0, 512, timed=True),
    Case("prompting.pretrain", 1, 0, 1024, checkpointing=True),
    Case("prompting.pretrain", 2, 0, 512),
    Case("prompting.pretrain", 2, 1, 512),
    Case("prompting.pretrain", 2, 2, 512),
    Case("prompting.pretrain", 2, 3, 512),
    Case("finetune.encoder", 1, 0, 512, timed=True),
    Case("finetune.encoder", 1, 0, 1024, checkpointing=True),
    Case("finetune.encoder", 2, 0, 512),
    Case("finetune.encoder", 2, 2, 512),
    Case("finetune.encoder", 2, 3, 512),
]
QUICK_CASES = [Case("prompting.tuning", 1, 0, 2048), Case("prompting.discrete", 2, 3, 2048)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zero", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two cases of memory on a tiny model")
    quick = parser.parse_args(arguments).quick
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    print("memory: MB of a rank beside libraries; time: processor seconds of a step")
    cases = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        dataset = _prepare(folder, quick)
        for case in QUICK_CASES if quick else CASES:
            cases.append(compare(case, folder, dataset))
            print(_line(cases[-1]), flush=True)
        if quick:
            print("no claim is made with --quick")
            return 0
        speed = [measure_speed(layers, folder) for layers in (1, 4)]
    for figures in speed:
        print(", ".join(f"{name} {value:.3g}" for name, value in figures.items()), flush=True)
    packages = ["torch", "transformers", "deepspeed"]
    chats = "real" if os.environ.get("REFERENCE_DATA") else "synthetic"
    told = {"machine": machine(packages), "shape": SHAPE, "chats": chats}
    return conclude("zero", _claims(cases, speed), {**told, "cases": cases, "speed": speed})


def compare(case: Case, folder: Path, dataset: Dataset) -> dict[str, Any]:
    """Run a case in processes of its own; what was measured and what was foretold."""
    values = _values(case, folder)
    ranks = launch(values, case, folder, timed=False)
    # Memory given back at once costs time, so the clock runs in a process of its own.
    clock = launch(values, case, folder, timed=True)[0] if case.timed else None
    card = _still_card() if clock is None else Card(**clock["card"])
    config = parse_config(values)
    needs = method_module(config).footprint(config, dataset, case.ranks)
    plan = estimate(
        needs,
        Hardware(card, case.ranks, LOOPBACK, 0.0),
        zero=case.zero,
        checkpointing=case.checkpointing,
    )
    figures = {
        "case": case.name,
        "peak": max(own["peak"] for own in ranks),
        "foretold": plan.total + card.reserved,
        "items": plan.device,
    }
    if case.zero == 3:
        kind = "gathered" if needs.trains else "gathered_to_score"
        figures["gathered"] = ranks[0][kind]
        figures["gathered_foretold"] = needs.heaviest[True].gathered * BYTES[needs.precision]
    if clock is not None:
        figures["seconds"] = clock["seconds"] if needs.trains else clock["a_text"] * needs.examples
        figures["seconds_foretold"] = plan.seconds
        figures["machine"] = clock["card"]
    return figures


def launch(
    values: Mapping[str, Any], case: Case, folder: Path, *, timed: bool
) -> list[dict[str, Any]]:
    """What each rank measured."""
    job = folder / "job.json"
    job.write_text(json.dumps({"config": values, "out": str(folder), "timed": timed}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(case.ranks),
        "LOCAL_WORLD_SIZE": str(case.ranks),
    }
    if not timed:
        environment |= dict.fromkeys(["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"], "65536")
    command = [sys.executable, "-m", "benchmarks.zero_rank", str(job)]
    ranks = []
    for rank in range(case.ranks):
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        # What libraries print is of no interest unless they fail.
        log = (folder / f"{rank}.log").open("w")
        ranks.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT))
    codes = [process.wait() for process in ranks]
    if any(codes):
        logs = [(folder / f"{rank}.log").read_text()[-2000:] for rank in range(case.ranks)]
        raise RuntimeError(f"{case.name}: exit codes {codes}\n" + "\n".join(logs))
    files = [folder / f"{rank}.json" for rank in range(case.ranks)]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def measure_speed(layers: int, folder: Path) -> dict[str, float]:
    """FLOP/s of a soft prompt's step through `layers` ordinary layers, the query layer and the
    head, as shares of the machine's.

    FLOPs are those of all matrix products of the step, attention and head among them, counted on
    the device `meta`; nothing is computed twice.
    """
    rate = max(_products_per_s(onednn) for onednn in (True, False))
    shape: dict[str, Any] = {**WIDE, "max_position_embeddings": 1024, "attn_implementation": "sdpa"}
    shape |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    described = PanguConfig(num_hidden_layers=layers + 1, **shape)
    texts = _chats()
    with torch.device("meta"):
        skeleton = PanguForCausalLM(described)
    counted = _Soft(skeleton, folder, texts)
    counted.method.module.to("meta")
    counted.method.replicated.to("meta")
    run = _Soft(PanguForCausalLM(described), folder, texts)
    figures: dict[str, float] = {"layers": layers, "products GFLOP/s": rate / 1e9}
    for name in ("forward", "both"):
        flops = count(counted.parts, getattr(counted, name)).flops
        seconds = _best(getattr(run, name))
        figures[f"{name} GFLOP/s"] = flops / seconds / 1e9
        figures[f"{name} share"] = flops / seconds / rate
    return figures


class _Soft:
    """A soft prompt in front of a model, and a micro batch of all `texts`."""

    def __init__(self, model: PanguForCausalLM, folder: Path, texts: list[str]) -> None:
        config = parse_config(_values(Case("prompting.tuning", 1, 0, 10**6), folder))
        tokenizer = PanguTokenizer(folder / "model" / "vocab.model")
        vocabulary = model.config.vocab_size
        asked = Question(config.section("prompt"), FIVE_LABELS, tokenizer, 1024, 0, vocabulary)
        self.method: Any = Tuning(config, asked, model, {})
        replicated: Any = self.method.replicated
        self.parts = nn.ModuleList([self.method.module, replicated])
        rows = range(len(texts))
        labels = [row % len(FIVE_LABELS) for row in rows]
        table = pa.table({"id": [*map(str, rows)], "text": texts, "label": labels})
        self.batch = self.method.training_set(table, 0).batch(rows)
        self.method.module.eval()

    def forward(self) -> None:
        self.method.scores(self.batch)

    def both(self) -> None:
        self.method.loss(self.batch).backward()


def _prepare(folder: Path, quick: bool) -> Dataset:
    """Write `data` and `model`, in bfloat16; the dataset."""
    made = make_sample(size=2000, seed=0)
    write_dataset(folder / "data", made)
    model = folder / "model"
    model.mkdir()
    prompts = [template.question + template.choice for template in TEMPLATES.values()]
    texts = [*made.splits["train"]["text"].to_pylist(), *made.labels, *prompts, "答案:："]
    train_vocabulary(texts, model / "vocab.model", 4000)
    tokenizer = PanguTokenizer(model / "vocab.model")
    torch.manual_seed(0)
    dropouts = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    shape: dict[str, Any] = {**(QUICK_SHAPE if quick else SHAPE), **dropouts}
    described = PanguConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **shape)
    torch.nn.Module.to(PanguForCausalLM(described), torch.bfloat16).save_pretrained(model)
    tokenizer.save_pretrained(model)
    if not quick:
        _write_bert(folder / "bert", texts)
    return read_dataset(folder / "data")


def _write_bert(folder: Path, texts: list[str]) -> None:
    """A BERT of the same shape, in bfloat16, with a vocabulary of single characters."""
    folder.mkdir()
    signs = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({*"".join(texts).lower()})]
    (folder / "vocab.txt").write_text("\n".join(signs), encoding="utf-8")
    dropouts = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    shape: dict[str, Any] = {**SHAPE, **dropouts, "max_position_embeddings": 256}
    described = BertConfig(vocab_size=len(signs), **shape)
    torch.nn.Module.to(BertForMaskedLM(described), torch.bfloat16).save_pretrained(folder)


def _values(case: Case, folder: Path) -> dict[str, Any]:
    """The config of a case."""
    values: dict[str, Any] = {
        "method": case.method,
        "run": {"name": "benchmark", "dir": str(folder / "runs")},
        "data": {"path": str(folder / "data"), "labels": FIVE_LABELS},
        "model": {"path": str(folder / "model"), "precision": "fp32"},
        "parallel": {"zero": case.zero, "activation_checkpointing": case.checkpointing},
        "train": {"micro_batch_tokens": case.tokens, "global_batch": 32},
        "evaluation": {"micro_batch_tokens": case.tokens},
    }
    if case.method == "prompting.pretrain":
        return values | {"pretrain": {}}
    if case.method == "finetune.encoder":
        return values | {"model": {"path": str(folder / "bert"), "precision": "fp32"}}
    study = TEMPLATES["study_1"].model_dump()
    if case.method == "prompting.discrete":
        return values | {"prompt": {"template": study}}
    study |= {"name": "soft", "question": f"{{soft:{VECTORS}}}{{text}}"}
    return values | {"prompt": {"template": study}, "tuning": {"init": "vocabulary"}}


def _still_card() -> Card:
    """One for whose speed no one asks."""
    return Card("CPU", 0.0, {"fp32": 1.0}, 1.0, reserved=CPU_RESERVED, is_cpu=True)


def _products_per_s(onednn: bool) -> float:
    """FLOP/s in products of large square matrices, in float32, by oneDNN or by torch."""
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    if onednn:
        operator = torch.ops.mkldnn._linear_pointwise
        return 2 * 2048**3 / _best(lambda: operator(left, right, None, "none", [], ""))
    return 2 * 2048**3 / _best(lambda: left @ right)


def _best(work: Callable[[], Any]) -> float:
    """Least seconds of processor time of a repetition; the first one sets things up."""
    work()
    seconds = []
    for _ in range(REPETITIONS):
        begun = time.process_time()
        work()
        seconds.append(time.process_time() - begun)
    return min(seconds)


def _chats() -> list[str]:
    """Real chats where there are any, else synthetic ones."""
    folder = os.environ.get("REFERENCE_DATA")
    generator = random.Random(0)
    if folder is not None:
        lines = (Path(folder) / "data/danmaku_unlabelled.jsonl").read_text(encoding="utf-8")
        return [json.loads(line)["text"] for line in generator.sample(lines.splitlines(), CHATS)]
    return generator.sample(make_sample(seed=0).splits["train"]["text"].to_pylist(), CHATS)


def _line(figures: Mapping[str, Any]) -> str:
    line = (
        f"{figures['case']}: {figures['peak'] / 1e6:.0f}, foretold {figures['foretold'] / 1e6:.0f}"
    )
    line += f" ({_apart(figures['peak'], figures['foretold']):.3f}x)"
    if "gathered" in figures:
        gathered, foretold = figures["gathered"], figures["gathered_foretold"]
        line += f"; gathered {gathered / 1e6:.0f}, foretold {foretold / 1e6:.0f}"
    if "seconds" in figures:
        seconds, foretold = figures["seconds"], figures["seconds_foretold"]
        line += f"; {seconds:.3f} s, foretold {foretold:.3f} ({_apart(seconds, foretold):.2f}x)"
    return line


def _apart(one: float, other: float) -> float:
    """The larger in units of the smaller."""
    return max(one, other) / min(one, other)


def _claims(
    cases: Sequence[Mapping[str, Any]], speed: Sequence[Mapping[str, float]]
) -> list[Claim]:
    memory = max(_apart(own["peak"], own["foretold"]) for own in cases)
    sent = [_apart(c["gathered"], c["gathered_foretold"]) for c in cases if "gathered" in c]
    times = [_apart(c["seconds"], c["seconds_foretold"]) for c in cases if "seconds" in c]
    claims = [
        Claim("memory foretold, farthest from measured", memory, MEMORY_ERROR, at_most=True),
        Claim("bytes gathered, farthest from foretold", max(sent), SENT_ERROR, at_most=True),
        Claim("time foretold, farthest from measured", max(times), TIME_ERROR, at_most=True),
    ]
    for figures in speed:
        layers = f"{figures['layers']:.0f} layer{'s' * (figures['layers'] > 1)}"
        for name, what, goal in (
            ("forward", "forward", FORWARD),
            ("both", "forward and backward", BOTH),
        ):
            claims.append(
                Claim(
                    f"{what}, {layers}, of the matrix products' rate",
                    figures[f"{name} share"],
                    goal,
                )
            )
    return claims


if __name__ == "__main__":
    sys.exit(main())
