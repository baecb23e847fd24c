"""Gates taken out of a graph because they always decide alike: what a gate costs then buys nothing."""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ...errors import RequestError
from ..axes.branches import remove_branches
from ..edit.analysis import analyse
from ..edit.outputs import all_logits, set_logits
from ..graph.graph_pass import HAS_GATES, NO_EXITS, Condition, GraphPass, PassResult
from ..graph.meta import gates_of, set_gates
from .read_gates import graph_gates


@dataclass(frozen=True)
class SettledGates:
    """The branches that lost their gates: those that run always, and those that are gone."""

    always: tuple[str, ...]
    never: tuple[str, ...]


@dataclass(frozen=True)
class SettleGates(GraphPass[SettledGates]):
    """Takes out the gates of the named branches.

    1. A branch in `always` runs for every sample.
    2. A branch in `never` leaves the model; where it was added, the shortcut goes on alone.

    A recurrent gate's step stays where a later gate reads its state, a policy where it decides other branches. Without
    its last gate the graph answers with its logits alone, as a static model does.

    Raises:
        RequestError: a branch without a gate, or in both; early exits, which may follow what would leave.
    """

    name: ClassVar[str] = "settle-gates"
    requires: ClassVar[tuple[Condition, ...]] = (NO_EXITS, HAS_GATES)
    always: tuple[str, ...] = ()
    never: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for option in ("always", "never"):
            object.__setattr__(self, option, tuple(getattr(self, option)))
        if both := set(self.always) & set(self.never):
            raise RequestError(f"a branch cannot run always and never: {', '.join(sorted(both))}")

    def rewrite(self, gm: fx.GraphModule) -> PassResult[SettledGates]:
        gates = {gate.branch: gate for gate in graph_gates(gm)}
        for name in (*self.always, *self.never):
            if name not in gates:
                raise RequestError(f"{name!r} has no gate; those that have one: {', '.join(gates) or 'none'}")
            gates[name].scale[-1].replace_all_uses_with(gates[name].end)
        gone = {(gates[name].total.name, gates[name].shortcut.name): name for name in self.never}
        logits = all_logits(gm)
        set_gates(gm, [gate for gate in gates_of(gm) if gate.branch not in (*self.always, *self.never)])
        set_logits(gm, logits)
        gm.graph.eliminate_dead_code()
        if gone:
            found = {(b.total.name, b.shortcut.name): b for b in analyse(gm).branches}
            for place, name in gone.items():
                if place not in found:
                    raise RequestError(f"{name} cannot leave the model: name it in always, or leave it its gate")
            remove_branches(gm, [branch for place, branch in found.items() if place in gone])
        gm.delete_all_unused_submodules()
        gm.graph.lint()
        gm.recompile()
        return PassResult(gm, bool(self.always or self.never), SettledGates(self.always, self.never))
