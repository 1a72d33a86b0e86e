/** What the page shows of a prediction: class, probabilities, activation maps, bytes and times. */

import { asImage } from "./drawing.js";

const MANY = 12; // classes; more are shown with narrower bars' names
const FLAT_ROWS = 8; // of the picture of a vector

/** @param {ArrayLike<number>} logits  @returns {Float64Array} probabilities */
export function softmax(logits) {
  const most = Math.max(...logits);
  const powers = Float64Array.from(logits, (logit) => Math.exp(logit - most));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

/** @param {ArrayLike<number>} values  @returns {number} the index of the first largest */
export function argmax(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}

/** @returns {number} the largest difference of two arrays of one length */
export function largestDifference(a, b) {
  let most = 0;
  for (let i = 0; i < a.length; i++) {
    const difference = Math.abs(a[i] - b[i]);
    if (!(difference <= most)) most = difference; // NaN counts as a difference
  }
  return most;
}

/** @returns {string} such as "4.7 kB" */
export function bytesText(bytes) {
  if (bytes < 1000) return `${bytes} B`;
  if (bytes < 1e6) return `${(bytes / 1e3).toFixed(1)} kB`;
  return `${(bytes / 1e6).toFixed(1)} MB`;
}

/** @returns {string} such as "1 sample", "1,200 samples" */
export function counted(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}

/** @returns {string} such as "1.3 ms" */
export function msText(ms) {
  return ms < 100 ? `${ms.toFixed(1)} ms` : `${Math.round(ms)} ms`;
}

/** Bars of the probabilities, one for each class. */
export class Bars {
  /** @param {HTMLElement} list  @param {string[]} classes */
  constructor(list, classes) {
    const isLong = classes.length > MANY || classes.some((name) => name.length > 3);
    list.classList.toggle("long", isLong);
    this.rows = classes.map((name) => {
      const row = document.createElement("li");
      const parts = ["name", "track", "value"].map((part) => {
        const element = document.createElement("span");
        element.className = part;
        row.append(element);
        return element;
      });
      parts[0].textContent = parts[0].title = name;
      const fill = document.createElement("span");
      fill.className = "fill";
      parts[1].append(fill);
      list.append(row);
      return { row, fill, value: parts[2] };
    });
  }

  /** @param {ArrayLike<number> | null} probabilities  null: none are known */
  show(probabilities) {
    const best = probabilities ? argmax(probabilities) : -1;
    this.rows.forEach(({ row, fill, value }, i) => {
      const percent = probabilities ? 100 * probabilities[i] : 0;
      fill.style.width = `${percent.toFixed(2)}%`;
      value.textContent = probabilities ? `${percent.toFixed(1)} %` : "";
      row.toggleAttribute("data-best", i === best);
    });
  }
}

/** @param {HTMLElement} output  @param {string} name  of the class; "–": none */
export function showClass(output, name) {
  output.textContent = name;
  output.toggleAttribute("data-long", name.length > 3);
}

// A palette from dark blue to yellow whose lightness grows evenly (after viridis).
const STOPS = [
  [68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37],
];

/** @param {number} level  0..1  @returns {number[]} red, green, blue */
function coloured(level) {
  const place = Math.min(1, Math.max(0, level)) * (STOPS.length - 1);
  const low = Math.min(STOPS.length - 2, Math.floor(place));
  return STOPS[low].map((from, c) => from + (place - low) * (STOPS[low + 1][c] - from));
}

/**
 * Paint numbers as a picture.
 * @param {HTMLCanvasElement} canvas
 * @param {ArrayLike<number>} values  row by row
 * @param {number[]} range  the numbers of the darkest and the lightest colour
 */
export function paintMap(canvas, values, width, height, [least, most]) {
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
  }
  const image = new ImageData(width, height);
  const scale = most > least ? 1 / (most - least) : 0;
  for (let i = 0; i < width * height; i++) {
    const colour = i < values.length ? coloured((values[i] - least) * scale) : [128, 128, 128];
    image.data.set([...colour, 255], 4 * i);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function rangeOf(values) {
  let [least, most] = [Infinity, -Infinity];
  for (const value of values) {
    if (value < least) least = value;
    if (value > most) most = value;
  }
  return [least, most];
}

/**
 * Show cut tensors as pictures: each channel of maps, or a vector in rows.
 * @param {HTMLElement} place
 * @param {import("./predict.js").Feature[]} features
 */
export function showMaps(place, features) {
  const wanted = features.flatMap(({ link, maps, data }) => {
    const range = rangeOf(data);
    if (maps.length === 3) {
      const [channels, height, width] = maps;
      return Array.from({ length: channels }, (_, c) => ({
        name: `cut ${link}, channel ${c}`,
        values: data.subarray(c * height * width, (c + 1) * height * width),
        width, height, range,
      }));
    }
    const width = Math.ceil(data.length / FLAT_ROWS);
    const height = Math.ceil(data.length / width);
    return [{ name: `cut ${link}, ${data.length} numbers`, values: data, width, height, range }];
  });
  const canvases = place.querySelectorAll("canvas");
  place.classList.toggle("flat", features.every(({ maps }) => maps.length !== 3));
  for (let i = wanted.length; i < canvases.length; i++) canvases[i].remove();
  wanted.forEach(({ name, values, width, height, range }, i) => {
    const canvas = canvases[i] ?? place.appendChild(document.createElement("canvas"));
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", name);
    canvas.title = name;
    paintMap(canvas, values, width, height, range);
  });
}

/** Show model pixels, (channels, height, width) flat, 0..255, on a canvas of their size. */
export function showPixels(canvas, pixels, shape) {
  [canvas.height, canvas.width] = [shape[1], shape[2]];
  canvas.getContext("2d").putImageData(asImage(pixels, shape), 0, 0);
}

/**
 * Show where the time went.
 * @param {HTMLElement} place
 * @param {{front: number, way: number, back: number}} times  in ms
 */
export function showTimes(place, times) {
  const sum = Object.values(times).reduce((a, b) => a + b, 0) || 1;
  const parts = Object.entries(times).map(([name, ms]) => {
    const part = document.createElement("span");
    part.className = name;
    part.style.width = `${(100 * ms) / sum}%`;
    return part;
  });
  place.replaceChildren(...parts);
}
