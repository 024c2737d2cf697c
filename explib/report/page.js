// Tables are sorted by a click on a column's name; without this script they stand as they are.
const NUMBER = /^[+−-]?[\d.]+(?=\s|$)/; // of "93.20 (n=1)" and "6259 bf16", not of a date or a commit
const valueOf = (row, column) => {
  const cell = row.cells[column];
  const text = cell.firstChild?.textContent.trim() ?? ""; // without the records' numbers after a mean
  if (text === "" || cell.classList.contains("open")) return null; // not measured
  const [number] = text.match(NUMBER) ?? [];
  return number === undefined ? text : parseFloat(number.replace("−", "-"));
};
const compare = (a, b) => (typeof a !== typeof b ? (typeof a === "number" ? -1 : 1)
  : typeof a === "number" ? a - b : a.localeCompare(b));
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
