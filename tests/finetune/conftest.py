"""A small dataset, small pretrained models, and methods made of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.dataset import Dataset
from data_prep.sample import make_sample
from launcher.config import Config, parse_config
from launcher.method import method_module
from prompting.pangu import PanguConfig, PanguForCausalLM, PanguTokenizer, train_vocabulary
from tests.finetune.models import LABELS, SHAPES, write_model


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    """Synthetic chats with labels and shares."""
    return make_sample(size=240, seed=3)


@pytest.fixture(scope="session")
def vocabulary(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT `vocab.txt` of the characters of all texts."""
    texts = [text for split in dataset.splits.values() for text in split["text"].to_pylist()]
    letters = sorted({letter for text in texts for letter in text.lower()})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    tokens += [f"##{letter}" for letter in letters]
    file = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    file.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def model(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`model(kind)`: the folder of a tiny model."""
    made: dict[str, Path] = {}

    def find(kind: str) -> Path:
        if kind not in made:
            own = None if kind == "byt5" else vocabulary
            folder = tmp_path_factory.mktemp(kind)
            # So that scores are far apart; T5's weights are large to begin with.
            scale = 1.0 if kind == "byt5" else 4.0
            made[kind] = write_model(kind, folder, own, SHAPES[kind], scale)
        return made[kind]

    return find


@pytest.fixture(scope="session")
def pangu(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PanGu of 2 layers x 32 with its own vocabulary."""
    folder = tmp_path_factory.mktemp("pangu")
    texts = dataset.splits["train"]["text"].to_pylist()
    train_vocabulary([*texts, *LABELS], folder / "vocab.model", 700)
    tokenizer = PanguTokenizer(folder / "vocab.model")
    torch.manual_seed(0)
    settings = PanguConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.2, embd_pdrop=0.0, attn_pdrop=0.0,
        resid_pdrop=0.0,
    )  # fmt: skip
    PanguForCausalLM(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def configured(tmp_path: Path) -> Callable[..., Config]:
    """`configured(method, folder, *overrides)`."""

    def make(method: str, path: Path, *overrides: str) -> Config:
        values = {
            "method": f"finetune.{method}",
            "run": {"name": "run", "dir": str(tmp_path)},
            "data": {"path": "/unused", "labels": LABELS},
            "model": {"path": str(path), "precision": "fp32"},
            "parallel": {"zero": 0},
        }
        return parse_config(values, overrides)

    return make


@pytest.fixture
def built(
    configured: Callable[..., Config], dataset: Dataset, tmp_path: Path
) -> Callable[..., Any]:
    """`built(method, folder, *overrides, data=dataset)`: the method, as a run would have it."""

    def make(method: str, path: Path, *overrides: str, data: Dataset = dataset) -> Any:
        config = configured(method, path, *overrides)
        (tmp_path / "run").mkdir(exist_ok=True)
        module = method_module(config)
        return module.build(module.prepare(config, data), data.labels)

    return make
