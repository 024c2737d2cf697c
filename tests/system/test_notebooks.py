"""The notebooks: thin, committed without outputs, and run by papermill on the embedded data."""

import ast
import json
from pathlib import Path

import nbformat
import papermill
import pytest

import explib
from explib.cli import FIELDS
from explib.params import Params
from explib.report import conclusions
from tests.conftest import ROOT, needs_compiler

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
START = ROOT / "notebooks/README.md"
COMMANDS = {"00": "baseline", "01": "score", "02": "prune", "03": "finetune"}
STEPS = [path for path in NOTEBOOKS if path.stem < "04"]  # one configuration, step by step
TINY = {
    "epochs": 1,
    "batch_size": 32,
    "limit_train": 64,
    "limit_test": 40,
    "bn_images": 32,
    "threads": 1,
}
QUICK = {
    "batches": [8, 1],
    "densities": [0.5, 1.0],
    "dense": ["eager fp32"],  # torch would compile whole networks for minutes
    "results_dir": str(ROOT / "results"),
    "seconds": 0.05,
    "threads": 1,
}
"""Of 05_speed."""
SMALL = {"images_for_training": 64, "epochs": 1, "seconds": 0.05, "threads": 1}
"""Of 07_your_network."""


def sources(path: Path, kind: str = "code") -> list[str]:
    return [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == kind]


def parameters_cell(path: Path) -> str:
    tagged = [
        cell.source
        for cell in nbformat.read(path, 4).cells
        if "parameters" in cell.metadata.get("tags", [])
    ]
    assert len(tagged) == 1, f"{path.name} has {len(tagged)} parameters cells"
    return tagged[0]


def run(notebook: str, folder: Path, **parameters) -> str:
    """Execute a notebook in `folder` and return all it shows, as text."""
    output = folder / f"{notebook}.ipynb"
    papermill.execute_notebook(
        str(ROOT / "notebooks" / f"{notebook}.ipynb"),
        str(output),
        {"results_dir": str(folder / "results"), **parameters},
        cwd=str(folder),
        progress_bar=False,
    )
    return output.read_text()


def images_in(executed: str) -> int:
    return executed.count('"image/png"') + executed.count('"image/svg+xml"')


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestSource:
    def test_is_committed_without_outputs(self, path):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "code":
                assert cell["outputs"] == [] and cell["execution_count"] is None

    def test_has_no_class_no_long_function_and_no_loop_over_batches(self, path):
        for node in (node for s in sources(path) for node in ast.walk(ast.parse(s))):
            assert not isinstance(node, ast.ClassDef | ast.While)
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 5, node.name

    def test_begins_with_what_one_learns_and_what_it_needs_and_takes(self, path):
        first = sources(path, "markdown")[0]
        assert first.startswith(f"# {path.stem[:2]} ·")
        assert all(f"**{word}**" in first for word in ("You will learn", "Needs", "Takes"))

    def test_ends_with_what_was_found_as_a_call_says(self, path):
        call = ast.parse(sources(path)[-1]).body[-1].value
        assert ast.unparse(call.func) == "conclusions.show"
        assert {argument.value for argument in call.args} <= set(conclusions.CONCLUSIONS)

    def test_the_start_page_leads_to_it(self, path):
        assert f"]({path.name})" in START.read_text()

    def test_every_parameter_is_used(self, path):
        if path in STEPS:  # those that the command of the same step has
            used = set(FIELDS[COMMANDS[path.stem[:2]]])
        else:
            code = [s for s in sources(path) if s != parameters_cell(path)]
            used = {n.id for s in code for n in ast.walk(ast.parse(s)) if isinstance(n, ast.Name)}
        given = {node.targets[0].id for node in ast.parse(parameters_cell(path)).body}
        assert given <= used

    def test_shares_no_code_cell_with_another_but_its_parameters(self, path):
        shared = {parameters_cell(path)}
        others = {s for other in NOTEBOOKS if other != path for s in sources(other)}
        assert not (set(sources(path)) - shared) & others


@pytest.mark.parametrize("path", STEPS, ids=lambda path: path.stem)
def test_parameters_are_those_of_params_with_its_defaults(path):
    defaults = Params.__dataclass_fields__
    for node in ast.parse(parameters_cell(path)).body:
        name = node.targets[0].id
        assert ast.literal_eval(node.value) == defaults[name].default, name


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A folder in which the dense network has been made by 00_baseline."""
    folder = tmp_path_factory.mktemp("study")
    run("00_baseline", folder, **TINY)
    return folder


def test_baseline_leaves_a_checkpoint_and_a_record(study):
    assert (study / "results/checkpoints/digits/resnet_56.safetensors").is_file()
    assert len(list((study / "results/records/digits").glob("baseline-*.json"))) == 1


def test_score_analysis_shows_the_linear_relation(study):
    executed = run("01_score_analysis", study, **TINY)
    assert images_in(executed) == 7


def test_pruning_shows_both_ways_of_counting(study):
    executed = run("02_pruning", study, pruning_way="A", **TINY)
    assert images_in(executed) == 3
    assert "published convention" in executed and "true, from the masks" in executed
    assert list((study / "results/runs/digits").glob("*/masks.safetensors"))


def test_finetune_then_tables(study):
    for way in "AB":
        executed = run("03_finetune", study, name=f"resnet_56-{way}", pruning_way=way, **TINY)
        assert images_in(executed) == 1
    executed = run("04_tables", study, dataset="digits")
    assert images_in(executed) >= 1
    assert list((study / "results/tables/digits").glob("*.csv"))
    assert list((study / "results/figures/digits").glob("*.svg"))


def test_training_shows_the_committed_measurements(study):
    assert images_in(run("06_training", study, results_dir=str(ROOT / "results"))) >= 2


@needs_compiler
def test_speed_is_measured_here(tmp_path):
    executed = papermill.execute_notebook(
        str(ROOT / "notebooks/05_speed.ipynb"), str(tmp_path / "05_speed.ipynb"),
        QUICK, cwd=str(ROOT / "notebooks"), progress_bar=False,
    )  # fmt: skip
    shown = nbformat.writes(executed)
    assert images_in(shown) == 4 and "engine fp32" in shown


@needs_compiler
def test_a_network_and_a_criterion_of_ones_own(tmp_path):
    executed = papermill.execute_notebook(
        str(ROOT / "notebooks/07_your_network.ipynb"), str(tmp_path / "07_your_network.ipynb"),
        SMALL, cwd=str(tmp_path), progress_bar=False,
    )  # fmt: skip
    shown = nbformat.writes(executed)
    assert "70.0% of the kernels go" in shown and "multiply-adds" in shown
    state, masks, _ = explib.load(tmp_path / "resnet18-pruned.safetensors")
    assert len(masks) == 20 and not any(state[f"{n}.weight"][~m].any() for n, m in masks.items())


def test_the_executed_tables_are_light_enough_to_be_shown():
    """A code host shows no notebook of several megabytes."""
    path = ROOT / "results/notebooks/cifar10/04_tables.ipynb"
    assert path.stat().st_size < 1_000_000
    assert path.read_text().count('"image/png"') > 10


def test_a_parameter_that_does_not_exist_is_an_error(study):
    with pytest.raises(papermill.PapermillExecutionError, match="did you mean 'epochs'"):
        run("03_finetune", study, epoch=1)


def test_a_missing_input_says_what_to_run(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="run notebooks/00_baseline"):
        run("03_finetune", tmp_path, **TINY)
