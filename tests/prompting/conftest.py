"""Small causal models of three kinds, saved as real folders and loaded as a run loads them."""

import functools
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pytest
import sentencepiece
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from data_prep.dataset import SCHEMA, Dataset
from launcher.config import Config, parse_config
from prompting import models, tuning
from prompting.labels import LabelTrie
from prompting.pangu import PanguConfig, PanguForCausalLM, PanguTokenizer, train_vocabulary
from prompting.settings import TEMPLATES
from prompting.template import build_prompt

POSITIONS = 160
LABELS = ("动画", "音乐舞蹈", "知识", "生活", "影视")
TEXTS = (
    "这个动画片真好看，我看了三遍！",
    "音乐 很好听，舞蹈也不错",
    "今天学到了新的知识233，谢谢老师",
    "生活就是这样，慢慢来 bilibili",
    "影视剪辑做得真好，期待下一期。MAD",
    "哈哈哈哈哈哈",
)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """On matrices this small threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def labels() -> tuple[str, ...]:
    """The study's five categories."""
    return LABELS


@pytest.fixture(scope="session")
def texts() -> tuple[str, ...]:
    """Six chats that the vocabularies can spell."""
    return TEXTS


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Model folders: PanGu, GPT-2 with nothing but a vocab.txt, Llama with grouped queries."""
    root = tmp_path_factory.mktemp("models")
    prompts = [build_prompt(template, LABELS).text_with("") for template in TEMPLATES.values()]
    corpus = [*TEXTS, *LABELS, *prompts] * 2
    made = {kind: root / kind for kind in ("pangu", "gpt2", "llama")}
    for folder in made.values():
        folder.mkdir()

    train_vocabulary(corpus, made["pangu"] / "vocab.model", 300)
    size = len(PanguTokenizer(made["pangu"] / "vocab.model"))
    _save(
        PanguForCausalLM(
            PanguConfig(
                vocab_size=size,
                hidden_size=32,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=POSITIONS,
            )
        ),
        made["pangu"],
    )
    PanguTokenizer(made["pangu"] / "vocab.model").save_pretrained(made["pangu"])

    characters = sorted({c for line in corpus for c in line.lower() if not c.isspace()})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    words += [f"##{c}" for c in characters if c.isascii() and c.isalnum()]
    (made["gpt2"] / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    _save(
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(words),
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=POSITIONS,
                bos_token_id=2,
                eos_token_id=3,
            )
        ),
        made["gpt2"],
    )

    piece_model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in corpus for line in text.split("\n")),
        model_writer=piece_model,
        model_type="bpe",
        vocab_size=420,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    (made["llama"] / "tokenizer.model").write_bytes(piece_model.getvalue())
    said = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    (made["llama"] / "tokenizer_config.json").write_text(json.dumps(said))
    pieces = sentencepiece.SentencePieceProcessor(model_proto=piece_model.getvalue())
    _save(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=pieces.get_piece_size(),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=POSITIONS,
            )
        ),
        made["llama"],
    )
    return made


@pytest.fixture(scope="session")
def load_model(folders) -> Callable[..., PreTrainedModel]:
    """`load_model(kind, attention)`: loaded once per session; leave it as it is."""

    @functools.cache
    def load(kind: str, attention: str = "sdpa") -> PreTrainedModel:
        return models.load_model(str(folders[kind]), "fp32", attention)

    return load


@pytest.fixture(scope="session")
def load_tokenizer(folders) -> Callable[[str], PreTrainedTokenizerBase]:
    """`load_tokenizer(kind)`, as a run loads it."""

    @functools.cache
    def load(kind: str) -> PreTrainedTokenizerBase:
        path = str(folders[kind])
        return models.load_tokenizer(path, models.check_checkpoint(path))

    return load


@pytest.fixture(scope="session")
def brute_force() -> Callable[..., torch.Tensor]:
    """`brute_force(model, prompts, trie)`: [prompts, words] with one full sequence per word."""
    return _brute_force


@pytest.fixture(scope="session")
def examples() -> Dataset:
    """The six chats, each with a label and shares of which some are 0."""
    rows = []
    for place, text in enumerate(TEXTS):
        shares = [0.0] * 5
        shares[place % 5], shares[(2 * place + 1) % 5] = 0.25, 0.75
        shares = [share / sum(shares) for share in shares]
        label = place * place % 5  # 0 1 4 4 1 0: some labels twice, some never
        rows.append({"id": str(place), "text": text, "label": label, "distribution": shares})
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    return Dataset(LABELS, {"train": table, "dev": table}, {}, None, {})


@pytest.fixture(scope="session")
def tuning_config(folders) -> Callable[..., Config]:
    """`tuning_config(kind, prompt=..., other heading=...)`: a whole config, as a file gives it."""

    def make(kind: str, prompt: dict | None = None, **headings) -> Config:
        return parse_config(
            {
                "method": "prompting.tuning",
                "run": {"name": "test", "seed": 5},
                "data": {"path": "nowhere", "evaluate": ["dev"]},
                "model": {"path": str(folders[kind]), "precision": "fp32"},
                "prompt": prompt or {"template": "study_2"},
            }
            | headings
        )

    return make


@pytest.fixture(scope="session")
def tune(tuning_config, examples) -> Callable[..., tuning.Tuning]:
    """`tune(kind, prompt=..., other heading=...)`: the method with its first values."""

    def make(kind: str, prompt: dict | None = None, **headings) -> tuning.Tuning:
        config = tuning.prepare(tuning_config(kind, prompt, **headings), examples)
        method = tuning.build(config, examples.labels)
        method.start(examples.splits["train"])
        return method

    return make


@pytest.fixture(scope="session")
def score() -> Callable[..., torch.Tensor]:
    """`score(method, texts)`: [texts, labels], put together from the batches."""

    def scores(method, texts: Sequence[str]) -> torch.Tensor:
        method.module.eval()
        whole = torch.full((len(texts), len(method.asked.labels)), torch.nan)
        for batch in method.score_batches(texts):
            whole[batch.rows] = method.scores(batch)
        return whole

    return scores


def _brute_force(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], trie: LabelTrie
) -> torch.Tensor:
    rows = []
    for prompt in prompts:
        sums = []
        for word in trie.words:
            ids = torch.tensor([[*prompt, *word[:-1]]])
            said = model(input_ids=ids, use_cache=False).logits[0, -len(word) :].log_softmax(-1)
            sums.append(said[torch.arange(len(word)), list(word)].sum())
        rows.append(torch.stack(sums))
    return torch.stack(rows)


def _save(model: PreTrainedModel, folder: Path, std: float = 0.2) -> None:
    """Weights large enough that every mistake shows in the scores."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = ("norm" in name or "ln_" in name) and name.endswith("weight")
            parameter.normal_(float(is_scale), std, generator=generator)
    model.save_pretrained(folder)
