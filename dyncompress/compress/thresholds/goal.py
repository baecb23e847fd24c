"""What an exit policy is to keep, and what it is to have least of."""

from dataclasses import dataclass
from typing import Literal, get_args

from ...errors import RequestError
from ...runtime.predict.policy import RULES, Fallback, check_fallback, check_rule
from .call_costs import Cost
from .risk import check_rates

SearchKind = Literal["grid", "genetic", "quota", "uniform"]
RiskKind = Literal["disagreement", "accuracy-loss"]


@dataclass(frozen=True, kw_only=True)
class Goal:
    """The fields are those of `choose_policy`.

    Raises:
        RequestError: a goal that no model could have.
    """

    rule: str = "max-softmax"
    threshold_search: SearchKind | None = None
    max_loss: float = 0.005
    macs: float | None = None
    latency: float | None = None
    risk: float | None = None
    confidence: float = 0.9
    risk_of: RiskKind = "disagreement"
    cost: Cost | None = None
    latency_batch: int = 1
    fallback: Fallback = "final"

    def __post_init__(self) -> None:
        check_rule(self.rule)
        check_fallback(self.fallback)
        self._check_names()
        if self.threshold_search == "grid" and self.remembers:
            what = f"rule {self.rule!r}" if RULES[self.rule].remembers else f"fallback {self.fallback!r}"
            raise RequestError(f"the grid cannot enumerate {what}: take threshold_search genetic, quota or uniform")
        if not 0 <= self.max_loss < 1:
            raise RequestError(
                f"max_loss is {self.max_loss}: give the accuracy that may be lost, e.g. 0.005 for half a point"
            )
        if self.latency_batch < 1:
            raise RequestError(f"latency_batch is {self.latency_batch}: give at least 1")
        self._check_budgets()

    def _check_names(self) -> None:
        if self.threshold_search not in (None, *get_args(SearchKind)):
            names = ", ".join(get_args(SearchKind))
            raise RequestError(f"unknown threshold_search {self.threshold_search!r}: give {names}")
        if self.risk_of not in get_args(RiskKind):
            raise RequestError(f"unknown risk_of {self.risk_of!r}: give {', '.join(get_args(RiskKind))}")
        if self.cost not in (None, *get_args(Cost)):
            raise RequestError(f"unknown cost {self.cost!r}: give {' or '.join(get_args(Cost))}")

    def _check_budgets(self) -> None:
        budgets = {"macs": self.macs, "latency": self.latency}
        given = [name for name, value in {**budgets, "risk": self.risk}.items() if value is not None]
        if len(given) > 1:
            raise RequestError(f"{' and '.join(given)} cannot both be kept: give one of them")
        for name, value in budgets.items():
            if value is not None and not 0 < value <= 1:
                raise RequestError(f"{name} is {value}: give a share of the static model's, e.g. 0.5")
            if value is not None and self.cost not in (None, name):
                raise RequestError(f"a budget of {name} cannot have the least {self.cost}: leave out cost")
        if self.risk is not None:
            check_rates(self.risk, 1 - self.confidence)

    @property
    def remembers(self) -> bool:
        """Whether answers depend on the exits before, so that no exit can be judged alone."""
        return RULES[self.rule].remembers or self.fallback == "ensemble"

    @property
    def least(self) -> Cost:
        """What is to be least."""
        return self.cost or ("macs" if self.latency is None else "latency")

    @property
    def budget(self) -> float | None:
        """Of that, as a share of the static model's."""
        return self.macs if self.latency is None else self.latency
