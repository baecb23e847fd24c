"""Where models come from: every kind of file and name, and one clear line for everything that is not a model."""

import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from nets import OneConv
from safetensors.torch import save_file
from torch import Tensor, nn

from dyncompress.cli.loading import model_files as files
from dyncompress.cli.loading.models import load_model
from dyncompress.errors import RequestError
from dyncompress.passes.capture.capture import capture
from dyncompress.runtime.files import checkpoint


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(int(x.shape[0]), -1).view(2, 36) * 2


def make_text() -> str:
    return "no module"


def make_failing() -> nn.Module:
    raise KeyError("weights")


ARCH = "nets:OneConv"
IMAGE = torch.rand(2, 1, 6, 6)


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(1)
    model = OneConv()
    model(torch.randn(8, 1, 6, 6))  # moves the BatchNorm statistics off their defaults
    return model.eval()


def export(model: nn.Module, path: Path, **options: Any) -> None:
    torch.export.save(torch.export.export(model, (IMAGE,), **options), path)


def save_checkpoint(model: nn.Module, path: Path) -> None:
    checkpoint.save(capture(model, IMAGE), path)


DYNAMIC = {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)}

# Every kind of file, under a name that says nothing: what writes it and the options that load it.
FILES: dict[str, tuple[Callable[[nn.Module, Path], Any], dict[str, Any]]] = {
    "checkpoint": (save_checkpoint, {}),
    "export": (lambda model, path: export(model, path, **DYNAMIC), {}),
    "export, batch of two": (export, {}),
    "state dict": (lambda model, path: torch.save(model.state_dict(), path), {"arch": ARCH}),
    "old state dict": (
        lambda model, path: torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False),
        {"arch": ARCH},
    ),
    "nested state dict": (
        lambda model, path: torch.save({"epoch": 3, "state_dict": model.state_dict()}, path),
        {"arch": ARCH},
    ),
    "safetensors": (lambda model, path: save_file(model.state_dict(), path), {"arch": ARCH}),
    "module": (torch.save, {"allow_pickle": True}),
    "old module": (
        lambda model, path: torch.save(model, path, _use_new_zipfile_serialization=False),
        {"allow_pickle": True},
    ),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.filterwarnings("ignore:.*copyreg.*:DeprecationWarning")
def test_every_kind_of_file_gives_the_same_model(kind: str, small: nn.Module, tmp_path: Path) -> None:
    write, options = FILES[kind]
    path = tmp_path / "weights.bin"
    write(small, path)
    loaded = load_model(str(path), samples=IMAGE, **options)
    gm = capture(loaded.module, loaded.example_inputs)
    x = torch.randn(7, 1, 6, 6)
    torch.testing.assert_close(gm(x), small(x))
    assert loaded.name == "weights"
    assert loaded.trained
    assert not loaded.module.training


@pytest.mark.parametrize("start", [b"\x80\x01", b"PK"])
def test_a_safetensors_file_may_begin_like_another_kind(start: bytes, tmp_path: Path) -> None:
    """Its first bytes are the length of its header, a multiple of 8 or, by hand, any other number."""
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(int.from_bytes(start, "little"))
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert (tmp_path / "w.safetensors").read_bytes().startswith(start)
    assert files.kind_of(tmp_path / "w.safetensors") == "safetensors"
    assert files.read_safetensors(tmp_path / "w.safetensors")["w"].tolist() == [0]


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_files_that_know_their_inputs_need_no_example(kind: str, small: nn.Module, tmp_path: Path) -> None:
    FILES[kind][0](small, tmp_path / "m")
    example = load_model(str(tmp_path / "m")).example_inputs
    (image,) = example
    assert image.shape[1:] == (1, 6, 6)


def test_names_and_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert load_model(f"{ARCH}(classes=7)", samples=IMAGE).module(IMAGE).shape == (2, 7)
    (tmp_path / "my_models.py").write_text("from torch import nn\ndef net():\n    return nn.Linear(2, 3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    loaded = load_model("my_models:net", input_shape=(2,))
    assert loaded.module(loaded.example_inputs).shape == (2, 3)
    assert loaded.name == "net"


def test_example_inputs_in_order_of_trust() -> None:
    samples = torch.rand(3, 1, 9, 9)
    assert load_model(ARCH, samples=samples).example_inputs is samples
    assert load_model(ARCH, samples=samples, input_shape=(1, 8, 8)).example_inputs.shape == (2, 1, 8, 8)
    zoo = load_model("zoo:vgg-digits")
    assert zoo.example_inputs.shape == (2, 1, 32, 32)
    with pytest.raises(RequestError, match="--input-shape"):
        load_model(ARCH)


def one_line(error: pytest.ExceptionInfo[RequestError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def refused(spec: str | Path, **options: Any) -> str:
    with pytest.raises(RequestError) as error:
        load_model(str(spec), samples=IMAGE, **options)
    return one_line(error)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("nowhere.pt", "there is no file nowhere.pt"),
        ("zoo:nothing", "vgg-digits"),
        ("no_such_module:make", "no_such_module"),
        (f"{__name__}:nothing", "nothing"),
        (f"{__name__}:make_text", "returned a str"),
        (f"{__name__}:make_failing", "KeyError"),
        (f"{ARCH}(1)", "NAME(key=value, ...)"),
        (f"{ARCH}(classes=open('x'))", "NAME(key=value, ...)"),
        (f"{ARCH}(nothing=1)", "TypeError"),
    ],
)
def test_wrong_names(spec: str, says: str) -> None:
    assert says in refused(spec)


def test_wrong_files(small: nn.Module, tmp_path: Path) -> None:
    assert "is a directory" in refused(tmp_path)
    empty = tmp_path / "empty.pt"
    empty.touch()
    assert "not a model file" in refused(empty)
    text = tmp_path / "text.pt"
    text.write_text("just some text, longer than a header")
    assert "not a model file" in refused(text)
    listed = tmp_path / "list.pt"
    torch.save([1, 2], listed)
    assert "not a state dict" in refused(listed)
    script = tmp_path / "script.pt"
    with pytest.warns(DeprecationWarning):
        torch.jit.save(torch.jit.trace(small, IMAGE), script)
    assert "TorchScript" in refused(script)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("share", [0.03, 0.5, 0.98])
def test_truncated_files(kind: str, share: float, small: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "cut.bin"
    FILES[kind][0](small, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert str(path) in refused(path, **FILES[kind][1])


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickles_are_not_opened_unless_allowed(small: nn.Module, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    trap = Trap(sprung)
    torch.save({"weight": trap}, tmp_path / "new.pt")
    torch.save({"weight": trap}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(trap))
    for name in ("new.pt", "old.pt", "plain.pkl"):
        assert "--allow-pickle" in refused(tmp_path / name)
        assert not sprung.exists()
    torch.save(small, tmp_path / "module.pt")
    assert "--allow-pickle" in refused(tmp_path / "module.pt")
    refused(tmp_path / "new.pt", allow_pickle=True)
    assert sprung.exists()


def test_pickled_parts_of_an_archive_are_not_opened(small: nn.Module, tmp_path: Path) -> None:
    import io
    import zipfile

    sprung = tmp_path / "sprung"
    export(small, tmp_path / "good.pt2", **DYNAMIC)
    buffer = io.BytesIO()
    torch.save(((Trap(sprung),), {}), buffer)
    with zipfile.ZipFile(tmp_path / "good.pt2") as good, zipfile.ZipFile(tmp_path / "bad.pt2", "w") as bad:
        for name in good.namelist():
            bad.writestr(name, buffer.getvalue() if "sample_inputs" in name else good.read(name))
    assert "--allow-pickle" in refused(tmp_path / "bad.pt2")
    assert not sprung.exists()


def test_pickle_of_code_that_is_gone(small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(small, tmp_path / "module.pt")
    monkeypatch.delattr(nets, "OneConv")
    assert "cannot be imported" in refused(tmp_path / "module.pt", allow_pickle=True)


def test_state_dict_needs_the_right_architecture(small: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "s.pt"
    torch.save(small.state_dict(), path)
    assert "--arch" in refused(path)
    says = refused(path, arch=f"{ARCH}(classes=5)")
    assert "2 of another shape (fc.weight is 3x4, not 5x4, fc.bias is 3, not 5)" in says
    state = small.state_dict()
    state["other"] = state.pop("fc.bias")
    torch.save(state, path)
    says = refused(path, arch=ARCH)
    assert "1 missing (fc.bias)" in says
    assert "1 unknown (other)" in says
    assert "is a file" in refused(path, arch="x.pt")
    assert "is a whole model" in refused(ARCH, arch=ARCH)
    save_checkpoint(small, tmp_path / "whole")
    assert "is a whole model" in refused(tmp_path / "whole", arch=ARCH)


def test_nan_weights(small: nn.Module, tmp_path: Path) -> None:
    with torch.no_grad():
        small.fc.weight[0, 0] = float("nan")
    save_file(small.state_dict(), tmp_path / "nan.safetensors")
    assert "fc.weight holds NaN" in refused(tmp_path / "nan.safetensors", arch=ARCH)


def test_archive_for_one_batch_size(tmp_path: Path) -> None:
    export(FixedBatch(), tmp_path / "fixed.pt2")
    assert "one batch size only" in refused(tmp_path / "fixed.pt2")


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install 'dyncompress[timm]'" in refused("timm:resnet18")


def import_torchvision() -> None:
    """Or skip the test. The models need none of torchvision's own operators, which a CPU-only torch may not load."""
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    pytest.importorskip("torchvision")


def test_transformers(tmp_path: Path) -> None:
    import_torchvision()
    pytest.importorskip("transformers")
    loaded = load_model("hf:BertForSequenceClassification(num_labels=5)")
    assert not loaded.trained
    assert loaded.module(**loaded.example_inputs).logits.shape == (2, 5)
    loaded.module.save_pretrained(tmp_path / "bert")
    again = load_model(f"hf:{tmp_path / 'bert'}")
    assert again.trained
    assert again.name == "bert"
    ids = loaded.example_inputs
    torch.testing.assert_close(again.module(**ids).logits, loaded.module(**ids).logits)
    assert "no field nothing" in refused("hf:BertForSequenceClassification(nothing=1)")
    assert "names no architecture" in refused("hf:BertTokenizer")


def test_timm_and_torchvision() -> None:
    import_torchvision()
    pytest.importorskip("timm")
    loaded = load_model("timm:resnet10t(num_classes=4, in_chans=1)")
    assert loaded.example_inputs.shape[1] == 1
    assert not loaded.trained
    assert "timm cannot make 'nothing'" in refused("timm:nothing")
    loaded = load_model("torchvision:squeezenet1_1(num_classes=4)")
    assert loaded.example_inputs.shape == (2, 3, 224, 224)
    assert "torchvision cannot make 'nothing'" in refused("torchvision:nothing")
