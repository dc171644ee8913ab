// Drawing: sends the order, follows its progress and puts the pictures into the gallery.
import { closeList } from './animals.js';
import { catalog } from './catalog.js';
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
  showText('message');
  showText('note');
  if ($('random').checked) drawRandomSeed();
  const wrong = mistake();
  if (wrong) {
    const [field, message] = wrong;
    showText('message', message);
    $(field).focus();
    return;
  }
  const order = readOrder();
  start();
  const started = performance.now();
  try {
    await follow(order);
    const time = duration((performance.now() - started) / 1000);
    showText('note', [$('note').textContent, text('done', { time })].join(' ').trim());
  } catch (error) {
    if (error.name === 'AbortError') showText('note', text('cancelled'));
    else showText('message', error.message);
    show(shown);
  }
  setRunning(null);
  $('draw').focus({ preventScroll: true });
}

function start() {
  setRunning(new AbortController());
  $('cancel').focus();
  $('progress').removeAttribute('value');
  $('status-text').textContent = text('starting');
  if (matchMedia('(max-width: 760px)').matches) $('stage').scrollIntoView({ behavior: 'smooth' });
}

function setRunning(controller) {
  running = controller;
  $('controls').disabled = $('draw').hidden = Boolean(controller);
  $('cancel').hidden = $('status').hidden = !controller;
}

async function follow(order) {
  const response = await request('/api/draw', {
    method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(order), signal: running.signal,
  });
  let entry = null;
  for await (const event of events(response)) {
    if (event.event === 'picture') {
      const { event: _, ...picture } = event;
      entry = addPicture(picture, order, entry);
      await show(entry);
    } else if (event.event === 'preview') {
      showPreview(event, order);
    } else {
      showProgress(event);
    }
  }
}

function showProgress(event) {
  if (event.event === 'waiting') $('status-text').textContent = text('waiting', event);
  if (event.event === 'loading') $('status-text').textContent = text('loading');
  if (event.event === 'progress') {
    $('progress').value = event.done / event.total;
    $('status-text').textContent = text('drawing', { ...event, left: duration(event.seconds_left) });
  }
  if (event.event === 'note') {
    const near = event.near.length ? text('near', { names: event.near.join(text('or')) }) : '';
    showText('note', [text('unknown', { name: event.unknown }), near].join(' '));
  }
}
