// The form that uploads a file and starts a job. Hints come from the browser; what is right, the daemon decides.

import { ask, list, upload } from "./api.js";
import { h, say, setText } from "./dom.js";
import { CLOUD_READS, bytes, many } from "./formats.js";
import { nameOf } from "./job_parts.js";

const LOOK_BYTES = 1 << 20;
const FIRST_BYTES = 1 << 16;
const NUMBERS = ["learning_rate", "batch", "rank", "max_length", "seed"];
const TEMPLATES = ["prompt_template", "completion_template"];
const MODES = {
  split: `Adapters on this machine's first and last layers. ${CLOUD_READS}`,
  top: "Adapters on this machine's last layers alone: no gradient is sent, and less is learned. A cloud that attacks still reads the texts, completions too, from the activations.",
  emulator: "Tuned on this machine, over an emulator of the cloud's layers, which is fetched once: no text, activation or gradient is sent. It learns less: how much of split training's gain stays depends on the emulator.",
};
const PUBLIC = {
  split: "For a leak budget: texts in the form of the data, some of which are sent to measure with.",
  emulator: "Optional: JSON lines with a text each, like yours, which the cloud may read. 20,000 tokens of them are sent, to bring the emulator nearer to the model; one that shares 13 tokens in a row with your data ends the job.",
};
const LEADS = {
  split: "This machine runs the first and the last layers and trains the adapter; the cloud runs the layers between.",
  emulator: "This machine runs the first and the last layers, and an emulator of those between; it trains the adapter, and none of your data are sent.",
};

/** The modules of the last layers, by the names that families have for them. */
const topModules = ({ n_layers: all, last }) => Array.from({ length: last }, (_, place) => all - last + place).flatMap((layer) =>
  [...["q_proj", "v_proj", "qkv_proj"].map((name) => `layers.${layer}.self_attn.${name}`), `h.${layer}.attn.c_attn`]);
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

/** What an example is made of. What is learned is the last part. */
function partsOf({ prompt, completion, messages }) {
  const parts = messages.length ? messages : [...(prompt ? [["prompt", prompt]] : []), [prompt ? "completion" : "text", completion]];
  return parts.flatMap(([name, text], place) => [h("dt", {}, place === parts.length - 1 ? `${name}, learned` : name), h("dd", {}, text)]);
}

const numberInput = (name, attributes) => h("input", { type: "number", name, inputmode: "decimal", ...attributes });

export function showNew(main, before, signal) {
  const first = h("div", { class: "stack", "aria-live": "polite" });
  const mode = h("select", { name: "mode" }, h("option", { value: "split" }, "Split"), h("option", { value: "top" }, "Top only"), h("option", { value: "emulator" }, "Emulator (no data are sent)"));
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
    mode: field("Mode", mode, MODES.split),
    leak_budget: field("Leak budget", h("input", { name: "leak_budget", autocomplete: "off", spellcheck: "false", placeholder: "tokens<=0.5, labels<=0.5" }), "Optional. Before it sends anything private, the job attacks a sample of the texts as a cloud would, and stops where the shares that are read break the budget."),
    package: field("Package", h("input", { name: "package", maxlength: 32, autocomplete: "off", spellcheck: "false", placeholder: "the only one" }), "Its name, where the cloud offers several."),
    public: field("Public texts", h("input", { type: "file", name: "public", accept: ".jsonl,.ndjson,.csv,.tsv" }), PUBLIC.split),
    seed: field("Seed", numberInput("seed", { min: 0, step: 1, placeholder: "0" })),
    prompt_template: field("Prompt", h("input", { name: "prompt_template", spellcheck: "false", placeholder: "Meaning: {mr}\\nText:" }), "Made of columns, in braces. It is read and not trained on."),
    completion_template: field("Completion", h("input", { name: "completion_template", spellcheck: "false", placeholder: " {ref}" }), "Made of columns. It is what the model learns to answer."),
  };
  let turns = 0;
  let spec0 = {}; // of the job that is done again: what the form has no field for goes on as it was
  let wasLocal = false; // that job's mode
  let plans = new Map();
  const uploaded = new WeakMap(); // a job that is refused and sent again needs its files only once
  fields.length.element.classList.add("with-unit");
  const problem = h("p", { class: "notice bad", role: "alert", hidden: true });
  const sending = h("progress", { max: 1, value: 0, hidden: true, "aria-label": "Upload" });
  const go = h("button", { class: "primary" }, "Start the job");
  const templates = h("details", { class: "more" }, h("summary", {}, "What an example is made of"),
    h("p", { class: "hint" }, "Needed for tables, and for JSON lines with keys of their own."),
    h("div", { class: "columns" }, fields.prompt_template.element, fields.completion_template.element));
  const budget = h("details", { class: "more" }, h("summary", {}, "Leak budget"), h("div", { class: "columns" }, fields.leak_budget.element, fields.public.element));
  const offered = h("details", { class: "more", hidden: true }, h("summary", {}, "Package and public texts"), h("div", { class: "columns" }, fields.package.element));
  const lead = h("p", { class: "lead" }, LEADS.split);
  const form = h("form", { class: "stack new-job", novalidate: true, onsubmit: submit },
    h("fieldset", {}, h("legend", {}, "Data"), fields.kept.element, fields.upload.element, templates, first, fields.validation.element),
    h("fieldset", {}, h("legend", {}, "Model"), h("div", { class: "columns" }, fields.model.element, fields.suffix.element)),
    h("fieldset", {}, h("legend", {}, "What a cloud can read"), fields.mode.element,
      budget, offered),
    h("fieldset", {}, h("legend", {}, "Training"), fields.length.element,
      h("details", { class: "more" }, h("summary", {}, "More settings"),
        h("div", { class: "columns" }, NUMBERS.map((name) => fields[name].element)))),
    problem, sending, h("div", { class: "actions" }, go, h("a", { class: "button plain", href: "#jobs" }, "Back")));
  const again = h("p", { class: "hint" });
  main.append(
    h("p", { class: "back" }, h("a", { href: "#jobs" }, "‹ All jobs")),
    h("h1", {}, "New job"),
    lead, again, form);

  kept.addEventListener("change", () => {
    fields.upload.element.hidden = kept.value !== "";
  });
  mode.addEventListener("change", showMode);
  for (const name of TEMPLATES) fields[name].input.addEventListener("change", showFirst);
  for (const input of [kept, chosen]) input.addEventListener("change", showFirst);

  /** What the mode means, and the fields that it has. In the emulator mode, what is left out is as the package advises. */
  function showMode() {
    const isLocal = mode.value === "emulator";
    setText(fields.mode.note, MODES[mode.value]);
    setText(lead, LEADS[mode.value] ?? LEADS.split);
    [budget.hidden, offered.hidden] = [isLocal, !isLocal];
    (isLocal ? offered : budget).querySelector(".columns").append(fields.public.element);
    fields.public.hint = isLocal ? PUBLIC.emulator : PUBLIC.split;
    if (!fields.public.input.files[0]) setText(fields.public.note, fields.public.hint);
    amount.required = !isLocal;
    amount.value = isLocal ? "" : amount.value || 3;
    amount.placeholder = isLocal ? "advised" : "";
    setText(fields.length.note, isLocal ? "Optional: the package may advise a length, a learning rate and a rank." : fields.length.hint);
    for (const [name, usual] of [["learning_rate", "0.001"], ["rank", "8"]]) fields[name].input.placeholder = isLocal ? "advised" : usual;
  }

  const templatesOf = () => Object.fromEntries(TEMPLATES.filter((name) => fields[name].input.value !== "").map((name) => [name, fields[name].input.value.replaceAll("\\n", "\n")]));

  /** Show the first examples as the job reads them. The daemon reads them, and keeps nothing. */
  async function showFirst() {
    const turn = (turns += 1);
    const file = chosen.files[0];
    first.replaceChildren();
    if (!kept.value && !file) return;
    let shown;
    try {
      const body = { file: kept.value || null, ...templatesOf() };
      if (!kept.value) {
        const text = await file.slice(0, FIRST_BYTES).text();
        Object.assign(body, { name: file.name, text: file.size > FIRST_BYTES ? text.slice(0, text.lastIndexOf("\n") + 1) : text });
      }
      const { examples, problem: why } = await ask("/isthmus/v1/look", { method: "POST", body, signal });
      if (why) throw new Error(why);
      shown = [h("h3", {}, "The first examples, as the job reads them"), h("ol", { class: "first" }, examples.map((example) => h("li", {}, h("dl", {}, partsOf(example)))))];
    } catch (error) {
      shown = [h("p", { class: "hint" }, `The job cannot read it as it is: ${error.message}`)];
    }
    if (turn === turns) first.replaceChildren(...shown);
  }
  for (const [input, of] of [[chosen, fields.upload], [heldOut, fields.validation], [fields.public.input, fields.public]]) {
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
    const alias = { steps: "length", epochs: "length", n_epochs: "length", target_modules: "mode", file: "upload", training_file: kept.value ? "kept" : "upload", validation_file: "validation", validation: "validation", data: "upload" }[name] ?? name;
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
      const isLocal = mode.value === "emulator";
      const spec = { ...spec0, ...(amount.value === "" ? {} : { [length.value]: Number(amount.value) }), ...templatesOf() };
      if (isLocal !== wasLocal) delete spec.public; // of a job that is done again: texts that are sent
      if (isLocal && fields.package.input.value.trim() !== "") spec.package = fields.package.input.value.trim();
      for (const name of NUMBERS) {
        const value = fields[name].input.value;
        if (value !== "") spec[name] = Number(value);
      }
      if (mode.value === "top") spec.target_modules = topModules(plans.get(model.value) ?? { n_layers: 0, last: 0 });
      if (!isLocal && fields.leak_budget.input.value.trim() !== "") spec.leak_budget = fields.leak_budget.input.value.trim();
      spec.data = await fileId(chosen, kept.value);
      for (const name of ["validation", "public"]) if (fields[name].input.files[0]) spec[name] = await fileId(fields[name].input, "");
      const body = { kind: isLocal ? "tune" : "train", model: model.value, suffix: fields.suffix.input.value.trim(), spec };
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

  /** Fill the form with what another job has. */
  function fillAgain(job) {
    const { spec } = job;
    spec0 = { ...spec };
    const take = (name) => {
      const value = spec0[name];
      delete spec0[name];
      return value ?? "";
    };
    for (const name of [...NUMBERS, "leak_budget", "package"]) fields[name].input.value = take(name);
    for (const name of TEMPLATES) fields[name].input.value = take(name).replaceAll("\n", "\\n");
    for (const unit of ["steps", "epochs"]) {
      if (spec0[unit] !== undefined) [length.value, amount.value] = [unit, take(unit)];
    }
    wasLocal = job.kind === "tune";
    if (wasLocal) mode.value = "emulator";
    const modules = JSON.stringify(spec0.target_modules);
    if (plans.has(job.model) && modules === JSON.stringify(topModules(plans.get(job.model)))) [mode.value] = ["top", take("target_modules")];
    model.value = job.model;
    fields.suffix.input.value = job.suffix;
    kept.value = take("data");
    const said = amount.value;
    for (const one of [kept, mode]) one.dispatchEvent(new Event("change"));
    if (spec.steps ?? spec.epochs) amount.value = said;
    for (const details of form.querySelectorAll("details")) details.open = [...details.querySelectorAll("input")].some((input) => input.value !== "");
    const rest = Object.keys(spec0);
    setText(again, `As ${nameOf(job)} was${rest.length ? `, with ${rest.join(", ")} as there` : ""}. Change what you want to.`);
  }

  async function fillIn() {
    const [models, files, traffic] = await Promise.all([ask("/v1/models", { signal }), list("/v1/files", "data", { signal }), ask("/isthmus/v1/traffic", { signal })]);
    plans = new Map(traffic.clouds.filter((cloud) => cloud.plan).map((cloud) => [cloud.model, cloud.plan]));
    model.replaceChildren(...models.data.filter((one) => !one.id.startsWith("ft:")).map((one) => h("option", { value: one.id }, one.id)));
    if (!model.value) mark(fields.model, "No model is known: is the cloud reachable, and is it in daemon.toml?");
    const usable = files.filter((file) => ["fine-tune", "user_data"].includes(file.purpose) && /\.(jsonl|ndjson|csv|tsv)$/i.test(file.filename));
    kept.append(...usable.map((file) => h("option", { value: file.id }, `${file.filename} (${bytes(file.bytes)})`)));
    fields.kept.element.hidden = usable.length === 0;
    if (before) fillAgain(await ask(`/isthmus/v1/jobs/${encodeURIComponent(before)}`, { signal }));
  }
  fields.kept.element.hidden = true;
  fillIn().catch((error) => !signal.aborted && complain({ param: null, message: error.message }));
}
