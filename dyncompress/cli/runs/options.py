"""Options that several commands share; every field is one option of the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from ...errors import RequestError

# The panels of the help. The everyday options of a step come before, its groups between the first and the second.
DATA, OUTPUT = Group("Data and device", sort_key=1), Group("Output", sort_key=3)
MODEL, STREAM = Group("Model", sort_key=4), Group("Larger than memory", sort_key=5)

Flag = Annotated[bool, Parameter(negative=())]  # off unless given, so that it needs no --no-...


@Parameter(name="*", group=MODEL)
@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How to load MODEL."""

    arch: str | None = None
    """Architecture of a state dict: zoo:NAME, timm:NAME, torchvision:NAME, hf:NAME or package.module:factory."""
    allow_pickle: Flag = False
    """Unpickle a file that holds a whole module; that runs code from the file."""
    input_shape: Annotated[str | None, Parameter(show_default=False)] = None
    """Shape of one input without the batch, such as 3,224,224; only needed where nothing else tells."""

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The input shape as numbers. Raises RequestError for anything else."""
        if self.input_shape is None:
            return None
        sizes = self.input_shape.split(",")
        if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
            raise RequestError(f"--input-shape {self.input_shape}: give positive sizes, such as 3,224,224")
        return tuple(map(int, sizes))


@Parameter(name="*", group=DATA)
@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What a model is trained and judged on, and where."""

    data: str | None = None
    """Labelled: digits, npz:FILE, imagefolder:DIR, text:DIR, cifar10:DIR, hf:NAME_OR_DIR or package.module:factory."""
    seed: int = 0
    """Seed of every random number."""
    device: str | None = None
    """Such as cpu, cuda or cuda:1; by default a GPU where there is one."""


@Parameter(name="*", group=OUTPUT)
@dataclass(frozen=True, kw_only=True)
class FolderOptions:
    """Where the result goes."""

    out: Path | None = None
    """Run folder; by default a fresh one, runs/COMMAND-MODEL-N."""
    resume: Flag = False
    """Continue the interrupted run in the folder (by default the last of its kind), or start one."""
    overwrite: Flag = False
    """Replace the run in --out."""


OutputFlag = Annotated[Flag, Parameter(group=OUTPUT)]
VerboseFlag = Annotated[OutputFlag, Parameter(help="Show every layer of a large model.")]
JsonFlag = Annotated[
    Flag,
    Parameter(name="--json", group=OUTPUT, help="Print one JSON object on standard output and nothing else there."),
]


@Parameter(name="*", group=STREAM)
@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """How to prune what is larger than memory."""

    stream: Flag = False
    """MODEL is safetensors (a file or a folder) larger than memory: read it in pieces. Needs --arch."""
    drop: tuple[str, ...] = ()
    """With --stream: tensors of MODEL that the architecture does not use, by name or pattern such as '*.inv_freq'."""
