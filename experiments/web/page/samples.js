// A client's samples, which stay in this page: divided, normalised, counted.

import { TrainingError } from "./asking.js";
import { normalised, scaled } from "./normalise.js";

/**
 * One part of the samples: pixels as bytes, and labels.
 * @typedef {{pixels: Uint8Array, labels: number[]}} Part
 */

/** A client's samples: which are trained on, and how batches are made of them. */
export class Samples {
  /**
   * @param {object} plan
   * @param {{train: Part, validation?: Part, test?: Part, classes?: string[]}} given without a
   *   validation part, a fifth is held out, as a Python client does with its own data
   */
  constructor(plan, given) {
    this.plan = plan;
    this.size = plan.input_shape.reduce((product, side) => product * side, 1);
    this.classes = given.classes ?? plan.classes;
    this.given = given;
    for (const part of ["train", "validation", "test"]) {
      if (given[part] || part === "train") this.check(part, given[part]);
    }
    if (!given.train.labels.length) throw new TrainingError("there are no samples to train on");
    if (given.train.labels.length > plan.most_samples) {
      throw new TrainingError(`more than ${plan.most_samples.toLocaleString("en")} samples`);
    }
  }

  /** @throws {TrainingError} a part has another layout */
  check(name, part) {
    const { pixels, labels } = part ?? {};
    if (!(pixels instanceof Uint8Array) || !Array.isArray(labels)) {
      throw new TrainingError(`${name}: give {pixels: a Uint8Array, labels: an array of numbers}`);
    }
    const wanted = labels.length * this.size;
    if (pixels.length !== wanted) {
      const [samples, needed, had] = [labels.length, wanted, pixels.length].map((n) => n.toLocaleString("en"));
      throw new TrainingError(
        `${name}: ${samples} labels need ${needed} pixels, ${this.size} for each sample; there are ${had}`,
      );
    }
    const wrong = labels.find((y) => !(Number.isInteger(y) && y >= 0 && y < this.classes.length));
    if (wrong !== undefined) {
      const last = this.classes.length - 1;
      throw new TrainingError(`${name}: there is no class ${wrong}: classes are numbered from 0 to ${last}`);
    }
  }

  /** Divide the samples as the run's seed says, for this client. */
  async divide(site, client) {
    const { train, validation, test } = this.given;
    const all = train.labels.map((_, index) => index);
    this.parts = { train: this.rows(train, all), test: this.rows(test ?? NOTHING) };
    if (validation) {
      // The training samples are drawn in the client's order, though none is held out.
      const { train: kept, validation: held } = await site(`split?client=${client}&samples=${all.length}`);
      this.parts.train = this.rows(train, [...held, ...kept]);
      this.parts.validation = this.rows(validation);
      return;
    }
    const found = await site(`split?client=${client}&samples=${all.length}`);
    this.parts.train = this.rows(train, found.train);
    this.parts.validation = this.rows(train, found.validation);
  }

  rows({ pixels, labels }, indices = labels.map((_, index) => index)) {
    return { pixels, labels: indices.map((row) => labels[row]), indices };
  }

  count(part) {
    return this.parts[part].labels.length;
  }

  /**
   * Return normalised samples of a part, and their labels.
   * @param {number[]} rows of the part
   * @returns {{x: Float32Array, y: BigInt64Array}} x (rows, *input)
   */
  batch(part, rows) {
    const { pixels, labels, indices } = this.parts[part];
    const { size, plan } = this;
    const x = new Float32Array(rows.length * size);
    rows.forEach((row, at) => {
      const start = indices[row] * size;
      x.set(normalised(scaled(pixels.subarray(start, start + size)), plan), at * size);
    });
    return { x, y: BigInt64Array.from(rows, (row) => BigInt(labels[row])) };
  }

  /** Return how many training samples each class has. */
  classCounts() {
    const counts = this.classes.map(() => 0);
    for (const label of this.parts.train.labels) counts[label] += 1;
    return counts;
  }

  /** Return the SHA-256 of the run's name and all samples, as a Python client's. */
  async digest(run) {
    if (!globalThis.crypto?.subtle) {
      throw new TrainingError("this browser computes no SHA-256 here: open the page as localhost, or by https");
    }
    const pieces = [new TextEncoder().encode(run)];
    for (const { pixels, labels, indices } of ["train", "validation", "test"].map((p) => this.parts[p])) {
      for (const row of indices) pieces.push(pixels.subarray(row * this.size, (row + 1) * this.size));
      pieces.push(new Uint8Array(BigInt64Array.from(labels, BigInt).buffer));
    }
    const whole = await crypto.subtle.digest("SHA-256", await new Blob(pieces).arrayBuffer());
    return Array.from(new Uint8Array(whole), (byte) => byte.toString(16).padStart(2, "0")).join("");
  }
}

const NOTHING = { pixels: new Uint8Array(0), labels: [] };
