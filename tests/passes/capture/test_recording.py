"""Recordings: the same graph as torch.export's, and whatever a recording cannot tell goes through torch.export."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dyncompress as dc
from dyncompress.model_zoo.zoo import ZOO, build, example_input
from dyncompress.passes.capture import capture as capturing
from dyncompress.passes.capture import output_shapes
from dyncompress.passes.capture.recording import Unrecorded
from dyncompress.passes.capture.symbolic_sizes import recorded
from dyncompress.passes.graph.meta import TensorInput, inputs_of

aten = torch.ops.aten


def exported(monkeypatch: pytest.MonkeyPatch, model: nn.Module, x: Any) -> torch.fx.GraphModule:
    """The model captured by torch.export alone."""

    def refuse(*_: Any) -> None:
        raise Unrecorded("not now")

    with monkeypatch.context() as patch:
        patch.setattr(capturing, "recorded", refuse)
        return dc.capture(model, x)


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("torch.export was asked")

    monkeypatch.setattr(torch.export, "export", refuse)


@pytest.mark.parametrize("name", ["resnet-digits", "vit-digits", "lstm-digits", "text-encoder", "lstm-lm", "bidaf"])
def test_a_recording_is_what_export_gives(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert name in ZOO
    torch.manual_seed(0)
    model, x = build(name).eval(), example_input(name)
    ours, reference = dc.capture(model, x), exported(monkeypatch, model, x)
    assert inputs_of(ours) == inputs_of(reference)
    assert ours.graph._codegen.pytree_info == reference.graph._codegen.pytree_info  # type: ignore[attr-defined]
    assert {n.target for n in ours.graph.find_nodes(op="call_module")} == {
        n.target for n in reference.graph.find_nodes(op="call_module")
    }
    for key, value in reference.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)

    def slices(gm: torch.fx.GraphModule) -> set[Any]:
        return {(a.size, a.prunable, *sorted((s.tensor, s.dim) for s in a.slices)) for a in dc.infer_axes(gm)}

    assert slices(ours) == slices(reference)
    args, kwargs = capturing.split_inputs(x)
    torch.testing.assert_close(ours(*args, **kwargs), reference(*args, **kwargs), rtol=0, atol=0)


class Formulas(nn.Module):
    """Sizes of every kind: the batch, a multiple of it, a product with a length, a length plus one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(30, 6), nn.Embedding(40, 6)

    def forward(self, ids: Tensor) -> Tensor:
        rows, length = ids.shape
        x = self.embed(ids).reshape(rows * length, 2, 3).reshape(rows * 2, length, 3).sum(1)
        place = self.place(torch.arange(length + 1, device=ids.device))[1:]
        return x.reshape(rows, 6)[:, None] + place + torch.ones(3 * rows, device=ids.device).sum() / 3


@pytest.mark.parametrize("shape", [(1, 4), (5, 3), (2, 31)])
def test_sizes_that_follow_the_inputs(no_export: None, shape: tuple[int, int]) -> None:
    model = Formulas().eval()
    gm = dc.capture(model, torch.randint(0, 30, (2, 7)))
    ids = torch.randint(0, 30, shape)
    torch.testing.assert_close(gm(ids), model(ids))


class Caching(nn.Module):
    """Keeps what it computed from its weights in a dict, as some attention layers do in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.cache = nn.Linear(4, 3), dict[str, Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        if "scale" not in self.cache:
            self.cache["scale"] = self.fc.weight.sum() * 2
        return self.fc(x) * self.cache["scale"]


def test_the_model_keeps_nothing_of_a_recording(no_export: None) -> None:
    model = Caching().eval()
    before, x = dict(model.fc._parameters), torch.randn(5, 4)
    gm = dc.capture(model, torch.randn(2, 4))
    assert model.cache == {} and model.fc._parameters == before
    torch.testing.assert_close(gm(x), model(x))


class OnDevice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1], device=x.device)
        return x + steps if x.device.type == "cpu" and x.is_cpu and not x.is_meta else x * steps


def test_a_model_sees_its_own_device(no_export: None) -> None:
    x = torch.randn(3, 4)
    torch.testing.assert_close(dc.capture(OnDevice(), torch.randn(2, 4))(x), OnDevice()(x))


class Scaled(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        return ids.float() / math.sqrt(ids.shape[1])


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.anchor = torch.randn(4)  # no buffer

    def forward(self, x: Tensor) -> Tensor:
        return x * self.anchor


class Lasting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x * 2
        return self.last


class Valued(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tensor([1.0, 2.0, 3.0, 4.0])


class Parity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0] // 2, 2, -1).sum(1)


@pytest.mark.parametrize("make", [Scaled, Constant, Lasting, Valued, Parity])
def test_what_a_recording_cannot_tell_is_not_recorded(make: Callable[[], nn.Module]) -> None:
    x = torch.randint(0, 9, (53, 4)) if make is Scaled else torch.randn(53, 4)
    with pytest.raises(Unrecorded):
        recorded(make().eval(), (x,), {}, 53)


@pytest.mark.parametrize("make", [Scaled, Constant, Valued])
def test_and_is_exported_instead(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    made = (lambda n: torch.randint(0, 9, (n, 4))) if make is Scaled else (lambda n: torch.randn(n, 4))
    gm, x = dc.capture(model, made(2)), made(5)
    torch.testing.assert_close(gm(x), model(x))


def test_a_loop_over_time_fixes_the_length() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return torch.stack([x.tanh() for x in self.embed(ids).unbind(1)], 1)

    (steps,) = inputs_of(dc.capture(Steps(), torch.randint(0, 9, (2, 6))))
    assert isinstance(steps, TensorInput) and steps.dynamic == (0,)


@pytest.mark.parametrize("name", ["resnet-digits", "vit-digits", "text-encoder", "msdnet-cifar"])
def test_known_output_shapes_are_torchs_own(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    seen = 0

    def held(function: Any, rule: Any) -> Any:
        def both(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            mine = rule(*args, **kwargs)
            if mine is not None:
                wanted, seen = function(*args, **kwargs), seen + 1
                assert (mine.shape, mine.dtype, mine.device) == (wanted.shape, wanted.dtype, wanted.device), function
                assert mine.is_contiguous() == wanted.is_contiguous(), function
            return mine

        return both

    for function, rule in output_shapes.OUTPUT_SHAPES.items():
        monkeypatch.setitem(output_shapes.OUTPUT_SHAPES, function, held(function, rule))
    dc.capture(build(name).eval(), example_input(name))
    assert seen > 20


def layouts(*shape: int) -> list[Tensor]:
    """Tensors without values, of one shape: in order, in another order, with gaps, with repeats."""
    dims = [shape[0], *shape[2:], shape[1]]
    wide = [n + 1 for n in shape]
    return [
        torch.empty(shape, device="meta"),
        torch.empty(dims, device="meta").movedim(-1, 1),
        torch.empty(wide, device="meta")[tuple(slice(n) for n in shape)],
        torch.empty(1, *shape[1:], device="meta").expand(shape),
    ]


def operator_calls() -> list[tuple[Any, tuple[Any, ...]]]:
    """Calls of the operators with rules that depend on shapes, dtypes and the order in memory."""
    images, ids = layouts(2, 6, 8, 8), torch.empty(2, 5, dtype=torch.int64, device="meta")
    numbers = torch.empty(2, 3, 8, 8, dtype=torch.int64, device="meta")
    others = [*images, *layouts(2, 6, 1, 1), torch.empty(6, 1, 1, device="meta"), torch.empty(8, 8, device="meta")]
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    for x in images:
        calls += [(op, (x, y)) for y in [*others, 2, 0.5] for op in (aten.add.Tensor, aten.div.Tensor)]
        calls += [(aten.mul.Tensor, (y, x)) for y in others] + [(aten.lt.Tensor, (x, y)) for y in others]
        calls += [(aten.cat.default, ([x, y], at)) for y in images for at in (0, 1, -1)]
        calls += [(aten.mean.dim, (x, d, k)) for d in ([1], [-1, -2], [0, 3]) for k in (True, False)]
        calls += [
            (aten.max_pool2d.default, (x, *rest))
            for rest in (([2],), ([3, 2], [2, 1], [1, 0]), ([3], [2], [1], [1], True))
        ]
        calls += [(aten.avg_pool2d.default, (x, [2])), (aten.avg_pool2d.default, (x, [3, 2], [1, 2], [1, 1]))]
        calls += [(aten.adaptive_avg_pool2d.default, (x, [1, 1])), (aten.adaptive_avg_pool2d.default, (x, [3, 2]))]
        calls += [(aten.pow.Tensor_Scalar, (x, 2)), (aten.rsqrt.default, (x,)), (aten.contiguous.default, (x,))]
        calls += [(aten.scaled_dot_product_attention.default, (x, y, y)) for y in [*images, *layouts(2, 6, 3, 8)]]
        calls += [(aten.linear.default, (x, torch.empty(4, 8, device="meta")))]
        calls += [(aten.add_.Tensor, (torch.empty_like(x), y)) for y in others[:4]]
        calls += [(aten.min.other, (x, y)) for y in others]
        calls += [(op, (x,)) for op in (aten.abs.default, aten.neg.default)] + [(aten.cumsum.default, (x, 1))]
        calls += [(aten.gather.default, (x, 1, at)) for at in (numbers, numbers.transpose(2, 3))]
        calls += [(aten.where.self, (x > y, x, y)) for y in others] + [(aten.where.ScalarOther, (x > 0, x, 0.0))]
        calls += [(aten.diff.default, (x, 1, d)) for d in (1, -1)] + [(aten.diff.default, (x, 1, 2, x[:, :, :1]))]
        calls += [(aten.sub.Tensor, (x[:, :, :1], y)) for y in (1.0, x)]
        places = [ids], [numbers, ids[:, :1, None, None]], [None, ids], [x > 0]
        calls += [(aten.index.Tensor, (x, at)) for at in places]
        calls += [(aten.conv2d.default, (x, torch.empty(4, 3, 3, 3, device="meta"), None, [2], [1], [1], 2))]
        calls += [(aten.conv1d.default, (x[0], torch.empty(4, 8, 3, device="meta"), None, [2], [1]))]
    ways = torch.empty(2, 1, 8, device="meta"), torch.empty(6, 1, device="meta")
    calls += [(op, ways) for op in (aten.sub.Tensor, aten.le.Tensor, aten.min.other)]
    calls += [(aten.where.self, (ways[0] > 0, ways[1], torch.empty(3, 1, 1, 1, device="meta")))]
    calls += [(aten.cumsum.default, (t, 1)) for t in (ids, ids > 0)] + [(aten.where.ScalarOther, (ids > 0, ids, 0.5))]
    calls += [(aten.linear.default, (torch.empty(3, 5, 8, device="meta")[:, 0], torch.empty(4, 8, device="meta")))]
    calls += [(op, (ids, 2)) for op in (aten.add.Tensor, aten.div.Tensor, aten.pow.Tensor_Scalar, aten.eq.Scalar)]
    calls += [(op, (ids, 0.5)) for op in (aten.add.Tensor, aten.mul.Tensor, aten.eq.Scalar)]
    calls += [
        (aten.add.Tensor, (ids, images[0][0, 0, 0, :5])),
        (aten.mul.Tensor, (ids > 0, 2)),
        (aten.arange.default, (7,)),
    ]
    calls += [
        (aten.__and__.Tensor, (ids > 0, ids[0] > 0)),
        (aten.embedding.default, (torch.empty(9, 4, device="meta"), ids)),
    ]
    return calls


def test_output_shapes_in_every_layout() -> None:
    answered = set()
    for function, args in operator_calls():
        mine = output_shapes.OUTPUT_SHAPES[function](*args)
        if mine is None:
            continue
        wanted = function(*args)
        answered.add(function)
        strides = [[s for n, s in zip(t.shape, t.stride(), strict=True) if n > 1] for t in (mine, wanted)]
        assert (mine.shape, mine.dtype, strides[0]) == (wanted.shape, wanted.dtype, strides[1]), (function, args)
    assert answered == {function for function, _ in operator_calls()}
