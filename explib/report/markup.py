"""Tables as text: Markdown, HTML, between the marks of a README."""

import re

import pandas as pd

from explib.report.names import NOT_MEASURED


def to_markdown(table: pd.DataFrame) -> str:
    """A Markdown table, numbers to the right."""
    rule = ["---:" if _is_number(table[column]) else "---" for column in table.columns]
    lines = [list(table.columns), rule, *table.astype(str).values.tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _is_number(column: pd.Series) -> bool:
    cells = [cell for cell in column if cell and cell != NOT_MEASURED]
    return bool(cells) and all(re.match(r"[+-]?[0-9.]+( |$)", str(cell)) for cell in cells)


_CSS = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
figure { margin: 0; overflow-x: auto; }
figcaption { font-weight: 600; margin-bottom: .6rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #8884; }
th { text-align: left; border-bottom-width: 2px; }
td.number, th.number { text-align: right; }
td.open { opacity: .55; font-style: italic; }
@media print { body { margin: 0; max-width: none; font-size: 9pt; } }
"""


def to_html(table: pd.DataFrame, caption: str) -> str:
    """A page of its own with one table: readable on a phone, in the dark, on paper."""
    numbers = {column: _is_number(table[column]) for column in table.columns}
    classes = pd.DataFrame(
        {
            c: ["open" if v == NOT_MEASURED else "number" if numbers[c] else "" for v in table[c]]
            for c in table.columns
        },
        index=table.index,
    )
    body = (
        table.style.hide(axis="index")
        .set_td_classes(classes)
        .to_html(exclude_styles=True, table_attributes="")
    )
    for column, number in numbers.items():
        if number:
            body = re.sub(
                rf"<th[^>]*>({re.escape(column)})</th>", r'<th class="number">\1</th>', body
            )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{caption}</title><style>{_CSS}</style></head>\n"
        f"<body><figure><figcaption>{caption}</figcaption>\n{body}</figure></body></html>\n"
    )


def fill(text: str, tables: dict[str, pd.DataFrame]) -> str:
    """`text` with each table put between <!-- table:NAME --> and <!-- /table:NAME -->.

    Where a mark goes on, as <!-- table:NAME | column | column -->, those columns only, in that
    order, as far as the table has them. Of machines' names the part in brackets is left out.
    """

    def between(mark: re.Match) -> str:
        name, wanted = mark["name"], [c.strip() for c in mark["columns"].split("|")[1:]]
        if name not in tables:
            return mark[0]
        table = tables[name].replace({"hardware": r" \([^)]*\)"}, "", regex=True)
        table = table[[column for column in wanted or table if column in table]]
        return f"{mark['open']}{to_markdown(table)}{mark['close']}"

    pattern = (
        r"(?P<open><!-- table:(?P<name>\w+)(?P<columns>.*?) -->\n).*?(?P<close><!-- /table:\2 -->)"
    )
    return re.sub(pattern, between, text, flags=re.S)
