// The samples that a user has given so far: a folder's or a program's, and drawings.

import { joined } from "./frames.js";

export class Collection {
  #given = null; // {train, validation, test, classes}
  #pixels = []; // of the drawings
  #names = []; // their classes

  /** @param {string[]} classes of the run, which drawings and unnamed samples have */
  constructor(classes) {
    this.classes = classes;
  }

  /**
   * Take samples beside the drawings, in place of others that were given so.
   * @param {{train: object, validation?: object, test?: object, classes?: string[]}} given as
   *   samples.js takes them
   * @throws {Error} a drawing is of none of their classes
   */
  take(given) {
    for (const name of this.#names) check(given.classes ?? this.classes, name);
    this.#given = given;
  }

  /**
   * Add a drawing.
   * @param {Uint8Array} pixels
   * @param {number} label of the run's classes
   * @throws {Error} the samples that were given have other classes
   */
  draw(pixels, label) {
    const name = this.classes[label];
    check(this.all().classes, name);
    this.#pixels.push(pixels);
    this.#names.push(name);
  }

  /** Return all samples, as samples.js takes them; their pixels only where they are wanted. */
  all({ withPixels = false } = {}) {
    const { train = { pixels: new Uint8Array(0), labels: [] }, classes = this.classes, ...others } = this.#given ?? {};
    const labels = [...train.labels, ...this.#names.map((name) => classes.indexOf(name))];
    const pixels = withPixels ? joined(train.pixels, ...this.#pixels) : null;
    return { ...others, classes, train: { pixels, labels } };
  }
}

function check(classes, name) {
  if (classes.includes(name)) return;
  const some = classes.slice(0, 20).join(", ");
  throw new Error(`drawings of ${name} do not go with samples of ${some}: draw others, or remove all first`);
}
