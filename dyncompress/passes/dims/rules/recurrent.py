"""Recurrent layers with hidden state h: w_ih[0] = gates*h, w_hh = (gates*h, h), output = h_forward + h_backward.

Each layer and direction has its own h, unless a state goes in or out (then they are one tensor's dim). A projected
LSTM gives p instead of h: w_hh = (4*h, p), w_hr = (p, h).
"""

from typing import Any

from torch import fx, nn

from ...modules.ragged_recurrent import RaggedRecurrent
from ..dims import Concat, Dim, Product, fresh, unify
from ..rule_registry import Dims, Typing, module_rule


def _direction(t: Typing, name: str, suffix: str, gates: int, module: Any) -> tuple[Dim, Dim, Dim]:
    """(input, hidden, output) dims of one layer and direction, from its weights."""
    w_ih, w_hh = t.param(f"{name}.weight_ih{suffix}"), t.param(f"{name}.weight_hh{suffix}")
    hidden = fresh(w_ih[0].size // gates)
    stacked = [w_ih[0], w_hh[0]]
    if module.bias:
        stacked += [t.param(f"{name}.bias_{k}{suffix}")[0] for k in ("ih", "hh")]
    for dim in stacked:
        unify(dim, Product((fresh(gates, "the gates of a recurrent cell"), hidden)))
    if module.proj_size:
        projection = t.param(f"{name}.weight_hr{suffix}")
        unify(projection[1], hidden)
        out = projection[0]
    else:
        out = hidden
    unify(w_hh[1], out)
    return w_ih[1], hidden, out


@module_rule(nn.LSTM, nn.GRU, nn.RNN, RaggedRecurrent)
def recurrent(t: Typing, node: fx.Node, a: dict[str, Any]) -> Any:
    module, name, x = a["module"], a["name"], t.of(a["input"])
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    directions = ["", "_reverse"] if module.bidirectional else [""]
    hiddens, outs, feed = [], [], x[2]
    for layer in range(module.num_layers):
        cells = [_direction(t, name, f"_l{layer}{d}", gates, module) for d in directions]
        for inp, hidden, out in cells:
            unify(feed, inp)
            hiddens.append(hidden)
            outs.append(out)
        feed = Concat(tuple(out for _, _, out in cells))
    t.features.append(feed)
    t.kinds += [(dim, "hidden states") for dim in (*hiddens, *outs)]
    return ((x[0], x[1], feed), _state(t, node, module, x, hiddens, outs))


def _state(t: Typing, node: fx.Node, module: Any, x: Dims, hiddens: list[Dim], outs: list[Dim]) -> Any:
    batch = x[0] if module.batch_first else x[1]
    if len(node.args) > 1 or any(user.args[1] == 1 for user in node.users):
        for dim in hiddens[1:]:
            unify(hiddens[0], dim)
        for dim in outs[1:]:
            unify(outs[0], dim)
    layers = fresh(len(outs), "the layers of a recurrent stack")
    h, c = (layers, batch, outs[-1]), (layers, batch, hiddens[-1])
    given = node.args[1] if len(node.args) > 1 else None
    if given is not None:
        pairs = zip(given, (h, c), strict=True) if module.mode == "LSTM" else [(given, h)]  # type: ignore[arg-type]
        for arg, dims in pairs:
            for have, want in zip(t.of(arg), dims, strict=True):
                unify(have, want)
    return (h, c) if module.mode == "LSTM" else h
