"""What is timed waits for the device that works, whatever its kind."""

import pytest
import torch

from dyncompress.runtime.predict.deadline import Deadline
from dyncompress.runtime.predict.timing import device_of, wait_for


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices that were waited for."""
    found: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", found.append)
    return found


def test_every_accelerator_is_waited_for_and_nothing_else(waited: list[torch.device]) -> None:
    for name in ("cpu", "cuda:1", "meta", "xpu:0", "mps"):
        wait_for(torch.device(name))
    assert waited == [torch.device(name) for name in ("cuda:1", "xpu:0", "mps")]


def test_a_deadline_asks_for_work_that_is_done(waited: list[torch.device]) -> None:
    assert Deadline(1e6, torch.device("xpu")).allows(1.0, 1.0)
    assert waited == [torch.device("xpu")]
    Deadline(1e6, torch.device("cpu")).allows(1.0, 1.0)
    assert len(waited) == 1


def test_a_call_works_where_its_inputs_are() -> None:
    cpu, other = torch.zeros(1), torch.zeros(1, device="meta")
    assert device_of((cpu, {"mask": other})) == torch.device("meta")
    assert device_of(cpu) == device_of((3, "text")) == torch.device("cpu")
