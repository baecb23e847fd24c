"""The options of every verb: the everyday ones as fields, the others in groups.

A step's name is its key in a recipe file and its command; the fields of its groups are flat there (`flat.py`).
"""

from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, ClassVar, TypeVar, get_args

from ...errors import RequestError
from .choices import ExitPlaces, ExitRecipe, GateKind, GateNetwork, Head, Importance, WeightScope
from .limits import Limits
from .method_options import Cuts, Lasso, Leaving, Samples
from .training_options import Training

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

G = TypeVar("G", bound="DataclassInstance")
UNUSED = "unused"


def unused(*names: str) -> dict[str, tuple[str, ...]]:
    """Said of a group in a step: its options that mean nothing there."""
    return {UNUSED: names}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What steps have in common: an option that a group leaves None is the step's own default.

    Raises:
        RequestError: an option that means nothing to this step, or another group in the place of one.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        for each in fields(self):
            if is_dataclass(each.default):
                given, kind = getattr(self, each.name), type(each.default).__name__
                if type(given).__name__ != kind:
                    raise RequestError(f"{self.name}: {each.name} is a dc.{kind}, not {given!r}")
                refuse(self.name, given, each.metadata.get(UNUSED, ()))
                object.__setattr__(self, each.name, completed(given, each.default))


def completed(given: G, defaults: G) -> G:
    """A group whose options are those of `defaults` where they are None."""
    missing = {f.name for f in fields(given) if getattr(given, f.name) is None}
    return replace(given, **{name: getattr(defaults, name) for name in missing})


def refuse(verb: str, given: "DataclassInstance", unused: tuple[str, ...]) -> None:
    """Raises RequestError where a group holds an option that means nothing to a verb."""
    for each in fields(given):
        if each.name in unused and getattr(given, each.name) != each.default:
            raise RequestError(f"{each.name} means nothing to {verb}: leave it out of {type(given).__name__}")


_FINETUNING = Training(lr=1e-3, batch_size=128, optimizer="adamw")  # of steps that say by finetune how long it takes


@dataclass(frozen=True, kw_only=True)
class Prune(Options):
    """Removes the least important channels, heads and hidden units: the model gets physically smaller."""

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
    finetune: int = 0
    """Epochs of training after every cut; needs data."""
    limits: Limits = field(default=Limits())
    cuts: Cuts = field(default=Cuts())
    training: Training = field(default=_FINETUNING, metadata=unused("epochs", "trunk_lr"))


@dataclass(frozen=True, kw_only=True)
class Sparsify(Options):
    """Trains with group lasso, which makes channels, heads, hidden units or layers zero; they leave. Needs data."""

    name: ClassVar[str] = "sparsify"

    macs: float | None = None
    """Share of the multiply-accumulates that stays, 0..1. Give one of macs, params, strength and penalty_ratio."""
    params: float | None = None
    """Share of the parameters that stays, 0..1."""
    finetune: int = 5
    """Passes over the training data without group lasso, after those with it."""
    kinds: tuple[str, ...] = ("axes",)
    """Groups: axes, layers, an axis kind such as channels or heads; or filters, columns, shapes, tiles."""
    distill: float = 0.0
    """Share of the loss that compares with the answers of the model as it came, 0..1."""
    lasso: Lasso = field(default=Lasso())
    limits: Limits = field(default=Limits(), metadata=unused("ceiling", "depth"))
    training: Training = field(
        default=Training(epochs=10, lr=1e-3, batch_size=128, optimizer="adamw"), metadata=unused("trunk_lr")
    )


@dataclass(frozen=True, kw_only=True)
class Retrain(Options):
    """Trains the shape of a smaller model anew, from random or from early weights: a control. Needs data."""

    name: ClassVar[str] = "retrain"

    early: str | None = None
    """A lottery ticket: the model that was made smaller, with earlier weights; a MODEL that is not a state dict."""
    training: Training = field(
        default=Training(epochs=10, lr=1e-3, batch_size=128, optimizer="adamw"), metadata=unused("trunk_lr")
    )


@dataclass(frozen=True, kw_only=True)
class LowRank(Options):
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
    training: Training = field(default=_FINETUNING, metadata=unused("epochs", "trunk_lr"))


@dataclass(frozen=True, kw_only=True)
class Unstructured(Options):
    """A baseline: zeroes the smallest weights, and no tensor gets smaller."""

    name: ClassVar[str] = "unstructured"

    sparsity: float = 0.5
    """Share of the weights that becomes zero, 0..1."""
    scope: WeightScope = "global"
    """All weights compete, or every layer loses the same share."""
    finetune: int = 0
    """Epochs of training after it, which keeps the zeros; needs data."""
    training: Training = field(default=_FINETUNING, metadata=unused("epochs", "trunk_lr"))


@dataclass(frozen=True, kw_only=True)
class Compare(Options):
    """Prunes structure, cuts ranks and zeroes single weights to the same shares of the parameters: accuracy, speed."""

    name: ClassVar[str] = "compare"

    shares: tuple[float, ...] = (0.5, 0.25)
    """Shares of the parameters that stay, such as 0.5 0.25."""
    finetune: int = 1
    """Epochs of training of every compared model."""
    training: Training = field(default=_FINETUNING, metadata=unused("epochs", "trunk_lr"))


@dataclass(frozen=True, kw_only=True)
class Convert(Options):
    """Adds early exits, trains them and chooses their thresholds; without data on inputs made out of the model."""

    name: ClassVar[str] = "convert"

    exits: int | ExitPlaces | tuple[str, ...] = 3
    """How many early exits, or the graph nodes they follow; every block, the model's own, those that a search keeps."""
    head: Head = "auto"
    """What the exits answer with."""
    recipe: ExitRecipe = "distill"
    """How they are trained; each of its phases takes the epochs."""
    max_loss: float = 0.005
    """Accuracy, 0..1, that may be lost against the static model on the calibration split."""
    macs: float | None = None
    """Instead of max_loss a budget: mean MACs as a share of the static model's, 0..1."""
    latency: float | None = None
    """Instead of max_loss a budget: mean milliseconds on this device as a share of the static model's, 0..1."""
    freeze_trunk: bool = True
    """Train the heads only: quicker, and the final exit stays exactly the static model."""
    leaving: Leaving = field(default=Leaving())
    samples: Samples = field(default=Samples())
    training: Training = field(
        default=Training(epochs=4, lr=1e-2, trunk_lr=0.01, batch_size=128), metadata=unused("optimizer")
    )


@dataclass(frozen=True, kw_only=True)
class Gate(Options):
    """Gives each residual branch a gate that opens for the samples that need it, trained with the model. Needs data."""

    name: ClassVar[str] = "gate"

    kind: GateKind = "gumbel"
    """How gates learn: ConvNet-AIG's hard decisions with noise; SkipNet's, or BlockDrop's, policy gradients."""
    macs: float | None = None
    """Mean MACs of a sample as a share of the static model's, gates included, 0..1. Give macs or rate."""
    rate: float | None = None
    """With gumbel: share of the samples for which each branch runs, 0..1."""
    gate: GateNetwork | None = None
    """What decides; by default pooled for gumbel, recurrent for skipnet, policy for blockdrop."""
    distill: float = 0.5
    """Share of the loss that compares with the static model's answers, 0..1."""
    settle: float = 0.01
    """A gate that decides alike for all but this share of the calibration samples is taken out; 0: none is."""
    pretrain: bool = True
    """With skipnet: supervised training before the policy gradients."""
    training: Training = field(default=Training(epochs=10, lr=3e-3, trunk_lr=0.3, batch_size=128, optimizer="adamw"))


@dataclass(frozen=True, kw_only=True)
class Export(Options):
    """Writes the model as one ONNX file and checks it in onnxruntime against PyTorch."""

    name: ClassVar[str] = "export"

    onnx: str = "model.onnx"
    """Name of the file, in the run folder."""


Making = Prune | Sparsify | Retrain | LowRank | Unstructured | Gate | Convert  # what makes another model
Step = Making | Export
STEPS: dict[str, type[Step]] = {kind.name: kind for kind in get_args(Step)}
