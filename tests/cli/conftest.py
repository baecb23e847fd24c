"""A trained network, its weights in a file, and the command line."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import Outcome, words
from nets import ConvNet
from torch import nn
from trained import on_stripes

from dyncompress.cli.main import run


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
