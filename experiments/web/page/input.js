/** What is predicted: a drawing, a picture, or a sample of the run's data set. */

import { Pad } from "./drawing.js";
import { scaled } from "./normalise.js";
import { showPixels } from "./show.js";

const MOST_PICTURE_BYTES = 50e6;

/** Whether a sample of this shape can be drawn and shown. */
export function isImage(shape) {
  return shape.length === 3 && (shape[0] === 1 || shape[0] === 3);
}

export class Input {
  /**
   * @param {object} model  what /model.json gives
   * @param {(id: string) => HTMLElement} element
   * @param {() => void} onChange  the sample is another one
   * @param {(error: Error) => void} onError
   */
  constructor(model, element, onChange, onError) {
    this.model = model;
    this.element = element;
    this.onChange = onChange;
    this.onError = onError;
    this.sample = null; // {values, label} of the data set, unless it was drawn on
    this.asked = 0; // counts what was taken or drawn: what arrives late is dropped
    this.shape = model.input_shape;
    this.isImage = isImage(this.shape);
    if (this.isImage) {
      this.pad = new Pad(element("pad"), this.shape, () => this.#drawn());
    } else {
      element("pad").parentElement.hidden = true;
      for (const id of ["clear", "undo", "invert", "pick"]) element(id).hidden = true;
      element("seen").parentElement.hidden = true;
      element("input-title").textContent = "A sample";
    }
    element("sample").hidden = !model.num_samples;
    this.#listen();
    this.#show();
  }

  get isEmpty() {
    return this.sample === null && (!this.pad || this.pad.isEmpty);
  }

  /** The known class of a sample of the data set, or null. */
  get label() {
    return this.sample?.label ?? null;
  }

  /** @returns {Float32Array} flat, of `input_shape`, before normalisation; of images in [0, 1] */
  values() {
    if (this.sample) return this.sample.values;
    if (!this.pad) return new Float32Array(this.shape.reduce((a, b) => a * b, 1));
    return scaled(this.pad.pixels());
  }

  /** Take a sample of the run's test set; by default any. */
  async takeSample(index = Math.floor(Math.random() * Math.max(1, this.model.num_samples))) {
    const asked = ++this.asked;
    const answer = await fetch(`/sample?index=${index}`);
    if (!answer.ok) throw new Error(`no sample: ${(await answer.text()).slice(0, 300)}`);
    const { label, pixels, bytes: isBytes } = await answer.json();
    if (asked !== this.asked) return; // something else was taken or drawn meanwhile
    this.pad?.put(isBytes ? pixels : stretched(pixels));
    const values = isBytes ? scaled(pixels) : Float32Array.from(pixels);
    this.sample = { values, label, index };
    this.#show();
    this.onChange();
  }

  /** Take a picture of the user's own. */
  async takePicture(file) {
    if (file.size > MOST_PICTURE_BYTES) throw new Error(`${file.name} has more than 50 MB`);
    const options = { imageOrientation: "from-image", premultiplyAlpha: "none" };
    const asked = ++this.asked;
    const bitmap = await createImageBitmap(file, options).catch(() => {
      throw new Error(`${file.name} is no picture that this browser can read`);
    });
    if (asked === this.asked) this.pad.showImage(bitmap);
    bitmap.close();
  }

  #drawn() {
    this.asked++;
    this.sample = null;
    this.#show();
    this.onChange();
  }

  #show() {
    const { element } = this;
    if (this.pad) {
      showPixels(element("seen"), this.pad.pixels(), this.shape);
      element("pad").parentElement.toggleAttribute("data-empty", this.isEmpty);
    }
    const { label } = this;
    const isKnown = label !== null && label !== undefined && label !== -1;
    element("truth").hidden = !isKnown;
    const name = this.model.classes[label] ?? label;
    element("truth").textContent = isKnown ? `test sample ${this.sample.index}: it is ${name}` : "";
  }

  #listen() {
    const { element } = this;
    element("sample").addEventListener("click", () => this.takeSample().catch(this.onError));
    if (!this.pad) return;
    element("clear").addEventListener("click", () => this.pad.clear());
    element("undo").addEventListener("click", () => this.pad.undo());
    element("invert").addEventListener("click", () => this.pad.invert());
    element("pick").addEventListener("click", () => element("file").click());
    element("file").addEventListener("change", () => {
      const [file] = element("file").files;
      element("file").value = "";
      if (file) this.takePicture(file).catch(this.onError);
    });
  }
}

/** @returns {number[]} numbers of any range as 0..255, to look at */
function stretched(values) {
  const [least, most] = [Math.min(...values), Math.max(...values)];
  return values.map((value) => (255 * (value - least)) / (most - least || 1));
}
