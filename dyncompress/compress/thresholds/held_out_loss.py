"""How much of the allowed accuracy loss may be spent on the calibration set, so that unseen samples stay within it.

Thresholds are chosen on the calibration set, so they look better there than they are: on 2,000 samples the loss on
unseen ones is about 0.3 points larger. The cross-validated loss of a slack s, with thresholds t_{-f(i)}(s) chosen
without the fold of sample i and d_i(s) = right(static, i) - right(t_{-f(i)}(s), i), is free of that. The one to use is

    max { s <= max_loss : mean_i d_i(s) + sd_i d_i(s) / sqrt(N) <= max_loss },      or 0 where there is none,

with one standard error of safety (the one-standard-error rule of Breiman et al., Classification and Regression Trees,
1984), d_i averaged over several divisions into folds. Small calibration sets therefore buy less. Listed candidates
(`candidates`) stay the same in every fold; the choice among them is what is judged.
"""

import numpy as np
from torch import Tensor

from .operating_points import Search

_FOLDS = 5
_DIVISIONS = 4
_LEVELS = 11


def held_out_slack(search: Search, static_right: Tensor, max_loss: float) -> float:
    """The accuracy to give away on the calibration set, 0..max_loss, so that `max_loss` holds for unseen samples.

    Args:
        search: over the calibration set.
        static_right: (N,) bool, whether the static model answers each of its samples rightly.
        max_loss: accuracy (0..1) that may be lost against the static model.
    """
    count = search.samples
    if count < _FOLDS:
        return 0.0
    slacks = np.linspace(0, max_loss, _LEVELS)
    right = static_right.double().cpu().numpy()
    lost = np.zeros((_LEVELS, count))
    random = np.random.default_rng(0)
    for held in (fold for _ in range(_DIVISIONS) for fold in np.array_split(random.permutation(count), _FOLDS)):
        kept = np.delete(np.arange(count), held)
        chosen_on, judged_on = search.subset(kept), search.subset(held)
        for level, slack in enumerate(slacks):
            floor = min(float(right[kept].mean() - slack), chosen_on.best_accuracy)
            thresholds = chosen_on.for_accuracy(floor).thresholds
            lost[level, held] += (right[held] - judged_on.right_with(thresholds)) / _DIVISIONS
    bound = lost.mean(1) + lost.std(1) / np.sqrt(count)
    return float(slacks[bound <= max_loss + 1e-9].max(initial=0.0))
