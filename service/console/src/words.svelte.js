// What the reader chose: language and theme. English texts are their own keys.

function stored(key) {
  try {
    return localStorage.getItem(key);
  } catch {
    return null; // storage is forbidden: choices last as long as the page
  }
}

function store(key, value) {
  try {
    localStorage.setItem(key, value);
  } catch {
    // as above
  }
}

const spoken = navigator.language.startsWith('ko') ? 'ko' : 'en';
export const chosen = $state({
  language: stored('nibble.language') ?? spoken,
  theme: stored('nibble.theme') ?? 'light dark',
});
let korean = $state.raw({});

/** A text in the reader's language; `{name}` in it is taken from `values`. */
export function t(text, values = {}) {
  const found = (chosen.language === 'ko' && korean[text]) || text;
  return found.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

export async function speak(language) {
  if (language === 'ko') korean = (await import('./korean.js')).default;
  chosen.language = language;
  document.documentElement.lang = language;
  store('nibble.language', language);
}

export function paint(theme) {
  chosen.theme = theme;
  document.documentElement.style.colorScheme = theme;
  store('nibble.theme', theme);
}

paint(chosen.theme);
export const ready = speak(chosen.language === 'ko' ? 'ko' : 'en');
