/** Looks at once and then every so many milliseconds, but not while nobody sees the page, nor once
 * `fault` says that the key may not: each refusal is a line of the audit log. For an $effect: what
 * it returns ends it. */
export function polled(look, milliseconds, fault) {
  look();
  const timer = setInterval(() => document.hidden || fault()?.status === 403 || look(), milliseconds);
  return () => clearInterval(timer);
}
