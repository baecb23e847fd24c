"""Meta-learned exits: weights from which a few steps on a few samples lead far (MAML, Finn et al., ICML 2017).

Each exit is a task of its own. An episode divides few labelled samples into a support and a query set. From the
weights w of its head, an exit takes n steps on the support,

    v_0 = w,    v_{i+1} = v_i - a grad CE(v_i; support),

and w moves by grad CE(v_n; query), as if v_n - w were constant: the first-order form, without second derivatives. At
the end the heads take such steps on all the samples. The trunk is frozen, and so reads every sample once only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import Dataset

from ...errors import RequestError
from ...passes.exits.read_exits import exit_modules, graph_exits
from ...passes.exits.stages import split_stages, with_outputs
from ...runtime.predict.dynamic import DynamicModel
from ..evaluation.evaluate import ready
from ..options.training_options import Run, Training
from ..training.batches import LabelledData, call, in_order, size_of
from ..training.losses import UNLABELLED
from ..training.trainer import Epoch, fit
from .exit_losses import Weighted

STEPS, RATE = 5, 0.01  # n and a
PASS = 2048  # samples in the episodes of one epoch, however few there are


def train_meta(
    dynamic: DynamicModel,
    train: LabelledData,
    training: Training,
    run: Run,
) -> list[Epoch]:
    """Trains the heads in place: on episodes, then on all the samples.

    An epoch is PASS samples in episodes.

    Args:
        train: what the heads read of all its labelled samples is held in memory.
        training: the learning rate is that of the weights that the steps start from; a batch has its samples, unless
            one episode has more.

    Raises:
        RequestError: answers at every position, fewer than two classes, or as `fit`.
    """
    if dynamic.per_position:
        raise RequestError('recipe="meta" draws samples by class, but the model answers at every position')
    few = Read.by(dynamic, train, training.batch_size, run.device)
    episodes, heads = Episodes(few, training.batch_size), Heads(dynamic.trunk)
    loss = Weighted([1.0] * len(heads.heads))
    of_episodes = replace(training, batch_size=max(1, training.batch_size // episodes.samples), optimizer="sgd")
    history = fit(Adapted(heads), loss, episodes, of_episodes, run, parameters=heads.own())
    for head, x in zip(heads.heads, few.features, strict=True):
        weights = heads.weights(head)
        where = next(iter(weights.values())).device
        end = stepped(head, weights, x.to(where), few.labels.to(where))
        with torch.no_grad():
            for name, parameter in weights.items():
                parameter.copy_(end[name])
    return history


class Read(Dataset[tuple[tuple[Tensor, ...], int]]):
    """What the heads read of labelled samples: per exit (N, ...), and labels (N,) int64."""

    def __init__(self, features: Sequence[Tensor], labels: Tensor) -> None:
        self.features, self.labels = features, labels

    @classmethod
    @torch.no_grad()
    def by(
        cls, dynamic: DynamicModel, data: LabelledData, batch_size: int, device: torch.device | str | None
    ) -> "Read":
        """Of the labelled samples of a data set. Raises RequestError where there are none of two classes."""
        size_of(data, "training")
        gm = dynamic.trunk
        tapped = with_outputs(gm, [exit.at for exit in graph_exits(gm)])
        parts: list[tuple[Tensor, ...]] = []
        with ready(dynamic, device) as where:
            for inputs, labels in in_order(data, batch_size, where):
                known = labels != UNLABELLED
                parts.append((*(x[known].float().cpu() for x in call(tapped, inputs)[1]), labels[known].cpu()))
        *features, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        if len(labels.unique()) < 2:
            raise RequestError("episodes tell classes apart: give labelled samples of at least two")
        return cls(features, labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, ...], int]:
        return tuple(x[index] for x in self.features), int(self.labels[index])


class Episodes(Dataset[tuple[tuple[Tensor, ...], Tensor]]):
    """Random episodes of S samples: ((what each exit reads (S, ...), ..., labels (S,)), query labels (S/2,)).

    First the support, then the query set; each has as many samples of every class that takes part, half of those that
    the rarest class has. Where that has one only, the two sets share it.
    """

    def __init__(self, few: Read, most: int) -> None:
        self.few = few
        self.of_class = [torch.nonzero(few.labels == label).flatten() for label in few.labels.unique()]
        self.half = max(1, min(map(len, self.of_class)) // 2)
        self.ways = max(2, min(len(self.of_class), most // (2 * self.half)))

    @property
    def samples(self) -> int:
        """S."""
        return 2 * self.half * self.ways

    def __len__(self) -> int:
        return max(1, PASS // self.samples)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, ...], Tensor]:
        classes = torch.randperm(len(self.of_class))[: self.ways].tolist()
        drawn = [rows[torch.randperm(len(rows))] for rows in map(self.of_class.__getitem__, classes)]
        rows = torch.cat([d[: self.half] for d in drawn] + [d[-self.half :] for d in drawn])
        labels = self.few.labels[rows]
        return (*(x[rows] for x in self.few.features), labels), labels[len(labels) // 2 :]


class Heads(nn.Module):
    """The heads of a graph with exits: what each reads -> the logits of each."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__()
        self.heads = nn.ModuleList(stage.head for stage in split_stages(gm) if stage.head is not None)
        paths = exit_modules(gm)
        self._own = {id(p) for n, p in gm.named_parameters() if n in paths or any(n.startswith(f"{q}.") for q in paths)}

    def own(self) -> list[nn.Parameter]:
        """The heads' parameters, without those of a trunk that they reach."""
        return [p for p in self.parameters() if id(p) in self._own]

    def weights(self, head: nn.Module) -> dict[str, nn.Parameter]:
        """Those of one head, by their names in it."""
        return {n: p for n, p in head.named_parameters() if id(p) in self._own}

    def forward(self, *read: Tensor) -> list[Tensor]:
        return [head(x) for head, x in zip(self.heads, read, strict=True)]


class Adapted(nn.Module):
    """Episodes -> per exit the logits of their query sets, (B, S/2, classes), after n steps on their support sets."""

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, *read_and_labels: Tensor) -> list[Tensor]:
        *read, labels = read_and_labels
        return [
            torch.stack([self._queried(head, *episode) for episode in zip(x, labels, strict=True)])
            for head, x in zip(self.heads.heads, read, strict=True)
        ]

    def _queried(self, head: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        half, start = len(y) // 2, self.heads.weights(head)
        end = stepped(head, start, x[:half], y[:half])
        moved = {n: p + (end[n] - p).detach() for n, p in start.items()}  # of value v_n, with the gradient of w
        return functional_call(head, moved, (x[half:],))


def stepped(head: nn.Module, weights: Mapping[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """v_n, from w and what the head reads of the support; w stays as it is."""
    now = {n: p.detach() for n, p in weights.items()}
    for _ in range(STEPS):
        leaves = [p.requires_grad_() for p in now.values()]
        loss = F.cross_entropy(functional_call(head, now, (x,)), y)
        slopes = torch.autograd.grad(loss, leaves, allow_unused=True)  # None: another head's
        now = {n: p.detach() - (0 if g is None else RATE * g) for (n, p), g in zip(now.items(), slopes, strict=True)}
    return now
