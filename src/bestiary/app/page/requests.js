// Requests to the server. Every failure becomes an Error whose message can be shown to the user.
import { hasText, text } from './language.js';

export async function request(path, options) {
  const response = await fetch(path, options).catch(connectionLost);
  if (response.ok) return response;
  if (response.status === 401) throw new Error(text('signedOut'));
  const answer = await response.json().catch(() => ({}));
  throw new Error(answer.message ? refusal(answer) : text('failed'));
}

/** The events of a drawing: the server sends one JSON object per line and ends with "done" or "error". */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { done, value } = await reader.read().catch(connectionLost);
    if (done) throw new Error(text('unreachable')); // before the last event
    const lines = (rest + value).split('\n');
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      if (event.event === 'error') throw new Error(refusal(event));
      if (event.event === 'done') return;
      yield event;
    }
  }
}

function connectionLost(error) {
  throw error.name === 'AbortError' ? error : new Error(text('unreachable'));
}

function refusal({ message, key, values }) {
  return hasText(key) ? text(key, values) : text('otherRefusal', { message });
}
