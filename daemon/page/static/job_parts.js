// What the list of jobs and the page of one have in common.

import { h, s, setText } from "./dom.js";
import { count, duration, moment } from "./formats.js";

// A mark beside each word: a state is not told by its colour alone.
const MARKS = {
  queued: "M3.500 8h0M8 8h0M12.500 8h0",
  running: "M5 3.500v9l7-4.500z",
  paused: "M5.500 4v8M10.500 4v8",
  succeeded: "M3.500 8.500l3 3 6-7",
  failed: "M4 4l8 8M12 4l-8 8",
  cancelled: "M3.500 8h9",
};

/** What a job is doing, in a word: its state, or what a person wants of it. */
export function stateOf(job) {
  if (job.status === "running" && job.wanted === "pause") return "pausing";
  if (job.status === "running" && job.wanted === "cancel") return "cancelling";
  return job.waiting ? "waiting" : job.status;
}

/** The cloud that is waited for, since when and until when: of a job's `waiting`, or a cloud of the status. */
export const waitOf = (wait) => `The cloud ${wait.cloud ?? wait.name} has not answered since ${moment(wait.since)}${wait.until ? `; it is waited for until ${moment(wait.until)}` : ""}`;

/** Whether a job goes on by itself. */
export const isLive = (job) => job.status === "running" || job.status === "queued";

/** Its state, as a mark and a word. */
export function pill(job) {
  const node = h("span", { class: "pill" });
  updatePill(node, job);
  return node;
}

export function updatePill(node, job) {
  const state = stateOf(job);
  if (node.dataset.state === state) return;
  node.dataset.state = state;
  node.dataset.status = state === "waiting" ? "queued" : job.status; // a job that waits does not look like one that runs
  node.replaceChildren(
    s("svg", { viewBox: "0 0 16 16", width: 14, height: 14, "aria-hidden": "true" }, s("path", { d: MARKS[node.dataset.status] ?? MARKS.queued })),
    state);
}

/** How far it is. An element with `role=progressbar`. */
export function progress() {
  return h("progress", { max: 1, value: 0, "aria-label": "Progress" });
}

export function updateProgress(node, job) {
  node.dataset.status = job.status;
  node.hidden = job.status === "cancelled";
  if (job.total) {
    node.max = job.total;
    node.value = job.step;
  } else if (job.status === "succeeded") {
    node.value = node.max;
  } else {
    node.value = 0;
  }
}

/** "12 of 40", "12". */
export const stepsOf = (job) => (job.total ? `${count(job.step)} of ${count(job.total)}` : count(job.step));

/** Seconds that it took, or has been running for; null before it began. */
export function tookOf(job, now = Date.now() / 1000) {
  return job.started_at ? (job.finished_at ?? now) - job.started_at : null;
}

/** What to say of its time: "3 min 10 s left", "took 2 min 0 s". */
export function timeOf(job) {
  if (job.waiting) return waitOf(job.waiting);
  if (job.seconds_left !== null) return `${duration(job.seconds_left)} left`;
  if (job.finished_at && job.started_at) return `took ${duration(tookOf(job))}`;
  return "";
}

/** Its name: what its owner called it, else the beginning of its id. */
export const nameOf = (job) => job.suffix || `Job ${job.id.replace(/^ftjob-/, "").slice(0, 6)}`;

const KINDS = { train: "Split training", tune: "Private tuning (emulator)", evaluate: "Evaluation", generate: "Batch generation" };

export const kindOf = (job) => KINDS[job.kind] ?? job.kind;

/** A figure with its name: `[element, set]`. */
export function stat(name) {
  const value = h("dd", {}, "–");
  return [h("div", { class: "stat" }, h("dt", {}, name), value), (text) => setText(value, text)];
}
