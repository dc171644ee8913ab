// Requests to the server. Every failure becomes a Refusal, which can be shown to the user in either language.
import { hasText, text } from './language.js';

const STATUS_TEXTS = { 401: 'signedOut', 403: 'otherSite', 429: 'slowDown' };

/**
 * Why something failed; `words()` says so in the language of the moment. A sentence of the server that has no translation
 * is put into the text `words(key)`.
 */
export class Refusal extends Error {
  constructor(words) {
    super(words());
    this.words = words;
  }
}

export async function request(path, options) {
  const response = await fetch(path, options).catch(connectionLost);
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  if (answer.message) throw refusal(answer);
  throw new Refusal(() => text(STATUS_TEXTS[response.status] ?? 'failed'));
}

/** The events of a drawing: the server sends one JSON object per line and ends with "done" or "error". */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { done, value } = await reader.read().catch(connectionLost);
    if (done) connectionLost({}); // before the last event
    const lines = (rest + value).split('\n');
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      if (event.event === 'error') throw refusal(event);
      if (event.event === 'done') return;
      yield event;
    }
  }
}

function connectionLost(error) {
  throw error.name === 'AbortError' ? error : new Refusal(() => text('unreachable'));
}

function refusal({ message, key, values }) {
  return new Refusal((other = 'otherRefusal') => (hasText(key) ? text(key, values) : text(other, { message })));
}
