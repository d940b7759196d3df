// Talk to two models at once: the base and a tuned one, each with its own side of the conversation.

import { ask, stream } from "./api.js";
import { h, poll, say, setText } from "./dom.js";
import { waitOf } from "./job_parts.js";

// Kept while the tab is open, so that another page and back loses nothing; it is written nowhere.
const talk = { turns: [], left: "", right: "", mode: "chat", fitted: "", temperature: "0", tokens: "200" };

/** The base model of a tuned one's name, "ft:BASE:SUFFIX:ID…", by the known names. */
const baseOf = (name, bases) => bases.find((base) => name.startsWith(`ft:${base}:`)) ?? bases[0] ?? "";

/** A tuned model's name as a list shows it: "tickets 3fa9c1, step 40" for "ft:BASE::tickets:3fa9c1…:ckpt-step-40". */
function shortName(name) {
  if (!name.startsWith("ft:")) return name;
  const [, whole, step] = /^(.*?)(?::ckpt-step-(\d+))?$/.exec(name);
  const [suffix, id] = whole.split(":").slice(-2);
  return `${[suffix, id.slice(0, 6)].filter(Boolean).join(" ")}${step ? `, step ${step}` : ""}`;
}

export function showChat(main, wanted, signal) {
  const left = h("select", { id: "left" });
  const right = h("select", { id: "right" });
  const mode = h("select", { id: "mode" }, h("option", { value: "chat" }, "Chat"), h("option", { value: "text" }, "Plain text"));
  const temperature = h("input", { id: "temperature", type: "number", min: 0, max: 2, step: 0.1, value: talk.temperature });
  const tokens = h("input", { id: "tokens", type: "number", min: 1, step: 1, value: talk.tokens });
  const prompt = h("textarea", { id: "prompt", rows: 3, required: true, "aria-describedby": "prompt-hint" });
  const problem = h("p", { class: "notice bad", role: "alert", hidden: true });
  const away = h("p", { class: "notice bad", role: "alert", id: "away", hidden: true });
  const turns = h("div", { class: "turns" });
  const send = h("button", { class: "primary" }, "Ask both");
  const stop = h("button", { type: "button", class: "plain", disabled: true }, "Stop");
  const clear = h("button", { type: "button", class: "plain" }, "Start anew");
  const empty = h("p", { class: "hint empty-chat" }, "Ask something: both models answer at once, side by side.");
  let asking = null;
  mode.value = talk.mode;

  const pair = (label, input) => h("div", { class: "field" }, h("label", { for: input.id }, label), input);
  main.append(
    h("h1", {}, "Chat"),
    h("p", { class: "lead" }, "What tuning has changed: the same question to two models."),
    h("div", { class: "settings" }, pair("Left model", left), pair("Right model", right), pair("Ask as", mode), pair("Temperature", temperature), pair("Most tokens", tokens)),
    away, problem, empty, turns,
    h("form", { class: "ask", onsubmit: submit },
      h("label", { for: "prompt", class: "unseen" }, "Your message"), prompt,
      h("div", { class: "actions" }, send, stop, clear,
        h("span", { class: "hint", id: "prompt-hint" }, "Enter sends, Shift and Enter begin a new line."))));
  signal.addEventListener("abort", () => asking?.abort());

  for (const input of [left, right, mode, temperature, tokens]) {
    input.addEventListener("change", () => Object.assign(talk, { left: left.value, right: right.value, mode: mode.value, temperature: temperature.value, tokens: tokens.value }));
  }
  for (const input of [left, right]) input.addEventListener("change", () => fitMode().catch(() => {}));
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    event.target.form.requestSubmit();
  });
  stop.addEventListener("click", () => asking?.abort());
  clear.addEventListener("click", () => {
    asking?.abort();
    talk.turns = [];
    turns.replaceChildren();
    empty.hidden = false;
    prompt.focus();
  });
  for (const turn of talk.turns) showTurn(turn);

  function showTurn(turn) {
    empty.hidden = true;
    const boxes = turn.answers.map((answer) => {
      const text = h("p", { class: "said" }, answer.text);
      const note = h("p", { class: "note" }, answer.note);
      return { element: h("article", { class: "answer" }, h("h3", { class: "long" }, answer.model), text, note), text, note };
    });
    turns.append(h("section", { class: "turn" }, h("p", { class: "asked" }, turn.asked), h("div", { class: "sides" }, boxes.map((box) => box.element))));
    return boxes;
  }

  /** What is sent for one side: its own conversation so far, or the text alone. */
  function bodyOf(side, model, asked) {
    const body = { model, temperature: Number(temperature.value), max_tokens: Number(tokens.value) };
    if (mode.value === "text") return ["/v1/completions", { ...body, prompt: asked }];
    const before = talk.turns.filter((turn) => turn.mode === "chat").flatMap((turn) => [
      { role: "user", content: turn.asked },
      { role: "assistant", content: turn.answers[side].text },
    ]);
    return ["/v1/chat/completions", { ...body, messages: [...before, { role: "user", content: asked }] }];
  }

  async function answer(side, turn, box, path, body, aborting) {
    const mine = turn.answers[side];
    let finish = null; // only the last one counts: a chunk of plain text says "length" until then
    try {
      for await (const piece of stream(path, body, aborting)) {
        const choice = piece.choices?.[0];
        mine.text += choice?.delta?.content ?? choice?.text ?? "";
        setText(box.text, mine.text);
        finish = choice?.finish_reason ?? finish;
      }
      if (finish === "length") mine.note = "cut at the most tokens";
    } catch (error) {
      mine.note = aborting.aborted ? "stopped" : error.message;
      box.element.classList.toggle("bad", !aborting.aborted);
    }
    if (!mine.text && !mine.note) mine.note = "an empty answer";
    setText(box.note, mine.note);
    box.element.removeAttribute("aria-busy");
  }

  async function submit(event) {
    event.preventDefault();
    await filled; // a question may come before the names of the models
    const asked = mode.value === "text" ? prompt.value : prompt.value.trim();
    if (asked.trim() === "" || asking !== null) return;
    problem.hidden = true;
    const models = [left.value, right.value];
    if (models.includes("")) {
      setText(problem, "No model is known: is the cloud reachable, and is it in daemon.toml?");
      problem.hidden = false;
      return;
    }
    asking = new AbortController();
    const calls = models.map((model, side) => bodyOf(side, model, asked));
    const turn = { asked, mode: mode.value, answers: models.map((model) => ({ model, text: "", note: "" })) };
    const boxes = showTurn(turn);
    for (const box of boxes) box.element.setAttribute("aria-busy", "true");
    prompt.value = "";
    [send.disabled, stop.disabled] = [true, false];
    turns.lastElementChild.scrollIntoView({ block: "nearest" });
    await Promise.all(calls.map(([path, body], side) => answer(side, turn, boxes[side], path, body, asking.signal)));
    if (!signal.aborted) say(turn.answers.map((one) => `${one.model}: ${one.text || one.note}`).join(". "));
    talk.turns.push(turn);
    asking = null;
    [send.disabled, stop.disabled] = [false, true];
  }

  /** Which clouds do not answer, as the daemon has found, or a job that waits. */
  async function watchClouds() {
    const { answers, waiting } = await ask("/isthmus/v1/status", { signal });
    const clouds = (answers.clouds ?? []).filter((cloud) => cloud.reachable === false && cloud.since);
    const others = waiting.filter((wait) => !clouds.some((cloud) => cloud.name === wait.cloud));
    const lines = new Set([...clouds, ...others].map((one) => `${waitOf(one)} (${one.error ?? one.reason}).`));
    setText(away, [...lines].join(" "));
    away.hidden = lines.size === 0;
  }
  poll(() => watchClouds().catch(() => {}), 2, signal);

  /** Ask in the form that the tuned models were tuned on, where the daemon knows it: once, until other models are chosen. */
  async function fitMode() {
    const models = `${left.value} ${right.value}`;
    if (models === talk.fitted) return;
    const tuned = [left.value, right.value].filter((name) => name.startsWith("ft:"));
    const found = await Promise.all(tuned.map((name) => ask(`/v1/models/${encodeURIComponent(name)}`, { signal })));
    const forms = found.map((model) => model.isthmus?.form).filter(Boolean);
    if (forms.length) mode.value = forms.includes("prompt") ? "text" : "chat";
    Object.assign(talk, { mode: mode.value, fitted: models });
  }

  async function fillIn() {
    const names = (await ask("/v1/models", { signal })).data.map((model) => model.id);
    const bases = names.filter((name) => !name.startsWith("ft:"));
    const tuned = names.filter((name) => name.startsWith("ft:"));
    const target = wanted || talk.right || tuned[0] || bases[0] || "";
    if (target && !names.includes(target)) tuned.unshift(target);
    const options = () => [["Base models", bases], ["Tuned", tuned]].filter(([, group]) => group.length).map(([label, group]) => h("optgroup", { label }, group.map((name) => h("option", { value: name }, shortName(name)))));
    left.replaceChildren(...options());
    right.replaceChildren(...options());
    left.value = bases.includes(talk.left) && !wanted ? talk.left : baseOf(target, bases);
    right.value = target;
    await fitMode().catch(() => {}); // one that is gone is told when it is asked
    if (names.length === 0) {
      setText(problem, "No model is known: is the cloud reachable, and is it in daemon.toml?");
      problem.hidden = false;
    }
  }
  const filled = fillIn().catch((error) => {
    if (signal.aborted) return;
    setText(problem, error.message);
    problem.hidden = false;
  });
}
