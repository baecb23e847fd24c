"""Side by side with Torch-Pruning: every model of models.txt, both libraries, each in a process of its own.

    pip install --no-deps torch-pruning==1.6.1
    python benchmarks/vs_torch_pruning.py [SOURCE:NAME ...] [--limit 120] [--quick]     writes vs_torch_pruning.json

Rows that the results hold are not measured again. One thread; ours and theirs take turns. Before the clock starts each
library prunes a two-layer perceptron (`start_s`: imports and first-use caches); a model is then built and pruned up to
three times within 8 s, and the median of the CPU seconds counts (the limit is on the clock). A process can be slow from
its first moment to its last, so what both manage is measured in three of them each, in turns, and the median counts
again (`process_s`). Our graph's Python code is written and compiled when it is first called: those seconds are beside
the others as `code_s`. A library manages a model when the pruned one returns outputs of the original's shapes and has
fewer parameters. Torch-Pruning takes hints, such as num_heads; neither library gets any. `oracle` is the largest
difference between the masked and the pruned model, relative to `effect`, what the mask changes in the output, in
float64 on one sample, norms at one count (see vs_torch_pruning_sides.py).
"""

import json
import multiprocessing as mp
import time
import warnings
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch
from common import QUICK, Benchmark, without_compiled_operators
from model_list import MODELS, NEEDS, build, call, gap
from torch import nn
from torch.utils import _pytree as pytree
from tqdm import tqdm
from vs_torch_pruning_sides import SIDES, Seconds, Unknown

from dyncompress.passes.graph.cost import count_parameters

BENCHMARK = Benchmark(
    __file__, __doc__, needs=("torch_pruning", *NEEDS), within="summary",
    ours="of {of} models we manage {managed/ours}, Torch-Pruning {managed/torch_pruning}; {median_ratio:.2f} of its "
    "seconds (median)",
)  # fmt: skip
ROUNDS, ROUNDS_S, PROCESSES = (1, 8, 1) if QUICK else (3, 8, 3)
PARTS = ("capture", "typing", "score", "shrink")  # of our seconds


def main() -> None:
    """Measures what the results lack, then prints the summary."""
    parser = BENCHMARK.parser()
    parser.add_argument("models", nargs="*", default=MODELS, help="SOURCE:NAME; default: all of models.txt")
    parser.add_argument("--limit", type=float, default=120, help="seconds for one library on one model")
    options = BENCHMARK.start(parser)
    rows = BENCHMARK.read().get("models", {})
    for turn, name in enumerate(tqdm(options.models, desc="models")):
        for side in sorted(SIDES, reverse=turn % 2 == 1):
            if side not in rows.get(name, {}):
                rows.setdefault(name, {})[side] = row = in_own_process(name, side, options.limit)
                tqdm.write(f"{name} {side}: {json.dumps(row)}")
                save(rows)
        if all(rows[name][side]["ok"] for side in SIDES):
            repeat(name, rows[name], options.limit)
            save(rows)
    save(rows)
    print(json.dumps(summary(rows), indent=1))


def save(rows: dict[str, Any]) -> None:
    """Everything measured so far."""
    BENCHMARK.write({"summary": summary(rows), "models": rows})


# --- one library on one model, in a process of its own -----------------------------------------------------------


def repeat(name: str, row: dict[str, Any], limit: float) -> None:
    """Lets both libraries take turns until each has had all its processes."""
    for count in range(1, PROCESSES):
        for side in SIDES:
            taken = row[side].setdefault("process_s", [row[side]["seconds"]])
            if len(taken) == count:
                taken.append(in_own_process(name, side, limit, oracle=False)["seconds"])
            row[side]["seconds"] = median(taken)


def in_own_process(name: str, side: str, limit: float, oracle: bool = True) -> dict[str, Any]:
    """The row of one library on one model; the structural part and the oracle may take `limit` seconds each."""
    context = mp.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, side, sender))
    process.start()
    sender.close()
    row = _await(receiver, "ready", 600)
    row = row if "ok" in row else _await(receiver, "measured", limit)
    if row["ok"] and oracle:
        row |= _await(receiver, "oracle", limit)
    process.kill()
    process.join()
    return row


def _await(receiver: Connection, wanted: str, limit: float) -> dict[str, Any]:
    """What the child reports under `wanted`; a failure of that part where it does not come."""
    end, stage = time.monotonic() + limit, "start"
    while receiver.poll(max(0.0, end - time.monotonic())):
        try:
            kind, value = receiver.recv()
        except EOFError:
            return _failed(wanted, f"process died in {stage}")
        if kind == wanted:
            return value
        if kind == "failed":
            return _failed(wanted, value)
        stage = value
    return _failed(wanted, f"timeout: over {limit:g} s in {stage}")


def _failed(wanted: str, reason: str) -> dict[str, Any]:
    return {"oracle": None, "oracle_reason": reason} if wanted == "oracle" else {"ok": False, "reason": reason}


def _work(name: str, side: str, sender: Connection) -> None:
    """Child process: reports ready, measured and oracle, and each stage as it is entered."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    without_compiled_operators()
    reached = ["start"]

    def stage(text: str) -> None:
        reached.append(text)
        sender.send(("stage", text))

    try:
        begin = time.perf_counter()
        perceptron = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        SIDES[side].halve(perceptron, torch.randn(1, 4), {}, stage)
        start_s = time.perf_counter() - begin
        build(name)  # imports of the model's own library
        sender.send(("ready", {}))
        row = measure(name, side, stage) | {"start_s": round(start_s, 2)}
        sender.send(("measured", row))
        if row["ok"]:
            stage("oracle")
            sender.send(("oracle", oracle(name, side)))
    except Unknown as error:
        sender.send(("failed", str(error)))
    except BaseException as error:  # whatever it is, it is this library's result on this model
        line = next(iter(str(error).strip().splitlines()), "")
        sender.send(("failed", f"{type(error).__name__} in {reached[-1]}: {line}"[:300]))


def measure(name: str, side: str, stage: Any) -> dict[str, Any]:
    """Success, parameters left, and the median seconds of up to ROUNDS rounds."""
    rounds: list[Seconds] = []
    codes: list[float] = []
    begin = time.perf_counter()
    while len(rounds) < ROUNDS and (not rounds or time.perf_counter() - begin < ROUNDS_S):
        model, inputs = build(name)
        whole, shapes = count_parameters(model), [t.shape for t in call(model, inputs)]
        seconds: Seconds = {}
        small = SIDES[side].halve(model, _first_sample(inputs), seconds, stage)
        rounds.append(seconds)
        codes.append(_seconds_of(partial(getattr, small, "code", None)))
        if len(rounds) == 1:
            stage("forward")
            left, same = count_parameters(small) / whole, [t.shape for t in call(small.eval(), inputs)] == shapes
            if not same or left >= 1:
                return {"ok": False, "reason": "no-op" if same else "wrong output shape", "parameters_left": left}
    parts = {part: round(median(r[part] for r in rounds), 4) for part in rounds[0]}
    total = median(sum(r.values()) for r in rounds)
    code_s = round(median(codes), 4)
    return {"ok": True, "seconds": round(total, 4), "parts": parts, "code_s": code_s, "parameters_left": round(left, 4)}


def _seconds_of(job: Callable[[], Any]) -> float:
    begin = time.process_time()
    job()
    return time.process_time() - begin


def oracle(name: str, side: str) -> dict[str, Any]:
    """The gap between masked and pruned in float64; in float32 where the model writes float32 into its own code."""
    try:
        return {**_gap_in(torch.float64, name, side), "in": "float64"}
    except RuntimeError as error:
        if "double" not in str(error).lower():
            raise
        return {**_gap_in(torch.float32, name, side), "in": "float32"}


def _gap_in(dtype: torch.dtype, name: str, side: str) -> dict[str, float]:
    model, inputs = build(name)
    call(model.train(), inputs)  # batch norms see real activations: with the initial ones a deep network is all zero
    model = model.eval().to(dtype)
    one = pytree.tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, _first_sample(inputs))
    full = call(model, one)
    masked, small = SIDES[side].masked_and_small(model, one)
    zeroed, pruned = call(masked, one), call(small.eval(), one)
    effect = gap(full, zeroed)
    return {"oracle": gap(zeroed, pruned) / effect, "effect": effect}


def _first_sample(inputs: Any) -> Any:
    return pytree.tree_map(lambda x: x[:1], inputs)


# --- summary -----------------------------------------------------------------------------------------------------


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Counts, and the ratio of seconds (ours over theirs) over the models that both manage."""
    both = {n: r for n, r in rows.items() if len(r) == 2 and all(side["ok"] for side in r.values())}
    ratio = {n: round(r["ours"]["seconds"] / r["torch_pruning"]["seconds"], 3) for n, r in both.items()}
    mine = [r["ours"] for r in rows.values() if r.get("ours", {}).get("ok")]
    shares = {part: [side["parts"][part] / sum(side["parts"].values()) for side in mine] for part in PARTS}
    return {
        "managed": {side: sum(r.get(side, {}).get("ok", False) for r in rows.values()) for side in SIDES},
        "of": len(rows),
        "both": len(both),
        "median_ratio": round(median(ratio.values()), 3) if ratio else None,
        "our_parts": {part: round(median(share), 3) for part, share in shares.items() if share},
        "largest_ratio": max(ratio.items(), key=lambda item: item[1], default=None),
        "over_3": sorted(n for n, r in ratio.items() if r > 3),
        "ratio": dict(sorted(ratio.items(), key=lambda item: item[1])),
    }


if __name__ == "__main__":
    main()
