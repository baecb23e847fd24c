"""Features of the exits beside their logits, for training only: taps on a graph and adapters that are thrown away."""

from typing import Any

from torch import Tensor, fx, nn

from ..errors import RequestError
from ..passes.exits import final_features
from ..passes.heads import channel_dim
from ..passes.insertion import graph_exits
from ..passes.stages import with_outputs
from ..passes.typing import type_graph


class Hinted(nn.Module):
    """A graph with exits, (B, ...) inputs -> (logits of every exit, features (B, D) of every exit).

    Features are the mean over all dims but the batch and the channels; those of an early exit go through a linear layer
    to the width of what the model's own last layer reads. The layers are not part of the graph.

    Raises:
        RequestError: an exit follows, or the last layer reads, something without channels.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__()
        types = type_graph(gm)
        followed = [*(exit.at for exit in graph_exits(gm)), final_features(gm)]
        self.dims = []
        for node in followed:
            dim = 1 if node.meta["val"].dim() == 2 else channel_dim(types, node)
            if not dim:
                raise RequestError(
                    f"hints need features with channels; {node.name} has {tuple(node.meta['val'].shape)}"
                )
            self.dims.append(dim)
        widths = [node.meta["val"].shape[dim] for node, dim in zip(followed, self.dims, strict=True)]
        self.tapped = with_outputs(gm, followed)
        parameter = next(gm.parameters())
        made = (nn.Linear(width, widths[-1]) for width in widths[:-1])
        self.adapters = nn.ModuleList(layer.to(parameter.device, parameter.dtype) for layer in made)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        logits, maps = self.tapped(*args, **kwargs)
        means = [_mean(x, dim) for x, dim in zip(maps, self.dims, strict=True)]
        return logits, [*(layer(x) for layer, x in zip(self.adapters, means, strict=False)), means[-1]]


def _mean(x: Tensor, channel_dim: int) -> Tensor:
    others = [d for d in range(1, x.dim()) if d != channel_dim]
    return x.mean(others) if others else x
