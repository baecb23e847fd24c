"""A gated graph without its gates: every branch runs for every sample."""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ..edit.outputs import all_logits, set_logits
from ..graph.graph_pass import HAS_GATES, NO_GATES, Condition, GraphPass, PassResult
from ..graph.meta import set_gates
from .read_gates import graph_gates


@dataclass(frozen=True)
class RemovedGates:
    """The branches that had a gate, in graph order."""

    branches: tuple[str, ...]


@dataclass(frozen=True)
class RemoveGates(GraphPass[RemovedGates]):
    """Leaves the model that a gated one is while all its gates are open.

    With early exits it returns the tuple of all logits as before, else its logits alone.

    Raises:
        RequestError: the graph has no skip gates.
    """

    name: ClassVar[str] = "remove-gates"
    requires: ClassVar[tuple[Condition, ...]] = (HAS_GATES,)
    ensures: ClassVar[tuple[Condition, ...]] = (NO_GATES,)

    def rewrite(self, gm: fx.GraphModule) -> PassResult[RemovedGates]:
        gates, logits = graph_gates(gm), all_logits(gm)
        for gate in gates:
            gate.scale[-1].replace_all_uses_with(gate.end)
        set_gates(gm, ())
        set_logits(gm, logits)
        gm.graph.eliminate_dead_code()
        gm.delete_all_unused_submodules()
        gm.recompile()
        return PassResult(gm, True, RemovedGates(tuple(gate.branch for gate in gates)))
