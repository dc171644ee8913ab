// The compare view: the same picture with several values of one setting, side by side.
import { catalog, withoutFewSteps } from './catalog.js';
import { $ } from './dom.js';
import { text } from './language.js';
import { isBaseAlone } from './order.js';

const MAX_VALUES = 8;

// By the setting's field: how an order changes with a value.
const AXES = {
  weight: (order, value) => inOwnSteps({ ...order, adapter_weight: value }),
  secondWeight: (order, value) => inOwnSteps({ ...order, more_adapters: order.more_adapters.map((second) => ({ ...second, weight: value })) }),
  steps: (order, value) => ({ ...order, steps: value }),
  guidance: (order, value) => ({ ...order, guidance_scale: value }),
  scheduler: (order, value) => ({ ...order, scheduler: value }),
  denoise: (order, value) => ({ ...order, denoise: value }),
};
const FIELDS = { secondWeight: 'second-weight' }; // of those whose field has another name

/** Without its few-step adapter, the base would draw nothing recognisable in so few steps. */
function inOwnSteps(order) {
  return { ...order, ...withoutFewSteps(order) };
}

/** The choices of the setting to compare by, for a list. */
export function axes() {
  return [['', text('noAxis')], ...Object.keys(AXES).map((axis) => [axis, shortName(axis)])];
}

function values() {
  const words = $('values').value.split(/[,，、\s]+/).filter(Boolean);
  return $('axis').value === 'scheduler' ? words : words.map(Number);
}

/** What is wrong with the values, in words, or null. */
export function wrongValues(order) {
  const axis = $('axis').value;
  if (!axis) return null;
  const field = text(axis);
  const given = values();
  if (!given.length || given.length > MAX_VALUES) return () => text('fewValues', { max: MAX_VALUES });
  if (axis === 'scheduler') {
    return given.every((name) => name in catalog.schedulers) ? null : () => text('samplerNames', { names: Object.keys(catalog.schedulers).join(', ') });
  }
  const { min, max } = $(FIELDS[axis] ?? axis);
  if (given.some((value) => !(value >= Number(min) && value <= Number(max)))) return () => text('range', { field, min, max });
  if (axis === 'steps' && !given.every(Number.isInteger)) return () => text('whole', { field });
  const isUnused = { weight: isBaseAlone(order), secondWeight: !order.more_adapters.length, denoise: !order.image }[axis];
  return isUnused ? () => text('noEffect', { field }) : null;
}

/** The orders to draw one after another, each with what tells its pictures apart: [order, axis], the axis null for none. */
export function ordersOf(order) {
  const name = $('axis').value;
  if (!name) return [[order, null]];
  const given = values();
  return given.map((value) => [{ ...AXES[name](order, value), compare: false }, { name, value, columns: given.length, rows: order.count }]);
}

/** A field's name without the explanation in brackets. */
function shortName(axis) {
  return text(axis).replace(/[（(].*/, '').trim();
}

export function axisChanged() {
  $('values-field').hidden = !$('axis').value;
}

/** What an axis says of a picture. */
export function axisLabel({ name, value }) {
  return `${shortName(name)} ${name === 'scheduler' ? catalog.schedulers[value] : value}`;
}
