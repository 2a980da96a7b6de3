// Talking to the server: requests, refusals, events, uploads.

import { access, credentials, line } from './access.svelte.js';
import { t } from './words.svelte.js';

export class Refusal extends Error {
  constructor(status, message, field, type) {
    super(message);
    this.status = status;
    this.field = field;
    this.type = type;
  }
}

// The server's two envelopes: its own, and OpenAI's under /v1.
function refusal(status, text) {
  try {
    const found = JSON.parse(text);
    const own = typeof found.error === 'string';
    const message = own ? found.error : found.error.message;
    const type = own ? found.error_type : found.error.code;
    return new Refusal(status, message, own ? found.field : found.error.param, type);
  } catch {
    return new Refusal(status, `${status}: ${text.slice(0, 200) || 'no reason given'}`);
  }
}

/** Nobody answered, or no longer: `status` is 0. */
function gone(what) {
  line.down = true;
  return new Refusal(0, t(what));
}

export async function request(path, { json, ...options } = {}) {
  if (json !== undefined) {
    options.method ??= 'POST';
    options.headers = { ...options.headers, 'content-type': 'application/json' };
    options.body = JSON.stringify(json);
  }
  options.headers = { ...options.headers, ...credentials() };
  const response = await fetch(path, options).catch((failed) => {
    throw failed.name === 'AbortError' ? failed : gone('The server does not answer.');
  });
  if (response.status === 401) access.refused = true;
  if (!response.ok) throw refusal(response.status, await response.text());
  return response;
}

export async function ask(path, options) {
  return (await request(path, options)).json();
}

function* parsed(text) {
  for (const event of text.split('\n\n')) {
    const lines = event.split('\n').filter((line) => line.startsWith('data:'));
    const data = lines.map((line) => line.slice(5).trimStart()).join('\n');
    if (data) yield JSON.parse(data);
  }
}

/** The JSON of each server-sent event of a reply, as it comes. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((failed) => {
        throw failed.name === 'AbortError' ? failed : gone('The connection to the server broke.');
      });
      if (done) return;
      rest += value;
      const end = rest.lastIndexOf('\n\n') + 2;
      if (end < 2) continue;
      yield* parsed(rest.slice(0, end));
      rest = rest.slice(end);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** POST a form; `progress` is told the share that was sent, which fetch cannot tell. With `heard`
 * the reply is asked for as events, and each is handed over as it comes. */
export function upload(path, form, progress, heard) {
  return new Promise((resolve, reject) => {
    const sending = new XMLHttpRequest();
    sending.open('POST', path);
    for (const [name, value] of Object.entries(credentials())) sending.setRequestHeader(name, value);
    let read = 0;
    if (heard) {
      sending.setRequestHeader('accept', 'text/event-stream');
      sending.onprogress = () => {
        if (sending.status !== 200) return;
        const end = sending.responseText.lastIndexOf('\n\n') + 2;
        for (const one of parsed(sending.responseText.slice(read, end))) heard(one);
        read = Math.max(read, end);
      };
    }
    sending.upload.onprogress = (event) => {
      if (event.lengthComputable) progress(event.loaded / event.total);
    };
    sending.onerror = () => reject(gone('The connection to the server broke.'));
    sending.onload = () => {
      const { status, responseText } = sending;
      if (status === 401) access.refused = true;
      if (status < 200 || status >= 300) reject(refusal(status, responseText));
      else resolve(heard ? [...parsed(responseText)].at(-1) : JSON.parse(responseText));
    };
    sending.send(form);
  });
}

/** What a page that asks again and again says of a failure: nothing where nobody answered, which
 * stands above every page already. */
export const polledFault = (failed) => (failed.status === 0 ? null : failed);

let described;

/** Whether this server has a route, by its own description; asked once. */
export async function offers(path) {
  described ??= ask('openapi.json');
  try {
    return path in (await described).paths;
  } catch (error) {
    described = undefined;
    throw error;
  }
}

export const part = encodeURIComponent;
