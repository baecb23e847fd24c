"""`python -m dyncompress.model_zoo.train [NAME ...]`: train the reference models and write their checkpoints.

Every epoch sees fresh distortions of the training originals. AdamW with a one-cycle learning rate, cross-entropy.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .data.digits import TRAIN_DRAWS, Originals, digits, originals, pool
from .data.splits import ArrayDataset, as_float
from .zoo import CHECKPOINTS, build, read_checkpoint

RECORD = "checkpoints.json"

_FIRST_EPOCH_SEED = 1_000  # far from the seeds of the fixed pools


@dataclass(frozen=True)
class Recipe:
    """How one model is trained: epochs, the peak of the one-cycle learning rate, images per step, weight decay."""

    epochs: int
    learning_rate: float
    batch: int = 128
    weight_decay: float = 0.05


RECIPES = {
    "vgg-digits": Recipe(epochs=30, learning_rate=2e-3),
    "resnet-digits": Recipe(epochs=20, learning_rate=4e-3),
    "vit-digits": Recipe(epochs=32, learning_rate=1e-3),
    "lstm-digits": Recipe(epochs=60, learning_rate=3e-3),
}


def train(name: str, recipe: Recipe, seed: int = 0, bf16: bool = False) -> nn.Module:
    """The model NAME trained on the digits, in eval mode; bf16 runs the convolutions in bfloat16 (faster with AMX)."""
    torch.manual_seed(seed)
    model = build(name)
    source = originals()[0]
    steps = -(-len(source.labels) * TRAIN_DRAWS // recipe.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=steps * recipe.epochs, pct_start=0.2
    )
    bar = tqdm(total=steps * recipe.epochs, desc=name, unit="step", mininterval=2)
    for epoch in range(recipe.epochs):
        for x, y in _batches(source, seed * _FIRST_EPOCH_SEED + _FIRST_EPOCH_SEED + epoch, recipe.batch):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
        bar.set_postfix(epoch=epoch + 1, loss=f"{loss.item():.3f}")
    bar.close()
    return model.eval()


def _batches(source: Originals, seed: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled (B, 1, 32, 32) images and (B,) labels."""
    data = pool(source, TRAIN_DRAWS, seed)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    for ids in order.split(batch):
        yield _images(data, ids), data.labels[ids]


def _images(data: ArrayDataset, ids: Tensor) -> Tensor:
    return as_float(data.inputs[ids]).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def accuracy(model: nn.Module, data: ArrayDataset, batch: int = 256) -> float:
    """The share of samples, 0..1, whose largest logit is their label; the model is used in the mode it is in."""
    right = 0
    for ids in torch.arange(len(data)).split(batch):
        right += int((model(_images(data, ids)).argmax(1) == data.labels[ids]).sum())
    return right / len(data)


def write_checkpoint(model: nn.Module, path: Path) -> None:
    """Store the weights as float16 and integer buffers as they are."""
    state = model.state_dict()
    halves = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    # Not save_file, which makes files that only their owner can read.
    path.write_bytes(save({key: value.contiguous() for key, value in halves.items()}))


def _make(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train NAME, write its checkpoint, and return what the record says about it."""
    recipe = RECIPES[name]
    start = time.perf_counter()
    model = train(name, recipe, args.seed, args.bf16)
    seconds = time.perf_counter() - start
    path = args.out / f"{name}.safetensors"
    write_checkpoint(model, path)
    model.load_state_dict(read_checkpoint(path))  # what is recorded is what the stored weights reach
    test = digits(args.seed).test
    assert isinstance(test, ArrayDataset)
    return {
        "command": f"python -m dyncompress.model_zoo.train {name} --seed {args.seed}" + " --bf16" * args.bf16,
        "epochs": recipe.epochs,
        "seed": args.seed,
        "test_accuracy": round(accuracy(model, test), 4),
        "seconds": round(seconds),
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": path.stat().st_size,
    }


def _record(name: str, entry: dict[str, Any], folder: Path) -> None:
    path = folder / RECORD
    record = json.loads(path.read_text()) if path.exists() else {}
    record[name] = entry
    path.write_text(json.dumps({key: record[key] for key in RECIPES if key in record}, indent=2) + "\n")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dyncompress.model_zoo.train", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)}; all when none is given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 arithmetic: faster on processors that have it")
    parser.add_argument("--threads", type=int, default=None, help="processor threads (default: torch's choice)")
    parser.add_argument(
        "--out", type=Path, default=CHECKPOINTS, help="folder of the checkpoints (default: the package)"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Train the named models; 0 when done, 2 for a name that does not exist."""
    args = _parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    unknown = [name for name in args.names if name not in RECIPES]
    if unknown:
        print(f"there is no recipe to train {unknown[0]!r}: use {', '.join(RECIPES)}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names or RECIPES:
        entry = _make(name, args)
        _record(name, entry, args.out)
        print(f"{name}: test accuracy {entry['test_accuracy']:.2%} after {entry['seconds']} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
