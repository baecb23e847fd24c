"""The networks that tests share: small ones of every kind the passes know."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class ConvNet(nn.Module):
    """Images (B, 1, H, W) in 3 classes: convolutions, each with a batch norm, and a mean over the map."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((1, 8), (8, 16), (16, 16))
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in widths)
        )
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x).mean((2, 3)))


class OneConv(nn.Module):
    """Images (B, 1, H, W): one convolution, whose batch norm counts its batches in whole numbers."""

    def __init__(self, width: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.stem, self.norm, self.fc = nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.norm(self.stem(x))).mean((2, 3)))


class TwoConvs(nn.Module):
    """Images (B, 1, H, W) in 3 classes, by two convolutions and nothing else."""

    def __init__(self, width: int = 4, stride: int = 1) -> None:
        super().__init__()
        self.conv, self.mid, self.fc = nn.Conv2d(1, width, 3, stride), nn.Conv2d(width, width, 3), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.mid(torch.relu(self.conv(x)))).mean((2, 3)))


class SmallResNet(nn.Module):
    """Images (B, 1, 8, 8) in 3 classes: residual branches on one width."""

    def __init__(self, branches: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(12, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10), nn.ReLU(),
                nn.Conv2d(10, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12),
            )
            for _ in range(branches)
        )  # fmt: skip
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.mean((2, 3)))


class Mlp(nn.Module):
    """Vectors (B, 8) in 4 classes: layers of one width, each with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 24)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(24, 24), nn.BatchNorm1d(24), nn.ReLU()) for _ in range(3))
        self.fc = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.fc(x)


class Tagger(nn.Module):
    """Token ids (B, T) to logits (B, T, 3): an answer at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.fc = nn.Embedding(20, 16), nn.LSTM(16, 16, 2, batch_first=True), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.lstm(self.embed(ids))[0])


class Words(nn.Module):
    """Next tokens (B, T, 11): an embedding, an LSTM and a LayerNorm, whose count is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(11, 8), nn.LSTM(8, 12, batch_first=True)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.lstm(self.embed(x))[0]))


class TiedWords(nn.Module):
    """Token ids (B, T) to logits (B, 11) by one matrix, which is the embedding too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).mean(1))


class GatedLayer(nn.Module):
    """Attention and a gated MLP, each behind a norm and around a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(32), nn.RMSNorm(32)
        self.qkv, self.out = nn.Linear(32, 3 * 32, bias=False), nn.Linear(32, 32, bias=False)
        self.gate, self.up, self.down = (nn.Linear(*size, bias=False) for size in ((32, 72), (32, 72), (72, 32)))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class LanguageModel(nn.Module):
    """Token ids (B, T) to logits (B, T, 40). The scale is computed, and in no checkpoint."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 32), nn.Linear(32, 40, bias=False)
        self.layers, self.norm = nn.ModuleList(GatedLayer() for _ in range(2)), nn.LayerNorm(32)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 32), persistent=False)
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) * self.scale + self.steps
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def seeded(kind: Callable[[], nn.Module] = SmallResNet) -> nn.Module:
    """A network with weights that are the same at every call."""
    torch.manual_seed(0)
    return kind()


def small_resnet() -> nn.Module:
    return seeded()


def linear() -> nn.Module:
    """Of the same inputs and classes as `SmallResNet`, and nothing else."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
