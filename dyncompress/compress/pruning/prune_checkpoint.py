"""Pruning a checkpoint that is larger than memory: ranked from its file, reading every tensor once, and then streamed.

l2(i) = sqrt( sum over slices of ||w_i||^2 )        as `importance`; squares and sums in float64 whatever the dtype
"""

import json
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from tqdm import tqdm

from ...errors import RequestError
from ...passes.axes.axes import Axes, Axis, infer_axes
from ...runtime.files.model_folder import is_finished
from ...runtime.files.shards import Source
from ...runtime.sharded.match_tensors import match
from ...runtime.sharded.shard_writer import write_json
from ...runtime.sharded.shrink_checkpoint import MAX_SHARD_BYTES, check_output, shrink_checkpoint
from ..importance.group_sums import parameter_slices
from ..options.limits import Limits
from ..options.method_options import Cuts
from ..options.steps import Prune, refuse
from ..options.training_options import Run
from .cost_left import one_target
from .ranking import default_scope
from .removal_search import choose

KEPT = "kept.json"  # what was chosen and for which request: a resumed run does not rank again


def prune_checkpoint(
    gm: fx.GraphModule,
    source: str | PathLike[str],
    out: str | PathLike[str],
    *,
    ratio: float | None = Prune.ratio,
    macs: float | None = Prune.macs,
    params: float | None = Prune.params,
    bytes: float | None = Prune.bytes,
    drop: Sequence[str] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    limits: Limits = Prune.limits,
    cuts: Cuts = Prune.cuts,
    run: Run = Run(),
) -> Path:
    """Prunes a checkpoint by L2 importance without loading it; the kept indices are in kept.json beside the result.

    With resume, a run that was killed goes on where it stopped, and the same call on its finished result does nothing.

    Args:
        gm: the model, captured on the meta device (`capture_empty`), in the dtypes of the source.
        ratio, macs, params, bytes, limits: as for `prune`. cuts: scope and exact; there is one cut.
        source, out, drop, max_shard_bytes, overwrite: as for `shrink_checkpoint`.
        run: resume and progress; nothing is drawn at random, and `out` is the run's folder.

    Returns:
        `out`.

    Raises:
        RequestError, DynCompressError: as `prune` and `shrink_checkpoint`; weights that are not finite.
    """
    metric, target = one_target({"ratio": ratio, "macs": macs, "params": params, "bytes": bytes})
    refuse("prune_checkpoint", cuts, ("steps", "distill", "latency_batch"))
    refuse("prune_checkpoint", run, ("seed", "device", "run_dir"))
    scope, stored, folder = cuts.scope or default_scope(limits.depth), Source(Path(source)), Path(out)
    axes, limits = infer_axes(gm), replace(limits, round_to=limits.round_to or 1)
    resume, progress = run.resume, run.shows_progress
    request = {
        metric: target, "scope": scope, **asdict(limits), "ignore": list(limits.ignore), "exact": cuts.exact,
        "drop": list(drop),
        "source": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in stored.files],
    }  # fmt: skip
    finished = is_finished(folder)
    keep = None if finished and overwrite else _chosen_before(folder, request, resume, overwrite)
    if keep is not None and finished:
        return folder
    check_output(stored, folder, resume=resume, overwrite=overwrite)
    if keep is None:
        scores = stream_l2_scores(axes, stored, match(gm, stored, drop), progress=progress)
        chosen = choose(axes, scores, metric, target, limits, scope=scope)
        keep = {axis.name: chosen[axis.atom].tolist() for axis in axes if axis.atom in chosen}
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / KEPT, {"request": request, "keep": keep})
    return shrink_checkpoint(
        gm, keep, source, out, exact=cuts.exact, drop=drop, max_shard_bytes=max_shard_bytes, progress=progress,
        resume=resume, overwrite=overwrite,
    )  # fmt: skip


def stream_l2_scores(
    axes: Axes, source: Source, names: Mapping[str, str], *, progress: bool = False
) -> dict[str, Tensor]:
    """L2 norm of each group of every prunable axis, by axis name: shape (axis.size,), float64.

    Args:
        axes: of a model whose parameters need no values.
        names: the source's name of each of the model's tensors.

    Raises:
        RequestError: a tensor holds NaN or infinite values.
    """
    gm = axes.types.gm
    slices = [(axis, list(parameter_slices(gm, axis))) for axis in axes.prunable]
    # All sums are made before anything is read: between short-lived blocks they would keep memory in pieces.
    sums: dict[int, dict[int, Tensor]] = {}
    for _, pieces in slices:
        for tensor, dim, _ in pieces:
            sums.setdefault(id(tensor), {})[dim] = torch.zeros(tensor.shape[dim], dtype=torch.float64)
    for key, name in _in_file_order(gm, sums, source, names, progress):
        _add_squares(source, name, sums[key])
    return {axis.name: _gathered(axis, pieces, sums) for axis, pieces in slices}


def _in_file_order(
    gm: fx.GraphModule, wanted: Container[int], source: Source, names: Mapping[str, str], progress: bool
) -> Iterator[tuple[int, str]]:
    """The id of each wanted parameter and its name in the source, as they lie in the files."""
    found = {id(p): names[name] for name, p in gm.named_parameters(remove_duplicate=False) if id(p) in wanted}
    order = sorted(found.items(), key=lambda item: (source.tensors[item[1]].file, source.tensors[item[1]].begin))
    total = sum(source.tensors[name].nbytes for _, name in order)
    with tqdm(total=total, desc="ranking", unit="B", unit_scale=True, file=sys.stderr, disable=not progress) as bar:
        for key, name in order:
            yield key, name
            bar.update(source.tensors[name].nbytes)


def _add_squares(source: Source, name: str, sums: Mapping[int, Tensor]) -> None:
    """Adds to `sums[dim]`, of shape (size of the dim,), the squares summed over all other dims.

    Raises:
        RequestError: they are not finite.
    """
    row = 0
    for piece in source.pieces(name):
        squares = piece.to(torch.float64, copy=True)
        squares *= squares
        for dim, total in sums.items():
            others = [d for d in range(squares.dim()) if d != dim]
            along = squares.sum(others) if others else squares
            if dim == 0:
                total[row : row + len(along)] = along
            else:
                total += along
        row += len(piece)
    if not all(total.isfinite().all() for total in sums.values()):
        raise RequestError(f"{source.tensors[name].file}: {name} holds NaN or infinite values")


def _gathered(
    axis: Axis, pieces: Sequence[tuple[Tensor, int, Tensor]], sums: Mapping[int, Mapping[int, Tensor]]
) -> Tensor:
    total = torch.zeros(axis.size, dtype=torch.float64)
    for tensor, dim, positions in pieces:
        total += sums[id(tensor)][dim][positions].sum(1)
    return total.sqrt()


def _chosen_before(
    folder: Path, request: Mapping[str, Any], resume: bool, overwrite: bool
) -> dict[str, list[int]] | None:
    """The indices that an earlier run of the same request has chosen.

    Raises:
        RequestError: they were chosen for another request.
    """
    path = folder / KEPT
    if not resume or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        before, keep = found["request"], found["keep"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{path} is damaged: overwrite the folder or give another") from error
    if before == request:
        return dict(keep)
    if overwrite:
        return None
    changed = sorted(key for key in {*before, *request} if before.get(key) != request.get(key))
    raise RequestError(
        f"{folder} holds another run ({', '.join(changed)} differ): give the same options, overwrite it or give "
        "another folder"
    )
