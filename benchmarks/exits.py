"""Training recipes of early exits side by side: accuracy against mean MACs and against measured time.

    python benchmarks/exits.py [--data fashion_mnist] [--net resnet20-cifar] [--seeds 1] [--recipes sum ...] [--quick]
    python benchmarks/exits.py --data ag_news --net text-encoder
    python benchmarks/exits.py --net msdnet-cifar --recipes --joint sum                        all write exits.json

A network is trained once per seed; every recipe then puts three exits into a copy of it and trains them for as many
epochs, on a frozen trunk or together with it. Thresholds are those that lose at most half a point on the calibration
split; budgets are met there, too. Everything else is of the test split. An MSDNet of seven layers has exits of its own,
four with its last; its static network is trained on the last one's answers alone. Texts are cut at 64 words; the
first 30,000 of AG News are trained on.

Times are shares of the static network's, one thread, both with batch norms folded and taking turns, of the same 1, 16
or 256 test samples a call, whose own share of the MACs over that of the time is `realised`. `predict` takes 256 in
blocks that fit the cache; `blocked` is the static network in such blocks. `by_latency`: thresholds for the same half
point, but the least measured milliseconds at that batch size in place of the fewest MACs. `onnxruntime`: the exported
files of the same models, its own thread one. What is measured is not measured again, what is trained stays in runs/.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import AMP, QUICK, RESIDUAL, Benchmark, complete, kept_in, run_in, trained
from data import splits, take
from exported import in_onnxruntime
from torch import Tensor, nn

import dyncompress as dc
from dyncompress.compress.evaluation.wall_clock import latency_inputs, measure_latency
from dyncompress.compress.exits.convert_report import ConvertReport
from dyncompress.compress.options.choices import ExitPlaces, ExitRecipe
from dyncompress.compress.thresholds.candidates import Cached, collect_cached
from dyncompress.compress.thresholds.choose_policy import choose_policy
from dyncompress.compress.thresholds.thresholds import ThresholdSearch
from dyncompress.model_zoo import Splits, build
from dyncompress.passes.graph.meta import inputs_of
from dyncompress.runtime.predict.cache_blocks import blocks, largest_value_bytes

BENCHMARK = Benchmark(
    __file__, __doc__, data=True, within="networks",
    published="half the cost at kept accuracy (Shallow-Deep Networks, Kaya et al., ICML 2019); AG News .945 -> .931 at "
    "10.3 times fewer MACs (FastBERT, Liu et al., ACL 2020)",
    ours="CIFAR-10 ResNet-20 {cifar10 resnet20-cifar/0/static/accuracy:.1%}, distilled on a frozen trunk "
    "{cifar10 resnet20-cifar/0/distill/accuracy:.1%} at {cifar10 resnet20-cifar/0/distill/mean_macs:.2f} of the MACs; "
    "AG News {ag_news text-encoder/0/static/accuracy:.1%}, by the sum of losses "
    "{ag_news text-encoder/0/sum/accuracy:.1%} at {ag_news text-encoder/0/sum/mean_macs:.2f}",
)  # fmt: skip
EPOCHS, EXITS, TRUNK_LR, REPEATS = 1 if QUICK else 2, 3, 0.01, 1 if QUICK else 5
CALLS = {1: 4} if QUICK else {1: 128, 16: 16, 256: 4}  # batch size -> how many batches
TEXTS = {"ag_news": 3, "sst2": 5}  # epochs of a text encoder's first training
LENGTH, SENTENCES, TEXT_LR, TEXT_BATCH = 64, 30_000, 1e-3, 64
ANYTIME = {"exits": EXITS + 1, "base": 1, "step": 2}  # of an MSDNet
BUDGETS = (0.3, 0.5, 0.7)
FROZEN = ("sum", "weighted", "ramped", "distill", "distill-all", "ztw", "frozen-teacher")
JOINT = ("sum", "distill", "distill-all")


class LastAnswer(nn.Module):
    """A network with exits of its own, as a static one: its last answer alone."""

    def __init__(self, anytime: nn.Module) -> None:
        super().__init__()
        self.anytime = anytime

    def forward(self, x: Tensor) -> Tensor:
        return self.anytime(x).logits


def built(name: str, data: Splits) -> nn.Module:
    """A network for the data, with random weights."""
    if name == "text-encoder":
        return build(name, vocabulary=len(data.vocabulary), classes=data.classes)
    options = ANYTIME if name == "msdnet-cifar" else {}
    net = build(name, channels=data.train[0][0].shape[0], **options)
    return LastAnswer(net) if options else net


def trained_first(name: str, source: str, seed: int, data: Splits, out: Path) -> nn.Module:
    """The static network of a seed."""
    torch.manual_seed(seed)
    training = RESIDUAL
    if source in TEXTS:
        training = dc.Training(epochs=TEXTS[source], lr=TEXT_LR, batch_size=TEXT_BATCH, mixed_precision=AMP)
    return trained(built(name, data), data.train, training, run_in(out / "first", seed))


def converted(net: nn.Module, recipe: ExitRecipe, joint: bool, data: Splits, seed: int, file: Path) -> dc.DynamicModel:
    """The network with the recipe's exits, from its file where there is one."""
    exits: int | ExitPlaces = EXITS
    if isinstance(net, LastAnswer):
        net, exits = net.anytime, "own"
    make = partial(
        dc.convert, net, exits=exits, data=data, recipe=recipe, freeze_trunk=not joint,
        head="cascade" if recipe == "ztw" else "auto", run=dc.Run(seed=seed, device="cpu"),
        training=dc.Training(epochs=EPOCHS, trunk_lr=TRUNK_LR, mixed_precision=AMP),
    )  # fmt: skip
    return kept_in(file, make)


def measure(net: nn.Module, recipe: ExitRecipe, joint: bool, data: Splits, seed: int, out: Path) -> dict[str, Any]:
    """One recipe on one network."""
    file = out / f"{recipe}{'-joint' if joint else ''}.dyn.safetensors"
    dynamic = converted(net, recipe, joint, data, seed, file)
    tuning, test = (collect_cached(dynamic, part) for part in (data.calibration, data.test))
    policy, whole = dynamic.policy, dynamic.static_macs
    search = tuning.grid(policy)
    played = test.play(policy)
    return {
        "exits": [round(right, 4) for right in test.right.mean(1).tolist()],
        "accuracy": round(played.accuracy, 4),
        "mean_macs": round(played.mean_cost / whole, 4),
        "shares": [round(share, 4) for share in played.shares],
        "at_budget": {str(b): _at(search, test, policy, b, whole) for b in BUDGETS if b * whole > dynamic.exit_macs[0]},
        "largest_ece": round(max(exit.ece_after for exit in ConvertReport.of(dynamic).exits), 4),
        "times": _times(net, dynamic, data, test),
    }


def _at(search: ThresholdSearch, test: Cached, policy: dc.ExitPolicy, budget: float, whole: float) -> dict[str, float]:
    """Accuracy and mean MACs on the test split within a budget that is met on the calibration split."""
    found = test.play(replace(policy, thresholds=search.for_cost(budget * whole).thresholds))
    return {"accuracy": round(found.accuracy, 4), "mean_macs": round(found.mean_cost / whole, 4)}


def _times(net: nn.Module, dynamic: dc.DynamicModel, data: Splits, test: Cached) -> dict[str, Any]:
    """Wall clock of `predict` over that of the captured static network, by batch size."""
    fold = dc.FoldBatchNorm()
    example = torch.stack([data.train[i][0] for i in range(2)])
    static = fold(dc.capture(net, example).eval()).gm
    folded = dc.DynamicModel(fold(dynamic.trunk.eval()).gm, dynamic.policy)
    part, whole = largest_value_bytes(static, inputs_of(static)), dynamic.static_macs

    def blocked(x: Tensor) -> None:
        for rows in blocks(len(x), part, x.device):
            static(x[rows])

    found = {}
    for batch, count in CALLS.items():
        fastest = folded.with_policy(folded.policy)
        choose_policy(fastest, data.calibration, leaving=dc.Leaving(cost="latency", latency_batch=batch))
        inputs = latency_inputs(data.test, {batch: count})
        models: dict[str, Callable[..., Any]] = {
            "static": static, "dynamic": folded.predict, "by_latency": fastest.predict, "blocked": blocked,
        }  # fmt: skip
        taken = {name: by_batch[batch] for name, by_batch in measure_latency(models, inputs, REPEATS).items()}
        with TemporaryDirectory() as folder:
            files = in_onnxruntime({"static": static, "dynamic": fastest}, folder)
            exported = {name: by_batch[batch] for name, by_batch in measure_latency(files, inputs, REPEATS).items()}
        spent = _spent(fastest, inputs[batch])
        played = test.play(fastest.policy)
        found[str(batch)] = {
            "static_ms": round(taken["static"], 2),
            **_realised(_spent(folded, inputs[batch]), taken["dynamic"], taken["static"]),
            "blocked": round(taken["blocked"] / taken["static"], 3),
            "by_latency": {
                "accuracy": round(played.accuracy, 4),
                "mean_macs": round(played.mean_cost / whole, 4),
                "shares": [round(share, 4) for share in played.shares],
                **_realised(spent, taken["by_latency"], taken["static"]),
            },
            "onnxruntime": {
                "static_ms": round(exported["static"], 2),
                **_realised(spent, exported["dynamic"], exported["static"]),
            },
        }
    return found


def _spent(model: dc.DynamicModel, images: Sequence[Tensor]) -> float:
    """Mean MACs on the images, as a share of the static network's."""
    return sum(float(model.predict(x).macs.double().mean()) for x in images) / len(images) / model.static_macs


def _realised(macs: float, ours: float, static: float) -> dict[str, float]:
    """Shares of the static network's time and of its MACs on the same images, and how much of the latter was gained."""
    time = ours / static
    return {"time": round(time, 3), "macs": round(macs, 3), "realised": round(macs / time, 3)}


def main() -> None:
    """Measures what the results lack."""
    parser = BENCHMARK.parser()
    parser.add_argument("--data", default="fashion_mnist", choices=("fashion_mnist", "cifar10", *TEXTS))
    parser.add_argument("--net", default="resnet20-cifar")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--recipes", nargs="*", default=FROZEN[:1] if QUICK else FROZEN, choices=FROZEN, help="on a frozen trunk"
    )
    parser.add_argument(
        "--joint", nargs="*", default=() if QUICK else JOINT, choices=JOINT, help="together with the trunk"
    )
    asked = BENCHMARK.start(parser)
    data, key = splits(asked.data, LENGTH if asked.data in TEXTS else None), f"{asked.data} {asked.net}"
    if asked.data in TEXTS:
        data = replace(data, train=take(data.train, SENTENCES))
    setting = {"first": RESIDUAL.epochs, "epochs": EPOCHS, "exits": EXITS, "trunk_lr": TRUNK_LR, "precision": AMP}
    nets = BENCHMARK.read(setting).get("networks", {})
    recipes = {recipe: (recipe, False) for recipe in asked.recipes}
    recipes |= {f"{recipe}, joint": (recipe, True) for recipe in asked.joint}
    for seed in range(asked.seeds):
        rows = nets.setdefault(key, {}).setdefault(str(seed), {})
        if not rows.keys() >= recipes.keys():
            out = BENCHMARK.runs / f"{asked.data}-{asked.net}-{seed}"
            net = trained_first(asked.net, asked.data, seed, data, out)
            rows.setdefault("static", {"accuracy": round(dc.evaluate(net, data.test, batch_size=250).accuracy, 4)})
            save = partial(BENCHMARK.write, {"setting": setting, "networks": nets})
            complete(rows, {name: partial(measure, net, *how, data, seed, out) for name, how in recipes.items()}, save)


if __name__ == "__main__":
    main()
