// Pixels as models take them.

/**
 * Normalise a sample's pixels as training does, in float32.
 * @param {Float32Array} values  flat; of images in [0, 1]
 * @param {{input_shape: number[], mean: number[], std: number[]}} known  of the model: one figure,
 *   or one for each channel
 */
export function normalised(values, { input_shape: shape, mean, std }) {
  const plane = shape.slice(1).reduce((a, b) => a * b, 1);
  const of = (figures, i) =>
    Math.fround(figures.length === 1 ? figures[0] : figures[Math.floor(i / plane)]);
  return values.map((value, i) => Math.fround(value - of(mean, i)) / of(std, i));
}

/** @param {ArrayLike<number>} pixels 0..255  @returns {Float32Array} in [0, 1] */
export function scaled(pixels) {
  return Float32Array.from(pixels, (pixel) => pixel / 255);
}
