"""Names of data sources."""

import pytest
from data import refusal


@pytest.mark.parametrize("source", ["mnist", "", "zoo_digits:big", "data.npz", "a b:c", "/some/path:x", ":"])
def test_an_unknown_source_lists_the_known_ones(source: str) -> None:
    assert "npz:FILE" in refusal(source)


@pytest.mark.parametrize("source", ["npz", "npz:", "imagefolder:", "text:", "hf:"])
def test_a_source_without_a_path_is_refused(source: str) -> None:
    assert "names no file or folder" in refusal(source)
