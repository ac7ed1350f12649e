// The value under the cursor: one line and one small box, for all charts of the page.
(() => {
  const tip = document.getElementById("tip");
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) { const mid = (low + high) >> 1; (xs[mid] ?? -Infinity) <= x ? (low = mid) : (high = mid); }
    return Math.abs((xs[low] ?? Infinity) - x) <= Math.abs((xs[high] ?? Infinity) - x) ? low : high;
  };
  const figure = (v) => v === null ? "–" : Math.abs(v) >= 1e5 || (v !== 0 && Math.abs(v) < 1e-3) ? v.toExponential(3) : String(+v.toPrecision(5));
  for (const chart of document.querySelectorAll("figure.chart")) {
    const told = JSON.parse(chart.querySelector("script").textContent);
    const plot = chart.querySelector(".plot"), cursor = chart.querySelector(".cursor");
    const leave = () => { tip.hidden = cursor.hidden = true; };
    plot.addEventListener("pointerleave", leave);
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const part = ((event.clientX - box.left) / box.width - told.box[0]) / (told.box[1] - told.box[0]);
      if (part < 0 || part > 1) return leave();
      const x = told.x[0] + part * (told.x[1] - told.x[0]);
      const rows = told.series.filter((s) => s.x.length).map((s) => ({ s, i: nearest(s.x, x) }))
        .filter(({ s, i }) => s.x[i] !== null && Math.abs(s.x[i] - x) < (told.x[1] - told.x[0]) / 8);
      if (!rows.length) return leave();
      tip.replaceChildren(...rows.map(({ s, i }) => {
        const row = document.createElement("div"), dot = document.createElement("i");
        dot.style.background = `var(--series-${s.colour})`;
        row.append(dot, `${told.series.length > 1 ? s.name + "  " : ""}${figure(s.y[i])}  at ${s.x[i]}`);
        return row;
      }));
      tip.hidden = cursor.hidden = false;
      cursor.style.left = `${event.clientX - box.left}px`;
      const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
      tip.style.left = `${Math.max(8, left)}px`;
      tip.style.top = `${event.clientY + 16}px`;
    });
  }
})();
