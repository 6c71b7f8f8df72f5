"""Exact label scoring against its peers: equal scores first, then how much faster.

Every method gets the same model, the same texts and one thread, and tokenizes for itself:

- ours: `prompting.discrete` at its default batch size, each distinct text once, as the launcher
  does;
- lm-evaluation-harness: `HFLM.loglikelihood` with its logits cache, which also merges repeated
  texts and labels that differ in their last token only;
- lm-eval oneDNN: the same on the kernels that ours uses (`launcher.cpu_linear`), which shows what
  of the ratio is the method's own;
- loop: one sequence per text and label in plain transformers, sorted by length, padded to the
  batch's longest, the head computed only where a label's token is predicted;
- study: the prompt padded to 1024 tokens, all of it computed anew for each of three greedy tokens.

    OMP_NUM_THREADS=1 python -m benchmarks.scoring            # 12 to 15 minutes
    python -m benchmarks.scoring --quick                      # equality only, tiny models
"""

import argparse
import json
import logging
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.common import Claim, Timings, conclude, machine, timed
from benchmarks.scoring_peers import (
    POSITIONS,
    STUDY_TOKENS,
    Subject,
    answer_as_study,
    score_harness,
    score_harness_onednn,
    score_loop,
)
from data_prep.sample import make_sample
from data_prep.zones import FIRST_LEVEL_ZONES
from launcher.config import EvaluationSettings
from prompting import scorer
from prompting.discrete import Discrete
from prompting.pangu.configuration import PanguConfig
from prompting.pangu.modeling import PanguForCausalLM
from prompting.pangu.tokenization import PanguTokenizer, train_vocabulary
from prompting.question import Question
from prompting.settings import TEMPLATES, Demonstration, PromptSettings
from prompting.template import build_prompt

FIVE_LABELS = ["动画", "音乐舞蹈", "知识", "生活", "影视"]
DEMONSTRATIONS = [
    Demonstration(text="这段作画经费在燃烧", label="动画"),
    Demonstration(text="求背景音乐", label="音乐"),
    Demonstration(text="虽然没听懂但是大受震撼", label="知识"),
    Demonstration(text="大半夜的看饿了", label="美食"),
]
VOCABULARY = 40_000
TOLERANCE = 1e-4
ROUNDS = 3
COMPARED_SUMS = 100
"""Texts a round whose sums are compared besides what the launcher gets, which are normalised."""
CHATS = 2000


@dataclass(frozen=True)
class Setting:
    """A prompt, a model and how many texts each method is timed on in each round."""

    name: str
    prompt: PromptSettings
    labels: Sequence[str]
    model: str
    texts: Mapping[str, int]
    """Method to distinct texts a round; `ours` has the most, the others take its first."""
    batches: Mapping[str, Sequence[int]]
    """Sequences a batch to choose from, for the methods that have a choice."""
    copies: bool = False
    """Whether each text comes as often as it was sent."""


@dataclass
class Figures(Timings):
    """What one method did in one setting."""

    texts: int = 0
    tokens: int = 0
    head_rows: int = 0
    multiplications: int = 0
    compared: int = 0
    difference: float = 0.0
    batch: int = 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scoring", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="equality only, on tiny models")
    quick = parser.parse_args(arguments).quick
    torch.set_num_threads(1)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = os.environ.get("REFERENCE_DATA")
    tokenizer, texts, source = _data(None if quick or not folder else Path(folder))
    print(f"{source}; processor time of one thread, medians of {ROUNDS} rounds on different texts")
    results = {}
    for setting in _settings(quick):
        model = _model(setting.model, quick)
        asked = Question(setting.prompt, setting.labels, tokenizer, POSITIONS, seed=0)
        figures = run_setting(setting, model, asked, texts)
        results[setting.name] = figures
        _print_table(setting, figures, timings=not quick)
    if quick:
        print("scores are equal; no ratio is measured with --quick")
        return 0
    return conclude("scoring", _claims(results), _record(results, source))


def run_setting(
    setting: Setting, model: PreTrainedModel, asked: Question, texts: Sequence[str]
) -> dict[str, Figures]:
    """Run all methods in turn, on other texts each round, and compare their answers.

    Raises:
        AssertionError: a method's scores differ from ours.
    """
    rounds = _draw(texts, setting)
    subject = Subject(model, asked, _same_ids(asked, rounds))
    print(
        f"\n{setting.name}: lm-eval is given "
        + ("strings; their ids are ours" if subject.whole_strings else "our ids, not strings"),
        flush=True,
    )
    figures = {name: Figures() for name in setting.texts}
    for name in setting.texts.keys() & setting.batches.keys():
        sizes = setting.batches[name]
        figures[name].batch = _best_batch(name, subject, sizes, rounds[0][name])
    score_ours(subject, rounds[0]["ours"][:8], 0)
    for drawn in rounds:
        answers = {
            name: _measured(subject, name, drawn[name], figures[name]) for name in setting.texts
        }
        ours = dict(zip(drawn["ours"], answers.pop("ours"), strict=True))
        sums = _sums(subject, list(ours)[:COMPARED_SUMS])
        for name, answer in answers.items():
            if name == "study":
                _compare_tokens(subject, drawn[name], answer, figures[name])
            else:
                _compare_scores(name, drawn[name], answer, ours, sums, figures[name])
    return figures


def score_ours(subject: Subject, texts: Sequence[str], _: int) -> list[Tensor]:
    """Log-probabilities over the labels for each text, by the path that the launcher takes."""
    method = Discrete(
        subject.question, subject.model, EvaluationSettings().micro_batch_tokens, lockstep=False
    )
    index: dict[str, int] = {}
    places = [index.setdefault(text, len(index)) for text in texts]
    scores = torch.empty(len(index), len(subject.question.labels))
    for batch in method.score_batches(list(index)):
        scores[batch.rows] = method.scores(batch)
    return list(scores[places])


METHODS: dict[str, Callable[[Subject, Sequence[str], int], Any]] = {
    "lm-eval": score_harness,
    "lm-eval oneDNN": score_harness_onednn,
    "ours": score_ours,
    "loop": score_loop,
    "study": answer_as_study,
}


def _settings(quick: bool) -> list[Setting]:
    five = PromptSettings.model_validate({"template": "study_1"})
    zones = PromptSettings.model_validate(
        {"template": "few_shot", "demonstrations": DEMONSTRATIONS}
    )
    a: dict[str, Any] = {"prompt": five, "labels": FIVE_LABELS}
    b: dict[str, Any] = {"prompt": zones, "labels": FIRST_LEVEL_ZONES}
    if quick:
        few = {"lm-eval": 6, "ours": 9, "loop": 6, "lm-eval oneDNN": 3}
        one = {"lm-eval": (16,), "loop": (16,), "lm-eval oneDNN": (16,)}
        return [
            Setting("A chats PanGu", **a, model="PanGu", texts={**few, "study": 2}, batches=one,
                    copies=True),
            Setting("A PanGu", **a, model="PanGu", texts=few, batches=one),
            Setting("B PanGu", **b, model="PanGu", texts=few, batches=one),
            Setting("A Llama", **a, model="Llama", texts=few, batches=one),
            Setting("B Llama", **b, model="Llama", texts=few, batches=one),
        ]  # fmt: skip
    harness = (1, 2, 4, 8, 32)
    short = {"lm-eval": harness, "loop": (4, 16, 64), "lm-eval oneDNN": harness}
    long = {"lm-eval": harness, "loop": (2, 8, 32), "lm-eval oneDNN": harness}
    every = CHATS  # at most this many distinct texts, hence all of them
    return [
        Setting("A chats PanGu", **a, model="PanGu", batches=short, copies=True,
                texts={"lm-eval": every, "ours": every, "loop": 160, "study": 3,
                       "lm-eval oneDNN": 200}),
        Setting("A PanGu", **a, model="PanGu", batches=short,
                texts={"lm-eval": 200, "ours": 300, "loop": 80}),
        Setting("B PanGu", **b, model="PanGu", batches=long,
                texts={"lm-eval": 40, "ours": 400, "loop": 10, "lm-eval oneDNN": 20}),
        Setting("A Llama", **a, model="Llama", batches=short,
                texts={"lm-eval": 60, "ours": 300, "loop": 40}),
        Setting("B Llama", **b, model="Llama", batches=long,
                texts={"lm-eval": 10, "ours": 300, "loop": 5}),
    ]  # fmt: skip


def _claims(results: dict[str, dict[str, Figures]]) -> list[Claim]:
    goals = {
        ("A chats PanGu", "lm-eval"): 4.0,
        ("A chats PanGu", "loop"): 4.0,
        ("A chats PanGu", "study"): 50.0,
        ("B PanGu", "lm-eval"): 25.0,
        ("B PanGu", "loop"): 25.0,
    }
    return [
        Claim(f"scoring, {setting}, faster than {name}", _ratio(results[setting], name), goal)
        for (setting, name), goal in goals.items()
    ]


def _ratio(figures: dict[str, Figures], name: str) -> float:
    return figures[name].per_item("cpu") / figures["ours"].per_item("cpu")


def _data(folder: Path | None) -> tuple[PanguTokenizer, list[str], str]:
    """The tokenizer, `CHATS` texts with their natural repetitions, and where both are from."""
    generator = random.Random(0)
    if folder is not None:
        lines = (folder / "data/danmaku_unlabelled.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in generator.sample(lines, CHATS)]
        tokenizer = PanguTokenizer(folder / "vocab/pangu_vocab.model")
        return tokenizer, texts, f"{CHATS} real chats, PanGu's vocabulary of {len(tokenizer)}"
    sample = make_sample(seed=0)
    rows = [row for split in sample.splits.values() for row in split.to_pylist()]
    weights = [row["frequency"] for row in rows]
    texts = [row["text"] for row in generator.choices(rows, weights, k=CHATS)]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "vocab.model"
        words = [*(row["text"] for row in rows), *FIVE_LABELS, *FIRST_LEVEL_ZONES]
        prompts = [build_prompt(t, FIRST_LEVEL_ZONES).text_with("") for t in TEMPLATES.values()]
        train_vocabulary(words + prompts, path, 4000)
        tokenizer = PanguTokenizer(path)
    source = f"{CHATS} synthetic chats from the phrase bank (no REFERENCE_DATA)"
    return tokenizer, texts, f"{source}, a vocabulary of {len(tokenizer)} trained on it"


def _model(kind: str, quick: bool) -> PreTrainedModel:
    """Random weights, large enough that the labels' scores differ by whole nats."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32 if quick else 512,
        "num_hidden_layers": 2 if quick else 8,
        "num_attention_heads": 2 if quick else 8,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.3 if quick else 0.1,
        "tie_word_embeddings": True,
        # The peers ask for no cache; without this they would fill one in vain.
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    if kind == "PanGu":
        return PanguForCausalLM(PanguConfig(**shape)).eval()
    gated = 8 * shape["hidden_size"] // 3 // 16 * 16  # as many weights as 4 * hidden ungated
    return LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=gated)).eval()


def _draw(texts: Sequence[str], setting: Setting) -> list[dict[str, list[str]]]:
    """For each round, texts for each method; no text is in two rounds."""
    distinct = list(dict.fromkeys(texts))
    random.Random(0).shuffle(distinct)
    copies = Counter(texts)
    rounds = []
    for turn in range(ROUNDS):
        own = distinct[turn::ROUNDS]
        drawn = {name: own[:count] for name, count in setting.texts.items()}
        if setting.copies:
            drawn = {
                name: [text for text in part for _ in range(1 if name == "study" else copies[text])]
                for name, part in drawn.items()
            }
        rounds.append(drawn)
    return rounds


def _same_ids(asked: Question, rounds: Sequence[dict[str, list[str]]]) -> bool:
    """Whether the ids of whole strings, as the harness makes them, are those of our pieces."""
    texts = list({text: None for drawn in rounds for text in drawn["lm-eval"]})
    prompts = [asked.prompt.text_with(text) for text in texts]
    encoded = [asked.encoded.head + suffix for suffix in asked.suffixes(texts)]
    encode = asked.tokenizer.encode_batch
    return encode(prompts) == encoded and all(
        encode([prompt + word for prompt in prompts]) == [[*prompt, *ids] for prompt in encoded]
        for word, ids in zip(asked.words, asked.trie.words, strict=True)
    )


def _best_batch(name: str, subject: Subject, sizes: Sequence[int], texts: Sequence[str]) -> int:
    """The fastest of `sizes` on a few of the texts."""
    if len(sizes) == 1:
        return sizes[0]
    few = texts[: 30 if len(subject.question.words) < 10 else 3]
    METHODS[name](subject, few[:1], sizes[0])
    return min(sizes, key=lambda size: timed(lambda: METHODS[name](subject, few, size))[1].cpu)


def _measured(subject: Subject, name: str, texts: Sequence[str], figures: Figures) -> Any:
    work = partial(METHODS[name], subject, texts, figures.batch)
    with _counting(subject.model, figures):
        result, spent = timed(work)
    figures.seconds.append((spent, len(texts)))
    figures.texts += len(texts)
    return result


@contextmanager
def _counting(model: PreTrainedModel, figures: Figures) -> Iterator[None]:
    """Count tokens in, rows of the head and multiplications with weights, padding included."""
    head = model.get_output_embeddings()

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, nn.Linear):
            rows = inputs[0].numel() // module.in_features
            figures.multiplications += rows * module.in_features * module.out_features
            figures.head_rows += rows if module is head else 0
        else:
            figures.tokens += inputs[0].numel()

    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    counted = [*linear, model.get_input_embeddings()]
    hooks = [module.register_forward_pre_hook(count) for module in counted]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def _sums(subject: Subject, texts: Sequence[str]) -> dict[str, Tensor]:
    """Our sums of the label tokens' log-probabilities, before they are normalised."""
    asked, model = subject.question, subject.model
    method = Discrete(asked, model, EvaluationSettings().micro_batch_tokens, lockstep=False)
    prefix = scorer.compute_prefix(model, asked.encoded.head)
    sums: dict[str, Tensor] = {}
    for batch in method.score_batches(texts):
        own = scorer.score_words(model, prefix, batch.ids, asked.trie)
        sums |= {texts[row]: own[place] for place, row in enumerate(batch.rows)}
    return sums


def _compare_scores(
    name: str,
    texts: Sequence[str],
    answer: Sequence[Tensor],
    ours: dict[str, Tensor],
    sums: dict[str, Tensor],
    figures: Figures,
) -> None:
    for text, theirs in zip(texts, answer, strict=True):
        pairs = [(theirs.log_softmax(dim=0), ours[text])]
        if text in sums:
            pairs.append((theirs, sums[text]))
        for expected, seen in pairs:
            gap = float(((seen - expected).abs() / (1 + expected.abs())).max())
            assert gap <= TOLERANCE, f"{name}, {text!r}: scores {expected}, ours {seen}"
            figures.difference = max(figures.difference, gap)
        figures.compared += len(theirs)


def _compare_tokens(
    subject: Subject, texts: Sequence[str], answer: Sequence[list[int]], figures: Figures
) -> None:
    asked, model = subject.question, subject.model
    with torch.inference_mode():
        prefix = scorer.compute_prefix(model, asked.encoded.head)
        for suffix, theirs in zip(asked.suffixes(texts), answer, strict=True):
            ids = torch.tensor([suffix])
            own = scorer.generate(model, prefix, ids, new_tokens=STUDY_TOKENS, lockstep=False)
            # Ours stops at the end of the text.
            assert theirs[: len(own[0])] == own[0], f"study: tokens {theirs}, ours {own[0]}"
            ended = theirs[len(own[0]) : len(own[0]) + 1]
            assert ended in ([], [model.generation_config.eos_token_id]), f"{theirs}, ours {own}"
            figures.compared += STUDY_TOKENS


def _print_table(setting: Setting, figures: dict[str, Figures], timings: bool) -> None:
    kind = "as sent" if setting.copies else "distinct texts"
    print(f"{setting.prompt.template.name}, {len(setting.labels)} labels, {kind}")
    print(
        "method          texts  batch  tokens/text  head rows  Mmult  (ratio)   max diff"
        + ("  cpu ms  wall ms  texts/s   times ours" if timings else "")
    )
    ours = figures["ours"]
    for name, own in figures.items():
        each = own.multiplications / own.texts
        line = (
            f"{name:15}{own.texts:6}{own.batch or '':>7}{own.tokens / own.texts:13.1f}"
            f"{own.head_rows / own.texts:11.1f}{each / 1e6:7.0f}"
            f"{each / (ours.multiplications / ours.texts):9.2f}{own.difference:11.1e}"
        )
        if timings:
            spent = own.per_item("cpu")
            line += f"{spent:8.1f}{own.per_item('wall'):9.1f}{1e3 / spent:9.2f}"
            line += f"{_ratio(figures, name):13.2f}"
        print(line)


def _record(results: dict[str, dict[str, Figures]], source: str) -> dict[str, Any]:
    packages = ["torch", "transformers", "lm_eval", "sentencepiece", "jieba"]
    settings = {
        setting: {
            name: {
                "texts": own.texts,
                "batch": own.batch or None,
                "cpu_ms_per_text": own.per_item("cpu"),
                "wall_ms_per_text": own.per_item("wall"),
                "cpu_seconds_per_round": [spent.cpu for spent, _ in own.seconds],
                "times_ours": _ratio(figures, name),
                "tokens_per_text": own.tokens / own.texts,
                "head_rows_per_text": own.head_rows / own.texts,
                "multiplications_per_text": own.multiplications / own.texts,
                "requests_compared": own.compared,
                "largest_difference": own.difference,
            }
            for name, own in figures.items()
        }
        for setting, figures in results.items()
    }
    return {"machine": machine(packages), "data": source, "settings": settings}


if __name__ == "__main__":
    sys.exit(main())
