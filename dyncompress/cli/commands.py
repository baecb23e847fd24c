"""The commands: their options, and the one function each calls. What needs torch is imported when a command runs."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from .. import __version__
from ..compress.options.steps import Compare, Convert, Export, Gate, Prune, Retrain, Sparsify, Step
from ..compress.recipes.recipe import Recipe, read_recipe
from ..errors import RequestError
from .app import app, printing
from .runs.folders import choose_folder
from .runs.options import (
    DATA,
    MODEL,
    DataOptions,
    Flag,
    FolderOptions,
    JsonFlag,
    ModelOptions,
    OutputFlag,
    StreamOptions,
    VerboseFlag,
)
from .step_options import command

app.version = __version__

Model = Annotated[
    str, Parameter(help="A model file, zoo:NAME, timm:NAME, torchvision:NAME, hf:NAME or package.module:factory.")
]

_SOURCE, _DATA, _FOLDER = ModelOptions(), DataOptions(), FolderOptions()
_STREAM = StreamOptions()


@app.command(help_epilogue="Example: dyncompress demo")
def demo(
    *,
    seed: Annotated[int, Parameter(group=DATA)] = 0,
    device: Annotated[str | None, Parameter(group=DATA)] = None,
    folder: FolderOptions = _FOLDER,
    json: JsonFlag = False,
) -> None:
    """Makes the reference VGG dynamic on the digits data, measures it against the static one, exports it to ONNX.

    Args:
        seed: Seed of every random number.
        device: Such as cpu, cuda or cuda:1; by default a GPU where there is one.
    """
    steps: tuple[Step, ...] = (Convert(exits=3), Export())
    recipe = Recipe(model="zoo:vgg-digits", data="digits", seed=seed, device=device, steps=steps)
    _run("demo", recipe, folder, json)


@command(Convert, "zoo:vgg-digits --exits 3 --data digits")
@command(Gate, "zoo:resnet-digits --macs 0.7 --data digits")
@command(Retrain, "small.safetensors --early zoo:resnet-digits --data digits")
def take(
    model: Model,
    /,
    *,
    step: Convert | Gate | Retrain,
    source: ModelOptions = _SOURCE,
    data: DataOptions = _DATA,
    folder: FolderOptions = _FOLDER,
    json: JsonFlag = False,
) -> None:
    """One step, of whichever kind the command is named after."""
    _run(step.name, _recipe(model, (step,), source, data), folder, json, source.allow_pickle)


@command(Prune, "zoo:resnet-digits --macs 0.5 --data digits")
def prune(
    model: Model,
    /,
    *,
    step: Prune,
    source: ModelOptions = _SOURCE,
    data: DataOptions = _DATA,
    stream: StreamOptions = _STREAM,
    folder: FolderOptions = _FOLDER,
    verbose: VerboseFlag = False,
    json: JsonFlag = False,
) -> None:
    if stream.stream or stream.drop:
        from .runs import streaming

        streaming.check_request(step, source, data, stream)
        where = _folder("prune", model, folder)
        with printing(json) as printer:
            report = streaming.prune_streamed(
                model, step, source, stream, where,
                resume=folder.resume, overwrite=folder.overwrite, console=printer.console,
            )  # fmt: skip
            printer.result(report)
        return
    _run("prune", _recipe(model, (step,), source, data), folder, json, source.allow_pickle, verbose)


@command(Sparsify, "zoo:resnet-digits --macs 0.5 --data digits")
def sparsify(
    model: Model,
    /,
    *,
    step: Sparsify,
    source: ModelOptions = _SOURCE,
    data: DataOptions = _DATA,
    folder: FolderOptions = _FOLDER,
    verbose: VerboseFlag = False,
    json: JsonFlag = False,
) -> None:
    _run("sparsify", _recipe(model, (step,), source, data), folder, json, source.allow_pickle, verbose)


@command(Compare, "zoo:vgg-digits --shares 0.5 0.25 --data digits")
def compare(
    model: Model,
    /,
    *,
    step: Compare,
    source: ModelOptions = _SOURCE,
    data: DataOptions = _DATA,
    folder: FolderOptions = _FOLDER,
    json: JsonFlag = False,
) -> None:
    from .runs.comparing import compare_methods

    recipe, where = _recipe(model, (), source, data), _folder("compare", model, folder)
    given = {"resume": folder.resume, "allow_pickle": source.allow_pickle}
    with printing(json) as printer:
        printer.result(compare_methods(recipe, step, where, printer.console, **given))


@app.command(help_epilogue="Example: dyncompress run recipe.yaml --set convert.epochs=2")
def run(
    recipe: Path,
    /,
    *,
    set: Annotated[tuple[str, ...], Parameter(group=MODEL)] = (),
    allow_pickle: Annotated[Flag, Parameter(group=MODEL)] = False,
    folder: FolderOptions = _FOLDER,
    json: JsonFlag = False,
) -> None:
    """Runs the steps of a recipe file.

    Args:
        recipe: A YAML file; every run folder holds the one that made it.
        set: KEY=VALUE instead of what the file says, such as seed=1 or convert.epochs=2; may be given again.
        allow_pickle: Unpickle a file that holds a whole module; that runs code from the file.
    """
    _run("run", read_recipe(recipe, set), folder, json, allow_pickle)


@app.command(help_epilogue="Example: dyncompress inspect zoo:vgg-digits")
def inspect(
    model: Model,
    /,
    *,
    source: ModelOptions = _SOURCE,
    data: Annotated[str | None, Parameter(group=DATA)] = None,
    json: JsonFlag = False,
) -> None:
    """Shows a model's axes and why some are frozen, its blocks and cut points, its costs.

    Args:
        data: Labelled data whose samples tell the input shape, where nothing else does.
    """
    from .runs.inspecting import inspect_model

    with printing(json) as printer:
        recipe = _recipe(model, (), source, DataOptions(data=data, device="cpu"))
        printer.result(inspect_model(recipe, printer.console, allow_pickle=source.allow_pickle))


@app.command(help_epilogue="Example: dyncompress bench zoo:vgg-digits zoo:resnet-digits --data digits")
def bench(
    *models: Model,
    source: ModelOptions = _SOURCE,
    data: DataOptions = _DATA,
    json: JsonFlag = False,
) -> None:
    """Measures models side by side: accuracy, MACs, parameters, size and wall clock at batch 1 and 256."""
    from .runs.benching import bench_models

    if not models:
        raise RequestError("bench needs at least one MODEL")
    recipes = [_recipe(model, (), source, data) for model in models]
    with printing(json) as printer:
        printer.result(bench_models(recipes, printer.console, allow_pickle=source.allow_pickle))


@app.command(help_epilogue="Example: dyncompress export zoo:vgg-digits vgg.onnx")
def export(
    model: Model,
    onnx: Path,
    /,
    *,
    source: ModelOptions = _SOURCE,
    data: Annotated[str | None, Parameter(group=DATA)] = None,
    tunable: OutputFlag = False,
    overwrite: OutputFlag = False,
    json: JsonFlag = False,
) -> None:
    """Writes a model as one ONNX file and checks it in onnxruntime against PyTorch.

    Args:
        onnx: The file to write.
        data: Labelled data whose samples tell the input shape, where nothing else does.
        tunable: Make the exits' thresholds inputs of the file, threshold_0 and so on, that may be left out.
        overwrite: Replace the file.
    """
    from .runs.exporting import export_model

    with printing(json) as printer:
        recipe = _recipe(model, (), source, DataOptions(data=data, device="cpu"))
        options = {"tunable": tunable, "overwrite": overwrite, "allow_pickle": source.allow_pickle}
        printer.result(export_model(recipe, onnx, printer.console, **options))


def _recipe(model: str, steps: tuple[Step, ...], source: ModelOptions, data: DataOptions) -> Recipe:
    return Recipe(
        model=model,
        steps=steps,
        data=data.data,
        arch=source.arch,
        input_shape=source.shape,
        seed=data.seed,
        device=data.device,
    )


def _folder(command: str, model: str, options: FolderOptions) -> Path:
    from .loading.models import short_name

    return choose_folder(command, short_name(model), options.out, resume=options.resume, overwrite=options.overwrite)


def _run(
    command: str,
    recipe: Recipe,
    options: FolderOptions,
    as_json: bool,
    allow_pickle: bool = False,
    verbose: bool = False,
) -> None:
    from .runs import write_results
    from .runs.run_recipe import run_recipe

    folder = _folder(command, recipe.model, options)
    with printing(as_json) as printer:
        report = run_recipe(
            recipe,
            folder,
            resume=options.resume,
            overwrite=options.overwrite,
            allow_pickle=allow_pickle,
            status=Console(stderr=True),
        )
        write_results.show(report, printer.console, verbose=verbose)
        printer.result(report.to_json())
