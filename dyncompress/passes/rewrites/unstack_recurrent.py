"""Unstacking: a recurrent module of several layers becomes a call for each of them, so that an exit fits in between."""

import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from ..graph.graph_pass import GraphPass, PassResult

aten = torch.ops.aten


@dataclass(frozen=True)
class Unstacked:
    """The paths of the modules that became their layers."""

    paths: tuple[str, ...]


@dataclass(frozen=True)
class UnstackRecurrent(GraphPass[Unstacked]):
    """Makes a call of each layer out of every recurrent module of several layers.

    1. the layers share the parameters of the module; `path` becomes the container of `path.0`, `path.1`, ...;
    2. dropout between the layers becomes `path.dropout`;
    3. a final state picked by number (``h[-1]``) comes from the layer it belongs to.

    A module that is given initial states, called twice, or whose states are read in another way stays as it is.
    """

    name: ClassVar[str] = "unstack-recurrent"

    def rewrite(self, gm: fx.GraphModule) -> PassResult[Unstacked]:
        calls = gm.graph.find_nodes(op="call_module")
        number = Counter(node.target for node in calls)
        done = tuple(str(node.target) for node in calls if number[node.target] == 1 and _try_unstack(gm, node))
        if done:
            gm.graph.eliminate_dead_code()
            gm.recompile()
        return PassResult(gm, bool(done), Unstacked(done))


def _try_unstack(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Unstacks the module that a node calls, if it can; whether it did."""
    module = gm.get_submodule(str(node.target))
    if not isinstance(module, nn.LSTM | nn.GRU | nn.RNN) or module.num_layers == 1 or len(node.args) > 1:
        return False
    sequences = [u for u in node.users if u.args[1] == 0]
    picks = [(pick, state) for u in node.users if u.args[1] == 1 for pick, state in _states(u, module)]
    able = all(_picks_one(pick) for pick, _ in picks)
    if able:
        _unstack(gm, node, module, sequences, picks)
    return able


def _states(node: fx.Node, module: nn.RNNBase) -> list[tuple[fx.Node, int]]:
    """Who reads the final states, and which: 0 the hidden state, 1 the cell state of an LSTM."""
    if not isinstance(module, nn.LSTM):
        return [(user, 0) for user in node.users]
    return [(user, int(item.args[1])) for item in node.users for user in item.users]  # type: ignore[arg-type]


def _picks_one(node: fx.Node) -> bool:
    return bool(node.target is aten.select.int and node.args[1] == 0)


def _unstack(
    gm: fx.GraphModule,
    node: fx.Node,
    module: nn.RNNBase,
    sequences: list[fx.Node],
    picks: list[tuple[fx.Node, int]],
) -> None:
    path, directions = str(node.target), 2 if module.bidirectional else 1
    container = nn.Module()
    for at in range(module.num_layers):
        container.add_module(str(at), _layer(module, at))
    if module.dropout:
        container.add_module("dropout", nn.Dropout(module.dropout))
    gm.set_submodule(path, container.train(module.training))
    x, finals = node.args[0], []
    with gm.graph.inserting_before(node):
        for at in range(module.num_layers):
            if at and module.dropout:
                x = _new(gm.graph.call_module(f"{path}.dropout", (x,)), node, x.meta["val"])  # type: ignore[union-attr]
            call = _new(gm.graph.call_module(f"{path}.{at}", (x,)), node, _value(node, directions))
            x = _item(gm.graph, call, 0)
            finals.append(_item(gm.graph, call, 1))
    for sequence in sequences:
        sequence.replace_all_uses_with(x)  # type: ignore[arg-type]
    for pick, state in picks:
        at, direction = divmod(int(pick.args[2]) % (module.num_layers * directions), directions)  # type: ignore[arg-type]
        with gm.graph.inserting_before(pick):
            source = _item(gm.graph, finals[at], state) if isinstance(module, nn.LSTM) else finals[at]
            pick.args = (source, 0, direction)


def _layer(module: nn.RNNBase, at: int) -> nn.RNNBase:
    """Layer number `at` as a module of its own, with the parameters of `module`."""
    directions = 2 if module.bidirectional else 1
    inputs = directions * (module.proj_size or module.hidden_size) if at else module.input_size
    settings: dict[str, Any] = {
        "bias": module.bias, "batch_first": module.batch_first, "bidirectional": module.bidirectional,
    }  # fmt: skip
    kind: Any = next(k for k in (nn.LSTM, nn.GRU, nn.RNN) if isinstance(module, k))
    settings |= {"proj_size": module.proj_size} if kind is nn.LSTM else {}
    settings |= {"nonlinearity": module.nonlinearity} if isinstance(module, nn.RNN) else {}
    layer: nn.RNNBase = kind(inputs, module.hidden_size, device="meta", **settings)
    for name in layer._flat_weights_names:
        layer._parameters[name] = module._parameters[name.replace("_l0", f"_l{at}")]
    layer._init_flat_weights()
    return layer


def _value(node: fx.Node, directions: int) -> Any:
    """What one layer returns: the sequence, and the states of its own directions."""
    y, state = node.meta["val"]
    return y, tuple(s[:directions] for s in state) if isinstance(state, tuple) else state[:directions]


def _item(graph: fx.Graph, source: fx.Node, index: int) -> fx.Node:
    return _new(graph.call_function(operator.getitem, (source, index)), source, source.meta["val"][index])


def _new(made: fx.Node, like: fx.Node, val: Tensor | tuple[Any, ...]) -> fx.Node:
    made.meta = {**like.meta, "val": val}
    return made
