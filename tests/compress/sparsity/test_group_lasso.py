"""Group lasso: norms, penalty and proximal step against plain loops over the slices; what each kind's groups are."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dyncompress as dc
from dyncompress.compress.importance.scores import Context, l2_scores
from dyncompress.compress.sparsity.group_lasso import GroupLasso


class Mixed(nn.Module):
    """A residual CNN, a concatenation, an LSTM and tied widths: most ways in which an axis runs through parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 6, 1)
        self.norm = nn.BatchNorm2d(6)
        self.side = nn.Conv2d(1, 3, 1)
        self.lstm = nn.LSTM(9, 7, 2, batch_first=True)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.stem(x))
        y = F.relu(y + self.norm(self.b(F.relu(self.a(y)))))
        y = torch.cat([y, self.side(x)], 1).mean(3).transpose(1, 2)
        return self.head(self.lstm(y)[0][:, -1])


@pytest.fixture
def gm() -> torch.fx.GraphModule:
    torch.manual_seed(0)
    return dc.capture(Mixed(), torch.randn(2, 1, 6, 6))


def by_hand(gm: torch.fx.GraphModule, weights: dict[str, Tensor]) -> dict[tuple[str, int], list[Tensor]]:
    """Every slice of every group, as copies: by axis and index."""
    found: dict[tuple[str, int], list[Tensor]] = {}
    for axis in dc.infer_axes(gm).prunable:
        for piece in axis.slices:
            if piece.tensor in weights:
                for i in range(axis.size):
                    slices = found.setdefault((axis.name, i), [])
                    slices += [weights[piece.tensor].select(piece.dim, int(p)) for p in piece.positions[i]]
    return found


def ratio(slices: list[Tensor]) -> float:
    """sqrt|g| / ||w_g||"""
    flat = torch.cat([piece.flatten() for piece in slices])
    return len(flat) ** 0.5 / float(flat.norm())


def test_norms_sizes_and_penalty_by_hand(gm: torch.fx.GraphModule) -> None:
    axes = dc.infer_axes(gm)
    lasso = GroupLasso(axes, ("axes", "layers"))
    assert any(axis.kind == "branch" for axis in axes.prunable)
    groups = by_hand(gm, {name: p.detach() for name, p in gm.named_parameters()})
    norms = torch.stack([torch.cat([s.flatten() for s in slices]).norm() for slices in groups.values()])
    sizes = torch.tensor([sum(s.numel() for s in slices) for slices in groups.values()], dtype=torch.float32)
    torch.testing.assert_close(lasso.norms(), norms)
    torch.testing.assert_close(lasso.sizes, sizes)
    torch.testing.assert_close(lasso.penalty().detach(), (sizes.sqrt() * norms).sum())
    scores = l2_scores(gm, axes.prunable, Context())  # ranking and lasso mean the same groups
    torch.testing.assert_close(norms, torch.cat([scores[axis.name] for axis in axes.prunable]).float())


def test_the_gradient_of_the_penalty_by_differences(gm: torch.fx.GraphModule) -> None:
    with torch.no_grad():
        gm.a.weight[2] = gm.b.weight[:, 2] = gm.a.bias[2] = 0  # a dead group has no slope, and no NaN
    lasso = GroupLasso(dc.infer_axes(gm), ("axes", "tiles"), tile=4)
    lasso.penalty().backward()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in gm.parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all()
            direction = torch.randn(parameter.shape, generator=generator) * (parameter != 0)
            values = []
            for sign in (1, -1):
                parameter.add_(sign * 1e-3 * direction)
                values.append(lasso.penalty().double())
                parameter.sub_(sign * 1e-3 * direction)
            slope = 0.0 if parameter.grad is None else float((parameter.grad * direction).sum())
            assert float(values[0] - values[1]) / 2e-3 == pytest.approx(slope, rel=2e-2, abs=0.05)


def test_the_proximal_step_by_hand(gm: torch.fx.GraphModule) -> None:
    reference = copy.deepcopy({name: p.detach() for name, p in gm.named_parameters()})
    lasso = GroupLasso(dc.infer_axes(gm), ("axes", "layers"))
    step = float((lasso.norms() / lasso.sizes.sqrt()).median())
    lasso.proximal_(step)
    factors = {key: max(0.0, 1 - step * ratio(slices)) for key, slices in by_hand(gm, reference).items()}
    branches = [axis.name for axis in dc.infer_axes(gm).prunable if axis.kind == "branch"]
    for (axis, i), slices in by_hand(gm, reference).items():  # slices are views of the reference
        for piece in slices if axis not in branches else ():
            piece.mul_(factors[axis, i])
    for name in branches:
        for tensor in {s.tensor for s in dc.infer_axes(gm)[name].slices} & set(reference):
            reference[tensor].mul_(factors[name, 0])
    for name, parameter in gm.named_parameters():
        torch.testing.assert_close(parameter.detach(), reference[name])
    zero = [key for key, factor in factors.items() if factor == 0]
    assert 0 < len(zero) < len(factors)
    live = dict(zip(factors, lasso.live.tolist(), strict=True))
    assert not any(live[key] for key in zero)
    assert all(not piece.any() for key in zero for piece in by_hand(gm, dict(gm.named_parameters()))[key])


def test_the_kinds_that_divide_weights_by_hand() -> None:
    torch.manual_seed(0)
    gm = dc.capture(nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(16, 5)), torch.randn(2, 3, 3, 3))
    conv, linear = gm.get_parameter("0.weight").detach(), gm.get_parameter("2.weight").detach()
    unfolded = conv.reshape(4, 12)
    tiles = [
        w[r : r + 3, c : c + 3].norm()
        for w in (unfolded, linear)
        for r in range(0, len(w), 3)
        for c in range(0, w.shape[1], 3)
    ]
    expected = {
        "filters": [*unfolded.norm(dim=1), *linear.norm(dim=1)],
        "columns": [*conv.transpose(0, 1).reshape(3, -1).norm(dim=1), *linear.norm(dim=0)],
        "shapes": [*unfolded.norm(dim=0), *linear.norm(dim=0)],
        "tiles": tiles,
    }
    axes = dc.infer_axes(gm)
    for kind, norms in expected.items():
        torch.testing.assert_close(GroupLasso(axes, (kind,), tile=3).norms(), torch.stack(norms))
    together = GroupLasso(axes, ("channels", *expected), tile=3)
    torch.testing.assert_close(together.norms()[4:], torch.stack([n for norms in expected.values() for n in norms]))
    together.proximal_(0.5 * float((together.norms() / together.sizes.sqrt()).max()))
    assert torch.equal(together.live[:4], (gm.get_parameter("0.weight").flatten(1).norm(dim=1) > 0))


def test_held_groups_stay_zero_and_spared_ones_are_left_alone(gm: torch.fx.GraphModule) -> None:
    axes = dc.infer_axes(gm)
    lasso = GroupLasso(axes, ("hidden states",))
    at = lasso.groups.of_axis["lstm.weight_ih_l1:0.1"]
    zero, pull = torch.zeros(len(lasso), dtype=torch.bool), torch.ones(len(lasso))
    zero[at.start], pull[at.start + 1] = True, 0.0
    lasso.hold(zero, pull)
    lasso.proximal_(1e9)
    assert not lasso.norms()[:-7].any() and lasso.live[at].tolist() == [False, True, *[False] * 5]
    with torch.no_grad():
        for parameter in gm.parameters():
            parameter.add_(1.0)
    lasso.proximal_(0.0)
    assert not gm.lstm.weight_ih_l1[[0, 7, 14, 21]].any()
    assert gm.lstm.weight_ih_l1[[2, 9, 16, 23]].all()


@pytest.mark.parametrize(
    ("kinds", "said"), [(("rows",), "unknown kind"), ((), "empty"), (("heads",), "no group"), (("tiles",), "tile is")]
)
def test_wrong_kinds(gm: torch.fx.GraphModule, kinds: tuple[str, ...], said: str) -> None:
    with pytest.raises(dc.RequestError, match=said):
        GroupLasso(dc.infer_axes(gm), kinds, tile=0)
