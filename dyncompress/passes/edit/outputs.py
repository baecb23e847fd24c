"""What a graph puts out: which output holds the logits, all logits of a graph with exits or gates."""

from collections.abc import Sequence

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ...errors import RequestError
from ..graph.call_structure import nested_output, plain_output
from ..graph.meta import is_dynamic

OWN = "own"  # for `exits`: the classifiers of a model that has several


def all_logits(gm: fx.GraphModule) -> list[fx.Node]:
    """The outputs of a graph with exits or gates, early first, the final logits last.

    Raises:
        RequestError: it has neither.
    """
    if not is_dynamic(gm):
        raise RequestError("the graph has neither exits nor skip gates; run InsertExits on it first, or InsertGates")
    return list(gm.graph.output_node().args[0])  # type: ignore[arg-type]


def find_logits(gm: fx.GraphModule) -> fx.Node:
    """The output node that holds the (batch, classes) or (batch, time, classes) logits.

    It is the only tensor output; else what the model calls `logits`; else the only (batch, n) floating-point output.

    Raises:
        RequestError: there is none, or not just one.
    """
    flat = [n for n in pytree.tree_leaves(gm.graph.output_node().args[0]) if isinstance(n, fx.Node)]
    tensors = [n for n in dict.fromkeys(flat) if isinstance(n.meta.get("val"), Tensor)]
    vectors = [n for n in tensors if is_logits(n) and n.meta["val"].dim() == 2]
    named = _named_logits(gm)
    found = tensors if len(tensors) == 1 else [named] if named is not None else vectors
    if len(found) != 1 or not is_logits(found[0]):
        shapes = ", ".join(f"{n.name} {('batch', *n.meta['val'].shape[1:])}" for n in tensors) or "none"
        own = f'; exits="{OWN}" takes the classifiers of a model that has several' if len(vectors) > 1 else ""
        raise RequestError(
            f"exits need one (batch, classes) logits output with at least 2 classes, or (batch, time, classes); the "
            f"model's tensor outputs are: {shapes} - return the logits alone or under the key 'logits'{own}"
        )
    return found[0]


def is_logits(node: fx.Node) -> bool:
    """Whether it may hold logits: (batch, classes) or (batch, time, classes) of floats, two classes or more."""
    val = node.meta["val"]
    return val.dim() in (2, 3) and val.is_floating_point() and val.shape[-1] > 1


def _named_logits(gm: fx.GraphModule) -> fx.Node | None:
    """The output under the key or attribute `logits` of the user's own output structure."""
    output = nested_output(gm.graph)
    named = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    return named if isinstance(named, fx.Node) else None


def set_logits(gm: fx.GraphModule, logits: Sequence[fx.Node]) -> None:
    """Lets a graph return these logits, early first: the plain tuple of them, or the last where it is not dynamic."""
    gm.graph.output_node().args = (tuple(logits) if is_dynamic(gm) else logits[-1],)
    plain_output(gm.graph)
