"""ONNX files in onnxruntime: answers by name, the graphs inside, and what ran."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime


def session(path: Path | str, profile: Path | None = None) -> onnxruntime.InferenceSession:
    """A session on one thread; with `profile`, it writes down what ran to a file of that prefix."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(file: Path | str | onnxruntime.InferenceSession, batch: Any, **thresholds: float) -> dict[str, np.ndarray]:
    """The outputs by name for a batch: a tensor, a tuple or a dict of them, in the order of the file's inputs."""
    made = file if isinstance(file, onnxruntime.InferenceSession) else session(file)
    tensors = list(batch.values()) if isinstance(batch, dict) else list(batch) if isinstance(batch, tuple) else [batch]
    tensors += [np.array(value, np.float32) for value in thresholds.values()]
    names = [i.name for i in made.get_inputs()][: len(tensors) - len(thresholds)]
    feed = dict(zip([*names, *thresholds], map(np.asarray, tensors), strict=True))
    return dict(zip((o.name for o in made.get_outputs()), made.run(None, feed), strict=True))


def convolutions(path: Path, batch: Any, folder: Path) -> Iterator[tuple[list[str], int]]:
    """The convolutions that one run calls: the parts of each one's name, and its batch size."""
    made = session(path, folder / "profile")
    run(made, batch)
    for event in json.loads(Path(made.end_profiling()).read_text()):
        if event["name"].endswith("_kernel_time") and event["args"]["op_name"] in {"Conv", "FusedConv"}:
            shape = next(iter(event["args"]["input_type_shape"][0].values()))
            yield event["name"].split("/"), shape[0]


def graphs(path: Path) -> list[onnx.GraphProto]:
    """The file's graph and, nested, those of its branches."""
    found = [onnx.load(path).graph]
    for graph in found:
        found += [a.g for n in graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH]
    return found
