"""Model folders: the right tokenizer, and one line for each way in which a folder is broken."""

import json
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
)

from launcher import pretrained
from launcher.errors import InputError
from prompting import models
from prompting.pangu import PanguConfig, PanguTokenizer

WEIGHTS = "model.safetensors"


@pytest.fixture
def copied(folders, tmp_path) -> Callable[[str], Path]:
    """`copied(kind)`: a model folder to break."""
    return lambda kind: Path(shutil.copytree(folders[kind], tmp_path / "model"))


def refusal(folder: Path) -> str:
    """The one line with which both the check and the loading refuse a folder."""
    with pytest.raises(InputError) as checked:
        models.check_checkpoint(str(folder))
    with pytest.raises(InputError) as loaded:
        models.load_model(str(folder), "fp32", "auto")
    assert str(checked.value) == str(loaded.value)
    assert str(checked.value).startswith(f"model.path {folder}: ")
    assert "\n" not in str(checked.value)
    return str(checked.value)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def reconfigure(folder: Path, **fields: object) -> None:
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | fields))


def sharded(folder: Path) -> list[Path]:
    model = models.load_model(str(folder), "fp32", "auto")
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    return shards


@pytest.mark.parametrize("kind", ["pangu", "gpt2", "llama"])
def test_a_sound_folder_loads_bit_equal(folders, kind):
    path = str(folders[kind])
    assert models.check_checkpoint(path).model_type == kind
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = models.load_model(path, precision, "auto")
        assert not model.training
        assert model.config._attn_implementation == "sdpa"
        state = model.state_dict()
        for name, weight in load_file(folders[kind] / WEIGHTS).items():
            assert torch.equal(state[name], weight.to(dtype)), name
    assert models.load_model(path, "fp32", "eager").config._attn_implementation == "eager"


@pytest.mark.parametrize("kind", ["pangu", "gpt2", "llama"])
def test_shards_load_alike(copied, load_model, kind):
    folder = copied(kind)
    sharded(folder)
    model = models.load_model(str(folder), "fp32", "auto")
    for name, weight in load_model(kind).state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_truncated_weights(copied, kept):
    folder = copied("pangu")
    content = (folder / WEIGHTS).read_bytes()
    size = int(len(content) * kept) if isinstance(kept, float) else kept
    (folder / WEIGHTS).write_bytes(content[:size])
    assert "a weight file is truncated" in refusal(folder)


def test_missing_shard(copied):
    folder = copied("pangu")
    gone = sharded(folder)[1]
    gone.unlink()
    assert gone.name in refusal(folder)


def test_truncated_shard(copied):
    folder = copied("pangu")
    shard = sharded(folder)[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "a weight file is truncated" in refusal(folder)


def test_no_weights(copied):
    folder = copied("pangu")
    (folder / WEIGHTS).unlink()
    assert "no file named model.safetensors" in refusal(folder)


def test_missing_weight(copied):
    folder = copied("pangu")
    edit(folder, lambda weights: weights.pop("model.layers.0.mlp.up_proj.bias"))
    assert refusal(folder).endswith("model.layers.0.mlp.up_proj.bias: not in the checkpoint")


def test_wrong_shape(copied):
    folder = copied("gpt2")
    edit(folder, lambda weights: weights.update({"transformer.wpe.weight": torch.zeros(7, 32)}))
    assert refusal(folder).endswith(
        "transformer.wpe.weight: shape (7, 32) in the checkpoint, (160, 32) by config.json"
    )


def test_unexpected_weight(copied):
    folder = copied("llama")
    edit(folder, lambda weights: weights.update({"model.gate.weight": torch.zeros(2)}))
    assert refusal(folder).endswith("model.gate.weight: unknown to the model")


def test_many_problems_are_cut_short(copied):
    """16 weights of a layer too many: five lines and their number."""
    folder = copied("pangu")
    reconfigure(folder, num_hidden_layers=2)
    with pytest.raises(InputError) as raised:
        models.check_checkpoint(str(folder))
    lines = str(raised.value).split("\n")
    assert all(line.startswith(f"model.path {folder}: ") for line in lines)
    assert "model.layers.1.input_layernorm.bias: unknown to the model" in lines[0]
    assert [len(lines), lines[5].endswith("and 11 more")] == [6, True]


@pytest.mark.parametrize(
    "content", [b"", b"hello world" * 100, b"PK\x03\x04" + bytes(500), b"\x80\x02}q\x00."]
)
def test_broken_torch_file(copied, content):
    folder = copied("gpt2")
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    refusal(folder)


@pytest.mark.parametrize("held", [[1, 2], {"optimizer": Path("x")}])
def test_torch_file_of_something_else(copied, held):
    folder = copied("gpt2")
    (folder / WEIGHTS).unlink()
    torch.save(held, folder / "pytorch_model.bin")
    refusal(folder)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "nope"}, "nope"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"hidden_act": "none"}, "none"),
    ],
)
def test_wrong_config(copied, fields, named):
    folder = copied("pangu")
    reconfigure(folder, **fields)
    assert named in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_broken_json(copied, name, content):
    folder = copied("pangu")
    if "index" in name:
        sharded(folder)
    (folder / name).write_text(content)
    refusal(folder)


def test_no_folder(tmp_path):
    assert refusal(tmp_path / "nothing").endswith("no such folder")
    with pytest.raises(InputError, match=r"^model.path: required by this method, not given$"):
        pretrained.required_path(None)


def test_checking_reads_no_weights(tmp_path):
    """3 GiB of weights, all holes in the file: a check that read them would hold them."""
    config = LlamaConfig(
        vocab_size=64_000,
        hidden_size=4096,
        intermediate_size=8192,
        num_hidden_layers=2,
        num_attention_heads=32,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    header, end = {}, 0
    for name, weight in state.items():
        start, end = end, end + 4 * weight.numel()
        header[name] = {"dtype": "F32", "shape": [*weight.shape], "data_offsets": [start, end]}
    written = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(written)) + written)
        file.truncate(8 + len(written) + end)
    assert end > 3 * 2**30

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    models.check_checkpoint(str(tmp_path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 2**10  # KiB


def test_a_vocab_txt_alone_is_bert_s(folders):
    """The Auto classes make a GPT-2 tokenizer of it that knows one token."""
    path = str(folders["gpt2"])
    assert not (folders["gpt2"] / "tokenizer_config.json").exists()
    tokenizer = models.load_tokenizer(path, models.check_checkpoint(path))
    assert isinstance(tokenizer, BertTokenizer)
    lines = (folders["gpt2"] / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert len(tokenizer) == len(lines)
    assert tokenizer.encode("动画") == [2, lines.index("动"), lines.index("画"), 3]


def test_a_tokenizer_config_without_a_class_changes_nothing(copied):
    folder = copied("gpt2")
    (folder / "tokenizer_config.json").write_text('{"max_len": 1024}')
    tokenizer = models.load_tokenizer(str(folder), models.check_checkpoint(str(folder)))
    assert isinstance(tokenizer, BertTokenizer)


def test_a_vocab_txt_beside_a_named_tokenizer_is_ignored(copied):
    folder = copied("llama")
    (folder / "vocab.txt").write_text("[UNK]\n")
    tokenizer = models.load_tokenizer(str(folder), models.check_checkpoint(str(folder)))
    assert type(tokenizer).__name__ == "LlamaTokenizer"


@pytest.mark.parametrize(("kind", "expected"), [("pangu", "PanguTokenizer"), ("llama", "Llama")])
def test_a_named_tokenizer_is_taken(load_tokenizer, kind, expected):
    assert type(load_tokenizer(kind)).__name__.startswith(expected)


def test_a_tokenizer_of_another_size_is_refused(folders):
    """More ids than the model has, or far fewer, are another model's; padding is not."""
    path = folders["pangu"]
    ids = len(PanguTokenizer(path / "vocab.model"))
    for size in (ids, ids + 10):
        assert len(models.load_tokenizer(str(path), PanguConfig(vocab_size=size))) == ids
    for size in (ids - 1, 2 * ids):
        with pytest.raises(InputError, match=f"the tokenizer has {ids} ids and the model {size}; "):
            models.load_tokenizer(str(path), PanguConfig(vocab_size=size))


@pytest.mark.parametrize("kind", ["pangu", "gpt2", "llama"])
def test_no_vocabulary(copied, kind):
    folder = copied(kind)
    for name in ("vocab.model", "vocab.txt", "tokenizer.model"):
        (folder / name).unlink(missing_ok=True)
    config = models.check_checkpoint(str(folder))
    with pytest.raises(
        InputError, match=r"no vocabulary beside the weights, expected vocab\.model"
    ):
        models.load_tokenizer(str(folder), config)


@pytest.mark.parametrize(
    ("kind", "name", "content"),
    [
        ("pangu", "vocab.model", b"not sentencepiece"),
        ("gpt2", "vocab.txt", "[UNK]\n动\n".encode("gbk")),
        ("gpt2", "vocab.txt", b""),
        ("llama", "tokenizer.json", b"{"),
        ("llama", "tokenizer.json", b"{}"),
        ("llama", "tokenizer_config.json", b"{"),
    ],
)
def test_broken_vocabulary(copied, kind, name, content):
    folder = copied(kind)
    (folder / name).write_bytes(content)
    config = models.check_checkpoint(str(folder))
    with pytest.raises(InputError, match=str(folder)) as raised:
        models.load_tokenizer(str(folder), config)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            BertForMaskedLM(
                BertConfig(
                    vocab_size=50,
                    hidden_size=8,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    intermediate_size=8,
                )
            ),
            "bert is an encoder, expected a causal language model",
        ),
        (
            BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=8, n_layer=1, n_head=2)),
            "bloom has no position_ids, expected attention with given positions in every layer",
        ),
        (
            Lfm2ForCausalLM(
                Lfm2Config(
                    vocab_size=50,
                    hidden_size=8,
                    intermediate_size=8,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    num_key_value_heads=2,
                    layer_types=["conv", "full_attention"],
                )
            ),
            "lfm2 has conv, expected attention with given positions in every layer",
        ),
    ],
)
def test_models_whose_scores_would_be_wrong_are_refused(tmp_path, model, reason):
    model.save_pretrained(tmp_path)
    assert reason in refusal(tmp_path)


def test_positions():
    """A sliding window counts like a limit of positions; one that is not in use doesn't."""
    assert models.max_positions(PanguConfig()) == 1024
    assert models.max_positions(GPT2Config(n_positions=77)) == 77
    mistral = MistralConfig(max_position_embeddings=64, sliding_window=16)
    assert models.max_positions(mistral) == 16
    assert models.max_positions(MistralConfig(sliding_window=None)) == 4096 * 32
    qwen = Qwen2Config(max_position_embeddings=64, use_sliding_window=False)
    assert models.max_positions(qwen) == 64
