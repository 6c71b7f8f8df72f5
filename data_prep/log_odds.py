"""What is characteristic of a category: log-odds ratios with an informative Dirichlet prior."""

import numpy as np


def log_odds(counts: np.ndarray, prior_scale: float = 1.0) -> np.ndarray:
    """How characteristic each unit (a chat, a word) is of each category, against all others.

    Monroe, Colaresi and Quinn, "Fightin' Words", Political Analysis 16 (2008), the model with an
    informative Dirichlet prior: the difference of a unit's log-odds inside and outside a category,
    both smoothed by the prior, over its standard deviation. The prior is the corpus itself, so a
    unit is drawn towards its overall share, the more the rarer it is. Above 1.96 the unit is more
    frequent in the category than chance explains; without a strong prior, units seen in one
    category only would look uncertain however frequent they are.

    Args:
        counts: how often each unit was seen in each category, [units, categories], at least 0. All
            units that were seen: the odds are those of a unit against all others.
        prior_scale: pseudo-counts per count in the corpus, above 0.

    Returns:
        z-scores, float64 [units, categories]; 0 for a unit never seen, or the only one seen.
    """
    scores = np.zeros(counts.shape)
    totals = counts.sum(axis=1, dtype=np.float64)
    seen = totals > 0
    if np.count_nonzero(seen) < 2:
        return scores
    totals = totals[seen]
    everything = totals.sum()
    for category in range(counts.shape[1]):
        own = counts[seen, category].astype(np.float64)
        size = own.sum()
        inside = own + prior_scale * totals
        outside = totals - own + prior_scale * totals
        ratio = np.log(inside / (size + prior_scale * everything - inside))
        ratio -= np.log(outside / (everything - size + prior_scale * everything - outside))
        scores[seen, category] = ratio / np.sqrt(1 / inside + 1 / outside)
    return scores
