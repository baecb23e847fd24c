"""Which head an exit gets, by name.

auto       images: a learned mix of maximum and mean on a small grid (Shallow-Deep Networks); tokens: norm and
           layer on the token the model reads, or on every position where it answers there; vectors: a linear layer
linear     the mean, then a linear layer
mlp        tokens and vectors: norm, a hidden layer, a linear layer
attention  images: SCAN's attention and bottleneck
copy       a copy of the model's own last layers, weights included
cascade    as auto, and every exit also reads, and averages with, what the earlier ones answered (ZTW)
"""

from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from ...errors import RequestError
from ..edit.cut_points import CutPoint
from ..modules.exit_heads import HEADS
from ..modules.multi_layer_heads import AttentionHead, LinearHead, MLPHead, PositionHead

COPY, CASCADE = "copy", "cascade"
HEAD_KINDS = ("auto", "linear", "mlp", "attention", COPY, CASCADE)


@dataclass(frozen=True)
class Place:
    """A cut point that can take an exit, and the spec of the head that "auto" puts there."""

    point: CutPoint
    spec: dict[str, Any]

    @property
    def position_macs(self) -> int:
        """What that head costs for one sample where it answers at every position; elsewhere heads cost little."""
        if self.spec["type"] != PositionHead.__name__:
            return 0
        return self.point.node.meta["val"].shape[1:].numel() * self.spec["args"]["classes"]


def make_head(kind: str, place: Place) -> nn.Module:
    """The head of this kind for a place; copies are no modules of their own, see `copy_tail`.

    Raises:
        RequestError: a head of this kind cannot read what is there.
    """
    reads, args = place.spec["type"], place.spec["args"]
    if reads == PositionHead.__name__:
        if kind != "auto":
            raise RequestError(f'head="{kind}" answers once per sample, the model at every position: use auto or copy')
        return PositionHead(**args)
    if kind in ("auto", CASCADE):
        return HEADS[reads](**args)
    width = _width(args)
    if kind == "linear":
        dim = args.get("channel_dim", len(place.point.node.meta["val"].shape) - 1)
        return LinearHead(width, args["classes"], dim)
    if kind == "mlp" and reads != "ImageHead":
        return MLPHead(width, args["classes"], args.get("token"))
    if kind == "attention" and reads == "ImageHead" and place.point.node.meta["val"].dim() == 4:
        return AttentionHead(width, args["classes"], args["channel_dim"])
    wanted = "an image (batch, channels, height, width)" if kind == "attention" else "tokens or vectors"
    shape = ("batch", *place.point.node.meta["val"].shape[1:])
    raise RequestError(
        f'head="{kind}" reads {wanted}; at {place.point.node.name} there is {shape}: choose another head'
    )


def _width(args: dict[str, Any]) -> int:
    return args["channels"] if "channels" in args else args["features"]


def last_place_like(place: Place, places: list[Place]) -> fx.Node:
    """What the model's own head reads, if that is of the shape, and comes from the operator, of what is at `place`.

    Raises:
        RequestError: it is not: maps of other shapes come after the last such place, or it is `place` itself.
    """
    node = place.point.node
    like = [p for p in places if _kind(p.point.node) == _kind(node)]
    source = like[-1].point
    shape = node.meta["val"].shape
    later = [p.point.node.meta["val"].shape for p in places if p.point.macs > source.macs]
    if source.node is node or any(len(s) >= len(shape) > 2 and s != shape for s in later):
        raise RequestError(
            f"head='copy': nothing like what {node.name} gives, {('batch', *shape[1:])}, is what the model's own last "
            "layers read; choose another head"
        )
    return source.node


def _kind(node: fx.Node) -> tuple[Any, ...]:
    """Shape and operator; of a module, where its path leads but for numbers: layers of one stack are of one kind."""
    target = "".join(c for c in str(node.target) if not c.isdigit()) if node.op == "call_module" else node.target
    return node.meta["val"].shape, target
