/** Predictions of one sample: by the whole model here, or by the front here and the server's back. */

/**
 * @typedef {object} Found
 * @property {Float32Array} outputs  logits, (classes,)
 * @property {{front: number, way: number, back: number}} times  in ms
 * @property {number} bytesSent
 * @property {number} bytesReceived
 * @property {Feature[]} features  what was sent
 *
 * @typedef {object} Feature
 * @property {number} link  the cut
 * @property {number[]} shape  without the batch
 * @property {number[]} maps  [channels, height, width] before the model flattened them; else `shape`
 * @property {Float32Array} data
 */

/** Compute with the whole model. @returns {Promise<Found>} */
export async function whole(model, runtime, x) {
  const session = await runtime.sessionFor(model.whole);
  const { data, ms } = await session.compute(x, [1, ...model.input_shape]);
  const times = { front: ms, way: 0, back: 0 };
  return { outputs: data, times, bytesSent: 0, bytesReceived: 0, features: [] };
}

/**
 * Compute with this machine's segments, and the server's.
 * @param {import("./inference.js").Inference} inference
 * @param {(feature: Feature) => void} onSend
 *   told of each tensor before it is sent
 * @returns {Promise<Found>}
 */
export async function split(model, runtime, inference, x, onSend) {
  const found = {
    outputs: null, times: { front: 0, way: 0, back: 0 }, bytesSent: 0, bytesReceived: 0, features: [],
  };
  const compute = async (index, data, shape) => {
    const session = await runtime.sessionFor(model.segments[index].file);
    const result = await session.compute(data, shape);
    found.times.front += result.ms;
    return result;
  };
  const sending = (link, { data, shape }) => {
    const { maps } = model.features.find((cut) => cut.link === link);
    const feature = { link, shape: shape.slice(1), maps: maps ?? shape.slice(1), data };
    found.features.push(feature);
    onSend(feature);
    return data;
  };
  let totalMs = 0;
  const count = (reply) => {
    const { times } = found;
    totalMs += reply.totalMs;
    if (Number.isFinite(reply.seconds)) times.back = 1000 * reply.seconds; // comes with the last reply
    times.way = Math.max(0, totalMs - times.back);
    found.bytesSent += reply.bytesSent;
    found.bytesReceived += reply.bytesReceived;
    return reply;
  };
  const z = await compute(0, x, [1, ...model.input_shape]);
  let reply = count(await inference.infer(sending(0, z), 1));
  while (reply.link >= 0) {
    const index = reply.link + 1; // the segment behind that cut is held here
    const own = await compute(index, reply.data, reply.shape);
    if (index === model.segments.length - 1) {
      inference.finish();
      found.outputs = own.data;
      return found;
    }
    reply = count(await inference.goOn(index, sending(index, own)));
  }
  found.outputs = reply.data;
  return found;
}
