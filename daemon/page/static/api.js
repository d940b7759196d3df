// The daemon's answers. The token is kept for this tab alone, and goes nowhere but into a header of its requests.

import { h } from "./dom.js";

const KEY = "isthmus-token";

/** An answer that is an error: what the daemon says, and the field that it names. */
export class ApiError extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.param = error.param ?? null;
    this.code = error.code ?? null;
  }
}

/** Nothing came back: the daemon does not run, or cannot be reached. */
export class AwayError extends Error {
  constructor() {
    super("The daemon does not answer. Start it with: isthmus edge daemon start");
  }
}

export const token = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  drop: () => sessionStorage.removeItem(KEY),
};

/** Events: "refused" when the token is not accepted, "away" and "back" as the daemon does not answer, and does. */
export const connection = new EventTarget();

const tell = (name) => connection.dispatchEvent(new Event(name));

function headers(body, as) {
  const found = { Authorization: `Bearer ${as ?? ""}` };
  if (body !== undefined && !(body instanceof FormData)) found["Content-Type"] = "application/json";
  return found;
}

async function errorOf(response) {
  let error = { message: `The daemon answered ${response.status}.` };
  try {
    error = (await response.json()).error ?? error;
  } catch {
    // Not JSON: the status has to do.
  }
  return new ApiError(response.status, error);
}

/** A response that is not an error, to whoever has the token `as`. Throws ApiError, AwayError; an AbortError where `signal` was aborted. */
async function request(path, { method = "GET", body, signal, as = token.get() } = {}) {
  let response;
  try {
    response = await fetch(path, {
      method,
      headers: headers(body, as),
      body: body === undefined || body instanceof FormData ? body : JSON.stringify(body),
      signal,
      cache: "no-store",
      credentials: "omit",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    tell("away");
    throw new AwayError();
  }
  tell("back");
  if (response.status === 401 && as === token.get()) tell("refused");
  if (!response.ok) throw await errorOf(response);
  return response;
}

/** The JSON that the daemon answers. */
export const ask = async (path, options) => (await request(path, options)).json();

/** The rows of a list, which its pages call `name`, up to `most` of them, and up to the one whose id is `until`. */
export async function list(path, name, { most = 100, until = null, signal } = {}) {
  const rows = [];
  for (;;) {
    const url = new URL(path, location.origin);
    url.searchParams.set("limit", String(Math.min(100, most - rows.length)));
    if (rows.length > 0) url.searchParams.set("after", rows.at(-1).id);
    const page = await ask(url.pathname + url.search, { signal });
    const found = page[name];
    const known = found.findIndex((row) => row.id === until);
    if (known >= 0) return [...rows, ...found.slice(0, known)];
    rows.push(...found);
    if (!page.has_more || found.length === 0 || rows.length >= most) return rows;
  }
}

/** The objects of a streamed answer (server-sent events), as they come. */
export async function* stream(path, body, signal) {
  const response = await request(path, { method: "POST", body: { ...body, stream: true }, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (waiting + value).split(/\r?\n\r?\n/);
    waiting = events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") return;
      if (data === "") continue;
      const found = JSON.parse(data);
      if (found.error) throw new ApiError(response.status, found.error);
      yield found;
    }
  }
}

/** Let the browser keep what a GET answers, under a name. */
export async function download(path, name) {
  const address = URL.createObjectURL(await (await request(path)).blob());
  h("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000); // once it has been read
}

/** Upload a file; `onProgress` is told the share that has been sent. `fetch` does not tell it, so this is the older way. */
export function upload(file, purpose, onProgress) {
  return new Promise((resolve, reject) => {
    const form = new FormData();
    form.append("purpose", purpose);
    form.append("file", file);
    const sending = new XMLHttpRequest();
    sending.open("POST", "/v1/files");
    sending.setRequestHeader("Authorization", `Bearer ${token.get() ?? ""}`);
    sending.upload.addEventListener("progress", (event) => onProgress(event.total ? event.loaded / event.total : 0));
    sending.addEventListener("error", () => reject(new AwayError()));
    sending.addEventListener("load", () => {
      let answer = {};
      try {
        answer = JSON.parse(sending.responseText);
      } catch {
        // Not JSON: the status has to do.
      }
      if (sending.status < 300) resolve(answer);
      else reject(new ApiError(sending.status, answer.error ?? { message: `The daemon answered ${sending.status}.` }));
    });
    sending.send(form);
  });
}
