/**
 * ONNX models in this browser: onnxruntime-web with one of three backends.
 *
 * onnxruntime-web sets its number of threads once, when it is loaded. So each backend is a load of
 * its own, by an address of its own, and a change of the backend takes effect at once.
 */

import { largestDifference } from "./show.js";

const WASM = "/ort/ort.wasm.min.mjs";
const WEBGPU = "/ort/ort.webgpu.min.mjs";
const MOST_THREADS = 8;
// By how much WebGPU may differ from wasm on the same model, relative to the largest output: it may
// round and add in another order, but a wrong kernel is further off.
const ALLOWED = 1e-3;

export const BACKENDS = ["wasm", "threads", "webgpu"];

/** What is said of a backend: `name` is in use, `note` says why that one. */
class Loaded {
  constructor(name, note, ort, options) {
    Object.assign(this, { name, note, ort, options });
    this.sessions = new Map(); // url -> Promise<Session>
  }
}

/** A model. Runs of all models of one backend wait for each other, as the runtime wants. */
class Session {
  #runtime;
  #session;

  constructor(runtime, session) {
    this.#runtime = runtime;
    this.#session = session;
  }

  get inputNames() {
    return this.#session.inputNames;
  }

  get outputNames() {
    return this.#session.outputNames;
  }

  /** @param {Object<string, object>} feeds  ort tensors by input  @returns the same by output */
  run(feeds) {
    return this.#runtime.inTurn(() => this.#session.run(feeds));
  }

  /**
   * Compute with one input and one output.
   * @param {Float32Array} data
   * @param {number[]} shape  with the batch, (B, ...)
   * @returns {Promise<{data: Float32Array, shape: number[], ms: number}>} its first output
   */
  async compute(data, shape) {
    const tensor = new this.#runtime.ort.Tensor("float32", data, shape);
    return this.#runtime.inTurn(async () => {
      const start = performance.now();
      const outputs = await this.#session.run({ [this.inputNames[0]]: tensor });
      const { data: values, dims } = outputs[this.outputNames[0]];
      return { data: values.slice(), shape: [...dims], ms: performance.now() - start };
    });
  }
}

export class Runtime {
  #loaded = null;
  #models = new Map(); // url -> Promise<Uint8Array>
  #last = Promise.resolve();
  #engines = new Map(); // url -> Promise<ort>
  #wanted = "";

  get ort() {
    return this.#loaded?.ort ?? null;
  }

  /** The backend in use: "wasm", "threads", "webgpu"; "" before one is loaded. */
  get backend() {
    return this.#loaded?.name ?? "";
  }

  /** Which backend is in use, and why not the wanted one, in words. */
  get note() {
    return this.#loaded?.note ?? "not loaded yet";
  }

  /** Run what is given after all that was given before. */
  inTurn(work) {
    const done = this.#last.then(work);
    this.#last = done.catch(() => {});
    return done;
  }

  /** @returns {Promise<Session>} the model at `url`, of the backend in use */
  sessionFor(url) {
    if (!this.#loaded) throw new Error("onnxruntime-web is not loaded");
    return this.#sessionOf(this.#loaded, url);
  }

  /**
   * Use a backend, or what comes closest to it and works; `note` says which.
   * @param {string} wanted  one of BACKENDS
   * @param {{url: string, shape: number[]}[]} models  for WebGPU's self-check; shapes have no batch
   */
  async use(wanted, models) {
    this.#wanted = wanted;
    const loaded = await this.#start(wanted, models);
    if (this.#wanted === wanted) this.#loaded = loaded; // else another was chosen meanwhile
  }

  async #start(wanted, models) {
    if (wanted === "webgpu") return this.#startWebgpu(models);
    if (wanted === "threads") return this.#startThreads();
    return this.#startWasm(1, "wasm", "wasm with one thread");
  }

  async #startWasm(threads, name, note) {
    const ort = await this.#engine(WASM, threads);
    return new Loaded(name, note, ort, { executionProviders: ["wasm"] });
  }

  #startThreads() {
    const cores = navigator.hardwareConcurrency || 1;
    const why = !self.crossOriginIsolated
      ? "this page is not isolated: threads need https, or a page from this machine"
      : cores < 2
        ? "this machine has one processor"
        : "";
    if (why) return this.#startWasm(1, "wasm", `wasm with one thread, since ${why}`);
    const threads = Math.min(cores, MOST_THREADS);
    return this.#startWasm(threads, "threads", `wasm with ${threads} threads`);
  }

  async #startWebgpu(models) {
    const wasm = await this.#startWasm(1, "wasm", "");
    const back = (why) => {
      wasm.note = `wasm with one thread, since ${why}`;
      return wasm;
    };
    if (!navigator.gpu) return back("this browser offers no WebGPU here (it needs https)");
    const adapter = await navigator.gpu.requestAdapter().catch(() => null);
    if (!adapter) return back("WebGPU finds no graphics adapter");
    try {
      const ort = await this.#engine(WEBGPU, 1);
      const options = { executionProviders: ["webgpu"] };
      const webgpu = new Loaded("webgpu", "", ort, options);
      const worst = await this.#selfCheck(webgpu, wasm, models);
      if (!(worst <= ALLOWED)) {
        return back(
          `WebGPU computes this model wrongly on this machine (off by ${worst.toPrecision(2)})`,
        );
      }
      webgpu.note = `WebGPU (checked against wasm: at most ${worst.toExponential(1)} off)`;
      return webgpu;
    } catch (error) {
      return back(`WebGPU failed: ${String(error?.message ?? error).slice(0, 200)}`);
    }
  }

  /** @returns the largest difference of two backends over all models, relative to the output */
  async #selfCheck(one, other, models) {
    let worst = 0;
    for (const { url, shape } of models) {
      const size = shape.reduce((a, b) => a * b, 1);
      const data = Float32Array.from({ length: size }, (_, i) => Math.sin(1 + i * i * 0.37));
      const [a, b] = [await this.#sessionOf(one, url), await this.#sessionOf(other, url)];
      const [found, wanted] = [
        await a.compute(data, [1, ...shape]), await b.compute(data, [1, ...shape]),
      ];
      const largest = wanted.data.reduce((most, value) => Math.max(most, Math.abs(value)), 1e-6);
      const off = largestDifference(found.data, wanted.data) / largest;
      worst = off <= worst ? worst : off; // NaN stays
    }
    return worst;
  }

  #engine(url, threads) {
    const address = `${url}?threads=${threads}`;
    if (!this.#engines.has(address)) {
      const engine = import(address).then((ort) => {
        ort.env.wasm.numThreads = threads;
        ort.env.wasm.proxy = false;
        ort.env.wasm.wasmPaths = new URL("/ort/", location.href).href;
        ort.env.logLevel = "error";
        return ort;
      });
      this.#engines.set(address, engine);
      engine.catch(() => this.#engines.delete(address));
    }
    return this.#engines.get(address);
  }

  #sessionOf(loaded, url) {
    if (!loaded.sessions.has(url)) {
      const made = this.#model(url).then(async (bytes) => {
        const create = () => loaded.ort.InferenceSession.create(bytes, loaded.options);
        const runtime = { ort: loaded.ort, inTurn: (work) => this.inTurn(work) };
        return new Session(runtime, await this.inTurn(create));
      });
      loaded.sessions.set(url, made);
      made.catch(() => loaded.sessions.delete(url));
    }
    return loaded.sessions.get(url);
  }

  #model(url) {
    if (!this.#models.has(url)) {
      const bytes = fetch(url).then(async (answer) => {
        if (!answer.ok) throw new Error(`${url}: ${(await answer.text()).slice(0, 300)}`);
        return new Uint8Array(await answer.arrayBuffer());
      });
      this.#models.set(url, bytes);
      bytes.catch(() => this.#models.delete(url));
    }
    return this.#models.get(url);
  }
}
