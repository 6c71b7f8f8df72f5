"""Which examples go through the model together: the same steps on one rank or many."""

import math

import numpy as np

from launcher.config import TrainSettings

# Steps whose examples are sorted by length together before they are shuffled again.
_STEPS_PER_WINDOW = 32


def steps_per_epoch(train: TrainSettings, examples: int) -> int:
    """Optimizer steps of a pass over so many examples; the last may have fewer than the others."""
    return math.ceil(examples / train.global_batch)


def total_steps(train: TrainSettings, examples: int) -> int:
    """Optimizer steps of a whole run, unless it stops early."""
    total = steps_per_epoch(train, examples) * train.epochs
    return total if train.max_steps is None else min(total, train.max_steps)


def step_order(lengths: np.ndarray, global_batch: int, seed: int) -> list[np.ndarray]:
    """Rows of each optimizer step: random, but with neighbours in length together.

    The order depends on the seed alone, not on the number of ranks.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(lengths))
    window = global_batch * _STEPS_PER_WINDOW
    steps = []
    for start in range(0, len(order), window):
        rows = order[start : start + window]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        steps += [rows[i : i + global_batch] for i in range(0, len(rows), global_batch)]
    return [steps[i] for i in generator.permutation(len(steps))]


def micro_batches(
    rows: np.ndarray, lengths: np.ndarray, tokens: int, world_size: int, rank: int
) -> list[tuple[np.ndarray, bool]]:
    """This rank's micro batches of a step, as many as every other rank's.

    Each is (rows, counts): where a rank has fewer than the others it repeats a row that does not
    count, because sharded ranks must run the same number of passes.
    """
    by_length = rows[np.argsort(-lengths[rows], kind="stable")]
    shares = [_cut(by_length[r::world_size], lengths, tokens) for r in range(world_size)]
    own: list[tuple[np.ndarray, bool]] = [(part, True) for part in shares[rank]]
    return own + [(by_length[-1:], False)] * (max(map(len, shares)) - len(own))


def _cut(rows: np.ndarray, lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Cut rows, longest first, into batches whose padded size is at most `tokens`."""
    parts = []
    while len(rows):
        count = max(1, tokens // int(lengths[rows[0]]))
        parts.append(rows[:count])
        rows = rows[count:]
    return parts
