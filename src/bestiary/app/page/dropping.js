// Dropping files on the page: an adapter, a picture whose settings load, or a picture to start from.
import { catalog, keyOfApplied } from './catalog.js';
import { $, showText } from './dom.js';
import { isDrawing } from './drawing.js';
import { text } from './language.js';
import { repeatOrder } from './order.js';
import { textIn } from './png.js';
import { uploadAdapter, uploadStart } from './upload.js';

let depth = 0; // of the elements that a dragged file has entered

export function connectDropping(changed) {
  const holdsFiles = (event) => event.dataTransfer?.types.includes('Files');
  const show = (by) => document.body.classList.toggle('dropping', (depth = by ? Math.max(0, depth + by) : 0) > 0);
  addEventListener('dragenter', (event) => holdsFiles(event) && show(1));
  addEventListener('dragleave', (event) => holdsFiles(event) && show(-1));
  addEventListener('dragover', (event) => holdsFiles(event) && event.preventDefault());
  addEventListener('drop', async (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault(); // the browser would open the file instead of the page
    show(0);
    if (!catalog || isDrawing()) return;
    const isStart = Boolean(event.target.closest?.('#start'));
    for (const file of [...event.dataTransfer.files]) await take(file, isStart);
    changed();
  });
}

async function take(file, isStart) {
  if (/\.safetensors$/i.test(file.name)) return uploadAdapter(file);
  if (!file.type.startsWith('image/') && !/\.(heic|heif|avif)$/i.test(file.name)) {
    return showText('message', () => text('notUsable', { name: file.name }));
  }
  const settings = isStart ? null : await settingsIn(file);
  return settings ? loadSettings(settings, file.name) : uploadStart(file);
}

/** The settings that Bestiary wrote into a picture, or null. */
async function settingsIn(file) {
  try {
    const settings = JSON.parse(textIn(await file.arrayBuffer(), 'bestiary'));
    return typeof settings.prompt === 'string' && settings.scheduler in catalog.schedulers ? settings : null;
  } catch {
    return null; // no PNG, or another program's
  }
}

function loadSettings(settings, name) {
  // In a picture that was not read by A1111's rules, brackets are no emphasis.
  const asPrompt = (words) => (settings.a1111_prompt ? words : words.replace(/[()[\]\\]/g, '\\$&'));
  const applied = settings.adapter ? [settings, ...(settings.more_adapters ?? [])] : [];
  const weights = applied.map((each) => each.weight ?? settings.adapter_weight ?? 1);
  const keys = applied.map(keyOfApplied);
  const found = keys.flatMap((key, number) => (key ? [{ adapter: key, weight: weights[number] }] : []));
  const base = catalog.bases.find((each) => settings.base.replace(/^\.\//, '').endsWith(each));
  const [first = { adapter: 'none', weight: 1 }, ...others] = found;
  repeatOrder({
    adapter: first.adapter,
    adapter_weight: first.weight,
    more_adapters: others.slice(0, 1),
    base: base && base !== catalog.bases[0] ? base : '',
    device: $('device').value,
    animal: '',
    prompt: asPrompt(settings.prompt),
    negative_prompt: asPrompt(settings.negative_prompt ?? ''),
    steps: settings.steps,
    guidance_scale: settings.guidance_scale,
    guidance_interval: settings.guidance_interval,
    scheduler: settings.scheduler,
    seed: settings.seed,
    width: settings.resolution ?? settings.width,
    height: settings.resolution ?? settings.height,
    image: '',
    denoise: settings.denoise ?? 0.5,
    compare: $('compare').checked,
  });
  $('prompt').closest('details').open = true;
  const missing = applied.filter((_, number) => !keys[number]).map(({ adapter }) => adapter).join(', ');
  const surplus = applied.filter((_, number) => keys[number]).slice(2).map(({ adapter }) => adapter).join(', ');
  showText('message');
  showText('note', () => [
    text('settingsLoaded', { name }),
    missing && text('adapterMissing', { adapters: missing }),
    surplus && text('adapterSurplus', { adapters: surplus }),
    settings.image_sha256 && text('startMissing'),
    !base && text('baseMissing', { base: settings.base }),
  ].filter(Boolean).join(' '));
}
