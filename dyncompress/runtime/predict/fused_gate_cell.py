"""The step of a recurrent gate, which `gate_modules.RecurrentGate` spells out, as one call of torch's `lstm_cell`.

state = [hidden, cell, logit]    hidden, cell = lstm_cell(x, hidden and cell of the state before)    logit = out(hidden)

The first step, which has no state before it, stays as it is, and so does one that a pass has rewritten.
"""

import operator
from typing import Any

import torch
from torch import fx

from ...passes.gates.insert_gates import GATES_PATH

aten = torch.ops.aten
_SLICE, _ADD, _MUL, _SIGMOID, _TANH = (
    aten.slice.Tensor, aten.add.Tensor, aten.mul.Tensor, aten.sigmoid.default, aten.tanh.default,
)  # fmt: skip
# Patterns: (operator or layer, arguments ...); other strings are variables, the same value wherever they stand.
_BEFORE_HIDDEN = (_SLICE, "before", 1, 0, "width")
_BEFORE_CELL = (_SLICE, "before", 1, "width", "end")
_PARTS = (aten.chunk.default, (_ADD, ("input", "x"), ("hidden", _BEFORE_HIDDEN)), 4, 1)
_I, _F, _G, _O = ((operator.getitem, _PARTS, k) for k in range(4))
_CELL = (_ADD, (_MUL, (_SIGMOID, _I), (_TANH, _G)), (_MUL, (_SIGMOID, _F), _BEFORE_CELL))
_HIDDEN = (_MUL, (_SIGMOID, _O), (_TANH, _CELL))
_STATE = (aten.cat.default, [_HIDDEN, _CELL, ("out", _HIDDEN)], 1)


def use_cells(piece: fx.GraphModule) -> None:
    """Replaces, in place, all steps of recurrent gates in a piece of a trunk."""
    cells = _Cells(piece.graph)
    for node in list(piece.graph.nodes):
        found: dict[str, Any] = {}
        if _fits(_STATE, node, found) and found["end"] == 2 * found["width"]:
            cells.replace(node, found)
    if cells.written:
        piece.graph.eliminate_dead_code()  # what the steps were written with


def _fits(pattern: Any, value: Any, found: dict[str, Any]) -> bool:
    """Whether a value is computed as the pattern says; `found` gets its variables, and the layers' calls by name."""
    if isinstance(pattern, str):
        return bool(found.setdefault(pattern, value) == value)
    if isinstance(pattern, list):
        each = zip(pattern, value, strict=False)
        return isinstance(value, list) and len(pattern) == len(value) and all(_fits(p, v, found) for p, v in each)
    if not isinstance(pattern, tuple):
        return bool(pattern == value)
    head, *args = pattern
    if not isinstance(value, fx.Node) or value.kwargs or len(value.args) != len(args):
        return False
    if isinstance(head, str):
        layer = str(value.target)
        own = value.op == "call_module" and layer.startswith(f"trunk.{GATES_PATH}") and layer.endswith(f".{head}")
        right = own and found.setdefault(head, value) is value
    else:
        right = value.target is head
    return right and all(_fits(p, v, found) for p, v in zip(args, value.args, strict=True))


class _Cells:
    """Writes steps as calls of `lstm_cell`, whose weights are read once for all."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._weights: list[fx.Node] = []
        self.written: dict[fx.Node, list[fx.Node]] = {}  # hidden and cell of the states replaced

    def replace(self, state: fx.Node, found: dict[str, Any]) -> None:
        """Lets a cell compute `state`."""
        graph = self._graph
        with graph.inserting_before(state):
            if not self._weights:
                named = (("input", "weight"), ("hidden", "weight"), ("input", "bias"))
                self._weights = [graph.get_attr(f"{found[layer].target}.{name}") for layer, name in named]
                self._weights.append(graph.call_function(torch.zeros_like, (self._weights[-1],)))  # CUDA wants both
            both = graph.call_function(torch.lstm_cell, (found["x"], self._before(found), *self._weights))
            hidden, cell = self.written[state] = [graph.call_function(operator.getitem, (both, k)) for k in range(2)]
            out = graph.call_module(str(found["out"].target), (hidden,))
            logit = graph.call_function(aten.squeeze.dim, (out, 1))
        state.args = ([hidden, cell, out], 1)
        for reader in list(state.users):
            if reader.target is aten.select.int and reader.args[1:] == (1, -1):
                reader.replace_all_uses_with(logit)
                graph.erase_node(reader)

    def _before(self, found: dict[str, Any]) -> list[fx.Node]:
        if found["before"] in self.written:
            return self.written[found["before"]]
        ends = ((0, found["width"]), (found["width"], found["end"]))
        return [self._graph.call_function(_SLICE, (found["before"], 1, *end)) for end in ends]
