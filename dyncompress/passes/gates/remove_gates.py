"""A gated graph without its gates: every branch runs for every sample."""

from torch import fx

from ..edit.graft import container
from ..graph.meta import exits_of, set_gates
from .read_gates import graph_gates


def without_gates(gm: fx.GraphModule) -> fx.GraphModule:
    """The model that a gated one is while all its gates are open, gates left out; shares all other modules of `gm`.

    With early exits it returns the tuple of all logits as before, else its logits alone.
    """
    graph = fx.Graph()
    graph.set_codegen(gm.graph._codegen)
    whole = {gate.scale[-1]: gate.end for gate in graph_gates(gm)}
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "output":
            logits = tuple(copies[n] for n in node.args[0])
            graph.output(logits if exits_of(gm) else logits[0])
        else:
            copies[node] = copies[whole[node]] if node in whole else graph.node_copy(node, copies.__getitem__)
    opened = fx.GraphModule(container(gm), graph)
    opened.training, opened.meta = gm.training, dict(gm.meta)
    set_gates(opened, ())
    opened.graph.eliminate_dead_code()
    opened.delete_all_unused_submodules()
    opened.recompile()
    return opened
