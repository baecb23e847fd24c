"""Importances against formulas worked out by hand, plain loops over samples, and requests that cannot be met."""

import pytest
import torch
from nets import TiedWords
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dyncompress as dc
from dyncompress.compress.importance import weights
from dyncompress.compress.importance.gradients import FISHER_SAMPLES
from dyncompress.compress.importance.scores import COMPARABLE, IMPORTANCES, NEED_DATA, Context, score_axes

AXIS = "a.weight:0"  # rows of a and its bias, the norm's scale and shift, columns of b


class Net(nn.Module):
    """Images (B, 2, 4, 4) in 3 classes; one axis with a norm, one without, a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 1)
        self.inner, self.outer, self.head = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(F.relu(self.norm(self.a(x)))).mean((2, 3))
        return self.head(x + self.outer(torch.tanh(self.inner(x))))


@pytest.fixture
def gm() -> fx.GraphModule:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Net().double()
    for p in model.parameters():
        nn.init.normal_(p)
    model.norm.running_var.uniform_(0.5, 2)
    return dc.capture(model.eval(), torch.randn(2, 2, 4, 4).double())


@pytest.fixture
def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(40, 2, 4, 4, generator=generator).double(), torch.arange(40) % 3)


def groups(gm: fx.GraphModule) -> list[Tensor]:
    """All numbers of each index of AXIS, as one vector each."""
    pieces = [(gm.a.weight, 0), (gm.a.bias, 0), (gm.norm.weight, 0), (gm.norm.bias, 0), (gm.b.weight, 1)]
    return [torch.cat([w.detach().select(dim, i).flatten() for w, dim in pieces]) for i in range(5)]


def scores(name: str, gm: fx.GraphModule, context: Context | None = None) -> dict[str, Tensor]:
    return score_axes(gm, dc.infer_axes(gm).prunable, name, context or Context())


def test_formulas_of_the_weights_by_hand(gm: fx.GraphModule) -> None:
    vectors = groups(gm)
    torch.testing.assert_close(scores("l1", gm)[AXIS], torch.stack([v.abs().sum() for v in vectors]))
    torch.testing.assert_close(scores("l2", gm)[AXIS], torch.stack([v.norm() for v in vectors]))
    distances = [sum(((v - w) ** 2).sum().sqrt() for w in vectors) for v in vectors]
    torch.testing.assert_close(scores("geometric-median", gm)[AXIS], torch.stack(distances))  # type: ignore[arg-type]
    energies = [float((v * v).sum()) for v in vectors]
    lamp = [e / sum(other for other in energies if other >= e) for e in energies]
    torch.testing.assert_close(scores("lamp", gm)[AXIS], torch.tensor(lamp).double())


def test_lamp_with_ties_and_zeros() -> None:
    energies = torch.tensor([0.0, 2.0, 4.0, 2.0, 0.0]).double()
    expected = torch.tensor([0, 2 / 8, 4 / 4, 2 / 8, 0]).double()
    torch.testing.assert_close(weights._lamp(energies), expected)


def test_batchnorm_scales_where_there_are_some(gm: fx.GraphModule) -> None:
    found = scores("bn-scale", gm)
    torch.testing.assert_close(found[AXIS], gm.norm.weight.detach().abs())
    inner = torch.cat([gm.inner.weight, gm.inner.bias[:, None], gm.outer.weight.T], 1).norm(dim=1)
    torch.testing.assert_close(found["inner.weight:0"], inner.detach())  # no norm there: L2


def test_batchnorm_scales_of_a_functional_norm() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
            self.gamma, self.beta = nn.Parameter(torch.tensor([3.0, -1, 0, 2])), nn.Parameter(torch.zeros(4))
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("var", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.batch_norm(self.first(x), self.mean, self.var, self.gamma, self.beta))

    (found,) = scores("bn-scale", dc.capture(Functional(), torch.randn(2, 3))).values()
    assert found.tolist() == [3, 1, 0, 2]


def test_models_without_batchnorm_have_no_scales() -> None:
    plain = dc.capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3))
    with pytest.raises(dc.RequestError, match="needs BatchNorm"):
        scores("bn-scale", plain)


def test_gradients_by_a_loop_over_samples(gm: fx.GraphModule, data: TensorDataset) -> None:
    fisher, slope = torch.zeros(5).double(), torch.zeros(5).double()
    inputs, labels = data.tensors
    pieces = [(gm.a.weight, 0), (gm.a.bias, 0), (gm.norm.weight, 0), (gm.norm.bias, 0), (gm.b.weight, 1)]
    for n in range(40):
        loss = F.cross_entropy(gm(inputs[n : n + 1]), labels[n : n + 1])
        gradients = torch.autograd.grad(loss, [w for w, _ in pieces])
        for (w, dim), g in zip(pieces, gradients, strict=True):
            for i in range(5):
                product = (w.select(dim, i) * g.select(dim, i)).detach()
                fisher[i] += 0.5 * (product**2).sum() / 40
                slope[i] += product.sum() / 40
    context = Context(data, batch_size=16)  # 16, 16 and 8: the last batch must not weigh more
    torch.testing.assert_close(scores("taylor", gm, context)[AXIS], slope.abs())
    torch.testing.assert_close(scores("hessian", gm, context)[AXIS], fisher)
    assert all(p.grad is None for p in gm.parameters())


def test_frozen_weights_have_a_slope_too(gm: fx.GraphModule, data: TensorDataset) -> None:
    free = scores("taylor", gm, Context(data))[AXIS]
    gm.requires_grad_(False)
    gm.head.bias.grad = torch.ones(3).double()
    torch.testing.assert_close(scores("taylor", gm, Context(data))[AXIS], free)
    assert not gm.a.weight.requires_grad and gm.a.weight.grad is None
    assert gm.head.bias.grad.tolist() == [1, 1, 1]  # the user's own stays


def test_activations_by_hand(gm: fx.GraphModule, data: TensorDataset) -> None:
    x = data.tensors[0]
    with torch.no_grad():
        values = [gm.a(x)]
        values += [gm.norm(values[-1]), F.relu(gm.norm(values[-1]))]
        shares = [v.abs().mean((0, 2, 3)) for v in values]
        trunk = gm.b(values[-1]).mean((2, 3))
        branch = gm.outer(torch.tanh(gm.inner(trunk)))
    expected = torch.stack([s / s.mean() for s in shares]).mean(0)
    found = scores("activation", gm, Context(data, batch_size=16))
    torch.testing.assert_close(found[AXIS], expected)
    (name,) = (axis.name for axis in dc.infer_axes(gm) if axis.kind == "branch")
    torch.testing.assert_close(found[name][0], branch.abs().sum() / trunk.abs().sum())


def test_hidden_states_and_heads_have_activations() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 5, num_layers=2, batch_first=True), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0].select(1, -1))

    torch.manual_seed(0)
    gm = dc.capture(Sequence().eval(), torch.randn(2, 4, 3))
    x = torch.randn(12, 4, 3)
    found = scores("activation", gm, Context(TensorDataset(x, torch.arange(12) % 2)))
    lower, upper = (found[f"lstm.weight_ih_l{layer}:0.1"] for layer in (0, 1))
    with torch.no_grad():
        states = gm.lstm(x)[0]
    values = [states, states[:, -1]]  # what the graph shows
    shares = [v.abs().flatten(0, -2).mean(0) for v in values]
    torch.testing.assert_close(upper.float(), torch.stack([s / s.mean() for s in shares]).mean(0))
    own = [w.detach() for w in (*gm.lstm.all_weights[0], gm.lstm.all_weights[1][0])]  # no tensor shows the lower layer
    rows = [w.unflatten(0, (4, 5)).movedim(1, 0).flatten(1) for w in own[:4]]
    energy = sum((r**2).sum(1) for r in (*rows, own[1].T, own[4].T))
    torch.testing.assert_close(lower.float(), energy.sqrt())


def test_random_scores_follow_the_seed(gm: fx.GraphModule) -> None:
    first, again, other = (scores("random", gm, Context(seed=seed))[AXIS] for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (first >= 0).all() and (first <= 1).all()


def test_shared_weights_count_once() -> None:
    gm = dc.capture(TiedWords(), torch.ones(2, 3, dtype=torch.int64))
    (found,) = scores("l2", gm).values()
    torch.testing.assert_close(found.float(), gm.embed.weight.detach().norm(dim=0))


@pytest.mark.parametrize("name", list(IMPORTANCES))
def test_all_rank_every_axis_and_leave_the_model_alone(name: str, gm: fx.GraphModule, data: TensorDataset) -> None:
    before = {key: value.clone() for key, value in gm.state_dict().items()}
    gm.train()
    found = scores(name, gm, Context(data))
    for axis in dc.infer_axes(gm).prunable:
        assert found[axis.name].shape == (axis.size,)
        assert (found[axis.name] >= 0).all()
    assert all(torch.equal(before[key], value) for key, value in gm.state_dict().items())
    assert gm.training and gm.norm.training


def test_the_registry_is_whole() -> None:
    from typing import get_args

    from dyncompress.compress.options import steps as recipe_steps

    assert set(get_args(recipe_steps.Importance)) == set(IMPORTANCES)
    assert set(IMPORTANCES) >= NEED_DATA | COMPARABLE
    assert FISHER_SAMPLES > 0


# --- requests that cannot be met -----------------------------------------------------------------------------------


def labelled(labels: Tensor) -> TensorDataset:
    return TensorDataset(torch.randn(len(labels), 2, 4, 4).double(), labels)


@pytest.mark.parametrize("name", ["taylor", "hessian"])
@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (torch.zeros(8, dtype=torch.int64), "all 8 samples drawn have label 0"),
        (torch.tensor([0, 1, 2, 3]), "label 3, but the model puts out 3 classes"),
        (torch.tensor([0, 1, -1]), "label -1"),
        (torch.zeros(0, dtype=torch.int64), "is empty"),
        (torch.rand(4), "one class number per sample"),
    ],
)
def test_unfit_labels(name: str, labels: Tensor, said: str, gm: fx.GraphModule) -> None:
    with pytest.raises(dc.RequestError, match=said):
        scores(name, gm, Context(labelled(labels)))


@pytest.mark.parametrize("name", sorted(NEED_DATA))
def test_data_missing(name: str, gm: fx.GraphModule) -> None:
    with pytest.raises(dc.RequestError, match="needs data"):
        scores(name, gm)


def test_bad_weights_and_names(gm: fx.GraphModule, data: TensorDataset) -> None:
    with pytest.raises(dc.RequestError, match="unknown importance 'l3'"):
        scores("l3", gm)
    bad = labelled(torch.arange(4) % 3)
    bad.tensors[0][0] = float("inf")
    with pytest.raises(dc.RequestError, match="not finite on"):
        scores("taylor", gm, Context(bad))
    with torch.no_grad():
        gm.a.weight[0, 0] = float("nan")
    with pytest.raises(dc.RequestError, match=r"a\.weight holds NaN"):
        scores("l2", gm)
    empty = dc.capture(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to("meta"), torch.randn(2, 3, device="meta"))
    with pytest.raises(dc.RequestError, match="meta device"):
        scores("l2", empty)
