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

const GAP = 8; // pixels
const FONT = '16px sans-serif';

/** Saves pictures as one PNG: a column for each label, a row for each seed. `cells` go down the columns. */
export async function saveGrid(cells, rows) {
  const [{ canvas: { width, height }, pictures: [first] }] = cells;
  const left = rows > 1 ? 140 : GAP;
  const columns = Math.ceil(cells.length / rows);
  const sheet = element('canvas', { width: left + columns * (width + GAP), height: 40 + rows * (height + GAP) });
  const context = sheet.getContext('2d');
  context.fillStyle = 'white';
  context.fillRect(0, 0, sheet.width, sheet.height);
  Object.assign(context, { fillStyle: 'black', font: FONT, textBaseline: 'middle' });
  cells.forEach(({ canvas, label, pictures }, number) => {
    const [x, y] = [left + Math.floor(number / rows) * (width + GAP), 40 + (number % rows) * (height + GAP)];
    context.drawImage(canvas, x, y);
    if (number % rows === 0) context.fillText(label, x, 20, width);
    if (rows > 1 && number < rows) context.fillText(pictures[0].settings.seed, GAP, y + height / 2, left - 2 * GAP);
  });
  const png = await new Promise((resolve) => sheet.toBlob(resolve, 'image/png'));
  const href = URL.createObjectURL(withText(png, 'parameters', first.parameters));
  element('a', { href, download: fileName('PNG', first).replace(/\.png$/, '-grid.png') }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10_000);
}
