"""What every pass is: a frozen dataclass whose fields are its options, from a graph to a `PassResult`.

A pass names the conditions that it requires of a captured graph and those that it ensures; both are checked here.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import ClassVar, Generic, TypeVar

import yaml
from torch import fx

from ...errors import DynCompressError, RequestError
from .copying import deep_copy
from .meta import exits_of, gates_of, is_captured

R = TypeVar("R")


@dataclass(frozen=True)
class Condition:
    """What holds of a graph or not; `otherwise` tells the user what is wrong, and what to do."""

    holds: Callable[[fx.GraphModule], bool]
    otherwise: str


def no_module(name: str) -> Condition:
    """Nothing of the user's own is called as what a pass adds."""
    text = f"the model already has a module named '{name}'; insert all {name} in one pass"
    return Condition(lambda gm: not hasattr(gm, name), text)


CAPTURED = Condition(is_captured, "this graph has no description of its inputs: use capture()")
EVALUATING = Condition(lambda gm: not gm.training, "the result is for inference: call eval() on the model first")
HAS_EXITS = Condition(lambda gm: bool(exits_of(gm)), "the graph has no exits; run InsertExits on it first")
NO_EXITS = Condition(
    lambda gm: not exits_of(gm),
    "the model has exits already, and they come last: do this before convert adds them",
)
HAS_GATES = Condition(lambda gm: bool(gates_of(gm)), "the graph has no skip gates; run InsertGates on it first")
NO_GATES = Condition(lambda gm: not gates_of(gm), "the model has skip gates already; insert all in one pass")


@dataclass(frozen=True)
class PassResult(Generic[R]):
    """The new graph, whether it differs from the one given, and what the pass says about its work."""

    gm: fx.GraphModule
    modified: bool
    report: R


@dataclass(frozen=True)
class GraphPass(ABC, Generic[R]):
    """A graph-to-graph pass; it rewrites a copy and leaves the graph it was given alone.

    `str(a_pass)` is the recipe text that makes it: ``insert-exits: {exits: 3}``.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[Condition, ...]] = ()
    ensures: ClassVar[tuple[Condition, ...]] = ()

    def __call__(self, gm: fx.GraphModule) -> PassResult[R]:
        """Runs the pass on a deep copy of `gm` (parameters included).

        Raises:
            RequestError: the graph is not what the pass requires.
            DynCompressError: what it made is not what it ensures.
        """
        for condition in (CAPTURED, *self.requires):
            if not condition.holds(gm):
                raise RequestError(condition.otherwise)
        result = self.rewrite(deep_copy(gm))
        for condition in self.ensures:
            if not condition.holds(result.gm):
                raise DynCompressError(f"{self.name} has not done what it ensures: {condition.otherwise}")
        return result

    @abstractmethod
    def rewrite(self, gm: fx.GraphModule) -> PassResult[R]:
        """Does the work; `gm` is the pass's own copy and may be changed in place."""

    def __str__(self) -> str:
        options = asdict(self)
        if not options:
            return self.name
        text = yaml.safe_dump(options, default_flow_style=True, sort_keys=False, width=10**6)
        return f"{self.name}: {text.strip()}"
