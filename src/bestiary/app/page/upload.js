// Uploading adapters and pictures.
import { addUpload } from './catalog.js';
import { $, showText } from './dom.js';
import { text } from './language.js';
import { request } from './requests.js';
import { addStart } from './start.js';

export async function uploadAdapter(file) {
  const offer = await upload('/api/adapters', file, 'unusable');
  if (!offer) return;
  addUpload(offer);
  const { unet = 0, text_encoder: encoder = 0 } = offer.modules;
  showText('note', () => text('uploaded', { name: offer.label, unet, encoder }));
}

export async function uploadStart(file) {
  const image = await upload('/api/images', file);
  if (!image) return;
  addStart({ ...image, url: URL.createObjectURL(file) });
  $('start').closest('details').open = true;
}

/** The file that was chosen in an input, which forgets it, so that choosing it again counts as a change. */
export function chosenFile(id) {
  const [file] = $(id).files;
  $(id).value = '';
  return file;
}

async function upload(path, file, otherRefusal) {
  showText('message');
  showText('note', () => text('uploading', { name: file.name }));
  try {
    return await (await request(`${path}?name=${encodeURIComponent(file.name)}`, { method: 'PUT', body: file })).json();
  } catch (error) {
    showText('message', () => error.words(otherRefusal));
    return null;
  } finally {
    showText('note');
  }
}
