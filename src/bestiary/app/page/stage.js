// The stage shows one order: all its pictures, and the colours and settings of the entry that is chosen among them.
import { adapterNames, catalog } from './catalog.js';
import { axisLabel } from './comparing.js';
import { COLOURS, withColours } from './colours.js';
import { $, element } from './dom.js';
import { text } from './language.js';
import { isBaseAlone } from './order.js';
import { saveGrid, savePicture } from './saving.js';

export let shown = null; // the chosen entry
let groups = new Map(); // by entry of the order on the stage: the element with its pictures

/** Shows an entry among all of its order, or the empty stage for null. */
export async function show(entry) {
  document.querySelector('#gallery .current')?.classList.remove('current');
  shown = entry;
  $('tools').hidden = !entry;
  layOut(entry?.order.axis);
  if (!entry) {
    groups = new Map();
    $('pictures').replaceChildren(element('p', { className: 'empty', 'data-text': 'empty', textContent: text('empty') }));
    return;
  }
  entry.card.classList.add('current');
  const made = await Promise.all(entry.set.map(async (each) => [each, await groupOf(each)]));
  if (shown !== entry) return;
  groups = new Map(made);
  $('pictures').replaceChildren(...groups.values());
  $('pictures').classList.toggle('paired', entry.order.compare);
  for (const [each, group] of groups) group.classList.toggle('chosen', each === entry && groups.size > 1);
  for (const colour of COLOURS) $(colour).value = entry.colours[colour];
  applyColours();
  $('settings').replaceChildren(...settingsOf(entry.pictures[0]).map(([key, value]) =>
    element('div', {}, element('dt', { textContent: text(key) }), element('dd', { textContent: value }))));
}

/** Arranges the pictures by an axis: its values are the columns, the seeds the rows. */
function layOut(axis) {
  $('pictures').classList.toggle('axes', Boolean(axis));
  $('save-grid').hidden = !axis || !shown || shown.set.length < 2;
  $('pictures').style.setProperty('--columns', axis?.columns ?? 1);
  $('pictures').style.setProperty('--rows', axis?.rows ?? 1);
}

/** Saves the compared pictures as one, with labels. */
export function saveShownGrid() {
  const cells = shown.set.map((each) => ({ ...each, canvas: groups.get(each).querySelector('canvas'), label: axisLabel(each.order.axis) }));
  saveGrid(cells, shown.order.axis.rows);
}

/** Shows the stage again, after the language has changed. */
export function showAgain() {
  groups = new Map();
  return shown && show(shown);
}

/** Shows what a picture looks like after the current step, beside what the order's set holds so far. */
export function showPreview({ role, image }, order, set) {
  let figure = document.querySelector(`#pictures .forming[data-role=${role}]`);
  if (!figure) {
    document.querySelector('#pictures .forming')?.remove();
    figure = element('figure', { className: 'forming', 'data-role': role },
      element('img', { alt: '' }), element('figcaption', { textContent: roleName(role, order) }));
    const before = role === 'base' && groups.get(set.at(-1)); // the base's picture follows the adapter's
    if (before) {
      before.append(figure);
    } else {
      const group = element('div', { className: 'entry' }, figure);
      if (set.length) $('pictures').append(group); else $('pictures').replaceChildren(group);
      $('pictures').classList.toggle('paired', order.compare);
      if (!set.length) {
        $('tools').hidden = true;
        layOut(order.axis);
        $('save-grid').hidden = true;
      }
    }
  }
  figure.querySelector('img').src = image;
}

/** The element with an entry's pictures: the one on the stage if it is complete. */
async function groupOf(entry) {
  const before = groups.get(entry);
  if (before?.querySelectorAll('canvas').length === entry.pictures.length) {
    before.querySelector('.forming')?.remove();
    return before;
  }
  const figures = await Promise.all(entry.pictures.map((picture) => figureOf(picture, entry)));
  return element('div', { className: 'entry', onclick: () => shown !== entry && groups.has(entry) && show(entry) }, ...figures);
}

async function figureOf(picture, entry) {
  const bitmap = await createImageBitmap(picture.data);
  const canvas = element('canvas', { width: bitmap.width, height: bitmap.height, role: 'img', 'aria-label': picture.settings.prompt });
  canvas.getContext('2d', { willReadFrequently: true }).drawImage(bitmap, 0, 0);
  bitmap.close();
  colour(canvas, entry.colours);
  const save = (kind) => element('button', {
    type: 'button', className: 'quiet', textContent: text('save', { kind }), onclick: () => savePicture(kind, canvas, picture, entry.colours),
  });
  return element('figure', { 'data-role': picture.role }, canvas,
    element('figcaption', {}, element('span', { textContent: captionOf(picture, entry) }), save('PNG'), save('JPEG')));
}

function captionOf({ role, settings }, { order }) {
  if (order.axis) return [axisLabel(order.axis), ...(order.count > 1 ? [settings.seed] : [])].join(' · ');
  const name = drawsItsOwnWay(role, settings, order)
    ? text('baseOwnWay', { steps: settings.steps, guidance: settings.guidance_scale }) : roleName(role, order);
  return order.count > 1 ? `${name} · ${settings.seed}` : name;
}

/** Whether the base beside a few-step adapter was drawn with its default settings. */
function drawsItsOwnWay(role, settings, order) {
  return role === 'base' && ['steps', 'guidance_scale', 'scheduler'].some((key) => settings[key] !== order[key]);
}

function roleName(role, order) {
  return text(role === 'base' || isBaseAlone(order) ? 'baseOnly' : 'withAdapter');
}

function settingsOf({ settings, device }) {
  const [low, high] = settings.guidance_interval ?? [];
  const [first, ...others] = adapterNames(settings);
  const scale = settings.guidance_scale;
  const size = settings.resolution ?? `${settings.width} × ${settings.height}`;
  return [
    ['prompt', settings.prompt],
    ...(settings.negative_prompt ? [['negative', settings.negative_prompt]] : []),
    ['seed', settings.seed], ['steps', settings.steps],
    ['guidance', settings.guidance_interval ? text('guidanceInInterval', { scale, low, high }) : scale],
    ['scheduler', catalog.schedulers[settings.scheduler]], ['resolution', `${size} px`],
    ['adapter', first ?? text('noAdapter')],
    ...('adapter_weight' in settings ? [['weight', settings.adapter_weight]] : []),
    ...others.flatMap((name, number) => [['second', name], ['secondWeight', settings.more_adapters[number].weight]]),
    ...(settings.denoise ? [['denoise', settings.denoise]] : []),
    ['base', settings.base], ['device', device.toUpperCase()],
  ];
}

/** Applies the sliders to the pictures of the chosen entry. */
export function applyColours() {
  for (const name of COLOURS) {
    shown.colours[name] = Number($(name).value);
    document.querySelector(`output[for=${name}]`).value = shown.colours[name].toFixed(2);
  }
  for (const canvas of groups.get(shown)?.querySelectorAll('canvas') ?? []) colour(canvas, shown.colours);
}

/** Draws a canvas with its picture in these colours. The original is read only once it is needed. */
function colour(canvas, colours) {
  if (!canvas.original && COLOURS.every((name) => colours[name] === 1)) return;
  const context = canvas.getContext('2d');
  canvas.original ??= context.getImageData(0, 0, canvas.width, canvas.height);
  context.putImageData(withColours(canvas.original, colours), 0, 0);
}

export function resetColours() {
  for (const name of COLOURS) $(name).value = 1;
  applyColours();
}
