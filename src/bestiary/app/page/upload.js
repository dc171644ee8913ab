// Uploading an adapter.
import { addUpload } from './catalog.js';
import { $, showText } from './dom.js';
import { text } from './language.js';
import { request } from './requests.js';

export async function uploadAdapter() {
  const [file] = $('upload').files;
  $('upload').value = ''; // so that choosing the same file again counts as a change
  if (!file) return;
  showText('message');
  showText('note', () => text('uploading', { name: file.name }));
  try {
    const response = await request(`/api/adapters?name=${encodeURIComponent(file.name)}`, { method: 'PUT', body: file });
    const offer = await response.json();
    addUpload(offer);
    const { unet = 0, text_encoder: encoder = 0 } = offer.modules;
    showText('note', () => text('uploaded', { name: offer.label, unet, encoder }));
    return;
  } catch (error) {
    showText('message', () => error.words('unusable'));
  }
  showText('note');
}
