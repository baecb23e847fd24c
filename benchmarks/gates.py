"""Skip gates on a residual network: the three kinds, random skipping, and a shallower network, at the same MACs.

    python benchmarks/gates.py [--data fashion_mnist] [--depth 20] [--macs 0.65] [--seed 0] [--rows gumbel ...]
                                                                              writes benchmarks/gates.json

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
from pathlib import Path
from typing import Any, Literal

import torch
from common import AMP, BATCH, FIRST, LR, SGD, check_setting, header, read, start, write
from data import splits
from torch import Tensor, fx, nn
from torch.utils.data import Subset

import dyncompress as dc
from dyncompress.compress.evaluation.wall_clock import latency_inputs, measure_latency
from dyncompress.compress.gates.gate_losses import GateLoss
from dyncompress.compress.gates.gate_training import Phase, train_gates
from dyncompress.compress.training.losses import cross_entropy
from dyncompress.compress.training.trainer import fit
from dyncompress.model_zoo import build
from dyncompress.passes.gates.read_gates import deciding
from dyncompress.passes.graph.cost import count_macs

RESULTS = Path(__file__).with_suffix(".json")
EPOCHS, SHARE, GATE_LR, TRUNK_LR, MORE_LR = 10, 0.5, 5e-3, 0.2, 0.02
DISTILL = 0.5
ONE_BRANCH = 0.02  # a network without whole branches may have this much more: three of nine gone are .655
CALLS = {1: 200, 64: 12}
DRAWS = 3


class Random(nn.Module):
    """Branches that run as often as `rates` say, whatever the sample."""

    def __init__(self, rates: list[float]) -> None:
        super().__init__()
        self.rates = rates

    def forward(self, logit: Tensor, k: int) -> Tensor:
        return torch.bernoulli(torch.full_like(logit, self.rates[k]))


class Bench:
    """One seed's networks: each is trained once, and taken from its folder later."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.folder = asked.out / f"{asked.data}-{asked.depth}-{asked.seed}"
        self.whole, self.macs, self.depth, self.seed = splits(asked.data), asked.macs, asked.depth, asked.seed
        self.train = Subset(self.whole.train, range(round(SHARE * len(self.whole.train))))
        self.options: dict[str, Any] = {"batch_size": BATCH, "seed": asked.seed, "mixed_precision": AMP}

    def fitted(self, model: nn.Module, name: str, data: Any, epochs: int, lr: float, loss: Any = cross_entropy) -> None:
        run = self.folder / name
        fit(model, loss, data, epochs=epochs, lr=lr, optimizer=SGD, run_dir=run, resume=run.exists(), **self.options)

    def first(self, trained: bool = True) -> fx.GraphModule:
        torch.manual_seed(self.seed)
        image = self.whole.train[0][0][None]
        net = build(f"resnet{self.depth}-cifar", channels=image.shape[1])
        if trained:
            self.fitted(net, "first", self.whole.train, FIRST, LR)
        return dc.capture(net.eval(), image)

    def static(self) -> fx.GraphModule:
        gm = self.first()
        self.fitted(gm, "static", self.train, EPOCHS, MORE_LR)
        return gm.eval()

    def gated(
        self, kind: str, pretrain: bool = True, trained: bool = True, gate: Literal["policy"] | None = None
    ) -> dc.DynamicModel:
        name = ("" if trained else "untrained-") + (kind if pretrain else "no-pretrain") + (f"-{gate}" if gate else "")
        run = self.folder / name

        class Data:
            train, calibration = self.train, self.whole.calibration

        return dc.gate(
            self.first(trained), data=Data(), kind=kind, macs=self.macs, pretrain=pretrain, gate=gate, epochs=EPOCHS,
            lr=GATE_LR, trunk_lr=TRUNK_LR, distill=DISTILL if trained else 0.0, run_dir=run, resume=run.exists(),
            **self.options,
        )  # fmt: skip

    def every(self) -> dc.DynamicModel:
        """The network with a gate for every branch, untrained."""
        return dc.DynamicModel(dc.InsertGates()(self.first()).gm)

    def rates(self, learned: bool) -> list[float]:
        """How often each branch runs: as learned by gumbel, or all alike at the budget."""
        every = self.every()
        if learned:
            return open_rates(self.gated("gumbel"), every.gates)
        skippable, whole = sum(every.branch_macs), count_macs(self.first())
        return [1 - (every.static_macs - self.macs * whole) / skippable] * len(every.branch_macs)

    def random(self, name: str) -> fx.GraphModule:
        first, run = self.first(), self.folder / name
        gm = dc.InsertGates()(first).gm
        phase = Phase(Random(self.rates(name != "random")), GateLoss(DISTILL))
        options = {**self.options, "epochs": EPOCHS, "lr": GATE_LR, "optimizer": torch.optim.AdamW}
        options |= {"run_dir": run, "resume": run.exists()}
        train_gates(gm, phase, first, self.train, TRUNK_LR, options)
        return deciding(gm, phase.decide).eval()

    def shallower(self) -> fx.GraphModule:
        run = self.folder / "shallower"
        return dc.sparsify(
            self.first(), self.train, macs=self.macs + ONE_BRANCH, kinds=("layers",), epochs=EPOCHS // 2,
            finetune=EPOCHS - EPOCHS // 2, shrink_every=1, lr=MORE_LR, optimizer=SGD, distill=DISTILL, run_dir=run,
            resume=run.exists(), **self.options,
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
        row = {"accuracy": round(found.accuracy, 4), "macs": round(found.mean_macs / whole, 4)}
        if name in NAMES:
            report = model.trunk.meta["info"]["gate"]
            row |= {"open": [round(rate, 3) for rate in open_rates(model, self.every().gates)]}
            row |= {"settled": {how: len(branches) for how, branches in report["settled"].items()}}
            row |= {"loss_by_epoch": [round(epoch["loss"], 4) for epoch in report["history"]]}
            row |= {"by_hardness": [round(sum(rates) / len(rates), 3) for rates in report["by_hardness"]]}
        return row

    def model(self, name: str) -> Any:
        return self.gated(*NAMES[name]) if name in NAMES else self.shallower() if name == "shallower" else self.static()

    def times(self, name: str, macs: float) -> dict[str, Any]:
        """Per call, and the speed-up over what the MACs promise."""
        static, model = self.first().eval(), self.model(name)
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
            for begin in range(0, len(self.whole.test), 256):
                batch = [self.whole.test[i] for i in range(begin, min(begin + 256, len(self.whole.test)))]
                logits = run(torch.stack([x for x, _ in batch]))[0][-1]
                right += int((logits.argmax(-1) == torch.tensor([y for _, y in batch])).sum())
                count += len(batch)
        every, rates = self.every(), self.rates(name != "random")
        spent = every.static_macs - sum((1 - rate) * macs for rate, macs in zip(rates, every.branch_macs, strict=True))
        return {"accuracy": round(right / count, 4), "macs": round(spent / whole, 4)}


def open_rates(gated: dc.DynamicModel, branches: list[str]) -> list[float]:
    """How often each branch runs on the calibration split, those included that have lost their gate."""
    report = gated.trunk.meta["info"]["gate"]
    found = dict(zip(report["branches"], report["open"], strict=True))
    found |= dict.fromkeys(report["settled"]["always"], 1.0) | dict.fromkeys(report["settled"]["never"], 0.0)
    return [found[branch] for branch in branches]


@torch.no_grad()
def opened(gated: dc.DynamicModel) -> dc.DynamicModel:
    """A copy whose gates open for everybody."""
    model = copy.deepcopy(gated)
    for name, parameter in model.trunk.named_parameters():
        if name.startswith("gates") and name.endswith("out.bias"):
            parameter.fill_(100.0)
    return model


NAMES = {
    "gumbel": ("gumbel",), "skipnet": ("skipnet",), "blockdrop": ("blockdrop",), "no pretrain": ("skipnet", False),
    "untrained": ("skipnet", True, False), "untrained no pretrain": ("skipnet", False, False),
    "gumbel, one policy": ("gumbel", True, True, "policy"),
}  # fmt: skip
ROWS = (
    "static", "gumbel", "random", "random, learned rates", "skipnet", "untrained", "untrained no pretrain", "shallower",
    "gumbel, one policy", "blockdrop", "no pretrain",
)  # fmt: skip


def main() -> None:
    """Trains, measures, writes after every network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion_mnist", choices=("fashion_mnist", "cifar10"))
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--macs", type=float, default=0.65)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/gates"))
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS)
    asked = start(parser)
    setting = {
        "epochs": [FIRST, EPOCHS], "share_of_images": SHARE, "lr": [LR, GATE_LR, MORE_LR], "trunk_lr": TRUNK_LR,
        "batch": BATCH, "precision": AMP, "macs": asked.macs,
    }  # fmt: skip
    result = read(RESULTS) or {**header(f"gates.py --macs {asked.macs}"), "setting": setting, "networks": {}}
    check_setting(result, setting, RESULTS)
    rows = result["networks"].setdefault(f"{asked.data} resnet{asked.depth} seed {asked.seed}", {})
    bench = Bench(asked)
    for name in asked.rows:
        if name not in rows:
            rows[name] = bench.row(name)
            write(RESULTS, result)
        if "ms" not in rows[name] and (name in NAMES or name == "shallower"):
            rows[name] |= bench.times(name, rows[name]["macs"])
            write(RESULTS, result)
        print(name, rows[name], flush=True)


if __name__ == "__main__":
    main()
