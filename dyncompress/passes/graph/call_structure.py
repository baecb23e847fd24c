"""How a graph is called: the names of its arguments, and how its inputs and its output nest.

torch.fx keeps this in the graph's code generator, which is private; nobody else reads it there.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import fx
from torch.fx.graph import CodeGen, _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from ...errors import DynCompressError


class CallStructure(NamedTuple):
    """`inputs` is the structure of (positional arguments, keyword arguments); `output` None: returned as it stands."""

    arguments: list[str]
    inputs: pytree.TreeSpec
    output: pytree.TreeSpec | None


def is_plain(graph: fx.Graph) -> bool:
    """Whether the graph has no call structure: its arguments are its placeholders."""
    return type(graph._codegen) is CodeGen


def call_structure(graph: fx.Graph) -> CallStructure:
    """The call structure of a captured graph.

    Raises:
        DynCompressError: it has none.
    """
    if type(graph._codegen) is not _PyTreeCodeGen:
        raise DynCompressError("this graph was not captured: work on what dyncompress.capture returned")
    info = graph._codegen.pytree_info
    return CallStructure(list(info.orig_args), info.in_spec, info.out_spec)


def set_call_structure(graph: fx.Graph, structure: CallStructure) -> None:
    """Lets a graph be called like this."""
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(*structure)))


def called_like(graph: fx.Graph) -> fx.Graph:
    """An empty graph that is called as `graph` is."""
    made = fx.Graph()
    set_call_structure(made, call_structure(graph))
    return made


def plain_output(graph: fx.Graph) -> None:
    """Lets a graph return its output as it stands; its call keeps the user's own structure."""
    set_call_structure(graph, call_structure(graph)._replace(output=None))


def nested_inputs(graph: fx.Graph, flat: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of one call, from values in the order of the placeholders."""
    args, kwargs = pytree.tree_unflatten(flat, call_structure(graph).inputs)
    return args, kwargs


def nested_output(graph: fx.Graph) -> Any:
    """What a call returns, in the user's own structure, a node in the place of each value."""
    returned, structure = graph.output_node().args[0], call_structure(graph).output
    return returned if structure is None else pytree.tree_unflatten(pytree.tree_leaves(returned), structure)
