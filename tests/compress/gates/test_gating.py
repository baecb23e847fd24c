"""dc.gate: from a trained static network and data to one that skips branches."""

from pathlib import Path

import pytest
import torch
from data import text_batch
from dynamic_models import gated
from flat_options import flat
from nets import ResNet, Text, Vit
from torch import Tensor, nn
from torch.utils.data import Dataset

import dyncompress as dc
from dyncompress.compress.gates import gate as gating
from dyncompress.compress.gates.gate_report import meet_budget
from dyncompress.passes.graph.cost import count_macs

pytestmark = pytest.mark.filterwarnings("ignore:the .* gates cost")  # the models are tiny


class Halves(Dataset[tuple[Tensor, int]]):
    """Which half of the image is brighter; some are easy and some are hard."""

    def __init__(self, count: int = 320, size: int = 8) -> None:
        generator = torch.Generator().manual_seed(1)
        self.labels = torch.randint(0, 2, (count,), generator=generator)
        self.images = torch.randn(count, 3, size, size, generator=generator)
        strength = torch.rand(count, generator=generator)
        for image, label, s in zip(self.images, self.labels, strength, strict=True):
            image[:, : size // 2] += s * (2 * label - 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.images[i], int(self.labels[i])


OPTIONS = {"epochs": 2, "batch_size": 32, "progress": False, "lr": 5e-3, "settle": 0}


@pytest.fixture(scope="module")
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ResNet(4).eval()


@pytest.mark.parametrize("kind", gating.GATE_KINDS)
def test_a_budget_is_met_and_skipped(net: nn.Module, kind: str) -> None:
    """What was asked for is what the calibration set costs, and what is reported is what evaluation finds."""
    data = Halves()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    dyn = flat(dc.gate)(net, data=data, kind=kind, macs=0.7, **OPTIONS)
    whole = count_macs(dc.capture(net, data[0][0][None]))
    report = dyn.trunk.meta["info"]["gate"]
    assert 0.3 < report["macs"] <= 0.75  # below where gates that are all alike flip at once
    assert (
        len(report["open"]) == len(dyn.gates) == 4 and len(report["by_class"]) == 10 and len(report["by_hardness"]) == 4
    )
    found = dc.evaluate(dyn, data)
    assert found.mean_macs is not None and abs(found.mean_macs / whole - report["macs"]) < 0.1
    assert not dyn.training and all(torch.equal(before[n], v) for n, v in net.state_dict().items())
    assert [h["epoch"] for h in report["history"]] == [1, 2] and abs(report["moved"]) < 16


@pytest.mark.parametrize("settle", [0.01, 0.3])
def test_gates_that_decide_alike_leave(net: nn.Module, settle: float) -> None:
    """By hand: the rates on the calibration set, and the same training with every gate left in."""
    data = Halves(128)

    class Both:
        train, calibration = data, data

    every = flat(dc.gate)(net, data=Both(), rate=0.7, **OPTIONS)
    some = flat(dc.gate)(net, data=Both(), rate=0.7, **{**OPTIONS, "settle": settle})
    opened = every.predict(data.images).gates.double()
    rates, settled = opened.mean(0).tolist(), some.trunk.meta["info"]["gate"]["settled"]
    varied = max(range(4), key=lambda k: min(rates[k], 1 - rates[k]))
    always = [k for k in range(4) if rates[k] >= 1 - settle and k != varied]
    never = [k for k in range(4) if rates[k] <= settle and k != varied]
    assert always and settled == {
        how: [every.gates[k] for k in ks] for how, ks in (("always", always), ("never", never))
    }
    assert some.gates == [b for b in every.gates if b not in settled["always"] + settled["never"]]
    alike = ((opened[:, always] == 1).all(1) & (opened[:, never] == 0).all(1)).nonzero().flatten()
    same = data.images[alike]
    torch.testing.assert_close(some.predict(same).logits, every.predict(same).logits, rtol=1e-4, atol=1e-5)
    spent = dc.evaluate(some, data).mean_macs
    report = some.trunk.meta["info"]["gate"]
    assert spent == pytest.approx(report["macs"] * count_macs(dc.capture(net, data.images[:1])))


def test_hardness_goes_from_sure_to_unsure(net: nn.Module) -> None:
    """By hand: the quarters of the calibration set by the static model's largest probability."""
    data = Halves(64)

    class Both:
        train, calibration = data, data

    dyn = flat(dc.gate)(net, data=Both(), macs=0.7, **OPTIONS)
    sure = net(data.images).softmax(-1).amax(-1).argsort(descending=True)
    opened = dyn.predict(data.images).gates.float()
    expected = torch.stack([opened[sure[i : i + 16]].mean(0) for i in range(0, 64, 16)])
    torch.testing.assert_close(torch.tensor(dyn.trunk.meta["info"]["gate"]["by_hardness"]), expected)


@pytest.mark.parametrize(
    ("kind", "pretrain"), [("gumbel", True), ("skipnet", True), ("skipnet", False), ("blockdrop", True)]
)
def test_an_interrupted_run_goes_on_to_the_same_weights(
    net: nn.Module, kind: str, pretrain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Halves(128)
    options = {**OPTIONS, "data": data, "kind": kind, "macs": 0.7, "pretrain": pretrain, "epochs": 4, "device": "cpu"}
    straight = flat(dc.gate)(net, **options)

    class Interrupting(Halves):
        left = 250  # samples read before Ctrl-C: in the third epoch

        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            Interrupting.left -= 1
            if Interrupting.left == 0:
                raise KeyboardInterrupt
            return super().__getitem__(i)

    with pytest.raises(KeyboardInterrupt, match="continue"):
        flat(dc.gate)(net, **{**options, "data": Interrupting(128)}, run_dir=tmp_path / "run")
    again = flat(dc.gate)(net, **options, run_dir=tmp_path / "run", resume=True)
    for (name, a), (_, b) in zip(straight.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_the_curriculum_leaves_the_model_alone(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """BlockDrop's first phase moves the policy only, and its first steps may drop the last branch only."""
    seen: list[tuple[int, dict[str, Tensor]]] = []
    train = gating.train_gates

    def watched(gm, work, *args):
        decided = []
        work.decide.register_forward_hook(lambda m, a, out: decided.append((a[1], float(out.detach().min()))))
        made = train(gm, work, *args)
        weights = {n: v.clone() for n, v in gm.state_dict().items() if not n.startswith("gates.")}
        seen.append((decided[:4], weights))
        return made

    monkeypatch.setattr(gating, "train_gates", watched)
    gm = dc.capture(net, Halves(2).images)
    flat(dc.gate)(net, data=Halves(), kind="blockdrop", macs=0.7, **{**OPTIONS, "epochs": 2})
    (first, after_one), (_, after_two) = seen
    assert all(lowest == 1 for k, lowest in first if k < 3)
    assert all(torch.equal(v, after_one[n]) for n, v in gm.state_dict().items())
    assert not all(torch.equal(v, after_two[n]) for n, v in gm.state_dict().items())


def test_rates_of_transformers() -> None:
    """ConvNet-AIG's target is the rate of every branch."""
    torch.manual_seed(0)
    data = Halves(480, 16)
    dyn = flat(dc.gate)(Vit(16, 2).eval(), data=data, rate=0.5, **{**OPTIONS, "epochs": 8, "lr": 2e-2})
    assert abs(sum(dyn.trunk.meta["info"]["gate"]["open"]) / 4 - 0.5) < 0.25


class Sentences(Dataset[tuple[dict[str, Tensor], int]]):
    def __init__(self) -> None:
        torch.manual_seed(2)
        self.batch = text_batch(96)

    def __len__(self) -> int:
        return 96

    def __getitem__(self, i: int) -> tuple[dict[str, Tensor], int]:
        return {name: value[i] for name, value in self.batch.items()}, int(self.batch["input_ids"][i, 0] > 25)


def test_text_with_masks() -> None:
    torch.manual_seed(0)
    dyn = flat(dc.gate)(Text().eval(), data=Sentences(), kind="skipnet", macs=0.8, **OPTIONS)
    assert len(dyn.gates) == 6 and dc.evaluate(dyn, Sentences()).mean_macs < dyn.static_macs


def test_a_budget_by_moving_all_gates(net: nn.Module) -> None:
    """The mean MACs of the samples, wherever the gates stood before."""
    data, dyn = Halves(512, 16), gated("resnet")
    for share in (0.9, 0.6):
        target = share * dyn.static_macs
        meet_budget(dyn, data, target, torch.device("cpu"))
        costs = dyn.predict(data.images).macs.double().mean()
        assert 0.93 * target < costs <= 1.005 * target
    with pytest.raises(dc.RequestError, match="with every gate closed"):
        meet_budget(dyn, data, 1.0, torch.device("cpu"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "dropout", "macs": 0.5}, "use one of gumbel, skipnet, blockdrop"),
        ({}, "give either macs or rate"),
        ({"macs": 0.5, "rate": 0.5}, "give either macs or rate"),
        ({"kind": "skipnet", "rate": 0.5}, 'rate needs kind="gumbel"'),
        ({"macs": 1.2}, "give a share between 0 and 1"),
        ({"macs": 0.5, "distill": 2}, "give a share from 0 to 1"),
        ({"macs": 0.5, "settle": 0.5}, "settle=0.5: give a share of the samples below 0.5"),
        ({"macs": 0.5, "trunk_lr": 0}, "give a positive share of lr"),
        ({"macs": 0.5, "pretrain": False}, 'pretrain goes with kind="skipnet" only'),
        ({"macs": 0.5, "kind": "skipnet", "epochs": 1}, "give at least 2"),
        ({"macs": 0.01}, "what cannot be skipped costs"),
        ({"macs": 0.5, "gate": "maxout"}, "use one of pooled"),
    ],
)
def test_wrong_requests(net: nn.Module, wrong: dict, message: str) -> None:
    with pytest.raises(dc.RequestError, match=message):
        flat(dc.gate)(net, data=Halves(64), **{**OPTIONS, **wrong})


def test_models_and_data_that_do_not_do() -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 2))
    with pytest.raises(dc.RequestError, match="no residual branch"):
        flat(dc.gate)(plain, data=Halves(64), macs=0.5, **OPTIONS)
    with pytest.raises(dc.RequestError, match="empty"):
        flat(dc.gate)(ResNet(4).eval(), data=Halves(0), macs=0.5, **OPTIONS)
