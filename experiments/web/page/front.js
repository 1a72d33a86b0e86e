// The front in training: its weights, and its two graphs on the inference runtime.

import { getBytes, TrainingError } from "./asking.js";
import { ProtocolError } from "./frames.js";
import { areFinite, fill, read } from "./torchfile.js";

/** The front of the model that is trained. */
export class Front {
  /**
   * Make it from what the site has.
   * @param {object} ort the module onnxruntime-web, wasm
   */
  static async load(ort, plan, base, fetcher = (url) => fetch(url)) {
    const names = ["training/forward.onnx", "training/step.onnx", "training/front.pt"];
    const [forward, step, file] = await Promise.all(
      names.map((name) => getBytes(fetcher, new URL(name, base))),
    );
    const options = { executionProviders: ["wasm"] };
    const forwardSession = await ort.InferenceSession.create(forward, options);
    const stepSession = await ort.InferenceSession.create(step, options);
    return new Front(ort, plan, { forward: forwardSession, step: stepSession, file });
  }

  constructor(ort, plan, { forward, step, file }) {
    this.ort = ort;
    this.plan = plan;
    this.forwardSession = forward;
    this.stepSession = step;
    this.load(file);
  }

  /** Load the weights in a file. */
  load(file) {
    const weights = read(this.plan.template, file);
    if (!weights.every(areFinite)) throw new ProtocolError("the server's weights hold NaN or infinity");
    this.weights = weights;
  }

  /** Return the file of the weights. */
  file() {
    if (!this.weights.every(areFinite)) throw new TrainingError("the front's weights hold NaN or infinity");
    return fill(this.plan.template, this.weights);
  }

  feeds(tensors) {
    const { plan, ort } = this;
    const found = Object.fromEntries(
      plan.template.tensors.map(({ name, shape }, i) => [name, new ort.Tensor("float32", this.weights[i], shape)]),
    );
    for (const [name, [data, shape]] of Object.entries(tensors)) {
      found[name] = new ort.Tensor("float32", data, shape);
    }
    return found;
  }

  /** Return the activations (count, *cut) of x (count, *input). */
  async forward(x, count) {
    const { z } = await this.forwardSession.run(this.feeds({ x: [x, [count, ...this.plan.input_shape]] }));
    if (!areFinite(z.data)) throw new TrainingError("the activations hold NaN or infinity");
    return z.data;
  }

  /** Return the weights' gradients, from those of the activations. */
  async gradients(x, dz, count) {
    const { input_shape: input, cut_shape: cut, template } = this.plan;
    const found = await this.stepSession.run(this.feeds({ x: [x, [count, ...input]], dz: [dz, [count, ...cut]] }));
    const grads = template.tensors.map(({ name }) => found[`d_${name}`].data.slice());
    if (!grads.every(areFinite)) throw new TrainingError("a step's gradients hold NaN or infinity");
    return grads;
  }
}
