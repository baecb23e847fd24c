"""BranchyNet's LeNet on MNIST: how many leave at its branch, what that costs in accuracy, and what it saves.

    python benchmarks/lenet.py [--data mnist] [--net branchynet] [--seeds 3] [--quick]
                                                                                               writes lenet.json

The network is trained alone; its copies then get the branch, on a frozen trunk or together with it, as BranchyNet does.
Thresholds are those that may lose .1, .2 or .5 points, chosen on the calibration split; the rest is of the test split.
Milliseconds per call at 1, 16 and 256 samples, one thread, static and dynamic taking turns, in PyTorch and, exported,
in onnxruntime: the mean over the inputs of the least of 15 rounds, since whatever else runs can only add. "all leave"
is the same network under a policy that lets everyone leave at the branch: no threshold can be faster. What is trained
or measured is not trained or measured again.
"""

import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime
import torch
from common import QUICK, Benchmark, channels_last, complete, kept_in, run_in, trained
from data import splits
from exported import in_onnxruntime
from torch import Tensor, nn

import dyncompress as dc
from dyncompress.compress.evaluation.wall_clock import latency_inputs, measure_latency
from dyncompress.compress.thresholds.choose_policy import choose_policy
from dyncompress.model_zoo import Splits

BENCHMARK = Benchmark(
    __file__, __doc__, data=True, within="networks/mnist branchynet/0",
    published="99.20 -> 99.25 %, 5.4 times as fast on a CPU, 94.3 % leave (BranchyNet, Teerapittayanon et al., 2016)",
    ours="{static/accuracy:.2%} -> {joint/loss 0.002/accuracy:.2%}, {joint/pytorch/dynamic/speed_up/1:.1f} times as "
    "fast ({joint/onnxruntime/dynamic/speed_up/1:.1f} in onnxruntime), {joint/loss 0.002/left_at_branch:.1%} leave",
)  # fmt: skip
FIRST, EPOCHS, BATCH, LR = 1 if QUICK else 4, 1 if QUICK else 4, 128, 3e-3
LOSSES = (0.001, 0.005, 0.002)  # the last one's thresholds are timed
CALLS = {1: 4} if QUICK else {1: 200, 16: 32, 256: 4}
WAYS = ("joint", "frozen")  # with the trunk, or without
LEAVING, EVERYONE, ROUNDS = dc.Leaving(rule="entropy"), 1.0, 1 if QUICK else 15


class Branched(nn.Module):
    """`rest` of `first`, and where `branched`, `branch` of it too: (B, 1, 28, 28) float -> (B, 10) logits of each."""

    def __init__(self, first: nn.Module, rest: nn.Module, branch: nn.Module) -> None:
        super().__init__()
        self.branched, self.first, self.rest, self.branch = False, first, rest, branch

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.first(x)
        return (self.branch(x), self.rest(x)) if self.branched else self.rest(x)


def _conv(channels_in: int, channels_out: int, kernel: int, padding: int) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, kernel, padding=padding)
    return nn.Sequential(conv, nn.MaxPool2d(2, ceil_mode=True), nn.ReLU())


def branchynet() -> Branched:
    """The network of BranchyNet's experiment: three padded convolutions, a branch after the first, two linear."""
    last = [nn.Flatten(), nn.Linear(20 * 6 * 6, 84), nn.Linear(84, 10)]
    branch = nn.Sequential(_conv(5, 10, 3, 1), nn.Flatten(), nn.Linear(10 * 8 * 8, 10))
    return Branched(_conv(1, 5, 5, 3), nn.Sequential(_conv(5, 10, 5, 3), _conv(10, 20, 5, 3), *last), branch)


def wide() -> Branched:
    """LeNet as tutorials build it, 32 and 64 channels and 1,024 hidden neurons, with BranchyNet's kind of branch."""
    last = [nn.Flatten(), nn.Linear(64 * 7 * 7, 1024), nn.ReLU(), nn.Linear(1024, 10)]
    branch = nn.Sequential(_conv(32, 10, 3, 1), nn.Flatten(), nn.Linear(10 * 7 * 7, 10))
    return Branched(_conv(1, 32, 5, 2), nn.Sequential(_conv(32, 64, 5, 2), *last), branch)


NETS = {"branchynet": branchynet, "wide": wide}


def trained_first(name: str, seed: int, data: Splits, out: Path) -> Branched:
    """The static network of a seed."""
    torch.manual_seed(seed)
    net = channels_last(NETS[name]())
    return trained(net, data.train, dc.Training(epochs=FIRST, lr=LR, batch_size=BATCH), run_in(out, seed, "cpu"))


def converted(net: Branched, joint: bool, data: Splits, seed: int, path: Path) -> dc.DynamicModel:
    """The network with its branch trained, taken from `path` where an earlier run has left it."""
    make = partial(
        dc.convert, net, exits="own", data=data, recipe="weighted", freeze_trunk=not joint, leaving=LEAVING,
        training=dc.Training(epochs=EPOCHS, lr=LR, trunk_lr=1.0, batch_size=BATCH),
        run=dc.Run(seed=seed, device="cpu"),
    )  # fmt: skip
    return channels_last(kept_in(path, make))


def measure(static: nn.Module, make: Callable[[], dc.DynamicModel], data: Splits) -> dict[str, Any]:
    """A network with a branch beside the one it was made from."""
    dynamic = make()
    rows: dict[str, Any] = {"macs": {"static": dynamic.static_macs, "branch": dynamic.exit_macs[0]}}
    alone = [dynamic.with_policy(dc.ExitPolicy(LEAVING.rule, (at,))) for at in (EVERYONE, None)]
    for name, model in zip(("all leave", "none leaves"), alone, strict=True):
        rows[name] = {"accuracy": round(dc.evaluate(model, data.test).accuracy, 4)}
    for loss in LOSSES:
        choose_policy(dynamic, data.calibration, max_loss=loss, leaving=LEAVING)
        found = dc.evaluate(dynamic, data.test)
        share = found.exits[0].share
        assert found.mean_macs is not None and share is not None
        rows[f"loss {loss}"] = {
            "accuracy": round(found.accuracy, 4),
            "left_at_branch": round(share, 4),
            "macs_speed_up": round(dynamic.static_macs / found.mean_macs, 2),
        }
    pytorch: dict[str, Callable[..., Any]] = {"static": static, "dynamic": dynamic.predict}
    rows["pytorch"] = times(pytorch | {"all leave": alone[0].predict}, data)
    with TemporaryDirectory() as folder:
        exported = {"static": alone[1], "dynamic": dynamic, "all leave": alone[0]}
        rows["onnxruntime"] = times(in_onnxruntime(exported, folder, ["logits"]), data)
    return rows


def times(models: dict[str, Callable[..., Any]], data: Splits) -> dict[str, Any]:
    """Milliseconds per call by batch size, and how many times faster than the static network."""
    rows: dict[str, Any] = {name: {"ms": {}, "speed_up": {}} for name in models}
    for size, batches in latency_inputs(data.test, CALLS).items():
        ms = least_ms(models, size, batches, ROUNDS)
        for name, row in rows.items():
            row["ms"][str(size)] = round(ms[name], 4)
            row["speed_up"][str(size)] = round(ms["static"] / ms[name], 2)
    return rows


def least_ms(models: dict[str, Callable[..., Any]], size: int, batches: list[Any], rounds: int) -> dict[str, float]:
    """The mean over the batches of the least of some rounds, in which the models take turns."""
    ms = dict.fromkeys(models, 0.0)
    for batch in batches:
        taken = [measure_latency(models, {size: [batch]}, 1) for _ in range(rounds)]
        for name in models:
            ms[name] += min(row[name][size] for row in taken) / len(batches)
    return ms


def main() -> None:
    """Measures what the results lack."""
    parser = BENCHMARK.parser()
    parser.add_argument("--data", default="mnist", choices=("mnist", "fashion_mnist"))
    parser.add_argument("--net", default="branchynet", choices=list(NETS))
    parser.add_argument("--seeds", type=int, default=1 if QUICK else 3)
    asked = BENCHMARK.start(parser)
    data, key = splits(asked.data), f"{asked.data} {asked.net}"
    setting = {"first": FIRST, "epochs": EPOCHS, "batch": BATCH, "lr": LR, "rule": LEAVING.rule}
    nets = BENCHMARK.read(setting).get("networks", {})
    machine = {"machine": platform.machine(), "onnxruntime": onnxruntime.__version__}
    save = partial(BENCHMARK.write, {**machine, "setting": setting, "networks": nets})
    for seed in range(asked.seeds):
        rows = nets.setdefault(key, {}).setdefault(str(seed), {})
        if rows.keys() >= set(WAYS):
            continue
        folder = BENCHMARK.runs / f"{asked.data}-{asked.net}-{seed}"
        net = trained_first(asked.net, seed, data, folder)
        rows["static"] = {"accuracy": round(dc.evaluate(net, data.test).accuracy, 4)}
        static = dc.capture(net, data.test[0][0][None].repeat(2, 1, 1, 1)).eval()
        net.branched = True
        ways = {way: partial(converted, net, way == "joint", data, seed, folder / f"{way}.dyn") for way in WAYS}
        complete(rows, {way: partial(measure, static, make, data) for way, make in ways.items()}, save)


if __name__ == "__main__":
    main()
