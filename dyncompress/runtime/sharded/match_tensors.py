"""Whether a source holds the tensors of a captured model, and which of its tensors is which."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, fx

from ...errors import RequestError
from ...passes.shrink.plan import Plan
from ..files.shards import DTYPES, Source, Stored

_SHOWN = 3  # names listed in an error message


def match(gm: fx.GraphModule, source: Source, drop: Sequence[str] = ()) -> dict[str, str]:
    """The source's name of every tensor of the model that is to come from there, by its name in the model.

    1. Tied tensors may be stored once, under any of their names, or several times with the same bits.
    2. Constants (buffers outside the state dict, such as rotary frequencies) may be missing; then the model's own stay.

    Args:
        drop: tensors of the source to leave out, as names or patterns such as ``*.inv_freq``.

    Raises:
        RequestError: tensors are missing, unknown, of another shape or dtype, or or tied only in the model.
    """
    unused = {name for name in source.tensors if any(fnmatchcase(name, pattern) for pattern in drop)}
    found: dict[str, str] = {}
    missing, unset, shapes, dtypes, untied = [], [], [], [], []
    for tensor, names, constant in _groups(gm):
        stored = [name for name in names if name in source.tensors and name not in unused]
        if not stored:
            if not constant:
                missing.append(names[0])
            elif tensor.is_meta:
                unset.append(names[0])
            continue
        entry = source.tensors[stored[0]]
        if entry.shape != tuple(tensor.shape):
            shapes.append(f"{stored[0]} is {_shape(entry.shape)}, not {_shape(tuple(tensor.shape))}")
        elif DTYPES[entry.dtype] is not tensor.dtype:
            dtypes.append(f"{stored[0]} is {_dtype(entry)}, not {str(tensor.dtype).removeprefix('torch.')}")
        untied += [f"{stored[0]} and {other}" for other in stored[1:] if not source.same(stored[0], other)]
        found |= dict.fromkeys(names, stored[0])
    unknown = [name for name in source.tensors if name not in found and name not in unused]
    problems = (
        _listed("missing", missing),
        _listed("unknown to the model, which drop= leaves out", unknown),
        _listed("of another shape", shapes),
        _listed("of another dtype: build the model in the dtype of the source", dtypes),
        _listed("tied in the model but different in the source", untied),
        _listed("neither in the source nor computed: capture with capture_empty", unset),
    )
    if any(problems):
        raise RequestError(f"{source.path} does not fit the model: {'; '.join(p for p in problems if p)}")
    return found


def check_constants(gm: fx.GraphModule, source: Source, names: Mapping[str, str], plan: Plan) -> None:
    """In exact mode `shrink` folds what removed indices without incoming weights leave behind (their bias, through the
    layers that follow) into the next bias; that takes the weights in memory.

    Raises:
        RequestError: a layer with a bias loses such an index.
    """
    for path, module in gm.named_modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        kept = plan.kept.get(f"{path}.weight", (None,))[0]
        if not isinstance(weight, Tensor) or not isinstance(bias, Tensor) or kept is None:
            continue
        stays = torch.zeros(len(weight), dtype=torch.bool)
        stays[kept] = True
        for piece in source.pieces(names[f"{path}.weight"], (~stays).nonzero()[:, 0]):
            if (piece.float() == 0).reshape(len(piece), -1).all(1).any():
                raise RequestError(
                    f"exact=True cannot keep the constants that removed indices of {path} leave behind, whose weights "
                    "are all zero: use exact=False, or load the model and shrink it"
                )


def _groups(gm: fx.GraphModule) -> Iterator[tuple[Tensor, list[str], bool]]:
    """Every tensor once, with all of its names and whether it is no part of the state dict."""
    tensors: dict[int, Tensor] = {}
    names: dict[int, list[str]] = {}
    for name, tensor in [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]:
        tensors[id(tensor)] = tensor
        names.setdefault(id(tensor), []).append(name)
    kept = set(gm.state_dict(keep_vars=True))
    for key, tensor in tensors.items():
        yield tensor, names[key], not any(name in kept for name in names[key])


def _listed(what: str, names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{more})" if names else ""


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _dtype(stored: Stored) -> str:
    return str(DTYPES[stored.dtype]).removeprefix("torch.")
