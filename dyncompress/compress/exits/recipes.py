"""How exits are trained, by the name of a published recipe: phases, each a loss and what it moves.

    distill         Phuong & Lampert 2019: labels, and the last exit teaches the others
    distill-all     the same, with every later exit as teacher
    sum             MSDNet 2018: cross-entropy of every exit
    weighted        BranchyNet 2016: cross-entropy, weights falling from 1.0 at the first exit to 0.3 at the last
    ramped          Shallow-Deep Networks 2019: weights that grow during training to .15 ... .9
    hints           BYOT 2019, SCAN 2019: labels, the last exit's answers, and its features
    teachers        labels, and a teacher per exit that attends to the later exits' features and is then removed
    two-stage       DeeBERT 2020: the model alone, then frozen under the exits' cross-entropy
    frozen-teacher  FastBERT 2020: the model alone, then frozen, and the exits learn its answers, without labels
    balanced        gradient equilibrium (Li et al. 2019): the trunk's gradients divided by the number of exits behind
    ztw             Zero Time Waste 2021: cascading heads, then, alone, the ensembles of their answers
    meta            first-order MAML (Finn et al. 2017): heads from which a few steps on a few samples lead far

With a frozen trunk the phases that train the model alone fall away. Where the trunk learns, a last phase with the trunk
frozen is frozen in evaluation mode: batch norms and dropout too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from ...errors import RequestError
from ...passes.edit.outputs import all_logits
from ...passes.exits.read_exits import exit_modules
from ...passes.graph.walk import upstream
from ...runtime.predict.dynamic import DynamicModel
from ..options.choices import ExitRecipe
from ..options.steps import Convert, completed
from ..options.training_options import Run, Training
from ..training.batches import LabelledData
from ..training.trainer import Epoch, fit, fixed, in_phases
from .exit_losses import ExitLoss, FrozenTeacher, Hints, Ramped, Teachers, Weighted
from .meta_exits import train_meta
from .self_distillation import SelfDistillation
from .taps import Hinted, Tapped, Taught

_BRANCHY = (1.0, 0.3)  # weights of the first and of the last exit
_RAMP = (0.15, 0.9)  # where the weights of the first and of the last early exit end


@dataclass(frozen=True)
class Phase:
    """One training run.

    loss: made from the number of early exits. moves: what learns. taps: what it reads beside logits.
    """

    loss: Callable[[int], ExitLoss]
    moves: Literal["all", "trunk", "heads", "answers", "ensembles"] = "all"
    balanced: bool = False
    taps: type[Tapped] | None = None


def _even(first: float, last: float, count: int) -> list[float]:
    return torch.linspace(first, last, count).tolist()


def _sum(exits: int) -> ExitLoss:
    return Weighted([1.0] * (exits + 1))


_ALONE = Phase(lambda exits: Weighted([0.0] * exits + [1.0]), "trunk")

RECIPES: dict[ExitRecipe, tuple[Phase, ...]] = {
    "distill": (Phase(lambda exits: SelfDistillation()),),
    "distill-all": (Phase(lambda exits: SelfDistillation(teacher="all")),),
    "sum": (Phase(_sum),),
    "weighted": (Phase(lambda exits: Weighted(_even(*_BRANCHY, exits + 1))),),
    "ramped": (Phase(lambda exits: Ramped(_even(*_RAMP, exits))),),
    "hints": (Phase(lambda exits: Hints(), taps=Hinted),),
    "teachers": (Phase(lambda exits: Teachers(), taps=Taught),),
    "two-stage": (_ALONE, Phase(_sum, "heads")),
    "frozen-teacher": (_ALONE, Phase(lambda exits: FrozenTeacher(), "heads")),
    "balanced": (Phase(_sum, balanced=True),),
    "ztw": (Phase(_sum, "answers"), Phase(_sum, "ensembles")),
}

META: ExitRecipe = "meta"  # is no phases of losses, see `meta_exits`


def check_recipe(recipe: str, freeze_trunk: bool, head: str) -> None:
    """Raises RequestError for a recipe that does not exist, or not with such a trunk or such heads."""
    if recipe not in (*RECIPES, META):
        raise RequestError(f"recipe={recipe!r}: use one of {', '.join((*RECIPES, META))}")
    if recipe == "balanced" and freeze_trunk:
        raise RequestError('recipe="balanced" divides the gradients of the trunk, which is frozen: unfreeze it')
    if recipe == META and (not freeze_trunk or head == "cascade"):
        raise RequestError('recipe="meta" trains each head by itself: freeze the trunk, and take no cascade')
    if recipe == "ztw" and head != "cascade":
        raise RequestError('recipe="ztw" trains cascading heads: give head="cascade"')


def train_exits(
    dynamic: DynamicModel,
    train: LabelledData,
    recipe: ExitRecipe,
    training: Training,
    run: Run = Run(),
) -> list[Epoch]:
    """Trains all exits in place.

    Args:
        training: every phase takes the epochs. lr is that of the heads; where trunk_lr is 0, the rest is frozen, in
            eval mode. The optimiser is the recipe's.
        run: a recipe of several phases keeps each in a folder of its own.

    Raises:
        RequestError: the recipe does not go with the model, or as `fit`.
    """
    training = completed(training, Convert.training)
    if recipe == META:
        return train_meta(dynamic, train, training, run)
    phases = [p for p in RECIPES[recipe] if training.trunk_lr > 0 or p.moves != "trunk"]

    def trained(phase: Phase, part: Run) -> list[Epoch]:
        return _train(dynamic.trunk, phase, phase.loss(len(dynamic.exits)), train, training, part)

    return in_phases([partial(trained, phase) for phase in phases], run)


def _train(
    trunk: fx.GraphModule, phase: Phase, loss: ExitLoss, train: LabelledData, training: Training, run: Run
) -> list[Epoch]:
    heads, rest = _divided(trunk)
    ensembles = {n: p for n, p in heads.items() if ".ensemble." in n}
    moved = {
        "all": heads, "heads": heads, "trunk": {}, "ensembles": ensembles,
        "answers": {n: p for n, p in heads.items() if n not in ensembles},
    }[phase.moves]  # fmt: skip
    with_trunk = training.trunk_lr > 0 and phase.moves in ("all", "trunk", "answers")
    groups: list[dict[str, Any]] = [{"params": list(moved.values())}] if moved else []
    if with_trunk:
        groups.append({"params": list(rest.values()), "lr": training.trunk_lr * training.lr})
    model: nn.Module = trunk
    if phase.taps is not None:
        model = phase.taps(trunk)
        groups[0]["params"] += list(model.extra.parameters())
    training = replace(training, optimizer="sgd" if phase.balanced else "adamw")
    still = [p for n, p in [*heads.items(), *rest.items()] if n not in moved and not (with_trunk and n in rest)]
    frozen = [] if with_trunk else _outside(trunk, exit_modules(trunk))
    with fixed(still), _divided_gradients(trunk) if phase.balanced else fixed([]):
        return fit(model, loss, train, training, run, parameters=groups, keep_eval=frozen)


def _divided(trunk: fx.GraphModule) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The parameters that only early answers need, and the others that learn."""
    own = exit_modules(trunk)
    learning = {n: p for n, p in trunk.named_parameters() if p.requires_grad}
    heads = {n: p for n, p in learning.items() if n in own or any(n.startswith(f"{path}.") for path in own)}
    return heads, {n: p for n, p in learning.items() if n not in heads}


def _outside(trunk: fx.GraphModule, own: set[str]) -> list[nn.Module]:
    """The modules that neither are, nor lie in, nor hold one of these."""
    found = []
    for name, module in trunk.named_modules():
        inside = name in own or any(name.startswith(f"{path}.") for path in own)
        holds = any(path.startswith(f"{name}.") for path in own) or not name
        if not inside and not holds:
            found.append(module)
    return found


@contextmanager
def _divided_gradients(trunk: fx.GraphModule) -> Iterator[None]:
    """Every parameter's gradient over the number of answers that need it.

    Gradient equilibrium scales, after the branch of exit k, what comes back from its head by 1/(K - k + 1) and what
    comes back from behind by (K - k)/(K - k + 1). The product of these on the way from a later exit is 1 over the
    number of exits behind a layer, the same for all of them. The heads learn at their own scale.
    """
    counts: dict[str, int] = {}
    for logits in all_logits(trunk):
        targets = {str(n.target) for n in upstream([logits]) if n.op in {"call_module", "get_attr"}}
        for name, _ in trunk.named_parameters():
            counts[name] = counts.get(name, 0) + (name in targets or name.rpartition(".")[0] in targets)
    hooks = [p.register_hook(partial(_over, n)) for name, p in trunk.named_parameters() if (n := counts[name]) > 1]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _over(count: int, gradient: Tensor) -> Tensor:
    return gradient / count
