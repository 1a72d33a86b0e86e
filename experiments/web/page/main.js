/**
 * The page: what is drawn is predicted as it changes, here or with the server, and what leaves this
 * machine is shown. Other parts of the page get a `Context`, below.
 */

import { element, Page, tell } from "./page.js";
import { startTheme } from "./theme.js";

/**
 * @typedef {object} Context  what other parts of the page are given
 * @property {object} model  what /model.json gives
 * @property {import("./runtime.js").Runtime} runtime  the backend in use
 * @property {object | null} ort  the module onnxruntime-web of that backend
 * @property {(url: string) => Promise<object>} sessionFor  a model: `compute(data, shape)`, `run(feeds)`
 * @property {() => Float32Array} canvasPixels  the sample, flat, of `input_shape`, before
 *   normalisation; of images in [0, 1]
 * @property {(listener: (seen: Seen | null) => void) => () => void} onFeatures  told of what is sent to the
 *   server, each time, with the sample that it was made of, and null once nothing that is shown was
 *   sent; returns what ends this
 * @property {import("./input.js").Input} input  the drawing: `input.pad` is null where samples are no images
 * @property {(error: Error | string) => void} tell  shows an error in the status line
 *
 * @typedef {{pixels: Float32Array, shape: number[],
 *   features: import("./predict.js").Feature[]}} Seen
 */

function showModel(model) {
  const after = `after round ${model.round + 1} of ${model.rounds}`;
  element("about").textContent = `${model.model}, run ${model.run}, ${after}, seed ${model.seed}`;
  element("weights").textContent = model.back_checksum ? `The server's weights: ${model.back_checksum}.` : "";
  if (model.segments.at(-1)?.file && model.segments.length > 2) {
    element("node-class").querySelector("small").textContent = "its last part: here";
  }
}

const SCHEME = location.protocol === "https:" ? "wss" : "ws";

/** @returns {string} why this page cannot connect to an address; "" if it can */
function whyNoServer(address) {
  if (!URL.canParse(address) || !/^wss?:$/.test(new URL(address).protocol)) {
    return `${address.slice(0, 200) || "nothing"} is no address: give ${SCHEME}://HOST:PORT/predict`;
  }
  if (address.startsWith(`${SCHEME}://${location.host}/`)) return "";
  return (
    `a page may connect only to where it comes from, ${SCHEME}://${location.host}:` +
    " open the page of the other server"
  );
}

async function start() {
  startTheme(element("theme"));
  const answer = await fetch("/model.json");
  if (!answer.ok) throw new Error(`the site has no model: ${await answer.text()}`);
  const model = await answer.json();
  showModel(model);
  const page = new Page(model);
  const context = page.context();
  window.sfl = { context, page };
  const address = element("address");
  address.value = `${SCHEME}://${location.host}/predict`;
  const connect = () => {
    const why = whyNoServer(address.value.trim());
    if (why) page.serverIs("refused", why);
    else page.server.connect(address.value.trim()).catch(tell);
  };
  element("server").addEventListener("submit", (event) => {
    event.preventDefault();
    connect();
  });
  element("modes").addEventListener("change", () => page.useMode());
  element("backends").addEventListener("change", () => page.useBackend());
  page.useMode();
  if (!model.features.length) {
    element("modes").querySelectorAll("[value=split], [value=both]").forEach((b) => (b.disabled = true));
    element("modes").querySelector("[value=whole]").checked = true;
    page.useMode();
    element("connection").textContent = "this model has no cut: nothing is sent";
  } else {
    connect();
    addEventListener("pagehide", () => page.server.leave());
    addEventListener("pageshow", ({ persisted }) => persisted && connect()); // kept, and come back to
  }
  if (model.runtime) await page.useBackend();
  else tell(`onnxruntime-web is not installed where this page comes from. There: ${model.install}`, "error");
  await mountOthers(model, context);
}

/** Show the parts that this model and site have. */
async function mountOthers(model, context) {
  const others = [
    ["attacker", "./attacker.js", model.decoder && model.decoder !== "none"],
    ["training", "./train_view.js", model.train],
  ];
  for (const [id, module, isThere] of others) {
    if (!isThere) continue;
    try {
      const { mount } = await import(module);
      await mount(element(id), context);
    } catch (error) {
      tell(error);
      continue;
    }
    element(id).hidden = false;
  }
}

start().catch(tell);
