// Tables are sorted by a click on a column's name; without this script they stand as they are.
const valueOf = (row, column) => {
  const text = row.cells[column].textContent.trim();
  const number = parseFloat(text.replace("−", "-"));
  return text === "" ? null : Number.isNaN(number) ? text : number;
};
const compare = (a, b) => (typeof a === typeof b && typeof a === "number" ? a - b
  : String(a).localeCompare(String(b)));
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const order = head.ariaSort === "ascending" ? "descending" : "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.ariaSort = order;
      const rows = [...table.tBodies[0].rows].map((row) => [valueOf(row, column), row]);
      const full = rows.filter(([value]) => value !== null);
      full.sort(([a], [b]) => (order === "ascending" ? compare(a, b) : compare(b, a)));
      const empty = rows.filter(([value]) => value === null); // stay at the end
      table.tBodies[0].append(...[...full, ...empty].map(([, row]) => row));
    };
  });
}
const hint = document.createElement("p");
hint.className = "quiet sorting";
hint.textContent = "A click on a column's name sorts its table; underlined numbers lead to their records.";
document.querySelector("nav").after(hint);
