"""The 2.6B model at its true size, on a machine of 2 cores and 24 GiB without a GPU.

A generated checkpoint of exactly its shape is converted and loaded on two ranks under ZeRO 3; they
score 20 chats with the study's four prompts and take 3 steps of prompt tuning; one process that
leaves the weights in their files scores the same, and reads the tuned prompt back. Then eight ranks
train on a smaller shape as one does. Every part is the launcher's own command; memory is the
proportional set size of all processes together, sampled five times a second, so a page of a mapped
file counts once. The weights are random: scores say nothing but that they are equal.

    python -m benchmarks.full_size                     # 40 minutes, 17 GiB of memory, 12 of disk
    python -m benchmarks.full_size --part eight_ranks  # 350M on eight ranks: 5 minutes, 9 GiB
    python -m benchmarks.full_size --size nano         # all of it in miniature; no figures are kept
"""

import argparse
import json
import os
import random
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from benchmarks.common import Claim, conclude, machine
from benchmarks.memory import GIB, Usage, run
from benchmarks.pangu_checkpoint import megatron_tensors, write_megatron
from benchmarks.scoring import FIVE_LABELS
from data_prep.dataset import SCHEMA, Dataset, write_dataset
from data_prep.sample import make_sample
from launcher.predictions import read_predictions
from prompting.pangu.configuration import PanguConfig
from prompting.pangu.tokenization import PanguTokenizer, train_vocabulary
from prompting.settings import TEMPLATES

ROOT = Path(__file__).resolve().parents[1]
SHAPES: dict[str, dict[str, int]] = {
    "2.6b": {},
    "350m": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "nano": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
}
PARAMETERS, TENSORS = 2_625_295_360, 517
"""Of the published 2.6B checkpoint."""
PROMPTS = ["study_1", "study_2", "study_3", "study_4"]
CHATS, STEPS, BATCH = 20, 3, 4
TOLERANCE = 2e-3
"""Log-probabilities of labels, one process against two: sums of some hundred rounded products."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_size", description=__doc__)
    parser.add_argument("--part", choices=["full", "eight_ranks", "both"], default="both")
    parser.add_argument("--size", choices=SHAPES, default="2.6b")
    parser.add_argument("--work", type=Path, help="folder to work in; default: a temporary one")
    options = parser.parse_args(arguments)
    eight = "nano" if options.size == "nano" else "350m"
    with tempfile.TemporaryDirectory(dir=options.work, prefix="full_size_") as scratch:
        folder = Path(scratch)
        claims: list[Claim] = []
        figures: dict[str, Any] = {}
        if options.part in ("full", "both"):
            _full(folder / "full", options.size, claims, figures)
        if options.part in ("eight_ranks", "both"):
            _eight_ranks(folder / "eight", eight, claims, figures)
    figures["machine"] = machine(["torch", "deepspeed", "transformers", "peft"])
    if options.size != "2.6b":
        for claim in claims:
            print(claim.line())
        print(json.dumps(figures, ensure_ascii=False, indent=2))
        print(f"nothing is kept of size {options.size}")
        return 0
    name = "full_size" if options.part != "eight_ranks" else "full_size_eight_ranks"
    return conclude(name, claims, figures)


def _full(folder: Path, size: str, claims: list[Claim], figures: dict[str, Any]) -> None:
    bench = _Bench(folder, size)
    converted = bench.convert()
    runs = {
        prompt: bench.run_ranks(_scoring(prompt), f"two_{prompt}", ranks=2) for prompt in PROMPTS
    }
    tuned = bench.run_ranks(_tuning(), "two_tuned", ranks=2)
    adapter = bench.runs / "two_tuned" / "adapter"
    mapped = {"model": {"weights": "memory_mapped"}}
    one = bench.run_ranks(_scoring("study_3") | mapped, "one_study_3", ranks=1)
    again = _tuning(epochs=0) | mapped
    again["tuning"] |= {"init_from": str(adapter)}
    reloaded = bench.run_ranks(again, "one_tuned", ranks=1)
    sharded_peak = max(usage.peak for usage in (*runs.values(), tuned))
    mapped_peak = max(one.peak, reloaded.peak)
    claims += [
        Claim(f"{size}: peak memory of the conversion", converted.peak / GIB, 3, True, " GiB"),
        Claim(f"{size}: peak of two ranks under ZeRO 3", sharded_peak / GIB, 16, True, " GiB"),
        Claim(f"{size}: peak of one memory-mapped process", mapped_peak / GIB, 8, True, " GiB"),
    ]
    figures[size] = {
        "parameters": bench.parameters,
        "tensors": bench.tensors,
        "chats": bench.source,
        "convert": _figures(converted),
        "score_two_ranks": {name: _figures(usage) for name, usage in runs.items()},
        "tune_two_ranks": _figures(tuned) | {"log": bench.log("two_tuned")},
        "score_one_mapped": _figures(one),
        "reload_one_mapped": _figures(reloaded),
        "largest_difference": {
            "scores": bench.compare("two_study_3", "one_study_3"),
            "tuned": bench.compare("two_tuned", "one_tuned"),
        },
    }
    shutil.rmtree(folder)


def _eight_ranks(folder: Path, size: str, claims: list[Claim], figures: dict[str, Any]) -> None:
    bench = _Bench(folder, size)
    bench.convert()
    counted = {
        ranks: bench.run_ranks(
            _tuning(), f"ranks_{ranks}", ranks=ranks, module="benchmarks.full_size_rank"
        )
        for ranks in (1, 8)
    }
    losses = [[line["loss"] for line in bench.log(f"ranks_{n}") if "loss" in line] for n in (1, 8)]
    assert len(losses[0]) >= STEPS, losses
    difference = float(np.max(np.abs(np.array(losses[0]) / np.array(losses[1]) - 1)))
    assert difference < 1e-4, f"eight ranks have other losses than one: {losses}"
    held = [
        json.loads((bench.runs / "ranks_8" / f"held_{rank}.json").read_text()) for rank in range(8)
    ]
    share = bench.parameters * 4 / 8 + held[0]["largest"]
    most = max(rank["most"] for rank in held)
    claims.append(
        Claim(
            f"{size} on 8 ranks: parameters of a rank against 1/8 and the largest gathered weight",
            most / share,
            1.15,
            True,
        )
    )
    figures["eight_ranks"] = {
        "shape": size,
        "parameters": bench.parameters,
        "bytes_of_a_rank": most,
        "bytes_of_an_eighth": bench.parameters * 4 // 8,
        "bytes_of_the_largest_weight": held[0]["largest"],
        "gathered_bytes_a_rank": held[0]["gathered"],
        "losses": {"1": losses[0], "8": losses[1]},
        "relative_difference": difference,
        "one": _figures(counted[1]),
        "eight": _figures(counted[8]),
    }
    shutil.rmtree(folder)


class _Bench:
    """A folder with a generated checkpoint, chats, and the runs on them."""

    def __init__(self, folder: Path, size: str) -> None:
        self.folder, self.runs = folder, folder / "runs"
        folder.mkdir(parents=True)
        self.config = PanguConfig(**SHAPES[size])  # type: ignore[arg-type]
        chats, labels, self.source, vocabulary = _chats(folder, size)
        if size == "nano":
            self.config.vocab_size = len(PanguTokenizer(vocabulary))
        tensors = [*megatron_tensors(self.config)]
        self.tensors = len(tensors)
        self.parameters = sum(shape.numel() for _, shape, _ in tensors)
        if size == "2.6b":
            assert (self.parameters, self.tensors) == (PARAMETERS, TENSORS)
        needed, free = 4.2 * self.parameters + 2**28, shutil.disk_usage(folder).free
        if free < needed:
            sys.exit(f"--work: {free / GIB:.1f} GiB are free, {needed / GIB:.1f} are needed")
        _say(f"{size}: writing {self.tensors} tensors, {self.parameters:,} parameters")
        write_megatron(folder / "megatron", self.config, parts=2)
        self.vocabulary = vocabulary
        rows = [
            {"id": str(row), "text": text, "label": label, "frequency": 1}
            for row, (text, label) in enumerate(zip(chats, labels, strict=True))
        ]
        tables = {
            split: pa.Table.from_pylist(part, schema=SCHEMA)
            for split, part in (("train", rows[CHATS:]), ("dev", rows[:CHATS]))
        }
        write_dataset(
            folder / "data", Dataset(tuple(FIVE_LABELS), tables, {"source": self.source}, None, {})
        )

    def convert(self) -> Usage:
        """Megatron's two parts into safetensors; they are deleted afterwards."""
        _say("converting")
        command = [sys.executable, "-m", "prompting.pangu", "convert"]
        command += [str(self.folder / "megatron"), str(self.folder / "model")]
        command += ["--vocab", str(self.vocabulary), "--heads"]
        command += [str(self.config.num_attention_heads)]
        command += ["--vocab-size", str(self.config.vocab_size)]
        usage = run(command, _environment(1), self.folder)
        shutil.rmtree(self.folder / "megatron")
        return usage

    def run_ranks(
        self, values: dict[str, Any], name: str, *, ranks: int, module: str = ""
    ) -> Usage:
        """A launched run of `values`; of `module` in place of the launcher's entry."""
        _say(f"{name}: {ranks} rank{'s' * (ranks > 1)}")
        shared: dict[str, Any] = {
            "run": {"name": name, "dir": str(self.runs)},
            "data": {"path": str(self.folder / "data"), "evaluate": ["dev"]},
            "evaluation": {"micro_batch_tokens": 256},
        }
        model = {"path": str(self.folder / "model"), "precision": "fp32"}
        whole = shared | values | {"model": model | values.get("model", {})}
        if "weights" not in whole["model"]:
            whole["parallel"] = whole.get("parallel", {}) | {"zero": 3 if ranks > 1 else 0}
        config = self.folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(whole, allow_unicode=True), encoding="utf-8")
        entry = ["-m", module] if module else [str(ROOT / "launcher" / "run.py")]
        command = [sys.executable, *entry]
        if ranks > 1:
            command = [str(Path(sys.executable).with_name("deepspeed"))]
            command += ["--num_accelerators", str(ranks), "--master_port", str(_free_port())]
            command += ["--log_level", "error", *(["--module"] if module else []), entry[-1]]
        usage = run([*command, "--config", str(config)], _environment(ranks), self.folder)
        peak = usage.peak / GIB
        loaded = next((line for line in usage.output.splitlines() if line[:6] == "loaded"), "")
        _say(f"{name}: {usage.seconds:.0f} s, {peak:.1f} GiB together; {loaded}")
        return usage

    def log(self, name: str) -> list[dict[str, Any]]:
        """The lines of a run's training log."""
        lines = (self.runs / name / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def compare(self, one: str, other: str) -> float:
        """The largest difference between two runs' scores of the chats.

        Raises:
            AssertionError: it is more than rounding.
        """
        scores = []
        for name in (one, other):
            found = read_predictions(self.runs / name / "predictions" / "dev.parquet")
            assert found.scores is not None and len(found.ids) == CHATS
            scores.append(found.scores)
        difference = float(np.abs(scores[0] - scores[1]).max())
        assert difference < TOLERANCE, f"{one} and {other} differ by {difference:.1e}"
        assert float(np.ptp(scores[0], axis=1).max()) > 10 * TOLERANCE, "all labels score alike"
        return difference


def _scoring(prompt: str) -> dict[str, Any]:
    return {"method": "prompting.discrete", "prompt": {"template": prompt}}


def _tuning(epochs: int = 1) -> dict[str, Any]:
    template = TEMPLATES["study_3"].model_dump(mode="json")
    template |= {"name": "soft", "question": "{soft:20:弹幕分类: }{text}"}
    return {
        "method": "prompting.tuning",
        "prompt": {"template": template},
        "tuning": {},
        "train": {
            "epochs": epochs,
            "global_batch": BATCH,
            "micro_batch_tokens": 128,
            "checkpoint_every": 1,
            "dev_examples": BATCH,
            "keep": "last",
        },
        "parallel": {"activation_checkpointing": True},
    }


def _chats(folder: Path, size: str) -> tuple[list[str], list[int], str, Path]:
    """Texts, labels drawn at random, where they are from, and a vocabulary."""
    count, generator = CHATS + STEPS * BATCH, random.Random(0)
    reference = os.environ.get("REFERENCE_DATA")
    path = folder / "vocab.model"
    if reference and size != "nano":
        lines = (Path(reference) / "data/danmaku_unlabelled.jsonl").read_text(encoding="utf-8")
        texts = [json.loads(line)["text"] for line in generator.sample(lines.splitlines(), count)]
        shutil.copy(Path(reference) / "vocab/pangu_vocab.model", path)
        source = f"{count} real chats, PanGu's vocabulary"
    else:
        rows = [row for table in make_sample(seed=0).splits.values() for row in table.to_pylist()]
        texts = [row["text"] for row in generator.sample(rows, count)]
        corpus = [*(row["text"] for row in rows), *FIVE_LABELS]
        if size != "nano":
            # As many pieces as the model has rows, or nearly: a character each.
            signs = [chr(sign) for sign in (*range(0x4E00, 0x9FA6), *range(0xAC00, 0xD7A4))]
            signs += [chr(sign) for sign in range(0x3400, 0x4DB6)]
            corpus += ["".join(signs[row : row + 50]) for row in range(0, len(signs), 50)]
        train_vocabulary(corpus, path, 2000 if size == "nano" else 40_000)
        source = f"{count} synthetic chats from the phrase bank, a vocabulary of single characters"
    labels = [generator.randrange(len(FIVE_LABELS)) for _ in texts]
    return texts, labels, source, path


def _environment(ranks: int) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // ranks)
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
    }


def _figures(usage: Usage) -> dict[str, Any]:
    return {
        "seconds": round(usage.seconds, 1),
        "cpu_seconds": round(usage.cpu_seconds, 1),
        "peak_gib": round(usage.peak / GIB, 2),
        "private_peak_gib": round(usage.private_peak / GIB, 2),
        "largest_processes_gib": [round(held / GIB, 2) for held in usage.ranks[:8]],
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _say(line: str) -> None:
    print(f"- {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
