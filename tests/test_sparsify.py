"""Learned sparsity: targets, surgery held to the mask, exact resumption, controls, several processes."""

import copy
import json
import os
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dyncompress as dc
from dyncompress.cli.app import run
from dyncompress.compress.losses import cross_entropy
from dyncompress.compress.rewind import reinit, rewind
from dyncompress.compress.surgery import carry_over, operate
from dyncompress.model_zoo.data import ArrayDataset, Splits
from dyncompress.passes.cost import count_macs, count_parameters
from dyncompress.passes.modes import evaluating


class Net(nn.Module):
    """Images (B, 1, 8, 8) in 3 classes: two residual branches on one width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(12, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10), nn.ReLU(),
                nn.Conv2d(10, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12),
            )
            for _ in range(2)
        )  # fmt: skip
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.mean((2, 3)))


class Words(nn.Module):
    """Next tokens (B, T, 11): an embedding, an LSTM and a LayerNorm, whose count is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(11, 8), nn.LSTM(8, 12, batch_first=True)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.lstm(self.embed(x))[0]))


def images(count: int = 192) -> TensorDataset:
    """Stripes along rows, along columns, or neither, in noise."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 3
    stripes = (torch.arange(8) % 2).float()
    patterns = torch.stack([stripes[:, None].expand(8, 8), stripes.expand(8, 8), torch.full((8, 8), 0.5)])
    return TensorDataset(patterns[y][:, None] + 0.2 * torch.randn(count, 1, 8, 8, generator=generator), y)


def sentences(count: int = 320) -> TensorDataset:
    """Counting modulo 11 from anywhere, labelled with the next number at every position."""
    start = torch.arange(count)[:, None] + torch.arange(10)
    return TensorDataset(start[:, :-1] % 11, start[:, 1:] % 11)


def network(kind: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    return kind()


OPTIONS: dict[str, Any] = {"epochs": 4, "finetune": 2, "batch_size": 32, "lr": 1e-2, "device": "cpu"}


def same(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    x, y = data.tensors
    return float((model.eval()(x).argmax(-1) == y).double().mean())


@pytest.mark.parametrize(
    ("change", "count"),
    [
        ({"macs": 0.5}, count_macs),
        ({"params": 0.4, "kinds": ("channels",)}, count_parameters),
        ({"macs": 0.6, "kinds": ("axes", "layers", "filters"), "ema": 0.9}, count_macs),
        ({"macs": 0.5, "optimizer": partial(torch.optim.SGD, momentum=0.9), "lr": 0.05}, count_macs),
        ({"macs": 0.7, "epochs": 1, "finetune": 0, "lr": 1e-4}, count_macs),  # too short to learn anything: all is cut
    ],
)
def test_targets_are_met(change: dict[str, Any], count: Any) -> None:
    data, model = images(), network()
    gm = dc.capture(model, data.tensors[0][:2])
    before = copy.deepcopy(gm.state_dict())
    small = dc.sparsify(gm, data, **OPTIONS | change)
    report = small.meta["info"]["sparsify"]
    target = change.get("macs") or change["params"]
    assert report["left"] == pytest.approx(count(small) / count(gm))
    assert report["left"] <= target and report["learned"] >= report["left"]
    assert all(s["difference"] <= 1e-5 for s in report["surgeries"])
    if change.get("epochs") == 1:
        assert report["learned"] == 1.0 and report["left"] > target - 0.1
    else:
        assert report["learned"] < 1 and accuracy(small, data) > 0.9
    assert all(torch.equal(before[name], tensor) for name, tensor in gm.state_dict().items())


def test_every_surgery_equals_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    from dyncompress.compress import sparsifier

    seen = []

    def compared(gm: torch.fx.GraphModule, keep: Any, **options: Any) -> Any:
        surgery = operate(gm, keep, **options)
        x = data.tensors[0][:8]
        with torch.no_grad(), evaluating(surgery.model):
            expected, ours = dc.mask(gm, keep).eval()(x), surgery.model(x)
        seen.append(float((expected - ours).abs().max() / expected.abs().max()))
        zeroed = dict(dc.mask(gm, keep).named_parameters())
        learned.append(all(torch.equal(p, zeroed[name]) for name, p in gm.named_parameters()))
        return surgery

    monkeypatch.setattr(sparsifier, "operate", compared)
    for kind, data, kinds in ((Net, images(), ("axes", "layers")), (Words, sentences(), ("axes",))):
        learned: list[bool] = []
        dc.sparsify(network(kind), data, params=0.5, shrink_every=1, kinds=kinds, **OPTIONS)
        assert learned and learned[0]  # what lasso zeroed, not what the surgery zeroes
    assert max(seen) < 1e-5


def test_language_models_and_strength_by_hand() -> None:
    data = sentences()
    model = network(Words)
    weak = dc.sparsify(model, data, strength=0.2, **OPTIONS)
    strong = dc.sparsify(model, data, strength=4.0, kinds=("hidden states",), floor=0.25, **OPTIONS)
    assert count_parameters(strong) < count_parameters(weak) <= count_parameters(model)
    assert strong.embed.embedding_dim == 8 and strong.lstm.hidden_size == 3  # as its floor says
    assert {s["strength"] for s in strong.meta["info"]["sparsify"]["surgeries"]} == {4.0}
    assert accuracy(weak, data) > 0.9


def test_strength_from_the_first_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    from dyncompress.compress.group_lasso import GroupLasso
    from dyncompress.compress.sparsifier import Sparsifier

    steps: list[float] = []
    monkeypatch.setattr(GroupLasso, "proximal_", lambda self, step: steps.append(step) or ~self.live)
    found: list[float] = []

    class Watched(Sparsifier):
        def after_step(self, step: int) -> None:
            penalty = float(self.lasso.penalty().detach())
            super().after_step(step)
            if step == 0:
                found.append(self.strength * penalty / float(self._first_loss))  # type: ignore[arg-type]

    monkeypatch.setattr("dyncompress.compress.sparsify.Sparsifier", Watched)
    dc.sparsify(network(), images(), penalty_ratio=0.2, **OPTIONS)
    assert found == [pytest.approx(0.2)] and len(steps) == 4 * 6 and min(steps) > 0


@pytest.mark.parametrize("make", [torch.optim.Adam, partial(torch.optim.SGD, momentum=0.9), torch.optim.RMSprop])
def test_training_goes_on_after_surgery_as_if_the_zeros_were_still_there(make: Any) -> None:
    """Groups of zeros get no gradient: the steps of the small model are those of the large one, moments and all."""
    x, y = images(32).tensors[0].double(), images(32).tensors[1]
    whole = dc.capture(network().double(), x[:2])
    keep = {"stem.weight:0": [0, 2, 3, 7, 8, 9, 11], "blocks.0.0.weight:0": [1, 2, 5], "blocks.1.0.weight:0": [0, 9]}

    def trained(cut: bool) -> Any:
        model: Any = dc.mask(whole, keep).train()
        rest = [p for name, p in model.named_parameters() if name != "head.bias"]
        optimizer = make([{"params": rest}, {"params": [model.head.bias], "lr": 3e-3}], lr=1e-2)
        for step in range(6):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if step == 2 and cut:
                surgery = operate(model, keep)
                carry_over(optimizer, model, surgery)
                model = surgery.model
        return model

    large, small = trained(cut=False), trained(cut=True)
    scheme = dc.plan(whole, keep)
    assert small.stem.out_channels == 7 and not torch.equal(small.head.bias, whole.head.bias)
    for name, expected in scheme(large.state_dict()).items():
        torch.testing.assert_close(small.state_dict()[name], expected, rtol=1e-8, atol=1e-11)


def test_an_optimiser_whose_state_has_no_slices_is_refused() -> None:
    gm = dc.capture(network(), images().tensors[0][:2]).train()
    optimizer = torch.optim.Adafactor(gm.parameters())
    gm(images().tensors[0][:4]).sum().backward()
    optimizer.step()
    with pytest.raises(dc.RequestError, match="cannot be sliced"):
        carry_over(optimizer, gm, operate(gm, {"stem.weight:0": [0, 1]}))


def test_controls() -> None:
    data = images()
    early = dc.capture(network(), data.tensors[0][:2])
    small = dc.sparsify(early, data, macs=0.5, kinds=("axes", "layers"), **OPTIONS)
    kept = {name: a["kept"] for name, a in small.meta["info"]["sparsify"]["kept"].items() if a["kept"]}
    ticket = rewind(small, early)
    rows, columns = kept["blocks.0.0.weight:0"], kept["stem.weight:0"]
    assert torch.equal(
        ticket.get_parameter("blocks.0.0.weight"), early.get_parameter("blocks.0.0.weight")[rows][:, columns]
    )
    assert torch.equal(ticket.head.bias, early.head.bias) and not torch.equal(ticket.head.bias, small.head.bias)
    one, two, three = reinit(small), reinit(small), reinit(small, seed=1)
    assert same(one, two) and not same(one, three) and not same(one, ticket)
    assert all(a.shape == b.shape for a, b in zip(one.parameters(), small.parameters(), strict=True))
    bound = one.stem.weight[0].numel() ** -0.5
    assert one.stem.weight.abs().max() <= bound < 1.2 * one.stem.weight.abs().max()
    with pytest.raises(dc.RequestError, match="no report"):
        rewind(early, early)


def interrupted(step: int, error: type[BaseException]) -> Any:
    """The loss, until some step."""
    seen = iter(range(10**6))

    def loss(output: Any, labels: Tensor) -> Tensor:
        if next(seen) == step:
            raise error
        return cross_entropy(output, labels)

    return loss


RESUMED: dict[str, Any] = OPTIONS | {"shrink_every": 1, "ema": 0.9, "macs": 0.3, "epochs": 8, "lr": 5e-3}


STEPS = 6  # per epoch


@pytest.fixture(scope="module")
def whole() -> Any:
    """The run that nothing interrupts."""
    torch.set_num_threads(1)
    return dc.sparsify(network(), images(), **RESUMED)


def test_an_interrupted_run_resumes_bit_for_bit(tmp_path: Path, whole: Any) -> None:
    first, *_, last = (s["epoch"] for s in whole.meta["info"]["sparsify"]["surgeries"])
    assert first < last
    for after in (first, last):
        step, folder = after * STEPS + 2, tmp_path / str(after)
        with pytest.raises(KeyboardInterrupt, match="continue with resume"):
            loss = interrupted(step, KeyboardInterrupt)
            dc.sparsify(network(), images(), loss_fn=loss, run_dir=folder, **RESUMED)
        torch.manual_seed(99)
        again = dc.sparsify(network(), images(), run_dir=folder, resume=True, **RESUMED)
        assert same(again, whole)
        assert again.meta["info"]["sparsify"] == whole.meta["info"]["sparsify"]
    with pytest.raises(dc.RequestError, match="has target"):
        dc.sparsify(network(), images(), run_dir=folder, resume=True, **RESUMED | {"macs": 0.4})


def begun(code: str, **environment: str) -> subprocess.Popen[str]:
    """Runs code that begins with this file's names, in a process of its own."""
    text = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_sparsify import *\n{code}"
    own = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.Popen([sys.executable, "-c", text], stderr=subprocess.PIPE, text=True, env=own)


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, whole: Any) -> None:
    first = whole.meta["info"]["sparsify"]["surgeries"][0]["epoch"]
    code = f"""
def loss(output, labels, seen=iter(range(10**6))):
    if next(seen) == {first * STEPS + 3}:
        os.kill(os.getpid(), signal.SIGKILL)
    return cross_entropy(output, labels)
torch.set_num_threads(1)
dc.sparsify(network(), images(), loss_fn=loss, run_dir={str(tmp_path)!r}, **RESUMED)
"""
    with begun(code) as process:
        process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    again = dc.sparsify(network(), images(), run_dir=tmp_path, resume=True, **RESUMED)
    assert same(again, whole)


def test_two_processes_make_the_same_model(tmp_path: Path) -> None:
    code = f"""
torch.set_num_threads(1)
small = dc.sparsify(network(), images(), **OPTIONS | {{"batch_size": 16, "macs": 0.5, "kinds": ("axes", "layers")}})
assert small.meta["info"]["sparsify"]["surgeries"] and torch.distributed.get_world_size() == 2
torch.save(dict(small.named_parameters()), {str(tmp_path)!r} + "/" + os.environ["RANK"])
"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    started = [begun(code, RANK=rank, LOCAL_RANK=rank, **shared) for rank in "01"]
    for process in started:
        with process:
            _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said[-2000:]
    one, two = (torch.load(tmp_path / rank) for rank in "01")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_bf16() -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    try:
        small = dc.sparsify(network(), images(), macs=0.5, mixed_precision="bf16", **OPTIONS)
        report = small.meta["info"]["sparsify"]
        assert report["left"] <= 0.5 and report["learned"] < 1 and accuracy(small, images()) > 0.9
        assert {p.dtype for p in small.parameters()} == {torch.float32}
    finally:
        AcceleratorState._reset_state(True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "exactly one of macs, params, strength, penalty_ratio"),
        ({"macs": 0.5, "strength": 0.1}, "exactly one"),
        ({"macs": 1.5}, "at most 1"),
        ({"macs": 0.01, "floor": 0.5}, "out of reach"),
        ({"macs": 0.5, "kinds": ("filters",)}, "taken out"),
        ({"macs": 0.5, "kinds": ("rows",)}, "unknown kind"),
        ({"macs": 0.5, "ignore": ("nope",)}, "nope"),
        ({"strength": 0.0}, "strength is 0.0"),
        ({"penalty_ratio": -1.0}, "penalty_ratio"),
        ({"macs": 0.5, "epochs": 0}, "epochs"),
        ({"macs": 0.5, "finetune": -1}, "finetune"),
        ({"macs": 0.5, "shrink_every": 0}, "shrink_every"),
        ({"macs": 0.5, "ema": 1.0}, "ema"),
        ({"macs": 0.5, "resume": True}, "run_dir"),
    ],
)
def test_wrong_requests(change: dict[str, Any], said: str) -> None:
    with pytest.raises(dc.RequestError, match=said):
        dc.sparsify(network(), images(8), **change)


def make_net() -> nn.Module:
    return network()


def make_data() -> Splits:
    train, calibration, test = (ArrayDataset(*images(count).tensors) for count in (192, 30, 60))
    return Splits(train, calibration, test, classes=3, name="stripes")


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    command = f"sparsify {__name__}:make_net --macs 0.5 --epochs 4 --lr 0.01 --batch-size 32 --device cpu".split()
    source = ["--data", f"{__name__}:make_data", "--kinds", "axes", "--kinds", "layers"]
    assert run([*command, *source, "--finetune", "2", "--out", "small", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    static, small = report["static"], report["sparsified"]
    done = report["sparsify"]
    assert small["macs"] <= 0.5 * static["macs"] and small["parameters"] < static["parameters"]
    assert done["left"] == pytest.approx(small["macs"] / static["macs"]) and done["kinds"] == ["axes", "layers"]
    assert {"layers.csv", "kept.png", "recipe.yaml"} <= {path.name for path in Path("small").iterdir()}
    weights = dc.load(report["model"]).state_dict()
    recipe = [str(Path("small/recipe.yaml")), "--out", "again", "--json", "--set", "seed=0"]
    assert run(["run", *recipe]) == 0
    again = json.loads(capsys.readouterr().out)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in dc.load(again["model"]).state_dict().items())
    assert run([*command, *source, "--out", "shown", "--finetune", "1"]) == 0
    assert "groups" in capsys.readouterr().out
    assert run(command) == 2
    assert "--data" in capsys.readouterr().err
