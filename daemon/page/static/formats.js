// Figures and facts as a person reads them.

/** What split training gives up, in the words of the README (`isthmus.privacy.ledger.mode_leaks`). */
export const CLOUD_READS = "A cloud that attacks reads 98 to 100 % of the tokens of your texts from the activations, and 94 to 100 % of your labels from the gradients.";

const whole = new Intl.NumberFormat("en");

/** A whole number: 12,345. */
export const count = (value) => whole.format(value);

/** Bytes, in powers of 1024: 12.3 MiB. */
export function bytes(value) {
  if (value < 1024) return `${value} B`;
  const units = ["KiB", "MiB", "GiB", "TiB", "PiB"];
  let place = -1;
  while (value >= 1023.5 && place < units.length - 1) {
    value /= 1024;
    place += 1;
  }
  return `${value < 10 ? value.toFixed(2) : value < 100 ? value.toFixed(1) : value.toFixed(0)} ${units[place]}`;
}

/** Seconds: 42 s, 3 min 10 s, 2 h 5 min, 3 d 4 h. */
export function duration(value) {
  const seconds = Math.max(0, Math.round(value));
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
  return `${Math.floor(seconds / 86400)} d ${Math.floor((seconds % 86400) / 3600)} h`;
}

/** A loss or another small number: four figures. */
export function figure(value) {
  if (!Number.isFinite(value)) return "not a number";
  if (value !== 0 && Math.abs(value) < 0.001) return value.toExponential(1);
  return value.toFixed(Math.abs(value) < 10 ? 3 : Math.abs(value) < 100 ? 2 : 1);
}

/** A moment, in seconds since 1970: the time today, else with its day. */
export function moment(value, now = new Date()) {
  const date = new Date(value * 1000);
  const time = date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
  if (date.toDateString() === now.toDateString()) return time;
  return `${date.toLocaleDateString([], { day: "numeric", month: "short" })}, ${time}`;
}

/** "1 step", "2 steps". */
export const many = (value, one, more = `${one}s`) => `${count(value)} ${value === 1 ? one : more}`;
