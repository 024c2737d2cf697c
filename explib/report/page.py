"""The study as one HTML page: `make report`, or `explib report [NOTEBOOK [PAGE]]`.

The executed notebook of tables, its code folded away; pictures are inside, nothing is fetched.
"""

from pathlib import Path

import nbformat
from jinja2 import DictLoader
from nbconvert import HTMLExporter

from explib.files import write_text

TITLE = "EXP pruning: report"
CSS = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.55 system-ui, sans-serif; margin: 0 auto; max-width: 68rem;
       padding: 1rem clamp(1rem, 4vw, 3rem) 4rem; overflow-wrap: break-word; }
h1, h2, h3 { line-height: 1.25; margin: 2.2em 0 .6em; }
h1 { margin-top: .6em; }
.anchor-link, .output_prompt, .input_prompt, .prompt { display: none; }
table { display: block; overflow-x: auto; border-collapse: collapse; font-size: .86rem;
        font-variant-numeric: tabular-nums; white-space: nowrap; max-width: 100%; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; }
th { border-bottom-width: 2px; }
td[style*=right], th[style*=right] { text-align: right; }
img { background: white; border-radius: 6px; display: block; height: auto; margin-top: 2rem;
      max-width: 100%; }
details { color: GrayText; font-size: .85rem; margin: .6rem 0; }
summary { cursor: pointer; }
pre { background: var(--soft); border-radius: 4px; overflow-x: auto; padding: .6rem .8rem; }
a { color: LinkText; }
@page { size: A4 landscape; margin: 12mm; }
@media print {
  body { font-size: 10pt; max-width: none; padding: 0; }
  details { display: none; }
  table { display: table; font-size: 6.4pt; white-space: normal; }
  th, td { padding: 2pt 3pt; }
  tr, img { break-inside: avoid; }
  img { max-height: 140mm; width: auto; }
  h2, h3 { break-after: avoid; }
}
"""
TEMPLATE = """
{%- extends 'basic/index.html.j2' -%}
{%- block header -%}
<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ resources.title }}</title><style>{{ resources.css }}</style></head><body>
{%- endblock header -%}
{%- block input_group -%}
<details><summary>code</summary>{{ super() }}</details>
{%- endblock input_group -%}
{%- block footer -%}</body></html>{%- endblock footer -%}
"""


def build(notebook: str | Path, page: str | Path) -> Path:
    """Write an executed notebook as one page; returns its path.

    FileNotFoundError or ValueError for a notebook that is missing or was not executed.
    """
    notebook = Path(notebook)
    if not notebook.is_file():
        raise FileNotFoundError(f"{notebook}: no such notebook; `make tables` executes it")
    content = nbformat.read(notebook, 4)
    if not any(cell.get("outputs") for cell in content.cells):
        raise ValueError(f"{notebook}: has no outputs; execute it with papermill first")
    exporter = HTMLExporter(
        extra_loaders=[DictLoader({"page.html.j2": TEMPLATE})], template_file="page.html.j2"
    )
    # of an output in several forms the still picture, since widgets would be fetched from afar
    exporter.display_data_priority = [  # type: ignore[attr-defined]  # a trait of its base class
        "text/html", "image/svg+xml", "image/png", "text/markdown", "text/plain",
    ]  # fmt: skip
    body, _ = exporter.from_notebook_node(content, {"title": TITLE, "css": CSS})
    return write_text(page, body)
