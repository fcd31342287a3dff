// A click on a column's title sorts by it, a second one in reverse; empty values stay at the end.
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0];
  const place = [...head.parentNode.children].indexOf(head);
  const numbers = head.dataset.kind === "number";
  const first = numbers ? "descending" : "ascending", second = numbers ? "ascending" : "descending";
  const order = head.getAttribute("aria-sort") === first ? second : first;
  for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order);
  const value = row => row.children[place].dataset.v;
  const compare = numbers ? (a, b) => a - b : (a, b) => a.localeCompare(b, undefined, {numeric: true});
  const rows = [...body.rows].filter(row => !row.classList.contains("whole"));
  const full = rows.filter(row => value(row) !== ""), empty = rows.filter(row => value(row) === "");
  full.sort((a, b) => compare(value(a), value(b)) * (order === "ascending" ? 1 : -1));
  const whole = [...body.rows].filter(row => row.classList.contains("whole"));
  body.append(...full, ...empty, ...whole);
});
