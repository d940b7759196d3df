// The drawing of edge and cloud: beside each other where there is room, one above the other where there is not.

import { s } from "./dom.js";
import { CLOUD_READS, bytes, many } from "./formats.js";

const UNCUT = "M0 0 10 5 0 10z";


function parts(plan) {
  const layers = (number, which) => (plan === null ? `${which} layers` : number === 0 ? `no ${which.toLowerCase()} layers` : `${which} ${many(number, "layer")}`);
  return [
    { name: "Embedding", note: "frozen" },
    { name: layers(plan?.first ?? 0, "First"), note: "frozen, with adapters", faint: plan?.first === 0 },
    { name: layers(plan?.last ?? 0, "Last"), note: "frozen, with adapters", faint: plan?.last === 0 },
    { name: "Head and loss", note: "frozen; no label is sent" },
  ];
}

function box(x, y, width, height, kind, name, note) {
  return s("g", {},
    s("rect", { class: `part ${kind}`, x, y, width, height, rx: 8 }),
    s("text", { class: "part-name", x: x + 14, y: y + (note ? height / 2 - 4 : height / 2 + 5) }, name),
    note ? s("text", { class: "part-note", x: x + 14, y: y + height / 2 + 15 }, note) : null);
}

function arrow(kind, from, to, moving) {
  return s("path", { class: `wire wire-${kind}${moving ? " moving" : ""}`, d: `M${from[0]} ${from[1]}L${to[0]} ${to[1]}`, "marker-end": `url(#head-${kind})` });
}

const amount = (number) => (number === undefined ? "" : bytes(number)); // the first owner alone is told it

const words = (x, y, kind, text, anchor = "start") => s("text", { class: kind, x, y, "text-anchor": anchor }, text);

const heads = () => s("defs", {}, ["up", "down", "inner"].map((kind) =>
  s("marker", { id: `head-${kind}`, viewBox: "0 0 10 10", refX: 9, refY: 5, markerWidth: 7, markerHeight: 7, orient: "auto" }, s("path", { class: `head-${kind}`, d: UNCUT }))));

const cloudNote = (cloud) => (cloud.reachable === null ? "not asked yet" : cloud.reachable ? "reachable" : "not reachable now");

function keptBox(x, y, width, facts) {
  const rows = [["Text"], ["Labels"], ["Optimizer state"], ["Adapters", facts.adapters]];
  const group = s("g", {}, s("rect", { class: "kept", x, y, width, height: 176, rx: 8 }), words(x + 14, y + 26, "part-name", "Sent in no message"), words(x + 14, y + 45, "part-note", "what is read: see below"));
  rows.forEach(([row, told], place) => {
    const line = y + 72 + place * 26 + (told ? 10 : 0);
    group.append(words(x + 14, line, "part-text", row), words(x + width - 14, line, "part-figure", told ?? "", "end"));
  });
  return group;
}

function middle(cloud) {
  return cloud.plan ? `${many(cloud.plan.n_layers - cloud.plan.first - cloud.plan.last, "middle layer")}` : "Middle layers";
}

function wide(width, facts) {
  const { cloud, moved } = facts;
  const gap = 176;
  const edge = Math.round((width - gap) * 0.64);
  const right = edge + gap;
  const kept = Math.round(edge * 0.4);
  const stack = { x: kept + 36, width: edge - kept - 36 - 16 };
  const tops = [60, 128, 232, 300];
  const found = [
    heads(),
    s("rect", { class: "side", x: 1, y: 1, width: edge - 2, height: 378, rx: 14 }),
    words(20, 34, "side-name", "This machine"),
    s("rect", { class: "side side-cloud", x: right + 1, y: 1, width: width - right - 2, height: 378, rx: 14 }),
    words(right + 20, 34, "side-name", `Cloud “${cloud.name}”`),
    keptBox(16, 116, kept, facts),
    ...parts(cloud.plan).map((part, place) => box(stack.x, tops[place], stack.width, 56, part.faint ? "own faint" : "own", part.name, part.note)),
    box(right + 16, 128, width - right - 32, 160, "theirs", middle(cloud), "frozen; the cloud's own"),
    words(right + 30, 250, "part-note", cloud.model ?? ""),
    words(right + 20, 356, "part-note", cloudNote(cloud)),
    arrow("inner", [stack.x + stack.width / 2, 116], [stack.x + stack.width / 2, 127]),
    arrow("inner", [stack.x + stack.width / 2, 288], [stack.x + stack.width / 2, 299]),
    arrow("up", [stack.x + stack.width + 4, 156], [right + 12, 156], moved.up),
    arrow("down", [right + 12, 260], [stack.x + stack.width + 4, 260], moved.down),
    words(edge + gap / 2, 124, "wire-figure", amount(cloud.bytes_up), "middle"),
    words(edge + gap / 2, 144, "part-note", "sent, sealed", "middle"),
    words(edge + gap / 2, 284, "wire-figure", amount(cloud.bytes_down), "middle"),
    words(edge + gap / 2, 303, "part-note", "came back, sealed", "middle"),
    words(edge + gap / 2, 205, "part-note", "activations and", "middle"),
    words(edge + gap / 2, 221, "part-note", "their gradients", "middle"),
  ];
  return { height: 380, found };
}

function narrow(width, facts) {
  const { cloud, moved } = facts;
  const tops = [240, 302, 364, 426];
  const side = Math.round(width * 0.1);
  const found = [
    heads(),
    s("rect", { class: "side", x: 1, y: 1, width: width - 2, height: 500, rx: 14 }),
    words(16, 34, "side-name", "This machine"),
    keptBox(14, 50, width - 28, facts),
    ...parts(cloud.plan).map((part, place) => box(14, tops[place], width - 28, 54, part.faint ? "own faint" : "own", part.name, part.note)),
    arrow("up", [side, 508], [side, 592], moved.up),
    arrow("down", [width - side, 592], [width - side, 508], moved.down),
    words(side + 10, 546, "wire-figure", amount(cloud.bytes_up)),
    words(side + 10, 563, "part-note", "sent, sealed"),
    words(width - side - 10, 546, "wire-figure", amount(cloud.bytes_down), "end"),
    words(width - side - 10, 563, "part-note", "came back", "end"),
    s("rect", { class: "side side-cloud", x: 1, y: 598, width: width - 2, height: 170, rx: 14 }),
    words(16, 632, "side-name", `Cloud “${cloud.name}”`),
    box(14, 650, width - 28, 64, "theirs", middle(cloud), "frozen; the cloud's own"),
    words(16, 742, "part-note", [cloud.model, cloudNote(cloud)].filter(Boolean).join(" · ")),
  ];
  return { height: 770, found };
}

function spoken({ cloud, adapters }) {
  const plan = cloud.plan;
  const edge = plan ? `embedding, the first ${plan.first} and the last ${plan.last} of ${plan.n_layers} layers, head` : "embedding, first and last layers, head";
  const crossed = cloud.bytes_up === undefined ? "" : `${bytes(cloud.bytes_up)} of activations and gradients were sent, ${bytes(cloud.bytes_down)} came back. `;
  const stay = `No message carries text, labels${adapters === "here" ? ", adapters" : ""} or optimizer state. ${CLOUD_READS}`;
  return `This machine holds ${edge}. Cloud ${cloud.name}, ${cloudNote(cloud)}, holds the middle layers. ${crossed}${stay}`;
}

/** A drawing in `place`: `draw({ cloud, adapters })`. */
export function drawing(place, signal) {
  const picture = s("svg", { role: "img" });
  place.append(picture);
  let facts = null;
  let before = null;

  function redraw() {
    if (facts === null) return;
    const width = Math.max(280, place.clientWidth);
    const { height, found } = (width >= 760 ? wide : narrow)(width, facts);
    picture.setAttribute("width", width);
    picture.setAttribute("height", height);
    picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    picture.setAttribute("aria-label", spoken(facts));
    picture.replaceChildren(...found);
  }

  const resized = new ResizeObserver(redraw);
  resized.observe(place);
  signal.addEventListener("abort", () => resized.disconnect());
  return {
    draw(next) {
      const moved = { up: before !== null && next.cloud.bytes_up > before.bytes_up, down: before !== null && next.cloud.bytes_down > before.bytes_down };
      before = next.cloud;
      facts = { ...next, moved };
      redraw();
    },
  };
}
