"use strict";
(() => {
  const table = document.querySelector("table.trials");
  if (!table) return;
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];

  // -- sorting: numbers as numbers, what is missing last in both directions
  const key = (cell) => {
    const text = cell.dataset.v ?? cell.textContent;
    const value = text.trim() === "" ? NaN : Number(text);
    return Number.isNaN(value) ? (text === "–" || text === "nan" ? null : text) : value;
  };
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b
      : typeof a === typeof b ? a.localeCompare(b, "en", { numeric: true })
      : typeof a === "number" ? -1 : 1;
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows].map((row) => [key(row.cells[column]), row]);
    rows.sort(([a], [b]) => a === null || b === null
      ? (a === null) - (b === null) : down ? compare(b, a) : compare(a, b));
    body.append(...rows.map(([, row]) => row));
  }));

  // -- the mark under the pointer, in the plot's own thousandths
  const cache = new WeakMap();
  const marks = (area) => {
    if (!cache.has(area)) {
      cache.set(area, [...area.querySelectorAll("[data-t]")].map((mark) => {
        const numbers = mark.getAttribute("d").replace(/h0$/, "").match(/-?\d+/g).map(Number);
        const points = [];
        for (let i = 0; i < numbers.length; i += 2) points.push([numbers[i], numbers[i + 1]]);
        return { mark, points, trial: mark.dataset.t };
      }));
    }
    return cache.get(area);
  };
  const distance = (points, x, y, width, height) => {
    let least = Infinity;
    for (let i = 0; i < points.length; i++) {
      const [x0, y0] = points[i];
      const [x1, y1] = points[Math.min(i + 1, points.length - 1)];
      const dx = (x1 - x0) * width, dy = (y1 - y0) * height;
      const px = (x - x0) * width, py = (y - y0) * height;
      const along = Math.max(0, Math.min(1, (px * dx + py * dy) / (dx * dx + dy * dy || 1)));
      least = Math.min(least, Math.hypot(px - along * dx, py - along * dy));
    }
    return least;
  };
  const nearest = (area, event) => {
    const box = area.getBoundingClientRect();
    const x = (1000 * (event.clientX - box.left)) / box.width;
    const y = (1000 * (event.clientY - box.top)) / box.height;
    let found = null, least = event.pointerType === "touch" ? 28 : 14;
    for (const candidate of marks(area)) {
      if (candidate.mark.classList.contains("out")) continue;
      const gap = distance(candidate.points, x, y, box.width / 1000, box.height / 1000);
      if (gap <= least) { least = gap; found = candidate; }
    }
    return found;
  };

  // -- the tip: what the trial's row says, as text
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  document.body.append(tip);
  let lit = null;
  const hide = () => {
    tip.hidden = true;
    if (lit) lit.classList.remove("lit");
    lit = null;
  };
  const show = (found, event) => {
    if (lit !== found.mark) {
      hide();
      lit = found.mark;
      lit.classList.add("lit");
      const row = document.getElementById("t" + found.trial);
      tip.replaceChildren(...heads.map((head, column) => {
        const line = document.createElement("div");
        for (const text of [head.textContent, row.cells[column].textContent]) {
          const part = document.createElement("span");
          part.textContent = text;
          line.append(part);
        }
        return line;
      }));
      const link = document.createElement("a");
      link.href = "#t" + found.trial;
      link.textContent = "to its row";
      if (event.pointerType === "touch") tip.append(link);
      tip.classList.toggle("touch", event.pointerType === "touch");
    }
    tip.hidden = false;
    const room = document.documentElement.clientWidth;
    const left = Math.min(event.clientX + 14, room - tip.offsetWidth - 8);
    const below = event.clientY + 16;
    const top = below + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 12 : below;
    tip.style.left = Math.max(8, left) + scrollX + "px";
    tip.style.top = Math.max(8, top) + scrollY + "px";
  };
  for (const area of document.querySelectorAll(".area")) {
    const look = (event) => {
      if (brush) return;
      const found = nearest(area, event);
      if (found) show(found, event); else hide();
      area.style.cursor = found ? "pointer" : "";
    };
    area.addEventListener("pointermove", look);
    area.addEventListener("pointerdown", look);
    area.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
    area.addEventListener("click", (event) => {
      if (event.pointerType === "touch") { event.preventDefault(); return; }
      if (event.target.closest(".axis")) return;
      const found = nearest(area, event);
      if (found) location.hash = "t" + found.trial;
    });
  }
  document.addEventListener("pointerdown", (event) => {
    if (!event.target.closest(".area, .tip")) hide();
  });

  // -- brushing: a stretch of an axis keeps the lines that pass through it
  let brush = null;
  const parallel = document.querySelector(".parallel .area");
  if (!parallel) return;
  const kept = new Map(); // axis -> [top, bottom] in thousandths
  const said = document.querySelector(".brushed");
  const filter = () => {
    let left = 0;
    const all = marks(parallel);
    for (const { mark, points } of all) {
      const passes = [...kept].every(([axis, [top, bottom]]) =>
        points[axis][1] >= top && points[axis][1] <= bottom);
      mark.classList.toggle("out", !passes);
      left += passes;
    }
    said.textContent = kept.size ? `${left} of ${all.length} trials pass` : "";
  };
  for (const axis of parallel.querySelectorAll(".axis")) {
    const index = Number(axis.dataset.axis);
    const at = (event) => {
      const box = axis.getBoundingClientRect();
      return Math.max(0, Math.min(1000, (1000 * (event.clientY - box.top)) / box.height));
    };
    axis.addEventListener("pointerdown", (event) => {
      hide();
      axis.setPointerCapture(event.pointerId);
      axis.querySelector("em")?.remove();
      kept.delete(index);
      brush = { start: at(event), band: document.createElement("em") };
      filter();
      event.preventDefault();
    });
    axis.addEventListener("pointermove", (event) => {
      if (!brush || !axis.hasPointerCapture(event.pointerId)) return;
      const [top, bottom] = [brush.start, at(event)].sort((a, b) => a - b);
      if (bottom - top < 12) return;
      axis.append(brush.band);
      brush.band.style.top = top / 10 + "%";
      brush.band.style.height = (bottom - top) / 10 + "%";
      kept.set(index, [top, bottom]);
      filter();
    });
    for (const end of ["pointerup", "pointercancel"]) axis.addEventListener(end, () => { brush = null; });
  }
})();
