"""What group lasso costs beside a training step: processor seconds of one thread, or wall seconds of a GPU.

    python benchmarks/group_lasso.py [cpu|cuda] [--quick]      writes benchmarks/group_lasso.json

Each figure is the least of several rounds, training step and proximal step in turn.
"""

import time
from collections.abc import Callable

import torch
from common import QUICK, Benchmark
from torch import Tensor, nn
from torch.nn import functional as F

import dyncompress as dc
from dyncompress.compress.sparsity.group_lasso import GroupLasso
from dyncompress.model_zoo import build
from dyncompress.runtime.predict.timing import wait_for

BENCHMARK = Benchmark(
    __file__, __doc__, within="cpu/adamw",
    ours="{resnet-20, batch 128/0/share:.1%} of a step for the axes of a ResNet-20, "
    "{lstm 2 x 650, 10000 words, batch 20 x 35/0/share:.1%} for those of a language model",
)  # fmt: skip
KINDS = (("axes",), ("axes", "layers"), ("axes", "layers", "filters", "columns", "shapes"))
ROUNDS = 1 if QUICK else 6
WORDS, WIDTH = (100, 16) if QUICK else (10_000, 650)  # of the language model, the medium one of Zaremba et al. 2014


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
    """Adds the device's figures to the results."""
    parser = BENCHMARK.parser()
    parser.add_argument("device", nargs="?", default="cpu", choices=("cpu", "cuda"))
    device = BENCHMARK.start(parser).device
    torch.manual_seed(0)
    images, classes = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    words = torch.randint(WORDS, (20, 36))
    found = {
        "resnet-20, batch 128": measure(build("resnet20-cifar"), images, classes, device),
        "lstm 2 x 650, 10000 words, batch 20 x 35": measure(
            build("lstm-lm", vocabulary=WORDS, width=WIDTH, hidden=WIDTH), words[:, :-1], words[:, 1:], device
        ),
    }
    BENCHMARK.write({**BENCHMARK.read(), device: {"torch": torch.__version__, "adamw": found}})


if __name__ == "__main__":
    main()
