// Values under the pointer. The page says all it has to say without it.
function addValues(svg) {
  const [left, top, right, bottom, percent] = svg.dataset.plot.split(" ").map(Number);
  const pairs = text => text.split(" ").map(pair => pair.split(",").map(Number));
  const curves = [...svg.querySelectorAll("polyline.series")].map(line => ({
    name: line.dataset.name, points: pairs(line.getAttribute("points")), values: pairs(line.dataset.values),
  }));
  const title = svg.querySelector("title");
  svg.setAttribute("aria-label", title.textContent);
  title.remove(); // its tooltip would lie over the values
  const rule = document.createElementNS("http://www.w3.org/2000/svg", "path");
  rule.setAttribute("class", "axis");
  const box = document.createElement("div");
  box.className = "values";
  box.hidden = true;
  svg.append(rule);
  svg.parentElement.append(box);
  const short = value => Math.abs(value) >= 1e4 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(4));
  const told = value => percent ? (100 * value).toFixed(2) + "%" : short(value);
  const show = event => {
    const frame = svg.getBoundingClientRect();
    const at = Math.min(right, Math.max(left, (event.clientX - frame.left) * svg.viewBox.baseVal.width / frame.width));
    const nearest = curves.map(({name, points, values}) => {
      const i = points.reduce((best, [px], j) => Math.abs(px - at) < Math.abs(points[best][0] - at) ? j : best, 0);
      return {name, px: points[i][0], x: values[i][0], y: values[i][1]};
    });
    const first = nearest.reduce((a, b) => Math.abs(b.px - at) < Math.abs(a.px - at) ? b : a);
    rule.setAttribute("d", `M${first.px} ${top}V${bottom}`);
    box.textContent = [short(first.x), ...nearest.map(n => `${n.name}: ${told(n.y)}`)].join("\n");
    box.hidden = false;
    const host = svg.parentElement.getBoundingClientRect();
    const x = frame.left - host.left + first.px / svg.viewBox.baseVal.width * frame.width + 10;
    box.style.left = Math.max(0, Math.min(x, host.width - box.offsetWidth - 4)) + "px";
    box.style.top = frame.top - host.top + 6 + "px";
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", () => { box.hidden = true; rule.removeAttribute("d"); });
}
document.querySelectorAll("svg[data-plot]").forEach(addValues);
