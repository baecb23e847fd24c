"""Evaluation, latency and BatchNorm recalibration against loops over single samples and a simulated clock."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from dyncompress.compress.evaluation import wall_clock
from dyncompress.compress.evaluation.evaluate import collect_logits, evaluate
from dyncompress.compress.evaluation.wall_clock import latency_inputs, measure_latency
from dyncompress.compress.training.losses import cross_entropy, logits_of
from dyncompress.compress.training.recalibrate import recalibrate_batchnorm
from dyncompress.errors import RequestError
from dyncompress.passes.capture.capture import capture
from dyncompress.passes.exits.insert_exits import InsertExits
from dyncompress.runtime.predict.dynamic import DynamicModel
from dyncompress.runtime.predict.policy import ExitPolicy


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(16, 4))


def dynamic_network() -> DynamicModel:
    torch.manual_seed(1)
    gm = InsertExits(2)(capture(network(), torch.zeros(1, 8))).gm
    return DynamicModel(gm, ExitPolicy("max-softmax", (0.32, 0.3))).eval()


def samples(count: int = 50) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        3 * torch.randn(count, 8, generator=generator), torch.randint(0, 4, (count,), generator=generator)
    )


class Integers(Dataset):
    """(input, int label), as data sets usually give them."""

    def __init__(self, tensors: TensorDataset) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, y = self.tensors[index]
        return x, int(y)


def test_a_dynamic_model_equals_a_loop_over_samples() -> None:
    model, data = dynamic_network(), samples()
    result = evaluate(model, Integers(data), batch_size=7)
    index, right, macs = [], [], []
    for x, y in data:
        logits = model.all_logits(x.unsqueeze(0))
        exits = [k for k, t in enumerate(model.policy.thresholds) if logits[k].softmax(-1).max() >= t]
        index.append(exits[0] if exits else 2)
        right.append(bool(logits[index[-1]].argmax() == y))
        macs.append(model.exit_macs[index[-1]])
    assert len(set(index)) == 3  # the thresholds above use every exit
    assert result.samples == 50
    assert result.accuracy == pytest.approx(sum(right) / 50)
    assert result.mean_macs == pytest.approx(sum(macs) / 50)
    for k, use in enumerate(result.exits):
        here = [r for r, i in zip(right, index, strict=True) if i == k]
        assert use.share == pytest.approx(len(here) / 50)
        assert use.accuracy == pytest.approx(sum(here) / len(here))
        assert use.macs == model.exit_macs[k]
    assert [use.at for use in result.exits] == [*model.exits, "output"]


def test_exits_that_are_off_cost_and_answer_nothing() -> None:
    model = dynamic_network()
    model.policy = ExitPolicy.never(2)
    result = evaluate(model, samples())
    assert result.mean_macs == model.static_macs == result.exits[-1].macs
    assert [(use.share, use.accuracy is None) for use in result.exits[:-1]] == [(0, True), (0, True)]


def test_a_static_model_keeps_its_modes() -> None:
    model, data = network().train(), samples()
    model[3].eval()
    result = evaluate(model, data, batch_size=16)
    assert [m.training for m in model] == [True, True, True, False, True, True, True, True]
    model.eval()
    right = [bool(model(x.unsqueeze(0)).argmax() == y) for x, y in data]
    assert result.accuracy == pytest.approx(sum(right) / 50)
    assert result.mean_macs is None and result.exits == ()
    assert evaluate(capture(model, torch.zeros(1, 8)), data).mean_macs == 8 * 16 + 2 * 16 * 16 + 16 * 4


def test_collected_logits_are_every_exits() -> None:
    model, data = dynamic_network(), samples()
    logits, labels = collect_logits(model, data, batch_size=8)
    expected = model.all_logits(data.tensors[0])
    assert torch.equal(labels, data.tensors[1]) and len(logits) == 3
    for found, z in zip(logits, expected, strict=True):
        torch.testing.assert_close(found, z)
    (final,), _ = collect_logits(network(), data)
    torch.testing.assert_close(final, expected[-1])


def test_logits_in_structured_outputs() -> None:
    z, other = torch.zeros(3, 4), torch.zeros(3, 5, 6)
    for output in (z, {"logits": z, "loss": torch.zeros(3, 4)}, SimpleNamespace(logits=z), (z, other), [other, z]):
        assert logits_of(output) is z
    for output in ((z, z), {"hidden": other}):
        with pytest.raises(RequestError, match="logits"):
            logits_of(output)


def test_no_data() -> None:
    with pytest.raises(RequestError, match="empty"):
        evaluate(network(), samples(0))


# --- latency ---------------------------------------------------------------------------------------------------------


def test_latency_on_a_simulated_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = 0.0, []

    def model(name: str, seconds: list[float]) -> Any:
        def run(x: Tensor) -> None:
            nonlocal now
            calls.append(name)
            now += seconds[calls.count(name) - 1]

        return run

    monkeypatch.setattr(wall_clock, "perf_counter", lambda: now)
    # per input: one call to warm up, then three that count
    a = model("a", [99, 1, 2, 9] + [99, 4, 4, 9] + [99, 7, 7, 7] + [99, 8, 8, 8] + [99, 9, 9, 9])
    b = model("b", [50, 2, 1, 1] + [50, 3, 3, 3] + [50, 5, 5, 5] + [50, 6, 1, 6] + [50, 0, 7, 7])
    x = torch.zeros(1, 2)
    result = measure_latency({"a": a, "b": b}, {1: [x, x], 256: [x, x, x]}, repeats=3)
    assert result["a"] == pytest.approx({1: 1000 * (2 + 4) / 2, 256: 8000})
    assert result["b"] == pytest.approx({1: 1000 * (1 + 3) / 2, 256: 6000})
    assert calls == ["a", "b"] * 20


def test_latency_inputs_are_the_first_samples() -> None:
    data = samples(50)
    found = latency_inputs(data, {1: 3, 20: 4})
    assert {size: [len(x) for x in batches] for size, batches in found.items()} == {1: [1] * 3, 20: [20] * 4}
    torch.testing.assert_close(torch.cat(found[1]), data.tensors[0][:3])
    torch.testing.assert_close(torch.cat(found[20]), data.tensors[0].repeat(2, 1)[:80])


# --- BatchNorm -------------------------------------------------------------------------------------------------------


def test_batchnorm_statistics_are_the_plain_average_over_batches() -> None:
    data = samples(40)
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4), nn.BatchNorm1d(4, momentum=0.3)).train()
    model[3].eval()
    model[0].running_mean.fill_(7)
    recalibrate_batchnorm(model, data, batch_size=10, seed=1)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    groups = data.tensors[0][order].view(4, 10, 8)
    torch.testing.assert_close(model[0].running_mean, groups.mean(1).mean(0))
    torch.testing.assert_close(model[0].running_var, groups.var(1).mean(0))
    normalised = (groups - groups.mean(1, keepdim=True)) / (groups.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    hidden = model[2](normalised).detach()
    torch.testing.assert_close(model[3].running_mean, hidden.mean(1).mean(0), atol=1e-6, rtol=1e-5)
    assert [m.training for m in model] == [True, True, True, False]
    assert [model[0].momentum, model[3].momentum] == [0.1, 0.3]
    recalibrate_batchnorm(model, data, batches=2, batch_size=10, seed=1)
    torch.testing.assert_close(model[0].running_mean, groups[:2].mean(1).mean(0))


def test_a_model_without_batchnorm_is_left_alone() -> None:
    recalibrate_batchnorm(nn.Linear(8, 4), samples(0))


# --- labels per position ---------------------------------------------------------------------------------------------


class Tokens(Dataset):
    """(ids (5,), next ids (5,)), some of the latter -100."""

    def __init__(self, count: int = 9) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, 7, (count, 5), generator=generator)
        self.labels = torch.randint(0, 7, (count, 5), generator=generator)
        self.labels[:4, 2:] = -100

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.ids[index], self.labels[index]


def per_token() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 12), nn.Linear(12, 7))


def test_perplexity_and_accuracy_per_position_are_scikit_learns() -> None:
    model, data = per_token(), Tokens()
    result = evaluate(model, data, batch_size=4)
    known = data.labels != -100
    labels, probabilities = data.labels[known].numpy(), model(data.ids)[known].double().softmax(-1).detach().numpy()
    assert result.perplexity == pytest.approx(np.exp(log_loss(labels, probabilities, labels=range(7))))
    assert result.accuracy == pytest.approx(accuracy_score(labels, probabilities.argmax(1)))
    assert result.samples == 9


def test_the_loss_per_position_is_a_mean_over_what_counts() -> None:
    model, data = per_token(), Tokens()
    logits = model(data.ids)
    known = [(i, t) for i in range(9) for t in range(5) if data.labels[i, t] != -100]
    by_hand = sum(-logits[i, t].log_softmax(-1)[data.labels[i, t]] for i, t in known) / len(known)
    torch.testing.assert_close(cross_entropy(logits, data.labels), by_hand)
    torch.testing.assert_close(
        cross_entropy({"logits": logits[:, 0]}, data.labels[:, 0]),
        nn.CrossEntropyLoss()(logits[:, 0], data.labels[:, 0]),
    )


@pytest.mark.parametrize(
    ("shape", "labels", "message"),
    [
        ((2, 3, 4), torch.zeros(2, dtype=torch.long), r"per position, of logits .2, 3, 4.; got .* of shape .2,."),
        ((2, 4), torch.zeros(2, 3, dtype=torch.long), r"of shape .2, 3."),
        ((2, 4), torch.zeros(2), "float32"),
        ((2, 3, 4), torch.full((2, 3), 4), "label 4, but the model puts out 4 classes"),
        ((2, 3, 4), torch.full((2, 3), -1), "label -1"),
        ((2, 3, 4), torch.full((2, 3), -100), "every label of a batch is -100"),
    ],
)  # fmt: skip
def test_labels_that_do_not_fit(shape: tuple[int, ...], labels: Tensor, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        cross_entropy(torch.zeros(shape), labels)


def test_evaluation_refuses_labels_that_do_not_fit() -> None:
    class Fixed(Tokens):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return self.ids[index], torch.full((5,), self.label) if self.label else torch.tensor(0)

    data = Fixed()
    for data.label, message in {7: "label 7", -100: "counts for nothing", 0: "per position, of logits"}.items():
        with pytest.raises(RequestError, match=message):
            evaluate(per_token(), data)
