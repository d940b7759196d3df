// Sign in, and show the page that the address names: #jobs, #new, #job/ID, #chat, #chat/MODEL, #crossed.

import { ask, connection, token } from "./api.js";
import { showChat } from "./chat.js";
import { showCrossed } from "./crossed.js";
import { confirm, h, poll, say, setText } from "./dom.js";
import { CLOUD_READS, bytes } from "./formats.js";
import { showJob } from "./job.js";
import { showJobs } from "./jobs.js";
import { showNew } from "./new_job.js";

const PAGES = {
  jobs: { title: "Jobs", tab: "jobs", show: showJobs },
  new: { title: "New job", tab: "jobs", show: showNew },
  job: { title: "Job", tab: "jobs", show: showJob },
  chat: { title: "Chat", tab: "chat", show: showChat },
  crossed: { title: "What crossed to the cloud", tab: "crossed", show: showCrossed },
};

const UNKNOWN = "The daemon does not know this token.";
const top = document.getElementById("top");
const main = document.getElementById("main");
const banner = document.getElementById("banner");
const owner = document.getElementById("owner");
let leaving = new AbortController();
let meter = null;

/** Show the page of the address. A token or a code in it is taken out, and stays in no history. A token signs in once that is
 * confirmed, since any page elsewhere can send the browser to such an address, and texts would then be another one's.
 * Only this machine's user has a code, which the daemon gives a token for, once. */
async function arrive(moved) {
  const found = /^#(token|code)=(.*)$/.exec(location.hash);
  if (found !== null) history.replaceState(null, "", `${location.pathname}#jobs`);
  route(moved);
  if (found === null || found[2] === token.get() || document.querySelector("dialog") !== null) return;
  try {
    const isCode = found[1] === "code";
    const next = isCode ? (await ask("/isthmus/v1/sign-in", { method: "POST", body: { code: found[2] } })).token : found[2];
    const nameOf = async (as) => as && (await ask("/isthmus/v1/status", { as })).owner;
    const unlessRevoked = (error) => error.status === 401 ? null : Promise.reject(error); // the tab's own may be
    const [name, now] = await Promise.all([nameOf(next), nameOf(token.get()).catch(unlessRevoked)]);
    const before = now ? ` Now you are signed in as “${now}”.` : "";
    if ((now || !isCode) && now !== name && !(await confirm(`Sign in as “${name}”?`, `This address has the token of “${name}”: what you upload and ask is theirs then. Go on only if you meant to.${before}`, "Sign in", "Do not"))) return;
    signOut();
    token.set(next);
    route(true);
  } catch (error) {
    if (token.get() === null) signIn(error.status === 401 ? UNKNOWN : error.message);
  }
}

function route(moved) {
  leaving.abort();
  leaving = new AbortController();
  if (token.get() === null) return signIn();
  const [name, ...rest] = location.hash.slice(1).split("/");
  const page = PAGES[name] ?? PAGES.jobs;
  top.hidden = false;
  document.title = `${page.title} · Isthmus`;
  for (const link of top.querySelectorAll("[data-page]")) {
    if (link.dataset.page === page.tab) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  main.replaceChildren();
  page.show(main, decodeURIComponent(rest.join("/")), leaving.signal);
  if (moved) {
    scrollTo(0, 0);
    main.focus({ preventScroll: true });
  }
  watchMeter();
}

/** Who is signed in, and the counters, in the header of every page. */
function watchMeter() {
  if (meter !== null) return;
  meter = new AbortController();
  poll(async () => {
    try {
      if (owner.textContent === "") setText(owner, (await ask("/isthmus/v1/status", { signal: meter.signal })).owner);
      const { today } = await ask("/isthmus/v1/traffic", { signal: meter.signal });
      const shown = document.getElementById("meter");
      shown.hidden = today === null;
      if (today !== null) setText(shown, `↑ ${bytes(today.bytes_up)}  ↓ ${bytes(today.bytes_down)}`);
    } catch {
      // The banner says what is wrong.
    }
  }, 4, meter.signal);
}

function signOut() {
  token.drop();
  meter?.abort();
  meter = null;
  setText(owner, "");
  top.hidden = true;
  route(false);
}

function signIn(problem) {
  document.title = "Sign in · Isthmus";
  const error = h("p", { class: "error", id: "token-error" }, problem ?? "");
  const field = h("input", {
    id: "token", name: "token", type: "password", required: true, autocomplete: "off", spellcheck: "false",
    "aria-describedby": "token-hint token-error", "aria-invalid": problem ? "true" : null,
  });
  const submit = async (event) => {
    event.preventDefault();
    token.set(field.value.trim());
    try {
      await ask("/isthmus/v1/status");
      route(true);
    } catch (failed) {
      token.drop();
      signIn(failed.status === 401 ? UNKNOWN : failed.message);
    }
  };
  main.replaceChildren(
    h("section", { class: "sign-in" },
      h("p", { class: "brand" }, top.querySelector(".brand svg").cloneNode(true), "Isthmus"),
      h("h1", {}, "Sign in"),
      h("p", { class: "lead" }, `No text leaves this machine as text, and this page talks to nothing but the daemon that sent it. ${CLOUD_READS}`),
      h("form", { onsubmit: submit, class: "stack" },
        h("div", { class: "field" },
          h("label", { for: "token" }, "Token"),
          field,
          h("p", { class: "hint", id: "token-hint" }, "The daemon prints where it is when it starts: a file named ", h("code", {}, "token"), " in its folder. It is kept in this tab only."),
          error),
        h("div", {}, h("button", { class: "primary" }, "Sign in")))));
  field.focus();
  if (problem) say(problem);
}

connection.addEventListener("away", () => {
  setText(banner, "The daemon does not answer. This page goes on as soon as it does. Start it with: isthmus edge daemon start");
  banner.hidden = false;
});
connection.addEventListener("back", () => {
  banner.hidden = true;
});
connection.addEventListener("refused", () => {
  if (top.hidden) return;
  signOut();
  signIn("The daemon does not accept this token any more.");
});
document.getElementById("sign-out").addEventListener("click", signOut);
document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
addEventListener("hashchange", () => arrive(true));

arrive(false);
