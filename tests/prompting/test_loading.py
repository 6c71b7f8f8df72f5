"""Weights reach every rank as from_pretrained would give them, and nothing else reaches it."""

import json
import multiprocessing
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from launcher import engine
from launcher.config import parse_config
from launcher.errors import InputError
from prompting import discrete, loading, models
from prompting.pangu import PanguConfig, PanguForCausalLM

ROOT = Path(__file__).resolve().parents[2]
KINDS = ["pangu", "gpt2", "llama"]

# A rank that loads `folder` under ZeRO 3, compares what all hold together with `whole`, and writes
# how much it has held itself.
_RANK = """
import json, os, sys
sys.path.insert(0, root)
os.environ.update(environment)
import torch, torch.distributed as dist, deepspeed
torch.set_num_threads(1)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed(dist_backend="gloo", verbose=False)
from transformers import AutoModelForCausalLM
from launcher import engine
from launcher import engine
from launcher.config import parse_config
from launcher.distributed import gathered
from launcher.pretrained import unsharded
from prompting import models

def held(name):
    with open("/proc/self/status") as status:
        return int(status.read().split(name + ":")[1].split()[0]) * 1024

values = {"method": "prompting.discrete", "run": {"name": "rank"}, "data": {"path": "nowhere"}}
values |= {"parallel": {"zero": 3}, "model": {"path": folder, "precision": precision}}
alive = engine.zero_3_loading(parse_config(values), trains=False)
models.check_checkpoint(folder)
before, anonymous = held("VmHWM"), held("RssAnon")
model = models.load_model(folder, precision, "auto")
figures = {"peak": held("VmHWM") - before, "kept": held("RssAnon") - anonymous}
figures["parameters"] = sum(p.ds_tensor.nbytes for p in model.parameters())
if compares:
    with unsharded():
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
    expected = dict(whole.named_parameters(remove_duplicate=False))
    given = dict(model.named_parameters(remove_duplicate=False))
    assert given.keys() == expected.keys()
    assert model.dtype == expected[next(iter(expected))].dtype
    ties = {name: [n for n in expected if expected[n] is expected[name]] for name in expected}
    for name, parameter in given.items():
        assert parameter.numel() == 0, name
        assert [n for n in given if given[n] is parameter] == ties[name], name
        with gathered([parameter]):
            assert torch.equal(parameter, expected[name]), name
    for name, buffer in whole.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
with open(f"{out}_{dist.get_rank()}.json", "w") as file:
    json.dump(figures, file)
os._exit(0)
"""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: Any) -> Callable[..., list[dict[str, int]]]:
    """`sharded(folder, precision, ranks, compares)`: what each rank has held, in bytes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepspeed", "prompting.models"])
    environment = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**environment, "PYTHONPATH": str(ROOT)}.items():
            patch.setenv(name, value)
        warm_up = context.Process(target=int)
        warm_up.start()
        warm_up.join()

    def load(folder: Path, precision: str, ranks: int, compares: bool) -> list[dict[str, int]]:
        out = tmp_path_factory.mktemp("ranks") / "rank"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        processes = []
        for rank in range(ranks):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            own = {name: str(value) for name, value in places.items()}
            names: dict[str, Any] = {"root": str(ROOT), "folder": str(folder), "out": str(out)}
            names |= {"precision": precision, "compares": compares}
            names["environment"] = environment | own | {"MASTER_ADDR": "127.0.0.1"}
            processes.append(context.Process(target=exec, args=(_RANK, names)))
            processes[-1].start()
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0] * ranks
        return [json.loads(Path(f"{out}_{rank}.json").read_text()) for rank in range(ranks)]

    return load


@pytest.mark.parametrize(("kind", "precision"), [*((k, "fp32") for k in KINDS), ("llama", "bf16")])
def test_shards_make_up_the_model(sharded, folders, kind, precision):
    """Three ranks divide few of the shapes evenly."""
    sharded(folders[kind], precision, 3, True)


def test_shards_of_files_of_torch(sharded, folders, tmp_path):
    folder = Path(shutil.copytree(folders["gpt2"], tmp_path / "model"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    sharded(folder, "fp32", 2, True)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read there")
def test_no_rank_ever_holds_more_than_its_share(sharded, tmp_path):
    """120 MB of float32 over four ranks, from float16 in small files."""
    config = PanguConfig(
        vocab_size=2000, hidden_size=512, num_hidden_layers=9, num_attention_heads=8
    )
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in PanguForCausalLM(config).named_parameters()}
    model = PanguForCausalLM(config)
    whole = 4 * sum(shape.numel() for shape in shapes.values())
    assert whole > 115e6
    model.half().save_pretrained(tmp_path, max_shard_size="5MB")
    for figures in sharded(tmp_path, "fp32", 4, False):
        assert figures["parameters"] == pytest.approx(whole / 4, rel=1e-3)
        # A weight more at a time, the pages of a file, and what the libraries use at first.
        assert figures["kept"] < whole / 4 + 12e6
        assert figures["peak"] < whole / 4 + 28e6


# A whole copy ---------------------------------------------------------------------------------


def stored_as(folder: Path, dtypes: Callable[[str], torch.dtype]) -> Path:
    """The folder, its weights cast."""
    weights = load_file(folder / "model.safetensors")
    cast = {name: weight.to(dtypes(name)) for name, weight in weights.items()}
    save_file(cast, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def half(folders, tmp_path) -> Callable[[str], Path]:
    """`half(kind)`: a model folder in float16 whose norms are in float32."""

    def make(kind: str) -> Path:
        folder = Path(shutil.copytree(folders[kind], tmp_path / kind))
        return stored_as(folder, lambda name: torch.float32 if "norm" in name else torch.float16)

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_whole_copy_is_from_pretrained_s(half, kind, precision):
    folder = half(kind)
    given = models.load_model(str(folder), precision, "auto")
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=given.dtype)
    for name, weight in expected.state_dict().items():
        assert given.state_dict()[name].dtype == weight.dtype
        assert torch.equal(given.state_dict()[name], weight), name


# Left in the files ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_weights_left_in_their_files_give_the_same_scores(half, kind, labels, score, texts):
    found = []
    folder = half(kind)
    for weights in ("memory_mapped", "resident"):
        values = {
            "method": "prompting.discrete",
            "run": {"name": "test"},
            "data": {"path": "nowhere"},
            "model": {"path": str(folder), "precision": "fp32", "weights": weights},
        }
        method = discrete.build(parse_config(values), labels)
        found.append(score(method, texts))
        if weights == "memory_mapped":
            mapped: PreTrainedModel = method.module
    assert torch.equal(*found)
    assert float((found[0][0] - found[0][1]).abs().max()) > 1e-2
    assert mapped.dtype == torch.float32
    for weight in mapped.parameters():
        assert not weight.requires_grad
        # Nothing stays behind; and whoever uses it without its module gets no number.
        assert weight.untyped_storage().nbytes() == 4
        assert bool(weight.isnan().all())


def test_a_gradient_through_weights_left_in_their_files(half, tune, examples):
    """Training with them needs checkpointed activations; the prompt's gradient is the same."""
    folder = half("pangu")
    headings: dict[str, Any] = {"parallel": {"activation_checkpointing": True}}
    found = []
    for weights in ("memory_mapped", "resident"):
        model = {"path": str(folder), "precision": "fp32", "weights": weights}
        method = tune("pangu", model=model, tuning={"length": 5}, **headings)
        method.module.train()
        loss = method.loss(method.training_set(examples.splits["train"], 0).batch([0, 3]))
        loss.backward()
        (vectors,) = method.replicated.parameters()
        found.append((vectors.detach(), loss.detach(), vectors.grad))
    for given, expected in zip(*found, strict=True):
        assert torch.equal(given, expected)
    assert float(found[0][2].abs().max()) > 0
    with pytest.raises(InputError, match="activation_checkpointing"):
        tune("pangu", model={"path": str(folder), "precision": "fp32", "weights": "memory_mapped"})


# Refusals ---------------------------------------------------------------------------------------


def test_too_little_memory_is_said_before_anything_is_read(folders, monkeypatch):
    monkeypatch.setattr(loading, "available_memory", lambda: 2**16)
    monkeypatch.setattr(loading, "_uncast", lambda: pytest.fail("weights are read"))
    with pytest.raises(InputError) as raised:
        models.load_model(str(folders["pangu"]), "fp32", "auto")
    message = str(raised.value)
    assert message.startswith(f"model.path {folders['pangu']}: 0.0 GiB of weights in float32, ")
    assert "0.0 GiB are needed by 1 rank on this machine and 0.0 are free" in message
    assert "parallel.zero=3" in message and "\n" not in message


def test_available_memory_is_that_of_this_process():
    assert (
        0 < loading.available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )


@pytest.mark.parametrize(
    ("size", "returned"), [(None, True), (engine._SMALL_CHECKPOINT - 1, False), (2**30, True)]
)
def test_freed_weights_go_back_to_the_system_but_for_small_models(
    tmp_path, monkeypatch, size, returned
):
    """A model that is started from nothing, without a folder, may be of any size."""
    calls: list[None] = []
    monkeypatch.setattr(engine, "_return_large_blocks", lambda: calls.append(None))
    if size is not None:
        with (tmp_path / "model.safetensors").open("wb") as file:
            file.truncate(size)  # a hole: takes no space
    path = None if size is None else str(tmp_path)
    values = {"method": "prompting.discrete", "run": {"name": "a"}, "data": {"path": "nowhere"}}
    values |= {"parallel": {"zero": 3}, "model": {"path": path, "precision": "fp32"}}
    alive = engine.zero_3_loading(parse_config(values), trains=False)
    assert alive is not None
    assert bool(calls) == returned
