// The gallery: what this tab has drawn. An entry is {order, set, pictures, colours, card}: its second picture is the
// base's, and its set are the entries of one order.
import { adapterNames } from './catalog.js';
import { UNCHANGED } from './colours.js';
import { $, element } from './dom.js';
import { text } from './language.js';

const MAX_ENTRIES = 200; // the oldest is dropped, so that the tab's memory stays flat

const entries = [];

/** Adds a picture to the gallery: the adapter's starts an entry of the set, the base's joins the last entry. */
export function addPicture({ image, ...rest }, order, set) { // rest: role, settings, parameters, animal, device
  const picture = { data: pngOf(image), ...rest };
  let entry = set.at(-1);
  if (picture.role === 'base') {
    entry.pictures.push(picture);
  } else {
    entry = { order: { ...order, seed: picture.settings.seed }, set, pictures: [picture], colours: { ...UNCHANGED }, card: element('li') };
    entries.push(entry);
    set.push(entry);
    $('gallery').prepend(entry.card);
    $('gallery-section').hidden = false;
    if (entries.length > MAX_ENTRIES) drop(entries.shift());
  }
  fillCard(entry);
  return entry;
}

/** The entry whose card holds the node. */
export function entryAt(node) {
  return entries.find(({ card }) => card.contains(node));
}

/** Words every card again, after the language has changed. */
export function translateCards() {
  for (const { card, pictures } of entries) card.querySelector('.by').textContent = drawnBy(pictures[0]);
}

function pngOf(dataUri) {
  const bytes = Uint8Array.from(atob(dataUri.split(',')[1]), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: 'image/png' });
}

function fillCard({ card, pictures }) {
  releaseImages(card);
  const { settings, animal } = pictures[0];
  const images = pictures.map(({ data }) => element('img', { src: URL.createObjectURL(data), alt: '' }));
  card.replaceChildren(element('button', { type: 'button' },
    element('span', { className: 'thumbs' }, ...images),
    element('span', { className: 'name', textContent: animal || settings.prompt }),
    element('span', { className: 'by', textContent: drawnBy(pictures[0]) })));
}

function drawnBy({ settings }) {
  return `${adapterNames(settings).join(' + ') || text('baseOnly')} · ${settings.seed}`;
}

function drop({ card, set }) {
  set.shift();
  releaseImages(card);
  card.remove();
}

function releaseImages(card) {
  for (const image of card.querySelectorAll('img')) URL.revokeObjectURL(image.src);
}
