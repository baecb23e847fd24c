"""Traced graphs taken apart and put together as one ONNX model, with the user's names and every weight once."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from ...errors import RequestError

IR_VERSION = 10


@dataclass(eq=False)
class Scope:
    """A graph in the making: the outermost one or a branch of an If, which sees what is in the `parent` around it."""

    parent: "Scope | None" = None
    nodes: list[ir.Node] = field(default_factory=list)
    weights: list[ir.Value] = field(default_factory=list)
    made: ir.Graph | None = None

    def op(
        self, op: str, inputs: Sequence[ir.Value], name: str,
        attributes: Mapping[str, int | str] | None = None, like: ir.Value | None = None,
    ) -> ir.Value:  # fmt: skip
        """Adds a node with one output; typed `like` another value, but for the number of rows."""
        node = ir.node(op, inputs, dict(attributes or {}), name=name)
        self.nodes.append(node)
        output = node.outputs[0]
        output.name = name
        if like is not None:
            output.type = like.type
            output.shape = None if like.shape is None else ir.Shape([None, *like.shape[1:]])
        return output

    def either(
        self, condition: ir.Value, then: ir.Graph, otherwise: ir.Graph, name: str, named: Sequence[str]
    ) -> list[ir.Value]:
        """Adds an If; its outputs are `named`, typed like those of `otherwise`."""
        branches = {"then_branch": then, "else_branch": otherwise}
        node = ir.node("If", [condition], branches, num_outputs=len(named), name=name)
        self.nodes.append(node)
        for output, like, called in zip(node.outputs, otherwise.outputs, named, strict=True):
            output.name, output.type, output.shape = called, like.type, like.shape
        return list(node.outputs)

    def graph(self, outputs: Sequence[ir.Value], name: str) -> ir.Graph:
        """The scope as the branch of an If."""
        self.made = ir.Graph([], outputs, nodes=self.nodes, initializers=self.weights, name=name)
        return self.made

    def outward(self) -> "Iterator[Scope]":
        """The scope and those around it."""
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.parent

    def release(self, weight: ir.Value) -> None:
        """Gives up a weight that another scope takes over."""
        self.weights.remove(weight)
        if self.made is not None:
            self.made.initializers.pop(str(weight.name))


class ModelBuilder:
    """The inputs and the outermost scope of a model; it sees to it that no name and no weight comes twice."""

    def __init__(self, inputs: Sequence[tuple[str, ir.Value]]) -> None:
        self._symbols = _symbols(inputs)
        self.inputs = [
            ir.Value(name=name, type=like.type, shape=_renamed(like.shape, self._symbols, name))
            for name, like in inputs
        ]
        self.settings: list[ir.Value] = []
        self.outside = Scope()
        self._by_name: dict[str, ir.Value] = {}
        self._by_content: dict[tuple[Any, ...], tuple[ir.Value, Scope]] = {}

    def constant(self, name: str, value: int | Sequence[int]) -> ir.Value:
        """An int64 constant of the outermost scope, the same one for the same name."""
        if name not in self._by_name:
            self._add(self.outside, name, ir.tensor(np.array(value, np.int64), name=name))
        return self._by_name[name]

    def setting(self, name: str, default: float) -> ir.Value:
        """A float32 input of the model that a caller may leave out: an initialiser that is listed as an input.

        Raises:
            RequestError: the model has an input of that name.
        """
        if name in {value.name for value in self.inputs}:
            raise RequestError(f"the model has an input named {name}, the name of a threshold; rename it")
        self.settings.append(self._add(self.outside, name, ir.tensor(np.array(default, np.float32), name=name)))
        return self.settings[-1]

    def rows_where(self, mask: ir.Value, scope: Scope, prefix: str) -> tuple[ir.Value, ir.Value]:
        """The rows where bool (M,) holds, as int64, and whether there are any, bool ()."""
        found = scope.op("NonZero", [mask], f"{prefix}/found")
        index = scope.op("Reshape", [found, self.constant("flat", [-1])], f"{prefix}/index")
        count = scope.op("Size", [index], f"{prefix}/count")
        return index, scope.op("Greater", [count, self.constant("zero", 0)], f"{prefix}/any")

    def inline(self, graph: ir.Graph, inputs: Sequence[ir.Value], scope: Scope, prefix: str) -> list[ir.Value]:
        """Moves the nodes of a traced graph into `scope`, where they read `inputs`; returns its outputs.

        Weights go to the outermost scope that needs them and no further out: onnxruntime packs and re-lays-out the
        weights of a convolution only where they lie beside it.
        """
        swaps = dict(zip(map(id, graph.inputs), inputs, strict=True))
        for name, weight in list(graph.initializers.items()):
            assert weight.const_value is not None
            swaps[id(weight)] = self._weight(scope, _user_name(name, prefix), weight.const_value)
        for old in (*graph.inputs, *graph.initializers.values()):
            old.replace_all_uses_with(swaps[id(old)])
        outputs = [swaps.get(id(value), value) for value in graph.outputs]
        nodes = list(graph)
        graph.outputs.clear()
        graph.remove(nodes)
        symbols = self._symbols if scope is self.outside else {}
        for node in nodes:
            node.name = f"{prefix}/{node.name}"
            for value in node.outputs:
                value.name = f"{prefix}/{value.name}"
                value.shape = _renamed(value.shape, symbols, prefix)
        scope.nodes += nodes
        return outputs

    def model(self, outputs: Sequence[tuple[str, ir.Value]], opset: int) -> ir.Model:
        """The whole model, its outputs under the given names.

        Raises:
            RequestError: an input has the name of an output.
        """
        clash = sorted({name for name, _ in outputs} & {str(value.name) for value in self.inputs})
        if clash:
            raise RequestError(f"the model has an input named {clash[0]}, the name of an ONNX output; rename it")
        named = []
        for name, value in outputs:
            named.append(self.outside.op("Identity", [value], f"output/{name}"))
            named[-1].name, named[-1].type, named[-1].shape = name, value.type, value.shape
        nodes, weights = self.outside.nodes, self.outside.weights
        graph = ir.Graph(
            [*self.inputs, *self.settings],
            named,
            nodes=nodes,
            initializers=weights,
            opset_imports={"": opset},
            name="dyncompress",
        )
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name="dyncompress")
        common.ClearMetadataAndDocStringPass()(model)  # source lines of the machine that traced it
        return model

    def _weight(self, scope: Scope, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """The initialiser that holds these very numbers, in the innermost scope around all that ask for it."""
        content = hashlib.sha256(tensor.tobytes()).digest(), tensor.dtype, tuple(tensor.shape)
        if content not in self._by_content:
            while name in self._by_name:
                name += "_"
            self._by_content[content] = self._add(scope, name, tensor), scope
        value, owner = self._by_content[content]
        around = set(scope.outward())
        shared = next(s for s in owner.outward() if s in around)
        if shared is not owner:
            owner.release(value)
            shared.weights.append(value)
            self._by_content[content] = value, shared
        return value

    def _add(self, scope: Scope, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        shape, kind = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
        value = ir.Value(name=name, shape=shape, type=kind, const_value=tensor)
        self._by_name[name] = value
        scope.weights.append(value)
        return value


# --- names and shapes --------------------------------------------------------------------------------------------


def _symbols(inputs: Sequence[tuple[str, ir.Value]]) -> dict[str, str]:
    """torch's symbol of every varying input dim -> the name it gets: that of the first input that has it."""
    found: dict[str, str] = {}
    for name, value in inputs:
        for d, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim):
                found.setdefault(str(size.value), "batch" if d == 0 else f"{name}_dim{d}")
    return found


def _renamed(shape: ir.Shape | None, symbols: Mapping[str, str], prefix: str) -> ir.Shape | None:
    """A shape whose symbols mean something in this stage only: another stage's batch is another number of samples."""
    if shape is None:
        return None

    def rename(size: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(size, int) or size.value is None:  # None: two unknown sizes need not be the same
            return size if isinstance(size, int) else None
        return re.sub(r"\b[su]\d+\b", lambda m: symbols.get(m[0], f"{prefix}_{m[0]}"), str(size.value))

    return ir.Shape([rename(size) for size in shape])


def _user_name(name: str, prefix: str) -> str:
    """`bodies.0.trunk.conv1.weight` is the user's `conv1.weight`; constants without a name belong to their stage."""
    _, trunk, path = f".{name}".partition(".trunk.")
    return path if trunk else f"{prefix}/{name}"
