/**
 * What an attacker sees: the image that a decoder makes again of the activations that were sent.
 *
 * The decoder gets the very tensor that went to the server, and runs in this browser.
 */

import { showPixels } from "./show.js";
import { ssim } from "./similarity.js";

const LOOK_MS = 1000; // between two looks at how far the decoder is
const TRAINING = "training";
const READY = "ready";

const TEXT = `
  <h2 id="attacker-title">What an attacker sees</h2>
  <label class="attacker-switch">
    <input id="attacker-on" type="checkbox" role="switch" aria-controls="attacker-view">
    <span>Make the image again from what is sent</span>
  </label>
  <div id="attacker-view" hidden>
    <p id="attacker-note" class="quiet" aria-live="polite"></p>
    <progress id="attacker-progress" aria-label="training of the decoder" hidden></progress>
    <div id="attacker-pair" class="attacker-pair">
      <figure>
        <canvas id="attacker-original" role="img" aria-label="the image that was sent last"></canvas>
        <figcaption class="quiet">stays here</figcaption>
      </figure>
      <figure>
        <canvas id="attacker-made" role="img" aria-label="the image made again from what was sent"></canvas>
        <figcaption class="quiet">made from what was sent</figcaption>
      </figure>
      <div class="attacker-figure">
        <output id="attacker-similarity" aria-label="similarity of the two images">–</output>
        <meter id="attacker-meter" min="0" max="1" value="0" aria-label="similarity, from 0 to 1"></meter>
        <span class="quiet">similarity (SSIM): 1 is the same image</span>
      </div>
    </div>
    <p id="attacker-about" class="note"></p>
  </div>`;

class Attacker {
  constructor(section, context) {
    this.context = context;
    this.part = (name) => section.querySelector(`#attacker-${name}`);
    this.decoder = { state: TRAINING, done: 0, of: 0, note: "" };
    this.seen = null; // what was sent last
    this.isBusy = this.isOutdated = false;
    this.isLooking = false;
    this.last = null; // {pixels, similarity}, for tests and the browser's console
  }

  get isOn() {
    return this.part("on").checked;
  }

  switched() {
    this.part("view").hidden = !this.isOn;
    if (!this.isOn) return;
    this.look().catch(this.context.tell);
    this.changed();
  }

  /** Ask how far the decoder is, until it is there. */
  async look() {
    if (this.isLooking || this.decoder.state !== TRAINING) return;
    this.isLooking = true;
    try {
      while (this.isOn && this.decoder.state === TRAINING) {
        const answer = await fetch("/decoder.json").catch(() => null);
        if (answer?.ok) this.decoder = await answer.json();
        else this.part("note").textContent = "the site does not answer";
        if (answer?.ok) this.showDecoder();
        if (this.decoder.state === TRAINING) await new Promise((done) => setTimeout(done, LOOK_MS));
      }
    } finally {
      this.isLooking = false;
    }
    this.changed();
  }

  showDecoder() {
    const { state, done, of, note } = this.decoder;
    const bar = this.part("progress");
    bar.hidden = state !== TRAINING;
    if (of) [bar.max, bar.value] = [of, done];
    if (state === TRAINING) {
      const where = of ? `step ${done} of ${of}` : "it starts";
      this.part("note").textContent = `The decoder is being trained where this page comes from: ${where}.`;
    } else if (state === READY) {
      this.part("pair").hidden = false;
      this.part("note").textContent = this.seen ? "" : NOTHING_SENT;
      this.part("about").textContent = aboutText(this.decoder, this.context.model);
    } else {
      this.part("pair").hidden = true;
      this.part("note").textContent = `This cannot be shown for this run: ${note}.`;
    }
  }

  /** Take what was sent; null: what is shown now was not, or is nothing. */
  sees(seen) {
    const hadSome = this.seen !== null;
    this.seen = seen;
    if (seen) this.changed();
    else if (hadSome) this.showNothing();
  }

  showNothing() {
    this.last = null;
    for (const name of ["original", "made"]) {
      const canvas = this.part(name);
      canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
    }
    this.part("similarity").textContent = "–";
    this.part("meter").value = 0;
    if (this.decoder.state === READY) this.part("note").textContent = NOTHING_SENT;
  }

  /** Make the image of what was sent last; what is in flight comes first. */
  async changed() {
    this.isOutdated = true;
    if (this.isBusy) return;
    this.isBusy = true;
    while (this.isOutdated && this.isOn && this.seen && this.decoder.state === READY) {
      this.isOutdated = false;
      try {
        await this.make(this.seen);
      } catch (error) {
        this.part("note").textContent = `the decoder cannot be run here: ${error.message}`;
      }
    }
    this.isBusy = false;
  }

  async make({ pixels, shape, features }) {
    const { link, data } = features[0];
    const sent = this.context.model.features.find((feature) => feature.link === link).shape;
    const session = await this.context.sessionFor("/decoder.onnx");
    const made = await session.compute(data, [1, ...sent]);
    if (!this.seen) return; // the drawing was cleared meanwhile
    const similarity = ssim(pixels, made.data, shape);
    const bytes = (values) => Array.from(values, (value) => Math.round(255 * value));
    showPixels(this.part("original"), bytes(pixels), shape);
    showPixels(this.part("made"), bytes(made.data), shape);
    this.part("similarity").textContent = similarity.toFixed(2);
    this.part("meter").value = Math.max(0, similarity);
    this.part("note").textContent = "";
    this.last = { pixels: made.data, original: pixels, features: data, similarity };
  }
}

const NOTHING_SENT = "Nothing is sent: draw something in split inference.";

/** @returns {string} what the decoder is, and what its figures mean */
function aboutText({ similarity, baseline, num_shadow: shadow, num_held_out: heldOut }, model) {
  const [found, nothing] = [similarity, baseline].map((value) => value.toFixed(2));
  return (
    `Whoever gets the activations and can use the front (its weights, or activations of images of` +
    ` their own) can train such a decoder. This one has seen ${shadow} test samples of` +
    ` ${model.dataset ?? "the data set"}, with which no client trained. On ${heldOut} others the` +
    ` similarity is ${found} on average; ${nothing} is what the mean image has, without any activations.` +
    ` The samples that this page offers are among both. The decoder runs in this page: no image is sent.`
  );
}

/**
 * @param {HTMLElement} section  where it is shown
 * @param {import("./main.js").Context} context
 */
export function mount(section, context) {
  const style = document.createElement("link");
  [style.rel, style.href] = ["stylesheet", "/attacker.css"];
  document.head.append(style);
  section.innerHTML = TEXT;
  section.setAttribute("aria-labelledby", "attacker-title");
  const attacker = new Attacker(section, context);
  context.onFeatures((seen) => {
    if (seen?.features.length > 1) return; // of several cuts, the first tells most
    attacker.sees(seen);
  });
  attacker.part("on").addEventListener("change", () => attacker.switched());
  section.attacker = attacker;
}
