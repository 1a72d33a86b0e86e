/**
 * The drawing: strokes on a canvas, and the pixels that a model gets from it.
 *
 * A canvas pixel block of `block` x `block` becomes one pixel of the model by an exact integer sum,
 * since the browser's own resampling differs between browsers.
 */

const SIDE = 280; // canvas pixels, about
const STROKE = 1 / 12.5; // width of a stroke, in widths of the drawing: 2.2 of 28 pixels

/** Luminance as Pillow's mode "L" weighs it (ITU-R 601), in thousandths. */
const LUMINANCE = [299, 587, 114];

/**
 * Sum blocks of canvas pixels.
 * @param {Uint8ClampedArray} rgba  of a canvas, (height * block, width * block, 4), opaque
 * @param {number[]} shape  [channels, height, width] of the model's images; channels is 1 or 3
 * @param {number} block  canvas pixels on each side of one model pixel
 * @returns {Uint8Array} (channels, height, width) flat, 0..255
 */
export function sumBlocks(rgba, shape, block) {
  const [channels, height, width] = shape;
  const plane = height * width;
  const sums = [0, 1, 2].map(() => new Float64Array(plane));
  for (let y = 0, at = 0; y < height * block; y++) {
    const row = Math.floor(y / block) * width;
    for (let x = 0; x < width * block; x++, at += 4) {
      const pixel = row + Math.floor(x / block);
      for (let c = 0; c < 3; c++) sums[c][pixel] += rgba[at + c];
    }
  }
  const pixels = new Uint8Array(channels * plane);
  const area = block * block;
  for (let i = 0; i < plane; i++) {
    if (channels === 3) {
      for (let c = 0; c < 3; c++) pixels[c * plane + i] = Math.round(sums[c][i] / area);
    } else {
      const grey = LUMINANCE.reduce((sum, weight, c) => sum + weight * sums[c][i], 0);
      pixels[i] = Math.round(grey / (1000 * area));
    }
  }
  return pixels;
}

/**
 * Write model pixels into RGBA.
 * @param {ArrayLike<number>} pixels  (channels, height, width) flat, 0..255
 * @returns {ImageData}
 */
export function asImage(pixels, shape) {
  const [channels, height, width] = shape;
  const plane = height * width;
  const image = new ImageData(width, height);
  for (let i = 0; i < plane; i++) {
    for (let c = 0; c < 3; c++) {
      image.data[4 * i + c] = pixels[(channels === 3 ? c : 0) * plane + i];
    }
    image.data[4 * i + 3] = 255;
  }
  return image;
}

/** A canvas that is drawn on. `onChange` is called after each change of its pixels. */
export class Pad {
  /**
   * @param {HTMLCanvasElement} canvas
   * @param {number[]} shape  [channels, height, width]
   * @param {() => void} onChange
   */
  constructor(canvas, shape, onChange) {
    const [, height, width] = shape;
    this.canvas = canvas;
    this.shape = shape;
    this.onChange = onChange;
    this.block = Math.max(1, Math.round(SIDE / Math.max(height, width)));
    canvas.width = width * this.block;
    canvas.height = height * this.block;
    canvas.style.aspectRatio = `${width} / ${height}`;
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.strokes = []; // each {points: [x, y, width][]}
    this.under = null; // what the strokes are drawn on: a function of the context, or null
    this.cursor = null; // of the keyboard: [x, y, drawing]
    this.#listen();
    this.#redraw();
  }

  get isEmpty() {
    return !this.strokes.length && !this.under;
  }

  /** @returns {Uint8Array} (channels, height, width) flat, 0..255 */
  pixels() {
    const { width, height } = this.canvas;
    return sumBlocks(this.context.getImageData(0, 0, width, height).data, this.shape, this.block);
  }

  clear() {
    this.strokes = [];
    this.under = null;
    this.cursor = null;
    this.#changed();
  }

  /** Take back the last stroke, or else what is under them. */
  undo() {
    if (this.strokes.length) this.strokes.pop();
    else this.under = null;
    this.#changed();
  }

  invert() {
    const pixels = this.pixels().map((value) => 255 - value);
    this.show(pixels);
  }

  /** Show model pixels, (channels, height, width) flat, 0..255, in place of the drawing. */
  show(pixels) {
    this.put(pixels);
    this.onChange();
  }

  /** As `show`, without telling: for a caller that has more to change first. */
  put(pixels) {
    const small = new OffscreenCanvas(this.shape[2], this.shape[1]);
    small.getContext("2d").putImageData(asImage(pixels, this.shape), 0, 0);
    this.#lay((context) => {
      context.imageSmoothingEnabled = false;
      context.drawImage(small, 0, 0, this.canvas.width, this.canvas.height);
    });
  }

  /** Show a picture as large as it fits, its aspect kept, transparent pixels on white. */
  showImage(bitmap) {
    const { width, height } = this.canvas;
    const scale = Math.min(width / bitmap.width, height / bitmap.height);
    const [w, h] = [bitmap.width * scale, bitmap.height * scale];
    this.#lay((context) => {
      context.imageSmoothingEnabled = scale < 1; // a picture of the model's size stays as it is
      context.imageSmoothingQuality = "high";
      context.fillStyle = "#fff";
      context.fillRect((width - w) / 2, (height - h) / 2, w, h);
      context.drawImage(bitmap, (width - w) / 2, (height - h) / 2, w, h);
    });
    this.onChange();
  }

  /** Draw this under no strokes. */
  #lay(under) {
    this.strokes = [];
    this.under = under;
    this.#redraw();
  }

  #changed() {
    this.#redraw();
    this.onChange();
  }

  #redraw() {
    const { context, canvas } = this;
    context.fillStyle = "#000";
    context.fillRect(0, 0, canvas.width, canvas.height);
    this.under?.(context);
    for (const { points } of this.strokes) this.#line(points);
  }

  #line(points) {
    const { context } = this;
    context.strokeStyle = context.fillStyle = "#fff";
    context.lineCap = context.lineJoin = "round";
    const [x0, y0, w0] = points[0];
    context.beginPath();
    context.arc(x0, y0, w0 / 2, 0, 2 * Math.PI);
    context.fill();
    for (let i = 1; i < points.length; i++) {
      context.lineWidth = points[i][2];
      context.beginPath();
      context.moveTo(points[i - 1][0], points[i - 1][1]);
      context.lineTo(points[i][0], points[i][1]);
      context.stroke();
    }
  }

  #point(event) {
    const box = this.canvas.getBoundingClientRect();
    const pressed = event.pointerType === "pen" && event.pressure ? 0.6 + 0.8 * event.pressure : 1;
    return [
      ((event.clientX - box.left) * this.canvas.width) / box.width,
      ((event.clientY - box.top) * this.canvas.height) / box.height,
      this.canvas.width * STROKE * pressed,
    ];
  }

  #listen() {
    const { canvas } = this;
    let pointer = null; // the id of the one that draws
    canvas.addEventListener("pointerdown", (event) => {
      if (pointer !== null || event.button !== 0) return;
      pointer = event.pointerId;
      canvas.setPointerCapture(pointer);
      this.strokes.push({ points: [this.#point(event)] });
      this.#changed();
    });
    canvas.addEventListener("pointermove", (event) => {
      if (event.pointerId !== pointer || !this.strokes.length) return;
      const events = event.getCoalescedEvents?.() ?? [];
      const points = (events.length ? events : [event]).map((each) => this.#point(each));
      this.strokes.at(-1).points.push(...points);
      this.#changed();
    });
    for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) {
      canvas.addEventListener(end, (event) => {
        if (event.pointerId === pointer) pointer = null;
      });
    }
    canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Arrows move a pen, the space bar puts it down or up; Delete clears, Ctrl+Z takes back. */
  #key(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const step = this.canvas.width / 28;
    this.cursor ??= { x: this.canvas.width / 2, y: this.canvas.height / 4, drawing: false };
    const { cursor } = this;
    if (event.key === "Delete" || event.key === "Backspace") this.clear();
    else if (event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey)) this.undo();
    else if (event.key === " ") {
      cursor.drawing = !cursor.drawing;
      if (cursor.drawing) {
        this.strokes.push({ points: [[cursor.x, cursor.y, this.canvas.width * STROKE]] });
        this.#changed();
      }
    } else if (moves[event.key]) {
      const [dx, dy] = moves[event.key];
      cursor.x = Math.min(this.canvas.width, Math.max(0, cursor.x + dx * step));
      cursor.y = Math.min(this.canvas.height, Math.max(0, cursor.y + dy * step));
      if (cursor.drawing && this.strokes.length) {
        this.strokes.at(-1).points.push([cursor.x, cursor.y, this.canvas.width * STROKE]);
        this.#changed();
      }
    } else return;
    event.preventDefault();
  }
}
