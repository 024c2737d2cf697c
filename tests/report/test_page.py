"""The report: one page with everything inside."""

import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from explib.report import page as report

PNG = "iVBORw0KGgo="


@pytest.fixture
def page(tmp_path):
    widget = {"model_id": "none"}
    shown = {"application/vnd.jupyter.widget-view+json": widget, "image/png": PNG}
    cells = [
        new_markdown_cell("# The study\n\n| way | top-1 |\n| --- | ---: |\n| B | 93.28 |"),
        new_code_cell("secret = 1", outputs=[new_output("display_data", shown)]),
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "executed.ipynb")
    return report.build(tmp_path / "executed.ipynb", tmp_path / "page.html").read_text()


def test_nothing_is_fetched(page):
    assert not re.findall(r"<(?:script|link)\b", page)
    assert re.findall(r'src="(.{15})', page) == ["data:image/png;"]


def test_tables_are_tables_and_code_is_folded_away(page):
    assert (
        f"<title>{report.TITLE}</title>" in page
        and ">The study<" in page
        and 'name="viewport"' in page
    )
    assert re.search(r"<td[^>]*>93.28</td>", page)
    folded = re.search(r"<details>(.*?)</details>", page, re.S)[1]
    assert "secret" in folded and page.count("secret") == 1


def test_what_was_not_executed_is_refused(tmp_path):
    nbformat.write(new_notebook(cells=[new_code_cell("1")]), tmp_path / "bare.ipynb")
    with pytest.raises(ValueError, match=r"bare\.ipynb: has no outputs"):
        report.build(tmp_path / "bare.ipynb", tmp_path / "page.html")
    with pytest.raises(FileNotFoundError, match="make tables"):
        report.build(tmp_path / "none.ipynb", tmp_path / "page.html")
