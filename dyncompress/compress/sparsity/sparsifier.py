"""What group lasso does in the training loop: shrinks groups after every step, takes out what is zero between epochs.

At a *check*, some fifty times while sparsifying, groups that are zero are held there. With a target, it is then asked
anew which groups have to go and how strong lambda must be for each, until the target is reached; close to it, every
step that makes a group zero is followed by a check. Branches are judged by what they change on samples of the data.
Without a target, the strongest indices of every axis, its floor, are spared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, fx

from ...errors import RequestError
from ...passes.axes.axes import Axes, as_keep, infer_axes
from ...passes.axes.axis_kinds import BRANCH
from ...passes.dims.dims import Atom, Keep
from ...passes.shrink.shrink import shrink_axes
from ..importance.activations import activation_scores
from ..importance.scores import Context, Scores
from ..options.limits import Limits
from ..options.method_options import Lasso
from ..pruning.cost_left import COUNTS, Left, share_left
from ..pruning.kept_indices import Kept
from ..pruning.ranking import Ranking, candidates, default_scope
from ..pruning.removal_search import saved_by, search
from ..training.batches import LabelledData
from ..training.hooks import Hook, TrainingRun
from ..training.schedule import Timetable
from ..training.surgery import Surgery, operate
from ..training.trainer import LossFunction
from .group_lasso import GroupLasso
from .groups import check_kinds
from .lambda_schedule import DEADLINE, doomed, horizon, keep_without, pulls, spared
from .sparsify_report import SparsifyReport, SurgeryReport

_CHECKS = 50  # while sparsifying
_NEAR = 0.1  # share of the first model above the target
_TINY = 1e-30
_BRANCH_SAMPLES = 128  # on which branches are judged
_LAMBDAS = 2  # lambda is set at every second of them: finding it may count the model ten times


@dataclass(frozen=True, kw_only=True)
class Request:
    """How to sparsify.

    metric: "macs" or "params". target: the share of it that stays; or None, with lasso's strength, lambda, or
    penalty_ratio, the penalty's share of the first loss. epochs: of sparsifying; finetune: of training after them.
    """

    metric: str
    target: float | None
    epochs: int
    finetune: int
    kinds: tuple[str, ...]
    lasso: Lasso
    limits: Limits
    distill: float

    def __post_init__(self) -> None:
        check_kinds(self.kinds)
        for name, value in {"strength": self.lasso.strength, "penalty_ratio": self.lasso.penalty_ratio}.items():
            if value is not None and not value > 0:
                raise RequestError(f"{name} is {value}: give a positive number")
        for name, count, least in (("epochs", self.epochs, 1), ("finetune", self.finetune, 0)):
            if count < least:
                raise RequestError(f"{name} is a number of epochs, {least} or more; got {count}")
        if self.lasso.shrink_every < 1:
            raise RequestError(f"shrink_every is a number of epochs, 1 or more; got {self.lasso.shrink_every}")
        if self.lasso.ema is not None and not 0 < self.lasso.ema < 1:
            raise RequestError(f"ema is the decay of an average, between 0 and 1; got {self.lasso.ema}")


class Sparsifier(Hook):
    """The hook, and the loss that it watches. `model` is the model as it is now, `strength` its lambda.

    Raises:
        RequestError: no groups of these kinds, a target out of reach, a norm that cannot keep its count.
    """

    def __init__(self, gm: fx.GraphModule, request: Request, loss_fn: LossFunction, data: LabelledData) -> None:
        self.asked, self._loss_fn = request, loss_fn
        self._samples = Context(data=data, samples=_BRANCH_SAMPLES)
        self._shown: Mapping[str, str] = {}
        self.strength = request.lasso.strength or 0.0
        self.learned: float | None = None  # the share that was left before the weakest were cut; None: nothing was cut
        self.surgeries: list[SurgeryReport] = []
        self._reached = self._near = False
        self._first_loss: Tensor | None = None
        axes = infer_axes(gm)
        self.kept = Kept(axes)
        self._sizes = {axis.name: axis.size for axis in axes}
        self._amount = max(COUNTS[request.metric](gm), 1)
        self._take(gm)
        self._check_request()

    def loss(self, output: Any, labels: Tensor) -> Tensor:
        """The user's loss; the first value is remembered."""
        value = self._loss_fn(output, labels)
        if self._first_loss is None:
            self._first_loss = value.detach()
        return value

    # --- what the trainer calls ---------------------------------------------------------------------------------------

    def settings(self) -> Mapping[str, object]:
        plain = {"kinds": list(self.asked.kinds), "limits": str(self.asked.limits), "lasso": None}
        return asdict(self.asked.lasso) | asdict(self.asked) | plain

    def postfix(self) -> Mapping[str, str]:
        """The groups that are not zero, and the share that they leave."""
        return self._shown

    def reschedule(self, timetable: Timetable) -> None:
        """Before `begin`, and when the batch has grown."""
        self._steps = timetable.steps_after(self.asked.epochs)
        self._deadline = timetable.steps_after(DEADLINE * self.asked.epochs)
        self._lrs, self._every = timetable.lrs[: self._steps], max(1, self._steps // _CHECKS)
        self._decay = (self.asked.lasso.ema or 0.0) ** timetable.growth  # an average over as many samples as before

    def begin(self, run: TrainingRun) -> None:
        """The first check, on the device."""
        self._take(self.model)
        averaged = self.model.named_parameters() if self.asked.lasso.ema is not None else ()
        self.average = {name: parameter.detach().clone() for name, parameter in averaged}
        self._check(0)

    def after_step(self, step: int) -> None:
        """The proximal step, and a check where one is due; after the sparsifying steps, zeros are held."""
        if step == 0 and self.asked.lasso.penalty_ratio is not None:
            self.strength = self._from_ratio(self.asked.lasso.penalty_ratio)
        sparsifying = step < self._steps
        zero = self.lasso.proximal_(self._lrs[step] * self.strength if sparsifying else 0.0)
        if sparsifying:
            due = (step + 1) % self._every == 0 or (self._near and int(zero.sum()) > int(self._zero.sum()))
            if due and not self._reached:
                self._check(step + 1)
        if self.asked.lasso.ema is not None:
            now = dict(self.model.named_parameters())
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.values()), [now[n] for n in self.average], 1 - self._decay)

    def after_epoch(self, epoch: int) -> Surgery | None:
        """Takes out what is zero, if it is time; what is still too much after the last sparsifying epoch is cut."""
        last, zero = epoch == self.asked.epochs, ~self.lasso.live
        due = last or self._reached or epoch % self.asked.lasso.shrink_every == 0
        if epoch > self.asked.epochs or not due:
            return None
        left = self._left(zero)
        if last and self.asked.target is not None and left > self.asked.target:
            self.learned, zero = left, zero | self._doomed(self.asked.target)
        self._hold(~self.lasso.live, self._pull)
        keep = self._keep(zero)
        if not keep:
            return None
        surgery = operate(self.model, keep)
        report = SurgeryReport(
            epoch=epoch,
            live=int((~zero).sum()),
            groups=len(zero),
            left=self._left(zero),
            strength=self.strength,
            difference=surgery.difference,
        )
        self.surgeries.append(report)
        return surgery

    def adopt(self, surgery: Surgery) -> None:
        """Goes on with what is left of the groups, of their average and of the record of what is kept."""
        self.kept.cut(surgery.plan)
        if self.asked.lasso.ema is not None:
            self.average = surgery.plan(self.average)
        self._take(surgery.model)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights."""
        return {
            "surgeries": [asdict(done) for done in self.surgeries],
            "strength": self.strength,
            "reached": self._reached,
            "near": self._near,
            "learned": self.learned,
            "zero": self._zero,
            "pull": self._pull,
            "average": self.average,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.surgeries = [SurgeryReport(**done) for done in state["surgeries"]]
        self.strength, self.learned = state["strength"], state["learned"]
        self._reached, self._near = state["reached"], state["near"]
        device = self.lasso.sizes.device
        self._hold(state["zero"].to(device), state["pull"].to(device))
        self.average = {name: average.to(device) for name, average in state["average"].items()}

    @torch.no_grad()
    def finish(self, batch_sizes: Sequence[int]) -> fx.GraphModule:
        """The model after the last step, with the average of its weights where one was asked for, and the report.
        `batch_sizes` are those of every epoch."""
        for name, average in self.average.items():
            parameter = self.model.get_parameter(name)
            parameter.copy_(average.to(parameter.device).masked_fill(parameter == 0, 0))
        report = SparsifyReport(
            metric=self.asked.metric,
            target=self.asked.target,
            kinds=self.asked.kinds,
            batch_sizes=tuple(batch_sizes),
            learned=self.learned if self.learned is not None else self._share,
            left=self._share,
            surgeries=tuple(self.surgeries),
            kept=self.kept.table(),
        )
        report.keep_in(self.model)
        return self.model

    # --- the model as it is -------------------------------------------------------------------------------------------

    def _take(self, gm: fx.GraphModule) -> None:
        """Finds the groups of a model; with a target none is pulled until the next check."""
        self.model, self._axes = gm, infer_axes(gm)
        found = candidates(self._axes, self.asked.limits)
        self.lasso = GroupLasso(self._axes, self.asked.kinds, candidates=found)
        self._share = COUNTS[self.asked.metric](gm) / self._amount
        self._measured = _remembered(share_left(self._axes, self.asked.metric, found))
        pull = self._floors() if self.asked.target is None else torch.zeros_like(self.lasso.sizes)
        self._hold(~self.lasso.live, pull)

    def _hold(self, zero: Tensor, pull: Tensor) -> None:
        self._zero, self._pull = zero, pull
        self.lasso.hold(zero, pull)

    def _floors(self) -> Tensor:
        """(groups,): 0 for the strongest indices of every axis, as many as its floor, 1 for all others."""
        return 1.0 - spared(self._axes, self.lasso, self.lasso.norms(), self.asked.limits, self._sizes).float()

    def _keep(self, zero: Tensor) -> dict[str, list[int]]:
        return keep_without(self._axes, self.lasso, zero, self.asked.limits)

    def _left(self, zero: Tensor) -> float:
        """The share of the first model that is left without some groups."""
        keep = as_keep(self._axes, self._keep(zero))
        return self._share * (self._measured(keep) if keep else 1.0)

    # --- how strong ---------------------------------------------------------------------------------------------------

    def _check(self, step: int) -> None:
        target, zero = self.asked.target, ~self.lasso.live
        left = self._left(zero)
        self._shown = {"live": f"{int((~zero).sum())}/{len(self.lasso)}", self.asked.metric: f"{left:.3f}"}
        self._hold(zero, self._floors() if target is None else self._pull)
        if target is None:
            return
        self._near = left <= target + _NEAR
        if left <= target:
            self._reached, self.strength = True, 0.0
        elif step % (_LAMBDAS * self._every) == 0 or not self._pull.any():
            rms = self.lasso.norms() / self.lasso.weights
            pull = pulls(self.lasso, rms, self._doomed(target), min(1.0, target / self._share))
            strongest = float(pull.max())
            self.strength = max(self.strength, strongest / horizon(self._lrs, step, self._deadline))
            self._hold(zero, pull / max(strongest, _TINY))

    def _doomed(self, target: float) -> Tensor:
        """(groups,) bool: what pruning would remove now."""
        norms = self.lasso.norms().cpu()
        scores = {name: norms[at] for name, at in self.lasso.groups.of_axis.items()} | self._changes()
        scope = default_scope(self.asked.limits.depth)
        cost = saved_by(self._measured)
        ranking = Ranking(self._axes, scores, self.asked.limits, cost, scope=scope, whole=self._sizes)
        goes = search(ranking, self._measured, self.asked.metric, target / self._share)
        return doomed(self._axes, self.lasso, ranking.keep(goes))

    def _changes(self) -> Scores:
        """How much each branch changes on data: norms in front of a norm layer say nothing of it."""
        branches = [axis for axis in self._axes if axis.kind == BRANCH and axis.name in self.lasso.groups.of_axis]
        scores = activation_scores(self.model, branches, self._samples) if branches else {}
        return {name: reduce(score.to(self.lasso.sizes.device), "mean").cpu() for name, score in scores.items()}

    def _from_ratio(self, ratio: float) -> float:
        assert self._first_loss is not None
        return ratio * float(reduce(self._first_loss, "mean")) / float(self.lasso.penalty().detach())

    def _check_request(self) -> None:
        everything = torch.zeros_like(self._zero)
        for at in self.lasso.groups.of_axis.values():
            everything[at] = self._floors()[at] > 0
        if self.asked.target is not None and not everything.any():
            raise RequestError(
                f"{self.asked.metric}={self.asked.target:.4g} needs groups that can be taken out: add axes or layers "
                "to kinds, or lower floor"
            )
        keep = as_keep(self._axes, self._keep(everything))
        _check_counts(self._axes, keep)


def _remembered(left: Left) -> Left:
    """The same measure, taken once for the same counts: which indices stay makes no difference to it."""
    known: dict[frozenset[tuple[Atom, int]], float] = {}

    def once(keep: Keep) -> float:
        counts = frozenset((atom, len(kept)) for atom, kept in keep.items())
        if counts not in known:
            known[counts] = left(keep)
        return known[counts]

    return once


def _check_counts(axes: Axes, keep: Mapping[Any, Tensor]) -> None:
    """Whether norms can keep their counts, asked before the training rather than in its middle."""
    try:
        shrink_axes(axes, keep, exact=True)
    except RequestError as error:
        raise RequestError(
            f"the model cannot shrink while it is trained: {error}; name its layers in ignore"
        ) from error
