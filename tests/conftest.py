"""Options and settings of the whole test run."""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--networks", type=int, default=300, help="how many random networks the shrink property draws")
    parser.addoption("--golden", action="store_true", help="write the printed graphs in tests/passes/golden anew")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
