"""What an exit policy is to keep, and what it is to have least of."""

from dataclasses import dataclass
from typing import get_args

from ...errors import RequestError
from ...runtime.predict.policy import RULES, check_fallback, check_rule
from ..options.choices import Cost, RiskOf, ThresholdSearch
from ..options.method_options import Leaving
from ..options.steps import Convert
from .risk import check_rates


@dataclass(frozen=True, kw_only=True)
class Goal:
    """The accuracy that may be lost, or a budget instead, and how samples leave; see `options.steps.Convert`.

    Raises:
        RequestError: a goal that no model could have.
    """

    max_loss: float = Convert.max_loss
    macs: float | None = Convert.macs
    latency: float | None = Convert.latency
    leaving: Leaving = Convert.leaving

    def __post_init__(self) -> None:
        check_rule(self.leaving.rule)
        check_fallback(self.leaving.fallback)
        self._check_names()
        if self.leaving.threshold_search == "grid" and self.remembers:
            rule, fallback = self.leaving.rule, self.leaving.fallback
            what = f"rule {rule!r}" if RULES[rule].remembers else f"fallback {fallback!r}"
            raise RequestError(f"the grid cannot enumerate {what}: take threshold_search genetic, quota or uniform")
        if not 0 <= self.max_loss < 1:
            raise RequestError(
                f"max_loss is {self.max_loss}: give the accuracy that may be lost, e.g. 0.005 for half a point"
            )
        if self.leaving.latency_batch < 1:
            raise RequestError(f"latency_batch is {self.leaving.latency_batch}: give at least 1")
        self._check_budgets()

    def _check_names(self) -> None:
        if self.leaving.threshold_search not in (None, *get_args(ThresholdSearch)):
            names = ", ".join(get_args(ThresholdSearch))
            raise RequestError(f"unknown threshold_search {self.leaving.threshold_search!r}: give {names}")
        if self.leaving.risk_of not in get_args(RiskOf):
            raise RequestError(f"unknown risk_of {self.leaving.risk_of!r}: give {', '.join(get_args(RiskOf))}")
        if self.leaving.cost not in (None, *get_args(Cost)):
            raise RequestError(f"unknown cost {self.leaving.cost!r}: give {' or '.join(get_args(Cost))}")

    def _check_budgets(self) -> None:
        budgets = {"macs": self.macs, "latency": self.latency}
        given = [name for name, value in {**budgets, "risk": self.leaving.risk}.items() if value is not None]
        if len(given) > 1:
            raise RequestError(f"{' and '.join(given)} cannot both be kept: give one of them")
        for name, value in budgets.items():
            if value is not None and not 0 < value <= 1:
                raise RequestError(f"{name} is {value}: give a share of the static model's, e.g. 0.5")
            if value is not None and self.leaving.cost not in (None, name):
                raise RequestError(f"a budget of {name} cannot have the least {self.leaving.cost}: leave out cost")
        if self.leaving.risk is not None:
            check_rates(self.leaving.risk, 1 - self.leaving.confidence)

    @property
    def remembers(self) -> bool:
        """Whether answers depend on the exits before, so that no exit can be judged alone."""
        return RULES[self.leaving.rule].remembers or self.leaving.fallback == "ensemble"

    @property
    def least(self) -> Cost:
        """What is to be least."""
        return self.leaving.cost or ("macs" if self.latency is None else "latency")

    @property
    def budget(self) -> float | None:
        """Of that, as a share of the static model's."""
        return self.macs if self.latency is None else self.latency
