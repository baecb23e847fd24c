"""What exits learn from beside their logits, for training only: taps on a graph, and layers that are thrown away."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from ...errors import RequestError
from ...passes.dims.channels import channel_dim
from ...passes.dims.type_graph import type_graph
from ...passes.edit.outputs import all_logits
from ...passes.exits.read_exits import final_features, graph_exits
from ...passes.exits.stages import with_outputs
from ...passes.modules.multi_layer_heads import channel_means


class Tapped(nn.Module):
    """A graph with exits and layers `extra` that are not part of it.

    `features` gives the logits of every exit and (B, D) features of each, the model's own last layer's too: the mean
    over all dims but the batch and the channels of what it reads.

    Raises:
        RequestError: an exit follows, or the last layer reads, something without channels.
    """

    extra: nn.ModuleList

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__()
        types = type_graph(gm)
        followed = [*(exit.at for exit in graph_exits(gm)), final_features(gm)]
        self.dims = []
        for node in followed:
            shape = node.meta["val"].shape
            dim = 1 if len(shape) == 2 else channel_dim(types, node)
            if not dim:
                raise RequestError(f"hints need features with channels; {node.name} gives {('batch', *shape[1:])}")
            self.dims.append(dim)
        self.widths = [node.meta["val"].shape[dim] for node, dim in zip(followed, self.dims, strict=True)]
        self.classes = all_logits(gm)[-1].meta["val"].shape[-1]
        self.tapped = with_outputs(gm, followed)

    def features(self, *args: Any, **kwargs: Any) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """All logits, and the channel means (B, width) of what each exit follows."""
        logits, maps = self.tapped(*args, **kwargs)
        return logits, [channel_means(x, dim) for x, dim in zip(maps, self.dims, strict=True)]

    def _placed(self, layers: list[nn.Module]) -> nn.ModuleList:
        parameter = next(self.tapped.parameters())
        return nn.ModuleList(layers).to(parameter.device, parameter.dtype)


class Hinted(Tapped):
    """Inputs -> (logits of every exit, features of every exit, linearly brought to the width of the last one's)."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.extra = self._placed([nn.Linear(width, self.widths[-1]) for width in self.widths[:-1]])

    def forward(self, *args: Any, **kwargs: Any) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        logits, means = self.features(*args, **kwargs)
        return logits, [*(layer(x) for layer, x in zip(self.extra, means, strict=False)), means[-1]]


class Taught(Tapped):
    """Inputs -> (logits of every exit, logits of a teacher for every early exit).

    The teacher of exit k attends from the exit's features to those of every later exit, and classifies what it sees:

        t_k = classify_k(sum_{j>k} a_j U_j F_j),   a = softmax_j((Q_k F_k) . (U_j F_j) / sqrt(D))

    All features are detached: a teacher moves neither the model nor the exits, but through what it answers.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        width = self.widths[-1]
        up = [nn.Linear(w, width) for w in self.widths[1:]]
        query = [nn.Linear(w, width) for w in self.widths[:-1]]
        classify = [nn.Linear(width, self.classes) for _ in query]
        self.extra = self._placed([nn.ModuleList(up), nn.ModuleList(query), nn.ModuleList(classify)])

    def forward(self, *args: Any, **kwargs: Any) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        logits, means = self.features(*args, **kwargs)
        up, query, classify = self.extra
        seen = torch.stack([layer(x.detach()) for layer, x in zip(up, means[1:], strict=True)], 1)  # type: ignore[call-overload]
        teachers = []
        for k in range(len(means) - 1):
            q_BD, later_BJD = query[k](means[k].detach()), seen[:, k:]  # type: ignore[index]
            a_BJ = torch.softmax((later_BJD * q_BD.unsqueeze(1)).sum(-1) / q_BD.shape[1] ** 0.5, -1)
            teachers.append(classify[k]((a_BJ.unsqueeze(-1) * later_BJD).sum(1)))  # type: ignore[index]
        return logits, teachers
