"""Self-distillation: the last exit teaches the earlier ones (Phuong & Lampert, ICCV 2019, eqs. 3 to 6).

With exits 0..K, logits z_k, label y, temperature T and weight C, the loss of one sample is

    sum_{k<=K} (1 - C) CE(y, softmax(z_k))  +  sum_{k<K} C T^2 CE(softmax(z_K / T), softmax(z_k / T))

where the teacher z_K is detached. A sample without a label (y = -1) takes only the second sum. With every later exit
as teacher, the second CE is its mean over the teachers k+1..K. T starts at 1 and grows by 5 % after every step on
which the mean over samples of max softmax(z_K / T) exceeds 1/2; the loss grows with T^2, its gradients do not.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import RequestError
from .exit_losses import ExitLoss, cross_entropies

_GROWTH = 1.05
_CONFIDENCE = 0.5


class SelfDistillation(ExitLoss):
    """The loss as a callable: every exit's logits and the labels -> a scalar, averaged over the batch.

    Args:
        weight: C, the share of the distillation term, in 0..1.
        teacher: "last", or "all" for every later exit.

    Raises:
        RequestError: an argument outside its range.
    """

    def __init__(self, weight: float = 0.5, teacher: Literal["last", "all"] = "last") -> None:
        if not 0 <= weight <= 1:
            raise RequestError(f"distillation weight is {weight}: give a share between 0 and 1")
        if teacher not in ("last", "all"):
            raise RequestError(f'teacher is {teacher!r}: use "last" or "all"')
        self.name = f"distillation {weight:g} from {teacher}"
        self.weight = weight
        self.teacher = teacher
        self.temperature = 1.0
        self._confidence = torch.zeros(())  # of the teacher on the last batch

    def of_rows(self, logits: list[Tensor], labels: Tensor) -> Tensor:
        """The last logits are the teacher's."""
        supervised = sum(cross_entropies(logits, labels))
        per_row = (1 - self.weight) * supervised + self.weight * self._distilled(logits)
        self._confidence = self._confidence_of(logits[-1])
        return per_row.mean()

    def _distilled(self, logits: Sequence[Tensor]) -> Tensor:
        """T^2 * the sum over students of the cross-entropy to their teachers: (B,)."""
        log_p = [F.log_softmax(z / self.temperature, dim=-1) for z in logits]
        targets = [p.detach().exp() for p in log_p]
        total = torch.zeros_like(log_p[-1][:, 0])
        for k, student in enumerate(log_p[:-1]):
            teachers = targets[-1:] if self.teacher == "last" else targets[k + 1 :]
            total = total - (torch.stack(teachers).mean(0) * student).sum(-1)
        return self.temperature**2 * total

    @torch.no_grad()
    def _confidence_of(self, teacher: Tensor) -> Tensor:
        confidence = F.softmax(teacher / self.temperature, dim=-1).amax(-1).mean()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(confidence)  # so that every process keeps the same temperature
            confidence = confidence / torch.distributed.get_world_size()
        return confidence

    def after_step(self, step: int) -> None:
        super().after_step(step)
        if self._confidence > _CONFIDENCE:
            self.temperature *= _GROWTH

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "temperature": self.temperature}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.temperature = float(state["temperature"])
