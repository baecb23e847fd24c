"""Early exits beside earlyon's: one trained network, the same data, epochs and batches for the heads, a frozen trunk.

    pip install --no-deps earlyon==0.3.0 fvcore iopath yacs termcolor tabulate portalocker
    python benchmarks/vs_earlyon.py [--data fashion_mnist] [--quick]         writes vs_earlyon.json

earlyon is used as its documents say: `custom_ee` at the ends of the stages, the second stage of its training, a
temperature per head, its two calibrations; of two learning rates, its own and ours, the one that is better on the
calibration split. Ours has exits at the same places, or where `convert` puts three. Both choose thresholds on the same
calibration split, for a loss of accuracy there or for a budget; accuracy and multiply-adds, heads included and counted
by PyTorch, are of the test split, a sample at a time. `at_their_macs` is ours within what earlyon spent for the goal.
Milliseconds per call under the thresholds for a point of loss, one thread, all taking turns, as in lenet.py; of more
samples than one, earlyon lets all leave together or none. What is trained is not trained again.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import QUICK, Benchmark, kept_in
from data import splits, take
from exits import trained_first
from lenet import least_ms
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import dyncompress as dc
from dyncompress.compress.evaluation.wall_clock import latency_inputs
from dyncompress.compress.thresholds.candidates import collect_cached
from dyncompress.model_zoo import Splits

BENCHMARK = Benchmark(
    __file__, __doc__, data=True, needs=("earlyon",),
    ours="at half the MACs {points/ours/macs 0.5/accuracy:.1%}, earlyon {points/earlyon/macs 0.5/accuracy:.1%}; for a "
    "point of loss {time/times_faster_than_earlyon/ours/1:.2f} times as fast as it at one sample, "
    "{time/times_faster_than_earlyon/ours/256:.2f} at 256",
)  # fmt: skip
NET, LAYERS = "resnet20-cifar", ("stage1", "stage2")
TRAIN, CALIBRATION, EPOCHS, BATCH = 12_800, 4_000, 1 if QUICK else 4, 128
GOALS = ("macs 0.5", "macs 0.7", "macs 0.9", "loss 0.0025", "loss 0.005", "loss 0.01", "loss 0.02")
TIMED = "loss 0.01"
THEIR_LR, LR = 1e-3, 1e-2
CALLS, ROUNDS = ({1: 4, 16: 1}, 1) if QUICK else ({1: 100, 16: 16, 256: 2}, 7)

Point = dict[str, float]


# --- earlyon ---------------------------------------------------------------------------------------------------------


class Peer:
    """earlyon's exits on a copy of the network, trained."""

    def __init__(self, net: nn.Module, data: Splits, lr: float, kept: Path) -> None:
        from earlyon.core.thresholds import collect_head_logits
        from earlyon.models import custom_ee
        from earlyon.training import stage2_train_exits

        torch.manual_seed(0)
        shape = tuple(data.test[0][0][None].shape)
        self.model = custom_ee(copy.deepcopy(net), list(LAYERS), data.classes, input_shape=shape)
        if kept.exists():
            self.model.load_state_dict(torch.load(kept, weights_only=True))
        else:
            loader = DataLoader(data.train, batch_size=BATCH, shuffle=True, drop_last=True)
            stage2_train_exits(self.model, loader, epochs=EPOCHS, lr=lr)
            torch.save(self.model.state_dict(), kept)
        self.model.eval()
        self.held_out = DataLoader(data.calibration, batch_size=BATCH)
        self.found = collect_head_logits(self.model, self.held_out, "cpu")

    @property
    def early_accuracy(self) -> float:
        """The mean over the early exits, on the calibration split."""
        right = [float((z.argmax(-1) == self.found.targets).double().mean()) for z in self.found.logits[:-1]]
        return sum(right) / len(right)

    def choose(self, goal: str) -> None:
        """Temperatures and thresholds by its own calibrations, without running the network again for each goal."""
        from earlyon.core import thresholds

        kind, value = goal.split()
        options = {"fit_temperature": True, "temperature_loader": self.held_out}
        with patch.object(thresholds, "collect_head_logits", lambda *_: self.found):
            if kind == "macs":
                thresholds.calibrate_thresholds_for_budget(self.model, self.held_out, float(value), **options)
            else:
                thresholds.calibrate_thresholds(self.model, self.held_out, float(value), **options)

    def costs(self, x: Tensor) -> Tensor:
        """Multiply-adds of a sample that leaves at each exit, the end last, as the wrapper runs them: (K + 1,)."""
        config, costs = self.model.config, []
        kept = config.confidence_thresholds
        for k in range(len(kept) + 1):
            config.confidence_thresholds = [0.0 if j == k else 2.0 for j in range(len(kept))]
            with FlopCounterMode(display=False) as counter:
                self.model.forward_inference_batched(x)
            costs.append(counter.get_total_flops() / 2 / len(x))
        config.confidence_thresholds = kept
        return torch.tensor(costs, dtype=torch.float64)

    def points(self, data: Splits, x: Tensor) -> dict[str, Point]:
        """What each goal comes to on the test split."""
        from earlyon.core.thresholds import collect_head_logits

        test = collect_head_logits(self.model, DataLoader(data.test, batch_size=BATCH), "cpu")
        answers = torch.stack([z.argmax(-1) for z in test.logits])
        points = {}
        for goal in GOALS:
            self.choose(goal)
            at = self._leave_at(test)
            right = answers[at, torch.arange(len(at))] == test.targets
            macs = float(self.costs(x)[at].mean())
            points[goal] = {"accuracy": round(float(right.double().mean()), 4), "mean_macs": macs}
        return points

    def _leave_at(self, found: Any) -> Tensor:
        config = self.model.config
        at = torch.full((len(found.targets),), len(LAYERS))
        for k in reversed(range(len(LAYERS))):
            if config.enabled_exits[k]:
                p = torch.softmax(found.logits[k] / config.temperatures[found.head_names[k]], -1).amax(-1)
                at[p.double() >= config.confidence_thresholds[k]] = k
        return at


# --- ours ------------------------------------------------------------------------------------------------------------


class Own:
    """Our exits on a copy of the network, trained."""

    def __init__(self, net: nn.Module, exits: Any, data: Splits, kept: Path) -> None:
        training, run = dc.Training(epochs=EPOCHS, lr=LR, batch_size=BATCH), dc.Run(device="cpu")
        self.model = kept_in(kept, lambda: dc.convert(net, exits=exits, data=data, training=training, run=run))
        tuning = collect_cached(self.model, data.calibration)
        self.search, self.final = tuning.grid(self.model.policy), float(tuning.right[-1].mean())

    def choose(self, goal: str) -> None:
        """Thresholds for a budget, or for a loss of accuracy on the calibration split, as earlyon means it."""
        kind, value = goal.split()
        budget = float(value) * self.model.static_macs
        point = self.search.for_cost(budget) if kind == "macs" else self.search.for_accuracy(self.final - float(value))
        self.model.policy = replace(self.model.policy, thresholds=point.thresholds)

    def points(self, data: Splits, their: dict[str, Point]) -> dict[str, Point]:
        """What each goal comes to on the test split, and the same multiply-adds as earlyon spent on it."""
        test, points = collect_cached(self.model, data.test), {}
        for goal in GOALS:
            self.choose(goal)
            found = test.play(self.model.policy)
            self.choose(f"macs {their[goal]['mean_macs'] / self.model.static_macs}")
            equal = test.play(self.model.policy)
            points[goal] = {
                "accuracy": round(found.accuracy, 4),
                "mean_macs": found.mean_cost,
                "at_their_macs": round(equal.accuracy, 4),
                "mean_macs_there": equal.mean_cost,
            }
        return points


# --- side by side ----------------------------------------------------------------------------------------------------


def stage_ends(net: nn.Module, x: Tensor) -> tuple[str, ...]:
    """The graph nodes that give what the layers give."""
    nodes = [n for n in dc.capture(net, x).graph.nodes if n.op != "output"]
    return tuple([n.name for n in nodes if str(n.meta.get("path", "")).startswith(layer)][-1] for layer in LAYERS)


def clock(static: nn.Module, own: dict[str, Own], peer: Peer, data: Splits) -> dict[str, Any]:
    """Milliseconds per call of each by batch size, and the share of earlyon's batches that left early."""
    peer.choose(TIMED)
    models: dict[str, Callable[..., Any]] = {"static": static}
    for name, side in own.items():
        side.choose(TIMED)
        models[name] = side.model.predict
    rows: dict[str, Any] = {name: {} for name in (*models, "earlyon")}
    left = {}
    for size, batches in latency_inputs(data.test, CALLS).items():
        call = peer.model if size == 1 else peer.model.forward_inference_batched
        for name, ms in least_ms({**models, "earlyon": call}, size, batches, ROUNDS).items():
            rows[name][str(size)] = round(ms, 3)
        left[str(size)] = round(sum(call(x).exit_taken >= 0 for x in batches) / len(batches), 3)
    speed_up = {
        name: {size: round(rows["earlyon"][size] / ms, 2) for size, ms in row.items()} for name, row in rows.items()
    }
    return {"goal": TIMED, "ms": rows, "times_faster_than_earlyon": speed_up, "earlyon_left_early": left}


def measure(data: Splits, out: Path) -> dict[str, Any]:
    """Everything about one network."""
    net = trained_first(NET, data.name, 0, data, out)
    train, held_out = take(data.train, TRAIN), take(data.calibration, CALIBRATION)
    data = Splits(train, held_out, data.test, data.classes, data.name)
    x = torch.stack([data.test[i][0] for i in range(2)])
    static = dc.capture(net, x).eval()
    own = {
        "ours, same places": Own(net, stage_ends(net, x), data, out / "same-places.dyn"),
        "ours": Own(net, 3, data, out / "ours.dyn"),
    }
    tried = {lr: Peer(net, data, lr, out / f"earlyon-{lr}.pt") for lr in (THEIR_LR, LR)}
    peer = max(tried.values(), key=lambda side: side.early_accuracy)
    their = peer.points(data, x)
    points = {"earlyon": their, **{name: side.points(data, their) for name, side in own.items()}}
    macs = own["ours"].model.static_macs
    return {
        "static": {"accuracy": round(dc.evaluate(net, data.test).accuracy, 4), "macs": macs},
        "earlyon_lr": {str(lr): round(side.early_accuracy, 4) for lr, side in tried.items()},
        "points": {name: {goal: _shares(row, macs) for goal, row in rows.items()} for name, rows in points.items()},
        "time": clock(static, own, peer, data),
    }


def _shares(point: Point, macs: float) -> Point:
    """With multiply-adds as shares of the static network's."""
    return {name: round(value / macs if "macs" in name and value > 1 else value, 4) for name, value in point.items()}


def main() -> None:
    """Measures everything once."""
    parser = BENCHMARK.parser()
    parser.add_argument("--data", default="fashion_mnist", choices=("fashion_mnist", "mnist"))
    asked = BENCHMARK.start(parser)
    setting = {"net": NET, "data": asked.data, "train": TRAIN, "calibration": CALIBRATION, "epochs": EPOCHS}
    result = {"setting": setting, **measure(splits(asked.data), BENCHMARK.runs)}
    print(json.dumps(result, indent=1))
    BENCHMARK.write(result)


if __name__ == "__main__":
    main()
