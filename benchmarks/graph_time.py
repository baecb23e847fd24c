"""How long the work on graphs takes, without any training: capture, plan, exits, gates, stages, and what they serve.

    python benchmarks/graph_time.py [MODEL ...] [--rounds N] [--beside DIR] [--quick]      writes graph_time.json

    capture    the captured graph                       axes      infer_axes, and a plan that halves the widest axis
    exits      InsertExits(3)                           stages    DynamicModel of it: typed, cut, made ready to run
    convert    capture, exits and stages together       gates     InsertGates and its DynamicModel
    predict    one sample through all stages            batch     64 samples, half of which leave early

Models are named as in the zoo, with random weights. `--beside` names another checkout of this project: the two trees
take turns within each round in one process, and `ratio` is this one's median over the other's. Milliseconds are of
processor time on one thread, which others on the machine hardly lengthen.
"""

import gc
import sys
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import median
from time import process_time
from types import ModuleType
from typing import Any

import torch
from common import QUICK, Benchmark

import dyncompress
from dyncompress.model_zoo.zoo import find

BENCHMARK = Benchmark(
    __file__, __doc__, within="resnet110-cifar",
    ours="ResNet-110: {capture/ms:.0f} ms to capture, {exits/ms:.0f} for three exits, {stages/ms:.0f} to make ready",
)  # fmt: skip
MODELS = ("resnet-digits",) if QUICK else ("resnet-digits", "vgg-digits", "vit-digits", "resnet110-cifar")


def beside(root: Path) -> ModuleType:
    """The package of another checkout, under a name of its own."""
    folder = root / "dyncompress"
    spec = spec_from_file_location(
        "dyncompress_beside", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def steps(dc: ModuleType, model: torch.nn.Module, example: torch.Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is timed, by name; the steps that come first make what the later ones work on."""
    gm = dc.capture(model, example).eval()
    widest = max(dc.infer_axes(gm).prunable, key=lambda axis: axis.size)
    keep = {widest.name: range(widest.size // 2)}
    with_exits = dc.InsertExits(3)(gm).gm
    dynamic = dc.DynamicModel(with_exits).eval()
    batch = torch.rand(64, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    sure = dynamic.all_logits(batch)[0].softmax(-1).amax(-1).median().item()

    def predicting(thresholds: tuple[float | None, ...], x: torch.Tensor) -> Callable[[], Any]:
        served = dynamic.with_policy(dc.ExitPolicy("max-softmax", thresholds))
        return lambda: served.predict(x)

    yield "capture", lambda: dc.capture(model, example)
    yield "axes", lambda: (dc.infer_axes(gm), dc.plan(gm, keep))
    yield "exits", lambda: dc.InsertExits(3)(gm)
    yield "stages", lambda: dc.DynamicModel(with_exits)
    yield "convert", lambda: dc.DynamicModel(dc.InsertExits(3)(dc.capture(model, example)).gm)
    if any(axis.kind == "branch" for axis in dc.infer_axes(gm)):
        yield "gates", lambda: dc.DynamicModel(dc.InsertGates()(gm).gm)
    yield "predict", predicting((1.0, 1.0, 1.0), batch[:1])
    yield "batch", predicting((sure, None, None), batch)


def milliseconds(trees: list[ModuleType], name: str, rounds: int) -> dict[str, Any]:
    """The median of each step over the rounds, this tree first."""
    torch.manual_seed(0)
    reference = find(name)
    model, example = reference.make().eval(), reference.example()
    found: dict[str, Any] = {}
    for by_tree in zip(*(steps(tree, model, example) for tree in trees), strict=True):
        gc.collect()
        gc.freeze()  # what one tree keeps is not to cost the other's collections
        taken: list[list[float]] = [[] for _ in by_tree]
        for _ in range(rounds + 1):
            for times, (_, run) in zip(taken, by_tree, strict=True):
                begin = process_time()
                run()
                times.append(1000 * (process_time() - begin))
        ours, *others = (median(times[1:]) for times in taken)  # the first round warms up
        entry = {"ms": round(ours, 2)}
        found[by_tree[0][0]] = entry | ({"ratio": round(ours / others[0], 3)} if others else {})
    return found


def main() -> None:
    """Measures the models again, whatever the results hold."""
    parser = BENCHMARK.parser()
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--rounds", type=int, default=1 if QUICK else 9)
    parser.add_argument("--beside", type=Path)
    asked = BENCHMARK.start(parser)
    trees = [dyncompress, *([beside(asked.beside)] if asked.beside else [])]
    result = BENCHMARK.read() | {"rounds": asked.rounds}
    for name in asked.models:
        result[name] = milliseconds(trees, name, asked.rounds)
        print(name, result[name], flush=True)
    BENCHMARK.write(result, "--beside DIR" * (len(trees) - 1))


if __name__ == "__main__":
    main()
