// What the server offers, and what follows from the chosen adapter.
import { $, element, showText } from './dom.js';
import { hasText, text } from './language.js';
import { request } from './requests.js';

const FIELD_DEFAULTS = { steps: 'steps', guidance: 'guidance_scale', scheduler: 'scheduler', resolution: 'resolution' };

export let catalog = null;
export let defaults = null; // how the chosen adapter draws unless the user changes it
const uploads = [];

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

/** Fills the lists, in the current language. What is chosen stays chosen. */
export function fillChoices() {
  const adapters = [...catalog.adapters, ...uploads].map((offer) => [offer.key, adapterLabel(offer)]);
  fill('adapter', [...adapters, ['none', text('noAdapter')]]);
  fill('resolution', catalog.resolutions.map((side) =>
    [side, side === catalog.usual.resolution ? text('nativeSize', { side }) : `${side} px`]));
  fill('scheduler', Object.entries(catalog.schedulers));
  fill('base', [['', text('automatic')], ...catalog.bases.map((base) => [base, base])]);
  fill('device', catalog.devices.map((device) => [device, device.toUpperCase()]));
  $('device').disabled = catalog.devices.length < 2;
}

function fill(id, options) {
  const before = $(id).value;
  $(id).replaceChildren(...options.map(([value, label]) => element('option', { value, textContent: label })));
  if (options.some(([value]) => String(value) === before)) $(id).value = before;
}

function adapterLabel(offer) {
  return [offer.label, ...offer.aliases.map((alias) => (hasText(alias) ? text(alias) : alias)), ...gains(offer)].join(' · ');
}

function gains({ scores }) {
  return Object.entries(scores).map(([score, gain]) => {
    const signed = `${gain > 0 ? '+' : '−'}${Math.abs(gain).toFixed(1)}`;
    return `${text(score)} ${signed}${score === 'top1' ? ' %' : ''}`;
  });
}

/** Shows the adapter's scores below the list, which truncates long lines, and applies its drawing defaults. */
export function adapterChanged() {
  const offer = catalog.adapters.find(({ key }) => key === $('adapter').value);
  showText('scores', offer && gains(offer).length ? text('gains', { gains: gains(offer).join(' · ') }) : '');
  const before = defaults;
  defaults = { ...(offer?.usual ?? catalog.usual) };
  if (!catalog.resolutions.includes(defaults.resolution)) defaults.resolution = catalog.usual.resolution;
  for (const [id, key] of Object.entries(FIELD_DEFAULTS)) {
    const changedByUser = before && $(id).value !== String(before[key]);
    if (!changedByUser) $(id).value = defaults[key];
  }
  const interval = defaults.guidance_interval;
  $('interval-label').hidden = !interval;
  if (interval) $('interval-text').textContent = text('interval', { low: interval[0], high: interval[1] });
}
