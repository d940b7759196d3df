// A curve of losses: training as a line, smoothed over the faint line of its steps, validation as a dashed line with points. It is drawn as wide as its place is.

import { h, s, setText } from "./dom.js";
import { count, figure } from "./formats.js";

const HEIGHT = 260;
const EDGE = { left: 52, right: 16, top: 14, bottom: 34 };

/** So many round numbers or a few more that cover a range. */
function ticks(low, high, wanted) {
  const rough = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step + 0; value <= high + step * 1e-6; value += step) found.push(value);
  return found;
}

/** At most `most` points: the mean of each run of neighbours. */
function thinned(points, most) {
  if (points.length <= most) return points;
  const size = points.length / most;
  return Array.from({ length: most }, (_, place) => {
    const part = points.slice(Math.floor(place * size), Math.floor((place + 1) * size));
    const mean = (pick) => part.reduce((sum, point) => sum + pick(point), 0) / part.length;
    return { step: Math.round(mean((point) => point.step)), loss: mean((point) => point.loss) };
  });
}

/** Each point as the mean of so many points on either side of it; near an end, of as many as both sides have. */
const smoothed = (points, reach) => points.map((point, place) => {
  const near = Math.min(reach, place, points.length - 1 - place);
  const part = points.slice(place - near, place + near + 1);
  return { step: point.step, loss: part.reduce((sum, one) => sum + one.loss, 0) / part.length };
});

/** A curve: `element`, and `draw({ train, validation, total })` with points of `step` and `loss`. */
export function makeCurve(signal) {
  const plot = s("svg", { class: "plot", height: HEIGHT, role: "img", tabindex: 0 });
  const reading = h("p", { class: "reading" });
  const training = h("span", { class: "legend legend-train" }, "training");
  const heldOut = h("span", { class: "legend legend-validation", hidden: true }, "validation");
  const element = h("figure", { class: "curve" },
    h("figcaption", {},
      training,
      heldOut,
      reading),
    plot);
  let data = { train: [], validation: [], total: null };
  let chosen = null;
  let places = { x: () => 0, y: () => 0, inverse: () => 0 };

  function redraw() {
    const width = Math.max(260, element.clientWidth);
    const train = thinned(data.train.filter((point) => Number.isFinite(point.loss)), width);
    const validation = data.validation.filter((point) => Number.isFinite(point.loss));
    const all = [...train, ...validation];
    const reach = Math.floor(train.length / 20);
    heldOut.hidden = validation.length === 0;
    setText(training, reach ? "training, smoothed; single steps faint" : "training");
    plot.setAttribute("width", width);
    plot.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    if (all.length === 0) {
      plot.setAttribute("aria-label", "No loss yet");
      plot.replaceChildren(s("text", { class: "tick", x: width / 2, y: HEIGHT / 2, "text-anchor": "middle" }, "The curve begins with the first step."));
      return;
    }
    const last = Math.max(data.total ?? 0, ...all.map((point) => point.step), 1);
    const losses = all.map((point) => point.loss);
    let [low, high] = [Math.min(...losses), Math.max(...losses)];
    if (high - low < 1e-6 * Math.abs(high)) [low, high] = [low - 0.5, high + 0.5];
    const pad = (high - low) * 0.06;
    [low, high] = [low >= 0 ? Math.max(0, low - pad) : low - pad, high + pad];
    const inside = { width: width - EDGE.left - EDGE.right, height: HEIGHT - EDGE.top - EDGE.bottom };
    const x = (step) => EDGE.left + (inside.width * step) / last;
    const y = (loss) => EDGE.top + inside.height * (1 - (loss - low) / (high - low));
    places = { x, y, inverse: (place) => ((place - EDGE.left) / inside.width) * last };
    const line = (points) => points.map((point, place) => `${place ? "L" : "M"}${x(point.step).toFixed(1)} ${y(point.loss).toFixed(1)}`).join("");
    const grid = ticks(low, high, 5).map((value) => [
      s("line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: y(value), y2: y(value) }),
      s("text", { class: "tick", x: EDGE.left - 8, y: y(value) + 4, "text-anchor": "end" }, String(+value.toPrecision(4))),
    ]);
    const below = ticks(0, last, width < 480 ? 4 : 8).filter((value) => Number.isInteger(value)).map((value) =>
      s("text", { class: "tick", x: x(value), y: HEIGHT - 12, "text-anchor": x(value) > width - 30 ? "end" : "middle" }, count(value)));
    below.push(s("text", { class: "tick", x: EDGE.left - 16, y: HEIGHT - 12, "text-anchor": "end" }, "step"));
    plot.replaceChildren(
      ...grid.flat(), ...below,
      ...(reach ? [s("path", { class: "line line-raw", d: line(train) })] : []),
      s("path", { class: "line line-train", d: line(smoothed(train, reach)) }),
      ...(train.length === 1 ? [s("circle", { class: "dot-train", cx: x(train[0].step), cy: y(train[0].loss), r: 3 })] : []),
      s("path", { class: "line line-validation", d: line(validation) }),
      ...validation.map((point) => s("circle", { class: "dot-validation", cx: x(point.step), cy: y(point.loss), r: 3.5 })));
    plot.setAttribute("aria-label", spoken());
    mark();
  }

  function spoken() {
    const { train, validation } = data;
    const parts = ["Loss by step."];
    if (train.length) parts.push(`Training: ${figure(train[0].loss)} at step ${train[0].step}, ${figure(train.at(-1).loss)} at step ${train.at(-1).step}.`);
    if (validation.length) parts.push(`Validation: ${figure(validation[0].loss)} at step ${validation[0].step}, ${figure(validation.at(-1).loss)} at step ${validation.at(-1).step}.`);
    return `${parts.join(" ")} Left and right arrow keys read single steps.`;
  }

  /** Show the point that is read: where the pointer is, or where the arrow keys have gone; else the last one. */
  function mark() {
    plot.querySelector(".cursor")?.remove();
    const { train } = data;
    if (train.length === 0) return setText(reading, "");
    const point = chosen === null ? train.at(-1) : train[Math.min(chosen, train.length - 1)];
    const held = data.validation.filter((other) => other.step <= point.step).at(-1);
    setText(reading, `step ${count(point.step)} · loss ${figure(point.loss)}${held ? ` · validation ${figure(held.loss)}` : ""}`);
    if (chosen === null || !Number.isFinite(point.loss)) return;
    plot.append(s("g", { class: "cursor" },
      s("line", { x1: places.x(point.step), x2: places.x(point.step), y1: EDGE.top, y2: HEIGHT - EDGE.bottom }),
      s("circle", { class: "dot-train", cx: places.x(point.step), cy: places.y(point.loss), r: 4 })));
  }

  function choose(place) {
    chosen = place === null ? null : Math.max(0, Math.min(data.train.length - 1, place));
    mark();
  }

  plot.addEventListener("pointermove", (event) => {
    const step = places.inverse(event.clientX - plot.getBoundingClientRect().left);
    let nearest = 0;
    data.train.forEach((point, place) => {
      if (Math.abs(point.step - step) < Math.abs(data.train[nearest].step - step)) nearest = place;
    });
    if (data.train.length) choose(nearest);
  });
  plot.addEventListener("pointerleave", () => choose(null));
  plot.addEventListener("blur", () => choose(null));
  plot.addEventListener("keydown", (event) => {
    const from = chosen ?? data.train.length - 1;
    const to = { ArrowLeft: from - 1, ArrowRight: from + 1, Home: 0, End: data.train.length - 1, Escape: null }[event.key];
    if (to === undefined || data.train.length === 0) return;
    event.preventDefault();
    choose(to);
  });
  const resized = new ResizeObserver(redraw);
  resized.observe(element);
  signal.addEventListener("abort", () => resized.disconnect());
  return {
    element,
    draw(next) {
      data = next;
      redraw();
    },
  };
}
