"""Every score equals that of one whole sequence per label word, without cache or batch."""

import copy
import math
import random
from typing import Any

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from prompting import models, scorer
from prompting.labels import LabelTrie

KINDS = ["pangu", "gpt2", "llama"]
TOLERANCE: dict[str, Any] = {"atol": 1e-4, "rtol": 0}


def trie_of(*words: tuple[int, ...], owners: tuple[int, ...] | None = None) -> LabelTrie:
    return LabelTrie(words, owners or tuple(range(len(words))))


def many() -> LabelTrie:
    draw = random.Random(0)
    words = {tuple(draw.choices(range(20, 26), k=draw.randint(1, 4))) for _ in range(40)}
    return trie_of(*sorted(words))


TRIES = {
    "of several lengths": trie_of((20,), (21, 22, 23), (24, 25)),
    "shared starts": trie_of((20, 21, 22), (20, 21, 23), (20, 24), (25, 20)),
    "prefixes of each other": trie_of((20,), (20, 21), (20, 21, 22, 23), (21,)),
    "a token again and again": trie_of((20, 20, 20), (20, 20, 21, 20), (21, 20)),
    "one label": trie_of((20, 21)),
    "many": many(),
}


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(10, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [0, 1, 9])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_scores_equal_brute_force(load_model, brute_force, kind, attention, length):
    model = load_model(kind, attention)
    head = random_ids(1, length, seed=1)[0].tolist()
    suffixes = random_ids(2, 5)
    prompts = [[*head, *row] for row in suffixes.tolist()]
    prefix = scorer.compute_prefix(model, head)
    for name, trie in TRIES.items():
        scored = scorer.score_words(model, prefix, suffixes, trie)
        expected = brute_force(model, prompts, trie)
        assert scored.shape == (2, len(trie.words))
        torch.testing.assert_close(
            scored, expected, **TOLERANCE, msg=f"{name}: off by {(scored - expected).abs().max()}"
        )
        assert (expected[0] - expected[1]).abs().max() > 0.05, "too alike to prove anything"


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_suffix_of_one_token(load_model, brute_force, kind):
    """The shortest suffix: its only token is both the end of the prompt and where labels start."""
    model, trie = load_model(kind), TRIES["shared starts"]
    prefix = scorer.compute_prefix(model, [11, 12])
    scored = scorer.score_words(model, prefix, torch.tensor([[13], [14]]), trie)
    expected = brute_force(model, [[11, 12, 13], [11, 12, 14]], trie)
    torch.testing.assert_close(scored, expected, **TOLERANCE)


@torch.no_grad()
def test_parts_that_fit_a_cache_give_the_same(load_model, monkeypatch):
    model, trie = load_model("pangu"), TRIES["shared starts"]
    prefix = scorer.compute_prefix(model, [11, 12])
    whole = scorer.score_words(model, prefix, random_ids(5, 4), trie)
    for held in (1, 2 * model.config.vocab_size * (len(trie.tokens) + 1)):
        monkeypatch.setattr(scorer, "_CACHED_LOGITS", held)
        parts = scorer.score_words(model, prefix, random_ids(5, 4), trie)
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_labels_of_one_token_feed_nothing(load_model, brute_force, kind):
    model, trie = load_model(kind), trie_of((20,), (21,), (22,))
    fed: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, given, out: fed.append(given[0].numel())
    )
    try:
        scored = scorer.score_words(
            model, scorer.compute_prefix(model, [11, 12]), random_ids(3, 4), trie
        )
    finally:
        hook.remove()
    assert fed == [2, 3 * 4]
    expected = brute_force(model, [[11, 12, *row] for row in random_ids(3, 4).tolist()], trie)
    torch.testing.assert_close(scored, expected, **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_prefix_is_not_changed_by_use(load_model, kind):
    """Batches of any size and generation leave it as it was: it is computed once per run."""
    model, trie = load_model(kind), TRIES["shared starts"]
    prefix = scorer.compute_prefix(model, [11, 12, 13])
    before = [state.clone() for state in prefix.keys + prefix.values]
    first = scorer.score_words(model, prefix, random_ids(2, 5), trie)
    scorer.score_words(model, prefix, random_ids(5, 3), trie)
    scorer.generate(model, prefix, random_ids(3, 2), new_tokens=3, lockstep=True)
    again = scorer.score_words(model, prefix, random_ids(2, 5), trie)
    assert torch.equal(first, again)
    assert all(map(torch.equal, before, prefix.keys + prefix.values))


@pytest.mark.parametrize("length", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_brute_force(load_model, brute_force, kind, length):
    """Of every weight: through the trie, the batch and the shared prefix."""
    model, trie = load_model(kind), TRIES["prefixes of each other"]
    head = random_ids(1, length, seed=1)[0].tolist()
    suffixes = random_ids(3, 4)
    counted = torch.randn(3, len(trie.words), generator=torch.Generator().manual_seed(2))
    weights = dict(model.named_parameters())

    scored = scorer.score_words(model, scorer.compute_prefix(model, head), suffixes, trie)
    ours = torch.autograd.grad((scored * counted).sum(), list(weights.values()))
    expected = brute_force(model, [[*head, *row] for row in suffixes.tolist()], trie)
    theirs = torch.autograd.grad((expected * counted).sum(), list(weights.values()))

    for name, own, other in zip(weights, ours, theirs, strict=True):
        assert (own - other).norm() <= 1e-4 * max(1.0, float(other.norm())), name
    table = next(i for i, own in enumerate(weights) if "embed_tokens" in own or "wte" in own)
    assert theirs[table][head + suffixes.flatten().tolist()].norm() > 0.1


@pytest.mark.parametrize("length", [0, 1, 6])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_soft_vectors_and_padding_equal_brute_force(load_model, kind, attention, length):
    """Vectors at any place of prompts of several lengths: scores, and the vectors' gradient."""
    model, trie = load_model(kind, attention), TRIES["prefixes of each other"]
    vocabulary = model.config.vocab_size
    draw = torch.Generator().manual_seed(4)
    soft = (0.5 * torch.randn(6, 32, generator=draw)).requires_grad_()
    one, two, three, *others = range(vocabulary, vocabulary + 6)
    head = [one, two, 11, three, 12, 13][:length]
    suffixes = [[20, 21, *others, 30], [*others, 22], [23, 24, 25, 30, *others], [26]]
    batch = scorer.left_padded(suffixes, [4, 2, 7, 0])
    assert batch.rows == [4, 2, 7, 0]
    assert batch.pads is not None and batch.pads.tolist() == [1, 3, 0, 6]
    assert scorer.left_padded(suffixes[:1] * 2, [1, 2]).pads is None
    counted = torch.randn(4, len(trie.words), generator=draw)

    prefix = scorer.compute_prefix(model, head, soft)
    scored = scorer.score_words(model, prefix, batch.ids, trie, soft, batch.pads)
    (ours,) = torch.autograd.grad((scored * counted).sum(), [soft])
    table = torch.cat([model.get_input_embeddings().weight, soft])
    rows = []
    for suffix in suffixes:
        for word in trie.words:
            embedded = table[[*head, *suffix, *word[:-1]]][None]
            said = model(inputs_embeds=embedded, use_cache=False).logits[0, -len(word) :]
            rows.append(said.log_softmax(-1)[torch.arange(len(word)), list(word)].sum())
    expected = torch.stack(rows).view(4, -1)
    (theirs,) = torch.autograd.grad((expected * counted).sum(), [soft])

    torch.testing.assert_close(scored, expected, **TOLERANCE)
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    used = [vector for vector in range(6) if vocabulary + vector in [*head, *others]]
    assert (theirs.norm(dim=1) > 1e-3).nonzero()[:, 0].tolist() == used


@pytest.mark.parametrize("length", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_states_in_front_equal_a_cache_of_transformers(load_model, kind, length):
    """Keys and values that no token has, in front of the common ids; and their gradient."""
    model, trie = load_model(kind), TRIES["prefixes of each other"]
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    draw = torch.Generator().manual_seed(5)
    shape = (2 * config.num_hidden_layers, 1, heads, 4, 8)
    states = (0.5 * torch.randn(shape, generator=draw)).requires_grad_()
    before = scorer.Prefix(4, [*states[0::2]], [*states[1::2]])
    head = [11, 12, 13][:length]
    suffixes = [[20, 21, 22, 30], [23, 30]]
    counted = torch.randn(2, len(trie.words), generator=draw)

    prefix = scorer.compute_prefix(model, head, None, before)
    assert prefix.length == 4 + length
    batch = scorer.left_padded(suffixes, range(2))
    scored = scorer.score_words(model, prefix, batch.ids, trie, None, batch.pads)
    (ours,) = torch.autograd.grad((scored * counted).sum(), [states])
    rows = []
    for suffix in suffixes:
        for word in trie.words:
            cache: Any = DynamicCache()
            for layer in range(config.num_hidden_layers):
                cache.update(states[2 * layer], states[2 * layer + 1], layer)
            ids = torch.tensor([[*head, *suffix, *word[:-1]]])
            said = model(input_ids=ids, cache=cache, use_cache=True).logits[0, -len(word) :]
            rows.append(said.log_softmax(-1)[torch.arange(len(word)), list(word)].sum())
    expected = torch.stack(rows).view(2, -1)
    (theirs,) = torch.autograd.grad((expected * counted).sum(), [states])

    torch.testing.assert_close(scored, expected, **TOLERANCE)
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    assert theirs.flatten(1).norm(dim=1).min() > 1e-3, "a layer's states do nothing"


@torch.no_grad()
def test_sliding_window_is_exact_up_to_its_size(brute_force):
    """`max_positions` holds prompts within the window, where every token sees all before it."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        sliding_window=16,
        initializer_range=0.2,
    )
    model = MistralForCausalLM(config).eval()
    limit = models.max_positions(config)
    assert limit == 16
    trie = trie_of((20, 21, 22), (20, 23), (24,))
    head = random_ids(1, 6)[0].tolist()
    suffixes = random_ids(2, limit - len(head) - 2)  # two nodes deep is as far as tokens are fed
    scored = scorer.score_words(model, scorer.compute_prefix(model, head), suffixes, trie)
    expected = brute_force(model, [[*head, *row] for row in suffixes.tolist()], trie)
    torch.testing.assert_close(scored, expected, **TOLERANCE)


def probabilities(rows: int, words: int) -> torch.Tensor:
    """Log-probabilities of words, which need not add up to 1."""
    return 4 * torch.randn(rows, words, generator=torch.Generator().manual_seed(3)) - 8


def test_sum_is_the_normalised_probability():
    words, trie = probabilities(4, 3), TRIES["of several lengths"]
    p = words.double().exp()
    expected = (p / p.sum(1, keepdim=True)).log().float()
    torch.testing.assert_close(scorer.label_scores(words, trie, "sum"), expected)


def test_mean_divides_by_the_tokens_of_each_word():
    words, trie = probabilities(4, 3), TRIES["of several lengths"]
    p = torch.stack([words[:, 0], words[:, 1] / 3, words[:, 2] / 2], dim=1).exp()
    expected = (p / p.sum(1, keepdim=True)).log()
    torch.testing.assert_close(scorer.label_scores(words, trie, "mean"), expected)


def test_pmi_is_contextual_calibration():
    """Zhao et al. 2021, section 4: softmax(W p) with W = diag(p_cf)^-1 and p, p_cf normalised.

    The ratios W p are the same up to a factor of the row; where theirs go through a softmax once
    more, ours are divided by their sum, so the order of the labels is theirs.
    """
    trie = TRIES["of several lengths"]
    # In double, and not far apart: their second softmax saturates.
    words, empty = probabilities(50, 3).double() / 4, probabilities(51, 3)[50:].double() / 4
    p, p_cf = words.softmax(1), empty.softmax(1)
    ratios = p @ torch.diag(p_cf[0]).inverse()
    calibrated = ratios.softmax(1)

    scores = scorer.label_scores(words, trie, "pmi", empty)

    torch.testing.assert_close(scores.exp(), ratios / ratios.sum(1, keepdim=True))
    assert torch.equal(scores.argsort(1), calibrated.argsort(1))
    assert not torch.equal(scores.argmax(1), words.argmax(1)), "calibration changes nothing here"
    same = scorer.label_scores(empty, trie, "pmi", empty)
    torch.testing.assert_close(same, torch.full((1, 3), -math.log(3)).double())


@pytest.mark.parametrize("scoring", ["sum", "mean", "pmi"])
def test_words_of_a_label_add_up(scoring):
    trie = trie_of((20,), (21, 22), (23,), (24, 25), owners=(0, 0, 1, 2))
    words, empty = probabilities(4, 4), probabilities(5, 4)[4:]
    if scoring == "mean":
        p = (words / torch.tensor([1.0, 2, 1, 2])).exp()
    else:
        p = words.exp() / (empty.exp() if scoring == "pmi" else 1)
    p = torch.stack([p[:, 0] + p[:, 1], p[:, 2], p[:, 3]], dim=1)
    expected = (p / p.sum(1, keepdim=True)).log()
    torch.testing.assert_close(scorer.label_scores(words, trie, scoring, empty), expected)


@pytest.mark.parametrize("tokens", [1, 64, 1000])
@pytest.mark.parametrize("fed", [0, 3])
@pytest.mark.parametrize("vocabulary", [100, 2**22])
def test_batches(tokens, fed, vocabulary):
    draw = random.Random(0)
    suffixes = [[draw.randrange(100) for _ in range(draw.randint(1, 12))] for _ in range(200)]
    batches = list(scorer.length_batches(suffixes, tokens=tokens, fed=fed, vocabulary=vocabulary))
    assert sorted(row for batch in batches for row in batch.rows) == list(range(200))
    for batch in batches:
        assert batch.ids.tolist() == [suffixes[row] for row in batch.rows]
        rows, length = batch.ids.shape
        assert rows == 1 or rows * (length + fed) <= tokens
        assert rows == 1 or rows * (fed + 1) * vocabulary <= 2**26
    lengths = [batch.ids.shape[1] for batch in batches]
    assert lengths == sorted(lengths, reverse=True)
    for length in set(lengths):
        sizes = [len(batch.rows) for batch in batches if batch.ids.shape[1] == length]
        assert max(sizes) - min(sizes) <= 1, "cut unevenly"
        most = max(1, min(tokens // (length + fed), 2**26 // (vocabulary * (fed + 1))))
        assert len(sizes) == -(-sum(sizes) // most), "more batches than needed"


@pytest.fixture
def ending(load_model):
    """`ending(kind, ids)`: a model of its own whose text ends at `ids`."""

    def make(kind: str, ids: int | list[int] | None):
        model = copy.copy(load_model(kind))
        model.generation_config = copy.deepcopy(model.generation_config)
        model.generation_config.eos_token_id = ids
        return model

    return make


@pytest.mark.parametrize("length", [0, 6])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_generate_equals_transformers(ending, kind, length):
    head, suffixes = random_ids(1, length, seed=1)[0].tolist(), random_ids(6, 4)
    prompts = torch.tensor([[*head, *row] for row in suffixes.tolist()])
    steps = 8

    def theirs(model):
        made = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=steps,
            pad_token_id=0,
        )[:, prompts.shape[1] :].tolist()
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return [row[: min([row.index(e) for e in ends if e in row] + [steps])] for row in made]

    endless = ending(kind, None)
    free = scorer.generate(
        endless, scorer.compute_prefix(endless, head), suffixes, new_tokens=steps, lockstep=False
    )
    assert free == theirs(endless)
    assert all(len(row) == steps for row in free)
    # What the model says third in one row and fifth in another now ends a text.
    for ends in (free[0][2], [free[0][2], free[1][4]], [row[2] for row in free]):
        model = ending(kind, ends)
        prefix = scorer.compute_prefix(model, head)
        expected = theirs(model)
        passes: list[int] = []
        hook = model.register_forward_hook(lambda *_, seen=passes: seen.append(1))
        try:
            loose = scorer.generate(model, prefix, suffixes, new_tokens=steps, lockstep=False)
            needed = len(passes)
            strict = scorer.generate(model, prefix, suffixes, new_tokens=steps, lockstep=True)
        finally:
            hook.remove()
        assert loose == strict == expected
        assert any(len(row) < steps for row in expected)
        assert len(passes) - needed == steps
        longest = max(len(row) for row in expected)
        assert needed == min(steps, longest + 1)
    assert needed < steps, "no case in which all rows end early"
