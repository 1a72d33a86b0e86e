// Take part in a run as a client, with samples that stay in this page. docs/protocol.md shows the
// conversation; sfl/conversation has the same of a Python client.
//
//   page                                             server
//   REGISTER, REQUEST_TO_START                   ->
//                                                <-  GO_ON, the weights to start from
//   a round:                                     <-  START_TRAINING, the weights if they are others
//     a step: TRAINING_LABELS, TRAINING_FEATURES ->
//                                                <-  TRAINING_GRADS
//   ROUND_TRAINED, the weights                   ->
//   a part of the samples:                       <-  START_VALIDATION, the averaged weights
//     VALIDATION_LABELS, VALIDATION_FEATURES     ->
//                                                <-  VALIDATION_RESULT
//                                                <-  VALIDATION_DONE, or TRAINING_DONE at the end

import { Optimizer } from "./adam.js";
import { getJson, TrainingError } from "./asking.js";
import { HEARTBEAT_S, LONGEST_PAUSE_S, openWithin, oneLine, pause, PeerError } from "./connection.js";
import { checksumText, crc32, ProtocolError } from "./frames.js";
import { areFinite, fill, read } from "./torchfile.js";

const MAX_ROUNDS_KEPT = 2; // whose own front is kept, where each client has its own
const PATIENCE_S = 600; // for a lost server
const FIRST_PAUSE_S = 1; // before a further try; twice as long before each that follows

/**
 * Return what the site knows of the run.
 * @param {URL | string} base the site's address
 * @throws {TrainingError} there is no run now in which a page can take part
 */
export async function loadPlan(base, fetcher = (url) => fetch(url)) {
  const plan = await getJson(fetcher, new URL("training.json", base));
  if (plan.problem) throw new TrainingError(oneLine(plan.problem));
  return plan;
}

/**
 * What the page shows.
 * @typedef {object} Progress
 * @property {"connecting" | "waiting" | "training" | "evaluating" | "lost" | "done"} state
 * @property {string} note a line for the user
 * @property {number} client
 * @property {number} round from 0
 * @property {number} rounds
 * @property {number} step of the round, from 0
 * @property {number} steps
 * @property {number} loss of the last step
 * @property {number} accuracy of the round so far, in training
 * @property {Record<string, number>} figures of the last evaluated round, as the server counts
 * @property {number} bytesSent
 * @property {number} bytesReceived
 */

/** One client, over all its connections. */
export class Trainer {
  /**
   * @param {object} options
   * @param {string | URL} options.url of /train
   * @param {string | URL} options.base the site's address
   * @param {object} options.plan
   * @param {Front} options.front
   * @param {Samples} options.samples
   * @param {import("./torchfile.js").Templates} options.templates
   * @param {number | null} options.client the wanted number; null: that of the site's token, or
   *   the lowest free one
   * @param {string} options.runtime the inference runtime's name and version
   * @param {(progress: Progress) => void} options.onProgress
   * @param {AbortSignal} options.signal stops it
   */
  constructor({ url, base, plan, front, samples, templates, client = null, runtime, onProgress, signal, patienceS, fetcher }) {
    Object.assign(this, { url, plan, front, samples, templates, signal, runtime });
    this.patienceS = patienceS ?? PATIENCE_S;
    this.client = client ?? plan.client ?? null;
    this.site = (path) => getJson(fetcher ?? ((address) => fetch(address)), new URL(`training/${path}`, base));
    this.instance = hex(crypto.getRandomValues(new Uint8Array(16)));
    this.initial = front.file();
    this.own = new Map([[0, this.initial]]); // the front at a round's start, where it is the client's own
    this.onProgress = onProgress ?? (() => {});
    this.bytes = { bytesSent: 0, bytesReceived: 0 };
    this.progress = {
      state: "connecting", note: "", client, round: 0, rounds: plan.config.rounds, step: 0, steps: 0,
      loss: NaN, accuracy: NaN, figures: {}, bytesSent: 0, bytesReceived: 0,
    };
  }

  tell(changes) {
    const { link, bytes } = this;
    Object.assign(this.progress, changes, {
      bytesSent: bytes.bytesSent + (link?.bytesSent ?? 0),
      bytesReceived: bytes.bytesReceived + (link?.bytesReceived ?? 0),
    });
    this.onProgress({ ...this.progress });
  }

  /**
   * Take part until the run's end; connect again when the connection is lost.
   * @throws {PeerError | ProtocolError | TrainingError} it cannot go on
   */
  async run() {
    this.pauseS = FIRST_PAUSE_S;
    for (this.lostAt = null; ; ) {
      try {
        await this.once();
        this.tell({ state: "done", note: "the run is over" });
        return;
      } catch (error) {
        this.leave(error);
        this.lostAt ??= Date.now();
        const mayHelp = mayPass(error) && !this.signal?.aborted;
        if (!mayHelp || Date.now() - this.lostAt > this.patienceS * 1000) throw error;
        this.tell({ state: "lost", note: `${error.message}; trying to reach the server again` });
        await pause(this.pauseS, this.signal);
        this.pauseS = Math.min(2 * this.pauseS, LONGEST_PAUSE_S);
      } finally {
        this.bytes.bytesSent += this.link?.bytesSent ?? 0;
        this.bytes.bytesReceived += this.link?.bytesReceived ?? 0;
        this.link?.close();
        this.link = null;
      }
    }
  }

  /** Tell the server why this page leaves, unless the server ended the conversation. */
  leave(error) {
    if (!this.link || this.link.error) return;
    const wrong = error instanceof ProtocolError ? "INVALID_MESSAGE" : "FAILED";
    this.link.end(error, mayPass(error) ? "UNREGISTER" : wrong);
  }

  async once() {
    const { signal } = this;
    const patienceS = this.patienceS - (Date.now() - (this.lostAt ?? Date.now())) / 1000;
    const onNotice = (note) => this.tell({ note });
    const onPause = (error) => {
      this.lostAt ??= Date.now();
      this.tell({ state: "lost", note: `${error.message}; trying again` });
    };
    const url = new URL(this.url); // the site proves to the server that this page is that client
    if (this.client !== null) url.searchParams.set("client", this.client);
    this.link = await openWithin(url, { signal, patienceS, onNotice, onPause });
    this.link.farewell = "UNREGISTER"; // for now: a page with the same samples may go on
    this.link.limits = this.limits();
    await this.register();
    await this.report();
    let round = await this.start();
    for (let first; (first = await this.nextRound(round)); round++) await this.oneRound(first);
    this.link.send("UNREGISTER");
  }

  limits() {
    const { template, most_gradients: most } = this.plan;
    return { SEND_MODEL: template.most, SEND_AGGREGATED_MODEL: template.most, TRAINING_GRADS: most };
  }

  at(round, step = -1) {
    const place = { run: this.runName, round, step, client: this.client, link: 0 };
    this.link.at = place;
    return place;
  }

  // Joining

  async register() {
    const { link, plan } = this;
    const fingerprint = {
      sfl: plan.sfl, torch: `${this.runtime} in a browser`, capability: "wasm", threads: "1", device: "wasm",
    };
    const wanted = this.client ?? -1;
    link.send("REGISTER", { client_id: wanted, instance: this.instance, heartbeat_s: HEARTBEAT_S, fingerprint });
    const { type, content } = await link.receive(["REGISTERED", "GO_TO"]);
    if (type === "GO_TO") {
      throw new TrainingError("the server has several processes and sends its clients on: a page cannot follow");
    }
    if (!(content?.heartbeat_s > 0) || !Number.isInteger(content.client_id) || content.client_id < 0) {
      throw new ProtocolError("the server's welcome is none");
    }
    link.heartbeatS = content.heartbeat_s;
    this.checkRun(content.config);
    if (wanted !== -1 && content.client_id !== wanted) throw new ProtocolError("the server gave another number");
    this.client = content.client_id;
    link.name = `client_${this.client}`;
    this.runName = content.config.run;
    this.tell({ state: "waiting", note: "", client: this.client, rounds: content.config.rounds });
  }

  checkRun(config) {
    const { config: known, may_differ: mayDiffer } = this.plan;
    const other = Object.keys(known).find(
      (name) => !mayDiffer.includes(name) && JSON.stringify(known[name]) !== JSON.stringify(config?.[name]),
    );
    if (other) throw new TrainingError(`the server has another run now (its ${other} differs): load the page again`);
  }

  async report() {
    const { samples, plan } = this;
    if (!samples.parts) await samples.divide(this.site, this.client);
    this.structure ??= await this.site(`structure?classes=${samples.classes.length}`);
    this.digest ??= await samples.digest(this.runName);
    const counts = ["train", "validation", "test"].map((part) => [part, samples.count(part)]);
    this.link.send("REQUEST_TO_START", {
      num_samples: Object.fromEntries(counts),
      classes: samples.classes,
      input_shape: plan.input_shape,
      digest: this.digest,
      class_counts: plan.counts_classes ? samples.classCounts() : [],
      rounds: plan.fronts === "own" ? [...this.own.keys()].reverse() : [],
      structure: this.structure,
      weights: plan.weights,
      tells_classes: true,
    });
  }

  /** Load the weights at the start of the first round to run; return that round. */
  async start() {
    const message = await this.link.receive(["GO_ON"]);
    const { run, round: done, client } = message.at;
    if (run !== this.runName || client !== this.client || done < -1) throw new ProtocolError("the server goes on elsewhere");
    this.front.load(this.initial);
    const { own } = message.content;
    if (this.plan.fronts === "own" && own > 0) {
      if (!this.own.has(own)) throw new TrainingError(`this page has no front of round ${own}: only the page that trained it has`);
      this.front.load(this.own.get(own));
    }
    await this.receiveFront(message, this.front.file());
    this.lostAt = null;
    return done + 1;
  }

  // Weights

  /** Load the front that a message names, if any. `held`: the file of the current weights. */
  async receiveFront(message, held = null) {
    const name = message.content?.front;
    if (typeof name !== "string" || !/^(|init|client_avg|client_\d{1,9})$/.test(name)) {
      throw new ProtocolError("the server names no weights that a round starts from");
    }
    if (!name) return;
    const { link } = this;
    const { content: offer } = await link.receive(["REQUEST_TO_SEND_FILE"], message.at);
    if (offer?.name !== name) throw new ProtocolError(`the server offers other weights than ${name}`);
    const hasIt = held?.length === offer.bytes && checksumText(crc32(held)) === offer.checksum;
    link.send("SEND_FILE", { offset: hasIt ? offer.bytes : 0 }, { at: message.at });
    if (hasIt) return;
    const type = name === "client_avg" ? "SEND_AGGREGATED_MODEL" : "SEND_MODEL";
    const { payload } = await link.receive([type], message.at);
    if (payload.length !== offer.bytes || checksumText(crc32(payload)) !== offer.checksum) {
      throw new ProtocolError(`the weights ${name} are not those that were offered`);
    }
    this.front.load(payload);
  }

  async sendFront(at) {
    const { link } = this;
    const file = this.front.file();
    const offer = { name: link.name, bytes: file.length, checksum: checksumText(crc32(file)) };
    link.send("REQUEST_TO_SEND_FILE", offer, { at });
    const { content } = await link.receive(["SEND_FILE"], at);
    const offset = content?.offset;
    if (!Number.isInteger(offset) || offset < 0 || offset > file.length) {
      throw new ProtocolError(`the server asks for byte ${offset} of ${file.length}`);
    }
    if (offset < file.length) link.send("SEND_MODEL", "", { at, payload: file.subarray(offset) });
  }

  // Rounds

  async nextRound(round) {
    const starts = round < this.progress.rounds ? ["START_TRAINING", "START_VALIDATION"] : [];
    const message = await this.link.receive([...starts, "TRAINING_DONE"], this.at(round));
    this.pauseS = FIRST_PAUSE_S;
    if (message.type !== "TRAINING_DONE") return message;
    this.tell({ figures: numbersOf(message.content) });
    return null;
  }

  async oneRound(first) {
    const { link } = this;
    const at = first.at;
    let message = first;
    if (message.type === "START_TRAINING") {
      await this.train(message);
      message = await link.receive(["START_VALIDATION"], at);
    }
    this.keepOwn(at.round + 1);
    const left = new Set(["validation", "test"]);
    while (message.type === "START_VALIDATION") {
      const part = message.content?.part;
      if (!left.delete(part)) throw new ProtocolError(`the server asks for the part ${oneLine(part, 40)}`);
      await this.receiveFront(message);
      await this.evaluate(part, at.round);
      message = await link.receive(["START_VALIDATION", "VALIDATION_DONE"], at);
    }
    this.tell({ state: "waiting", figures: numbersOf(message.content) });
  }

  /** Keep the front with which a round will start, where it exists here alone. */
  keepOwn(round) {
    if (this.plan.fronts !== "own") return;
    this.own.set(round, this.front.file());
    for (const old of [...this.own.keys()].slice(1, -MAX_ROUNDS_KEPT)) this.own.delete(old);
  }

  async train(start) {
    const { link, plan, front } = this;
    const round = start.at.round;
    await this.receiveFront(start);
    const { train } = this.samples.parts;
    const { batches, lr } = await this.site(
      `order?client=${this.client}&samples=${train.labels.length}&round=${round}`,
    );
    this.tell({ state: "training", note: "", round, steps: batches.length });
    const optimizer = new Optimizer(front.weights, plan.optimizer, lr);
    const [started, sums] = [performance.now(), { hits: 0, samples: 0, waitedMs: 0 }];
    for (const [step, rows] of batches.entries()) await this.step(round, step, rows, optimizer, sums);
    const total = performance.now() - started;
    const spent = { compute_s: total - sums.waitedMs, wait_s: sums.waitedMs, transfer_s: 0 };
    link.send("ROUND_TRAINED", asTexts(spent), { at: this.at(round) });
    if (plan.fronts !== "own") await this.sendFront(this.at(round));
  }

  async step(round, step, rows, optimizer, sums) {
    const { link, front } = this;
    const at = this.at(round, step);
    const count = rows.length;
    const { x, y } = this.samples.batch("train", rows);
    link.send("TRAINING_LABELS", "", { at, payload: await this.encode("int64", y, [count]) });
    const z = await front.forward(x, count);
    const payload = await this.encode("float32", z, [count, ...this.plan.cut_shape]);
    link.send("TRAINING_FEATURES", "", { at, payload });
    const sent = performance.now();
    const reply = await link.receive(["TRAINING_GRADS"], at);
    sums.waitedMs += performance.now() - sent;
    const { loss, correct } = reply.content ?? {};
    if (typeof loss !== "number" || !(correct >= 0 && correct <= count)) {
      throw new ProtocolError("the server's gradients come without loss and hits");
    }
    const shape = [count, ...this.plan.cut_shape];
    const [dz] = read(await this.templates.of("float32", shape), reply.payload);
    if (!areFinite(dz) || !Number.isFinite(loss)) throw new ProtocolError("the server's gradients hold NaN or infinity");
    optimizer.step(await front.gradients(x, dz, count));
    sums.hits += correct;
    sums.samples += count;
    this.tell({ step: step + 1, loss, accuracy: sums.hits / sums.samples });
  }

  async evaluate(part, round) {
    const { link, plan, samples, front } = this;
    this.tell({ state: "evaluating", note: "" });
    const total = samples.count(part);
    for (let start = 0, step = 0; start < total; start += plan.evaluation_batch, step++) {
      const count = Math.min(plan.evaluation_batch, total - start);
      const { x, y } = samples.batch(part, Array.from({ length: count }, (_, i) => start + i));
      const at = this.at(round, step);
      link.send("VALIDATION_LABELS", { part }, { at, payload: await this.encode("int64", y, [count]) });
      const z = await front.forward(x, count);
      link.send("VALIDATION_FEATURES", "", { at, payload: await this.encode("float32", z, [count, ...plan.cut_shape]) });
      await link.receive(["VALIDATION_RESULT"], at);
    }
    this.at(round);
  }

  async encode(dtype, numbers, shape) {
    return fill(await this.templates.of(dtype, shape), [numbers]);
  }
}

/** Return whether an error may not come again: a lost connection, a site that does not answer. */
function mayPass(error) {
  return error instanceof PeerError && error.again;
}

function hex(bytes) {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function numbersOf(content) {
  return Object.fromEntries(Object.entries(content ?? {}).filter(([, value]) => typeof value === "number"));
}

/** Return times in ms as seconds, in texts of the width that the protocol wants. */
function asTexts(times) {
  const text = (ms) => (Math.max(ms, 0) / 1000).toFixed(6).padStart(16, "0");
  return Object.fromEntries(Object.entries(times).map(([name, ms]) => [name, text(ms)]));
}
