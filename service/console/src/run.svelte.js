// One column's request: sent, streamed, timed.

import { ask, events, Refusal, request } from './server.js';

export const PATH = 'generate_stream';

export function fresh() {
  return {
    adapter: '',
    template: '',
    variables: {},
    collection: '',
    k: 4,
    mode: 'hybrid',
    sample: false,
    temperature: 0.8,
    top_p: 0.95,
    top_k: 0,
    repetition_penalty: 1,
    seed: '',
    max_new_tokens: 64,
    stop: '',
  };
}

/** The body of /generate that a column and the prompt above it come to. */
export function bodyOf(prompt, column) {
  const parameters = {};
  // Left empty, the template's own or the server's.
  if (column.max_new_tokens) parameters.max_new_tokens = column.max_new_tokens;
  if (column.adapter.trim()) parameters.adapter_id = column.adapter.trim();
  if (column.sample) {
    parameters.do_sample = true;
    parameters.temperature = column.temperature;
    parameters.top_p = column.top_p;
    if (column.top_k) parameters.top_k = column.top_k;
    if (column.seed !== '' && column.seed != null) parameters.seed = Number(column.seed);
  }
  if (column.repetition_penalty !== 1) parameters.repetition_penalty = column.repetition_penalty;
  if (column.stop) parameters.stop = [column.stop];
  const body = { inputs: inputs(prompt), parameters };
  if (column.template) {
    body.template = { name: column.template, variables: column.variables };
    if (!prompt.text) delete body.inputs;
  }
  if (column.collection) {
    body.retrieval = { collection: column.collection, k: column.k, mode: column.mode };
  }
  return body;
}

function inputs({ chat, system, text }) {
  if (!chat) return text;
  const user = { role: 'user', content: text };
  return system.trim() ? [{ role: 'system', content: system }, user] : [user];
}

export class Run {
  tokens = $state([]);
  state = $state('running'); // then done, stopped or failed
  error = $state.raw(null);
  details = $state.raw(null);
  text = $state(null); // as the server joined it; null while it streams
  digest = $state('');
  id = $state('');
  first = $state(null); // seconds to the first token
  rate = $state(null); // tokens a second after it
  feedback = $state.raw(null);
  #stopping = new AbortController();

  async start(body) {
    const told = { ...body, parameters: { ...body.parameters, details: true, top_n_tokens: 4 } };
    const began = performance.now();
    let firstAt = 0;
    try {
      const reply = await request(PATH, { json: told, signal: this.#stopping.signal });
      this.digest = reply.headers.get('x-adapter-digest') ?? '';
      this.id = reply.headers.get('x-request-id') ?? '';
      for await (const event of events(reply)) {
        if (event.error) throw new Refusal(0, event.error, event.field, event.error_type);
        const now = performance.now();
        if (!firstAt) {
          firstAt = now;
          this.first = (now - began) / 1000;
        }
        if (!event.token.special || event.token.text) {
          this.tokens.push({ ...event.token, top: event.top_tokens ?? [] });
        }
        if (this.tokens.length > 1) this.rate = (this.tokens.length - 1) / ((now - firstAt) / 1000);
        if (event.details) {
          this.details = event.details;
          this.text = event.generated_text;
        }
      }
      this.state = 'done';
    } catch (error) {
      const stopped = error.name === 'AbortError';
      this.state = stopped ? 'stopped' : 'failed';
      if (!stopped) this.error = error;
    }
  }

  stop() {
    this.#stopping.abort();
  }

  async judge(score) {
    try {
      this.feedback = await ask('feedback', { json: { request_id: this.id, score } });
    } catch (error) {
      this.feedback = { error };
    }
  }
}
