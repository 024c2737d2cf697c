"""Tables as text: Markdown, HTML, between the marks of a page."""

import re
from html import escape

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


def to_cells(table: pd.DataFrame, cells: dict[str, list[str]], wide: set[str]) -> str:
    """A table as HTML of these cells, {column: HTML of each row}; `wide` columns get that class."""

    def tag(kind: str, column: str, content: str) -> str:
        text = re.sub("<.*?>", "", content)
        names = ["number"] * numbers[column] + ["wide"] * (column in wide)
        names += ["open"] * (text == NOT_MEASURED) + ["long"] * (kind == "td" and len(text) > 24)
        return f'<{kind} class="{" ".join(names)}">{content}</{kind}>'.replace(' class=""', "")

    numbers = {column: _is_number(table[column]) for column in table}
    head = "".join(tag("th", column, escape(column)) for column in table)
    rows = zip(*(cells[column] for column in table), strict=True)
    body = "".join(
        f"<tr>{''.join(tag('td', *pair) for pair in zip(table, row, strict=True))}</tr>\n"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def fill(text: str, tables: dict[str, pd.DataFrame]) -> str:
    """`text` with tables and single numbers put where its marks say.

    <!-- table:NAME --> ... <!-- /table:NAME -->: a table; where the mark goes on, as
    <!-- table:NAME | column | column -->, those columns only, in that order, as far as the table
    has them. Of machines' names the part in brackets is left out.

    <!-- n:TABLE; cell; cell; column -->93.20<!-- /n -->: the first number of one cell of a table,
    that of the row which has these cells (text alone for any column, or column=text) in that
    column. After `minus` or `over` a second such place: the difference, or the ratio, of the two.
    <!-- cell:... -->...<!-- /cell -->: the whole cell. Where no record gives it, it says so.

    What is of a table that `tables` lacks stays as it is. ValueError for a mark of several rows or
    of a column that there is not.
    """
    short = {
        name: table.replace({"hardware": r" \([^)]*\)"}, "", regex=True)
        for name, table in tables.items()
    }

    def table_of(mark: re.Match) -> str:
        name, wanted = mark["name"], [c.strip() for c in mark["columns"].split("|")[1:]]
        if name not in short:
            return mark[0]
        table = short[name]
        table = table[[column for column in wanted or table if column in table]]
        return f"{mark['open']}{to_markdown(table)}{mark['close']}"

    def number_of(mark: re.Match) -> str:
        places = re.split(r" (minus|over) (?=\w+;)", mark["place"])  # `gain over int8` is a column
        if not all(place.split(";")[0].strip() in short for place in places[::2]):
            return mark[0]
        cells = [_cell(place, short) for place in places[::2]]
        found = cells[0] if mark["kind"] == "cell" else _number(cells, *places[1::2])
        return f"{mark['open']}{found}{mark['close']}"

    text = re.sub(TABLE_MARK, table_of, text, flags=re.S)
    return re.sub(NUMBER_MARK, number_of, text, flags=re.S)


TABLE_MARK = (
    r"(?P<open><!-- table:(?P<name>\w+)(?P<columns>.*?) -->\n).*?(?P<close><!-- /table:\2 -->)"
)
NUMBER_MARK = r"(?P<open><!-- (?P<kind>n|cell):(?P<place>.*?) -->).*?(?P<close><!-- /\2 -->)"


def _cell(place: str, tables: dict[str, pd.DataFrame]) -> str:
    """The text of one cell, by a place such as `ours; ResNet-56; B; 71.9; last epoch`."""
    name, *wanted, column = [part.strip() for part in place.split(";")]
    rows = tables[name]
    for text in wanted:
        key, _, value = text.partition("=")
        rows = rows[rows[key] == value if key in rows else (rows == text).any(axis=1)]
    if column not in tables[name]:
        raise ValueError(f"{place}: {name} has no column {column!r}; it has {list(rows.columns)}")
    if len(rows) > 1:
        raise ValueError(f"{place}: {len(rows)} rows of {name} have these cells; name one more")
    return str(rows[column].iloc[0] or NOT_MEASURED) if len(rows) else NOT_MEASURED


def _number(cells: list[str], operation: str = "") -> str:
    """The first number of a cell, or what two such make of each other."""
    found = [re.match(r"[+-]?\d+(\.\d+)?", cell) for cell in cells]
    texts = [number[0] for number in found if number]
    if len(texts) < len(cells):
        return NOT_MEASURED
    if not operation:
        return texts[0].lstrip("+")
    first, second = map(float, texts)
    return f"{first - second:+.2f}" if operation == "minus" else f"{first / second:.1f}"
