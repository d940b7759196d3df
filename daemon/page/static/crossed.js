// What crossed to the cloud: which parts live where, what crossed to a cloud, and what did not.

import { ask } from "./api.js";
import { h, poll, s, setText } from "./dom.js";
import { drawing } from "./drawing.js";
import { CLOUD_READS, bytes, count, many } from "./formats.js";

const INFERS = "It knows the frozen weights, and needs nothing else: neither a deeper cut nor a coarser codec keeps texts or labels from it. A chat sends no gradients. Inside the cloud's layers it can work out what an adapter does.";

const TRUST = "What stays here is kept out of the network and out of the cloud's logs, disks and backups. It is not hidden from a cloud that attacks: its owner must be trusted not to, by contract or under supervision.";

const STAYS = ["Text and tokens", "Labels", "Optimizer state"];

const ADAPTERS = {
  here: "none was in the cloud's layers",
  seen: "what they do inside the cloud's layers can be worked out there",
  leased: "leased: the cloud has had weights of some",
};

const LOCK = "M4 7V5a4 4 0 0 1 8 0v2h1v7H3V7zm2 0h4V5a2 2 0 0 0-4 0z";
const OPEN = "M4 7V5a4 4 0 0 1 7.500-2l-1.700 1A2 2 0 0 0 6 5v2h7v7H3V7z";

function counters(title, set) {
  const values = ["Sent to the cloud", "Came back", "Calls", "Repeated after a fault"].map((name) => {
    const value = h("dd", {}, "–");
    return { element: h("div", { class: "stat" }, h("dt", {}, name), value), value };
  });
  set.push((sum) => {
    const texts = [bytes(sum.bytes_up), bytes(sum.bytes_down), count(sum.calls), count(sum.retries)];
    texts.forEach((text, place) => setText(values[place].value, text));
  });
  return [h("h3", {}, title), h("dl", { class: "stats" }, values.map((value) => value.element))];
}

function stayRows(list) {
  return (adapters) => {
    const rows = [...STAYS.map((title) => [title, "no message carries it", false]), ["Adapters", ADAPTERS[adapters], adapters !== "here"]];
    list.replaceChildren(...rows.map(([title, told, open]) =>
      h("li", { class: open ? "open" : null },
        s("svg", { viewBox: "0 0 16 16", width: 16, height: 16, "aria-hidden": "true" }, s("path", { d: open ? OPEN : LOCK })),
        h("span", {}, title), h("strong", {}, told))));
  };
}

export function showCrossed(main, _argument, signal) {
  const chosen = h("select", { id: "cloud" });
  const choice = h("div", { class: "field", hidden: true }, h("label", { for: "cloud" }, "Cloud"), chosen);
  const none = h("p", { class: "notice", hidden: true }, "No cloud is known yet: name one in daemon.toml, under [clouds.NAME]. Until then nothing leaves this machine.");
  const place = h("figure", { class: "drawing" });
  const away = h("p", { class: "notice", hidden: true });
  const setters = [];
  const stays = h("ul", { class: "stays" });
  const showStays = stayRows(stays);
  const problem = h("p", { class: "notice bad", role: "alert", hidden: true });
  const server = h("p", { class: "hint" });
  const counted = h("div", { class: "counted" }, counters("Today (UTC)", setters), counters("Since this daemon was set up", setters),
    h("p", { class: "hint" }, "All clouds together, of everybody who uses this daemon. The counters move when an answer or a step ends; a process that is killed takes along what it had not counted. What came back has the weights of this machine's own layers in it, which are fetched once."));
  const untold = h("p", { class: "hint", hidden: true }, "The counters are shown to the daemon's first owner alone: they would tell you when others work.");
  const picture = drawing(place, signal);

  main.append(
    h("h1", {}, "What crossed to the cloud"),
    h("p", { class: "lead" }, "The cloud computes the middle layers, so activations and their gradients cross to it, sealed on the way."),
    problem, none, choice, place, away,
    h("div", { class: "halves" },
      h("section", { class: "card" }, h("h2", {}, "What crossed"), counted, untold),
      h("div", { class: "stack" },
        h("section", { class: "card" }, h("h2", {}, "What did not"), stays,
          h("p", { class: "hint" }, "The protocol has no message for text, labels or optimizer state. Weights of adapters cross only where a job, or training_layers in daemon.toml, leases those inside the cloud's layers; what is said here of yours is kept, and never taken back.")),
        h("section", { class: "card honest" }, h("h2", {}, "What a cloud can infer"), h("p", {}, h("strong", {}, CLOUD_READS)), h("p", {}, INFERS), h("p", {}, TRUST)))),
    server);

  poll(async () => {
    let status, traffic;
    try {
      [status, traffic] = await Promise.all([ask("/isthmus/v1/status", { signal }), ask("/isthmus/v1/traffic", { signal })]);
    } catch (error) {
      if (signal.aborted) return;
      setText(problem, error.message);
      problem.hidden = false;
      return;
    }
    problem.hidden = true;
    const { clouds, adapters } = traffic;
    const names = clouds.map((cloud) => cloud.name);
    if (chosen.options.length !== names.length) chosen.replaceChildren(...names.map((name) => h("option", {}, name)));
    choice.hidden = names.length < 2;
    none.hidden = names.length > 0;
    place.hidden = names.length === 0;
    const cloud = clouds.find((one) => one.name === chosen.value) ?? clouds[0];
    if (cloud) picture.draw({ cloud, adapters });
    away.hidden = !cloud?.error;
    setText(away, cloud?.error ? `The cloud “${cloud.name}” cannot be reached: ${cloud.error}` : "");
    counted.hidden = traffic.total === null;
    untold.hidden = !counted.hidden;
    if (traffic.total !== null) [traffic.today, traffic.total].forEach((sum, place) => setters[place](sum));
    showStays(adapters);
    const { jobs, disk } = status;
    setText(server, `isthmus ${status.version} · ${many(jobs.running ?? 0, "job")} running, ${count(jobs.queued ?? 0)} waiting · ${bytes(disk.used_bytes)} of ${bytes(disk.most_bytes)} on disk`);
  }, 1, signal);
}
