import { TEXTS } from './texts.js';

const $ = (id) => document.getElementById(id);
const COLOURS = ['contrast', 'saturation', 'brightness'];
const USUAL = { steps: 'steps', guidance: 'guidance_scale', scheduler: 'scheduler', resolution: 'resolution' }; // by their fields
const LARGEST_GALLERY = 200; // drawings; the oldest makes room, so that the tab's memory stays flat

let language = localStorage.getItem('language')
  ?? ((navigator.languages ?? [navigator.language]).find((tag) => /^(zh|en)/i.test(tag)) ?? 'en').slice(0, 2).toLowerCase();
let catalog = null;
let uploads = [];
let usual = null; // how the chosen adapter is drawn unless somebody says otherwise
let running = null; // the AbortController of the drawing in progress
let shown = null; // the gallery's entry on the stage
const gallery = [];

// ---- words ----

function text(key, values = {}) {
  return TEXTS[language][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key in made) made[key] = value; else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function speak() {
  document.documentElement.lang = language === 'zh' ? 'zh-CN' : 'en';
  for (const spoken of document.querySelectorAll('[data-text]')) spoken.textContent = text(spoken.dataset.text);
  for (const spoken of document.querySelectorAll('[data-placeholder]')) spoken.placeholder = text(spoken.dataset.placeholder);
  $('animal').placeholder = text('animalHint');
  $('language').textContent = text('other');
  if (usual) {
    fillChoices();
    adapterChosen();
  }
  if (shown) show(shown);
}

function duration(seconds) {
  return seconds < 90 ? text('seconds', { n: Math.max(1, Math.round(seconds)) }) : text('minutes', { n: Math.round(seconds / 60) });
}

function say(id, words) {
  $(id).textContent = words ?? '';
  $(id).hidden = !words;
}

// ---- what there is ----

function choose(id, options) {
  const before = $(id).value;
  $(id).replaceChildren(...options.map(([value, label]) => element('option', { value, textContent: label })));
  if (options.some(([value]) => String(value) === before)) $(id).value = before;
}

function gains({ scores }) {
  return Object.entries(scores).map(([score, gain]) => {
    const signed = `${gain > 0 ? '+' : '−'}${Math.abs(gain).toFixed(1)}`;
    return `${text(score)} ${signed}${score === 'top1' ? ' %' : ''}`;
  });
}

function adapterLabel(offer) {
  return [offer.label, ...offer.aliases.map((alias) => TEXTS[language][alias] ?? alias), ...gains(offer)].join(' · ');
}

/** What follows from the chosen adapter: its scores, below the list, which cuts long lines off; how it is usually drawn. */
function adapterChosen() {
  const offer = catalog.adapters.find(({ key }) => key === $('adapter').value);
  say('scores', offer && gains(offer).length ? text('gains', { gains: gains(offer).join(' · ') }) : '');
  const before = usual;
  usual = { ...(offer?.usual ?? catalog.usual) };
  if (!catalog.resolutions.includes(usual.resolution)) usual.resolution = catalog.usual.resolution;
  for (const [id, key] of Object.entries(USUAL)) {
    if (!before || $(id).value === String(before[key])) $(id).value = usual[key]; // what somebody has set stays
  }
  $('interval-label').hidden = !usual.guidance_interval;
  if (usual.guidance_interval) $('interval-text').textContent = interval(usual.guidance_interval);
}

function interval([low, high]) {
  return text('interval', { low, high });
}

function fillChoices() {
  const adapters = [...catalog.adapters, ...uploads].map((offer) => [offer.key, adapterLabel(offer)]);
  choose('adapter', [...adapters, ['none', text('noAdapter')]]);
  choose('resolution', catalog.resolutions.map((side) =>
    [side, side === catalog.usual.resolution ? text('own', { side }) : `${side} px`]));
  choose('scheduler', Object.entries(catalog.schedulers));
  choose('base', [['', text('ownBase')], ...catalog.bases.map((base) => [base, base])]);
  choose('device', catalog.devices.map((device) => [device, device.toUpperCase()]));
  $('device').disabled = catalog.devices.length < 2;
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    throw error.name === 'AbortError' ? error : new Error(text('unreachable'));
  }
  if (response.ok) return response;
  if (response.status === 401) throw new Error(text('locked'));
  const answer = await response.json().catch(() => ({}));
  throw new Error(answer.message ? refused(answer) : text('failed'));
}

function refused({ message, key, values }) {
  return key in TEXTS[language] ? text(key, values) : text('told', { message });
}

// ---- the list of animals ----

const list = $('animals');

function matches(wanted) {
  const word = wanted.trim().toLowerCase();
  const rank = ({ name, chinese, folder }) =>
    [name, chinese, folder].some((part) => part.startsWith(word)) ? 0
      : [name, chinese, folder].some((part) => part.includes(word)) ? 1 : 2;
  return catalog.animals.map((animal) => [rank(animal), animal]).filter(([place]) => place < 2)
    .sort(([a], [b]) => a - b).map(([, animal]) => animal);
}

function openList(everything = false) {
  if (!catalog) return;
  const found = matches(everything ? '' : $('animal').value);
  list.replaceChildren(...found.map((animal, number) => {
    const [first, second] = language === 'zh' ? [animal.chinese, animal.name] : [animal.name, animal.chinese];
    return element('li', { role: 'option', id: `animal-${number}`, 'data-name': first, 'aria-selected': 'false' },
      element('span', { textContent: first }), element('span', { className: 'other', textContent: second }));
  }));
  if (!found.length) list.replaceChildren(element('li', { className: 'nothing', textContent: text('nothing') }));
  list.hidden = false;
  $('animal').setAttribute('aria-expanded', 'true');
  $('animal').removeAttribute('aria-activedescendant');
}

function closeList() {
  list.hidden = true;
  $('animal').setAttribute('aria-expanded', 'false');
  $('animal').removeAttribute('aria-activedescendant');
}

function move(by) {
  const options = [...list.querySelectorAll('[role=option]')];
  if (!options.length) return;
  const active = options.findIndex((option) => option.getAttribute('aria-selected') === 'true');
  const next = active < 0 ? (by > 0 ? 0 : options.length - 1) : (active + by + options.length) % options.length;
  options.forEach((option, number) => option.setAttribute('aria-selected', String(number === next)));
  options[next].scrollIntoView({ block: 'nearest' });
  $('animal').setAttribute('aria-activedescendant', options[next].id);
}

$('animal').addEventListener('input', () => openList());
$('animal').addEventListener('click', () => openList(true));
$('animal').addEventListener('blur', closeList);
$('animal').addEventListener('keydown', (event) => {
  if (event.isComposing) return; // Enter belongs to the Chinese input method
  const active = list.hidden ? null : list.querySelector('[aria-selected=true]');
  if (event.key === 'ArrowDown' || event.key === 'ArrowUp') {
    if (list.hidden) openList(true);
    move(event.key === 'ArrowDown' ? 1 : -1);
    event.preventDefault();
  } else if (event.key === 'Enter' && active) {
    $('animal').value = active.dataset.name;
    closeList();
    event.preventDefault();
  } else if (event.key === 'Escape' && !list.hidden) {
    closeList();
    event.stopPropagation();
  }
});
list.addEventListener('mousedown', (event) => event.preventDefault()); // the field keeps the focus
list.addEventListener('click', (event) => {
  const option = event.target.closest('[role=option]');
  if (!option) return;
  $('animal').value = option.dataset.name;
  closeList();
});

// ---- an order ----

function wrongField() {
  for (const [id, max] of [['animal', 200], ['prompt', 1000]]) {
    if ([...$(id).value].length > max) return [id, text('long', { field: text(id), max })];
  }
  for (const id of ['seed', 'count', 'steps', 'guidance']) {
    const { validity, min, max } = $(id);
    const field = text(id);
    if ($(id).value === '' || validity.rangeUnderflow || validity.rangeOverflow || validity.badInput) return [id, text('range', { field, min, max })];
    if (validity.stepMismatch && id !== 'guidance') return [id, text('whole', { field })];
  }
  return null;
}

function readOrder() {
  return {
    adapter: $('adapter').value,
    base: $('base').value,
    device: $('device').value,
    animal: $('animal').value,
    prompt: $('prompt').value,
    steps: Number($('steps').value),
    guidance_scale: Number($('guidance').value),
    guidance_interval: usual.guidance_interval && $('interval').checked ? usual.guidance_interval : null,
    scheduler: $('scheduler').value,
    seed: Number($('seed').value),
    count: Number($('count').value),
    resolution: Number($('resolution').value),
    compare: $('compare').checked && $('adapter').value !== 'none',
    preview: $('preview').checked,
  };
}

function busy(controller) {
  running = controller;
  $('controls').disabled = $('draw').hidden = Boolean(controller);
  $('cancel').hidden = $('status').hidden = !controller;
}

async function draw(event) {
  event.preventDefault();
  if (running || !catalog) return;
  closeList();
  say('message');
  say('note');
  if ($('random').checked) $('seed').value = crypto.getRandomValues(new Uint32Array(1))[0];
  const wrong = wrongField() ?? (($('animal').value + $('prompt').value).trim() ? null : ['animal', text('missing')]);
  if (wrong) {
    say('message', wrong[1]);
    $(wrong[0]).focus();
    return;
  }
  const order = readOrder();
  busy(new AbortController());
  $('cancel').focus();
  $('progress').removeAttribute('value');
  $('status-text').textContent = text('starting');
  if (matchMedia('(max-width: 760px)').matches) $('stage').scrollIntoView({ behavior: 'smooth' });
  const started = performance.now();
  try {
    const response = await ask('/api/draw', {
      method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(order), signal: running.signal,
    });
    await follow(response.body, order);
    say('note', [$('note').textContent, text('done', { time: duration((performance.now() - started) / 1000) })].join(' ').trim());
  } catch (error) {
    if (error.name === 'AbortError') say('note', text('cancelled'));
    else say('message', error.message);
    show(shown);
  }
  busy(null);
  $('draw').focus({ preventScroll: true });
}

async function follow(body, order) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  let entry = null;
  let finished = false;
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === 'AbortError' ? error : new Error(text('unreachable'));
    });
    if (done) break;
    const lines = (rest + value).split('\n');
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      if (event.event === 'error') throw new Error(refused(event));
      if (event.event === 'picture') entry = await keep(event, order, entry);
      finished ||= event.event === 'done';
      told(event, order, entry);
    }
  }
  if (!finished) throw new Error(text('unreachable'));
}

function told(event, order, entry) {
  if (event.event === 'waiting') $('status-text').textContent = text('waiting', event);
  if (event.event === 'loading') $('status-text').textContent = text('loading');
  if (event.event === 'progress') {
    $('progress').value = event.done / event.total;
    $('status-text').textContent = text('drawing', { ...event, left: duration(event.seconds_left) });
  }
  if (event.event === 'note') {
    const near = event.near.length ? text('near', { names: event.near.join(text('or')) }) : '';
    say('note', [text('unknown', { name: event.unknown }), near].join(' '));
  }
  if (event.event === 'preview') forming(event, order, entry);
}

function forming({ role, image }, order, entry) {
  let figure = document.querySelector(`#pictures .forming[data-role=${role}]`);
  if (!figure) {
    const first = role === 'adapter'; // the base follows its adapter
    figure = element('figure', { className: 'forming', 'data-role': role }, element('img', { alt: '' }), element('figcaption', { textContent: roleName(role, order) }));
    if (first) { $('pictures').replaceChildren(figure); $('tools').hidden = true; } else {
      $('pictures').append(figure);
    }
  }
  figure.querySelector('img').src = image;
}

function roleName(role, order) {
  return text(role === 'base' || order.adapter === 'none' ? 'baseAlone' : 'withAdapter');
}

// ---- pictures ----

async function keep({ role, image, ...made }, order, entry) { // made: settings, parameters, animal, device
  const data = new Blob([Uint8Array.from(atob(image.split(',')[1]), (byte) => byte.charCodeAt(0))], { type: 'image/png' });
  const picture = { role, data, ...made };
  if (role === 'adapter') {
    entry = { order: { ...order, seed: made.settings.seed }, pictures: [picture], colours: { contrast: 1, saturation: 1, brightness: 1 } };
    gallery.push(entry);
    if (gallery.length > LARGEST_GALLERY) forget(gallery.shift());
  } else {
    entry.pictures.push(picture);
  }
  await thumbnail(entry);
  await show(entry);
  return entry;
}

function forget(entry) {
  for (const image of entry.card.querySelectorAll('img')) URL.revokeObjectURL(image.src);
  entry.card.remove();
}

function summary({ settings, animal }) {
  return `${animal || settings.prompt} · ${settings.seed}`;
}

async function thumbnail(entry) {
  const images = entry.pictures.map(({ data }) => element('img', { src: URL.createObjectURL(data), alt: '' }));
  const button = element('button', { type: 'button', onclick: () => { if (!running) show(entry).then(() => $('stage').scrollIntoView({ behavior: 'smooth', block: 'nearest' })); } },
    element('span', { className: 'thumbs' }, ...images), element('span', { className: 'name', textContent: summary(entry.pictures[0]) }));
  if (entry.card) { for (const image of entry.card.querySelectorAll('img')) URL.revokeObjectURL(image.src); entry.card.replaceChildren(button); } else {
    entry.card = element('li', {}, button);
    $('gallery').prepend(entry.card);
  }
  $('gallery-section').hidden = false;
}

async function show(entry) {
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
  colour();
  const { settings, device } = entry.pictures[0];
  const rows = [
    ['prompt', settings.prompt], ['seed', settings.seed], ['steps', settings.steps],
    ['guidance', [settings.guidance_scale, ...(settings.guidance_interval ? [interval(settings.guidance_interval).toLowerCase()] : [])].join(', ')],
    ['scheduler', catalog.schedulers[settings.scheduler]], ['resolution', `${settings.resolution} px`],
    ['adapter', settings.adapter ?? text('noAdapter')], ['base', settings.base], ['device', device.toUpperCase()],
  ];
  $('settings').replaceChildren(...rows.map(([key, value]) =>
    element('div', {}, element('dt', { textContent: text(key) }), element('dd', { textContent: value }))));
}

async function figureOf(picture, entry) {
  const bitmap = await createImageBitmap(picture.data);
  const canvas = element('canvas', { width: bitmap.width, height: bitmap.height, role: 'img', 'aria-label': picture.settings.prompt });
  const context = canvas.getContext('2d', { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  canvas.original = context.getImageData(0, 0, canvas.width, canvas.height);
  const save = (kind) => element('button', { type: 'button', className: 'quiet', textContent: text('save', { kind }), onclick: () => saveAs(kind, canvas, picture) });
  return element('figure', { 'data-role': picture.role }, canvas,
    element('figcaption', {}, element('span', { textContent: roleName(picture.role, entry.order) }), save('PNG'), save('JPEG')));
}

function colour() {
  const values = COLOURS.map((id) => Number($(id).value));
  COLOURS.forEach((id, number) => {
    document.querySelector(`output[for=${id}]`).value = values[number].toFixed(2);
    shown.colours[id] = values[number];
  });
  for (const canvas of document.querySelectorAll('#pictures canvas')) {
    canvas.getContext('2d').putImageData(adjusted(canvas.original, ...values), 0, 0);
  }
}

/** Contrast, then saturation, then brightness, as Pillow's ImageEnhance gives them. */
export function adjusted(original, contrast, saturation, brightness) {
  const from = original.data;
  const result = new ImageData(original.width, original.height);
  const to = result.data; // Uint8ClampedArray: rounds and clips
  const clip = (level) => Math.min(255, Math.max(0, level));
  let grey = 0;
  for (let i = 0; i < from.length; i += 4) grey += 0.299 * from[i] + 0.587 * from[i + 1] + 0.114 * from[i + 2];
  grey = Math.round(grey / (from.length / 4));
  for (let i = 0; i < from.length; i += 4) {
    const red = clip(grey + contrast * (from[i] - grey));
    const green = clip(grey + contrast * (from[i + 1] - grey));
    const blue = clip(grey + contrast * (from[i + 2] - grey));
    const light = 0.299 * red + 0.587 * green + 0.114 * blue;
    to[i] = brightness * clip(light + saturation * (red - light));
    to[i + 1] = brightness * clip(light + saturation * (green - light));
    to[i + 2] = brightness * clip(light + saturation * (blue - light));
    to[i + 3] = from[i + 3];
  }
  return result;
}

async function saveAs(kind, canvas, picture) {
  let data = picture.data; // as it was drawn, with its settings inside
  const coloured = COLOURS.some((id) => Number($(id).value) !== 1);
  if (kind === 'JPEG' || coloured) data = await new Promise((resolve) => canvas.toBlob(resolve, `image/${kind.toLowerCase()}`, 0.95));
  if (kind === 'PNG' && coloured) {
    data = withText(data, 'bestiary', JSON.stringify({ ...picture.settings, ...shown.colours })); // for `generate --like`
    data = withText(data, 'parameters', picture.parameters);
  }
  const { prompt, seed } = picture.settings;
  const name = (picture.animal || prompt).toLowerCase().replace(/[^\p{L}\p{N}]+/gu, '-').replace(/^-+|-+$/g, '').slice(0, 60) || 'picture';
  const href = URL.createObjectURL(data);
  element('a', { href, download: `${name}-${seed}${picture.role === 'base' ? '-base' : ''}.${kind === 'PNG' ? 'png' : 'jpg'}` }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10_000);
}

/** `png` with an international text chunk behind its header (PNG specification, 11.3.3). */
function withText(png, keyword, words) {
  const body = new TextEncoder().encode(`iTXt${keyword}\0\0\0\0\0${words}`);
  const number = (value) => { const bytes = new DataView(new ArrayBuffer(4)); bytes.setUint32(0, value); return bytes; };
  const header = 8 + 25; // the signature and IHDR
  return new Blob([png.slice(0, header), number(body.length - 4), body, number(crc32(body)), png.slice(header)], { type: 'image/png' });
}

function crc32(bytes) {
  let crc = -1;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}

// ---- the page's own buttons ----

async function uploadAdapter() {
  const [file] = $('upload').files;
  $('upload').value = '';
  if (!file) return;
  say('message');
  say('note', text('uploading', { name: file.name }));
  try {
    const response = await ask(`/api/adapters?name=${encodeURIComponent(file.name)}`, { method: 'PUT', body: file });
    const offer = await response.json();
    uploads.push(offer);
    fillChoices();
    $('adapter').value = offer.key;
    adapterChosen();
    say('note');
  } catch (error) {
    say('note');
    say('message', error.message);
  }
}

function reuse() {
  const { order } = shown;
  $('adapter').value = order.adapter;
  adapterChosen();
  for (const id of ['base', 'device', 'animal', 'prompt', 'steps', 'scheduler', 'seed', 'resolution']) $(id).value = order[id];
  $('interval').checked = Boolean(order.guidance_interval);
  $('guidance').value = order.guidance_scale;
  $('compare').checked = order.compare || order.adapter === 'none';
  $('random').checked = false;
  $('animal').focus();
}

$('order').addEventListener('submit', draw);
$('cancel').addEventListener('click', () => running?.abort());
document.addEventListener('keydown', (event) => {
  if (event.key === 'Escape' && !event.isComposing) running?.abort();
});
$('language').addEventListener('click', () => {
  language = language === 'en' ? 'zh' : 'en';
  localStorage.setItem('language', language);
  speak();
});
$('adapter').addEventListener('change', adapterChosen);
$('upload').addEventListener('change', uploadAdapter);
$('upload-label').addEventListener('keydown', (event) => {
  if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); $('upload').click(); }
});
$('seed').addEventListener('input', () => { $('random').checked = false; });
for (const id of COLOURS) $(id).addEventListener('input', colour);
$('reset').addEventListener('click', () => { for (const id of COLOURS) $(id).value = 1; colour(); });
$('reuse').addEventListener('click', reuse);

speak();
try {
  catalog = await (await ask('/api/catalog')).json();
  fillChoices();
  $('adapter').value = catalog.adapter;
  adapterChosen();
  document.body.classList.add('ready');
} catch (error) {
  say('message', error.message);
}
