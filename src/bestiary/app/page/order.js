// An order: what the form asks the server to draw.
import { chooseAdapter, chooseInterval, chooseSize, chosenOffer, defaults, showWeights } from './catalog.js';
import { $ } from './dom.js';
import { text } from './language.js';
import { sizeOf } from './sizes.js';
import { chooseStart, startImage } from './start.js';

const MAX_LENGTH = { animal: 200, prompt: 1000, negative: 1000 }; // characters
const NUMBERS = ['seed', 'count', 'steps', 'guidance'];

/** The first mistake in the form as [field, words], or null. `words()` says what is wrong. */
export function mistake() {
  for (const [id, max] of Object.entries(MAX_LENGTH)) {
    if ([...$(id).value].length > max) return [id, () => text('long', { field: text(id), max })];
  }
  for (const id of NUMBERS) {
    const { value, validity, min, max } = $(id);
    if (value === '' || validity.rangeUnderflow || validity.rangeOverflow || validity.badInput) return [id, () => text('range', { field: text(id), min, max })];
    if (validity.stepMismatch && id !== 'guidance') return [id, () => text('whole', { field: text(id) })];
  }
  return ($('animal').value + $('prompt').value).trim() ? null : ['animal', () => text('missing')];
}

export function readOrder() {
  const [width, height] = sizeOf(Number($('resolution').value), $('shape').value);
  return {
    adapter: $('adapter').value,
    adapter_weight: Number($('weight').value),
    more_adapters: $('second').value === 'none' ? [] : [{ adapter: $('second').value, weight: Number($('second-weight').value) }],
    base: $('base').value,
    device: chosenOffer()?.export ? 'cpu' : $('device').value,
    animal: $('animal').value,
    prompt: $('prompt').value,
    negative_prompt: $('negative').value,
    steps: Number($('steps').value),
    guidance_scale: Number($('guidance').value),
    guidance_interval: defaults.guidance_interval && $('interval').checked ? defaults.guidance_interval : null,
    scheduler: $('scheduler').value,
    seed: Number($('seed').value),
    count: Number($('count').value),
    width,
    height,
    image: startImage?.key ?? '',
    denoise: Number($('denoise').value),
    decoder: $('decoder').value || null,
    compare: $('compare').checked && !$('compare').disabled && [$('adapter').value, $('second').value].some((key) => key !== 'none'),
    preview: $('preview').checked,
  };
}

/** Fills the form with an earlier order. */
export function repeatOrder(order) {
  const [second = { adapter: 'none', weight: 1 }] = order.more_adapters;
  $('second').value = second.adapter;
  chooseAdapter(order.adapter);
  for (const id of ['base', 'device', 'animal', 'prompt', 'steps', 'scheduler', 'seed']) $(id).value = order[id];
  chooseSize([order.width, order.height]);
  $('negative').value = order.negative_prompt;
  $('weight').value = order.adapter_weight;
  $('second-weight').value = second.weight;
  chooseInterval(order.guidance_interval);
  chooseStart(order.image);
  $('denoise').value = order.denoise;
  $('decoder').value = order.decoder ?? '';
  showWeights();
  $('guidance').value = order.guidance_scale;
  $('compare').checked = order.compare || isBaseAlone(order);
  $('random').checked = false;
  $('axis').value = '';
  $('axis').dispatchEvent(new Event('change'));
  $('animal').focus();
}

/** Whether an order names no adapter. */
export function isBaseAlone({ adapter, more_adapters: more }) {
  return adapter === 'none' && !more.length;
}

export function drawRandomSeed() {
  $('seed').value = crypto.getRandomValues(new Uint32Array(1))[0];
}
