"""Stages under torch.compile against the same stages without it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, call
from dynamic_models import policy_for, spread
from torch import fx

from dyncompress.passes.graph.copying import deep_copy
from dyncompress.runtime.predict.policy import ExitPolicy


@pytest.mark.parametrize("name", ["two-inputs", "text"])
def test_compiled_stages_answer_alike_at_any_batch_size(name: str) -> None:
    torch.manual_seed(0)
    made, compiled = spread(name), []
    nobody_leaves = ExitPolicy("max-softmax", (1.0,) * CASES[name].exits)
    half_leave = policy_for(made, CASES[name].batch(40), "max-softmax", CASES[name].exits)

    def backend(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        compiled.append(gm)
        return gm.forward

    def check(policy: ExitPolicy, n: int) -> int:
        """Holds the answers to those of a copy that is not compiled; how many pieces have been compiled so far."""
        batch, eager = CASES[name].batch(n), deep_copy(made)
        made.policy = eager.policy = policy
        found, wanted = call(made.predict, batch), call(eager.predict, batch)
        assert found.exit_index.tolist() == wanted.exit_index.tolist()
        torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-5)
        return len(compiled)

    made.compile(backend=backend)
    assert check(nobody_leaves, 1) >= CASES[name].exits + 1  # torch has code of its own for one sample
    seen = check(nobody_leaves, 5)
    assert [check(half_leave, n) for n in (40, 33, 57)] == [seen] * 3  # other sizes run the same code
    call(made.train(), CASES[name].batch(5))
    assert len(compiled) == seen
