// Contrast, saturation and brightness.

export const COLOURS = ['contrast', 'saturation', 'brightness']; // in the order in which they are applied
export const UNCHANGED = { contrast: 1, saturation: 1, brightness: 1 };

/** A copy of the ImageData with the colours applied, by the formulas of Pillow's ImageEnhance. */
export function withColours(original, { contrast, saturation, brightness }) {
  const from = original.data;
  const result = new ImageData(original.width, original.height);
  const to = result.data; // Uint8ClampedArray: rounds and clips
  const clip = (level) => Math.min(255, Math.max(0, level));
  let grey = 0;
  for (let i = 0; i < from.length; i += 4) grey += luminance(from[i], from[i + 1], from[i + 2]);
  grey = Math.round(grey / (from.length / 4));
  for (let i = 0; i < from.length; i += 4) {
    const red = clip(grey + contrast * (from[i] - grey));
    const green = clip(grey + contrast * (from[i + 1] - grey));
    const blue = clip(grey + contrast * (from[i + 2] - grey));
    const light = luminance(red, green, blue);
    to[i] = brightness * clip(light + saturation * (red - light));
    to[i + 1] = brightness * clip(light + saturation * (green - light));
    to[i + 2] = brightness * clip(light + saturation * (blue - light));
    to[i + 3] = from[i + 3];
  }
  return result;
}

function luminance(red, green, blue) {
  return 0.299 * red + 0.587 * green + 0.114 * blue;
}
