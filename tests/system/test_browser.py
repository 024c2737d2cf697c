"""What a reader meets, in a real browser: notebooks in JupyterLab, the report. `make test-browser`.

Needs playwright and a Chromium of the system's own; what it saw is kept in tests/screenshots/.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import papermill
import pytest

from explib.files import write_json
from explib.report import page as report
from tests.conftest import ROOT
from tests.system.test_notebooks import NOTEBOOKS, QUICK, SMALL, TINY

pytestmark = pytest.mark.browser
SHOTS = ROOT / "tests/screenshots"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# The notebook in front, as JupyterLab holds it, and what its pictures have come to
CELLS = "() => jupyterapp.shell.currentWidget.content.model.sharedModel.toJSON().cells"
FRONT = ".jp-NotebookPanel:not(.lm-mod-hidden)"
SHOWN = f"""() => [...document.querySelectorAll(
  '{FRONT} .jp-OutputArea-output img, {FRONT} .jp-OutputArea-output svg[viewBox]')]
  .filter(p => p.getBoundingClientRect().width > 100).length"""


def write_notebooks(folder):
    """Copies of the notebooks with tiny parameters, all below `folder`."""
    for path in NOTEBOOKS:
        given = {"results_dir": str(folder / "results")}
        if path.stem < "04":
            given |= TINY
        elif path.stem.startswith("04"):
            given["dataset"] = "digits"
        elif path.stem.startswith("05"):
            given = QUICK
        elif path.stem.startswith("07"):
            given = SMALL
        else:  # shows the committed measurements
            given["results_dir"] = str(ROOT / "results")
        papermill.execute_notebook(
            str(path), str(folder / path.name), given, prepare_only=True, progress_bar=False
        )


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab on loopback, with the notebooks and settings of its own."""
    folder = tmp_path_factory.mktemp("lab")
    write_notebooks(folder)
    news = "@jupyterlab/apputils-extension:announcements"  # asks the reader a question
    write_json(folder / "config/labconfig/page_config.json", {"disabledExtensions": {news: True}})
    whole = {"windowingMode": "none"}  # every cell is in the page, not only those in sight
    write_json(
        folder / "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings", whole
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.root_dir": folder,
        "ServerApp.open_browser": False,
        "ServerApp.allow_root": True,
        "IdentityProvider.token": "",
        "LabApp.expose_app_in_browser": True,
        "LabApp.user_settings_dir": folder / "settings",
        "LabApp.workspaces_dir": folder / "workspaces",
    }
    own = {"JUPYTER_CONFIG_DIR": str(folder / "config"), "PYTHONPATH": str(ROOT)}
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *(f"--{k}={v}" for k, v in options.items())],
            env={**os.environ, **own},
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "server.log").read_text()[-2000:]
                time.sleep(0.25)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium; `make test-browser` installs it")
    shutil.rmtree(SHOTS, ignore_errors=True)
    SHOTS.mkdir()
    with playwright.sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def run_all(page, address: str, name: str) -> list[dict]:
    """Open a notebook, run all of it from a fresh kernel, and return its code cells."""
    page.goto(f"{address}/lab/tree/{name}.ipynb?reset", wait_until="domcontentloaded")
    page.wait_for_function(
        "() => window.jupyterapp?.shell.currentWidget?.context?.isReady", timeout=60_000
    )
    page.wait_for_function(
        "() => jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'",
        timeout=60_000,
    )  # fmt: skip
    page.evaluate("() => jupyterapp.commands.execute('notebook:run-all-cells')")
    cells = [cell for cell in page.evaluate(CELLS) if cell["cell_type"] == "code"]
    for cell in cells:
        failed = [out for out in cell["outputs"] if out["output_type"] == "error"]
        assert not failed, f"{name}: {failed[0]['ename']}: {failed[0]['evalue']}"
        assert cell["execution_count"], f"{name}: did not run: {cell['source'][:80]}"
    return cells


def picture_count(cells: list[dict]) -> int:
    bundles = [out.get("data", {}) for cell in cells for out in cell["outputs"]]
    return sum("image/png" in bundle or "image/svg+xml" in bundle for bundle in bundles)


def keep(page, name: str) -> None:
    """A picture of the whole notebook, however long."""
    page.evaluate("() => jupyterapp.shell.collapseLeft()")
    panel = f"document.querySelector('{FRONT} .jp-WindowedPanel-outer')"
    height = page.evaluate(f"() => {panel}.scrollHeight")
    page.set_viewport_size({"width": 1200, "height": min(height + 150, 12_000)})
    page.evaluate(f"() => {{ {panel}.scrollTop = 0 }}")
    page.wait_for_timeout(500)
    page.screenshot(path=SHOTS / f"{name}.png")


@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS])
def test_a_notebook_runs_and_shows_its_figures(lab, browser, name):
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    cells = run_all(page, lab, name)
    expected = picture_count(cells)
    assert expected >= (0 if name.startswith(("04", "07")) else 1)
    page.wait_for_function(f"() => ({SHOWN})() >= {expected}", timeout=20_000)
    picture = ".jp-OutputArea-output .widget-image"
    if page.locator(picture).count():
        before = page.locator(picture).get_attribute("src")
        handle = page.locator(".jp-OutputArea-output .noUi-handle").first
        handle.focus()
        handle.press("ArrowRight")
        page.wait_for_function(
            "([p, was]) => document.querySelector(p).src !== was",
            arg=[picture, before],
            timeout=20_000,
        )  # fmt: skip
        assert page.locator(picture).evaluate("async p => (await p.decode(), p.naturalWidth)") > 500
    else:
        assert not name.startswith(("01", "02")), "no interactive part"
    keep(page, name)
    page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    page.close()


@pytest.fixture
def shown(browser, tmp_path):
    """The report of the committed records in a window."""
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    page.goto(report.build(ROOT / "results", page=tmp_path / "report.html").as_uri())
    yield page
    page.close()


def column(page, table: str, name: str) -> list[str]:
    """A column's cells, after a click on its name."""
    rows = page.locator(f"h3#{table} + .scroll tr").all()
    names = rows[0].locator("th").all_inner_texts()
    rows[0].get_by_role("button", name=name, exact=True).click()
    return [row.locator("td").nth(names.index(name)).inner_text() for row in rows[1:]]


def test_the_report_sorts_numbers_as_numbers(shown):
    cells = column(shown, "as_published", "last epoch")
    assert "(n=1)" in cells[0] and cells == sorted(cells, key=lambda c: float(c.split()[0]))
    cells = column(shown, "alternatives", "engine int8, pruned")
    numbers = [float(c.split()[0]) for c in cells if c[0].isdigit()]
    assert numbers == sorted(numbers)
    assert len(set(cells[len(numbers) :])) <= 1, "what was not measured stays at the end"


def test_the_report_is_as_wide_as_its_window(shown):
    shown.screenshot(path=SHOTS / "report.png", full_page=True)
    wide = (
        "() => [...document.querySelectorAll('.scroll')].filter(s => s.scrollWidth > s.clientWidth)"
    )
    assert shown.evaluate(f"({wide})().map(s => s.previousElementSibling?.id)") == []
    shown.set_viewport_size({"width": 390, "height": 844})
    assert shown.evaluate("() => document.documentElement.scrollWidth") == 390  # tables scroll
    shown.screenshot(path=SHOTS / "report-phone.png", full_page=True)


def test_the_report_on_paper_repeats_the_heads_of_tables(shown):
    shown.emulate_media(media="print")
    heads = (
        "() => [...document.querySelectorAll('th button')].map(b => getComputedStyle(b).display)"
    )
    assert set(shown.evaluate(heads)) == {"contents"}  # as buttons Chromium would not repeat them
    assert shown.locator(".more:visible, nav:visible").count() == 0
