"""The graph without its weights, and a checkpoint for it."""

from pathlib import Path

import pytest
from shard_files import empty, state, trained, write_shards
from torch import fx


@pytest.fixture(scope="module")
def gm() -> fx.GraphModule:
    return empty()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "source", state(trained()))
