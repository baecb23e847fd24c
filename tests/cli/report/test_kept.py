"""Tables and pictures of what pruning kept."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from dyncompress.cli.report import layers, plots
from dyncompress.compress.pruning.kept_indices import KeptAxis


def test_long_tables_are_folded() -> None:
    rows = [layers.LayerChange(f"w{i}", (2, 2), (1, 2), i, 1, 0.5) for i in range(60)]
    rows[0] = replace(rows[0], after=None, kept=0.0)
    assert layers.table(rows, verbose=True).row_count == 60
    folded = layers.table(rows, verbose=False)
    assert folded.row_count == 40
    assert list(folded.columns[0].cells) == [f"w{i}" for i in range(20, 60)]  # those with the most MACs, in order
    assert "20 smaller ones" in str(folded.caption)


@pytest.mark.parametrize("size", [1, 3, 512, 4096])
def test_bar_codes_show_the_share_kept(size: int) -> None:
    kept = list(range(0, size, 2))
    code = plots._bar_code(size, kept)
    assert code.mean() == pytest.approx(len(kept) / size)
    assert (code.min(), code.max()) == ((1, 1) if size == 1 else (0, 1) if size <= 512 else (0.5, 0.5))


def test_pictures_of_what_was_kept(tmp_path: Path) -> None:
    axes = {f"a{i}": KeptAxis("channels", 8, (1, 5)) for i in range(3)}
    branch = KeptAxis("branch", 1, (0,))
    heights = []
    for kept in (axes, axes | {"b": branch}, axes | {"b": branch, "c": replace(branch, kept=())}):
        plots.plot_kept(tmp_path / "kept.png", kept)
        with Image.open(tmp_path / "kept.png") as image:
            heights.append(image.height)
    assert heights[0] == heights[1] < heights[2]  # branches only where one is gone
    many = {f"a{i}": axes["a0"] for i in range(400)}
    plots.plot_kept(tmp_path / "kept.png", many)
    with Image.open(tmp_path / "kept.png") as image:
        assert image.height <= 4500
