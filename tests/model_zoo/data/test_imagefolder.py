"""Folders of images: what is read, how it is divided, and one line for every mistake."""

from pathlib import Path

import pytest
from data import pictures, refusal
from PIL import Image

from dyncompress.errors import RequestError
from dyncompress.model_zoo import load_data


def save_images(root: Path, per_class: int, mode: str = "RGB", size: tuple[int, int] = (6, 4)) -> None:
    for label, name in enumerate(["ant", "bee"]):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            value = label * 100 + index
            Image.new(mode, size, value if mode == "L" else (value, 0, 9)).save(root / name / f"{index:03}.png")


def test_imagefolder_of_classes_is_divided(tmp_path: Path) -> None:
    save_images(tmp_path, 20)
    splits = load_data(f"imagefolder:{tmp_path}")
    values = []
    for _, data in splits.items():
        for x, y in (data[i] for i in range(len(data))):
            assert x.shape == (3, 4, 6)
            value = round(float(x[0, 0, 0]) * 255)
            assert (value >= 100) == bool(y)
            values.append(value)
    assert sorted(values) == [*range(20), *range(100, 120)]
    assert splits.classes == 2


def test_imagefolder_with_splits_and_sizes(tmp_path: Path) -> None:
    for part, number in (("train", 10), ("val", 3), ("test", 4)):
        save_images(tmp_path / part, number, "L")
    save_images(tmp_path / "test", 1, "L", size=(30, 30))
    splits = load_data(f"imagefolder:{tmp_path}?size=8x16")
    assert [len(data) for _, data in splits.items()] == [20, 6, 8]
    assert {tuple(splits.test[i][0].shape) for i in range(8)} == {(1, 8, 16)}
    assert load_data(f"imagefolder:{tmp_path}").test[0][0].shape == (1, 4, 6)


def test_imagefolder_turns_everything_to_colour_when_one_image_is(tmp_path: Path) -> None:
    save_images(tmp_path, 10, "L")
    Image.new("RGB", (6, 4)).save(tmp_path / "bee" / "colour.jpg")
    assert load_data(f"imagefolder:{tmp_path}").train[0][0].shape == (3, 4, 6)


def test_imagefolder_mistakes(tmp_path: Path) -> None:
    assert "no such folder" in refusal(f"imagefolder:{tmp_path / 'none'}")
    assert "no sub-folders" in refusal(f"imagefolder:{tmp_path}")
    save_images(tmp_path, 10)
    for option in ("size=0", "size=axb", "size=1x2x3", "size=-4"):
        assert "no image size" in refusal(f"imagefolder:{tmp_path}?{option}")
    for option in ("colour=red", "size=", "size"):
        assert "no option" in refusal(f"imagefolder:{tmp_path}?{option}")
    (tmp_path / "cat").mkdir()
    assert "holds no images" in refusal(f"imagefolder:{tmp_path}")
    (tmp_path / "cat" / "x.png").write_text("meow")
    assert "x.png is not a readable image" in refusal(f"imagefolder:{tmp_path}")
    Image.new("I;16", (6, 4)).save(tmp_path / "cat" / "x.png")
    assert "8 bits" in refusal(f"imagefolder:{tmp_path}")


def test_imagefolder_classes_must_be_known_in_training(tmp_path: Path) -> None:
    save_images(tmp_path / "train", 10)
    save_images(tmp_path / "test", 2)
    (tmp_path / "test" / "wasp").mkdir()
    assert "no training class of that name" in refusal(f"imagefolder:{tmp_path}")


def test_an_image_cut_short_is_named_when_it_is_read(tmp_path: Path) -> None:
    save_images(tmp_path, 10, size=(60, 40))
    noise = Image.fromarray(pictures(40, 60, 3))
    for path in tmp_path.rglob("*.png"):
        noise.save(path)
        path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(RequestError, match=r"\.png is not a readable image"):
        load_data(f"imagefolder:{tmp_path}").train[0]
