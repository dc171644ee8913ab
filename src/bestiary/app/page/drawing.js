// Drawing: sends the order, follows its progress and puts the pictures into the gallery.
import { checkSubject, closeList } from './animals.js';
import { catalog } from './catalog.js';
import { ordersOf, wrongValues } from './comparing.js';
import { $, showText } from './dom.js';
import { addPicture } from './gallery.js';
import { duration, text } from './language.js';
import { drawRandomSeed, mistake, readOrder } from './order.js';
import { events, request } from './requests.js';
import { show, shown, showPreview } from './stage.js';

let running = null; // the AbortController of the current drawing

export function isDrawing() {
  return Boolean(running);
}

export function cancel() {
  running?.abort();
}

export async function draw() {
  if (running || !catalog) return;
  closeList();
  checkSubject();
  showText('message');
  showText('note');
  if ($('random').checked) drawRandomSeed();
  const order = readOrder();
  const wrongAxis = wrongValues(order);
  const wrong = mistake() ?? (wrongAxis && ['values', wrongAxis]);
  if (wrong) {
    const [field, words] = wrong;
    showText('message', words);
    if ($(field).closest('details')) $(field).closest('details').open = true;
    $(field).focus();
    return;
  }
  start();
  const started = performance.now();
  const notes = [];
  const say = () => showText('note', notes.length ? () => notes.map((words) => words()).join(' ') : null);
  try {
    const set = []; // the entries of these orders in the gallery
    for (const [each, axis] of ordersOf(order)) {
      const note = (words) => {
        if (!notes.some((before) => before() === words())) notes.push(words);
        say();
      };
      await follow(each, axis, set, note);
    }
    const seconds = (performance.now() - started) / 1000;
    notes.push(() => text('done', { time: duration(seconds) }));
  } catch (error) {
    if (error.name === 'AbortError') notes.push(() => text('cancelled'));
    else showText('message', error.words ?? (() => text('failed')));
  }
  say();
  await show(shown);
  setRunning(null);
  $('draw').focus({ preventScroll: true });
}

function start() {
  setRunning(new AbortController());
  $('cancel').focus();
  $('progress').removeAttribute('value');
  showText('status-text', () => text('starting'));
  if (matchMedia('(max-width: 760px)').matches) $('stage').scrollIntoView({ behavior: 'smooth' });
}

function setRunning(controller) {
  running = controller;
  $('controls').disabled = $('draw').hidden = Boolean(controller);
  $('cancel').hidden = $('status').hidden = !controller;
}

async function follow(order, axis, set, note) {
  const response = await request('/api/draw', {
    method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(order), signal: running.signal,
  });
  for await (const event of events(response)) {
    if (event.event === 'picture') {
      const { event: _, ...picture } = event;
      await show(addPicture(picture, { ...order, axis }, set));
    } else if (event.event === 'preview') {
      showPreview(event, { ...order, axis }, set);
    } else if (event.event === 'note') {
      note(() => unknown(event));
    } else {
      showProgress(event);
    }
  }
}

function unknown({ unknown: name, near }) {
  const question = near.length ? text('near', { names: near.join(text('or')) }) : '';
  return [text('unknown', { name }), question].join(' ').trim();
}

function showProgress(event) {
  if (event.event === 'waiting') showText('status-text', () => text('waiting', event));
  if (event.event === 'loading') showText('status-text', () => text('loading'));
  if (event.event === 'progress') {
    $('progress').value = event.done / event.total;
    showText('status-text', () => text('drawing', { ...event, left: duration(event.seconds_left) }));
  }
}
