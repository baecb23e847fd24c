"""The groups of options that one method has: how often to cut, when to leave, what to train on, how lasso goes."""

from dataclasses import dataclass

from .choices import Cost, Fallback, RiskOf, Rule, Scope, ThresholdSearch


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """How pruning goes about it."""

    steps: int = 1
    """Number of cuts, each ranked anew."""
    scope: Scope | None = None
    """All channels compete, or every axis, or every block, loses the same share.

    By default axis, and global with latency or depth."""
    exact: bool = False
    """Norms keep dividing by their old counts."""
    distill: float = 0.0
    """Share of the loss of fine-tuning that compares with the answers of the model as it came, 0..1."""
    latency_batch: int = 1
    """Samples per call when latency is measured."""


@dataclass(frozen=True, kw_only=True)
class Lasso:
    """How group lasso acts while the model is trained."""

    strength: float | None = None
    """Instead of a share that stays, the factor of the penalty, constant; with adamw such as .01 to 1."""
    penalty_ratio: float | None = None
    """The same, chosen so that the penalty is this share of the first loss; such as 0.2, with sgd."""
    shrink_every: int = 2
    """Epochs after which zeroed groups leave the model."""
    ema: float | None = None
    """Decay of an average of the weights, which the result then has, such as 0.999."""
    grow_batch: bool = False
    """Larger batches, and learning rates, as the model needs less memory."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What exits are trained on where there is little or no data."""

    shots: int | None = None
    """Train on this many labelled samples per class only, drawn by the seed."""
    impressions: int = 384
    """How many inputs are synthesised where there is no data."""


@dataclass(frozen=True, kw_only=True)
class Leaving:
    """When samples leave at an exit, and how the thresholds for it are chosen."""

    rule: Rule = "max-softmax"
    """Leave at the first exit that is sure: by its probabilities, agreement with those before, a learned score."""
    threshold_search: ThresholdSearch | None = None
    """How thresholds are found; by default on a grid, genetic for patience and learned, uniform without data."""
    risk: float | None = None
    """Instead of max_loss a rate, 0..1, promised for unseen data, such as 0.01, on half the calibration split."""
    confidence: float = 0.9
    """How sure that promise is, 0..1."""
    risk_of: RiskOf = "disagreement"
    """What is promised to be rare: other answers than the full model's, or accuracy lost against it."""
    cost: Cost | None = None
    """What is to be saved; latency is measured on this device, where asking an exit takes time. By default MACs."""
    latency_batch: int = 1
    """Samples per call when latency is measured."""
    fallback: Fallback = "final"
    """Who answers samples that no exit is sure of: the final exit, or the mean of all on the way."""
