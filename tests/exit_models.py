"""Small models of every kind an exit can go into, shared by the tests of cuts, exits, stages and the dynamic model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dyncompress.passes.capture.capture import capture
from dyncompress.passes.exits.insert_exits import InsertExits


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.b1, self.b2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.c2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.down = nn.Conv2d(inputs, outputs, 1, stride) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b2(self.c2(F.relu(self.b1(self.c1(x))))) + self.down(x))


class ResNet(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU())
        plan = [(width, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1), (2 * width, 4 * width, 2)]
        self.blocks = nn.Sequential(*(Residual(*shape) for shape in plan))
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.blocks(self.stem(x)).mean((2, 3))))


class Vgg(nn.Module):
    """In-place activations, and a map that is flattened into its classifier."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, o in [(3, 8), (8, 16), (16, 32)]:
            layers += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(32 * 4, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(3)
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x.mean((1, 2)))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.n1, self.n2, self.attention = nn.LayerNorm(dim), nn.LayerNorm(dim), Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.n1(x), mask)
        return x + self.mlp(self.n2(x))


class Vit(nn.Module):
    """A class token that is expanded to the batch."""

    def __init__(self, dim: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, dim)), nn.Parameter(torch.randn(1, 17, dim) * 0.1)
        self.layers = nn.ModuleList(Layer(dim, 4) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


class Text(nn.Module):
    """Attention under a mask that every layer reads, a table made for the length at hand, and a dict of outputs."""

    def __init__(self, dim: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(50, dim), nn.Linear(dim, 4)
        self.layers = nn.ModuleList(Layer(dim, 4) for _ in range(depth))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        place = torch.arange(input_ids.shape[1], device=input_ids.device)[None, :, None]
        x = self.embed(input_ids) + torch.sin(place / 3.0)
        mask = attention_mask[:, None, None, :].bool()
        for layer in self.layers:
            x = layer(x, mask)
        weight = attention_mask[:, :, None].to(x.dtype)
        return {"features": x, "logits": self.fc((x * weight).sum(1) / weight.sum(1))}


class Lstm(nn.Module):
    """Three recurrent layers; the states of the later ones start from tensors with the batch inside, made up front."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(100, 16), nn.Linear(48, 5)
        self.l1, self.l2 = nn.LSTM(16, 24, batch_first=True), nn.GRU(24, 24, batch_first=True)
        self.l3 = nn.LSTM(24, 24, batch_first=True, bidirectional=True)

    def forward(self, ids: Tensor) -> Tensor:
        start = torch.ones(2, ids.shape[0], 24, device=ids.device) * 0.3
        x, _ = self.l1(self.embed(ids))
        x, _ = self.l2(x)
        x, _ = self.l3(x, (start, -start))
        return self.fc(x[:, -1])


class TwoInputs(nn.Module):
    """A second input that only the end of the network reads."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.fc = nn.Linear(12, 3)

    def forward(self, x: Tensor, late: Tensor) -> Tensor:
        for layer in self.hidden:
            x = torch.relu(layer(x))
        return self.fc(x * late.unsqueeze(1))


def _text_batch(n: int) -> dict[str, Tensor]:
    lengths = torch.randint(1, 8, (n, 1))
    return {"input_ids": torch.randint(0, 50, (n, 7)), "attention_mask": (torch.arange(7) < lengths).long()}


@dataclass(frozen=True)
class Case:
    """A model, how to make a batch of n samples for it, and how many exits the tests put in."""

    kind: type[nn.Module]
    batch: Callable[[int], Any]
    exits: int


CASES = {
    "resnet": Case(ResNet, lambda n: torch.randn(n, 3, 16, 16), 3),
    "vgg": Case(Vgg, lambda n: torch.randn(n, 3, 16, 16), 2),
    "channels-last": Case(ChannelsLast, lambda n: torch.randn(n, 3, 16, 16), 2),
    "vit": Case(Vit, lambda n: torch.randn(n, 3, 16, 16), 3),
    "text": Case(Text, _text_batch, 2),
    "lstm": Case(Lstm, lambda n: torch.randint(0, 100, (n, 7)), 2),
    "two-inputs": Case(TwoInputs, lambda n: (torch.randn(n, 12), torch.randn(n)), 2),
}


@cache
def model(name: str) -> nn.Module:
    """The model of a case, in evaluation mode, its batch norms with statistics of their own; not to be changed."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = CASES[name].kind()
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return made.eval()


@cache
def graph(name: str) -> fx.GraphModule:
    """The captured model; not to be changed."""
    with torch.random.fork_rng():  # the same numbers follow, whether or not the graph was there already
        return capture(model(name), CASES[name].batch(2))


@cache
def graph_with_exits(name: str) -> fx.GraphModule:
    """The captured model with its exits; not to be changed."""
    captured = graph(name)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return InsertExits(CASES[name].exits)(captured).gm


def call(function: Callable[..., Any], batch: Any) -> Any:
    """Calls like the user does: a dict by name, a tuple by position."""
    if isinstance(batch, dict):
        return function(**batch)
    return function(*batch) if isinstance(batch, tuple) else function(batch)


def rows(batch: Any, index: Any) -> Any:
    """Some samples of a batch."""
    if isinstance(batch, dict):
        return {k: v[index] for k, v in batch.items()}
    return tuple(t[index] for t in batch) if isinstance(batch, tuple) else batch[index]


def logits_of(output: Any) -> Tensor:
    return output["logits"] if isinstance(output, dict) else output
