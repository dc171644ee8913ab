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
    addUpload(await response.json());
  } catch (error) {
    showText('message', () => error.words('unusable'));
  }
  showText('note');
}
