// Tables of the class "many" can be filtered by words, and sorted by a click on a heading.
(function () {
  const number = (text) => parseFloat(text.replace(/[,\u2009]/g, "").replace("\u2212", "-"));
  function compare(a, b) {
    const [one, other] = [number(a), number(b)];
    if (isNaN(one) || isNaN(other)) return isNaN(one) && isNaN(other) ? a.localeCompare(b) : isNaN(one) ? 1 : -1;
    return one - other;
  }
  function sortable(table) {
    const body = table.tBodies[0];
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => {
      const button = document.createElement("button");
      button.append(...heading.childNodes);
      heading.append(button);
      button.addEventListener("click", () => {
        const down = heading.ariaSort === "ascending";
        headings.forEach((other) => { other.ariaSort = null; });
        heading.ariaSort = down ? "descending" : "ascending";
        const rows = [...body.rows].map((row) => [row.cells[column].textContent, row]);
        rows.sort((a, b) => (down ? compare(b[0], a[0]) : compare(a[0], b[0])));
        body.append(...rows.map((pair) => pair[1]));
      });
    });
  }
  function filterable(table) {
    const rows = [...table.tBodies[0].rows];
    const input = document.createElement("input");
    const count = document.createElement("span");
    const line = document.createElement("p");
    input.type = "search";
    input.placeholder = "show rows with these words";
    input.setAttribute("aria-label", input.placeholder);
    line.className = "filter soft";
    line.append(input, count);
    table.parentElement.before(line);
    const texts = rows.map((row) => row.textContent.toLowerCase());
    function show() {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      rows.forEach((row, at) => {
        row.hidden = !words.every((word) => texts[at].includes(word));
        shown += row.hidden ? 0 : 1;
      });
      count.textContent = `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows`;
    }
    input.addEventListener("input", show);
    show();
  }
  document.querySelectorAll("table.many").forEach((table) => { filterable(table); sortable(table); });
  document.documentElement.dataset.tables = "ready";
})();
