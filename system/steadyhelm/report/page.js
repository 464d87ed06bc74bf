"use strict";
for (const figure of document.querySelectorAll("figure.chart")) {
  const lines = JSON.parse(figure.dataset.lines), frame = JSON.parse(figure.dataset.frame);
  const svg = figure.querySelector("svg"), cursor = figure.querySelector(".cursor"), box = figure.querySelector("output");
  const xs = [...new Set(lines.flatMap((line) => line.points.map((point) => point[0])))].sort((a, b) => a - b);
  const shown = (y) => (y === null ? "–" : frame.percent ? (100 * y).toFixed(1) + " %" : String(Number(y.toPrecision(4))));
  svg.addEventListener("pointermove", (event) => {
    const area = svg.getBoundingClientRect(), scale = area.width / svg.viewBox.baseVal.width;
    const at = frame.low + (((event.clientX - area.left) / scale - frame.left) / (frame.right - frame.left)) * (frame.high - frame.low);
    const x = xs.reduce((best, value) => (Math.abs(value - at) < Math.abs(best - at) ? value : best));
    const px = frame.left + ((x - frame.low) / (frame.high - frame.low)) * (frame.right - frame.left);
    cursor.setAttribute("x1", px);
    cursor.setAttribute("x2", px);
    const rows = lines.map((line) => [line.name, line.points.find((point) => point[0] === x)]).filter((row) => row[1]);
    box.textContent = ["iteration " + x, ...rows.map(([name, point]) => name + "  " + shown(point[1]))].join("\n");
    cursor.style.visibility = "visible";
    box.style.display = "block";
    const left = px * scale + 26;
    box.style.left = (left + box.offsetWidth > figure.clientWidth ? px * scale - box.offsetWidth - 4 : left) + "px";
  });
  svg.addEventListener("pointerleave", () => {
    cursor.style.visibility = "hidden";
    box.style.display = "none";
  });
}
for (const group of document.querySelectorAll(".filters")) {
  group.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    for (const other of group.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button));
    for (const card of document.querySelectorAll("[data-iteration]"))
      card.hidden = button.value !== "" && card.dataset.iteration !== button.value;
  });
}
