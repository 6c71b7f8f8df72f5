"""The methods that `benchmarks.scoring` times ours against, each on the same model and prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from launcher.cpu_linear import onednn_linear
from prompting.pangu.modeling import PanguForCausalLM
from prompting.question import Question

POSITIONS = 1024
STUDY_PAD, STUDY_TOKENS = 6, 3


@dataclass(frozen=True)
class Subject:
    """The model and question that all methods are given."""

    model: PreTrainedModel
    question: Question
    whole_strings: bool
    """The tokenizer gives a whole prompt with its label the ids of its pieces."""


def score_harness(subject: Subject, texts: Sequence[str], batch: int) -> list[Tensor]:
    """Sums of the label tokens' log-probabilities for each text, by lm-evaluation-harness."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    asked = subject.question
    harness = HFLM(
        pretrained=subject.model,
        backend="causal",
        tokenizer=asked.tokenizer,
        batch_size=batch,
        add_bos_token=False,
        max_length=POSITIONS,
    )
    pairs = [(asked.prompt.text_with(text), word) for text in texts for word in asked.words]
    if subject.whole_strings:
        requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
        answers = harness.loglikelihood(requests, disable_tqdm=True)
    else:
        ids = [
            (asked.encoded.head + suffix, list(word))
            for suffix in asked.suffixes(texts)
            for word in asked.trie.words
        ]
        both = [(pair, *own) for pair, own in zip(pairs, ids, strict=True)]
        answers = harness._loglikelihood_tokens(both, disable_tqdm=True)
    return list(torch.tensor([sum_ for sum_, _ in answers]).reshape(len(texts), -1))


@torch.inference_mode()
def score_harness_onednn(subject: Subject, texts: Sequence[str], batch: int) -> list[Tensor]:
    """`score_harness` with our linear layers: what is left of the ratio is the method's own."""
    with onednn_linear(subject.model):
        return score_harness(subject, texts, batch)


@torch.inference_mode()
def score_loop(subject: Subject, texts: Sequence[str], batch: int) -> list[Tensor]:
    """Sums of the label tokens' log-probabilities for each text, one sequence per label."""
    asked = subject.question
    words = asked.trie.words
    requests = [
        (len(word), asked.encoded.head + suffix + list(word), row, column)
        for row, suffix in enumerate(asked.suffixes(texts))
        for column, word in enumerate(words)
    ]
    # Words of one length beside each other: no row of the head is computed in vain.
    requests.sort(key=lambda request: (request[0], len(request[1])), reverse=True)
    scores = torch.empty(len(texts), len(words))
    start = 0
    while start < len(requests):
        own = requests[start : start + batch]
        own = [request for request in own if request[0] == own[0][0]]
        start += len(own)
        longest = len(own[0][1])
        ids = torch.zeros(len(own), longest, dtype=torch.int64)
        for row, (_, sequence, _, _) in enumerate(own):
            ids[row, : len(sequence)] = torch.tensor(sequence)
        ends = torch.tensor([len(sequence) for _, sequence, _, _ in own])
        labels = ends[:, None] - torch.arange(own[0][0], 0, -1)
        # The padding stands behind everything that is read, so a causal model needs no mask.
        logits = _logits_at(subject.model, ids[:, :-1], labels - 1)
        chosen = logits.gather(2, ids.gather(1, labels)[..., None])[..., 0]
        sums = (chosen - logits.logsumexp(dim=2)).sum(dim=1)
        scores[[r for _, _, r, _ in own], [c for _, _, _, c in own]] = sums
    return list(scores)


@torch.inference_mode()
def answer_as_study(subject: Subject, texts: Sequence[str], _: int) -> list[list[int]]:
    """The three greedy tokens after each prompt, padded and computed anew for each of them."""
    asked = subject.question
    answers = []
    for suffix in asked.suffixes(texts):
        prompt = asked.encoded.head + suffix
        ids = torch.full((1, POSITIONS), STUDY_PAD)
        ids[0, : len(prompt)] = torch.tensor(prompt)
        for end in range(len(prompt), len(prompt) + STUDY_TOKENS):
            ids[0, end] = subject.model(ids, use_cache=False).logits[0, end - 1].argmax()
        answers.append(ids[0, len(prompt) : len(prompt) + STUDY_TOKENS].tolist())
    return answers


def _logits_at(model: PreTrainedModel, ids: Tensor, places: Tensor) -> Tensor:
    """[rows, kept, vocabulary] logits at `places` [rows, kept]."""
    if isinstance(model, PanguForCausalLM):
        return model(ids, use_cache=False, logits_to_keep=places).logits
    # Llama's own logits_to_keep is the same for all rows.
    states = model.base_model(ids, use_cache=False).last_hidden_state
    return model.get_output_embeddings()(torch.take_along_dim(states, places[..., None], dim=1))
