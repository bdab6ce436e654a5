// Values under the pointer. The page says all it has to say without it.
function addValues(svg) {
  const [left, top, right, bottom, x0, x1, y0, y1, logX, logY, percent] = svg.dataset.plot.split(" ").map(Number);
  const curves = [...svg.querySelectorAll("polyline.series")].map(line => ({
    name: line.dataset.name,
    points: line.getAttribute("points").split(" ").map(point => point.split(",").map(Number)),
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
  const between = (low, high, share, log) => log ? low * (high / low) ** share : low + share * (high - low);
  const atX = px => between(x0, x1, (px - left) / (right - left), logX);
  const atY = py => {
    const value = between(y0, y1, (bottom - py) / (bottom - top), logY);
    return percent ? (100 * value).toPrecision(4) + "%" : short(value);
  };
  const show = event => {
    const frame = svg.getBoundingClientRect();
    const at = Math.min(right, Math.max(left, (event.clientX - frame.left) * svg.viewBox.baseVal.width / frame.width));
    const nearest = curves.map(({name, points}) => {
      const [px, py] = points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
      return {name, px, py};
    });
    const first = nearest.reduce((a, b) => Math.abs(b.px - at) < Math.abs(a.px - at) ? b : a);
    rule.setAttribute("d", `M${first.px} ${top}V${bottom}`);
    box.textContent = [short(atX(first.px)), ...nearest.map(n => `${n.name}: ${atY(n.py)}`)].join("\n");
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
