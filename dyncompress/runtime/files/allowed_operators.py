"""The closed set of functions that a saved graph may call, and their names in the file.

1. ATen operators ("aten.add.Tensor") that compute values from tensors and numbers: judged by their schema, so that
   the operators which write files, start the backward pass or exchange a tensor's storage stay out;
2. the Python functions that torch.export emits for symbolic sizes, and `device_of`.

Names are looked up in tables and on torch.ops.aten only; nothing is imported or evaluated.
"""

import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

from ...errors import RequestError
from ...passes.capture.lift import device_of

_OPERATORS = (
    "add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "pos", "eq", "ne", "lt", "le", "gt", "ge", "and_",
    "or_", "not_", "getitem",
)  # fmt: skip
_SYMBOLIC = ("sym_max", "sym_min", "sym_not", "sym_int", "sym_float", "sym_ite", "sym_sqrt", "sym_sum")

FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATORS},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
    **{f"torch.{name}": getattr(torch, name) for name in _SYMBOLIC},
    "builtins.max": max,
    "builtins.min": min,
    "builtins.round": round,
    "device_of": device_of,
}
_NAMES = {function: name for name, function in FUNCTIONS.items()}

_ATEN = re.compile(r"aten\.([A-Za-z_][A-Za-z0-9_]*)\.([A-Za-z_][A-Za-z0-9_]*)")
# Backward kernels and packed vendor formats trust their arguments; the others reach files, storages or autograd.
_REFUSED = re.compile(
    r".*backward.*|(fbgemm|mkldnn|cudnn|miopen|quantized)_.*|from_file|save|set_?|set_data|resize.*|record_stream|"
    r"requires_grad_|retain_grad|manual_seed|data|grad|sparse_.*"
)
# Operators with a leading underscore are internal; these are the ones that exported models call.
_INTERNAL = re.compile(
    r"__i?(and|or|xor)__|__[lr]shift__|_to_copy|_unsafe_view|_stack|_(safe_|log_)?softmax|_convolution|_trilinear|"
    r"_adaptive_avg_pool[23]d|_pad_(circular|enum)|_upsample_bi(linear|cubic)2d_aa|_upsample_nearest_exact[123]d|_conj|"
    r"_conj_physical|_neg_view|_fft_(c2c|c2r|r2c)|_cdist_forward|_euclidean_dist|_weight_norm(_interface)?|"
    r"_shape_as_tensor|_local_scalar_dense|_native_batch_norm_legit(_no_training)?|"
    r"_scaled_dot_product_(attention_math|flash_attention_for_cpu)"
)
_VALUES = {"Tensor", "int", "float", "bool", "number", "complex"}
_ARGUMENTS = _VALUES | {"str", "Device", "Generator"}


def target_name(target: Any) -> str | None:
    """The name under which a call of `target` is saved; None when a checkpoint cannot name it."""
    if isinstance(target, OpOverload):
        name = str(target)
        return name if _aten(name) is target else None
    return _NAMES.get(target)


def find_target(name: Any) -> Callable[..., Any]:
    """The function that `target_name` calls `name`.

    Raises:
        RequestError: the name is not in the closed set.
    """
    target = FUNCTIONS.get(str(name)) or _aten(str(name))
    if target is None:
        raise RequestError(f"it calls {str(name)[:80]!r}, which is outside the operators a checkpoint may call")
    return target


def _aten(name: str) -> OpOverload | None:
    match = _ATEN.fullmatch(name)
    if match is None:
        return None
    base, overload = match.groups()
    if _REFUSED.fullmatch(base) or (base.startswith("_") and not _INTERNAL.fullmatch(base)):
        return None
    packet = getattr(torch.ops.aten, base, None)
    if not isinstance(packet, OpOverloadPacket) or overload not in packet.overloads():
        return None
    found = getattr(packet, overload)
    return found if _computes_values(found) else None


def _computes_values(operator_: OpOverload) -> bool:
    """Whether the operator maps tensors and numbers to tensors and numbers, at least one tensor among them."""
    schema = operator_._schema
    given = {_element(a.type) for a in schema.arguments}
    returned = {_element(r.type) for r in schema.returns}
    return bool(returned) and given <= _ARGUMENTS and returned <= _VALUES and "Tensor" in given | returned


def _element(kind: Any) -> str:
    """The innermost type of Optional[List[..]]."""
    text = str(kind)
    while "[" in text:
        text = text[text.index("[") + 1 : text.rindex("]")]
    return text
