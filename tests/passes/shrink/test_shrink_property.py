"""Random networks x random kept sets against the masked oracle.

`--networks N` sets how many networks (default 300; 10,000 is an hour or two):
pytest tests/passes/shrink/test_shrink_property.py --networks 10000 -n 2
"""

import random

import pytest
import torch
from random_networks import network

import dyncompress as dc
from dyncompress.passes.axes.axes import Axes

CHUNK = 10


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "first" in metafunc.fixturenames:
        metafunc.parametrize("first", range(0, metafunc.config.getoption("--networks"), CHUNK))


def random_keep(axes: Axes, r: random.Random) -> dict[str, list[int]]:
    keep = {}
    for axis in axes.prunable:
        if axis.kind == "branch":
            keep |= {axis.name: []} if r.random() < 0.3 else {}
        elif r.random() < 0.7:
            keep[axis.name] = sorted(r.sample(range(axis.size), r.randint(1, axis.size)))
    return keep


def check(seed: int) -> bool:
    """Holds one network to the oracle; returns whether pruning it changed its output at all."""
    model, x = network(seed)
    gm = dc.capture(model, x)
    with torch.no_grad():
        full = model(x)
        torch.testing.assert_close(gm(x), full, rtol=1e-9, atol=1e-9)
        axes = dc.infer_axes(gm)
        assert not axes.untyped, f"seed {seed}: {axes.untyped}"
        keep = random_keep(axes, random.Random(seed))
        before = {name: t.clone() for name, t in gm.state_dict().items()}
        masked, small = dc.mask(gm, keep), dc.shrink(gm, keep, exact=True)
        expected = masked(x)
        torch.testing.assert_close(small(x), expected, rtol=1e-8, atol=1e-9, msg=lambda m: f"seed {seed}: {m}")
        more = torch.cat([x, x.flip(0), x])
        torch.testing.assert_close(small(more), masked(more), rtol=1e-8, atol=1e-9)
        assert dc.shrink(gm, keep)(x).shape == full.shape
        for name, tensor in gm.state_dict().items():
            assert torch.equal(tensor, before[name]), f"seed {seed}: {name} of the original changed"
    check_sizes(gm, small, axes, keep)
    return bool((full - expected).abs().max() > 1e-6)


def check_sizes(gm: torch.fx.GraphModule, small: torch.fx.GraphModule, axes: Axes, keep: dict) -> None:
    """Every tensor is exactly as small as the kept counts of its axes say, by counting positions."""
    left = {name: torch.ones(t.shape, dtype=torch.bool) for name, t in gm.state_dict().items()}
    for name, indices in keep.items():
        if axes[name].kind == "branch":
            for piece in axes[name].slices:
                left.get(piece.tensor, torch.ones(1)).zero_()
            continue
        gone = torch.tensor([i for i in range(axes[name].size) if i not in set(indices)], dtype=torch.int64)
        for piece in axes[name].slices:
            if piece.tensor in left:
                left[piece.tensor].index_fill_(piece.dim, piece.positions[gone].flatten(), False)
    sizes = {name: tensor.numel() for name, tensor in small.state_dict().items()}
    for name, positions in left.items():
        if positions.dim():  # numbers such as num_batches_tracked have no slices
            assert sizes.get(name, 0) == int(positions.sum()), name


def test_a_projection_as_wide_as_its_cell() -> None:
    assert check(1473)


def test_shrunk_networks_equal_masked_ones(first: int) -> None:
    changed = [check(seed) for seed in range(first, first + CHUNK)]
    assert sum(changed) >= CHUNK // 2, "pruning should change most outputs, or the oracle proves nothing"
