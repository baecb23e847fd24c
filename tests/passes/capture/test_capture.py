"""Capture and lift: the captured model is the model - its numbers, names, modes, inputs and outputs."""

import copy
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from nets import TiedWords
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import dyncompress as dc


class Small(nn.Module):
    """A bit of everything that lifts, with names worth keeping."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.drop = nn.Dropout(0.5)
        self.rnn = nn.LSTM(8, 6, 2, batch_first=True, dropout=0.3)
        self.norm = nn.LayerNorm(6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.stem(x)).flatten(2).transpose(1, 2)
        x, _ = self.rnn(x)
        return self.fc(self.norm(x[:, -1]))


@pytest.fixture
def captured() -> tuple[Small, torch.fx.GraphModule]:
    torch.manual_seed(0)
    model = Small()
    return model, dc.capture(model, torch.randn(2, 3, 6, 6))


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_equals_the_model_at_any_batch(captured: tuple, batch: int) -> None:
    model, gm = captured
    x = torch.randn(batch, 3, 6, 6)
    torch.testing.assert_close(gm.eval()(x), model.eval()(x))


def test_keeps_names_modules_and_modes(captured: tuple) -> None:
    model, gm = captured
    assert gm.training is model.training is True
    assert set(gm.state_dict()) == set(model.state_dict())
    for path, kind in {"stem.0": nn.Conv2d, "stem.1": nn.BatchNorm2d, "drop": nn.Dropout, "rnn": nn.LSTM}.items():
        assert type(gm.get_submodule(path)) is kind
    assert "(fc): Linear(in_features=6, out_features=5, bias=True)" in str(gm)
    assert not gm.eval().get_submodule("stem.1").training
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(gm.state_dict())


def test_batch_norm_and_dropout_follow_train_mode(captured: tuple) -> None:
    model, gm = captured
    x = torch.randn(64, 3, 6, 6)
    twin = copy.deepcopy(model).train()
    torch.manual_seed(1)
    expected = twin(x)
    torch.manual_seed(1)
    torch.testing.assert_close(gm.train()(x), expected)
    torch.testing.assert_close(gm.get_submodule("stem.1").running_mean, twin.stem[1].running_mean)
    assert not torch.equal(gm(x), gm(x)), "dropout is off in training mode"


def test_the_model_is_not_touched_and_shares_nothing(captured: tuple) -> None:
    model, gm = captured
    before = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.SGD(gm.parameters(), lr=1.0)
    gm(torch.randn(4, 3, 6, 6)).sum().backward()
    optimiser.step()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(torch.equal(a, b) for a, b in zip(gm.parameters(), model.parameters(), strict=True) if a.dim() > 1)


def test_sequence_length_of_a_recurrent_layer_stays_free() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rnn = nn.Embedding(20, 8), nn.GRU(8, 8, batch_first=True, bidirectional=True)

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            return self.rnn(self.embed(ids))

    model = Reader().eval()
    gm = dc.capture(model, torch.randint(0, 20, (2, 5)))
    ids = torch.randint(0, 20, (3, 11))
    torch.testing.assert_close(gm(ids), model(ids))


@dataclass
class Answer:
    logits: Tensor
    features: Tensor


pytree.register_dataclass(Answer)


class Many(nn.Module):
    """Several inputs, a structured output."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style, self.a, self.b = style, nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> object:
        z = self.a(x) + self.b(y)
        z = z if mask is None else z * mask
        if self.style == "dict":
            return {"logits": z, "features": (x, y)}
        return Answer(z, x) if self.style == "dataclass" else (z, [x, y])


@pytest.mark.parametrize("style", ["dict", "tuple", "dataclass"])
def test_tuple_inputs_and_structured_outputs(style: str) -> None:
    model = Many(style).eval()
    gm = dc.capture(model, (torch.randn(2, 4), torch.randn(2, 5)))
    x, y = torch.randn(7, 4), torch.randn(7, 5)
    expected, got = model(x, y), gm(x, y)
    assert type(got) is type(expected)
    torch.testing.assert_close(pytree.tree_leaves(got), pytree.tree_leaves(expected))


def test_keyword_inputs() -> None:
    model = Many("tuple").eval()
    gm = dc.capture(model, {"x": torch.randn(2, 4), "y": torch.randn(2, 5), "mask": torch.ones(2, 1)})
    call = {"x": torch.randn(3, 4), "y": torch.randn(3, 5), "mask": torch.rand(3, 1)}
    torch.testing.assert_close(gm(**call), model(**call))


def test_tied_parameters_stay_tied() -> None:
    gm = dc.capture(TiedWords(), torch.randint(0, 11, (2, 4)))
    assert gm.embed.weight is gm.head.weight
    assert {"embed.weight", "head.weight"} == set(gm.state_dict())


def test_frozen_batch_norm_does_not_wake_in_training_mode() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.rand(3) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)

    model, x = Frozen(), torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(dc.capture(model, x).train()(x), model(x))


def test_no_grad_blocks_and_factory_devices_are_inlined() -> None:
    class Position(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                at = torch.arange(x.shape[1], device=x.device, dtype=x.dtype).expand(x.shape[0], -1)
            return self.fc(x + at)

    model, x = Position(), torch.randn(3, 4)
    gm = dc.capture(model, x)
    torch.testing.assert_close(gm(x), model(x))
    assert "device(" not in gm.code, "a device baked in at capture keeps the model from moving"
    assert gm.to("meta")(x.to("meta")).device.type == "meta"


def test_buffers_that_are_not_saved_stay_so() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.inner.register_buffer("scale", torch.tensor(2.0), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.inner.scale + torch.tensor([1.0, 2.0])

    gm, x = dc.capture(Scaled(), torch.randn(2, 2)), torch.randn(5, 2)
    torch.testing.assert_close(gm(x), Scaled()(x))
    assert dict(gm.state_dict()) == {}


def test_in_place_writes_without_users_are_kept() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y[:, 0] = 7.0
            y[:, 1].add_(1)
            return y

    x = torch.randn(3, 4)
    torch.testing.assert_close(dc.capture(Writes(), x)(x), Writes()(x))


class Refused(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the refused line
            return x
        return -x


def test_what_export_refuses_names_the_users_line(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(dc.RequestError) as error:
        dc.capture(Refused(), torch.randn(2, 3))
    message = str(error.value)
    assert "test_capture.py:" in message and "if x.sum() > 0:" in message and "\n" not in message
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize(
    ("inputs", "said"), [((), "no tensor"), (torch.randn(0, 3), "0 samples"), ({"x": 3}, "no tensor")]
)
def test_bad_inputs(inputs: object, said: str) -> None:
    with pytest.raises(dc.RequestError, match=said):
        dc.capture(nn.Linear(3, 3), inputs)


def test_not_a_module() -> None:
    with pytest.raises(dc.RequestError, match="Module"):
        dc.capture(lambda x: x, torch.randn(2, 3))


def test_import_is_quick_and_takes_no_optional_framework() -> None:
    optional = ["torch", "timm", "torchvision", "transformers", "onnx", "accelerate", "matplotlib"]
    code = f"import dyncompress, sys; print([m for m in {optional} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_threads_may_call_a_captured_model_first() -> None:
    """Its code is written at the first call, whoever makes it."""
    model, x = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(60)]).eval(), torch.randn(2, 4)
    wanted, before = model(x), sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-6)
        for _ in range(10):
            gm, start = dc.capture(model, x), threading.Barrier(4)

            def first_call(gm: torch.fx.GraphModule = gm, start: threading.Barrier = start) -> Tensor:
                start.wait()
                return gm(x)

            with ThreadPoolExecutor(4) as pool:
                for answer in [pool.submit(first_call) for _ in range(4)]:
                    torch.testing.assert_close(answer.result(), wanted)
    finally:
        sys.setswitchinterval(before)
