/**
 * SSIM: how alike two images are, from -1 to 1; 1 for equal ones.
 *
 * Wang, Bovik, Sheikh, Simoncelli 2004, IEEE TIP 13(4), equation 13: a Gaussian window of 11 x 11,
 * K1 = 0.01, K2 = 0.03, averaged over all places where it fits. `similarity.py` gives the same
 * figure; deviations are named there.
 */

const WINDOW = 11; // pixels
const SIGMA = 1.5;
const C1 = 0.01 ** 2; // for pixels in [0, 1]
const C2 = 0.03 ** 2;

/**
 * @param {ArrayLike<number>} a  flat (channels, height, width), in [0, 1]
 * @param {ArrayLike<number>} b  as `a`
 * @param {number[]} shape  channels, height, width
 * @returns {number}
 */
export function ssim(a, b, [channels, height, width]) {
  const area = height * width;
  let sum = 0;
  let count = 0;
  for (let c = 0; c < channels; c++) {
    const [x, y] = [a, b].map((all) => Float64Array.from({ length: area }, (_, i) => all[c * area + i]));
    const smooth = (values) => smoothed(values, height, width);
    const [meanX, meanY] = [smooth(x), smooth(y)];
    const [xx, yy] = [smooth(x.map((v) => v * v)), smooth(y.map((v) => v * v))];
    const xy = smooth(x.map((v, i) => v * y[i]));
    for (let i = 0; i < xy.length; i++) {
      const [m, n] = [meanX[i], meanY[i]];
      const above = (2 * m * n + C1) * (2 * (xy[i] - m * n) + C2);
      const below = (m * m + n * n + C1) * (xx[i] - m * m + (yy[i] - n * n) + C2);
      sum += above / below;
    }
    count += xy.length;
  }
  return sum / count;
}

/** @returns {Float64Array} the weights of one direction; their sum is 1 */
function windowOf(side) {
  const weights = Float64Array.from({ length: side }, (_, i) =>
    Math.exp(-((i - (side - 1) / 2) ** 2) / (2 * SIGMA ** 2)));
  const sum = weights.reduce((total, weight) => total + weight, 0);
  return weights.map((weight) => weight / sum);
}

/** @returns {Float64Array} the weighted mean around each place where the window fits */
function smoothed(values, height, width) {
  const down = windowOf(Math.min(WINDOW, height));
  const across = windowOf(Math.min(WINDOW, width));
  const rows = height - down.length + 1;
  const columns = width - across.length + 1;
  const between = new Float64Array(rows * width);
  for (let y = 0; y < rows; y++) {
    for (let x = 0; x < width; x++) {
      for (let k = 0; k < down.length; k++) between[y * width + x] += down[k] * values[(y + k) * width + x];
    }
  }
  const result = new Float64Array(rows * columns);
  for (let y = 0; y < rows; y++) {
    for (let x = 0; x < columns; x++) {
      for (let k = 0; k < across.length; k++) {
        result[y * columns + x] += across[k] * between[y * width + x + k];
      }
    }
  }
  return result;
}
