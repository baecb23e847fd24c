"""Accuracy side by side with Torch-Pruning: same trained network, same MACs, same fine-tuning, three seeds.

    pip install --no-deps torch-pruning==1.6.1
    python benchmarks/vs_torch_pruning_accuracy.py [--seeds 3] [--quick]
                                                             writes benchmarks/vs_torch_pruning_accuracy.json

A ResNet-20 with a stride-2 stem is trained on a part of Fashion-MNIST, cut to half its MACs by every importance of both
libraries, and fine-tuned: same batches, optimiser and schedule; batch norms are recalibrated on neither side.
Torch-Pruning ranks within layers and globally, at the smallest pruning ratio (in steps of 1/256) that meets the target.
MACs of both come from PyTorch's own FlopCounterMode. Importances that need data see the same 512 training samples
(Hessian: 128).
Accuracy is that of the 10,000 test images. Trained networks are kept in runs/, so that an interrupted run resumes.
"""

import copy
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from statistics import mean
from typing import Any, get_args

import numpy as np
import torch
from common import DATA, QUICK, Benchmark, complete, largest_within, macs_of, means
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from tqdm import tqdm

import dyncompress as dc
from dyncompress.compress.importance.gradients import FISHER_SAMPLES
from dyncompress.compress.options.choices import Importance, Scope
from dyncompress.compress.pruning.reports import PruneReport
from dyncompress.model_zoo.networks.resnet import ResNetCifar
from dyncompress.passes.graph.cost import count_parameters

BENCHMARK = Benchmark(
    __file__, __doc__, data=True, needs=("torch_pruning",), within="summary",
    ours="half the MACs of a ResNet-20: best of ours {best/ours:.1%}, of Torch-Pruning {best/torch_pruning:.1%}; whole "
    "{unpruned:.1%}",
)  # fmt: skip
MACS = 0.5


@dataclass(frozen=True)
class Setting:
    """What both libraries share."""

    train_images: int = 20_000
    epochs: int = 4
    learning_rate: float = 0.1
    tuning_images: int = 10_000
    tuning_epochs: int = 1
    tuning_rate: float = 0.02
    batch: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    scoring_images: int = 512
    test_images: int = 10_000


SETTING = (
    Setting(train_images=512, epochs=1, tuning_images=256, scoring_images=128, test_images=256) if QUICK else Setting()
)

Data = tuple[Tensor, Tensor]


def main() -> None:
    """Measures what the results lack, then prints the summary."""
    parser = BENCHMARK.parser()
    parser.add_argument("--seeds", type=int, default=1 if QUICK else 3)
    options = BENCHMARK.start(parser)
    train, test = load()
    rows: dict[str, Any] = BENCHMARK.read(asdict(SETTING)).get("seeds", {})
    for seed in range(options.seeds):
        row = rows.setdefault(str(seed), {})
        if row.keys() >= methods().keys():
            continue
        model = trained(seed, train)
        row |= {"unpruned": accuracy(model, test), "macs": macs_of(model, test[0][:1])}
        measures = {name: partial(measure, method, model, seed, train, test) for name, method in methods().items()}
        complete(row, measures, partial(save, rows))
    save(rows)
    print(json.dumps(summary(rows), indent=1))


def save(rows: dict[str, Any]) -> None:
    """Everything measured so far."""
    BENCHMARK.write({"setting": asdict(SETTING), "summary": summary(rows), "seeds": rows})


def load() -> tuple[Data, Data]:
    """(N, 1, 28, 28) float in about -1..1 and int64 labels, of the training part and the test set."""
    arrays = np.load(DATA / "fashion_mnist" / "fashion_mnist.npz")
    first, tested = SETTING.train_images, SETTING.test_images

    def data(x: Any, y: Any) -> Data:
        return (torch.from_numpy(x).float()[:, None] / 255 - 0.286) / 0.353, torch.from_numpy(y).long()

    test = data(arrays["x_test"][:tested], arrays["y_test"][:tested])
    return data(arrays["x_train"][:first], arrays["y_train"][:first]), test


def resnet20() -> nn.Module:
    """(B, 1, 28, 28) -> (B, 10), with a stem of stride 2."""
    net = ResNetCifar(channels=1)
    net.conv.stride = (2, 2)
    return net


# --- training ----------------------------------------------------------------------------------------------------


def trained(seed: int, train: Data) -> nn.Module:
    """The trained network of a seed, from its file where there is one."""
    torch.manual_seed(seed)
    model, file = resnet20(), BENCHMARK.runs / f"resnet20-{seed}.pt"
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    fit(model, train, SETTING.epochs, SETTING.learning_rate, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), file)
    return model.eval()


def fit(model: nn.Module, data: Data, epochs: int, rate: float, seed: int) -> None:
    """SGD with momentum, cosine schedule; the batches depend on the seed alone."""
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(
        model.parameters(), rate, SETTING.momentum, weight_decay=SETTING.weight_decay, nesterov=True
    )
    batches = [b for _ in range(epochs) for b in torch.randperm(len(x), generator=generator).split(SETTING.batch)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, len(batches))
    model.train()
    for batch in tqdm(batches, desc="training", leave=False):
        optimiser.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimiser.step()
        schedule.step()
    model.eval()


def accuracy(model: nn.Module, test: Data) -> float:
    """Share of the test images, 0..1."""
    return dc.evaluate(model, TensorDataset(*test), batch_size=500).accuracy


# --- pruning -----------------------------------------------------------------------------------------------------

Method = Callable[[nn.Module, Data], nn.Module]
SCOPES: tuple[Scope, ...] = ("global", "axis")


def methods() -> dict[str, Method]:
    """Every importance of both libraries, ranked globally and within axes, by name; random ones left out."""
    ours = {f"ours:{name}:{scope}": _ours(name, scope)
            for name in get_args(Importance) if name != "random" for scope in SCOPES}  # fmt: skip
    theirs = {f"torch_pruning:{name}:{scope}": _theirs(name, scope == "global")
              for name in THEIRS for scope in ("global", "local")}  # fmt: skip
    return ours | theirs


def _ours(importance: Importance, scope: Scope) -> Method:
    def prune(model: nn.Module, train: Data) -> nn.Module:
        seen, gm = TensorDataset(*(t[: SETTING.scoring_images] for t in train)), dc.capture(model, train[0][:1])
        small = dc.prune(gm, macs=MACS, importance=importance, cuts=dc.Cuts(scope=scope), data=seen)
        kept = PruneReport.of(small).kept
        return dc.shrink(gm, {name: list(axis.kept) for name, axis in kept.items()})  # its batch norms as they were

    return prune


# name in its importance module, arguments
THEIRS: dict[str, tuple[str, dict[str, int]]] = {
    "l1": ("GroupMagnitudeImportance", {"p": 1}),
    "l2": ("GroupMagnitudeImportance", {"p": 2}),
    "taylor": ("GroupTaylorImportance", {}),
    "hessian": ("GroupHessianImportance", {}),
    "bn-scale": ("BNScaleImportance", {}),
    "lamp": ("LAMPImportance", {}),
    "fpgm": ("FPGMImportance", {}),
}


def _theirs(importance: str, everywhere: bool) -> Method:
    def prune(model: nn.Module, train: Data) -> nn.Module:
        one = train[0][:1]
        return largest_within(
            MACS * macs_of(model, one), one, lambda ratio: _one_step(model, train, importance, everywhere, ratio)
        )

    return prune


def _one_step(model: nn.Module, train: Data, importance: str, everywhere: bool, ratio: float) -> nn.Module:
    import torch_pruning as tp

    small = copy.deepcopy(model)
    name, arguments = THEIRS[importance]
    scorer = getattr(tp.importance, name)(**arguments)
    _differentiate(small, importance, scorer, train)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tp.pruner.BasePruner(
            small,
            train[0][:1],
            importance=scorer,
            pruning_ratio=ratio,
            global_pruning=everywhere,
            ignored_layers=[small.get_submodule("classifier")],
        ).step()
    small.zero_grad()
    return small


def _differentiate(model: nn.Module, importance: str, scorer: Any, train: Data) -> None:
    """The gradients an importance asks for, as its docstring shows: of the summed loss, or of each sample's own."""
    x, y = (t[: SETTING.scoring_images] for t in train)
    if importance == "taylor":
        for inputs, labels in zip(x.split(64), y.split(64), strict=True):
            F.cross_entropy(model(inputs), labels).backward()
    elif importance == "hessian":
        for inputs, labels in zip(x[:FISHER_SAMPLES].split(1), y[:FISHER_SAMPLES].split(1), strict=True):
            model.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            scorer.accumulate_grad(model)


def measure(prune: Method, model: nn.Module, seed: int, train: Data, test: Data) -> dict[str, Any]:
    """Share of MACs and parameters left, accuracy before and after fine-tuning."""
    begin = time.perf_counter()
    small = prune(model, train)
    seconds = time.perf_counter() - begin
    before = accuracy(small, test)
    part = SETTING.tuning_images
    fit(small, (train[0][:part], train[1][:part]), SETTING.tuning_epochs, SETTING.tuning_rate, seed + 1000)
    return {
        "macs_left": round(macs_of(small, test[0][:1]) / macs_of(model, test[0][:1]), 4),
        "parameters_left": round(count_parameters(small) / count_parameters(model), 4),
        "before": before,
        "after": accuracy(small, test),
        "prune_s": round(seconds, 2),
    }


def summary(rows: dict[str, Any]) -> dict[str, Any]:
    """Means over the seeds that have every method, best first."""
    full = [row for row in rows.values() if all(name in row for name in methods())]
    if not full:
        return {}
    found = {name: means((row[name] for row in full), "before", "after", "macs_left") for name in methods()}
    ranked = dict(sorted(found.items(), key=lambda item: -item[1]["after"]))
    best = {side: max(v["after"] for n, v in found.items() if n.startswith(side)) for side in ("ours", "torch_pruning")}
    unpruned = round(mean(row["unpruned"] for row in full), 4)
    return {"seeds": len(full), "unpruned": unpruned, "best": best, "methods": ranked}


if __name__ == "__main__":
    main()
