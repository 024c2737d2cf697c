"""A notebook as the workflow runs it: its parameters, its file, and what it says meanwhile."""

import json

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from explib.__main__ import cli
from explib.study import notebooks


@pytest.fixture
def counting(tmp_path):
    """A notebook that shows two states of a progress bar, and prints."""
    cell = new_code_cell("steps = 1", metadata={"tags": ["parameters"]})
    bar = r"""print("\r1 of 2\r2 of 2 ", end=""); print("\r2 of 2\nno bar", steps)"""
    path, made = tmp_path / "counting.ipynb", new_notebook(cells=[cell, new_code_cell(bar)])
    made.metadata.kernelspec = {"name": "python3", "display_name": "", "language": "python"}
    nbformat.write(made, path)
    return path


def test_each_state_of_a_bar_is_a_line_and_nothing_else_is(counting, tmp_path, capfd):
    output = tmp_path / "made" / "out.ipynb"
    words = ["notebook", counting, output, "--parameters", json.dumps({"steps": 7})]
    cli.main([str(word) for word in words], standalone_mode=False)
    said = capfd.readouterr().err.splitlines()  # of the kernel's process, too
    assert said[0] == "out: begun" and said[-1].startswith("out: done, ")
    assert said[1:-1] == ["1 of 2", "2 of 2"]
    assert "no bar 7" in nbformat.writes(nbformat.read(output, 4))


def test_a_notebook_that_fails_leaves_no_file(counting, tmp_path):
    output = tmp_path / "out.ipynb"
    with pytest.raises(papermill.PapermillExecutionError, match="not callable"):
        notebooks.execute(counting, output, {"steps": None, "print": None})
    assert not output.exists()


def test_the_picture_of_sliders_is_what_an_executed_copy_shows(counting, tmp_path):
    """A page made of it would show the sliders, which are nothing without a kernel, and no more."""
    widget = "application/vnd.jupyter.widget-view+json"
    shown = f"display({{'image/png': 'iVBORw0KGgo=', {widget!r}: {{'model_id': 'a'}}}}, raw=True)"
    made = nbformat.read(counting, 4)
    made.cells.append(new_code_cell(f"from IPython.display import display\n{shown}"))
    nbformat.write(made, counting)
    notebooks.execute(counting, tmp_path / "out.ipynb", {"steps": 1})
    (output,) = nbformat.read(tmp_path / "out.ipynb", 4).cells[-1].outputs
    assert set(output["data"]) == {"image/png"}
