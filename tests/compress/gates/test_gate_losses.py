"""The estimators that gates learn by, held to the exact gradient over all decisions; and the losses by hand."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from dyncompress.compress.gates.gate_decisions import (
    Curriculum,
    Gumbel,
    Sampled,
    StraightThrough,
    gumbel_temperature,
    log_likelihood,
)
from dyncompress.compress.gates.gate_losses import (
    Budget,
    Drops,
    GateRun,
    Hybrid,
    MacShares,
    Rates,
    reinforce,
    without_others,
)
from dyncompress.compress.training.hooks import Progress


class At(Progress):
    """So far."""

    def __init__(self, steps: int, done: int = 0) -> None:
        self.steps, self.done = steps, done


def at(loss: Budget, steps: int, done: int) -> Budget:
    """A loss whose training is so far."""
    loss.steps, loss.done = steps, done
    return loss


ODDS = torch.tensor([0.7, -0.4, 0.2])
COSTS = MacShares(0.1, (0.4, 0.3, 0.2))


def net(factors: Tensor) -> Tensor:
    """A small network's loss for the factors (N, 3) of its branches: (N,), far from linear in any of them."""
    w1 = torch.tensor([[1.0, -2.0], [0.5, 1.5], [-1.0, 0.3]])
    return (torch.tanh(factors @ w1) @ torch.tensor([1.0, -0.7])).square() + 0.3 * factors.prod(1)


def exact_gradient(value: Callable[[Tensor], Tensor], mixed: bool = False) -> Tensor:
    """The gradient by the odds of the expected value, all 2^3 decisions weighted by their probabilities."""
    odds = ODDS.clone().requires_grad_()
    every = torch.tensor(list(product((0.0, 1.0), repeat=3)))
    p = torch.sigmoid(odds)
    p = 0.8 * p + 0.2 * (1 - p) if mixed else p
    weight = torch.where(every > 0.5, p, 1 - p).prod(1)
    (gradient,) = torch.autograd.grad((weight * value(every)).sum(), odds)
    return gradient


def assert_unbiased(estimates: list[Tensor], exact: Tensor) -> None:
    """The mean of independent estimates within 3 standard errors of `exact`, and those small against it."""
    each = torch.stack(estimates)
    error = each.std(0) / len(each) ** 0.5
    assert (error < 0.1 * exact.abs().max()).all()
    assert ((each.mean(0) - exact).abs() <= 3 * error).all(), (each.mean(0), exact, error)


def drawn_gradients(
    loss: Callable[[Tensor, Tensor], Tensor], mixed: bool, times: int = 400, n: int = 64
) -> list[Tensor]:
    decide = Sampled(None if mixed else At(1))
    found = []
    for _ in range(times):
        odds = ODDS.expand(n, 3).clone().requires_grad_()
        drawn = torch.stack([decide(odds[:, k], k) for k in range(3)], 1)
        (gradient,) = torch.autograd.grad(loss(odds, drawn), odds)
        found.append(gradient.sum(0))
    return found


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(11)


def test_policy_gradient_has_no_bias() -> None:
    estimates = drawn_gradients(lambda odds, drawn: reinforce(odds, drawn, -net(drawn)[:, None], mixed=False), False)
    assert_unbiased(estimates, exact_gradient(net))


def test_leave_one_out_takes_away_variance_and_adds_no_bias() -> None:
    def loss(odds: Tensor, drawn: Tensor) -> Tensor:
        return reinforce(odds, drawn, without_others(-net(drawn)[:, None].expand(-1, 3) - 5), mixed=False)

    with_baseline = drawn_gradients(loss, False)
    without = drawn_gradients(lambda o, d: reinforce(o, d, -net(d)[:, None] - 5, mixed=False), False)
    assert_unbiased(with_baseline, exact_gradient(net))
    assert (torch.stack(with_baseline).var(0) < 0.5 * torch.stack(without).var(0)).all()


def test_returns_of_later_gates_alone_have_no_bias() -> None:
    """SkipNet's hybrid: a gate answers for the loss and for what it and the later ones cost, at a fixed price."""
    price = torch.tensor(2.0)
    work = Hybrid(0.0, COSTS, 0.5)
    estimates = drawn_gradients(
        lambda odds, drawn: reinforce(odds, drawn, without_others(work.returns(net(drawn), drawn, price)), mixed=False),
        False,
    )
    exact = exact_gradient(lambda every: net(every) + price * every @ COSTS.branches)
    assert_unbiased(estimates, exact)


def test_blockdrops_advantage_has_no_bias_under_its_mixed_policy() -> None:
    best = float(net((ODDS > 0).float()[None])[0])
    estimates = drawn_gradients(lambda o, d: reinforce(o, d, (best - net(d))[:, None].expand(-1, 3), mixed=True), True)
    assert_unbiased(estimates, exact_gradient(net, mixed=True))


def test_gumbel_gradient_nears_the_exact_one_as_it_cools() -> None:
    """Straight-through estimates are exact where the loss is linear in each factor and the temperature goes to zero."""

    def bilinear(factors: Tensor) -> Tensor:
        a, b, c = factors.unbind(1)
        return 1.5 * a * b - 0.8 * c + 0.6 * b * c + 0.2 * a

    def estimates(share: int, times: int = 300, n: int = 512) -> list[Tensor]:
        decide, found = Gumbel(At(100, share)), []
        for _ in range(times):
            odds = ODDS.expand(n, 3).clone().requires_grad_()
            factors = torch.stack([decide(odds[:, k], k) for k in range(3)], 1)
            assert set(factors.unique().tolist()) == {0.0, 1.0}
            (gradient,) = torch.autograd.grad(bilinear(factors).mean(), odds)
            found.append(gradient.sum(0))
        return found

    exact = exact_gradient(bilinear)
    warm, cool = (torch.stack(estimates(share)).mean(0) for share in (0, 100))
    assert (cool - exact).norm() < 0.5 * (warm - exact).norm()
    assert (cool - exact).norm() < 0.1 * exact.norm()


def test_gumbel_gradient_has_no_bias_beyond_its_smoothing() -> None:
    """Against its own expectation by quadrature over the noise, to 3 standard errors."""
    decide = Gumbel(At(100, 50))
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    soft = torch.sigmoid((ODDS.double()[:, None] + torch.logit(u)) / gumbel_temperature(decide.progress))
    exact = (soft * (1 - soft) / gumbel_temperature(decide.progress)).mean(1).float()
    estimates = []
    for _ in range(300):
        odds = ODDS.expand(256, 3).clone().requires_grad_()
        factors = torch.stack([decide(odds[:, k], k) for k in range(3)], 1)
        (gradient,) = torch.autograd.grad(factors.sum() / 256, odds)
        estimates.append(gradient.sum(0))
    assert_unbiased(estimates, exact)


def test_decisions_follow_their_probabilities() -> None:
    logit = torch.full((40_000,), 0.5)
    p = torch.sigmoid(torch.tensor(0.5))
    for decide, expected in ((Sampled(At(1)), p), (Sampled(), 0.8 * p + 0.2 * (1 - p)), (Gumbel(At(1)), p)):
        assert abs(float(decide(logit, 0).mean()) - float(expected)) < 3 * 0.5 / 40_000**0.5
    either = torch.tensor([-0.5, 0.5], requires_grad=True)
    straight = StraightThrough()(either, 0)
    straight.sum().backward()
    assert straight.tolist() == [0.0, 1.0]
    torch.testing.assert_close(either.grad, torch.full((2,), float(p * (1 - p))))  # the sigmoid's slope
    forced = Sampled(curriculum=Curriculum(At(4), gates=2))
    assert forced(torch.full((9,), -9.0), 0).all() and not forced(torch.full((9,), -99.0), 1).all()
    forced.greedy = True
    assert not forced(torch.full((9,), -0.1), 1).any() and forced(torch.full((9,), -0.1), 0).all()


def test_log_likelihood_is_that_of_torch() -> None:
    odds, drawn = torch.randn(5, 3), torch.randint(0, 2, (5, 3)).float()
    expected = torch.distributions.Bernoulli(logits=odds).log_prob(drawn)
    torch.testing.assert_close(log_likelihood(odds, drawn, False), expected, rtol=1e-4, atol=1e-5)


def run(factors: list[list[float]], greedy: tuple[Tensor, Tensor] | None = None) -> GateRun:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    return GateRun(logits, torch.zeros(2, 3), torch.tensor(factors), None, greedy)


LABELS = torch.tensor([0, 0])
TASK = (torch.log(torch.tensor(1 + 2.718281828**-2)) + torch.log(torch.tensor(1 + 2.718281828**1))) / 2


def test_the_budget_is_annealed_and_squared() -> None:
    loss = at(Budget(0.0, COSTS, 0.5), 10, 2)
    used = (0.1 + 0.4 + 0.1 + 0.4 + 0.2) / 2
    expected = TASK + 10 * (used - (1 - 0.5 * 0.2 / 0.5)) ** 2
    torch.testing.assert_close(loss(run([[1, 0, 0], [1, 0, 1]]), LABELS), expected)
    loss.after_step(2)
    assert loss.done == 3 and at(Budget(0, COSTS, 0.5), 10, 9).target == 0.5


def test_rates_are_those_of_every_gate() -> None:
    loss = Rates(0.0, 0.25)
    expected = TASK + 2 * (0.75**2 + 0.25**2 + 0.25**2) / 3
    torch.testing.assert_close(loss(run([[1, 0, 0], [1, 0, 1]]), LABELS), expected)


def test_drops_reward_cheap_right_answers() -> None:
    work = Drops(0.0, COSTS, 0.5, joint=False)
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    reward = work.reward(logits, torch.tensor([[1.0, 0, 0], [1, 1, 1]]), LABELS, torch.tensor(2.0))
    torch.testing.assert_close(reward, torch.tensor([1 - 0.5**2 - 2 * 0.5, -5 - 2 * 1.0]))


def test_a_teacher_takes_its_share() -> None:
    loss = Budget(0.25, COSTS, 0.5)
    same = run([[1, 1, 1], [1, 1, 1]])._replace(teacher=torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    torch.testing.assert_close(loss.per_sample(same, LABELS).mean(), 0.75 * TASK)


def test_a_loss_goes_on_where_it_was() -> None:
    first, second = at(Budget(0.5, COSTS, 0.5), 10, 4), Budget(0.5, COSTS, 0.5)
    second.load_state_dict(first.state_dict())
    assert second.done == 4
    assert first.settings() == second.settings() != Hybrid(0.5, COSTS, 0.5).settings()


def test_the_curriculum_lets_the_last_gates_close_first() -> None:
    assert [Curriculum(At(100, done), 4).forced for done in (0, 18, 19, 38, 57, 100)] == [3, 3, 2, 1, 0, 0]


def test_drawn_decisions_cool_down_to_those_of_evaluation() -> None:
    logit = torch.randn(10_000)
    differing = [float((Sampled(At(100, done))(logit, 0) != (logit > 0)).float().mean()) for done in (0, 50, 100)]
    assert differing[0] > 0.25 and differing[0] > differing[1] > differing[2] and differing[2] < 0.1
