// All jobs, the newest first.

import { list } from "./api.js";
import { h, keyed, poll, setText } from "./dom.js";
import { CLOUD_READS, moment } from "./formats.js";
import { kindOf, nameOf, pill, progress, stepsOf, timeOf, updatePill, updateProgress } from "./job_parts.js";

function makeRow(job) {
  return h("li", {},
    h("a", { class: "job", href: `#job/${encodeURIComponent(job.id)}` },
      h("span", { class: "job-name" }, nameOf(job)),
      pill(job),
      h("span", { class: "job-facts" }),
      h("span", { class: "job-time" }),
      progress()));
}

function updateRow(row, job) {
  updatePill(row.querySelector(".pill"), job);
  updateProgress(row.querySelector("progress"), job);
  setText(row.querySelector(".job-facts"), `${kindOf(job)} · ${job.model} · ${moment(job.created_at)}`);
  const parts = [job.step || job.total ? `step ${stepsOf(job)}` : "", timeOf(job)];
  setText(row.querySelector(".job-time"), parts.filter(Boolean).join(" · "));
}

const empty = () => h("section", { class: "empty" },
  h("h2", {}, "Nothing has been tuned here yet"),
  h("p", {}, "Give a file of examples, and the daemon tunes an adapter on it. The cloud computes the middle layers. No text leaves this machine as text. "), h("p", {}, CLOUD_READS),
  h("p", {}, h("a", { class: "button primary", href: "#new" }, "Start the first job")));

export function showJobs(main, _argument, signal) {
  const rows = h("ul", { class: "jobs", "aria-label": "Jobs" });
  const none = h("div", {});
  const start = h("a", { class: "button primary", href: "#new" }, "New job");
  main.append(h("div", { class: "heading" }, h("h1", {}, "Jobs"), start), none, rows);
  poll(async () => {
    let jobs;
    try {
      jobs = await list("/isthmus/v1/jobs", "jobs", { most: 200, signal });
    } catch (error) {
      if (!signal.aborted) setText(none, rows.children.length ? "" : error.message);
      return;
    }
    start.hidden = jobs.length === 0;
    none.replaceChildren(...(jobs.length === 0 ? [empty()] : []));
    keyed(rows, jobs, (job) => job.id, makeRow, updateRow);
  }, 2, signal);
}
