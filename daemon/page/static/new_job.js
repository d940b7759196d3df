// The form that uploads a file and starts a job. Hints come from the browser; what is right, the daemon decides.

import { ask, list, upload } from "./api.js";
import { h, say, setText } from "./dom.js";
import { bytes, many } from "./formats.js";

const LOOK_BYTES = 1 << 20;
const KNOWN_FORMS = ["completion,prompt", "messages", "text"];

/** Whether a file has one of the forms that the daemon checks when it takes a file for fine-tuning. */
const isKnownForm = (file, columns) => /\.(jsonl|ndjson)$/i.test(file.name) && KNOWN_FORMS.includes([...columns].sort().join());

/** What the first MiB of a file looks like: `{ text, bad, columns }`. It is read here and goes nowhere. */
export async function look(file) {
  if (file.size === 0) return { text: `${file.name} is empty: choose a file with examples.`, bad: true, columns: [] };
  const ending = /\.(jsonl|ndjson|csv|tsv)$/i.exec(file.name)?.[1].toLowerCase();
  if (ending === undefined) return { text: `${file.name} ends neither in .jsonl nor in .csv or .tsv.`, bad: true, columns: [] };
  const whole = file.size <= LOOK_BYTES;
  const lines = (await file.slice(0, LOOK_BYTES).text()).split(/\r?\n/);
  if (!whole) lines.pop();
  const full = lines.map((line, place) => [line, place + 1]).filter(([line]) => line.trim() !== "");
  const size = `${bytes(file.size)}, ${whole ? "" : "more than "}`;
  if (ending === "csv" || ending === "tsv") {
    const columns = full[0][0].split(ending === "csv" ? "," : "\t").map((name) => name.trim().replace(/^"|"$/g, ""));
    return { text: `${size}${many(full.length - 1, "row")}; columns: ${columns.join(", ")}`, bad: false, columns };
  }
  let columns = [];
  for (const [line, number] of full) {
    let row;
    try {
      row = JSON.parse(line);
    } catch {
      return { text: `Line ${number} is not JSON: one object a line is expected.`, bad: true, columns: [] };
    }
    if (row === null || typeof row !== "object" || Array.isArray(row)) return { text: `Line ${number} is not a JSON object.`, bad: true, columns: [] };
    if (columns.length === 0) columns = Object.keys(row);
  }
  return { text: `${size}${many(full.length, "example")}; keys: ${columns.join(", ")}`, bad: false, columns };
}

let numbers = 0;

/** A field with its label, hint and error. `input` keeps its own attributes; `name` is what errors call it. */
function field(label, input, hint = null, extra = []) {
  const id = `field-${(numbers += 1)}`;
  const error = h("p", { class: "error", id: `${id}-error` });
  const note = h("p", { class: "hint", id: `${id}-hint` }, hint ?? "");
  input.id = id;
  input.setAttribute("aria-describedby", `${id}-hint ${id}-error`);
  const element = h("div", { class: "field" }, h("label", { for: id }, label), input, ...extra, note, error);
  return { element, input, note, error, hint };
}

const numberInput = (name, attributes) => h("input", { type: "number", name, inputmode: "decimal", ...attributes });

export function showNew(main, _argument, signal) {
  const model = h("select", { name: "model", required: true });
  const kept = h("select", { name: "training_file" }, h("option", { value: "" }, "Upload a file …"));
  const chosen = h("input", { type: "file", name: "upload", accept: ".jsonl,.ndjson,.csv,.tsv" });
  const heldOut = h("input", { type: "file", name: "validation_file", accept: ".jsonl,.ndjson,.csv,.tsv" });
  const length = h("select", { name: "unit", "aria-label": "Unit of the length" }, h("option", { value: "epochs" }, "epochs"), h("option", { value: "steps" }, "steps"));
  const amount = numberInput("length", { min: 1, step: 1, value: 3, required: true });
  const fields = {
    kept: field("Training data", kept, null),
    upload: field("File", chosen, "JSON lines, CSV or TSV. It is copied to the daemon's folder on this machine, and not to the cloud."),
    validation: field("Validation file", heldOut, "Optional. Without one, a tenth of the examples is held out."),
    model: field("Base model", model, "One that a cloud serves."),
    suffix: field("Name", h("input", { name: "suffix", maxlength: 64, autocomplete: "off", spellcheck: "false", placeholder: "tickets" }), "Optional, at most 64 characters; a part of the tuned model's name."),
    length: field("Length", amount, "An epoch is one pass over the examples.", [length]),
    learning_rate: field("Learning rate", numberInput("learning_rate", { min: 0, step: "any", placeholder: "0.001" }), "The optimizer's peak."),
    batch: field("Examples a micro-batch", numberInput("batch", { min: 1, step: 1, placeholder: "4" })),
    rank: field("Rank of the adapter", numberInput("rank", { min: 1, step: 1, placeholder: "8" })),
    max_length: field("Tokens of an example at most", numberInput("max_length", { min: 2, step: 1, placeholder: "512" }), "Longer ones are cut at their end."),
    seed: field("Seed", numberInput("seed", { min: 0, step: 1, placeholder: "0" })),
    prompt_template: field("Prompt", h("input", { name: "prompt_template", spellcheck: "false", placeholder: "Meaning: {mr}\\nText:" }), "Made of columns, in braces. It is read and not trained on."),
    completion_template: field("Completion", h("input", { name: "completion_template", spellcheck: "false", placeholder: " {ref}" }), "Made of columns. It is what the model learns to answer."),
  };
  const uploaded = new WeakMap(); // a job that is refused and sent again needs its files only once
  fields.length.element.classList.add("with-unit");
  const problem = h("p", { class: "notice bad", role: "alert", hidden: true });
  const sending = h("progress", { max: 1, value: 0, hidden: true, "aria-label": "Upload" });
  const go = h("button", { class: "primary" }, "Start the job");
  const templates = h("details", { class: "more" }, h("summary", {}, "What an example is made of"),
    h("p", { class: "hint" }, "Needed for tables, and for JSON lines with keys of their own."),
    h("div", { class: "columns" }, fields.prompt_template.element, fields.completion_template.element));
  const form = h("form", { class: "stack new-job", novalidate: true, onsubmit: submit },
    h("fieldset", {}, h("legend", {}, "Data"), fields.kept.element, fields.upload.element, templates, fields.validation.element),
    h("fieldset", {}, h("legend", {}, "Model"), h("div", { class: "columns" }, fields.model.element, fields.suffix.element)),
    h("fieldset", {}, h("legend", {}, "Training"), fields.length.element,
      h("details", { class: "more" }, h("summary", {}, "More settings"),
        h("div", { class: "columns" }, ["learning_rate", "batch", "rank", "max_length", "seed"].map((name) => fields[name].element)))),
    problem, sending, h("div", { class: "actions" }, go, h("a", { class: "button plain", href: "#jobs" }, "Back")));
  main.append(
    h("p", { class: "back" }, h("a", { href: "#jobs" }, "‹ All jobs")),
    h("h1", {}, "New job"),
    h("p", { class: "lead" }, "Split training: this machine runs the first and the last layers and trains the adapter; the cloud runs the layers between."),
    form);

  kept.addEventListener("change", () => {
    fields.upload.element.hidden = kept.value !== "";
  });
  for (const [input, of] of [[chosen, fields.upload], [heldOut, fields.validation]]) {
    input.addEventListener("change", async () => {
      mark(of, "");
      const file = input.files[0];
      if (!file) return setText(of.note, of.hint);
      const found = await look(file);
      setText(of.note, found.bad ? "" : found.text);
      mark(of, found.bad ? found.text : "");
      if (of === fields.upload && found.columns.length && !isKnownForm(file, found.columns)) templates.open = true;
    });
  }
  for (const one of Object.values(fields)) one.input.addEventListener("input", () => one.input.type !== "file" && mark(one, ""));

  function mark(one, message) {
    setText(one.error, message);
    if (message) one.input.setAttribute("aria-invalid", "true");
    else one.input.removeAttribute("aria-invalid");
  }

  /** Put an error beside the field that it names; where there is none, above the button. */
  function complain(error) {
    // The daemon names the field apart, or its sentence begins with it.
    const name = (error.param ?? /^'?([a-z_]+)\b/.exec(error.message)?.[1] ?? "").split(".").at(-1);
    const alias = { steps: "length", epochs: "length", n_epochs: "length", file: "upload", training_file: kept.value ? "kept" : "upload", validation_file: "validation", validation: "validation", data: "upload" }[name] ?? name;
    const one = fields[alias];
    if (one === undefined) {
      setText(problem, error.message);
      problem.hidden = false;
      return;
    }
    mark(one, error.message);
    const closed = one.element.closest("details");
    if (closed) closed.open = true;
    one.input.focus();
    say(error.message);
  }

  /** What the browser can see is wrong: the first field and why; null where nothing is. */
  function wrong() {
    if (!kept.value && !chosen.files[0]) return ["training_file", "Choose a file of examples."];
    if (fields.upload.error.textContent && !kept.value) return ["training_file", fields.upload.error.textContent];
    if (!model.value) return ["model", "No model is known: is the cloud reachable, and is it in daemon.toml?"];
    for (const [name, one] of Object.entries(fields)) {
      if (one.input.type === "number" && !one.input.checkValidity()) return [name, one.input.validationMessage];
    }
    return null;
  }

  async function fileId(input, id) {
    if (id) return id;
    sending.hidden = false;
    const file = input.files[0];
    if (uploaded.has(file)) return uploaded.get(file);
    const { columns } = await look(file);
    const stored = await upload(file, isKnownForm(file, columns) ? "fine-tune" : "user_data", (share) => {
      sending.value = share;
    });
    sending.hidden = true;
    uploaded.set(file, stored.id);
    return stored.id;
  }

  async function submit(event) {
    event.preventDefault();
    problem.hidden = true;
    for (const one of Object.values(fields)) if (one.input.type !== "file") mark(one, "");
    const found = wrong();
    if (found) return complain({ param: found[0], message: found[1] });
    go.disabled = true;
    setText(go, "Starting …");
    try {
      const spec = { [length.value]: Number(amount.value) };
      for (const name of ["learning_rate", "batch", "rank", "max_length", "seed"]) {
        const value = fields[name].input.value;
        if (value !== "") spec[name] = Number(value);
      }
      for (const name of ["prompt_template", "completion_template"]) {
        const value = fields[name].input.value;
        if (value !== "") spec[name] = value.replaceAll("\\n", "\n");
      }
      spec.data = await fileId(chosen, kept.value);
      if (heldOut.files[0]) spec.validation = await fileId(heldOut, "");
      const body = { kind: "train", model: model.value, suffix: fields.suffix.input.value.trim(), spec };
      const job = await ask("/isthmus/v1/jobs", { method: "POST", body });
      say("The job has been put into the queue.");
      location.hash = `#job/${encodeURIComponent(job.id)}`;
    } catch (error) {
      complain(error);
    } finally {
      sending.hidden = true;
      go.disabled = false;
      setText(go, "Start the job");
    }
  }

  async function fillIn() {
    const [models, files] = await Promise.all([ask("/v1/models", { signal }), list("/v1/files", "data", { signal })]);
    model.replaceChildren(...models.data.filter((one) => !one.id.startsWith("ft:")).map((one) => h("option", { value: one.id }, one.id)));
    if (!model.value) mark(fields.model, "No model is known: is the cloud reachable, and is it in daemon.toml?");
    const usable = files.filter((file) => ["fine-tune", "user_data"].includes(file.purpose) && /\.(jsonl|ndjson|csv|tsv)$/i.test(file.filename));
    kept.append(...usable.map((file) => h("option", { value: file.id }, `${file.filename} (${bytes(file.bytes)})`)));
    fields.kept.element.hidden = usable.length === 0;
  }
  fields.kept.element.hidden = true;
  fillIn().catch((error) => !signal.aborted && complain({ param: null, message: error.message }));
}
