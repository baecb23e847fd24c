"""The steps of recipes: frozen dataclasses whose fields are the options here, in Python and on the command line.

A step's name is its key in a recipe file and its command.
"""

import typing
from dataclasses import dataclass
from typing import ClassVar, Literal

Importance = Literal["l1", "l2", "taylor", "hessian", "bn-scale", "geometric-median", "lamp", "activation", "random"]

TrainingRecipe = Literal[
    "distill",
    "distill-all",
    "sum",
    "weighted",
    "teachers",
    "ramped",
    "hints",
    "two-stage",
    "frozen-teacher",
    "balanced",
    "ztw",
    "meta",
]


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Removes the least important channels, heads and hidden units: physically, everywhere they occur."""

    name: ClassVar[str] = "prune"

    ratio: float | None = None
    """Share of the channels that stays, 0..1. Give one of ratio, macs, params, bytes and latency."""
    macs: float | None = None
    """Share of the multiply-accumulates that stays, 0..1."""
    params: float | None = None
    """Share of the parameters that stays, 0..1."""
    bytes: float | None = None
    """Share of the bytes of parameters and buffers that stays, 0..1."""
    latency: float | None = None
    """Share of the wall clock, measured on the model's device, that stays, 0..1."""
    importance: Importance = "l2"
    """How channels are ranked; taylor, hessian and activation need data."""
    scope: Literal["global", "axis", "block"] | None = None
    """All channels compete, or every axis, or every block, loses the same share.

    By default axis, and global with latency or depth."""
    floor: float = 0.1
    """Least share of every axis that stays."""
    ceiling: float = 1.0
    """Largest share of every axis that stays."""
    round_to: int | None = None
    """Keep a multiple of this many channels of every axis; by default 1, with latency 8 or 16 where an axis is wide."""
    ignore: tuple[str, ...] = ()
    """Modules or parameters whose axes stay whole, by name."""
    exact: bool = False
    """Norms keep dividing by their old counts."""
    depth: bool = False
    """Whole residual branches may go as well."""
    latency_batch: int = 1
    """Samples per call when latency is measured."""
    steps: int = 1
    """Number of cuts, each ranked anew."""
    finetune: int = 0
    """Epochs of training after every cut; needs data."""
    distill: float = 0.0
    """Share of that training's loss that compares with the answers of the model as it came, 0..1."""
    lr: float = 1e-3
    """Peak learning rate of that training."""
    batch_size: int = 128
    """Samples per step of that training."""


@dataclass(frozen=True, kw_only=True)
class Sparsify:
    """Trains with group lasso, which drives whole groups of weights to zero; they leave the model. Needs data."""

    name: ClassVar[str] = "sparsify"

    macs: float | None = None
    """Share of the multiply-accumulates that stays, 0..1. Give one of macs, params, strength and penalty_ratio."""
    params: float | None = None
    """Share of the parameters that stays, 0..1."""
    strength: float | None = None
    """Factor of the penalty, constant, instead of one that rises until a share is reached."""
    penalty_ratio: float | None = None
    """The same, chosen so that the penalty is this share of the first loss; such as 0.2, with sgd."""
    epochs: int = 10
    """Passes over the training split with group lasso."""
    finetune: int = 5
    """Passes after them without it."""
    shrink_every: int = 2
    """Epochs after which zeroed groups leave the model."""
    kinds: tuple[str, ...] = ("axes",)
    """Groups: axes, layers, an axis kind such as channels or heads; or filters, columns, shapes, tiles."""
    floor: float = 0.1
    """Least share of every axis that stays."""
    round_to: int = 1
    """Kept counts are multiples of this; 8 trains and runs faster on many machines."""
    ignore: tuple[str, ...] = ()
    """Modules or parameters whose axes stay whole, by name."""
    ema: float | None = None
    """Decay of an average of the weights, which the result then has, such as 0.999."""
    grow_batch: bool = False
    """Larger batches, and learning rates, as the model needs less memory."""
    distill: float = 0.0
    """Share of the loss that compares with the answers of the model as it came, 0..1."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum 0.9."""
    lr: float = 1e-3
    """Peak learning rate."""
    batch_size: int = 128
    """Samples per training step."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of training; by default what accelerate is configured to."""


@dataclass(frozen=True, kw_only=True)
class Retrain:
    """A control: trains the shape of a smaller model anew, from random or from earlier weights. Needs data."""

    name: ClassVar[str] = "retrain"

    early: str | None = None
    """A lottery ticket: the model that was made smaller, with earlier weights; a MODEL that is not a state dict."""
    epochs: int = 10
    """Passes over the training split."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum 0.9."""
    lr: float = 1e-3
    """Peak learning rate."""
    batch_size: int = 128
    """Samples per training step."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of training; by default what accelerate is configured to."""


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """A baseline: replaces linear layers and convolutions by two thinner ones each."""

    name: ClassVar[str] = "low-rank"

    energy: float | None = None
    """Share of each layer's squared singular values that stays, 0..1. Give one of energy, rank, macs and params."""
    rank: int | None = None
    """One rank for all layers."""
    macs: float | None = None
    """Share of the multiply-accumulates that stays, 0..1."""
    params: float | None = None
    """Share of the parameters that stays, 0..1."""
    finetune: int = 0
    """Epochs of training after it; needs data."""
    lr: float = 1e-3
    """Peak learning rate of that training."""
    batch_size: int = 128
    """Samples per step of that training."""


@dataclass(frozen=True, kw_only=True)
class Unstructured:
    """A baseline: zeroes the smallest weights, and no tensor gets smaller."""

    name: ClassVar[str] = "unstructured"

    sparsity: float = 0.5
    """Share of the weights that becomes zero, 0..1."""
    scope: Literal["global", "layer"] = "global"
    """All weights compete, or every layer loses the same share."""
    finetune: int = 0
    """Epochs of training after it, which keeps the zeros; needs data."""
    lr: float = 1e-3
    """Peak learning rate of that training."""
    batch_size: int = 128
    """Samples per step of that training."""


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Adds early exits, trains them and chooses their thresholds; without data on inputs made out of the model."""

    name: ClassVar[str] = "convert"

    exits: int | Literal["every", "own", "search"] | tuple[str, ...] = 3
    """How many early exits, or the graph nodes they follow; every block, the model's own, those that a search keeps."""
    head: Literal["auto", "linear", "mlp", "attention", "copy", "cascade"] = "auto"
    """What the exits answer with."""
    recipe: TrainingRecipe = "distill"
    """How they are trained; each of its phases takes the epochs."""
    shots: int | None = None
    """Train on this many labelled samples per class only."""
    impressions: int = 384
    """How many inputs are synthesised where there is no data."""
    epochs: int = 4
    """Passes over the training split."""
    lr: float = 1e-2
    """Peak learning rate of the new heads."""
    trunk_lr: float = 0.01
    """Learning rate of the trained layers, as a share of lr, where they are not frozen."""
    batch_size: int = 128
    """Samples per training step."""
    freeze_trunk: bool = True
    """Train the heads only: quicker, and the final exit stays exactly the static model."""
    rule: Literal["max-softmax", "entropy", "margin", "energy", "patience", "learned"] = "max-softmax"
    """Leave at the first exit that is sure: by its probabilities, agreement with those before, a learned score."""
    threshold_search: Literal["grid", "genetic", "quota", "uniform"] | None = None
    """How thresholds are found; by default on a grid, genetic for patience and learned, uniform without data."""
    max_loss: float = 0.005
    """Accuracy, 0..1, that may be lost against the static model on the calibration split."""
    macs: float | None = None
    """Instead of max_loss a budget: mean MACs as a share of the static model's, 0..1."""
    latency: float | None = None
    """Instead of max_loss a budget: mean milliseconds on this device as a share of the static model's, 0..1."""
    risk: float | None = None
    """Instead of max_loss a rate, 0..1, promised for unseen data, such as 0.01, on half the calibration split."""
    confidence: float = 0.9
    """How sure that promise is, 0..1."""
    risk_of: Literal["disagreement", "accuracy-loss"] = "disagreement"
    """What is promised to be rare: other answers than the full model's, or accuracy lost against it."""
    cost: Literal["macs", "latency"] | None = None
    """What is to be saved; latency is measured on this device, where asking an exit takes time. By default MACs."""
    latency_batch: int = 1
    """Samples per call when latency is measured."""
    fallback: Literal["final", "ensemble"] = "final"
    """Who answers samples that no exit is sure of: the final exit, or the mean of all on the way."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of training; by default what accelerate is configured to."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Gives each residual branch a gate that opens for the samples that need it, trained with the model. Needs data."""

    name: ClassVar[str] = "gate"

    kind: Literal["gumbel", "skipnet", "blockdrop"] = "gumbel"
    """How gates learn: ConvNet-AIG's hard decisions with noise; SkipNet's, or BlockDrop's, policy gradients."""
    macs: float | None = None
    """Mean MACs of a sample as a share of the static model's, gates included, 0..1. Give macs or rate."""
    rate: float | None = None
    """With gumbel: share of the samples for which each branch runs, 0..1."""
    gate: Literal["pooled", "ff1", "ff2", "recurrent", "policy"] | None = None
    """What decides; by default pooled for gumbel, recurrent for skipnet, policy for blockdrop."""
    distill: float = 0.5
    """Share of the loss that compares with the static model's answers, 0..1."""
    pretrain: bool = True
    """With skipnet: supervised training before the policy gradients."""
    settle: float = 0.01
    """A gate that decides alike for all but this share of the calibration samples is taken out; 0: none is."""
    epochs: int = 10
    """Passes over the training split, all phases together."""
    lr: float = 3e-3
    """Peak learning rate of the gates."""
    trunk_lr: float = 0.3
    """Learning rate of the trained layers, as a share of lr."""
    batch_size: int = 128
    """Samples per training step."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of training; by default what accelerate is configured to."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Writes the model as one ONNX file and checks it in onnxruntime against PyTorch."""

    name: ClassVar[str] = "export"

    onnx: str = "model.onnx"
    """Name of the file, in the run folder."""


Making = Prune | Sparsify | Retrain | LowRank | Unstructured | Gate | Convert  # what makes another model
Step = Making | Export
STEPS: dict[str, type[Step]] = {kind.name: kind for kind in typing.get_args(Step)}
