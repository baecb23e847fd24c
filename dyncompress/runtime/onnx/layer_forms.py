"""Layers in the form that ONNX, or onnxruntime, wants them in.

1. LSTM, GRU and RNN layers become ONNX's own operators, so that any sequence length runs;
2. image heads pool by windows: rows and then columns, the fastest in PyTorch, is onnxruntime's slowest way, and windows
   took it a tenth of the time on 16 x 16 maps; they stay in its own memory layout, too;
3. attention over more, or fewer, leading dims than batch and heads becomes four-dimensional.

ONNX stacks the gates in another order (LSTM i o f c, GRU z r h; PyTorch: i f g o, r z n) and runs one layer at a time.
A projection W_hr is folded: with r = W_hr h the gates' W_hh r equals (W_hh W_hr) h, an ordinary LSTM whose outputs are
then multiplied by W_hr.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.onnx import ops

from ...errors import DynCompressError
from ...passes.modules.exit_heads import ImageHead
from ...passes.modules.ragged_recurrent import RaggedRecurrent

_GATES = {"LSTM": [0, 3, 1, 2], "GRU": [1, 0, 2], "RNN_TANH": [0], "RNN_RELU": [0]}  # ONNX's order in PyTorch's
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def use_onnx_layers(gm: fx.GraphModule) -> None:
    """Gives `gm`, in place, layers that can only be exported: recurrent ones, and image heads that pool by windows."""
    for path, module in list(gm.named_modules()):
        if isinstance(module, ImageHead):
            module.by_windows = True
        if isinstance(module, nn.RNNBase | RaggedRecurrent):
            gm.set_submodule(path, OnnxRecurrent(path, module))


class OnnxRecurrent(nn.Module):
    """Called like the layer it is made from; its arithmetic exists in ONNX only."""

    def __init__(self, path: str, layer: nn.RNNBase | RaggedRecurrent) -> None:
        super().__init__()
        self.path = path
        self.mode, self.batch_first, self.num_layers = str(layer.mode), bool(layer.batch_first), int(layer.num_layers)
        self.directions = 2 if layer.bidirectional else 1
        for at in range(self.num_layers * self.directions):
            suffix = f"_l{at // self.directions}" + ("_reverse" if at % self.directions else "")
            for name, weight in _onnx_weights(layer, self.mode, suffix).items():
                self.register_buffer(f"{name}_{at}", weight)

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        """x: (batch, time, features), or (time, batch, features) without batch_first."""
        x_TBF = x.transpose(0, 1) if self.batch_first else x
        states: list[list[Tensor]] = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(self.directions):
                y_TBF, *state = self._run(x_TBF, layer * self.directions + direction, direction, hx)
                outputs.append(y_TBF)
                states.append(state)
            x_TBF = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
        return (x_TBF.transpose(0, 1) if self.batch_first else x_TBF), self._stacked(states)

    def _run(self, x_TBF: Tensor, at: int, direction: int, hx: Any) -> list[Tensor]:
        """Output (time, batch, out) and last states (1, batch, ...) of one layer in one direction."""
        w, r, b = (getattr(self, f"{name}_{at}") for name in "wrb")
        project = getattr(self, f"project_{at}", None)
        if project is not None and hx is not None:
            raise DynCompressError(f"ONNX has no projected LSTM that starts from a given state, as '{self.path}' does")
        given = () if hx is None else tuple(hx) if self.mode == "LSTM" else (hx,)
        attrs: dict[str, Any] = {"hidden_size": r.shape[-1], "direction": "reverse" if direction else "forward"}
        if self.mode == "GRU":
            attrs["linear_before_reset"] = 1
        elif self.mode == "RNN_RELU":
            attrs["activations"] = ["Relu"]
        (time, batch), hidden = x_TBF.shape[:2], r.shape[-1]
        shapes = [(time, 1, batch, hidden)] + [(1, batch, hidden)] * (2 if self.mode == "LSTM" else 1)
        y, *state = ops.symbolic_multi_out(
            self.mode.partition("_")[0],
            (x_TBF, w, r, b, *([None, *(s[at : at + 1] for s in given)] if given else [])),
            attrs,
            dtypes=[x_TBF.dtype] * len(shapes),
            shapes=shapes,
        )
        y = y.squeeze(1)
        if project is not None:
            y, state[0] = y @ project, state[0] @ project
        return [y, *state]

    def _stacked(self, states: list[list[Tensor]]) -> Any:
        if any(len({part.shape[-1] for part in parts}) > 1 for parts in zip(*states, strict=True)):
            return None
        stacked = tuple(torch.cat(parts) for parts in zip(*states, strict=True))
        return stacked if self.mode == "LSTM" else stacked[0]


def _onnx_weights(layer: nn.Module, mode: str, suffix: str) -> dict[str, Tensor | None]:
    """W (1, gates * H, features), R (1, gates * H, H), B (1, 2 * gates * H) or None, and a projection (H, P)."""

    def given(name: str) -> Tensor | None:
        weight = getattr(layer, f"{name}{suffix}", None)
        return None if weight is None else weight.detach()

    w_ih, w_hh, w_hr = given("weight_ih"), given("weight_hh"), given("weight_hr")
    assert w_ih is not None and w_hh is not None
    weights: dict[str, Tensor | None] = {"w": _reorder(w_ih, mode), "b": None}
    weights["r"] = _reorder(w_hh if w_hr is None else w_hh @ w_hr, mode)
    b_ih, b_hh = given("bias_ih"), given("bias_hh")
    if b_ih is not None and b_hh is not None:
        weights["b"] = torch.cat([_reorder(b_ih, mode), _reorder(b_hh, mode)], -1)
    return weights if w_hr is None else weights | {"project": w_hr.T.contiguous()}


def _reorder(weight: Tensor, mode: str) -> Tensor:
    """The gates of dim 0 in ONNX's order, behind a leading dim for the direction."""
    order = _GATES[mode]
    return weight.unflatten(0, (len(order), -1))[order].flatten(0, 1).unsqueeze(0)


def with_plain_attention(program: ExportedProgram) -> ExportedProgram:
    """The same program, all of its attention calls of rank 4."""
    ranks = {node.args[0].meta["val"].dim() for node in program.graph.find_nodes(op="call_function", target=_ATTENTION)}
    return program if ranks <= {4} else program.run_decompositions({_ATTENTION: _attention})


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    """q: (*lead, heads, queries, width)."""
    if q.dim() == 4:
        return NotImplemented
    lead = q.shape[:-3]
    if attn_mask is not None and attn_mask.dim() > 2:
        attn_mask = _merged(attn_mask.expand(*lead, *attn_mask.shape[-3:]))
    y = _ATTENTION(_merged(q), _merged(k), _merged(v), attn_mask, *args, **kwargs)
    return y.reshape(*lead, *y.shape[-3:])


def _merged(x: Tensor) -> Tensor:
    """(*lead, heads, tokens, width) -> (product of lead, heads, tokens, width)."""
    return x.reshape(-1, *x.shape[-3:])
