"""Checkpoints written by an independent splitter come back bit-equal; broken ones are refused."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from launcher.errors import InputError
from prompting.pangu import PanguForCausalLM, PanguTokenizer, train_vocabulary
from prompting.pangu.__main__ import main
from prompting.pangu.conversion import convert

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "vocab_size": 50,
    "num_hidden_layers": 3,
}
IN_LAYER = {
    "input_layernorm": "input_layernorm",
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.dense",
    "post_attention_layernorm": "post_attention_layernorm",
    "mlp.up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}
ROWS = ("attention.query", "attention.key", "attention.value", "mlp.dense_h_to_4h")
COLUMNS = ("attention.dense.weight", "mlp.dense_4h_to_h.weight")


def megatron_states(weights: dict[str, torch.Tensor], parts: int, padded: int) -> list[dict]:
    """The nested dictionaries that `parts` model-parallel ranks would have saved."""
    words = weights["model.embed_tokens.weight"]
    words = torch.cat([words, torch.rand(padded - len(words), words.shape[1]).to(words.dtype)])
    states = []
    for rank in range(parts):
        transformer = {
            f"final_layernorm.{kind}": weights[f"model.final_layernorm.{kind}"]
            for kind in ("weight", "bias")
        }
        for name, tensor in weights.items():
            for ours, theirs in IN_LAYER.items():
                for kind in ("weight", "bias"):
                    if not name.endswith(f".{ours}.{kind}"):
                        continue
                    place = name.removeprefix("model.").removesuffix(f".{ours}.{kind}")
                    place = place.replace("query_layer", "topQueryLayer")
                    if theirs in ROWS:
                        tensor = tensor.chunk(parts, 0)[rank]
                    elif f"{theirs}.{kind}" in COLUMNS:
                        tensor = tensor.chunk(parts, 1)[rank]
                    transformer[f"{place}.{theirs}.{kind}"] = tensor.clone()
        queries = {"weight": weights["model.embed_queries.weight"]}
        embedding = {
            "word_embeddings": {"weight": words.chunk(parts)[rank].clone()},
            "position_embeddings": {"weight": weights["model.embed_positions.weight"]},
        }
        model = {
            "embedding": embedding,
            "topQueryEmbedding": {"top_query_embeddings": queries},
            "transformer": transformer,
        }
        states.append({"model": {"language_model": model}, "iteration": 42})
    return states


def write_megatron(folder: Path, states: list[dict], tracker: str = "42\n", **save) -> Path:
    name = "release" if tracker.strip() == "release" else f"iter_{int(tracker):07d}"
    for rank, state in enumerate(states):
        (folder / name / f"mp_rank_{rank:02d}").mkdir(parents=True)
        torch.save(state, folder / name / f"mp_rank_{rank:02d}" / "model_optim_rng.pt", **save)
    (folder / "latest_checkpointed_iteration.txt").write_text(tracker)
    return folder


def rank_file(folder: Path, rank: int = 0) -> Path:
    return folder / f"iter_0000042/mp_rank_{rank:02d}/model_optim_rng.pt"


@pytest.fixture(scope="module")
def weights(make_model) -> dict[str, torch.Tensor]:
    state = make_model(7, **SHAPE).state_dict()
    del state["lm_head.weight"]
    return state


@pytest.fixture
def source(weights, tmp_path) -> Path:
    """A Megatron folder of two ranks with a padded vocabulary."""
    return write_megatron(tmp_path / "source", megatron_states(weights, 2, 64))


def converted(source: Path, destination: Path, **options) -> dict[str, torch.Tensor]:
    convert(source, destination, **{"heads": 8, "vocab_size": 50} | options)
    state = AutoModelForCausalLM.from_pretrained(destination, dtype="auto").state_dict()
    del state["lm_head.weight"]
    return state


def assert_bit_equal(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_megatron_round_trip(weights, tmp_path, parts, dtype):
    cast = {name: tensor.to(dtype) for name, tensor in weights.items()}
    tracker = "release" if parts == 4 else "42\n"
    folder = write_megatron(tmp_path / "source", megatron_states(cast, parts, 64), tracker)
    assert_bit_equal(converted(folder, tmp_path / "out"), cast)


def test_replicated_weights_may_differ_by_rounding(weights, tmp_path):
    """Ranks that train apart sum in other orders; the first one's values are taken."""
    cast = {name: tensor.half() for name, tensor in weights.items()}
    states = megatron_states(cast, 2, 64)
    kept = states[1]["model"]["language_model"]["transformer"]
    name = "layers.1.post_attention_layernorm.weight"
    kept[name] = kept[name] * 1.002
    assert not torch.equal(kept[name], cast["model." + name])
    assert_bit_equal(converted(write_megatron(tmp_path / "s", states), tmp_path / "out"), cast)


def test_evolution_module_key_and_flat_names(weights, tmp_path):
    (state,) = megatron_states(weights, 1, 50)
    model = state.pop("model")["language_model"]
    flat = {f"language_model.transformer.{n}": t for n, t in model["transformer"].items()}
    for table in ("word_embeddings", "position_embeddings"):
        name = f"language_model.embedding.{table}.weight"
        flat[name] = model["embedding"][table]["weight"]
    queries = model["topQueryEmbedding"]["top_query_embeddings"]["weight"]
    flat["language_model.task_embedding.top_query_embeddings.weight"] = queries
    folder = write_megatron(tmp_path / "source", [{"module": flat}])
    assert_bit_equal(converted(folder, tmp_path / "out"), weights)


def test_training_state_needs_trust_and_tells_the_heads(weights, tmp_path, capsys):
    states = megatron_states(weights, 2, 64)
    for state in states:
        state["args"] = argparse.Namespace(num_attention_heads=8)
        state["optimizer"] = {"state": torch.zeros(5)}
    folder = write_megatron(tmp_path / "source", states)
    command = ["convert", str(folder), str(tmp_path / "out"), "--vocab-size", "50"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "argparse.Namespace" in error
    assert "--trust-pickle" in error
    assert main([*command, "--trust-pickle", "--heads", "4"]) == 2
    assert "--heads: seen 4, but the checkpoint says 8" in capsys.readouterr().err
    assert main([*command, "--trust-pickle"]) == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["num_attention_heads"] == 8


def test_port_folder_and_our_own(weights, tmp_path):
    names = {"embed_tokens": "wte", "embed_positions": "wpe", "embed_queries": "wqe"}
    names |= {"final_layernorm": "ln_f", "query_layer": "h.2", "layers": "h"}
    names |= {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "self_attn": "attn"}
    names |= {"o_proj": "c_proj", "up_proj": "c_fc", "down_proj": "c_proj", "model": "transformer"}
    port = {".".join(names.get(p, p) for p in name.split(".")): t for name, t in weights.items()}
    for layer in range(3):
        port[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 40, 40, dtype=torch.uint8)
        port[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    port["lm_head.weight"] = port["transformer.wte.weight"].clone()
    folder = tmp_path / "port"
    folder.mkdir()
    torch.save(port, folder / "pytorch_model.bin")
    fields = {"model_type": "gpt_pangu", "num_layers": 3, "num_heads": 8, "vocab_size": 50}
    fields |= {"hidden_size": 64, "intermediate_size": None, "activation_function": "gelu_new"}
    (folder / "config.json").write_text(json.dumps(fields))

    own = tmp_path / "own"
    assert_bit_equal(converted(folder, own, heads=None, vocab_size=None), weights)
    assert json.loads((own / "config.json").read_text())["hidden_act"] == "gelu_new"
    again = converted(own, tmp_path / "again", heads=None, vocab_size=None, max_shard_size="200KB")
    assert_bit_equal(again, weights)
    assert (tmp_path / "again/config.json").read_text() == (own / "config.json").read_text()

    port["lm_head.weight"][3, 4] += 1
    torch.save(port, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="lm_head: differs"):
        convert(folder, tmp_path / "untied")


def test_shards_index_and_dtype(source, weights, tmp_path):
    found = converted(source, tmp_path / "out", dtype="bfloat16", max_shard_size="50KB")
    assert_bit_equal(found, {name: tensor.bfloat16() for name, tensor in weights.items()})
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    assert sorted(set(index["weight_map"].values())) == shards
    for shard in shards:
        inside = load_file(tmp_path / "out" / shard)
        assert sum(t.nbytes for t in inside.values()) <= 50_000 or len(inside) == 1
        assert inside.keys() == {n for n, file in index["weight_map"].items() if file == shard}


def test_tokenizer_is_written_along(source, tmp_path):
    train_vocabulary(["今天天气真好", "音乐很好听"] * 5, tmp_path / "v.model", 40)
    convert(source, tmp_path / "out", vocabulary=tmp_path / "v.model", heads=8, vocab_size=50)
    tokenizer = PanguTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.encode("今天") == PanguTokenizer(tmp_path / "v.model").encode("今天")
    with pytest.raises(InputError, match="pieces, expected at most 12"):
        convert(source, tmp_path / "two", vocabulary=tmp_path / "v.model", heads=8, vocab_size=12)


def test_files_in_the_old_torch_format(weights, tmp_path, capsys):
    states = megatron_states(weights, 2, 64)
    old: dict[str, Any] = {"_use_new_zipfile_serialization": False}
    folder = write_megatron(tmp_path / "source", states, **old)
    assert_bit_equal(converted(folder, tmp_path / "out"), weights)
    assert "can't be memory-mapped" in capsys.readouterr().err
    states[1]["args"] = argparse.Namespace()
    torch.save(states[1], rank_file(folder, 1), **old)
    with pytest.raises(InputError, match=r"argparse\.Namespace.*--trust-pickle"):
        convert(folder, tmp_path / "two", heads=8, vocab_size=50)
    os.truncate(rank_file(folder), 9000)
    with pytest.raises(InputError, match="damaged torch file"):
        convert(folder, tmp_path / "two", heads=8, vocab_size=50)


MLP = "layers.1.mlp.dense_h_to_4h.weight"


def _drop_rank(folder: Path) -> None:
    shutil.rmtree(rank_file(folder, 1).parent)


def _drop_first_rank(folder: Path) -> None:
    shutil.rmtree(rank_file(folder, 0).parent)


def _drop_file(folder: Path) -> None:
    rank_file(folder, 1).unlink()


def _truncate(folder: Path) -> None:
    os.truncate(rank_file(folder, 1), rank_file(folder, 1).stat().st_size // 2)


def _flip_a_bit(folder: Path) -> None:
    state = torch.load(rank_file(folder), weights_only=True)["model"]["language_model"]
    data = bytearray(rank_file(folder).read_bytes())
    data[data.index(state["transformer"][MLP].numpy().tobytes()) + 100] ^= 1
    rank_file(folder).write_bytes(data)


def _overwrite(folder: Path) -> None:
    rank_file(folder).write_bytes(b"<html>404 not found</html>")


def _edit(edit):
    def breaks(folder: Path) -> None:
        state = torch.load(rank_file(folder, 1), weights_only=True)
        edit(state["model"]["language_model"])
        torch.save(state, rank_file(folder, 1))

    return breaks


def _edit_both(edit):
    def breaks(folder: Path) -> None:
        for rank in (0, 1):
            state = torch.load(rank_file(folder, rank), weights_only=True)
            edit(state["model"]["language_model"])
            torch.save(state, rank_file(folder, rank))

    return breaks


def _other_iteration(folder: Path) -> None:
    state = torch.load(rank_file(folder, 1), weights_only=True)
    torch.save(state | {"iteration": 41}, rank_file(folder, 1))


def _tracker(text: str):
    return lambda folder: (folder / "latest_checkpointed_iteration.txt").write_text(text)


FAULTS = {
    "last rank missing": (_drop_rank, "by the shapes 2 make up the model"),
    "first rank missing": (_drop_first_rank, "mp_rank_00: missing, but mp_rank_01 exists"),
    "file missing": (_drop_file, "expected one file, model_optim_rng.pt"),
    "truncated": (_truncate, "mp_rank_01.*damaged or truncated"),
    "one bit flipped": (_flip_a_bit, "mp_rank_00.*wrong checksum"),
    "not a torch file": (_overwrite, "damaged or truncated"),
    "tracker nonsense": (_tracker("soon"), "seen 'soon', expected a number or 'release'"),
    "tracker of another iteration": (_tracker("43"), "iter_0000043: no such folder"),
    "key missing in one rank": (
        _edit(lambda m: m["transformer"].pop(MLP)),
        r"mp_rank_01.*: lacks model.layers.1.mlp.up_proj.weight, which .*mp_rank_00",
    ),
    "key missing": (
        _edit_both(lambda m: m["transformer"].pop(MLP)),
        "lacks model.layers.1.mlp.up_proj.weight",
    ),
    "no position table": (
        _edit_both(lambda m: m["embedding"].pop("position_embeddings")),
        "lacks model.embed_positions.weight",
    ),
    "unknown key": (
        _edit_both(lambda m: m["transformer"].update({"layers.0.rope.weight": torch.ones(2)})),
        r"layers\.0\.rope\.weight: not a weight of PanGu",
    ),
    "shapes differ between ranks": (
        _edit(lambda m: m["transformer"].update({MLP: torch.ones(3, 64)})),
        r"mp_rank_01.*up_proj.weight: seen \[3, 64\], expected \[128, 64\]",
    ),
    "parts of two iterations": (_other_iteration, "mp_rank_01.*: of iteration 41, expected 42 as"),
    "parts of two models": (
        _edit(lambda m: m["embedding"]["position_embeddings"]["weight"].mul_(-1)),
        r"mp_rank_01.*: model.embed_positions.weight: other values than in .*mp_rank_00",
    ),
    "shape wrong everywhere": (
        _edit_both(lambda m: m["transformer"].update({MLP: torch.ones(3, 64)})),
        r"up_proj.weight: seen \[6, 64\], expected \[256, 64\]",
    ),
    "not finite": (
        _edit_both(lambda m: m["transformer"].update({MLP: torch.full((128, 64), torch.inf)})),
        "layers.1.mlp.up_proj.weight: holds values that are not finite",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_sources_are_refused(source, tmp_path, capsys, fault):
    breaks, message = FAULTS[fault]
    breaks(source)
    destination = tmp_path / "out"
    command = ["convert", str(source), str(destination), "--heads", "8", "--vocab-size", "50"]
    assert main(command) == 2
    (line,) = [
        line
        for line in capsys.readouterr().err.splitlines()
        if not line.startswith(("no tokenizer", "shard "))
    ]
    with pytest.raises(InputError, match=message):
        raise InputError(line)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_wrong_options_are_refused(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"heads": None}, "--heads: not given"),
        ({"heads": 7}, "hidden_size 64 is not a multiple of num_attention_heads 7"),
        ({"vocab_size": 65}, "seen 64 rows, expected at least 65"),
        ({"vocab_size": None}, "seen 64 rows, expected at least 40000"),
        ({"max_shard_size": "1 cup"}, "--max-shard-size"),
        ({"vocabulary": tmp_path / "none.model"}, "none.model: no such file"),
    ]
    for options, message in cases:
        with pytest.raises(InputError, match=message):
            convert(source, out, **{"heads": 8, "vocab_size": 50} | options)
    with pytest.raises(InputError, match="no such folder"):
        convert(tmp_path / "nowhere", out)
    with pytest.raises(InputError, match="expected latest_checkpointed_iteration"):
        convert(tmp_path, out)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(free=1000))
    with pytest.raises(InputError, match="GiB are free"):
        convert(source, out, heads=8, vocab_size=50)
    out.mkdir()
    with pytest.raises(InputError, match="already exists"):
        convert(source, out, heads=8, vocab_size=50)
    assert not list(tmp_path.glob(".*"))


MEASURE = """
import sys
from pathlib import Path
from prompting.pangu.conversion import convert
from transformers.generation import GenerationMixin  # loaded lazily, and not what is measured

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

before = peak()
convert(Path(sys.argv[1]), Path(sys.argv[2]), vocab_size=4000, max_shard_size="50MB")
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read there")
def test_memory_stays_near_one_shard(tmp_path):
    from prompting.pangu import PanguConfig

    config = PanguConfig(
        vocab_size=4000, hidden_size=1024, num_hidden_layers=15, num_attention_heads=16
    )
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in PanguForCausalLM(config).named_parameters()}
    state = {name: torch.ones(shape, dtype=torch.float16) for name, shape in shapes.items()}
    assert sum(tensor.nbytes for tensor in state.values()) > 380e6
    write_megatron(tmp_path / "source", megatron_states(state, 2, 4096))
    del state
    command = [sys.executable, "-c", MEASURE, tmp_path / "source", tmp_path / "out"]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    # One shard mapped from the sources and once more joined; the whole would be 400.
    assert float(done.stdout) < 130, done.stdout
