"""A trained network, its weights in a file, and the command line."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from command_line import Outcome, words
from nets import ConvNet
from torch import nn
from trained import on_stripes

from dyncompress.cli.main import run
from dyncompress.cli.runs import benching, run_recipe
from dyncompress.compress.evaluation.report_entries import measure


@pytest.fixture(autouse=True)
def _few_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """What times are is of no interest here."""
    for module in (run_recipe, benching):
        monkeypatch.setattr(module, "measure", partial(measure, batches={1: 1, 256: 1}, repeats=1))


@pytest.fixture(scope="session")
def net() -> nn.Module:
    torch.manual_seed(0)
    return on_stripes(ConvNet(), steps=30)


@pytest.fixture
def weights(net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state dict of the trained net, in the working directory."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    torch.save(net.state_dict(), "net.pt")
    return Path("net.pt")


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[[str], Outcome]:
    def call(command: str) -> Outcome:
        capfd.readouterr()
        status = run(words(command))
        return Outcome(status, *capfd.readouterr())

    return call
