"""Lift: operator calls on a standard module's own parameters become that nn.Module again, at its own dotted name.

1. helper sub-graphs (no-grad, autocast) are inlined, runtime assertions dropped;
2. every tensor is copied once (ties stay ties) under the name it has in the user's model;
3. each call whose tensors are exactly the tensors of one module there becomes a call of a module built from the call's
   own arguments - so subclasses, wrappers and functional calls lift alike;
4. dropout calls become Dropout modules, which train() switches on; devices baked into factory calls follow the input.

What does not match stays an operator.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..graph.copying import LazyGraphModule
from ..graph.meta import FixedInput, Input, TensorInput, set_inputs
from ..graph.module_tree import holder_at, put_module, put_tensor
from ..graph.nodes import attribute
from .module_builders import MODULE_BUILDERS

aten = torch.ops.aten


def device_of(x: Tensor) -> torch.device:
    """The device of a live tensor, as a graph node: factory calls create their tensors there."""
    return x.device


def lift(graph: fx.Graph, owner: nn.Module, model: nn.Module) -> fx.GraphModule:
    """The captured `graph` of `model`, whose tensors are found in `owner`, as a GraphModule of standard modules."""
    _inline_subgraphs(graph, owner)
    _drop_assertions(graph)
    _drop_dead(graph)
    tensors = _copied_tensors(graph, owner, model)
    graph.owning_module = None  # from here on its modules are those of the new root
    lifted = _match_modules(graph, model, tensors)
    root = _build_root(model, graph, lifted, tensors)
    _lift_dropout(graph, model, root)
    _free_devices(graph)
    _drop_dead(graph)
    for node in graph.nodes:
        _concrete_meta(node)
    result = LazyGraphModule(root, graph, class_name=type(model).__name__)
    for path, module in root.named_modules():
        if module._non_persistent_buffers_set:  # GraphModule copies tensors without this mark
            result.get_submodule(path)._non_persistent_buffers_set |= module._non_persistent_buffers_set
    set_inputs(result, map(_input, result.graph.find_nodes(op="placeholder")))
    return result.train(model.training)


def _drop_dead(graph: fx.Graph) -> None:
    """What nobody reads, but in-place operators: they may write through a view.

    `Graph.eliminate_dead_code` checks the whole graph first, which takes several times as long.
    """
    for node in reversed(graph.nodes):
        if not node.users and node.op not in {"placeholder", "output"}:
            schema = getattr(node.target, "_schema", None)
            if schema is None or not schema.is_mutable:
                graph.erase_node(node)


# --- 1. helper sub-graphs and assertions -------------------------------------------------------------------------


def _inline_subgraphs(graph: fx.Graph, owner: nn.Module) -> None:
    """Replaces wrap_with_set_grad_enabled / wrap_with_autocast calls by the body they wrap."""
    bodies = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
    for node in [n for n in graph.nodes if n.op == "call_function" and getattr(n.target, "__name__", "") in bodies]:
        body_at = bodies[node.target.__name__]
        body = getattr(owner, node.args[body_at].target)
        _inline_subgraphs(body.graph, body)
        env = dict(zip(body.graph.find_nodes(op="placeholder"), node.args[body_at + 1 :], strict=True))
        with graph.inserting_before(node):
            result = graph.graph_copy(body.graph, env)
        for inner, outer in env.items():
            if isinstance(outer, fx.Node) and outer.op == "get_attr" and inner.op == "get_attr":
                _copy_attr(body, owner, str(inner.target))
        _replace_with_values(graph, node, result)


def _copy_attr(source: nn.Module, target: nn.Module, name: str) -> None:
    if not hasattr(target, name) and "." not in name:
        setattr(target, name, getattr(source, name))


def _replace_with_values(graph: fx.Graph, node: fx.Node, value: Any) -> None:
    if isinstance(value, fx.Node):
        node.replace_all_uses_with(value)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(value[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(node)


_ASSERTIONS = ("_assert", "sym_constrain", "_guards_fn")


def _drop_assertions(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        name = str(node.target if node.op == "call_module" else getattr(node.target, "__name__", ""))
        if node.op in {"call_function", "call_module"} and name.startswith(_ASSERTIONS) and not node.users:
            graph.erase_node(node)


# --- 2. tensors under the user's names ---------------------------------------------------------------------------


def _copied_tensors(graph: fx.Graph, owner: nn.Module, model: nn.Module) -> dict[int, Tensor]:
    """id of every tensor of the model or the graph's owner -> its copy."""
    found = [tensor for root in dict.fromkeys((model, owner)) for tensor in (*root.parameters(), *root.buffers())]
    for node in graph.find_nodes(op="get_attr"):
        value = attribute(owner, str(node.target))
        if isinstance(value, Tensor):
            found.append(value)
            node.meta["source"] = id(value)
    copies: dict[int, Tensor] = {}
    for tensor in found:
        if id(tensor) not in copies:
            data = tensor.detach().clone()
            is_param = isinstance(tensor, nn.Parameter)
            copies[id(tensor)] = nn.Parameter(data, tensor.requires_grad) if is_param else data
    return copies


# --- 3. modules --------------------------------------------------------------------------------------------------


def _own_tensors(module: nn.Module) -> dict[str, int]:
    own = {**module._parameters, **module._buffers}
    return {name: id(t) for name, t in own.items() if t is not None and name != "num_batches_tracked"}


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""


def _candidates(node: fx.Node) -> list[str]:
    weights = [str(n.target).rpartition(".")[0] for n in node.all_input_nodes if n.op == "get_attr"]
    return list(dict.fromkeys([_module_path(node), *weights]))


def _match_modules(graph: fx.Graph, model: nn.Module, tensors: dict[int, Tensor]) -> dict[str, nn.Module]:
    """Turns matching calls into call_module nodes; returns the modules by dotted name."""
    lifted: dict[str, nn.Module] = {}
    originals = _modules(model)
    for node in list(graph.nodes):
        build = MODULE_BUILDERS.get(node.target) if node.op == "call_function" else None
        if build is None:
            continue
        sources = {n.meta["source"] for n in node.all_input_nodes if "source" in n.meta}
        for path in _candidates(node):
            original = originals.get(path)
            if original is None or (path in lifted and lifted[path].meta_call != _call_key(node)):
                continue
            own = _own_tensors(original)
            if not own or set(own.values()) != sources:
                continue
            built = build(node, original, own)
            if built is None:
                continue
            if path not in lifted:
                lifted[path] = _filled(built.module, original, tensors)
                lifted[path].meta_call = _call_key(node)  # type: ignore[assignment]
            _replace_call(graph, node, path, built.inputs, built.reshape_output)
            break
    for module in lifted.values():
        del module.meta_call
    return lifted


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules inside `model` by every name they have."""
    return {path: module for path, module in model.named_modules(remove_duplicate=False) if path}


def _call_key(node: fx.Node) -> str:
    """Everything about a call but its live inputs: two calls of one module must agree on it."""
    fixed = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("source"))
    return f"{node.target} {fixed}"


def _filled(module: nn.Module, original: nn.Module, tensors: dict[int, Tensor]) -> nn.Module:
    for name, value in {**original._parameters, **original._buffers}.items():
        if value is None:
            continue
        kind = module._parameters if name in original._parameters else module._buffers
        kind[name] = tensors[id(value)]  # type: ignore[assignment]
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()
    return module


def _replace_call(
    graph: fx.Graph, node: fx.Node, path: str, inputs: tuple[Any, ...], reshape: Callable[..., None] | None
) -> None:
    with graph.inserting_before(node):
        call = graph.create_node("call_module", path, inputs)
    call.meta = dict(node.meta)
    if reshape is not None:
        reshape(graph, node, call)
        return
    node.replace_all_uses_with(call)
    graph.erase_node(node)


def _build_root(
    model: nn.Module, graph: fx.Graph, lifted: dict[str, nn.Module], tensors: dict[int, Tensor]
) -> nn.Module:
    root = nn.Module()
    persistent = set(model.state_dict(keep_vars=True))
    for path, module in lifted.items():
        put_module(root, path, module)
    for node in graph.find_nodes(op="get_attr"):
        if "source" not in node.meta or not node.users:
            continue
        path = str(node.target)
        parent, _, name = path.rpartition(".")
        holder = holder_at(root, parent)
        if name not in holder._parameters and name not in holder._buffers:
            put_tensor(root, path, tensors[node.meta["source"]], persistent=path in persistent)
    return root


# --- 4. dropout and devices --------------------------------------------------------------------------------------

_DROPOUTS: dict[Any, type[nn.Module]] = {
    aten.dropout.default: nn.Dropout,
    aten.feature_dropout.default: nn.Dropout2d,
    aten.alpha_dropout.default: nn.AlphaDropout,
    aten.feature_alpha_dropout.default: nn.FeatureAlphaDropout,
}


def _lift_dropout(graph: fx.Graph, model: nn.Module, root: nn.Module) -> None:
    originals, placed = _modules(model), _modules(root)
    for node in list(graph.nodes):
        kind = _DROPOUTS.get(node.target) if node.op == "call_function" else None
        if kind is None:
            continue
        path, rate = _module_path(node), float(node.args[1])
        if not isinstance(originals.get(path), nn.modules.dropout._DropoutNd):
            path = f"{path}.dropout".lstrip(".")
        while path in placed and getattr(placed[path], "p", None) != rate:
            path += "_"
        placed[path] = kind(rate)
        put_module(root, path, placed[path])
        _replace_call(graph, node, path, (node.args[0],), None)


def _free_devices(graph: fx.Graph) -> None:
    """Factory calls and casts name the capture device; let them follow the first tensor input instead."""
    anchor = next((p for p in graph.find_nodes(op="placeholder") if isinstance(p.meta.get("val"), Tensor)), None)
    users = [n for n in graph.nodes if n.op == "call_function" and isinstance(n.kwargs.get("device"), torch.device)]
    positional = [n for n in graph.nodes if n.target is aten.to.device]
    if anchor is None or not (users or positional):
        return
    with graph.inserting_after(list(graph.find_nodes(op="placeholder"))[-1]):
        device = graph.call_function(device_of, (anchor,))
    for node in users:
        node.kwargs = {**node.kwargs, "device": device}
    for node in positional:
        node.args = (node.args[0], device, *node.args[2:])


# --- metadata ----------------------------------------------------------------------------------------------------


def concrete(value: Any) -> Any:
    """The shape-only stand-in of a traced value: meta tensors, ints for symbolic sizes, None where unknown."""
    if type(value) is Tensor and value.is_meta:
        return value
    if isinstance(value, Tensor):
        shape = [concrete(s) for s in value.shape]
        return None if None in shape else torch.empty(shape, dtype=value.dtype, device="meta")
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return value.node.hint
    if isinstance(value, tuple | list):
        return type(value)(concrete(v) for v in value)
    return value


def _concrete_meta(node: fx.Node) -> None:
    """Keeps what later passes read: `val` (shapes at the capture batch), `dynamic` (input dims that vary), `path`."""
    value = node.meta.get("val")
    meta: dict[str, Any] = {"val": concrete(value), "path": _module_path(node)}
    if node.op == "get_attr" and "source" in node.meta:
        meta["source"] = node.meta["source"]
    if node.op == "placeholder" and isinstance(value, Tensor):
        free = [d for d, s in enumerate(value.shape) if isinstance(s, torch.SymInt)]
        meta["dynamic"] = node.meta.get("dynamic", free)
    node.meta = meta


def _input(node: fx.Node) -> Input:
    val = node.meta.get("val")
    if isinstance(val, Tensor):
        return TensorInput(node.name, tuple(val.shape), val.dtype, tuple(node.meta["dynamic"]))
    return FixedInput(node.name, val)
