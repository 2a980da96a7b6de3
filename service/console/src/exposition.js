// Prometheus' text format, as far as the server writes it.

/** Map of a sample's name to its rows, each {labels, value}. */
export function parse(text) {
  const found = new Map();
  for (const line of text.split('\n')) {
    const match = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!match) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? '').matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[name] = value.replace(/\\(.)/g, (_, c) => (c === 'n' ? '\n' : c));
    }
    const rows = found.get(match[1]) ?? [];
    rows.push({ labels, value: Number(match[3]) });
    found.set(match[1], rows);
  }
  return found;
}

/** Sum of the rows of a sample whose labels contain `labels`. */
export function total(samples, name, labels = {}) {
  const wanted = Object.entries(labels);
  return (samples?.get(name) ?? [])
    .filter((row) => wanted.every(([key, value]) => row.labels[key] === value))
    .reduce((sum, row) => sum + row.value, 0);
}

/** The q-quantile of what a histogram gained since `before`, as Prometheus interpolates it; `under`
 * where it lies in the lowest bucket, of which only the upper bound is known. */
export function quantile(samples, before, name, q) {
  const old = new Map((before?.get(`${name}_bucket`) ?? []).map((r) => [r.labels.le, r.value]));
  const rows = (samples.get(`${name}_bucket`) ?? [])
    .map((r) => ({
      le: r.labels.le === '+Inf' ? Infinity : Number(r.labels.le),
      count: r.value - (old.get(r.labels.le) ?? 0),
    }))
    .sort((a, b) => a.le - b.le);
  const all = rows.at(-1)?.count ?? 0;
  if (all <= 0) return null;
  const rank = q * all;
  let low = { le: 0, count: 0 };
  for (const row of rows) {
    if (row.count >= rank) {
      if (row.le === Infinity) return { at: low.le, under: false };
      if (!low.le) return { at: row.le, under: true };
      const share = (rank - low.count) / (row.count - low.count || 1);
      return { at: low.le + (row.le - low.le) * share, under: false };
    }
    low = row;
  }
  return null;
}
