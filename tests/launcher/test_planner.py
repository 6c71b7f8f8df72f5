"""The planner's counts against sums by hand, its choices against made-up hardware, and `--plan`."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from data_prep.dataset import read_dataset
from launcher import machine, planner, run
from launcher.config import REDUCE_BUCKET, Config, load_config, parse_config
from launcher.counting import Pass, count
from launcher.errors import InputError
from launcher.footprint import Footprint
from launcher.hardware import CARDS, LINKS
from launcher.planner import Hardware, Plan, compare, estimate
from prompting.footprint import of_discrete, of_tuning

GB = 1e9
MODEL = 2_600_000_000
ONE_PASS = Pass(
    flops=1e13,
    streamed=1e10,
    operations=1000,
    activations=4_000_000_000,
    with_gradients=4_000_000_000,
    logits=500_000_000,
    activations_gathered=4_300_000_000,
    gathered=2 * MODEL,
    gathers=400,
)
FROZEN = Footprint(
    precision="bf16",
    frozen=MODEL,
    trained=0,
    replicated=50_000,
    small=1_000_000,
    largest=100_000_000,
    vocabulary=40_000,
    prefix=10_000_000,
    heaviest={
        False: ONE_PASS,
        True: replace(ONE_PASS, activations=5_000_000_000, activations_gathered=5_300_000_000),
    },
    passes=2.0,
    later=1.0,
    work=1.5,
    examples=64,
    trains=True,
)
TRAINED = replace(FROZEN, frozen=0, trained=MODEL, replicated=0)


def machine_of(card: str, ranks: int, gigabytes: float, link: str = "PCIe 4") -> Hardware:
    described = replace(CARDS[card], memory=gigabytes * GB)
    return Hardware(described, ranks, LINKS[link], 100 * GB)


def config_of(**parallel: Any) -> Config:
    return parse_config(
        {
            "method": "prompting.tuning",
            "run": {"name": "planned"},
            "data": {"path": "unused"},
            "parallel": parallel,
        }
    )


def shrinking(needs: Footprint) -> planner.Footprints:
    """Activations grow with the micro batch, and checkpointing leaves a quarter of them."""

    def footprint(config: Config, ranks: int) -> Footprint:
        share = config.train.micro_batch_tokens / 4096
        if config.parallel.activation_checkpointing:
            share /= 4
        passes = {
            kind: replace(
                own,
                activations=int(own.activations * share),
                with_gradients=int(own.with_gradients * share),
                activations_gathered=int(own.activations_gathered * share),
                logits=int(own.logits * share),
                flops=own.flops * (4 / 3 if config.parallel.activation_checkpointing else 1),
            )
            for kind, own in needs.heaviest.items()
        }
        return replace(needs, heaviest=passes)

    return footprint


class Mlp(nn.Module):
    """Two linear layers without biases, around a GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(300, 1000, bias=False), nn.Linear(1000, 200, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.gelu(self.up(states)))


def test_bytes_and_flops_of_a_pass_are_those_by_hand():
    with torch.device("meta"):
        module, states = Mlp(), torch.empty(7, 300)
    forward = 2 * 7 * (300 * 1000 + 1000 * 200)

    # Without gradients the widest moment is that of the GELU's input and output.
    with torch.no_grad():
        seen = count(module, lambda: module(states))
    assert (seen.flops, seen.activations) == (forward, 4 * 7 * 2000)
    assert (seen.gathers, seen.gathered) == (2, 300 * 1000 + 1000 * 200)
    largest = max(4 * 7 * 2000, 4 * 7 * (300 + 1000) + 4 * 300 * 1000)
    assert 4 * 300 * 1000 < seen.activations_gathered <= largest

    # The first layer's gradient comes last, when of the activations only its own input's are left;
    # torch sums it up in the tensor that it then is.
    seen = count(module, lambda: module(states).sum().backward())
    gradients = 4 * (300 * 1000 + 1000 * 200)
    assert gradients < seen.with_gradients < gradients + 4 * 7 * 3000
    assert seen.activations < seen.with_gradients

    # Frozen, from an input that wants a gradient: only the GELU's input has to be kept.
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    states.requires_grad_(True)
    seen = count(module, lambda: module(states).sum().backward())
    assert seen.flops == 2 * forward
    # Backward: the gradient of the output is one number repeated, that of the GELU's output and
    # input stand beside the GELU's input.
    assert seen.activations == pytest.approx(4 * 7 * 3000, rel=0.01)
    assert seen.gathers == 4

    # Under ZeRO 3 linear layers keep their inputs: of a first block, while the second is gone
    # through backwards, the GELU's output besides its input.
    with torch.device("meta"):
        layers = [(300, 1000), (1000, 300), (300, 1000), (1000, 300)]
        one, two, three, four = (nn.Linear(*sizes) for sizes in layers)
    blocks = nn.Sequential(one, nn.GELU(), two, three, nn.GELU(), four)
    blocks.requires_grad_(False)
    plain, sharded = (
        count(blocks, lambda: blocks(states).sum().backward(), sharded=kind)
        for kind in (False, True)
    )
    assert sharded.activations - plain.activations == 4 * 7 * (1000 + 300)


def test_checkpointing_is_counted_in_memory_and_arithmetic():
    with torch.device("meta"):
        layers = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 4096), nn.GELU(), nn.Linear(4096, 64)) for _ in range(4)
        )
        states = torch.empty(32, 64, requires_grad=True)
    layers.requires_grad_(False)

    def step(recompute: bool) -> None:
        x = states
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        x.sum().backward()

    plain, saved = count(layers, lambda: step(False)), count(layers, lambda: step(True))
    forward = 4 * 2 * 32 * 2 * 64 * 4096
    assert plain.flops == 2 * forward
    # The last product of each layer need not be computed again, but is.
    assert saved.flops == pytest.approx(3 * forward, rel=0.2)
    wide = 4 * 32 * 4096
    assert plain.activations == plain.with_gradients > 4 * wide
    assert saved.activations < 4 * wide


def test_attention_is_counted_without_its_matrix_of_shares():
    with torch.device("meta"):
        query, key, value = (torch.empty(2, 4, tokens, 16) for tokens in (50, 70, 70))
        mask = torch.empty(1, 1, 50, 70)
    attend = torch.nn.functional
    seen = count(
        nn.Module(),
        lambda: attend.scaled_dot_product_attention(query, key, value, attn_mask=mask),
    )
    assert seen.flops == 2 * 2 * 4 * 50 * 70 * (16 + 16)
    assert seen.activations < 4 * 2 * 4 * 50 * 70


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("zero", [0, 3])
def test_a_frozen_model_has_weights_and_no_optimizer(zero: int, ranks: int):
    plan = estimate(FROZEN, machine_of("A100 40GB", ranks, 40), zero=zero)
    whole = 2 * MODEL
    small = 2_000_000
    assert plan.device["weights"] == (whole if zero == 0 else (whole - small) / ranks + small)
    assert plan.device["optimizer"] == 50_000 * 16
    assert plan.device["gradients"] == 0
    assert plan.device["logits"] + plan.device["prefix"] + plan.device["activations"] == (
        4_000_000_000 if zero == 0 else 5_000_000_000
    )
    weights = 2 * 2 * 2 * MODEL * (ranks - 1) / ranks if zero == 3 else 0
    prompt = 2 * 4 * 50_000 * (ranks - 1) / ranks
    assert plan.sent == pytest.approx(weights + prompt)


def test_what_a_trained_model_needs_is_shared_stage_by_stage():
    hardware = machine_of("A100 80GB", 8, 80)
    small_batch = replace(
        TRAINED,
        heaviest={k: replace(v, activations=600_000_000) for k, v in TRAINED.heaviest.items()},
    )
    once = {k: replace(v, with_gradients=4_500_000_000) for k, v in TRAINED.heaviest.items()}
    single = estimate(replace(TRAINED, later=0.0, heaviest=once), hardware, zero=1).device
    assert single["gradients"] == 2 * MODEL - 4e9, "in a first micro batch they come as others go"
    large = replace(TRAINED, later=0.0, heaviest={
        k: replace(v, activations=v.activations + int(2e9), with_gradients=v.activations + int(3e9))
        for k, v in once.items()
    })  # fmt: skip
    assert estimate(large, hardware, zero=1).device["gradients"] == 1e9
    plans = [estimate(TRAINED, hardware, zero=zero) for zero in range(4)]
    weights, states = 2 * MODEL, 12 * MODEL  # AdamW's copy and moments are float32
    assert [plan.device["weights"] for plan in plans[:3]] == [weights] * 3
    assert plans[3].device["weights"] == (weights - 2_000_000) / 8 + 2_000_000
    assert [plan.device["optimizer"] for plan in plans] == [states, *[states / 8] * 3]
    bucket = 2 * REDUCE_BUCKET
    assert plans[0].device["gradients"] == plans[1].device["gradients"] == 2 * MODEL
    # With small activations the update is the worse moment: gradients joined to be sent.
    joined = estimate(small_batch, hardware, zero=0).device
    assert joined["gradients"] == 2 * MODEL + 2 * 500_000_000 and joined["activations"] == 0
    assert plans[2].device["gradients"] == 2 * MODEL / 8 + 1.5 * bucket
    assert plans[3].device["gradients"] == 2 * MODEL / 8 + bucket * (2.5 + 1 / 8)
    totals = [plan.total for plan in plans]
    assert totals == sorted(totals, reverse=True)
    # With few activations the update, with its copies, is the worse moment.
    update = estimate(small_batch, machine_of("A100 80GB", 1, 80), zero=1)
    assert update.device["activations"] == 0
    assert update.device["gradients"] == 2 * 4 * MODEL
    # Stages 0 to 2 send gradients twice round the ring; 3 once, and weights for every pass.
    ring = 7 / 8
    assert [plan.sent for plan in plans[:3]] == [2 * ring * 2 * MODEL] * 3
    assert plans[3].sent == ring * (2 * 2 * 2 * MODEL + 2 * MODEL)


def test_offload_moves_what_it_says_to_the_host():
    hardware = machine_of("A100 80GB", 8, 80)
    plain = estimate(TRAINED, hardware, zero=3)
    moved = estimate(TRAINED, hardware, zero=3, offload=True)
    assert moved.device["optimizer"] == 0
    assert moved.host == pytest.approx(
        plain.device["optimizer"] + 4 * MODEL / 8 + (2 * MODEL - 2_000_000) / 8
    )
    assert moved.seconds > plain.seconds


def test_the_fastest_plan_that_fits_is_chosen():
    def chosen(
        gigabytes: float, needs: Footprint = FROZEN, ranks: int = 8, **parallel: Any
    ) -> Plan | None:
        config = config_of(**parallel)
        plans = compare(config, shrinking(needs), machine_of("RTX 3090", ranks, gigabytes))
        return planner.choose(config, plans)

    def settings(plan: Plan | None) -> tuple[int, bool, bool] | None:
        return (plan.zero, plan.offload, plan.checkpointing) if plan else None

    # 5.2 GB of weights, 4 of activations, 1.5 that are the card's own.
    assert settings(chosen(11)) == (0, False, False)
    assert settings(chosen(10)) == (3, False, False)
    assert settings(chosen(10, zero=0)) is None
    assert settings(chosen(10, zero=0, activation_checkpointing=True)) == (0, False, True)
    assert settings(chosen(6.5)) is None
    assert settings(chosen(6.5, activation_checkpointing=True)) == (3, False, True)
    # Also a stage that is another's equal, where it is asked for.
    assert settings(chosen(11, zero=2)) == (2, False, False)
    assert settings(chosen(24, ranks=1, zero=3)) == (3, False, False)
    # Stage 1 sends as much as 0 and shares the update.
    assert settings(chosen(100, TRAINED)) == (1, False, False)
    assert settings(chosen(18, TRAINED)) == (2, False, False)


def test_a_refusal_names_the_smallest_change_that_fits():
    def refused(gigabytes: float, ranks: int = 8, is_cpu: bool = False, **parallel: Any) -> str:
        config, hardware = config_of(**parallel), machine_of("RTX 3090", ranks, gigabytes)
        hardware = replace(hardware, card=replace(hardware.card, is_cpu=is_cpu))
        footprints = shrinking(FROZEN)
        plans = compare(config, footprints, hardware)
        assert planner.choose(config, plans) is None
        error = str(planner.refusal(config, plans, footprints, hardware))
        assert "\n" not in error
        return error

    assert refused(10, zero=0) == (
        "parallel: parallel.zero=0 parallel.offload=none parallel.activation_checkpointing=false "
        "takes 9.2 GB a rank, 0.7 GB more than there are: use "
        "parallel.activation_checkpointing=true"
    )
    assert refused(7).endswith("are: use parallel.activation_checkpointing=true")
    assert refused(7.5, ranks=1).endswith("use parallel.offload=cpu")
    assert refused(2.5, ranks=1).endswith(
        "use train.micro_batch_tokens=2048 parallel.offload=cpu "
        "parallel.activation_checkpointing=true"
    )
    # Nothing can be moved away from a CPU.
    assert refused(5.8, ranks=1, is_cpu=True).endswith(
        "use 2 ranks parallel.activation_checkpointing=true"
    )
    assert "use cards with" in refused(1.5)


def test_auto_takes_the_stage_that_the_planner_chooses():
    module: Any = SimpleNamespace(
        __name__="made", footprint=lambda config, _, ranks: shrinking(FROZEN)(config, ranks)
    )
    config = config_of()
    assert planner.stage(config, module, None, machine_of("A10G", 8, 24)) == 0
    assert planner.stage(config, module, None, machine_of("A10G", 8, 10)) == 3
    with pytest.raises(
        InputError, match=r"parallel: .* use parallel.activation_checkpointing=true; or give"
    ):
        planner.stage(config, module, None, machine_of("A10G", 8, 6.5))


def test_a_method_without_shapes_and_a_precision_without_hardware_are_refused():
    with pytest.raises(InputError, match=r"method made: .*leave --plan out"):
        planner.remembered(SimpleNamespace(__name__="made"), None)  # type: ignore[arg-type]
    config = config_of().model_copy(
        update={"model": config_of().model.model_copy(update={"precision": "bf16"})}
    )
    with pytest.raises(InputError, match=r"model.precision: bf16, but a V100 16GB .*fp32 and fp16"):
        machine.with_precision(config, CARDS["V100 16GB"])
    assert machine.with_precision(config_of(), CARDS["V100 16GB"]).model.precision == "fp16"
    assert machine.with_precision(config_of(), CARDS["H100"]).model.precision == "bf16"


@pytest.fixture(scope="module")
def described(pangu: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder before its weights are there."""
    folder = tmp_path_factory.mktemp("described") / "pangu"
    shutil.copytree(pangu, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_a_prompts_footprint_follows_the_config(data: Path, described: Path):
    values = {
        "method": "prompting.tuning",
        "run": {"name": "planned"},
        "data": {"path": str(data)},
        "model": {"path": str(described), "precision": "fp32"},
        "prompt": {"template": "study_2"},
        "tuning": {"length": 7},
        "train": {"global_batch": 32, "micro_batch_tokens": 512},
    }
    dataset = read_dataset(data)
    one = of_tuning(parse_config(values), dataset, 1)
    assert one.trained == 0 and one.replicated == 7 * 32
    two = of_tuning(parse_config(values), dataset, 2)
    assert two.work == pytest.approx(one.work / 2, rel=0.2)
    assert two.examples == one.examples == 32
    fewer = of_tuning(parse_config(values, ["train.micro_batch_tokens=128"]), dataset, 1)
    assert fewer.passes > 2 * one.passes
    assert fewer.heaviest[False].activations < 0.5 * one.heaviest[False].activations
    saved = parse_config(values, ["parallel.activation_checkpointing=true"])
    again = of_tuning(saved, dataset, 1)
    assert again.heaviest[False].activations < one.heaviest[False].activations
    assert again.heaviest[False].flops > 1.2 * one.heaviest[False].flops


def test_flops_of_scoring_are_those_that_torch_counts(data: Path, pangu: Path):
    """The same batch on real weights, counted by torch's own counter."""
    from torch.utils.flop_counter import FlopCounterMode

    from prompting import discrete

    values = {
        "method": "prompting.discrete",
        "run": {"name": "planned"},
        "data": {"path": str(data), "evaluate": ["dev"]},
        "model": {"path": str(pangu), "precision": "fp32", "attention": "eager"},
        "parallel": {"zero": 0},
        "prompt": {"template": "study_2"},
    }
    config, dataset = parse_config(values), read_dataset(data)
    seen = of_discrete(config, dataset, 1).heaviest[False]
    method = discrete.build(config, dataset.labels)
    batches = method.score_batches(dataset.splits["dev"]["text"].to_pylist())
    largest = max(batches, key=lambda batch: batch.ids.numel())
    method.scores(largest)  # the prefix is there from now on
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        method._scores(largest)
    assert seen.flops == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.fixture
def planned(
    data: Path, described: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`planned(*overrides)`: exit code and output of `--plan`."""
    config = tmp_path / "config.yaml"
    config.write_text(
        f"method: prompting.discrete\nrun: {{name: planned, dir: {tmp_path}/runs}}\n"
        f"data: {{path: {data}}}\nmodel: {{path: {described}}}\nprompt: {{template: study_2}}\n"
    )

    def plan(*overrides: str) -> tuple[int, str, str]:
        code = run.main(["--config", str(config), "--plan", *overrides])
        written = capsys.readouterr()
        assert not (tmp_path / "runs").exists()
        return code, written.out, written.err

    return plan


def test_plan_prints_a_table_for_the_named_cards(planned: Callable[..., tuple[int, str, str]]):
    code, out, _ = planned("hardware.card=A10G", "hardware.cards=8", "hardware.memory_gb=20")
    assert code == 0
    assert "8 x A10G, 20.0 GB each" in out
    assert "plan: parallel.zero=0 parallel.offload=none" in out
    rows = [line.split() for line in out.splitlines() if line.split()[0] in ("zero", "0", "3")]
    assert [row[0] for row in rows] == ["zero", "0", "3", "3"]
    assert all(row[-1] in ("fits", "yes") for row in rows)
    assert out.splitlines()[-1].startswith("scoring 0:0"), "the run's own time comes last"


def test_plan_refuses_what_does_not_fit(planned: Callable[..., tuple[int, str, str]]):
    code, out, err = planned("hardware.card=A10G", "hardware.memory_gb=1.5")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1 and "use " in err
    code, _, err = planned("hardware.card=A11")
    assert code == 2 and "hardware.card: expected one of RTX 2080" in err


def test_plan_and_check_exclude_each_other(discrete: list[str]):
    with pytest.raises(SystemExit, match="2"):
        run.main([*discrete, "--plan", "--check"])


def test_the_shipped_configs_name_no_hardware():
    for name in ("pangu_2_6b_8gpu", "pangu_2_6b_score"):
        config = load_config(Path(f"configs/{name}.yaml"))
        assert config.hardware.card is None
