"""What every pass is: a frozen dataclass whose fields are its options, from a graph to a `PassResult`."""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import ClassVar, Generic, TypeVar

import yaml
from torch import fx

from .copying import deep_copy

R = TypeVar("R")


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

    def __call__(self, gm: fx.GraphModule) -> PassResult[R]:
        """Runs the pass on a deep copy of `gm` (parameters included)."""
        return self.rewrite(deep_copy(gm))

    @abstractmethod
    def rewrite(self, gm: fx.GraphModule) -> PassResult[R]:
        """Does the work; `gm` is the pass's own copy and may be changed in place."""

    def __str__(self) -> str:
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        if not options:
            return self.name
        text = yaml.safe_dump(options, default_flow_style=True, sort_keys=False, width=10**6)
        return f"{self.name}: {text.strip()}"
