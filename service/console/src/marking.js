// Which parts of a passage a question asked for by its words.

/** [{text, hit}] that together are `text`. Words match by their beginning, as stems do. */
export function marked(text, query) {
  const words = (query.match(/[\p{L}\p{N}]{2,}/gu) ?? [])
    .map((word) => word.toLowerCase())
    .filter((word) => word.length > 2 || /\P{ASCII}/u.test(word))
    .map((word) => (word.length > 5 ? word.slice(0, -2) : word));
  if (!words.length) return [{ text, hit: false }];
  const found = [];
  for (const [piece] of text.matchAll(/[\p{L}\p{N}]+|[^\p{L}\p{N}]+/gu)) {
    const lower = piece.toLowerCase();
    const hit = words.some((word) => lower.startsWith(word));
    const last = found.at(-1);
    if (last && last.hit === hit) last.text += piece;
    else found.push({ text: piece, hit });
  }
  return found;
}
