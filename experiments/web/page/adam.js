// The optimisers of a run, as torch computes them: sums in double, weights in float32.

const BETA_1 = 0.9;
const BETA_2 = 0.999;
const EPS = 1e-8;
const CLIP_EPS = 1e-6; // of torch's clip_grad_norm_

/**
 * Updates parameters in place, with the gradients of each step. Made anew for each round.
 * @typedef {{kind: string, momentum: number, weight_decay: number, clip_norm: number,
 *   proximal_mu: number}} Settings as /training.json gives them
 */
export class Optimizer {
  /**
   * @param {Float32Array[]} parameters
   * @param {Settings} settings
   * @param {number} lr
   */
  constructor(parameters, settings, lr) {
    this.parameters = parameters;
    this.settings = settings;
    this.lr = lr;
    this.steps = 0;
    const zeros = () => parameters.map(({ length }) => new Float32Array(length));
    this.first = zeros(); // Adam's first moment, or SGD's momentum
    this.second = settings.kind === "adam" ? zeros() : [];
    this.anchor = settings.proximal_mu ? parameters.map((values) => values.slice()) : [];
  }

  /** @param {Float32Array[]} grads changed by clipping */
  step(grads) {
    this.steps += 1;
    const { proximal_mu: mu, clip_norm: most } = this.settings;
    if (mu) this.pullBack(grads, mu);
    if (most) clip(grads, most);
    const update = this.settings.kind === "adam" ? this.adam : this.sgd;
    this.parameters.forEach((values, index) => update.call(this, values, grads[index], index));
  }

  /** Add FedProx's gradient: towards the weights at the round's start. */
  pullBack(grads, mu) {
    this.parameters.forEach((values, index) => {
      const [grad, anchor] = [grads[index], this.anchor[index]];
      for (let i = 0; i < values.length; i++) grad[i] += mu * (values[i] - anchor[i]);
    });
  }

  /** Kingma & Ba 2015, Algorithm 1, with torch's L2 penalty. */
  adam(values, grad, index) {
    const [m, v, { weight_decay: decay }] = [this.first[index], this.second[index], this.settings];
    const stepSize = this.lr / (1 - BETA_1 ** this.steps);
    const scale = Math.sqrt(1 - BETA_2 ** this.steps);
    for (let i = 0; i < values.length; i++) {
      const g = grad[i] + decay * values[i];
      m[i] += (1 - BETA_1) * (g - m[i]);
      v[i] = BETA_2 * v[i] + (1 - BETA_2) * g * g;
      values[i] -= (stepSize * m[i]) / (Math.sqrt(v[i]) / scale + EPS);
    }
  }

  sgd(values, grad, index) {
    const [buffer, { momentum, weight_decay: decay }] = [this.first[index], this.settings];
    for (let i = 0; i < values.length; i++) {
      const g = grad[i] + decay * values[i];
      buffer[i] = this.steps === 1 ? g : momentum * buffer[i] + g;
      values[i] -= this.lr * (momentum ? buffer[i] : g);
    }
  }
}

/** Scale gradients so that their norm is at most `most`. */
export function clip(grads, most) {
  let sum = 0;
  for (const grad of grads) for (let i = 0; i < grad.length; i++) sum += grad[i] * grad[i];
  const factor = most / (Math.sqrt(sum) + CLIP_EPS);
  if (!(factor < 1)) return;
  for (const grad of grads) for (let i = 0; i < grad.length; i++) grad[i] *= factor;
}
