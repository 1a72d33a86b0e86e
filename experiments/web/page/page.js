/** The page's parts together: predicts as the sample or the way of computing it changes. */

import { Input } from "./input.js";
import { normalised } from "./normalise.js";
import { split, whole } from "./predict.js";
import { Runtime } from "./runtime.js";
import { Server } from "./server.js";
import * as show from "./show.js";

export const element = (id) => document.getElementById(id);
const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;

let later = 0; // the timer of a message that is worth saying once things are quiet

/** Say something in the status line; an Error is shown as one. */
export function tell(message, kind = "info") {
  clearTimeout(later);
  const status = element("status");
  status.textContent = message instanceof Error ? message.message : message;
  status.dataset.kind = message instanceof Error ? "error" : kind;
}

/** Say something once nothing else was said for a moment: screen readers read each message. */
function tellLater(message) {
  clearTimeout(later);
  later = setTimeout(() => tell(message), QUIET_MS);
}

export class Page {
  constructor(model) {
    this.model = model;
    this.runtime = new Runtime();
    this.listeners = new Set();
    this.input = new Input(model, element, () => this.changed(), tell);
    this.bars = new show.Bars(element("bars"), model.classes);
    this.server = new Server(model, (state, words) => this.serverIs(state, words));
    this.version = this.done = 0; // of the sample and of how it is predicted
    this.isBusy = false;
    this.isReady = false; // the model is loaded
    this.last = null; // what was predicted last, for the browser's console and for tests
  }

  /** @returns {import("./main.js").Context}  for other parts of the page */
  context() {
    const page = this;
    return {
      model: this.model,
      runtime: this.runtime,
      input: this.input,
      get ort() {
        return page.runtime.ort;
      },
      sessionFor: (url) => this.runtime.sessionFor(url),
      canvasPixels: () => this.input.values(),
      onFeatures: (listener) => {
        this.listeners.add(listener);
        return () => this.listeners.delete(listener);
      },
      tell: (error) => tell(error, "error"),
    };
  }

  /** Predict again; what is in flight comes first, and what it was made of may be outdated. */
  async changed() {
    this.version++;
    if (this.isBusy) return;
    this.isBusy = true;
    while (this.done !== this.version) {
      const version = this.version;
      try {
        await this.predict();
      } catch (error) {
        if (this.server.isConnected || chosen("mode") === "whole") tell(error);
      }
      this.done = version;
    }
    this.isBusy = false;
  }

  async predict() {
    if (this.input.isEmpty) return this.showNothing();
    if (!this.isReady) return undefined;
    const mode = chosen("mode");
    const pixels = this.input.values();
    const x = normalised(pixels, this.model);
    const local = mode === "split" ? null : await whole(this.model, this.runtime, x);
    let far = null;
    if (mode !== "whole") {
      if (!this.server.isConnected) {
        if (local) this.showFound(mode, local, null, pixels);
        else this.showNothing(); // what is shown was of another sample
        return tell(NO_ANSWER, "error");
      }
      const sent = [];
      far = await split(this.model, this.runtime, this.server.inference, x, (feature) => {
        sent.push(feature);
        this.tellFeatures({ pixels, shape: this.model.input_shape, features: [...sent] });
      });
    }
    return this.showFound(mode, local, far, pixels);
  }

  /** Tell the other parts what is sent; null: nothing that is shown was. */
  tellFeatures(seen) {
    for (const listener of this.listeners) {
      try {
        listener(seen);
      } catch (error) {
        tell(error);
      }
    }
  }

  showFound(mode, local, far, pixels) {
    const found = far ?? local;
    const probabilities = show.softmax(found.outputs);
    const name = this.model.classes[show.argmax(probabilities)];
    show.showClass(element("class"), name);
    element("wire-class").textContent = name;
    this.bars.show(probabilities);
    this.showWay(found, far !== null);
    const compared = element("compared");
    compared.hidden = !(local && far);
    this.last = { mode, pixels, outputs: found.outputs, name, local, far };
    if (local && far) {
      const most = show.largestDifference(local.outputs, far.outputs);
      const same = show.argmax(local.outputs) === show.argmax(far.outputs);
      this.last.difference = most;
      compared.textContent =
        `Locally and split: ${same ? "the same class" : "another class"}; the largest difference` +
        ` of an output is ${most.toExponential(1)}.`;
    }
    if (far || mode === "whole") {
      const sure = `${(100 * Math.max(...probabilities)).toFixed(1)} %`;
      tellLater(`${name}, with a probability of ${sure}: ${WHERE[mode]}.`);
    }
  }

  /** Show bytes, times and activation maps. */
  showWay({ times, bytesSent, bytesReceived, features }, isSplit) {
    element("bytes-up").textContent = show.bytesText(bytesSent);
    element("bytes-down").textContent = show.bytesText(bytesReceived);
    show.showTimes(element("times"), times);
    for (const [part, ms] of Object.entries(times)) {
      element(`ms-${part}`).textContent = isSplit || part === "front" ? show.msText(ms) : NONE;
    }
    const numbers = features.reduce((sum, { data }) => sum + 4 * data.length, 0);
    element("wire-bytes").textContent = isSplit ? show.bytesText(numbers) : NONE;
    show.showMaps(element("maps"), features);
    if (!isSplit) this.tellFeatures(null);
    element("maps-note").textContent = isSplit
      ? features.map(describedFeature).join("; ")
      : WHOLE;
  }

  showNothing() {
    this.tellFeatures(null);
    show.showClass(element("class"), "–");
    element("wire-class").textContent = "class";
    this.bars.show(null);
    show.showMaps(element("maps"), []);
    element("maps-note").textContent = chosen("mode") === "whole" ? WHOLE : EMPTY;
    element("compared").hidden = true;
    for (const id of ["wire-bytes", "bytes-up", "bytes-down", "ms-front", "ms-way", "ms-back"]) {
      element(id).textContent = NONE;
    }
    element("times").replaceChildren();
    this.last = null;
    if (this.isReady) tell(READY);
  }

  serverIs(state, words) {
    const line = element("connection");
    const isNew = line.dataset.state !== state;
    line.dataset.state = state;
    line.textContent = words;
    if (state === "connected") {
      if (this.input.isEmpty && this.isReady) tell(READY);
      this.changed();
    } else if (isNew && !QUIET.has(state) && chosen("mode") !== "whole") {
      tell(state === "refused" ? words : NO_ANSWER, "error");
    }
  }

  /** Load the chosen backend, and predict with it. */
  async useBackend() {
    const { model, runtime } = this;
    const wanted = chosen("backend");
    element("backend-note").textContent = `loading ${wanted} …`;
    tell("loading the model …");
    this.isReady = false;
    const own = model.segments.filter(({ file }) => file);
    const shapes = [model.input_shape, ...model.features.map(({ shape }) => shape)];
    const models = own.map(({ file }) => {
      const index = model.segments.findIndex((segment) => segment.file === file);
      return { url: file, shape: shapes[index] };
    });
    models.push({ url: model.whole, shape: model.input_shape });
    try {
      await runtime.use(wanted, models);
      await Promise.all(own.map(({ file }) => runtime.sessionFor(file)));
    } catch (error) {
      element("backend-note").textContent = `${wanted} cannot be loaded: ${error.message}`;
      tell(error);
      return;
    }
    if (chosen("backend") !== wanted) return; // another was chosen meanwhile
    this.isReady = true;
    element("backend-note").dataset.backend = runtime.backend;
    element("backend-note").textContent = `In use: ${runtime.note}.`;
    runtime.sessionFor(model.whole).catch(tell); // for the other modes
    this.changed();
  }

  useMode() {
    element("diagram").dataset.mode = chosen("mode");
    element("lead").textContent = LEADS[chosen("mode")];
    this.changed();
  }
}

const QUIET_MS = 250;
const QUIET = new Set(["connecting", "off"]); // states of the connection that need no message
const READY = "Ready: draw, take a sample, or pick an image.";
const NO_ANSWER = "The server does not answer; the whole model locally still works.";
const NONE = "–";
const EMPTY = "Draw something: these numbers of it, and nothing else, go to the server.";
const WHOLE = "Nothing is sent: the whole model is computed here.";
const LEADS = {
  split: "The front of a trained network runs in this browser; only its activations go to the server.",
  whole: "The whole of a trained network runs in this browser; nothing is sent.",
  both:
    "A trained network runs twice: all of it in this browser, and its front here with the rest at the" +
    " server, to which only activations go.",
};
const WHERE = {
  split: "the front computed here, the back at the server",
  whole: "computed here, nothing was sent",
  both: "computed here, and with the server",
};

function describedFeature({ link, maps, data }) {
  const size = show.bytesText(4 * data.length);
  const kind = maps.length === 3
    ? `${maps[0]} maps of ${maps[1]} × ${maps[2]}`
    : `${data.length} numbers`;
  return `${link ? `at cut ${link}: ` : ""}${kind}, ${size}; the rest of what is sent is framing`;
}
