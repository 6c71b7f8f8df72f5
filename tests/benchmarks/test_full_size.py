"""The generated checkpoint is what Megatron would have saved; the benchmark runs in miniature."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import full_size, memory
from benchmarks.pangu_checkpoint import megatron_tensors, write_megatron
from prompting.pangu.configuration import PanguConfig
from prompting.pangu.conversion import convert
from prompting.pangu.modeling import PanguForCausalLM

SHAPE: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8}


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("iter_0001000/mp_rank_*/model_optim_rng.pt"))


def test_the_shape_is_the_published_one():
    tensors = [*megatron_tensors(PanguConfig())]
    assert len({name for name, _, _ in tensors}) == len(tensors) == full_size.TENSORS
    assert sum(shape.numel() for _, shape, _ in tensors) == full_size.PARAMETERS


def test_names_and_shapes_are_megatron_s(reference_data):
    """The lists were derived from the reference classes, for one part and for two."""
    golden = reference_data / "golden" / "pangu"
    for parts, name in ((1, "mp1"), (2, "mp2_rank")):
        keys = json.loads((golden / f"keys_2_6B_megatron_{name}.json").read_text())
        expected = {key: list(shape) for key, shape in keys.items()}
        given = {}
        for key, shape, dim in megatron_tensors(PanguConfig()):
            own = [size // (parts if axis == dim else 1) for axis, size in enumerate(shape)]
            given[f"model/language_model/{key}"] = own
        assert {k: v for k, v in expected.items() if "word_embeddings" not in k} == {
            k: v for k, v in given.items() if "word_embeddings" not in k
        }
        assert set(expected) == set(given)


def test_however_it_is_cut_it_is_one_model(tmp_path):
    """As plain torch reads it, and as the converter joins it."""
    config = PanguConfig(**SHAPE, vocab_size=200, max_position_embeddings=32)
    converted = []
    for parts in (1, 2, 4):
        count = write_megatron(tmp_path / f"m{parts}", config, parts=parts, seed=3)
        assert count == sum(p.numel() for p in PanguForCausalLM(config).parameters())
        convert(tmp_path / f"m{parts}", tmp_path / f"c{parts}", heads=8, vocab_size=200)
        converted.append(load_file(tmp_path / f"c{parts}" / "model.safetensors"))
    (file,) = files(tmp_path / "m1")
    model = torch.load(file, weights_only=True)["model"]["language_model"]
    words = model["embedding"]["word_embeddings"]["weight"]
    assert words.dtype == torch.float16
    assert float(words.float().std()) == pytest.approx(0.02, rel=0.05)
    for weights in converted:
        assert torch.equal(weights["model.embed_tokens.weight"], words)
        for name, tensor in converted[0].items():
            assert torch.equal(weights[name], tensor), name
    down = model["transformer"]["layers.0.mlp.dense_4h_to_h.weight"]
    assert float(down.float().std()) == pytest.approx(0.02 / 6**0.5, rel=0.05)


def test_memory_of_a_command_and_its_children(tmp_path):
    """Two processes that share 100 MB of a file and hold 50 MB each."""
    (tmp_path / "shared").write_bytes(bytes(100_000_000))
    child = (
        "import mmap, sys, time; f = open('shared', 'rb');"
        "m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ);"
        "s = sum(m[i] for i in range(0, len(m), 4096)); own = b'x' * 50_000_000; time.sleep(3)"
    )
    parent = (
        "import subprocess, sys;"
        f"p = [subprocess.Popen([sys.executable, '-c', {child!r}]) for _ in range(2)];"
        "[q.wait() for q in p]; print('said')"
    )
    usage = memory.run([sys.executable, "-c", parent], {"PATH": "/usr/bin"}, tmp_path)
    assert usage.output == "said\n"
    assert 200e6 < usage.peak < 260e6
    assert 100e6 < usage.private_peak < 160e6
    with pytest.raises(RuntimeError, match="ended with 3:\nsaid"):
        command = [sys.executable, "-c", "print('said'); raise SystemExit(3)"]
        memory.run(command, {"PATH": "/usr/bin"}, tmp_path)


@pytest.mark.slow
def test_the_whole_benchmark_in_miniature(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(full_size, "conclude", lambda *_: pytest.fail("nano is no result"))
    assert full_size.main(["--size", "nano", "--work", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    figures = json.loads(said[said.index("{") : said.rindex("}") + 1])
    assert figures["eight_ranks"]["relative_difference"] < 1e-4
    assert figures["nano"]["largest_difference"]["tuned"] < full_size.TOLERANCE
    assert "nano: peak memory of the conversion" in said
    assert not list(tmp_path.iterdir())
