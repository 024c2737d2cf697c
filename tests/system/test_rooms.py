"""The rooms: tests lie as the package does, and what is public is so for editors, too."""

import inspect

import pytest

import explib
from tests.conftest import ROOT

ROOMS = sorted(path.parent.name for path in ROOT.glob("explib/*/__init__.py"))
MODULES = sorted(
    path.relative_to(ROOT / "explib").as_posix()
    for path in ROOT.glob("explib/**/*.py")
    if path.name != "__init__.py"
)
TESTED_IN = {  # what has no test_NAME.py of its own
    "__main__.py": "test_cli.py",
    "checks.py": "test_params.py",
    "engine/arithmetic.py": "engine/test_export.py",
    "engine/axes.py": "engine/test_export.py",
    "engine/checking.py": "engine/test_stored.py",
    "engine/build.py": "engine/test_engine.py",
    "engine/compiling.py": "engine/test_engine.py",
    "engine/geometry.py": "engine/test_ops.py",
    "engine/gpu_convs.py": "engine/test_gpu.py",
    "engine/gpu_norms.py": "engine/test_gpu.py",
    "engine/graph.py": "engine/test_engine.py",
    "engine/nodes.py": "engine/test_export.py",
    "engine/lists.py": "engine/test_ops.py",
    "engine/plan.py": "engine/test_engine.py",
    "engine/pooling.py": "engine/test_export.py",
    "engine/saving.py": "engine/test_stored.py",
    "engine/reference.py": "engine/test_export.py",
    "engine/rules.py": "engine/test_export.py",
    "engine/training_layers.py": "engine/test_training.py",
    "engine/views.py": "engine/test_export.py",
    "engine/winograd.py": "engine/test_ops.py",
    "models/googlenet.py": "models/test_models.py",
    "models/resnet.py": "models/test_models.py",
    "models/vgg.py": "models/test_models.py",
    "rates.py": "test_params.py",
    "report/bench_plots.py": "study/test_bench.py",
    "report/bench_tables.py": "study/test_bench.py",
    "report/conclusions.py": "report/test_page.py",
    "report/comparisons.py": "report/test_tables.py",
    "report/finding.py": "report/test_figures.py",
    "report/speed_tables.py": "study/test_inference_bench.py",
    "report/inference_tables.py": "study/test_comparison.py",
    "report/inference_plots.py": "study/test_inference_bench.py",
    "report/markup.py": "report/test_tables.py",
    "report/names.py": "report/test_tables.py",
    "study/bench/cases.py": "study/test_comparison.py",
    "study/bench/comparison.py": "study/test_comparison.py",
    "study/bench/peers.py": "study/test_comparison.py",
    "study/bench/gpu.py": "study/test_gpu_bench.py",
    "study/bench/inference.py": "study/test_inference_bench.py",
    "study/bench/processes.py": "study/test_bench.py",
    "study/bench/scoring.py": "study/test_bench.py",
    "study/bench/training.py": "study/test_bench.py",
    "study/folder.py": "study/test_runs.py",
    "study/networks.py": "study/test_runs.py",
    "study/published.py": "pruning/test_counting.py",
    "study/recipes.py": "study/test_bench.py",
    "training/step.py": "training/test_loop.py",
}


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_its_tests_in_its_room(module):
    room, _, name = module.rpartition("/")
    own = ROOT / "tests" / room / f"test_{name}"
    if module not in TESTED_IN:
        assert own.is_file(), f"{module}: no {own.relative_to(ROOT)}, nor listed in TESTED_IN"
        return
    assert not own.is_file(), f"{module}: has tests of its own; take it out of TESTED_IN"
    assert name.removesuffix(".py") in (ROOT / "tests" / TESTED_IN[module]).read_text()


def test_the_rooms_of_the_tests_are_those_of_the_package():
    tests = sorted(path.parent.name for path in ROOT.glob("tests/*/__init__.py"))
    assert tests == sorted([*ROOMS, "system"])
    assert set(TESTED_IN) <= set(MODULES), "TESTED_IN names a module that is not there"


def test_every_public_name_is_there_and_says_what_it_does():
    assert sorted(explib.__all__) == sorted(set(explib.__all__)) and len(explib.__all__) > 20
    for name in explib.__all__:
        public = getattr(explib, name)
        home = inspect.getmodule(public).__name__
        assert home.startswith("explib.") and (inspect.getdoc(public) or "").strip(), name


def test_no_other_name_is_public():
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        explib.prunes  # noqa: B018
    assert dir(explib) == sorted(explib.__all__)
