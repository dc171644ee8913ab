// The picture that drawing starts from.
import { $ } from './dom.js';

const images = new Map(); // what this tab has uploaded, by key: { key, name, url }

export let startImage = null;

/** Starts from an uploaded image that the browser shows by this url. */
export function addStart(image) {
  images.set(image.key, image);
  chooseStart(image.key);
}

/** Starts from the image with this key, or from noise for none. */
export function chooseStart(key) {
  startImage = images.get(key) ?? null;
  $('start-image').src = startImage?.url ?? '';
  $('start-image').title = startImage?.name ?? '';
  $('start-image').hidden = $('image-clear').hidden = $('denoise-field').hidden = !startImage;
}
