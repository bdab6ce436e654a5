// Parts of the page that have changed on the server are put in the old ones' place; where one reads, and what is
// folded out elsewhere, stays. (`version` is that of the page as it was served.)
const partsOf = page => new Map([...page.querySelectorAll("#top, main > section")].map(part => [part.id, part.outerHTML]));
let shown = partsOf(document);
async function follow() {
  const latest = await (await fetch("version")).text();
  if (latest === version) return;
  const fresh = partsOf(new DOMParser().parseFromString(await (await fetch(".")).text(), "text/html"));
  if ([...fresh.keys()].join() !== [...shown.keys()].join()) return location.reload();
  for (const [id, text] of fresh) {
    if (text === shown.get(id)) continue;
    document.getElementById(id).outerHTML = text;
    document.getElementById(id).querySelectorAll("svg[data-plot]").forEach(addValues);
  }
  [shown, version] = [fresh, latest];
}
setInterval(() => follow().catch(() => {}), 2000); // an ended server is no error of the page
