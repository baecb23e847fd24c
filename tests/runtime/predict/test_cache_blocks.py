"""Large batches in blocks: which samples, the same answers as one by one and at once, and nothing for a deadline."""

from typing import Any

import pytest
import torch
from cases import CASES, call, gated_graph, graph, rows
from dynamic_models import gated

from dyncompress.passes.exits.insert_exits import InsertExits
from dyncompress.passes.graph.meta import inputs_of
from dyncompress.runtime.predict import cache_blocks
from dyncompress.runtime.predict import pieces as running
from dyncompress.runtime.predict.cache_blocks import blocks, largest_value_bytes
from dyncompress.runtime.predict.dynamic import DynamicModel
from dyncompress.runtime.predict.policy import ExitPolicy

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[list[slice]]:
    """Blocks of at most five samples, whatever they take; gets every division."""
    seen: list[list[slice]] = []

    def noted(*args: Any) -> list[slice]:
        seen.append(blocks(*args))
        return seen[-1]

    monkeypatch.setattr(cache_blocks, "_BYTES", 0)
    monkeypatch.setattr(cache_blocks, "_LEAST", 5)
    monkeypatch.setattr(running, "blocks", noted)
    return seen


@pytest.mark.parametrize("n", [1, 31, 32, 33, 64, 257, 1000])
def test_every_sample_is_in_one_block(n: int) -> None:
    for size in (0, 1, 10**4, 10**6, 10**9):
        parts = blocks(n, size, CPU)
        assert [i for part in parts for i in range(n)[part]] == list(range(n))
        lengths = [part.stop - part.start for part in parts]
        assert max(lengths) - min(lengths) <= 1
        within = max(lengths) * size <= 4 * 2**20 * torch.get_num_threads()
        assert within or max(lengths) <= 32
        assert len(parts) == 1 or min(lengths) >= 16
    assert blocks(n, 10**9, torch.device("cuda")) == [slice(0, n)]


def test_the_largest_activation_counts() -> None:
    """The widest layer of the network, 16 by 16 pixels of 8 channels in float32, and no weight."""
    assert largest_value_bytes(graph("resnet"), inputs_of(graph("resnet"))) == 8 * 16 * 16 * 4


@pytest.mark.parametrize(("name", "gates"), [(name, False) for name in CASES] + [("resnet", True)])
def test_the_answers_are_those_of_one_batch(name: str, gates: bool, small: list[list[slice]]) -> None:
    dyn = DynamicModel(InsertExits(2)(gated_graph(name) if gates else graph(name)).gm).eval()
    x = CASES[name].batch(23)
    scores = torch.cat([z.softmax(-1).amax(-1) for z in call(dyn.all_logits, x)[:-1]])
    dyn.policy = ExitPolicy("max-softmax", (float(scores.quantile(0.55)),) * 2, (1.0, 1.0))
    found = call(dyn.predict, x)
    stayed = [int((found.exit_index >= k).sum()) for k in range(3)]
    assert [len(parts) for parts in small] == [-(-n // 5) for n in stayed if n] and len(small[0]) == 5
    assert [parts[-1].stop for parts in small] == [n for n in stayed if n] and len(set(found.exit_index.tolist())) > 1
    for i in range(23):
        alone = call(dyn.predict, rows(x, slice(i, i + 1)))
        assert found.exit_index[i] == alone.exit_index and found.macs[i] == alone.macs
        torch.testing.assert_close(found.logits[i], alone.logits[0], rtol=1e-4, atol=1e-4)
        if gates:
            assert found.gates is not None and alone.gates is not None
            assert torch.equal(found.gates[i], alone.gates[0])


def test_a_deadline_is_for_the_whole_batch(small: list[list[slice]]) -> None:
    dyn = DynamicModel(InsertExits(2)(graph("resnet")).gm).eval()
    x = CASES["resnet"].batch(23)
    assert (dyn.predict(x, deadline_ms=1e-6).exit_index == 0).all() and not small


def test_gated_models_without_exits(small: list[list[slice]]) -> None:
    dyn = gated("resnet")
    x = CASES["resnet"].batch(11)
    found = dyn.predict(x)
    assert [len(parts) for parts in small] == [3]
    torch.testing.assert_close(found.logits, dyn(x), rtol=1e-4, atol=1e-4)
