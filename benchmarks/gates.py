"""Skip gates on a residual network: the three kinds, random skipping, and a shallower network, at the same MACs.

    python benchmarks/gates.py [--data fashion_mnist] [--depth 20] [--macs 0.65] [--seed 0] [--rows gumbel ...]
                               [--quick]                                      writes benchmarks/gates.json

A network is trained (`resnet_sparsity.py`), and then, for as many epochs each on the same share of the training images:

    static      trained on
    gumbel, skipnet, blockdrop
                gated by `dc.gate`, taught by the first network
    gumbel, one policy
                gumbel with one network that decides all branches, as blockdrop has, in place of a gate per branch
    no pretrain skipnet's policy gradients for all of the epochs, without the supervised half
    untrained, untrained no pretrain
                the same two from a network with random weights, as published, without a teacher
    random      trained like gumbel, with the same teacher, but every branch is skipped at random as often as any other,
                in the test too (mean of three draws)
    random, learned rates
                the same, but each branch as often as the gumbel gates skip it: what remains of a gate without its input
    shallower   sparsified to the same MACs by group lasso over residual branches, then trained on; same teacher

Accuracy on the test images in float32, MACs as counted while predicting them. Milliseconds per call on test images,
static and gated taking turns; `realised` is the speed-up over the reduction of MACs, `all_open` the time with every
gate open over the static network's. What is measured is not measured again.
"""

import argparse
import copy
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from common import AMP, QUICK, RESIDUAL, Benchmark, complete, residual, run_in, trained
from data import splits, take
from torch import Tensor, fx, nn

import dyncompress as dc
from dyncompress.compress.evaluation.wall_clock import latency_inputs, measure_latency
from dyncompress.compress.gates.gate_losses import GateLoss
from dyncompress.compress.gates.gate_report import GateReport
from dyncompress.compress.gates.gate_training import GatePhase, train_gates
from dyncompress.compress.options.choices import GateKind, GateNetwork
from dyncompress.compress.training.batches import in_order, size_of
from dyncompress.passes.gates.read_gates import deciding
from dyncompress.passes.graph.cost import count_macs

BENCHMARK = Benchmark(
    __file__, __doc__, data=True, within="networks/fashion_mnist resnet20 seed 0",
    published="CIFAR-10: ResNet-38 92.75 % at 29.7 % fewer MACs, ResNet-110 93.30 % at 50.5 % fewer (SkipNet, "
    "Wang et al., ECCV 2018); ResNet-110 93.2 -> 93.6 % with 16.9 of 54 blocks (BlockDrop, Wu et al., CVPR 2018)",
    ours="Fashion-MNIST ResNet-20 at .65 of its MACs: {static/accuracy:.1%} whole, {gumbel/accuracy:.1%} gumbel, "
    "{skipnet/accuracy:.1%} skipnet, {blockdrop/accuracy:.1%} blockdrop, {shallower/accuracy:.1%} shallower, "
    "{random/accuracy:.1%} at random",
)  # fmt: skip
EPOCHS = 2 if QUICK else 10
SHARE, MORE_LR, DISTILL = 0.5, 0.02, 0.5
GATED = replace(RESIDUAL, epochs=EPOCHS, lr=5e-3, trunk_lr=0.2, optimizer="adamw")
ONE_BRANCH = 0.02  # a network without whole branches may have this much more: three of nine gone are .655
CALLS = {1: 4} if QUICK else {1: 200, 64: 12}
DRAWS = 3


class How(NamedTuple):
    """What `dc.gate` is asked for."""

    kind: GateKind
    pretrain: bool = True
    random_weights: bool = False
    gate: GateNetwork | None = None


NAMES = {
    "gumbel": How("gumbel"), "skipnet": How("skipnet"), "blockdrop": How("blockdrop"),
    "no pretrain": How("skipnet", pretrain=False), "untrained": How("skipnet", random_weights=True),
    "untrained no pretrain": How("skipnet", pretrain=False, random_weights=True),
    "gumbel, one policy": How("gumbel", gate="policy"),
}  # fmt: skip


class Random(nn.Module):
    """Branches that run as often as `rates` say, whatever the sample."""

    def __init__(self, rates: list[float]) -> None:
        super().__init__()
        self.rates = rates

    def forward(self, logit: Tensor, k: int) -> Tensor:
        return torch.bernoulli(torch.full_like(logit, self.rates[k]))


class Networks:
    """One seed's networks: each is trained once, and taken from its folder later."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.folder = BENCHMARK.runs / f"{asked.data}-{asked.depth}-{asked.seed}"
        self.whole, self.macs, self.depth, self.seed = splits(asked.data), asked.macs, asked.depth, asked.seed
        self.train = take(self.whole.train, round(SHARE * size_of(self.whole.train, "training")))

    def kept(self, name: str) -> dc.Run:
        return run_in(self.folder / name, self.seed)

    def first(self, random_weights: bool = False) -> fx.GraphModule:
        net = residual(self.depth, self.whole, self.seed).eval()
        if not random_weights:
            trained(net, self.whole.train, RESIDUAL, self.kept("first"))
        return dc.capture(net, self.whole.train[0][0][None])

    def static(self) -> fx.GraphModule:
        return trained(self.first(), self.train, replace(RESIDUAL, epochs=EPOCHS, lr=MORE_LR), self.kept("static"))

    def gated(self, how: How) -> dc.DynamicModel:
        start, end = "untrained-" if how.random_weights else "", f"-{how.gate}" if how.gate else ""
        return dc.gate(
            self.first(how.random_weights), data=replace(self.whole, train=self.train), kind=how.kind, macs=self.macs,
            pretrain=how.pretrain, gate=how.gate, distill=0.0 if how.random_weights else DISTILL, training=GATED,
            run=self.kept(f"{start}{how.kind if how.pretrain else 'no-pretrain'}{end}"),
        )  # fmt: skip

    def every(self) -> dc.DynamicModel:
        """The network with a gate for every branch, untrained."""
        return dc.DynamicModel(dc.InsertGates()(self.first()).gm)

    def rates(self, learned: bool) -> list[float]:
        """How often each branch runs: as learned by gumbel, or all alike at the budget."""
        every = self.every()
        if learned:
            return open_rates(self.gated(NAMES["gumbel"]), every.gates)
        skippable, whole = sum(every.branch_macs), count_macs(self.first())
        return [1 - (every.static_macs - self.macs * whole) / skippable] * len(every.branch_macs)

    def random(self, name: str) -> fx.GraphModule:
        first = self.first()
        gm = dc.InsertGates()(first).gm
        phase = GatePhase(Random(self.rates(name != "random")), GateLoss(DISTILL))
        train_gates(gm, phase, first, self.train, GATED, self.kept(name))
        return deciding(gm, phase.decide).eval()

    def shallower(self) -> fx.GraphModule:
        return dc.sparsify(
            self.first(), self.train, macs=self.macs + ONE_BRANCH, kinds=("layers",), finetune=EPOCHS - EPOCHS // 2,
            distill=DISTILL, lasso=dc.Lasso(shrink_every=1), run=self.kept("shallower"),
            training=replace(RESIDUAL, epochs=EPOCHS // 2, lr=MORE_LR),
        )  # fmt: skip

    # --- rows ----------------------------------------------------------------------------------------------------

    def row(self, name: str) -> dict[str, Any]:
        """One network's accuracy, MACs and times."""
        whole = count_macs(self.first())
        if name.startswith("random"):
            return self.random_row(self.random(name), name, whole)
        model = self.model(name)
        found = dc.evaluate(model, self.whole.test)
        assert found.mean_macs is not None
        row: dict[str, Any] = {"accuracy": round(found.accuracy, 4), "macs": round(found.mean_macs / whole, 4)}
        if name in NAMES:
            report = GateReport.of(model)
            row |= {"open": [round(rate, 3) for rate in open_rates(model, self.every().gates)]}
            row |= {"settled": {"always": len(report.settled.always), "never": len(report.settled.never)}}
            row |= {"loss_by_epoch": [round(epoch.loss, 4) for epoch in report.history]}
            row |= {"by_hardness": [round(sum(rates) / len(rates), 3) for rates in report.by_hardness]}
        if name in NAMES or name == "shallower":
            row |= self.times(model, row["macs"])
        return row

    def model(self, name: str) -> Any:
        return self.gated(NAMES[name]) if name in NAMES else self.shallower() if name == "shallower" else self.static()

    def times(self, model: Any, macs: float) -> dict[str, Any]:
        """Per call, and the speed-up over what the MACs promise."""
        static = self.first().eval()
        gated = isinstance(model, dc.DynamicModel)
        runs = {"static": static, "this": model.predict if gated else model.eval()}
        runs |= {"open": opened(model).predict} if gated else {}
        ms = measure_latency(runs, latency_inputs(self.whole.test, CALLS))
        speed_up = {size: ms["static"][size] / ms["this"][size] for size in CALLS}
        all_open = {str(size): round(ms["open"][size] / ms["static"][size], 3) for size in CALLS} if gated else None
        return {
            "all_open": all_open,
            "ms": {str(size): [round(ms[side][size], 3) for side in ("static", "this")] for size in CALLS},
            "speed_up": {str(size): round(speed_up[size], 3) for size in CALLS},
            "realised": {str(size): round(speed_up[size] * macs, 3) for size in CALLS},
        }

    @torch.no_grad()
    def random_row(self, run: nn.Module, name: str, whole: int) -> dict[str, Any]:
        right = count = 0
        torch.manual_seed(self.seed)
        for _ in range(DRAWS):
            for x, labels in in_order(self.whole.test, 256, torch.device("cpu")):
                right += int((run(x)[0][-1].argmax(-1) == labels).sum())
                count += len(labels)
        every, rates = self.every(), self.rates(name != "random")
        spent = every.static_macs - sum((1 - rate) * macs for rate, macs in zip(rates, every.branch_macs, strict=True))
        return {"accuracy": round(right / count, 4), "macs": round(spent / whole, 4)}


def open_rates(gated: dc.DynamicModel, branches: list[str]) -> list[float]:
    """How often each branch runs on the calibration split, those included that have lost their gate."""
    report = GateReport.of(gated)
    found = dict(zip(report.branches, report.open, strict=True))
    found |= dict.fromkeys(report.settled.always, 1.0) | dict.fromkeys(report.settled.never, 0.0)
    return [found[branch] for branch in branches]


@torch.no_grad()
def opened(gated: dc.DynamicModel) -> dc.DynamicModel:
    """A copy whose gates open for everybody."""
    model = copy.deepcopy(gated)
    for name, parameter in model.trunk.named_parameters():
        if name.startswith("gates") and name.endswith("out.bias"):
            parameter.fill_(100.0)
    return model


ROWS = (
    "static", "gumbel", "random", "random, learned rates", "skipnet", "untrained", "untrained no pretrain", "shallower",
    "gumbel, one policy", "blockdrop", "no pretrain",
)  # fmt: skip


def main() -> None:
    """Trains, measures, writes after every network."""
    parser = BENCHMARK.parser()
    parser.add_argument("--data", default="fashion_mnist", choices=("fashion_mnist", "cifar10"))
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--macs", type=float, default=0.65)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", nargs="+", default=("static", "gumbel", "random") if QUICK else ROWS, choices=ROWS)
    asked = BENCHMARK.start(parser)
    setting = {
        "epochs": [RESIDUAL.epochs, EPOCHS], "share_of_images": SHARE, "lr": [RESIDUAL.lr, GATED.lr, MORE_LR],
        "trunk_lr": GATED.trunk_lr, "batch": GATED.batch_size, "precision": AMP, "macs": asked.macs,
    }  # fmt: skip
    found = BENCHMARK.read(setting).get("networks", {})
    rows = found.setdefault(f"{asked.data} resnet{asked.depth} seed {asked.seed}", {})
    networks = Networks(asked)
    save = partial(BENCHMARK.write, {"setting": setting, "networks": found}, f"--macs {asked.macs}")
    complete(rows, {name: partial(networks.row, name) for name in asked.rows}, save)


if __name__ == "__main__":
    main()
