// One job: its curve, what it costs, what happened, and what it has saved.

import { ask, download, list } from "./api.js";
import { confirm, h, keyed, poll, say, setText } from "./dom.js";
import { makeCurve } from "./curve.js";
import { bytes, count, duration, figure, moment } from "./formats.js";
import { isLive, kindOf, nameOf, pill, progress, stat, stateOf, stepsOf, timeOf, updatePill, updateProgress, waitOf } from "./job_parts.js";

const MOST_EVENTS = 3000;
const MOST_SHOWN = 200;

const ACTIONS = {
  pause: { name: "Pause", when: (job) => isLive(job) && job.wanted === "run" },
  resume: { name: "Resume", when: (job) => job.status === "paused" || (job.status === "running" && job.wanted === "pause") },
  retry: { name: "Retry", when: (job) => ["failed", "cancelled"].includes(job.status) },
  again: { name: "Again with changes", when: (job) => job.kind === "train" || isPrivate(job) },
  remove: { name: "Delete", when: (job) => ["succeeded", "failed", "cancelled"].includes(job.status) },
  cancel: { name: "Cancel", when: (job) => ["queued", "running", "paused"].includes(job.status) && job.wanted !== "cancel" },
};

const FILES = { data: "Data", validation: "Validation data", public: "Public texts", prompts: "Prompts" };

export function showJob(main, id, signal) {
  const path = `/isthmus/v1/jobs/${encodeURIComponent(id)}`;
  const name = h("h1", {}, "Job");
  const facts = h("p", { class: "about" });
  const stayed = h("p", { class: "notice", hidden: true });
  const problem = h("p", { class: "notice bad", role: "alert", hidden: true });
  const bar = progress();
  const time = h("span", { class: "job-time" });
  const buttons = h("div", { class: "actions" });
  const stats = Object.fromEntries(
    [["steps", "Step"], ["loss", "Training loss"], ["validation", "Validation loss"], ["speed", "Tokens a second"],
      ["up", "Sent to the cloud"], ["down", "Came back"], ["left", "Time left"]].map(([key, title]) => [key, stat(title)]));
  const curve = makeCurve(signal);
  const details = h("dl", { class: "details" });
  const saved = h("ul", { class: "saved" });
  const events = h("ol", { class: "events", tabindex: 0, "aria-label": "Events, the newest first" });
  const noneSaved = h("p", { class: "hint" }, "Checkpoints appear here while the job runs, and can be talked to at once.");
  const state = { job: null, badge: null, steps: [], events: [], files: new Map() };

  main.append(
    h("p", { class: "back" }, h("a", { href: "#jobs" }, "‹ All jobs")),
    h("div", { class: "heading" }, name, buttons),
    facts, stayed, problem,
    h("div", { class: "bar" }, bar, time),
    h("dl", { class: "stats" }, Object.values(stats).map(([element]) => element)),
    h("section", { class: "card", "aria-label": "Loss curve" }, h("h2", {}, "Loss"), curve.element),
    h("div", { class: "halves" },
      h("div", { class: "stack" },
        h("section", { class: "card" }, h("h2", {}, "Checkpoints"), noneSaved, saved),
        h("section", { class: "card" }, h("h2", {}, "Details"), details, h("p", { class: "hint" }, "Settings that are not named have their defaults."))),
      h("section", { class: "card" }, h("h2", {}, "Events"), events)));

  async function act(action) {
    if (action === "again") {
      location.hash = `#new/${encodeURIComponent(id)}`;
      return;
    }
    if (action === "remove") return remove();
    if (action === "cancel" && !(await confirm("Cancel this job?", "It stops after its current step. Its checkpoints stay, and it can be retried from the newest one.", "Cancel the job"))) return;
    for (const button of buttons.children) button.disabled = true;
    try {
      state.job = await ask(`${path}/${action}`, { method: "POST" });
      say(`The job is ${stateOf(state.job)}.`);
      problem.hidden = true;
      await update();
    } catch (error) {
      fail(error);
    } finally {
      for (const button of buttons.children) button.disabled = false;
    }
  }

  async function remove() {
    if (!(await confirm("Delete this job?", "Its curve, events, checkpoints and tuned model are removed from this machine. Files that you uploaded stay.", "Delete the job"))) return;
    try {
      await ask(path, { method: "DELETE" });
      say("The job is deleted.");
      location.hash = "#jobs";
    } catch (error) {
      fail(error);
    }
  }

  /** What a file is called, by its id; what is none is a path. */
  async function nameFile(id) {
    if (state.files.has(id)) return;
    state.files.set(id, id);
    const file = await ask(`/v1/files/${encodeURIComponent(id)}`, { signal }).catch(() => null);
    state.files.set(id, file ? `${file.filename} (${bytes(file.bytes)})` : `${id}, deleted since`);
  }

  async function showDetails(job) {
    const files = Object.keys(FILES).filter((name) => job.spec[name]);
    await Promise.all(files.map((name) => job.spec[name].startsWith("file-") && nameFile(job.spec[name])));
    const settings = Object.entries(job.spec).filter(([name]) => !(name in FILES));
    const dates = [["Created", job.created_at], ["Begun", job.started_at], ["Ended", job.finished_at]];
    const rows = [
      ...files.map((name) => [FILES[name], state.files.get(job.spec[name]) ?? job.spec[name]]),
      ...settings.map(([name, value]) => [name, typeof value === "string" ? value : JSON.stringify(value)]),
      ...dates.filter(([, at]) => at).map(([name, at]) => [name, moment(at)]),
    ];
    keyed(details, rows, ([name]) => name, ([name]) => h("div", {}, h("dt", {}, name), h("dd", {})),
      (node, [, value]) => setText(node.lastChild, value));
  }

  function fail(error) {
    if (signal.aborted) return;
    setText(problem, error.message);
    problem.hidden = false;
  }

  function showHead(job) {
    if (state.badge === null) {
      state.badge = pill(job);
      facts.append(state.badge, h("span", { class: "facts" }), h("code", { class: "long" }, job.id));
    }
    updatePill(state.badge, job);
    updateProgress(bar, job);
    setText(name, nameOf(job));
    document.title = `${nameOf(job)} · Isthmus`;
    setText(facts.querySelector(".facts"), `${kindOf(job)} · ${job.model} · ${moment(job.created_at)}`);
    stayed.hidden = job.kind !== "tune";
    if (!stayed.hidden) setText(stayed, stayedOf(job));
    setText(time, job.waiting ? "" : timeOf(job)); // the notice says it
    const possible = Object.keys(ACTIONS).filter((action) => ACTIONS[action].when(job));
    keyed(buttons, possible, (action) => action,
      (action) => h("button", { type: "button", class: "plain", onclick: () => act(action) }, ACTIONS[action].name), () => {});
    if (job.error) fail(new Error(`${job.error.message} (exit code ${job.error.code})`));
    else if (job.waiting) fail(new Error(`${waitOf(job.waiting)}, and then ${job.status === "queued" ? "the job has failed" : "the job is queued again"} (${job.waiting.reason})`));
    else if (stateOf(job) === job.status) problem.hidden = true;
  }

  function showFigures(job, validation) {
    const last = state.steps.at(-1);
    stats.steps[1](stepsOf(job));
    stats.loss[1](last ? figure(last.loss) : "–");
    stats.validation[1](validation.length ? figure(validation.at(-1).loss) : "–");
    const speed = tokensPerSecond(job, state.steps);
    stats.speed[1](speed === null ? "–" : count(Math.round(speed)));
    stats.up[1](bytes(job.bytes_up));
    stats.down[1](bytes(job.bytes_down));
    stats.left[1](job.seconds_left === null ? "–" : duration(job.seconds_left));
    curve.draw({ train: state.steps, validation, total: job.total });
  }

  function showSaved(rows) {
    noneSaved.hidden = rows.length > 0;
    keyed(saved, rows, (row) => row.model,
      (row) => h("li", {},
        h("strong", {}, row.step ? `Step ${count(row.step)}` : "Final result"),
        h("code", { class: "long" }, row.model),
        h("span", { class: "saved-loss" }),
        h("button", { type: "button", class: "plain", "aria-label": `Download ${what(row)}`, onclick: () => download(`/isthmus/v1/adapters/${encodeURIComponent(row.model)}`, `${nameOf(state.job)}${row.step ? `-step-${row.step}` : ""}.zip`).catch(fail) }, "Download"),
        h("a", { class: "button plain", href: `#chat/${encodeURIComponent(row.model)}`, "aria-label": `Talk to ${what(row)}` }, "Talk")),
      (node, row) => {
        const losses = [["training", row.metrics.train_loss], ["validation", row.metrics.valid_loss]].filter(([, loss]) => Number.isFinite(loss));
        setText(node.querySelector(".saved-loss"), losses.map(([name, loss]) => `${name} ${figure(loss)}`).join(" · "));
      });
  }

  function showEvents(rows) {
    keyed(events, rows, (row) => row.id,
      (row) => h("li", { class: `event event-${row.level}` },
        h("time", { datetime: new Date(row.at * 1000).toISOString() }, moment(row.at)),
        h("span", {}, row.level === "info" ? "" : h("strong", {}, `${row.level}: `), row.message)),
      () => {});
  }

  async function update() {
    const before = state.job;
    const job = (state.job = await ask(path, { signal }));
    if (before && before.status !== job.status) say(`${nameOf(job)} is ${job.status}.`);
    const after = state.steps.at(-1)?.step ?? 0;
    const [fresh, savedRows, newEvents] = await Promise.all([
      ask(`${path}/steps?after=${after}&limit=10000`, { signal }),
      list(`${path}/checkpoints`, "checkpoints", { most: 50, signal }),
      list(`${path}/events`, "events", { until: state.events[0]?.id, most: MOST_EVENTS, signal }),
    ]);
    state.steps.push(...fresh.steps);
    state.events.unshift(...newEvents);
    showHead(job);
    showFigures(job, validationOf(state.events));
    await showDetails(job);
    showSaved(job.tuned_model ? [{ model: job.tuned_model, step: null, metrics: {} }, ...savedRows] : savedRows);
    showEvents(state.events.filter((row) => row.kind === "message" || isEvaluation(row)).slice(0, MOST_SHOWN));
  }

  poll(() => update().catch(fail), 1, signal);
}

/** Whether a job tunes on what its cloud offers. */
const isPrivate = (job) => job.kind === "tune" && !job.spec.package?.includes("/");

/** What has left this machine for a job that sends none of its data, and what does when its adapter is used. */
function stayedOf(job) {
  const crossed = job.spec.public ? "the public texts as activations, what they were answered, and what was missing of the package" : "to ask for the package and to fetch what was missing";
  const fetched = !isPrivate(job) ? "It tunes on a package of this machine, and connects to nothing."
    : job.bytes_up === 0 && job.bytes_down === 0 ? (job.step ? "The package was here already, so nothing crossed." : `It fetches the cloud's package first${job.spec.public ? ", asks about the public texts" : ""}, and then tunes here.`)
    : `All that crossed was ${crossed}: ${bytes(job.bytes_up)} went, ${bytes(job.bytes_down)} came back.`;
  return `Nothing of your data left this machine: no text, no activation, no gradient. ${fetched} The adapter stays here until you return it. When you talk to it, your prompts cross as activations, from which a cloud that attacks can read them.`;
}

/** Tokens a second: those of the last steps over the seconds that a step takes; null where that is not known. */
function tokensPerSecond(job, steps) {
  const last = steps.slice(-20).filter((line) => line.tokens !== undefined);
  if (!job.seconds_per_step || last.length === 0) return null;
  return last.reduce((sum, line) => sum + line.tokens, 0) / last.length / job.seconds_per_step;
}

const what = (row) => (row.step ? `the checkpoint of step ${row.step}` : "the final result");

const isEvaluation = (event) => event.kind === "metrics" && typeof event.data.valid_loss === "number";

/** Points of the validation loss, which events tell. */
function validationOf(events) {
  const found = new Map(events.filter(isEvaluation).map(({ data }) => [data.step, data.valid_loss]));
  return [...found].sort(([a], [b]) => a - b).map(([step, loss]) => ({ step, loss }));
}
