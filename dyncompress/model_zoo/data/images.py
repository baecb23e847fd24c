"""Images read one at a time and brought to one size and one number of channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...errors import RequestError
from .splits import LabelledDataset, as_float

if TYPE_CHECKING:
    from PIL import Image

_GRAY_MODES = ("1", "L", "LA")
_COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "La", "RGBX", "RGBa")


class ImageDataset(LabelledDataset):
    """Images decoded when they are asked for; item i is ((C, H, W) float32 in 0..1, label).

    read gives the image of a row; rows (N,) says which row is sample i; size is (height, width) in pixels;
    mode is the Pillow mode of every sample: "L" (one channel) or "RGB" (three).
    """

    def __init__(
        self,
        read: Callable[[int], Image.Image],
        rows: Tensor,
        labels: Tensor,
        size: tuple[int, int],
        mode: str,
    ) -> None:
        self.read = read
        self.rows = rows
        self.labels = labels
        self.size = size
        self.mode = mode

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return to_tensor(self.read(int(self.rows[index])), self.size, self.mode), int(self.labels[index])

    def select(self, indices: Tensor) -> ImageDataset:
        return ImageDataset(self.read, self.rows[indices], self.labels[indices], self.size, self.mode)


def to_tensor(image: Image.Image, size: tuple[int, int], mode: str) -> Tensor:
    """One Pillow image as (C, H, W) float32 in 0..1, resized to size (height, width)."""
    from PIL import Image

    height, width = size
    image = image.convert(mode)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image))  # a copy: Pillow's own buffer is read-only
    return as_float(pixels.unsqueeze(0) if mode == "L" else pixels.permute(2, 0, 1))


def common_mode(modes: set[str], where: str) -> str:
    """The mode that keeps what all these Pillow modes hold: "L" when every one is grey, otherwise "RGB".

    Raises RequestError for modes of more than 8 bits, which a conversion would clip.
    """
    unknown = sorted(modes - set(_GRAY_MODES) - set(_COLOUR_MODES))
    if unknown:
        raise RequestError(
            f"{where}: images of Pillow mode {unknown[0]} cannot be read: convert them to 8 bits a channel"
        )
    return "L" if modes <= set(_GRAY_MODES) else "RGB"
