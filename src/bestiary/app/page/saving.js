// Saving a picture to a file.
import { COLOURS } from './colours.js';
import { element } from './dom.js';
import { withText } from './png.js';

/** Saves a picture as PNG or JPEG, with the colours that its canvas shows. */
export async function savePicture(kind, canvas, picture, colours) {
  const href = URL.createObjectURL(await encode(kind, canvas, picture, colours));
  element('a', { href, download: fileName(kind, picture) }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10_000);
}

async function encode(kind, canvas, picture, colours) {
  const unchanged = COLOURS.every((colour) => colours[colour] === 1);
  if (kind === 'PNG' && unchanged) return picture.data; // the server's file, which carries the settings
  const data = await new Promise((resolve) => canvas.toBlob(resolve, `image/${kind.toLowerCase()}`, 0.95));
  if (kind === 'JPEG') return data;
  const settings = JSON.stringify({ ...picture.settings, ...colours }); // read by `bestiary generate --like`
  return withText(withText(data, 'bestiary', settings), 'parameters', picture.parameters);
}

function fileName(kind, { animal, role, settings: { prompt, seed } }) {
  const name = (animal || prompt).toLowerCase().replace(/[^\p{L}\p{N}]+/gu, '-').replace(/^-+|-+$/g, '').slice(0, 60) || 'picture';
  return `${name}-${seed}${role === 'base' ? '-base' : ''}.${kind === 'PNG' ? 'png' : 'jpg'}`;
}
