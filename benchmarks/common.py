"""What the benchmarks share: their arguments, their results on disk, how networks are trained, and PyTorch's MACs."""

import argparse
import atexit
import importlib.metadata
import json
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

import dyncompress as dc
from dyncompress.compress.options.choices import Precision
from dyncompress.compress.training.losses import cross_entropy
from dyncompress.compress.training.trainer import fit
from dyncompress.model_zoo import Splits, build

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "shared" / "data"
QUICK = "--quick" in sys.argv  # scripts, and `splits`, then make everything small
SKIPPED = 77  # exit status where something is missing, as automake's tests have it
AMP: Precision | None = "bf16" if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else None

# a residual network's first training
SGD = partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4, nesterov=True)
RESIDUAL = dc.Training(epochs=1 if QUICK else 6, lr=0.1, batch_size=128, optimizer=SGD, mixed_precision=AMP)

_STEPS = 256  # of pruning ratios

Result = dict[str, Any]  # what a JSON object comes to
Net = TypeVar("Net", bound=nn.Module)


@dataclass(frozen=True)
class Benchmark:
    """A script: `file` and `doc` are its `__file__` and `__doc__`; the rest is what it needs and its row in README.md.

    data: it reads ../shared/data. needs: modules beside our own dependencies.
    published: the figures of the method's source. ours: figures of the script's JSON, as {path/of/keys:format}, in its
    part `within`.
    """

    file: str
    doc: str | None
    data: bool = False
    needs: tuple[str, ...] = ()
    published: str = ""
    within: str = ""
    ours: str = ""

    @property
    def name(self) -> str:
        return Path(self.file).stem

    @property
    def shows(self) -> str:
        """The first line of the script's documentation."""
        return (self.doc or "").partition("\n")[0]

    @property
    def folder(self) -> Path:
        """Where results go: beside the script; with --quick a folder that is gone at the end."""
        return _temporary() if QUICK else HERE

    @property
    def results(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def runs(self) -> Path:
        """Where trained networks are kept, so that an interrupted run goes on."""
        return _temporary() / "runs" if QUICK else Path("runs") / self.name

    def parser(self) -> argparse.ArgumentParser:
        """--help shows the script's documentation."""
        parser = argparse.ArgumentParser(description=self.doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--quick", action="store_true", help="see that it runs: little of everything, nothing kept")
        return parser

    def start(self, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
        """The arguments; torch gets --threads, or one thread. Exits with SKIPPED where something is missing."""
        asked = (parser or self.parser()).parse_args()
        without_compiled_operators()
        missing = [name for name in self.needs if find_spec(name) is None]
        if self.data and not DATA.is_dir():
            missing.append(str(DATA))
        if missing:
            print(f"skipped: {', '.join(missing)} is not there", file=sys.stderr)
            raise SystemExit(SKIPPED)
        torch.set_num_threads(getattr(asked, "threads", 1))
        return asked

    def read(self, setting: Result | None = None) -> Result:
        """What was measured so far. Raises SystemExit where that was with another setting."""
        found: Result = json.loads(self.results.read_text()) if self.results.exists() else {}
        return found if setting is None else self.checked(found, setting)

    def checked(self, found: Result, setting: Result) -> Result:
        """Raises SystemExit for results that were measured with another setting."""
        if found.get("setting", setting) != setting:
            raise SystemExit(f"{self.results.name} holds results of another setting; move it away first")
        return found

    def write(self, result: Result, options: str = "") -> None:
        """With how to repeat the measurement. Beside its place first: an interrupted run leaves the old file."""
        how = {"command": f"python benchmarks/{self.name}.py {options}".rstrip(), "threads": torch.get_num_threads()}
        how |= {name: importlib.metadata.version(name) for name in ("torch", *self.needs)}
        text = json.dumps({**how, **result, **how}, indent=1)
        beside = self.results.with_suffix(".tmp")
        beside.write_text(text + "\n")
        os.replace(beside, self.results)


@cache
def _temporary() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="benchmarks-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def without_compiled_operators() -> None:
    """A CPU-only torch cannot load torchvision's, which transformers imports too; no model here needs one."""
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))


def complete(rows: Result, measures: Mapping[str, Callable[[], Result]], save: Callable[[], None]) -> None:
    """Measures the rows that are missing, and prints and saves each as soon as it is known."""
    for name, measure in measures.items():
        if name not in rows:
            rows[name] = measure()
            print(name, json.dumps(rows[name]), flush=True)
            save()


def means(rows: Iterable[Result], *names: str) -> Result:
    """Of these figures, over the seeds."""
    rows = list(rows)
    return {name: round(fmean(row[name] for row in rows), 4) for name in names}


# --- training ----------------------------------------------------------------------------------------------------


def residual(depth: int, data: Splits, seed: int) -> nn.Module:
    """A residual network for these images, with random weights."""
    torch.manual_seed(seed)
    return build(f"resnet{depth}-cifar", channels=data.train[0][0].shape[0])


def run_in(folder: Path, seed: int, device: str | None = None) -> dc.Run:
    """A training that is kept in a folder, and goes on from there."""
    return dc.Run(seed=seed, device=device, run_dir=folder, resume=folder.exists(), progress=True)


def trained(net: Net, data: Dataset[Any], training: dc.Training, run: dc.Run) -> Net:
    """`net`, trained for a task."""
    fit(net, cross_entropy, data, training, run)
    return net.eval()


def kept_in(file: Path, make: Callable[[], dc.DynamicModel]) -> dc.DynamicModel:
    """What is made, or the file that an earlier run has left of it."""
    if not file.exists():
        dc.save(make(), file)
    loaded = dc.load(file)
    assert isinstance(loaded, dc.DynamicModel)
    return loaded


def channels_last(net: Net) -> Net:
    """`net`, its convolutions and poolings in the layout in which they are fastest on a processor."""
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


# --- multiply-adds -----------------------------------------------------------------------------------------------


@torch.no_grad()
def macs_of(model: nn.Module, example: Tensor) -> int:
    """Multiply-adds of one image by PyTorch's counter (two operations each)."""
    counter = FlopCounterMode(display=False)
    with counter:
        model.eval()(example)
    return counter.get_total_flops() // 2


def largest_within(macs: float, example: Tensor, prune: Callable[[float], nn.Module]) -> nn.Module:
    """The largest of the networks within `macs` that `prune` makes, over pruning ratios in steps of 1/256."""
    best, low, high = None, 0, _STEPS
    while low < high:
        middle = (low + high) // 2
        small = prune(middle / _STEPS)
        if macs_of(small, example) <= macs:
            best, high = small, middle
        else:
            low = middle + 1
    assert best is not None
    return best
