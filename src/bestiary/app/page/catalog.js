// What the server offers, and what follows from the chosen adapter.
import { axes } from './comparing.js';
import { $, element, showText } from './dom.js';
import { hasText, text } from './language.js';
import { request } from './requests.js';
import { SHAPES, sizeOf } from './sizes.js';

const FIELD_DEFAULTS = { steps: 'steps', guidance: 'guidance_scale', scheduler: 'scheduler', resolution: 'resolution', weight: 'adapter_weight' };
const FAR = 1.4; // times larger or smaller than what an adapter was trained on

export let catalog = null;
export let defaults = null; // how the chosen adapter draws unless the user changes it
const uploads = [];
let ownSize = null; // [width, height] from a picture's settings

export async function loadCatalog() {
  catalog = await (await request('/api/catalog')).json();
  fillChoices();
  chooseAdapter(catalog.adapter);
}

export function addUpload(offer) {
  uploads.push(offer);
  fillChoices();
  chooseAdapter(offer.key);
}

export function chooseAdapter(key) {
  $('adapter').value = key;
  adapterChanged();
}

function offers() {
  return [...catalog.adapters, ...uploads];
}

/** The chosen adapter's offer; undefined for the base alone. */
export function chosenOffer() {
  return offerIn('adapter');
}

function offerIn(id) {
  return offers().find(({ key }) => key === $(id).value);
}

/** How the chosen adapters draw: as the first was evaluated, in the few steps of one that was made for them. */
function usual() {
  const chosen = [chosenOffer(), offerIn('second')];
  const own = chosen[0]?.usual ?? catalog.usual;
  return { adapter_weight: 1, ...own, ...stepsOf(chosen.map((offer) => ({ offer, weight: 1 }))) };
}

/** What an order draws with when its few-step adapters have the weight 0, and so change nothing; {} for other orders. */
export function withoutFewSteps({ adapter, adapter_weight, more_adapters }) {
  const applied = [{ adapter, weight: adapter_weight }, ...more_adapters]
    .map(({ adapter: chosen, weight }) => ({ weight, offer: offers().find(({ key }) => key === chosen) }));
  const fast = applied.filter(({ offer }) => offer?.few_step);
  return fast.length && fast.every(({ weight }) => !weight) ? stepsOf(applied) : {};
}

/** The steps of the first few-step adapter that has a weight, else those of the first other adapter or of the base. */
function stepsOf(applied) {
  const drawn = applied.filter(({ offer, weight }) => weight || !offer?.few_step);
  const { offer } = drawn.find((each) => each.offer?.few_step) ?? drawn[0] ?? {};
  const { scheduler, steps, guidance_scale, guidance_interval = null } = offer?.usual ?? catalog.usual;
  return { scheduler, steps, guidance_scale, guidance_interval };
}

/** The names of the adapters that a picture's settings hold. A file's hash tells two files of one name apart. */
export function adapterNames({ adapter, adapter_sha256, more_adapters = [] }) {
  return [...(adapter ? [{ adapter, adapter_sha256 }] : []), ...more_adapters].map((applied) => {
    const offer = catalog.adapters.find(({ key }) => key === applied.adapter);
    return offer ? offer.label : `${applied.adapter} · ${applied.adapter_sha256.slice(0, 8)}`;
  });
}

/** Fills the lists, in the current language. What is chosen stays chosen. */
export function fillChoices() {
  fill('adapter', [...offers().map((offer) => [offer.key, adapterLabel(offer)]), ['none', text('noAdapter')]]);
  fill('second', [['none', text('noSecond')], ...offers().map((offer) => [offer.key, adapterLabel(offer)])]);
  fill('resolution', catalog.resolutions.map((side) =>
    [side, side === catalog.usual.resolution ? text('nativeSize', { side }) : `${side} px`]));
  fill('axis', axes());
  fillShapes();
  fill('scheduler', Object.entries(catalog.schedulers));
  fill('base', [['', text('automatic')], ...catalog.bases.map((base) => [base, base])]);
  fill('device', catalog.devices.map((device) => [device, device.toUpperCase()]));
  $('device').disabled = catalog.devices.length < 2;
}

/** Offers the shapes, each with its size at the chosen resolution, and a picture's own size. */
export function fillShapes() {
  const side = Number($('resolution').value);
  const shapes = Object.keys(SHAPES).map((shape) => [shape, `${shape} · ${sizeOf(side, shape).join(' × ')} px`]);
  fill('shape', [...shapes, ...(ownSize ? [[ownSize.join('x'), `${ownSize.join(' × ')} px`]] : [])]);
}

/** Chooses the resolution and shape of this size. A size that is not on offer becomes a shape of its own. */
export function chooseSize(size) {
  const sizes = catalog.resolutions.flatMap((side) => Object.keys(SHAPES).map((shape) => [side, shape]));
  const found = sizes.find((each) => String(sizeOf(...each)) === String(size));
  ownSize = found ? null : size;
  if (found) $('resolution').value = found[0];
  fillShapes();
  $('shape').value = found ? found[1] : size.join('x');
}

/** Shows the numbers beside the sliders. The base alone has no weight, and an export's cannot change. */
export function showWeights() {
  const isExport = Boolean(chosenOffer()?.export);
  if (isExport) $('weight').value = 1;
  $('weight').disabled = isExport || $('adapter').value === 'none';
  $('compare').disabled = isExport; // it holds no base to compare with
  $('second-weight-row').hidden = $('second').value === 'none';
  $('second-weight').ariaLabel = text('secondWeight');
  for (const id of ['weight', 'second-weight', 'denoise']) document.querySelector(`output[for=${id}]`).value = Number($(id).value).toFixed(2);
}

function fill(id, options) {
  const before = $(id).value;
  $(id).replaceChildren(...options.map(([value, label]) => element('option', { value, textContent: label })));
  if (options.some(([value]) => String(value) === before)) $(id).value = before;
}

function adapterLabel(offer) {
  const hasTwin = offers().filter(({ label }) => label === offer.label).length > 1;
  const aliases = offer.aliases.map((alias) => (hasText(alias) ? text(alias) : alias));
  return [offer.label, ...(hasTwin ? [offer.sha256] : []), ...aliases].join(' · ');
}

function gains({ scores }) {
  return Object.entries(scores).map(([score, gain]) => {
    const signed = `${gain > 0 ? '+' : '−'}${Math.abs(gain).toFixed(1)}`;
    return `${text(score)} ${signed}${score === 'top1' ? '\u00a0%' : ''}`;
  });
}

/** Applies the chosen adapter's drawing defaults, and shows its scores. */
export function adapterChanged() {
  const offer = chosenOffer();
  $('adapter').title = $('adapter').selectedOptions[0]?.textContent ?? '';
  showText('scores', offer && gains(offer).length ? () => text('gains', { gains: gains(offer).join(' · ') }) : null);
  const before = defaults;
  defaults = usual();
  if (!catalog.resolutions.includes(defaults.resolution)) defaults.resolution = catalog.usual.resolution;
  for (const [id, key] of Object.entries(FIELD_DEFAULTS)) {
    const changedByUser = before && $(id).value !== String(before[key]);
    if (!changedByUser) $(id).value = defaults[key];
  }
  showWeights();
  showInterval();
  checkSize();
}

function showInterval() {
  const interval = defaults.guidance_interval;
  $('interval-label').hidden = !interval;
  if (interval) $('interval-text').textContent = text('interval', { low: interval[0], high: interval[1] });
}

/** Guides by this interval, or every step for null. */
export function chooseInterval(interval) {
  if (interval) defaults = { ...defaults, guidance_interval: interval };
  $('interval').checked = Boolean(interval);
  showInterval();
}

/** The key of the adapter that a picture's settings name; undefined if it is not on offer. */
export function keyOfApplied({ adapter, adapter_sha256: sha256 }) {
  return offers().find((offer) => offer.key === adapter || (offer.sha256 && sha256.startsWith(offer.sha256)))?.key;
}

/** Warns of a size far from the one that the adapter, or else the base, was trained on. */
export function checkSize() {
  fillShapes();
  const side = chosenOffer()?.side ?? catalog.usual.resolution;
  const chosen = Number($('resolution').value);
  const isFar = chosen > side * FAR || chosen < side / FAR;
  showText('size-warning', isFar ? () => text(chosenOffer() ? 'farFromAdapter' : 'farFromBase', { side, chosen }) : null);
}
