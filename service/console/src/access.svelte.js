// The key that requests bring, where the server has keys. It lasts as long as the tab.

const NAME = 'nibble.key';

function stored() {
  try {
    return sessionStorage.getItem(NAME) ?? '';
  } catch {
    return ''; // storage is forbidden: the key lasts as long as the page
  }
}

export const access = $state({ key: stored(), refused: false });

/** Whether the last request found nobody: the server is down, or the way to it is. */
export const line = $state({ down: false });

/** The header that says who asks; nothing where no key was given. */
export function credentials() {
  return access.key ? { authorization: `Bearer ${access.key}` } : {};
}

export function give(key) {
  access.key = key.trim();
  access.refused = false;
  try {
    if (access.key) sessionStorage.setItem(NAME, access.key);
    else sessionStorage.removeItem(NAME);
  } catch {
    // as above
  }
}
