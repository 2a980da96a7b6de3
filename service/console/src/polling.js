/** Looks at once and then every so many milliseconds, but not while nobody sees the page. For an
 * $effect: what it returns ends it. */
export function polled(look, milliseconds) {
  look();
  const timer = setInterval(() => document.hidden || look(), milliseconds);
  return () => clearInterval(timer);
}
