"""What group lasso costs beside a training step: processor seconds of one thread, or wall seconds of a GPU.

    python benchmarks/group_lasso.py [cpu|cuda]

Writes benchmarks/group_lasso.json. Each figure is the least of several rounds, training step and proximal step in turn.
"""

import json
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dyncompress as dc
from dyncompress.compress.sparsity.group_lasso import GroupLasso
from dyncompress.runtime.predict.timing import wait_for

KINDS = (("axes",), ("axes", "layers"), ("axes", "layers", "filters", "columns", "shapes"))
ROUNDS = 6
WORDS, WIDTH = 10_000, 650  # of the language model, the medium one of Zaremba et al. 2014


class Block(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip
        narrow = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        self.shortcut: nn.Module = nn.Identity() if stride == 1 else narrow

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet20() -> nn.Module:
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [Block(a, b) for a, b in pairwise(widths)]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.lstm = nn.LSTM(WIDTH, WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(self.embed(x))[0])


def seconds(work: Callable[[], object], device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    began = clock()
    work()
    wait_for(torch.device(device))
    return clock() - began


def measure(model: nn.Module, x: Tensor, y: Tensor, device: str) -> list[dict[str, object]]:
    gm = dc.capture(model, x[:2]).train().to(device)
    x, y, axes = x.to(device), y.to(device), dc.infer_axes(gm)
    optimizer = torch.optim.AdamW(gm.parameters())

    def train() -> None:
        optimizer.zero_grad()
        F.cross_entropy(gm(x).flatten(0, -2), y.flatten()).backward()
        optimizer.step()

    rows = []
    for kinds in KINDS:
        lasso = GroupLasso(axes, kinds)
        times = [(seconds(train, device), seconds(lambda: lasso.proximal_(1e-9), device)) for _ in range(ROUNDS)]  # noqa: B023
        step, extra = (min(column) for column in zip(*times, strict=True))
        rows.append({"kinds": kinds, "groups": len(lasso), "step_s": step, "lasso_s": extra, "share": extra / step})
        print(kinds, f"{len(lasso)} groups: {1000 * extra:.2f} ms of {1000 * step:.0f} ms, {100 * extra / step:.1f} %")
    return rows


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    images, classes = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    words = torch.randint(WORDS, (20, 36))
    found = {
        "resnet-20, batch 128": measure(resnet20(), images, classes, device),
        "lstm 2 x 650, 10000 words, batch 20 x 35": measure(LanguageModel(), words[:, :-1], words[:, 1:], device),
    }
    path = Path(__file__).with_suffix(".json")
    report = json.loads(path.read_text()) if path.exists() else {}
    report[device] = {"torch": torch.__version__, "adamw": found}
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
