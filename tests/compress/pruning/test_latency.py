"""Measured latency as a target: the table, the prediction, the hardware's steps, and a model that really is faster."""

import json
from pathlib import Path
from statistics import median
from time import thread_time
from typing import Any

import pytest
import torch
from flat_options import flat
from torch import Tensor, fx, nn
from torch.nn import functional as F

import dyncompress as dc
from dyncompress.compress.importance.scores import l2_scores
from dyncompress.compress.options.limits import Limits
from dyncompress.compress.pruning import latency as lat
from dyncompress.compress.pruning.cost_left import share_left
from dyncompress.compress.pruning.latency import Latency, Table, default_cache, signature
from dyncompress.compress.pruning.latency_choice import choose_by_latency
from dyncompress.passes.axes.axes import infer_axes
from dyncompress.passes.shrink.shrink import shrink_axes

SIZE = 28


class Wide(nn.Module):
    """Heavy enough that its time is its arithmetic's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 128, 3, padding=1), nn.Conv2d(128, 128, 3, padding=1)
        self.c, self.head = nn.Conv2d(128, 128, 3, padding=1), nn.Linear(128, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))).mean((2, 3)))


@pytest.fixture(scope="module")
def gm() -> fx.GraphModule:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return dc.capture(Wide().eval(), torch.randn(2, 3, SIZE, SIZE))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return default_cache()


def ratio_of_times(small: nn.Module, whole: nn.Module, x: Tensor) -> float:
    """The median over pairs of runs, one right after the other; of this thread's own time, as others may work too."""
    ratios = []
    with torch.no_grad():
        for _ in range(12):
            begin = thread_time()
            whole(x)
            middle = thread_time()
            small(x)
            ratios.append((thread_time() - middle) / (middle - begin))
    return median(ratios[2:])


@pytest.mark.parametrize("batch", [1, 4])
def test_the_target_is_met_on_this_device(batch: int, gm: fx.GraphModule, cache: Path) -> None:
    small = dc.prune(gm, latency=0.5, cuts=dc.Cuts(latency_batch=batch))
    (step,) = small.meta["info"]["prune"]["steps"]
    assert step["measured"] == step["left"] == pytest.approx(0.5, abs=0.1)
    assert all(n % 16 == 0 for n in (small.a.out_channels, small.b.out_channels, small.c.out_channels))
    x = torch.randn(batch, 3, SIZE, SIZE)
    assert ratio_of_times(small, gm, x) == pytest.approx(0.5, abs=0.2)  # a coarse check: other work may go on here


def test_entries_are_measured_once(gm: fx.GraphModule, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = infer_axes(gm)
    keep = {axes["a.weight:0"].atom: torch.arange(64)}
    first = Latency(axes).left(keep)
    (table,) = json.loads(cache.read_text()).values()
    assert len(table) == 5 + 3  # a, relu, b and c alike, mean, head; then a, relu and b at the new width
    monkeypatch.setattr(Latency, "_measure", None)  # not to be called again
    assert Latency(axes).left(keep) == first
    assert not [path for path in cache.parent.iterdir() if path != cache]


def test_prediction_adds_up_the_table(gm: fx.GraphModule, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def costs(self: Latency, model: fx.GraphModule, missing: Any) -> None:
        """Every call takes as many milliseconds as its weights have numbers, and one more."""
        modules = {node.name: node for node in model.graph.nodes}
        for name, text in missing.items():
            node = modules[name]
            module = model.get_submodule(str(node.target)) if node.op == "call_module" else nn.Identity()
            self.table.entries[text] = 1.0 + sum(p.numel() for p in module.parameters())

    monkeypatch.setattr(Latency, "_measure", costs)
    clock = Latency(infer_axes(gm))
    keep = {clock.axes["b.weight:0"].atom: torch.arange(32)}
    parameters = {
        n: sum(p.numel() for p in shrink_axes(clock.axes, k).parameters()) for n, k in {0: {}, 1: keep}.items()
    }
    calls = 8  # 3 convolutions, 3 relus, mean, head
    assert clock.left(keep) == pytest.approx((parameters[1] + calls) / (parameters[0] + calls))
    assert clock.scale == clock.whole_ms / (parameters[0] + calls)


def test_sizes_rise_to_the_hardwares_step(gm: fx.GraphModule, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def costs(self: Latency, model: fx.GraphModule, missing: Any) -> None:
        """A device that works on 32 channels at a time: in-channels times out-channels, both rounded up to 32."""
        nodes = {node.name: node for node in model.graph.nodes}
        for name, text in missing.items():
            node, ms = nodes[name], 1.0
            if node.op == "call_module" and isinstance(conv := model.get_submodule(str(node.target)), nn.Conv2d):
                ms += -(-conv.in_channels // 32) * -(-conv.out_channels // 32) * 100
            self.table.entries[text] = ms

    monkeypatch.setattr(Latency, "_measure", costs)
    axes = infer_axes(gm)
    clock = Latency(axes)
    monkeypatch.setattr(Latency, "measured_left", lambda self, small: 0.5)
    limits, scores = Limits(round_to=8), l2_scores(gm, axes.prunable)
    found = choose_by_latency(axes, scores, 0.5, limits, clock)
    counts = [len(found.keep[axis.atom]) if axis.atom in found.keep else axis.size for axis in axes.prunable]
    assert all(count % 32 == 0 for count in counts) and min(counts) < 128
    assert found.predicted <= 0.5


def test_without_a_scope_the_better_one_is_taken(
    gm: fx.GraphModule, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Latency, "by_node", lambda self, keep: {"all": 1.0})
    axes = infer_axes(gm)
    clock, macs = Latency(axes), share_left(axes, "macs", [])
    monkeypatch.setattr(clock, "left", macs)
    monkeypatch.setattr(clock, "measured_left", lambda small: 0.5)  # whatever goes
    scores = {axis.name: torch.rand(axis.size) ** number for number, axis in enumerate(axes.prunable)}
    left = {
        scope: macs(choose_by_latency(axes, scores, 0.5, Limits(round_to=1), clock, scope=scope, comparable=True).keep)
        for scope in (None, "global", "axis")
    }
    assert left["global"] != left["axis"]
    assert left[None] == max(left["global"], left["axis"])


def test_a_wrong_prediction_is_corrected(gm: fx.GraphModule, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Latency, "by_node", lambda self, keep: {"all": 2.0 - len(keep) / 10**9})
    clock = Latency(infer_axes(gm))
    sizes = {axis.atom: axis.size for axis in clock.axes.prunable}

    def share(keep: Any) -> float:
        return sum(len(keep.get(atom, range(size))) for atom, size in sizes.items()) / sum(sizes.values())

    monkeypatch.setattr(
        clock, "left", share
    )  # predicts what is left of the channels, but the device needs its square root
    monkeypatch.setattr(clock, "measured_left", lambda small: share_of(small) ** 0.5)

    def share_of(small: fx.GraphModule) -> float:
        return (small.a.out_channels + small.b.out_channels + small.c.out_channels) / sum(sizes.values())

    monkeypatch.setattr(
        "dyncompress.compress.pruning.latency_choice._raised",
        lambda ranking, _, counts, __: ranking.keep_counts(counts),
    )
    scores = l2_scores(gm, clock.axes.prunable)
    found = choose_by_latency(clock.axes, scores, 0.6, Limits(round_to=1), clock)
    assert found.measured == pytest.approx(0.6, rel=0.05)
    assert found.predicted == pytest.approx(0.36, rel=0.1)


def test_signatures_tell_settings_and_shapes_apart() -> None:
    def of(model: nn.Module, *shape: int) -> str:
        graph = dc.capture(model, torch.randn(*shape))
        return signature(graph, next(node for node in graph.graph.nodes if node.op.startswith("call")))

    texts = [
        of(nn.Conv2d(4, 8, 3), 2, 4, 9, 9),
        of(nn.Conv2d(4, 8, 3), 2, 4, 8, 8),
        of(nn.Conv2d(4, 8, 3, stride=2), 2, 4, 9, 9),
        of(nn.Conv2d(4, 8, 3, bias=False), 2, 4, 9, 9),
        of(nn.Conv2d(4, 16, 3), 2, 4, 9, 9),
        of(nn.LSTM(4, 8), 2, 3, 4),
        of(nn.LSTM(4, 8, num_layers=2), 2, 3, 4),
        of(nn.Softmax(1), 2, 4, 4),
        of(nn.Softmax(2), 2, 4, 4),
    ]
    assert len(set(texts)) == len(texts)
    assert texts[0] == of(nn.Conv2d(4, 8, 3), 3, 4, 9, 9)
    assert "\n" not in "".join(texts)


def test_tables_of_other_settings_stay(cache: Path) -> None:
    one, two = (Table(cache, torch.device("cpu"), batch) for batch in (1, 2))
    one.entries["x"], two.entries["x"] = 1.0, 2.0
    one.save()
    two.save()
    late = Table(cache, torch.device("cpu"), 1)
    one.entries["y"] = 3.0
    one.save()
    late.entries["z"] = 4.0
    late.save()
    assert Table(cache, torch.device("cpu"), 1).entries == {"x": 1.0, "y": 3.0, "z": 4.0}
    assert Table(cache, torch.device("cpu"), 2).entries == {"x": 2.0}
    assert "batch 2" in two.key and str(torch.__version__) in two.key


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"a": {"b": "fast"}}', '{"a": {"b": -1.0}}'])
def test_a_damaged_table(text: str, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    with pytest.raises(dc.RequestError, match="remove it"):
        Table(cache, torch.device("cpu"), 1)
    assert cache.read_text() == text


def test_a_table_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dyncompress").write_text("a file where the folder should be")
    table = Table.__new__(Table)
    table.path, table.key, table.entries = tmp_path / "dyncompress" / "x.json", "k", {"a": 1.0}
    monkeypatch.setattr(Table, "_read", lambda self: {})
    with pytest.raises(dc.DynCompressError, match="cannot be written"):
        table.save()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"latency": 0.5, "latency_batch": 0}, "at least one sample"),
        ({"latency": 0.0}, "above 0"),
        ({"latency": 0.5, "macs": 0.5}, "exactly one"),
        ({"latency": 0.01, "floor": 0.9}, "out of reach"),
    ],
)
def test_wrong_requests(options: dict, said: str, gm: fx.GraphModule, cache: Path) -> None:
    with pytest.raises(dc.RequestError, match=said):
        flat(dc.prune)(gm, **options)


def test_the_machine_is_in_the_name_of_the_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lat.platform, "node", lambda: "my host/1")
    assert default_cache() == cache.parent / "latency-my-host-1.json"
