"""ONNX files in onnxruntime against PyTorch and against a plain loop; proof that skipped work is skipped there too."""

import math
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cases import CASES, call, graph
from dynamic_models import spread
from nets import Layer
from onnx_files import convolutions, graphs, run, session
from played import exits_by_hand, score
from torch import Tensor, nn

import dyncompress.runtime.onnx.export as onnx_export_module
from dyncompress.errors import DynCompressError, RequestError
from dyncompress.passes.capture.capture import capture
from dyncompress.passes.exits.insert_exits import InsertExits
from dyncompress.passes.graph.copying import deep_copy
from dyncompress.runtime.onnx.check import Tolerance, check_file
from dyncompress.runtime.onnx.export import OnnxReport, export_onnx
from dyncompress.runtime.predict.dynamic import DynamicModel
from dyncompress.runtime.predict.policy import ExitPolicy

# rule, and the share of the samples that each exit may let go (None: off)
POLICIES: dict[str, tuple[str, list[float | None]]] = {
    "resnet": ("max-softmax", [0.4, 0.5, None]),
    "vit": ("entropy", [0.4, None, 0.5]),
    "text": ("entropy", [None, 0.5]),
    "lstm": ("max-softmax", [0.5, 0.5]),
}


def batch_of(name: str, n: int, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CASES[name].batch(n)


@cache
def dynamic(name: str) -> DynamicModel:
    """A model whose exits let about the shares of POLICIES go, each threshold well between two samples' scores."""
    model = spread(name)
    rule, shares = POLICIES[name]
    temperatures = tuple(1.0 + 0.5 * k for k in range(len(shares)))
    thresholds: list[float | None] = []
    always = ExitPolicy(rule, (0.0,) * len(shares), temperatures)
    for k, (z, share) in enumerate(zip(call(model.all_logits, batch_of(name, 40)), shares, strict=False)):
        s = np.sort([score(always, k, row) for row in z.tolist()])
        at = round((0 if share is None else share if rule == "entropy" else 1 - share) * len(s))
        thresholds.append(None if share is None else float((s[at - 1] + s[at]) / 2))
    model.policy = ExitPolicy(rule, tuple(thresholds), temperatures)
    return model


@pytest.fixture(scope="module")
def file_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, OnnxReport]]:
    """Exports a dynamic model of POLICIES once for all tests."""
    folder = tmp_path_factory.mktemp("onnx")

    @cache
    def export(name: str) -> tuple[Path, OnnxReport]:
        path = folder / f"{name}.onnx"
        return path, export_onnx(dynamic(name), path)

    return export


@pytest.mark.parametrize("name", POLICIES)
def test_the_file_answers_as_pytorch_and_as_a_plain_loop(name: str, file_of: Any) -> None:
    path, report = file_of(name)
    model, used = dynamic(name), set()
    for n in (1, 2, 40):
        batch = batch_of(name, n)
        got, wanted = run(path, batch), call(model.predict, batch)
        every = call(model.all_logits, batch)
        chosen = exits_by_hand(model.policy, every)
        logits = np.stack([every[k][i].numpy() for i, k in enumerate(chosen)])
        assert got["exit_index"].tolist() == wanted.exit_index.tolist() == chosen
        np.testing.assert_allclose(got["logits"], wanted.logits.numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got["logits"], logits, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(got["macs"], wanted.macs.numpy())
        used |= set(chosen)
    assert used == {k for k, share in enumerate(POLICIES[name][1]) if share is not None} | {len(model.exits)}
    assert {k: v < 1e-4 for k, v in report.max_error.items()} == {1: True, 3: True, 64: True}
    assert sum(report.exits) == 1 + 3 + 64
    assert sum(count > 0 for count in report.exits) >= 2  # the random samples of the check are not all alike
    assert report.bytes == path.stat().st_size


def test_names_types_and_free_dims_are_the_users(file_of: Any) -> None:
    path, report = file_of("text")
    onnx.checker.check_model(path, full_check=True)
    made = session(path)
    assert [i.name for i in made.get_inputs()] == report.inputs == ["input_ids", "attention_mask"]
    assert [i.shape for i in made.get_inputs()] == [["batch", "input_ids_dim1"]] * 2
    assert [(o.name, o.type, o.shape) for o in made.get_outputs()] == [
        ("logits", "tensor(float)", ["batch", 4]),
        ("exit_index", "tensor(int64)", ["batch"]),
        ("macs", "tensor(int64)", ["batch"]),
    ]
    assert report.outputs == ["logits", "exit_index", "macs"]
    longer = {k: torch.cat([v, v], 1) for k, v in batch_of("text", 5).items()}
    wanted = dynamic("text").predict(**longer)
    got = run(path, longer)
    assert got["exit_index"].tolist() == wanted.exit_index.tolist()
    np.testing.assert_allclose(got["logits"], wanted.logits.numpy(), rtol=1e-4, atol=1e-5)


def test_recurrent_layers_run_at_any_length(file_of: Any) -> None:
    path, _ = file_of("lstm")
    ids = torch.randint(0, 100, (6, 19), generator=torch.Generator().manual_seed(1))
    wanted, got = dynamic("lstm").predict(ids), run(path, ids)
    assert got["exit_index"].tolist() == wanted.exit_index.tolist()
    np.testing.assert_allclose(got["logits"], wanted.logits.numpy(), rtol=1e-4, atol=1e-5)
    kinds = {n.op_type for g in graphs(path) for n in g.node}
    assert {"LSTM", "GRU"} <= kinds and not {"Loop", "Scan"} & kinds


def test_no_samples_give_no_answers(file_of: Any) -> None:
    got = run(file_of("resnet")[0], torch.zeros(0, 3, 16, 16))
    assert {k: v.shape for k, v in got.items()} == {"logits": (0, 10), "exit_index": (0,), "macs": (0,)}


class Positions(nn.Module):
    """What crosses its exit are a length, and a causal mask that is a view of a larger one and has no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place, self.fc = nn.Embedding(30, 16), nn.Embedding(64, 16), nn.Linear(16, 4)
        self.layers = nn.ModuleList(Layer(16, 4) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        place = torch.arange(ids.shape[1], device=ids.device)
        causal = place[:, None] >= place
        x = self.layers[0](self.embed(ids) + self.place(place), causal)[:, :-1]
        return self.fc(self.layers[1](x, causal[:-1, :-1]).mean(1)) / math.sqrt(ids.shape[1])


def test_what_has_no_batch_crosses_an_exit_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = InsertExits(1)(capture(Positions(), torch.randint(0, 30, (2, 9)))).gm
    ids = torch.randint(0, 30, (20, 12))
    confidence = torch.softmax(DynamicModel(made).all_logits(ids)[0], 1).amax(1).sort().values
    model = DynamicModel(made, ExitPolicy("max-softmax", (float(confidence[9:11].mean()),)))
    export_onnx(model, tmp_path / "a.onnx")
    wanted, got = model.predict(ids), run(tmp_path / "a.onnx", ids)
    assert got["exit_index"].tolist() == wanted.exit_index.tolist()
    assert set(got["exit_index"].tolist()) == {0, 1}
    np.testing.assert_allclose(got["logits"], wanted.logits.numpy(), rtol=1e-4, atol=1e-5)


def rows_by_stage(path: Path, batch: Any, folder: Path) -> dict[int, set[int]]:
    """The batch sizes that the convolutions of each stage saw in one run."""
    seen: dict[int, set[int]] = {}
    for (stage, *_), size in convolutions(path, batch, folder):
        seen.setdefault(int(stage.removeprefix("stage")), set()).add(size)
    return seen


def test_a_stage_runs_on_the_undecided_rows_only_or_not_at_all(file_of: Any, tmp_path: Path) -> None:
    path, _ = file_of("resnet")
    batch = batch_of("resnet", 40)
    left = call(dynamic("resnet").predict, batch).exit_index
    first, second, end = (int((left == k).sum()) for k in (0, 1, 3))
    assert first + second + end == 40 and min(first, second, end) > 0
    assert rows_by_stage(path, batch, tmp_path) == {0: {40}, 1: {second + end}, 2: {end}}
    assert rows_by_stage(path, batch[left == 0], tmp_path) == {0: {first}}
    assert rows_by_stage(path, batch[left <= 1], tmp_path) == {0: {first + second}, 1: {second}}
    assert rows_by_stage(path, batch[left == 3], tmp_path) == {0: {end}, 1: {end}, 2: {end}}


def test_an_easy_sample_is_quicker_than_a_hard_one(file_of: Any) -> None:
    made, batch = session(file_of("vit")[0]), batch_of("vit", 40)
    left = call(dynamic("vit").predict, batch).exit_index

    def quickest(sample: Tensor) -> float:
        times = []
        for _ in range(200):
            start = time.perf_counter()
            run(made, sample)
            times.append(time.perf_counter() - start)
        return min(times)

    easy, hard = (batch[torch.nonzero(left == k)[0]] for k in (0, 3))
    assert quickest(easy) < 0.75 * quickest(hard)


def test_exits_that_are_off_leave_no_trace(file_of: Any) -> None:
    found = graphs(file_of("vit")[0])
    assert sum(n.op_type == "If" for g in found for n in g.node) == 2
    weights = {w.name for g in found for w in g.initializer}
    assert {"exits.0.linear.weight", "exits.2.linear.weight"} <= {w.removesuffix("_transposed") for w in weights}
    assert not any(w.startswith("exits.1.") for w in weights)


class Tied(nn.Module):
    """One layer used before and after the exit."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 3)

    def forward(self, input: Tensor) -> Tensor:
        x = torch.relu(self.again(torch.relu(self.first(input))))
        return self.last(torch.relu(self.again(x)))


@cache
def tied() -> DynamicModel:
    torch.manual_seed(0)
    made = InsertExits(1)(capture(Tied(), torch.randn(2, 8))).gm
    return DynamicModel(made, ExitPolicy("max-softmax", (0.4,)))


def test_weights_are_stored_once_in_the_outermost_graph_that_needs_them(tmp_path: Path) -> None:
    export_onnx(tied(), tmp_path / "tied.onnx")
    found = graphs(tmp_path / "tied.onnx")
    big = [(g.name, w.name) for g in found for w in g.initializer if math.prod(w.dims) == 32 * 32]
    assert big == [("dyncompress", "again.weight")]
    assert ("stage1", "last.weight") in {(g.name, w.name) for g in found for w in g.initializer}
    text = (tmp_path / "tied.onnx").read_bytes()
    assert str(Path(__file__).parent).encode() not in text  # no source lines of the machine that traced it


def test_large_models_keep_their_weights_in_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export_module, "_SINGLE_FILE_BYTES", 10_000)
    report = export_onnx(graph("vgg"), tmp_path / "vgg.onnx")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["vgg.onnx", "vgg.onnx.data"]
    assert report.bytes == sum(f.stat().st_size for f in tmp_path.iterdir())
    x = batch_of("vgg", 5)
    np.testing.assert_allclose(run(tmp_path / "vgg.onnx", x)["logits"], graph("vgg")(x).detach(), atol=1e-5)


def test_it_is_quiet_and_leaves_the_model_as_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = deep_copy(tied()).train()
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    inputs = torch.randn(5, 8)
    report = export_onnx(model, str(tmp_path / "new.onnx"), inputs=inputs, opset=18)
    assert capfd.readouterr() == ("", "")
    assert all(m.training for m in model.modules())
    after = model.state_dict(keep_vars=True)
    assert all(id(after[name]) == number and torch.equal(after[name], t) for name, (number, t) in before.items())
    left = model.predict(inputs[torch.arange(64) % 5]).exit_index
    assert report.exits[0] == sum(int((left[:n] == 0).sum()) for n in (1, 3, 64))
    assert onnx.load(report.path).opset_import[0].version == report.opset == 18
    assert report.inputs == ["input"]


def test_wrong_requests(tmp_path: Path) -> None:
    there = tmp_path / "there.onnx"
    there.write_text("mine")
    with pytest.raises(RequestError, match=r"there\.onnx exists; choose another name or pass overwrite=True"):
        export_onnx(tied(), there)
    with pytest.raises(RequestError, match="no/such does not exist"):
        export_onnx(tied(), tmp_path / "no" / "such" / "a.onnx")
    with pytest.raises(RequestError, match="is a folder"):
        export_onnx(tied(), tmp_path, overwrite=True)
    with pytest.raises(RequestError, match="opset=17: give one from 18 to"):
        export_onnx(tied(), tmp_path / "a.onnx", opset=17)
    with pytest.raises(RequestError, match="not a Tied: capture it first"):
        export_onnx(Tied(), tmp_path / "a.onnx")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="meta device"):
        export_onnx(deep_copy(tied()).to("meta"), tmp_path / "a.onnx")
    with pytest.raises(RequestError, match=r"input 'input_1' has shape \(5, 9\); the model takes \(batch, 8\)"):
        export_onnx(tied(), tmp_path / "a.onnx", inputs=torch.randn(5, 9))
    with pytest.raises(RequestError, match="no samples"):
        export_onnx(tied(), tmp_path / "a.onnx", inputs=torch.randn(0, 8))
    assert [f.name for f in tmp_path.iterdir()] == ["there.onnx"]
    assert there.read_text() == "mine"


def test_a_file_that_disagrees_is_not_left_behind(tmp_path: Path) -> None:
    there = tmp_path / "there.onnx"
    there.write_text("mine")
    with pytest.raises(
        DynCompressError, match=r"disagrees with PyTorch at batch size 1: output 'logits' off by .*rtol=0"
    ):
        export_onnx(graph("resnet"), there, overwrite=True, rtol=0, atol=0)
    assert [f.name for f in tmp_path.iterdir()] == ["there.onnx"]
    assert there.read_text() == "mine"


def test_samples_may_leave_elsewhere_only_beside_their_threshold(file_of: Any) -> None:
    path, _ = file_of("resnet")
    model = dynamic("resnet")
    batch = batch_of("resnet", 64)

    def moved(by: float) -> DynamicModel:
        """The first threshold just above the score of a sample that the file lets go there, and then some."""
        policy, z = model.policy, model.all_logits(batch)[0].tolist()
        scores = np.array([score(policy, 0, row) for row in z])
        first = float(scores[scores >= policy.thresholds[0]].min()) + by
        return model.with_policy(ExitPolicy(policy.rule, (first, *policy.thresholds[1:]), policy.temperatures))

    with pytest.raises(DynCompressError, match=r"batch size \d+: sample \d+ leaves at exit 0 instead of [13]"):
        check_file(path, moved(1e-4), lambda n: [batch[-n:]], Tolerance(1e-6, 1e-6))
    found = check_file(path, moved(1e-4), lambda n: [batch[-n:]], Tolerance(1e-3, 1e-4))
    assert sum(found.exits) == 68


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu_exports_from_there(tmp_path: Path) -> None:
    model = deep_copy(tied()).cuda()
    export_onnx(model, tmp_path / "a.onnx", inputs=torch.randn(4, 8).cuda())
    assert next(model.parameters()).is_cuda
