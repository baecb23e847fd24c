"""Whether skipping pays: a gated model beside the same one with every gate open, or beside the static one."""

from torch import fx

from ...compress.evaluation.report_entries import Entry
from ...passes.gates.remove_gates import RemoveGates
from ...passes.graph.copying import graph_copy
from ...runtime.predict.dynamic import DynamicModel

_WORTH = 0.5  # the least share of the MACs saved that is to be saved in time as well


def opened(model: DynamicModel) -> fx.GraphModule | DynamicModel:
    """What a gated model is compared with: every branch always runs and no gate is computed; exits stay."""
    whole = RemoveGates().rewrite(graph_copy(model.trunk)).gm
    return DynamicModel(whole, model.policy, model.table) if model.exits else whole


def does_not_pay(gated: Entry, whole: Entry, device: str) -> str | None:
    """A line where the time saved is less than half of the MACs saved; None where it pays or is not known.

    Both were measured side by side.
    """
    macs, all_macs = gated.macs_per_sample, whole.macs_per_sample
    if macs is None or all_macs is None:
        return None
    left = macs / all_macs
    times = {batch: ms / whole.latency_ms[batch] for batch, ms in gated.latency_ms.items()}
    slow = [
        f"{time:.0%} of the time at batch {batch}" for batch, time in times.items() if 1 - time < _WORTH * (1 - left)
    ]
    if not slow:
        return None
    return f"skipping does not pay on {device}: {left:.0%} of the MACs take {', '.join(slow)}"
