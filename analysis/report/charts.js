// Draws each chart of the page's data in its place, instead of the picture that is there.
(function () {
  const charts = JSON.parse(document.getElementById("report-data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const drawn = Object.entries(charts).map(([id, spec]) => {
    const place = document.getElementById(id);
    const width = Math.max(200, place.clientWidth - 120);
    for (const view of spec.vconcat || [spec]) view.width = width;
    const box = document.createElement("div");
    box.hidden = true;
    place.before(box);
    const options = {
      renderer: "svg",
      tooltip: { theme: dark ? "dark" : "light" },
      actions: { export: true, source: false, compiled: false, editor: false },
    };
    return vegaEmbed(box, spec, options).then(() => {
      box.hidden = false;
      place.remove();
      box.id = id;
      box.classList.add("chart");
    });
  });
  Promise.all(drawn).then(() => { document.documentElement.dataset.charts = "drawn"; });
})();
