// The part of the page that trains: samples of one's own, start and stop, and how it goes.

import { Collection } from "./collection.js";
import { loadPlan, Trainer } from "./training.js";
import { readFolder } from "./folder.js";
import { Front } from "./front.js";
import { Samples } from "./samples.js";
import { bytesText, counted } from "./show.js";
import { Templates } from "./torchfile.js";

const RUNTIME = "/ort/ort.wasm.min.mjs?training"; // an instance of its own, beside the predictions'
const HTML = `
  <h2 id="training-title">Take part in training</h2>
  <p class="quiet" data-is="about"></p>
  <div class="row tools">
    <label for="training-label">Label</label>
    <select id="training-label"></select>
    <button type="button" data-is="add">Add the drawing</button>
    <button type="button" data-is="pick">Folder …</button>
    <button type="button" data-is="forget">Remove all</button>
    <input type="file" class="hidden-input" data-is="files" webkitdirectory multiple tabindex="-1"
      aria-label="a folder with a folder of images for each class">
  </div>
  <p class="note" data-is="samples" aria-live="polite"></p>
  <div class="row tools">
    <label for="training-client">Client</label>
    <input id="training-client" type="number" min="0" step="1" placeholder="any">
    <button type="button" data-is="start">Start</button>
    <button type="button" data-is="stop" disabled>Stop</button>
  </div>
  <progress class="training-progress" data-is="bar" max="1" value="0" aria-label="steps of the round"></progress>
  <p class="connection" data-is="state" data-state="off" role="status" aria-live="polite">not started</p>
  <dl class="figures">
    <div><dt>round</dt><dd data-is="round">–</dd></div>
    <div><dt>loss</dt><dd data-is="loss">–</dd></div>
    <div><dt>accuracy, training</dt><dd data-is="accuracy">–</dd></div>
    <div><dt>accuracy, all clients</dt><dd data-is="figures">–</dd></div>
    <div><dt>sent up</dt><dd data-is="sent">–</dd></div>
    <div><dt>came down</dt><dd data-is="received">–</dd></div>
  </dl>`;
const LOOK_AGAIN_S = 3; // while there is no run
const NO_RUN = "there is no run yet: the page looks for one by itself";
const STATES = {
  connecting: "waiting", waiting: "connected", training: "connected", evaluating: "connected",
  lost: "waiting", done: "off",
};

/**
 * Show the part, and let the user begin.
 * @param {HTMLElement} section
 * @param {import("./main.js").Context} context
 */
export async function mount(section, context) {
  section.innerHTML = HTML;
  const style = document.createElement("link");
  style.rel = "stylesheet";
  style.href = "train_view.css";
  document.head.append(style);
  const view = new TrainView(section, context);
  window.sfl.training = view;
  await view.show();
}

class TrainView {
  #section;
  #context;
  #stopping = null; // ends the training that runs
  #samples = new Collection([]);
  plan = null;
  progress = null; // the last one that was told

  constructor(section, context) {
    this.#section = section;
    this.#context = context;
    const on = (name, act) => this.#part(name).addEventListener("click", () => this.#guarded(act));
    on("add", () => this.addDrawing());
    on("pick", () => {
      if (!this.plan) throw new Error(NO_RUN);
      this.#part("files").click();
    });
    on("forget", () => this.setSamples(null));
    on("start", () => this.start(this.#wantedClient()));
    on("stop", () => this.stop());
    this.#part("files").addEventListener("change", (event) => this.#guarded(() => this.#pick(event.target)));
  }

  #part(name) {
    return this.#section.querySelector(`[data-is="${name}"]`);
  }

  async #guarded(act) {
    try {
      await act();
    } catch (error) {
      this.#say(error.message, "refused");
    }
  }

  #say(text, state) {
    this.#part("state").textContent = text;
    this.#part("state").dataset.state = state;
  }

  /** Ask the site for the run; while there is none and nothing runs, again and again. */
  async show() {
    try {
      if (!this.#stopping) this.#use(await loadPlan(location.href));
    } catch (error) {
      this.#part("about").textContent =
        `There is no run for this page yet; it looks again every ${LOOK_AGAIN_S} seconds. The reason: ${error.message}`;
    }
    if (!this.plan) setTimeout(() => this.show(), 1000 * LOOK_AGAIN_S);
  }

  /** Take a run as it is told, and show it. */
  #use(plan) {
    if (String(this.#samples.classes) !== String(plan.classes)) {
      if (this.#samples.all().train.labels.length) {
        throw new Error("the run has other classes now: load the page again, and add samples with its labels");
      }
      this.#samples = new Collection(plan.classes);
    }
    const { config, classes, most_samples: most } = (this.plan = plan);
    this.#part("about").textContent =
      `Run ${config.run}: ${config.model}, ${config.scheme}, ${config.rounds} rounds. Your samples (at most` +
      ` ${most.toLocaleString("en")}) never leave this browser. Their activations and labels do, and the front's weights.`;
    const select = this.#section.querySelector("#training-label");
    if (String([...select.options].map(({ text }) => text)) !== String(classes)) {
      select.replaceChildren(...classes.map((name, index) => new Option(name, index)));
    }
    this.#part("add").disabled = this.#stopping !== null || !this.#fitsDrawing();
    this.#settle();
    this.#showSamples();
  }

  /** Take back what was refused, once something else has been done. */
  #settle() {
    if (this.#part("state").dataset.state === "refused") this.#say("not started", "off");
  }

  #fitsDrawing() {
    const pad = this.#context.input?.pad;
    return Boolean(pad) && String(pad.shape) === String(this.plan.input_shape);
  }

  /** Add the drawing with the chosen label. */
  addDrawing() {
    const { pad } = this.#context.input;
    if (!this.plan) throw new Error(`${NO_RUN}; the drawing stays`);
    if (pad.isEmpty) throw new Error("draw something first");
    const label = this.#section.querySelector("#training-label").value;
    if (label === "") throw new Error("choose a label first");
    this.#samples.draw(pad.pixels(), Number(label));
    pad.clear();
    this.#settle();
    this.#showSamples();
  }

  /**
   * Take samples that a program gives, in place of all others.
   * @param {{train: object, validation?: object, test?: object, classes?: string[]} | null} given as
   *   samples.js takes them; null: none
   * @throws {Error} there is no run yet, or they are laid out otherwise
   */
  setSamples(given) {
    if (given && !this.plan) throw new Error(NO_RUN);
    if (given) new Samples(this.plan, given); // checks them
    this.#samples = new Collection(this.plan?.classes ?? []);
    if (given) this.#samples.take(given);
    this.#settle();
    this.#showSamples();
  }

  async #pick(input) {
    const note = this.#part("samples");
    const onProgress = (done, of) => (note.textContent = `reading image ${done} of ${of} …`);
    try {
      this.#samples.take(await readFolder(input.files, this.plan.input_shape, onProgress));
    } finally {
      input.value = "";
      this.#showSamples();
    }
  }

  #showSamples() {
    if (!this.plan) return;
    const { train, test, classes } = this.#samples.all();
    const counts = classes.map((name, index) => [name, train.labels.filter((y) => y === index).length]);
    const some = counts.filter(([, count]) => count).map(([name, count]) => `${name}: ${count.toLocaleString("en")}`);
    const more = test ? `, and ${test.labels.length.toLocaleString("en")} to test` : "";
    this.#part("samples").textContent = train.labels.length
      ? `${counted(train.labels.length, "sample")} (${some.slice(0, 20).join(", ")})${more}`
      : "no samples yet: draw and add, or pick a folder";
  }

  #wantedClient() {
    const text = this.#section.querySelector("#training-client").value.trim();
    if (text && !/^\d{1,6}$/.test(text)) throw new Error("the client's number is 0 or more; leave it empty for any");
    return text ? Number(text) : null;
  }

  /**
   * Take part until the run ends, or `stop`.
   * @param {number | null} client the wanted number; null: any
   */
  async start(client = null) {
    if (this.#stopping) return;
    this.#stopping = new AbortController();
    this.#running(true);
    try {
      await this.#train(client, this.#stopping.signal);
      this.#say("the run is over", "off");
    } catch (error) {
      this.#say(inWords(error.message), this.#stopping.signal.aborted ? "off" : "refused");
    } finally {
      this.#stopping = null;
      this.#running(false);
    }
  }

  /** Leave the run; whoever has the same samples may go on in this place. */
  stop() {
    this.#stopping?.abort();
  }

  #running(isRunning) {
    for (const name of ["start", "add", "pick", "forget"]) this.#part(name).disabled = isRunning;
    this.#part("add").disabled = isRunning || (this.plan !== null && !this.#fitsDrawing());
    this.#part("stop").disabled = !isRunning;
    document.querySelector("#leaves-training").hidden = !isRunning;
  }

  async #train(client, signal) {
    const base = location.href;
    this.#say("loading the front …", "waiting");
    this.#use(await loadPlan(base));
    const ort = await import(RUNTIME);
    ort.env.wasm.wasmPaths = "/ort/";
    ort.env.wasm.numThreads = 1;
    const front = await Front.load(ort, this.plan, base);
    const samples = new Samples(this.plan, this.#samples.all({ withPixels: true }));
    const url = new URL("train", base.replace(/^http/, "ws"));
    if (client !== null) url.searchParams.set("client", client);
    const trainer = new Trainer({
      url, base, plan: this.plan, front, samples, client, signal,
      templates: new Templates(base),
      runtime: `onnxruntime-web ${ort.env.versions.web}`,
      onProgress: (progress) => this.#show(progress),
    });
    await trainer.run();
  }

  #show(progress) {
    this.progress = progress;
    const { state, note, client, round, rounds, step, steps, loss, accuracy, figures } = progress;
    const who = client === null ? "" : `client ${client}, `;
    this.#say(`${who}${state}${note ? `: ${note}` : ""}`, STATES[state]);
    this.#part("bar").value = steps ? step / steps : 0;
    const shown = {
      round: `${round + 1} of ${rounds}`,
      loss: Number.isNaN(loss) ? "–" : loss.toFixed(4),
      accuracy: percent(accuracy),
      figures: percent(figures.test_acc ?? figures.val_acc),
      sent: bytesText(progress.bytesSent),
      received: bytesText(progress.bytesReceived),
    };
    for (const [name, text] of Object.entries(shown)) this.#part(name).textContent = text;
  }
}

/** Return a server's refusal as a page says it, which has no options. */
function inWords(text) {
  return text
    .replace(/^the server [a-z ]+: --client-id (\d+)/, "client $1")
    .replace("this run has the ids", "this run has")
    .replace(/;? ?see --server and --(re)?connect-timeout/, "");
}

function percent(share) {
  return Number.isFinite(share) ? `${(100 * share).toFixed(1)} %` : "–";
}
