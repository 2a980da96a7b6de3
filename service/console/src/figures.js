// Numbers for people.

const UNITS = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];

export function bytes(count) {
  if (count == null) return '–';
  let power = 0;
  while (count >= 1024 && power < UNITS.length - 1) {
    count /= 1024;
    power += 1;
  }
  return `${power && count < 100 ? count.toFixed(1) : Math.round(count)} ${UNITS[power]}`;
}

export function seconds(value) {
  if (value == null || !Number.isFinite(value)) return '–';
  if (value < 0.001) return `${(value * 1e6).toFixed(0)} µs`;
  if (value < 1) return `${(value * 1000).toFixed(value < 0.1 ? 1 : 0)} ms`;
  if (value < 90) return `${value.toFixed(1)} s`;
  const minutes = Math.round(value / 60);
  return minutes < 90 ? `${minutes} min` : `${(value / 3600).toFixed(1)} h`;
}

export function number(value, digits = 0) {
  if (value == null || !Number.isFinite(value)) return '–';
  return value.toLocaleString('en', { maximumFractionDigits: digits });
}

const dated = (value) => new Date(typeof value === 'number' ? value * 1000 : value);

/** The language of the page, where it is not the browser's. */
function spoken() {
  const page = document.documentElement.lang;
  return navigator.language.startsWith(page) ? undefined : page;
}

export function moment(value) {
  if (!value) return '–';
  const date = dated(value);
  return Number.isNaN(date.getTime()) ? String(value) : date.toLocaleString(spoken());
}

/** For a narrow place: the time where it was today, else the day. */
export function recent(value) {
  const date = dated(value);
  if (!value || Number.isNaN(date.getTime())) return moment(value);
  const today = new Date().toDateString() === date.toDateString();
  return today ? date.toLocaleTimeString(spoken(), { timeStyle: 'short' }) : date.toLocaleDateString(spoken());
}

export function short(digest) {
  return digest ? digest.replace(/^sha256:/, '').slice(0, 12) : '–';
}

/** What trained a job's adapter; `supervised` is OpenAI's word, and LoRA here. */
export function method({ type }) {
  return type === 'supervised' ? 'lora' : type;
}
