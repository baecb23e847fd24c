"""Intrinsic sparse structures of an LSTM language model on WikiText-2 (Wen et al., ICLR 2018).

    python benchmarks/lstm_sparsity.py [--macs 0.35] [--words 0.5] [--quick]        writes lstm_sparsity.json

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
from typing import Any

import torch
from common import AMP, DATA, QUICK, Benchmark, run_in, trained
from data import few, take
from torch import fx, nn

import dyncompress as dc
from dyncompress.compress.evaluation.wall_clock import measure_latency
from dyncompress.compress.sparsity.retrain import reinit
from dyncompress.compress.sparsity.sparsify_report import SparsifyReport
from dyncompress.compress.training.batches import size_of
from dyncompress.model_zoo import Splits, build
from dyncompress.passes.graph.copying import deep_copy
from dyncompress.passes.graph.cost import count_macs, count_parameters

BENCHMARK = Benchmark(
    __file__, __doc__, data=True, within="512 hidden, 0.5 of the words/models",
    published="two layers of 1,500 become 373 and 315, 10.59 times as fast at the same perplexity on Penn Treebank",
    ours="two of 512 become {learned/hidden/0} and {learned/hidden/1}, {learned/speed_up/1:.1f} times as fast; "
    "perplexity {dense/test_perplexity:.1f} dense, {learned/test_perplexity:.1f} learned, "
    "{scratch/test_perplexity:.1f} from scratch",
)  # fmt: skip
HIDDEN, DROPOUT, SMALL_DROPOUT, LR, BATCH, LENGTH = 32 if QUICK else 512, 0.5, 0.3, 2e-3, 64, 35
FIRST, SPARSE, FINE = (1, 1, 1) if QUICK else (10, 5, 5)
WHOLE = dc.Limits(ignore=("embedding",))
REPEATS = 1 if QUICK else 40  # of every timed call


def perplexity(model: nn.Module, data: Any) -> float:
    """exp of the mean loss per word."""
    result = dc.evaluate(model, data, batch_size=BATCH)
    assert result.perplexity is not None
    return round(result.perplexity, 3)


def make(asked: argparse.Namespace, splits: Splits) -> dict[str, fx.GraphModule]:
    """The four models, each trained or taken from where an interrupted run left it."""
    data = take(splits.train, round(asked.words * size_of(splits.train, "training")))

    def training(epochs: int, lr: float) -> dc.Training:
        return dc.Training(epochs=epochs, lr=lr, batch_size=BATCH, mixed_precision=AMP)

    def train(gm: fx.GraphModule, name: str, epochs: int, lr: float = LR) -> fx.GraphModule:
        done = trained(gm, data, training(epochs, lr), run_in(BENCHMARK.runs / name, asked.seed))
        print(name, perplexity(done, splits.calibration), flush=True)
        return done

    torch.manual_seed(asked.seed)
    words = len(splits.vocabulary)
    net = build("lstm-lm", vocabulary=words, width=HIDDEN, hidden=HIDDEN, dropout=DROPOUT)
    first = train(dc.capture(net, torch.zeros(2, LENGTH, dtype=torch.int64)), "first", FIRST)
    more, half = SPARSE + FINE, LR / 2
    dense = train(deep_copy(first), "dense", more, half)
    start = with_dropout(first, SMALL_DROPOUT)
    learned = dc.sparsify(
        start, data, macs=asked.macs, finetune=FINE, lasso=dc.Lasso(shrink_every=1), limits=WHOLE,
        training=training(SPARSE, half), run=run_in(BENCHMARK.runs / "learned", asked.seed),
    )  # fmt: skip
    scratch = train(reinit(learned), "scratch", FIRST + more)
    pruned = train(dc.prune(start, macs=asked.macs, limits=WHOLE), "pruned", more, half)
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


def main() -> None:
    """Trains, measures, writes."""
    parser = BENCHMARK.parser()
    parser.add_argument("--macs", type=float, default=0.35)
    parser.add_argument("--words", type=float, default=0.5, help="the share of the training words")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = BENCHMARK.start(parser)
    whole = dc.load_data(f"text:{DATA / 'wikitext2'}?length={LENGTH}&min_count=60")
    splits = few(whole) if QUICK else whole
    models = {name: gm.eval() for name, gm in make(asked, splits).items()}
    macs, rows = count_macs(models["dense"]), {}
    ids = torch.randint(0, len(splits.vocabulary), (16, LENGTH), generator=torch.Generator().manual_seed(0))
    speed = measure_latency(models, {batch: [ids[:batch]] for batch in (1, 16)}, REPEATS)
    for name, gm in models.items():
        rows[name] = {
            "hidden": [axis.size for axis in dc.infer_axes(gm) if axis.kind == "hidden states"],
            "macs": round(count_macs(gm) / macs, 4),
            "parameters": count_parameters(gm),
            "validation_perplexity": perplexity(gm, splits.calibration),
            "test_perplexity": perplexity(gm, splits.test),
            "ms": {str(batch): round(ms, 3) for batch, ms in speed[name].items()},
            "speed_up": {str(batch): round(speed["dense"][batch] / ms, 2) for batch, ms in speed[name].items()},
        }
        print(name, json.dumps(rows[name]), flush=True)
    setting = {
        "vocabulary": len(splits.vocabulary), "hidden": HIDDEN, "dropout": [DROPOUT, SMALL_DROPOUT], "lr": LR,
        "batch": BATCH, "length": LENGTH, "seed": asked.seed,
        "epochs": {"first": FIRST, "sparsifying": SPARSE, "fine-tuning": FINE},
        "share_of_words": asked.words, "macs": asked.macs, "kept_whole": list(WHOLE.ignore),
    }  # fmt: skip
    result = {"setting": setting, "learned_share": SparsifyReport.of(models["learned"]).learned, "models": rows}
    name = f"{HIDDEN} hidden, {asked.words:g} of the words"
    BENCHMARK.write({**BENCHMARK.read(), name: result}, f"--macs {asked.macs} --words {asked.words}")


if __name__ == "__main__":
    main()
