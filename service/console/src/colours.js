// A canvas knows no variables of CSS: the colours are read where they are in force.
export function colours(place) {
  const probe = document.createElement('i');
  place.append(probe);
  const found = {};
  for (const name of ['accent', 'text', 'muted', 'line']) {
    probe.style.color = `var(--${name})`;
    found[name] = getComputedStyle(probe).color;
  }
  probe.remove();
  return found;
}
