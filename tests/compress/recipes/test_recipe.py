"""Recipes: defaults filled in, text that reads back, overrides, and one line for every mistake."""

from pathlib import Path

import pytest

from dyncompress.compress.options.limits import Limits
from dyncompress.compress.options.steps import Convert, Export, Prune
from dyncompress.compress.options.training_options import Training
from dyncompress.compress.recipes.recipe import Recipe, read_recipe
from dyncompress.errors import RequestError

EXAMPLE = Path(__file__).parents[3] / "examples" / "recipe.yaml"
SHORT = "model: zoo:vgg-digits\nsteps: [prune, convert]\n"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


def test_the_example() -> None:
    recipe = read_recipe(EXAMPLE)
    steps = (Prune(macs=0.7, finetune=2), Convert(exits=3), Export(onnx="model.onnx"))
    assert recipe == Recipe(model="zoo:vgg-digits", data="digits", steps=steps)


def test_text_reads_back(recipe_file: Path) -> None:
    first, second = Prune(ratio=0.3, limits=Limits(ignore=("a.b", "c"))), Convert(training=Training(lr=1e-4))
    steps = (first, second, Export(onnx="x.onnx"), Prune(params=0.5))
    recipe = Recipe(model="m.pt", arch="timm:resnet18", input_shape=(3, 32, 32), seed=7, device="cpu", steps=steps)
    recipe_file.write_text(str(recipe))
    assert read_recipe(recipe_file) == read_recipe(str(recipe_file)) == recipe
    assert "importance: l2" in str(recipe)


def test_ways_to_write_a_step(recipe_file: Path) -> None:
    recipe_file.write_text("model: m\nsteps:\n- convert\n- convert:\n- convert: {}\n- convert: {exits: 3}\n")
    assert set(read_recipe(recipe_file).steps) == {Convert()}


def test_numbers_of_yaml(recipe_file: Path) -> None:
    recipe_file.write_text("model: m\nsteps:\n- convert: {lr: 1e-3}\n- prune: {macs: 1}\n")
    first, second = read_recipe(recipe_file).steps
    assert first == Convert(training=Training(lr=0.001))
    assert isinstance(second, Prune)
    assert isinstance(second.macs, float)


def test_overrides(recipe_file: Path) -> None:
    recipe_file.write_text(SHORT)
    changes = ["seed=3", "data=digits", "prune.macs=0.5", "prune.ignore=[fc, conv1]", "convert.exits=2"]
    recipe = read_recipe(recipe_file, changes)
    steps = (Prune(macs=0.5, limits=Limits(ignore=("fc", "conv1"))), Convert(exits=2))
    assert recipe == Recipe(model="zoo:vgg-digits", data="digits", seed=3, steps=steps)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not a recipe"),
        ("- prune", "is not a recipe"),
        ("model: [", "is not YAML at line 1"),
        ("model: m", "'steps' is missing"),
        ("steps: [prune]", "'model' is missing"),
        ("model: 1\nsteps: [prune]", "model: expected str, got 1"),
        ("model: m\nsteps: prune", "steps: expected a list"),
        ("model: m\nsteps: []", "steps: expected a list"),
        ("model: m\nsteps: [squeeze]", "steps[0]: there is no step 'squeeze': use one of prune, sparsify, retrain,"),
        ("model: m\nsteps: [{prune: {}, convert: {}}]", "steps[0]: expected one step"),
        ("model: m\nsteps: [prune: [1]]", "steps[0].prune: expected options"),
        ("model: m\nsteps: [{prune: {mac: 1}}]", "steps[0].prune: unknown key 'mac': use one of ratio, macs,"),
        ("model: m\nsteps: [convert, {prune: {macs: half}}]", "steps[1].prune: macs: expected float or null, got"),
        ("model: m\nsteps: [{prune: {macs: true}}]", "expected float or null, got True"),
        ("model: m\nsteps: [{prune: {round_to: 1.5}}]", "round_to: expected int or null, got 1.5"),
        ("model: m\nsteps: [{prune: {importance: l3}}]", "importance: expected l1 or l2 or taylor or hessian"),
        ("model: m\nsteps: [{prune: {ignore: fc}}]", "ignore: expected a list of str, got 'fc'"),
        ("model: m\nsteps: [prune]\nepochs: 3", "unknown key 'epochs': use one of model, data, arch"),
        ("!!python/object/apply:os.system [ls]", "is not YAML"),
    ],
)
def test_mistakes_in_the_file(text: str, says: str, recipe_file: Path) -> None:
    recipe_file.write_text(text)
    with pytest.raises(RequestError) as error:
        read_recipe(recipe_file)
    assert says in str(error.value)
    assert str(recipe_file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed", "write key=value"),
        ("seed=x", "seed: expected int, got 'x'"),
        ("seed=[", "is not a YAML value"),
        ("steps=[]", "unknown key 'steps'"),
        ("prune.mac=1", "unknown key 'mac': use one of ratio"),
        ("export.onnx=x", "has no step 'export'"),
    ],
)
def test_mistakes_in_overrides(override: str, says: str, recipe_file: Path) -> None:
    recipe_file.write_text(SHORT)
    with pytest.raises(RequestError) as error:
        read_recipe(recipe_file, [override])
    assert says in str(error.value)


def test_override_of_one_of_two_steps(recipe_file: Path) -> None:
    recipe_file.write_text("model: m\nsteps: [prune, prune]\n")
    with pytest.raises(RequestError, match="more than one step 'prune'"):
        read_recipe(recipe_file, ["prune.macs=0.5"])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "nothing.yaml", tmp_path / "binary"):
        with pytest.raises(RequestError, match="cannot be read"):
            read_recipe(path)
