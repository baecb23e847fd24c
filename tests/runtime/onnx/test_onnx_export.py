"""ONNX files in onnxruntime against PyTorch and against a plain loop; proof that skipped work is skipped there too."""

import json
import math
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exit_models import CASES, Layer, call, graph, graph_with_exits
from torch import Tensor, nn

import dyncompress.runtime.onnx.export as onnx_export_module
from dyncompress.errors import DynCompressError, RequestError
from dyncompress.passes.capture.capture import capture
from dyncompress.passes.exits.insert_exits import InsertExits
from dyncompress.passes.graph.copying import deep_copy
from dyncompress.passes.graph.random_inputs import random_inputs
from dyncompress.passes.modules.ragged_recurrent import RaggedRecurrent
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


# --- models, files and a reference of our own --------------------------------------------------------------------


def batch_of(name: str, n: int, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CASES[name].batch(n)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def score(rule: str, temperature: float, z: np.ndarray) -> float:
    p = softmax(z.astype(np.float64) / temperature)
    return float(p.max() if rule == "max-softmax" else -(p * np.log(p)).sum() / math.log(len(p)))


def leaves(rule: str, threshold: float | None, temperature: float, z: np.ndarray) -> bool:
    if threshold is None:
        return False
    sure = score(rule, temperature, z)
    return sure >= threshold if rule == "max-softmax" else sure <= threshold


def by_hand(model: DynamicModel, batch: Any) -> tuple[list[int], np.ndarray]:
    """Exit and logits of each sample, one sample and one exit at a time."""
    policy, every = model.policy, [z.numpy() for z in call(model.all_logits, batch)]
    chosen = []
    for i in range(len(every[0])):
        rules = zip(policy.thresholds, policy.temperatures, every, strict=False)
        left = [k for k, (t, temp, z) in enumerate(rules) if leaves(policy.rule, t, temp, z[i])]
        chosen.append(left[0] if left else len(every) - 1)
    return chosen, np.stack([every[k][i] for i, k in enumerate(chosen)])


@cache
def dynamic(name: str) -> DynamicModel:
    """A model whose exits let about the shares of POLICIES go, each threshold well between two samples' scores."""
    model = DynamicModel(deep_copy(graph_with_exits(name))).eval()
    for head in model.trunk.exits.children():
        head.linear.weight.data *= 4
    rule, shares = POLICIES[name]
    temperatures = tuple(1.0 + 0.5 * k for k in range(len(shares)))
    thresholds: list[float | None] = []
    for z, t, share in zip(call(model.all_logits, batch_of(name, 40)), temperatures, shares, strict=False):
        s = np.sort([score(rule, t, row) for row in z.numpy()])
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


def session(path: Path, profile: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path: Path | onnxruntime.InferenceSession, batch: Any) -> dict[str, np.ndarray]:
    made = session(path) if isinstance(path, Path) else path
    tensors = list(batch.values()) if isinstance(batch, dict) else list(batch) if isinstance(batch, tuple) else [batch]
    feed = {i.name: t.numpy() for i, t in zip(made.get_inputs(), tensors, strict=True)}
    return dict(zip((o.name for o in made.get_outputs()), made.run(None, feed), strict=True))


def graphs(path: Path) -> list[onnx.GraphProto]:
    """The file's graph and, nested, those of its branches."""
    found = [onnx.load(path).graph]
    for graph_ in found:
        found += [a.g for n in graph_.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH]
    return found


# --- the same answers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_the_file_answers_as_pytorch_and_as_a_plain_loop(name: str, file_of: Any) -> None:
    path, report = file_of(name)
    model, used = dynamic(name), set()
    for n in (1, 2, 40):
        batch = batch_of(name, n)
        got, wanted = run(path, batch), call(model.predict, batch)
        chosen, logits = by_hand(model, batch)
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


# --- skipped work is skipped -------------------------------------------------------------------------------------


def rows_by_stage(path: Path, batch: Any, folder: Path) -> dict[int, set[int]]:
    """The batch sizes that the convolutions of each stage saw in one run."""
    made = session(path, folder / "profile")
    run(made, batch)
    seen: dict[int, set[int]] = {}
    for event in json.loads(Path(made.end_profiling()).read_text()):
        if event["name"].endswith("_kernel_time") and event["args"]["op_name"] in {"Conv", "FusedConv"}:
            shape = next(iter(event["args"]["input_type_shape"][0].values()))
            seen.setdefault(int(event["name"].split("/")[0].removeprefix("stage")), set()).add(shape[0])
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


# --- weights -----------------------------------------------------------------------------------------------------


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


# --- static models -----------------------------------------------------------------------------------------------


def test_a_static_model_gives_its_own_outputs(tmp_path: Path) -> None:
    report = export_onnx(graph("text"), tmp_path / "text.onnx")
    batch = batch_of("text", 6)
    got, wanted = run(tmp_path / "text.onnx", batch), graph("text")(**batch)
    assert set(got) == set(report.outputs) == {"features", "logits"}
    assert report.exits == []
    for key, value in got.items():
        np.testing.assert_allclose(value, wanted[key].detach().numpy(), rtol=1e-4, atol=1e-5)


def ragged(mode: str, sizes: list[int], proj: list[int], bidirectional: bool) -> RaggedRecurrent:
    return RaggedRecurrent(mode, 6, sizes, proj, True, True, 0.0, bidirectional)


class Recurrent(nn.Module):
    """Every recurrent layer there is, with states given and read."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True)
        self.gru, self.rnn = nn.GRU(6, 5, bias=False, bidirectional=True), nn.RNN(6, 5, nonlinearity="relu")
        self.projected = nn.LSTM(6, 7, 2, batch_first=True, proj_size=3, bidirectional=True)
        self.tanh, self.ragged = nn.RNN(6, 5, batch_first=True), nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        start = torch.ones(4, x.shape[0], 5) * 0.3
        y, (h, c) = self.lstm(x, (start, -start))
        found = [y[:, -1], h[-1], c[0]]
        y, h = self.gru(x.transpose(0, 1), start[:2])
        found += [y[0], h[1], self.rnn(x.transpose(0, 1))[0][-1]]
        y, (h, c) = self.projected(x)
        found += [y[:, 2], h[1], c[2], self.tanh(x)[0][:, -1], self.ragged(x)[0][:, 1]]
        return torch.cat(found, 1)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_recurrent_layers_of_every_kind(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = capture(Recurrent(), torch.randn(2, 4, 6)).eval()
    made.set_submodule("ragged", ragged("LSTM", [4, 3, 5, 2], [], True))
    export_onnx(made, tmp_path / "r.onnx")
    x = torch.randn(9, 4, 6)
    got = run(tmp_path / "r.onnx", x)["logits"]
    np.testing.assert_allclose(got, made(x).detach().numpy(), rtol=1e-4, atol=1e-5)


# --- how it behaves ----------------------------------------------------------------------------------------------


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


class Unknown(nn.Module):
    """An operator that has no ONNX form, deep inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wave, self.last = nn.Linear(8, 8), nn.Sequential(nn.Identity(), Wave()), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.wave(self.first(x)))


class Wave(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


def test_an_operator_without_an_onnx_form_is_named(tmp_path: Path) -> None:
    made = InsertExits(1)(capture(Unknown(), torch.randn(2, 8))).gm
    model = DynamicModel(made, ExitPolicy("max-softmax", (0.5,)))
    with pytest.raises(
        DynCompressError, match=r"cannot translate aten\.special_bessel_j0\.default, called in 'wave\.1'"
    ):
        export_onnx(model, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_samples_may_leave_elsewhere_only_beside_their_threshold(file_of: Any) -> None:
    path, _ = file_of("resnet")
    model = dynamic("resnet")
    batch = batch_of("resnet", 64)

    def moved(by: float) -> DynamicModel:
        """The first threshold just above the score of a sample that the file lets go there, and then some."""
        policy, z = model.policy, model.all_logits(batch)[0].numpy()
        scores = np.array([score(policy.rule, policy.temperatures[0], row) for row in z])
        first = float(scores[scores >= policy.thresholds[0]].min()) + by
        return model.with_policy(ExitPolicy(policy.rule, (first, *policy.thresholds[1:]), policy.temperatures))

    with pytest.raises(DynCompressError, match=r"batch size \d+: sample \d+ leaves at exit 0 instead of [13]"):
        check_file(path, moved(1e-4), lambda n: [batch[-n:]], Tolerance(1e-6, 1e-6))
    found = check_file(path, moved(1e-4), lambda n: [batch[-n:]], Tolerance(1e-3, 1e-4))
    assert sum(found.exits) == 68


def test_random_inputs_look_real() -> None:
    ids, mask = random_inputs(graph("text"), 50)
    assert ids.shape == mask.shape == (50, 7)
    assert ids.dtype == torch.int64 and ids.min() == 0 and 40 < ids.max() < 50
    lengths = mask.sum(1)
    assert lengths.min() >= 1 and len(lengths.unique()) > 3
    assert torch.equal(mask, (torch.arange(7) < lengths[:, None]).long())
    assert random_inputs(graph("text"), 2, shorter=True)[0].shape == (2, 6)
    again, (x,) = random_inputs(graph("resnet"), 9), random_inputs(graph("resnet"), 9)
    assert torch.equal(again[0], x) and x.shape == (9, 3, 16, 16)
    assert x.flatten(1).std(1).max() > 3 * x.flatten(1).std(1).min()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu_exports_from_there(tmp_path: Path) -> None:
    model = deep_copy(tied()).cuda()
    export_onnx(model, tmp_path / "a.onnx", inputs=torch.randn(4, 8).cuda())
    assert next(model.parameters()).is_cuda


class Decoder(nn.Module):
    """Tokens of any length attend to themselves and to a memory of another length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(30, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor, memory: Tensor) -> Tensor:
        x = self.embed(ids).unflatten(-1, (2, 4)).transpose(1, 2)
        m = memory.unflatten(-1, (2, 4)).transpose(1, 2)
        x = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        x = nn.functional.scaled_dot_product_attention(x, m, m)
        return self.out(x.transpose(1, 2).flatten(2))


def test_two_unknown_sizes_are_not_taken_for_equal_ones(tmp_path: Path) -> None:
    gm = capture(Decoder().eval(), (torch.randint(0, 30, (2, 7)), torch.randn(2, 11, 8)))
    export_onnx(gm, tmp_path / "decoder.onnx")
    values = onnx.load(tmp_path / "decoder.onnx").graph.value_info
    assert all(d.dim_param != "None" for v in values for d in v.type.tensor_type.shape.dim)


class Windows(nn.Module):
    """Attention inside windows: (batch, windows, heads, tokens, width), and without a batch of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(1, (3, 4)).unflatten(-1, (3, 2, 4)).permute(3, 0, 1, 4, 2, 5).unbind(0)
        mask = torch.zeros(3, 1, 4, 4).masked_fill(torch.arange(4) == 3, -torch.inf)
        x = nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(2, 3).flatten(3).flatten(1, 2)
        return self.out(nn.functional.scaled_dot_product_attention(x, x, x))


def test_attention_of_any_rank(tmp_path: Path) -> None:
    gm = capture(Windows().eval(), torch.randn(2, 12, 8))
    assert max(export_onnx(gm, tmp_path / "windows.onnx").max_error.values()) < 1e-4
