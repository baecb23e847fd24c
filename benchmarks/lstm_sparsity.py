"""Intrinsic sparse structures of an LSTM language model on WikiText-2 (Wen et al., ICLR 2018).

    python benchmarks/lstm_sparsity.py [--macs 0.35] [--words 0.5] [--out FOLDER]   writes benchmarks/lstm_sparsity.json

    dense       trained, then trained on for as long as the others
    learned     the same trained network, sparsified to a share of its multiply-adds, for as many epochs
    pruned      the same trained network, cut by magnitude to the same share, trained on for as many epochs
    scratch     the learned shape with random weights, trained for the sum of all those epochs

The small ones train with less dropout: half as many hidden states are not oversized for these words any more, and with
the large one's dropout their training loss stays where their validation loss is.

Words seen less than 60 times are one word. Trained on the first share of the training words: half of them are as many
as Penn Treebank has, where the paper's network is as oversized as this one. The embedding stays whole: it costs little
and its columns are no hidden states. Perplexity on the validation and test files; milliseconds per call on 35
words in float32, the models taking turns, medians. Training is in bfloat16 where the processor has it. Interrupted runs
resume.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import read, write
from data import FOLDER, available
from torch import fx, nn
from torch.utils.data import Subset

import dyncompress as dc
from dyncompress.compress.sparsity.retrain import reinit
from dyncompress.compress.training.losses import cross_entropy
from dyncompress.compress.training.trainer import fit
from dyncompress.model_zoo import build
from dyncompress.passes.graph.copying import deep_copy
from dyncompress.passes.graph.cost import count_macs, count_parameters

HIDDEN, DROPOUT, SMALL_DROPOUT, LR, BATCH, LENGTH = 512, 0.5, 0.3, 2e-3, 64, 35
FIRST, SPARSE, FINE = 10, 5, 5
WHOLE = ("embedding",)
RESULTS = Path(__file__).with_suffix(".json")


def perplexity(model: nn.Module, data: Any) -> float:
    """exp of the mean loss per word."""
    result = dc.evaluate(model, data, batch_size=BATCH)
    assert result.perplexity is not None
    return round(result.perplexity, 3)


def timed(models: dict[str, fx.GraphModule], batch: int, words: int, rounds: int = 40) -> dict[str, float]:
    """Median milliseconds per call, the models taking turns."""
    ids = torch.randint(0, words, (batch, LENGTH), generator=torch.Generator().manual_seed(0))
    taken: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for number in range(rounds + 3):
            for name, model in models.items():
                begin = time.perf_counter()
                model(ids)
                if number >= 3:
                    taken[name].append(1e3 * (time.perf_counter() - begin))
    return {name: round(median(ms), 3) for name, ms in taken.items()}


def widths(gm: fx.GraphModule) -> list[int]:
    """The hidden widths of the LSTM's layers."""
    return [axis.size for axis in dc.infer_axes(gm) if axis.kind == "hidden states"]


def make(asked: argparse.Namespace, splits: Any) -> dict[str, fx.GraphModule]:
    """The four models, each trained or taken from where an interrupted run left it."""
    amp = "bf16" if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else None
    data = Subset(splits.train, range(round(asked.words * len(splits.train))))
    options: dict[str, Any] = {"batch_size": BATCH, "seed": asked.seed, "mixed_precision": amp, "progress": True}

    def train(gm: fx.GraphModule, name: str, epochs: int, lr: float = LR) -> fx.GraphModule:
        run = asked.out / name
        fit(gm, cross_entropy, data, epochs=epochs, lr=lr, run_dir=run, resume=run.exists(), **options)
        return gm

    torch.manual_seed(asked.seed)
    words = len(splits.vocabulary)
    net = build("lstm-lm", vocabulary=words, width=HIDDEN, hidden=HIDDEN, dropout=DROPOUT)
    first = train(dc.capture(net, torch.zeros(2, LENGTH, dtype=torch.int64)), "first", FIRST)
    report("first", {"validation": perplexity(first, splits.calibration)})
    more, half = SPARSE + FINE, LR / 2
    dense = train(deep_copy(first), "dense", more, half)
    report("dense", {"validation": perplexity(dense, splits.calibration)})
    start, run = with_dropout(first, SMALL_DROPOUT), asked.out / "learned"
    learned = dc.sparsify(
        start, data, macs=asked.macs, epochs=SPARSE, finetune=FINE, shrink_every=1, lr=half, ignore=WHOLE, run_dir=run,
        resume=run.exists(), **options,
    )  # fmt: skip
    report("learned", {"validation": perplexity(learned, splits.calibration), "hidden": widths(learned)})
    scratch = train(reinit(learned), "scratch", FIRST + more)
    report("scratch", {"validation": perplexity(scratch, splits.calibration)})
    pruned = train(dc.prune(start, macs=asked.macs, ignore=WHOLE), "pruned", more, half)
    report("pruned", {"validation": perplexity(pruned, splits.calibration)})
    return {"dense": dense, "learned": learned, "pruned": pruned, "scratch": scratch}


def with_dropout(gm: fx.GraphModule, p: float) -> fx.GraphModule:
    """A copy that drops a share `p` of what goes into its layers and comes out of them."""
    copied = deep_copy(gm)
    for module in copied.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
        elif isinstance(module, nn.LSTM):
            module.dropout = p
    return copied


def report(name: str, found: dict[str, Any]) -> None:
    """One line per model as soon as it is there."""
    print(name, json.dumps(found), flush=True)


def main() -> None:
    """Trains, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--macs", type=float, default=0.35)
    parser.add_argument("--words", type=float, default=0.5, help="the share of the training words")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/lstm_sparsity"))
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if not available():
        raise SystemExit(f"WikiText-2 is not in {FOLDER}")
    splits = dc.load_data(f"text:{FOLDER / 'wikitext2'}?length={LENGTH}&min_count=60")
    models = {name: gm.eval() for name, gm in make(asked, splits).items()}
    whole, rows = count_macs(models["dense"]), {}
    speed = {batch: timed(models, batch, len(splits.vocabulary)) for batch in (1, 16)}
    for name, gm in models.items():
        rows[name] = {
            "hidden": widths(gm),
            "macs": round(count_macs(gm) / whole, 4),
            "parameters": count_parameters(gm),
            "validation_perplexity": perplexity(gm, splits.calibration),
            "test_perplexity": perplexity(gm, splits.test),
            "ms": {str(batch): speed[batch][name] for batch in speed},
            "speed_up": {str(b): round(speed[b]["dense"] / speed[b][name], 2) for b in speed},
        }
        print(name, json.dumps(rows[name]), flush=True)
    learned = models["learned"].meta["info"]["sparsify"]
    setting = {
        "vocabulary": len(splits.vocabulary), "hidden": HIDDEN, "dropout": [DROPOUT, SMALL_DROPOUT], "lr": LR,
        "batch": BATCH, "length": LENGTH, "seed": asked.seed,
        "epochs": {"first": FIRST, "sparsifying": SPARSE, "fine-tuning": FINE},
        "share_of_words": asked.words, "kept_whole": list(WHOLE),
    }  # fmt: skip
    result = {
        "command": f"python benchmarks/lstm_sparsity.py --macs {asked.macs} --words {asked.words}",
        "machine": f"{asked.threads} thread(s), CPU, torch {torch.__version__}",
        "setting": setting,
        "learned_share": learned["learned"],
        "models": rows,
    }
    write(RESULTS, {**read(RESULTS), f"{HIDDEN} hidden, {asked.words:g} of the words": result})


if __name__ == "__main__":
    main()
