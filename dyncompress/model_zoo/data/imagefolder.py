"""`imagefolder:DIR[?size=64]`: DIR/class/*.png, or DIR/train/class/*.png beside DIR/test and perhaps DIR/val."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...errors import RequestError
from .arrays import count_classes
from .images import ImageDataset, common_mode
from .source_text import parse_size, split_options
from .splits import LabelledDataset, Splits, divide

if TYPE_CHECKING:
    from PIL import Image

_EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_SPLIT_FOLDERS = {"calibration": ("val", "valid", "validation", "calibration"), "test": ("test",)}


@dataclass(frozen=True)
class _Files:
    """Opens image files by their row."""

    paths: tuple[Path, ...]

    def __call__(self, row: int) -> Image.Image:
        from PIL import Image

        path = self.paths[row]
        try:
            with Image.open(path) as image:
                image.load()
                return image
        except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for some broken PNG files
            raise RequestError(f"{path} is not a readable image: replace or remove it") from error

    def header(self, row: int) -> tuple[tuple[int, int], str]:
        """((height, width), mode) without decoding the pixels."""
        from PIL import Image

        path = self.paths[row]
        try:
            with Image.open(path) as image:
                return (image.height, image.width), image.mode
        except (OSError, SyntaxError) as error:
            raise RequestError(f"{path} is not a readable image: replace or remove it") from error


def load_imagefolder(text: str, seed: int) -> Splits:
    """The splits of a folder of images, one sub-folder per class; classes are numbered in order of their names.

    Images become (C, H, W) float32 in 0..1 of one size: the first one's, or ?size=S or ?size=HxW pixels; C is 1 when
    every image is grey and 3 otherwise. Raises RequestError for a folder without classes or images, and broken files.
    """
    folder, options = split_options(text, ("size",))
    name = f"imagefolder:{folder}"
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise RequestError(f"{name}: there is no such folder: check the path")
    roots = _split_roots(root)
    class_names = _folders(roots["train"])
    if not class_names:
        raise RequestError(
            f"{name}: {roots['train']} has no sub-folders: put the images of every class in a folder of its own"
        )
    found = {part: _files(where, class_names) for part, where in roots.items()}
    paths = _Files(tuple(path for files in found.values() for path, _ in files))
    headers = [paths.header(row) for row in range(len(paths.paths))]
    size = parse_size(options, name) or headers[0][0]
    mode = common_mode({mode for _, mode in headers}, name)
    parts: dict[str, LabelledDataset] = {}
    start = 0
    for part, files in found.items():
        rows = torch.arange(start, start + len(files))
        parts[part] = ImageDataset(paths, rows, torch.tensor([label for _, label in files]), size, mode)
        start += len(files)
    classes = count_classes({part: data.labels for part, data in parts.items()}, name)
    return divide(parts, classes, name, seed)


def _split_roots(root: Path) -> dict[str, Path]:
    """Where every split's class folders lie; only train when DIR holds the classes itself."""
    if not _folders(root / "train"):
        return {"train": root}
    roots = {"train": root / "train"}
    for part, names in _SPLIT_FOLDERS.items():
        for candidate in names:
            if _folders(root / candidate):
                roots.setdefault(part, root / candidate)
    return roots


def _folders(root: Path) -> list[str]:
    if not root.is_dir():
        return []
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _files(root: Path, class_names: list[str]) -> list[tuple[Path, int]]:
    """(path, label) of every image, sorted; RequestError for an unknown or an empty class folder."""
    unknown = sorted(set(_folders(root)) - set(class_names))
    if unknown:
        raise RequestError(
            f"{root / unknown[0]}: there is no training class of that name: training has {', '.join(class_names)}"
        )
    found: list[tuple[Path, int]] = []
    for label, class_name in enumerate(class_names):
        files = [path for path in sorted((root / class_name).rglob("*")) if path.suffix.lower() in _EXTENSIONS]
        found += [(path, label) for path in files]
        if not files and (root / class_name).is_dir():
            raise RequestError(f"{root / class_name} holds no images ({', '.join(_EXTENSIONS)}): add some or remove it")
    return found
