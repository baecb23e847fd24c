"""Skip gates in ONNX files: what `predict` answers, and proof that a closed branch does not run there."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cases import CASES, call, gated_graph, rows
from dynamic_models import gated
from onnx_files import convolutions, run, session
from torch import Tensor

from dyncompress.errors import DynCompressError
from dyncompress.passes.exits.insert_exits import InsertExits
from dyncompress.passes.graph.copying import deep_copy
from dyncompress.runtime.onnx.check import Tolerance, check_file
from dyncompress.runtime.onnx.export import OnnxReport, export_onnx
from dyncompress.runtime.predict.dynamic import DynamicModel
from dyncompress.runtime.predict.policy import ExitPolicy

pytestmark = pytest.mark.filterwarnings("ignore:the .* gates cost")  # the models are tiny
MODELS = ["vit:policy", "text:recurrent", "resnet:pooled:exits"]


@cache
def model(name: str) -> DynamicModel:
    """A gated model; with exits, the second is on, and half of the samples leave there."""
    kind, gate, *exits = name.split(":")
    if not exits:
        return gated(kind, gate)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = DynamicModel(InsertExits(2)(gated_graph(kind, gate)).gm).eval()
    score = made.all_logits(samples(name, 40))[1].softmax(-1).amax(-1).sort().values
    made.policy = ExitPolicy("max-softmax", (None, float(score[19:21].mean())))
    return made


def samples(name: str, n: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CASES[name.split(":")[0]].batch(n)


@pytest.fixture(scope="module")
def file_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, OnnxReport]]:
    """Exports each model once for all tests."""
    folder = tmp_path_factory.mktemp("onnx")

    @cache
    def export(name: str) -> tuple[Path, OnnxReport]:
        path = folder / f"{name.replace(':', '-')}.onnx"
        return path, export_onnx(model(name), path, tunable=name.endswith("exits"))

    return export


def same_answers(got: dict[str, np.ndarray], wanted: Any) -> None:
    np.testing.assert_array_equal(got["exit_index"], wanted.exit_index)
    np.testing.assert_array_equal(got["gates"], wanted.gates)
    np.testing.assert_array_equal(got["macs"], wanted.macs)
    np.testing.assert_allclose(got["logits"], wanted.logits, rtol=1e-4, atol=1e-5)


# --- the same answers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_file_answers_as_predict_does(name: str, file_of: Any) -> None:
    path, report = file_of(name)
    onnx.checker.check_model(path, full_check=True)
    assert report.outputs == ["logits", "exit_index", "macs", "gates"]
    made, dyn = session(path), model(name)
    for n in (0, 1, 3, 40):
        same_answers(run(made, samples(name, n)), call(dyn.predict, samples(name, n)))
    got = run(made, samples(name, 40))
    assert 0 < got["gates"].mean() < 1 and len(set(got["macs"].tolist())) > 1
    for i in range(4):  # each sample by itself, as in the batch
        alone = run(made, rows(samples(name, 40), [i]))
        assert (alone["gates"][0] == got["gates"][i]).all() and alone["macs"][0] == got["macs"][i]
        np.testing.assert_allclose(alone["logits"][0], got["logits"][i], rtol=1e-4, atol=1e-5)


def test_thresholds_can_be_changed_where_there_are_gates(file_of: Any) -> None:
    name = "resnet:pooled:exits"
    made, dyn, batch = session(file_of(name)[0]), model(name), samples(name, 40)
    assert 0 < int((dyn.predict(batch).exit_index == 1).sum()) < 40
    for threshold in (0.0, 1.0):
        other = dyn.with_policy(ExitPolicy("max-softmax", (None, threshold)))
        same_answers(run(made, batch, threshold_1=threshold), other.predict(batch))


def test_any_length_runs(file_of: Any) -> None:
    longer = {k: torch.cat([v, v], 1) for k, v in samples("text:recurrent", 5).items()}
    same_answers(run(session(file_of("text:recurrent")[0]), longer), model("text:recurrent").predict(**longer))


# --- a closed branch does not run --------------------------------------------------------------------------------


def rows_by_branch(path: Path, batch: Tensor, folder: Path) -> dict[int, set[int]]:
    """The batch sizes that the convolutions of each branch saw in one run."""
    seen: dict[int, set[int]] = {}
    for parts, size in convolutions(path, batch, folder):
        for part in parts:
            if part.startswith("branch_"):
                seen.setdefault(int(part.removeprefix("branch_")), set()).add(size)
    return seen


def test_branches_run_on_the_rows_that_are_open_or_not_at_all(file_of: Any, tmp_path: Path) -> None:
    name = "resnet:pooled:exits"
    path, batch = file_of(name)[0], samples(name, 40)
    opened = model(name).predict(batch).gates
    for some in (batch, batch[:1], batch[:3]):
        counts = opened[: len(some)].sum(0).tolist()
        assert rows_by_branch(path, some, tmp_path) == {k: {n} for k, n in enumerate(counts) if n}
    assert 0 < opened[0].sum() < 4  # of one sample alone, some branches ran and some did not


def test_gates_may_decide_otherwise_only_beside_zero(file_of: Any) -> None:
    name = "resnet:pooled:exits"
    path, batch, moved = file_of(name)[0], samples(name, 64), deep_copy(model(name))
    with torch.no_grad():
        logits = moved.trunk.gates.get_submodule("0.out")(_entering(moved, batch)).flatten()
        moved.trunk.get_parameter("gates.0.out.bias").sub_(logits[logits < 0].max() - 1e-4)
    with pytest.raises(DynCompressError, match=r"batch size \d+: the gate of 'blocks.0:branch' decides otherwise for"):
        check_file(path, moved, lambda n: [batch[-n:]], Tolerance(1e-6, 1e-6))
    check_file(path, moved, lambda n: [batch[-n:]], Tolerance(1e-3, 1e-3))


def _entering(dyn: DynamicModel, batch: Tensor) -> Tensor:
    """What the last layer of the first gate reads."""
    seen: list[Tensor] = []
    hook = dyn.trunk.get_submodule("gates.0.out").register_forward_hook(lambda m, args, out: seen.append(args[0]))
    dyn.all_logits(batch)
    hook.remove()
    return seen[0]


# --- weights -----------------------------------------------------------------------------------------------------


def test_a_weight_lies_once_with_the_branch_that_needs_it(file_of: Any) -> None:
    """What siblings share, such as constants, lies around them both."""
    dyn, graph = model("vit:policy"), onnx.load(file_of("vit:policy")[0]).graph
    branches = [n for n in graph.node if n.op_type == "If"]
    assert len(branches) == len(dyn.gates) == 8
    inside = [{w.name for a in n.attribute for w in a.g.initializer} for n in branches]
    names = [w.name for w in graph.initializer] + [name for names in inside for name in names]
    assert len(names) == len(set(names))
    for k, found in enumerate(inside):
        part = "mlp.0" if k % 2 else "attention.qkv"
        assert f"layers.{k // 2}.{part}" in {name.rpartition(".")[0] for name in found}
    sizes = sum(
        int(np.prod(w.dims)) for g in [graph, *(a.g for n in branches for a in n.attribute)] for w in g.initializer
    )
    assert sizes < 1.02 * sum(p.numel() for p in dyn.parameters())
