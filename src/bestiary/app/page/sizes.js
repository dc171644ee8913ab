// The sizes of pictures that are not square.

/** Width by height of each shape on offer. */
export const SHAPES = { '1:1': 1, '3:2': 3 / 2, '2:3': 2 / 3, '16:9': 16 / 9, '9:16': 9 / 16 };

const STEP = 8; // pixels

/** [width, height] of a picture of this shape with no more pixels than the square of this side has, or the size that the shape names: '500x333'. */
export function sizeOf(side, shape) {
  if (!(shape in SHAPES)) return shape.split('x').map(Number); // a size of its own, from a picture's settings
  if (shape === '1:1') return [side, side];
  const stretch = Math.sqrt(SHAPES[shape]);
  return [side * stretch, side / stretch].map((length) => Math.floor(length / STEP) * STEP);
}
