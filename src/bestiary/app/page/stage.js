// The stage shows one entry of the gallery: its pictures, their colours and their settings.
import { catalog } from './catalog.js';
import { COLOURS, withColours } from './colours.js';
import { $, element } from './dom.js';
import { text } from './language.js';
import { savePicture } from './saving.js';

export let shown = null; // the entry on the stage

/** Shows an entry, or the empty stage for null. */
export async function show(entry) {
  document.querySelector('#gallery .current')?.classList.remove('current');
  shown = entry;
  $('tools').hidden = !entry;
  if (!entry) {
    $('pictures').replaceChildren(element('p', { className: 'empty', 'data-text': 'empty', textContent: text('empty') }));
    return;
  }
  entry.card.classList.add('current');
  const figures = await Promise.all(entry.pictures.map((picture) => figureOf(picture, entry)));
  if (shown !== entry) return;
  $('pictures').replaceChildren(...figures);
  for (const colour of COLOURS) $(colour).value = entry.colours[colour];
  applyColours();
  $('settings').replaceChildren(...settingsOf(entry.pictures[0]).map(([key, value]) =>
    element('div', {}, element('dt', { textContent: text(key) }), element('dd', { textContent: value }))));
}

/** Shows what a picture looks like after the current step. */
export function showPreview({ role, image }, order) {
  let figure = document.querySelector(`#pictures .forming[data-role=${role}]`);
  if (!figure) {
    figure = element('figure', { className: 'forming', 'data-role': role },
      element('img', { alt: '' }), element('figcaption', { textContent: roleName(role, order) }));
    if (role === 'adapter') {
      $('pictures').replaceChildren(figure);
      $('tools').hidden = true;
    } else {
      $('pictures').append(figure); // the base's picture follows the adapter's
    }
  }
  figure.querySelector('img').src = image;
}

async function figureOf(picture, entry) {
  const bitmap = await createImageBitmap(picture.data);
  const canvas = element('canvas', { width: bitmap.width, height: bitmap.height, role: 'img', 'aria-label': picture.settings.prompt });
  const context = canvas.getContext('2d', { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  canvas.original = context.getImageData(0, 0, canvas.width, canvas.height);
  const save = (kind) => element('button', {
    type: 'button', className: 'quiet', textContent: text('save', { kind }), onclick: () => savePicture(kind, canvas, picture, entry.colours),
  });
  return element('figure', { 'data-role': picture.role }, canvas,
    element('figcaption', {}, element('span', { textContent: roleName(picture.role, entry.order) }), save('PNG'), save('JPEG')));
}

function roleName(role, order) {
  return text(role === 'base' || order.adapter === 'none' ? 'baseOnly' : 'withAdapter');
}

function settingsOf({ settings, device }) {
  const [low, high] = settings.guidance_interval ?? [];
  const scale = settings.guidance_scale;
  return [
    ['prompt', settings.prompt], ['seed', settings.seed], ['steps', settings.steps],
    ['guidance', settings.guidance_interval ? text('guidanceInInterval', { scale, low, high }) : scale],
    ['scheduler', catalog.schedulers[settings.scheduler]], ['resolution', `${settings.resolution} px`],
    ['adapter', settings.adapter ?? text('noAdapter')], ['base', settings.base], ['device', device.toUpperCase()],
  ];
}

/** Applies the sliders to the pictures on the stage. */
export function applyColours() {
  for (const colour of COLOURS) {
    shown.colours[colour] = Number($(colour).value);
    document.querySelector(`output[for=${colour}]`).value = shown.colours[colour].toFixed(2);
  }
  for (const canvas of document.querySelectorAll('#pictures canvas')) {
    canvas.getContext('2d').putImageData(withColours(canvas.original, shown.colours), 0, 0);
  }
}

export function resetColours() {
  for (const colour of COLOURS) $(colour).value = 1;
  applyColours();
}
