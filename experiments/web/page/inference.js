// Split inference: the page's front, the server's back. docs/protocol.md, "Inference".

import { Connection, HEARTBEAT_S } from "./connection.js";
import { areFinite, fill, read } from "./torchfile.js";

const MOST_SAMPLES = 256; // in a batch that this page sends

/**
 * What the server answered.
 * @typedef {object} Reply
 * @property {Float32Array} data outputs of the model, or activations at a further cut
 * @property {number[]} shape
 * @property {number} link -1: outputs; else activations, that the page's next segment takes
 * @property {number} seconds that the server computed for the batch, in its last reply; else NaN
 * @property {number} totalMs from the first byte sent to the last received
 * @property {number} bytesSent
 * @property {number} bytesReceived
 */

/** A conversation with a prediction service. */
export class Inference {
  /**
   * Connect, and compare the model.
   * @param {string | URL} url of /predict
   * @param {object} model what /model.json gives: `hello`, `features`, `back_checksum`,
   *   `overhead_bytes` (of a file beside its tensor's data, at most)
   * @param {import("./torchfile.js").Templates} templates
   * @param {ConstructorParameters<typeof Connection>[2]} options
   * @throws {import("./connection.js").PeerError} the server is not there, or refuses the model
   */
  static async open(url, model, templates, options = {}) {
    const connection = await Connection.open(url, options);
    connection.name = "page";
    connection.send("REQUEST_INFERENCE", { ...model.hello, heartbeat_s: HEARTBEAT_S, sfl: model.sfl });
    const { content } = await connection.receive(["INFERENCE_READY"]);
    if (!(content.heartbeat_s > 0)) throw connection.refuse("the server asks for no heartbeat");
    connection.heartbeatS = content.heartbeat_s;
    if (model.back_checksum && content.back_checksum !== model.back_checksum) {
      throw connection.refuse(
        `the server holds the back ${content.back_checksum}, this page the front that was trained` +
          ` with ${model.back_checksum}: load the page again`,
      );
    }
    return new Inference(connection, content, model, templates);
  }

  constructor(connection, offer, model, templates) {
    this.connection = connection;
    this.offer = offer;
    this.model = model;
    this.templates = templates;
    this.step = 0;
    this.samples = 0;
    this.busy = Promise.resolve();
    const perSample = Math.max(model.hello.classes, ...model.features.map(({ shape }) => count(shape)));
    const most = model.overhead_bytes + 4 * MOST_SAMPLES * perSample;
    connection.limits = { INFERENCE_FEATURES: most, INFERENCE_OUTPUTS: most };
  }

  at(link) {
    const { run, round } = this.offer;
    return { run, round, step: this.step, client: -1, link };
  }

  /**
   * Begin a batch with the activations of the first cut. Calls made at once run one after another.
   * Where the reply has a link, the page's next segment computes; then call `goOn` or `finish`.
   * @param {Float32Array} z (samples, *cut), one after another
   * @param {number} samples
   * @returns {Promise<Reply>}
   */
  infer(z, samples = 1) {
    const found = this.busy.then(() => this.start(z, samples));
    this.busy = found.catch(() => {});
    return found;
  }

  async start(z, samples) {
    this.samples = samples;
    return this.exchange(this.model.features[0].link, z, { samples });
  }

  /** End the batch: the page has computed the outputs, from the activations of a reply. */
  finish() {
    this.step += 1;
  }

  /** Go on with the activations of a further cut, of the same batch. */
  goOn(link, z) {
    return this.exchange(link, z, null);
  }

  /** @returns {Promise<Reply>} */
  async exchange(link, z, begins) {
    const { connection, samples } = this;
    if (!areFinite(z)) throw new RangeError("the front's activations hold NaN or infinity");
    const shape = [samples, ...this.shapeAt(link)];
    const payload = fill(await this.templates.of("float32", shape), [z]);
    const [sent, received, started] = [connection.bytesSent, connection.bytesReceived, performance.now()];
    if (begins) connection.send("INFERENCE_BATCH", begins, { at: this.at(0) });
    connection.send("INFERENCE_FEATURES", "", { at: this.at(link), payload });
    // The server's segment lies between this cut and the next; behind the last cut it gives outputs.
    const isLast = !this.model.features.some((cut) => cut.link === link + 1);
    const type = isLast ? "INFERENCE_OUTPUTS" : "INFERENCE_FEATURES";
    const message = await connection.receive([type], this.at(isLast ? link : link + 1));
    const totalMs = performance.now() - started;
    if (isLast) this.step += 1;
    const theirs = [samples, ...(isLast ? [this.model.hello.classes] : this.shapeAt(link + 1))];
    const [data] = read(await this.templates.of("float32", theirs), message.payload);
    if (!areFinite(data)) throw new RangeError("the server's answer holds NaN or infinity");
    return {
      data,
      shape: theirs,
      link: isLast ? -1 : link + 1,
      seconds: typeof message.content?.seconds === "number" ? message.content.seconds : NaN,
      totalMs,
      bytesSent: connection.bytesSent - sent,
      bytesReceived: connection.bytesReceived - received,
    };
  }

  shapeAt(link) {
    const found = this.model.features.find((cut) => cut.link === link);
    if (!found) throw this.connection.refuse(`the model has no cut ${link}`);
    return found.shape;
  }

  /** Leave. */
  close() {
    if (!this.connection.error) this.connection.send("UNREGISTER");
    this.connection.close();
  }
}

function count(shape) {
  return shape.reduce((product, size) => product * size, 1);
}
