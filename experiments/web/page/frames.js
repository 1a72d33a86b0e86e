// SFL's frames: messages to bytes and back, without I/O. The format: docs/protocol.md, "Frames".

const MAGIC = 0x53464c0a; // "SFL\n"
const VERSION = 3;
const HEAD_BYTES = 28;
export const MAX_JSON_BYTES = 64 * 1024;
const MAX_DEPTH = 16; // of JSON, as sfl/files/strict_json.py has it
const NAN = "\u0000NaN"; // stands for NaN between two passes over a JSON text
const OF_JSON = /"(?:[^"\\]|\\.)*"|-?Infinity|NaN/g;
const PART_OF_JSON = /"(?:[^"\\]|\\.)*"|[[\]{}:]/g;

// The types of messages that always carry a file; others never do.
export const FILE_TYPES = new Set([
  "TRAINING_LABELS", "TRAINING_FEATURES", "TRAINING_GRADS", "SEND_MODEL", "SEND_AGGREGATED_MODEL",
  "VALIDATION_LABELS", "VALIDATION_FEATURES", "INFERENCE_FEATURES", "INFERENCE_OUTPUTS",
]);

/** The peer broke the protocol, or its bytes are damaged. */
export class ProtocolError extends Error {}

/**
 * A message's place in the run; -1 and "" where it has none.
 * @typedef {{run: string, round: number, step: number, client: number, link: number}} Position
 */
export const NOWHERE = Object.freeze({ run: "", round: -1, step: -1, client: -1, link: 0 });

/**
 * @typedef {object} Message
 * @property {string} type
 * @property {any} content any JSON value
 * @property {Position} at
 * @property {Uint8Array} payload the bytes of a torch.save file, or none
 * @property {number} bytes its size on the wire
 */

const TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  let crc = n;
  for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ 0xedb88320 : crc >>> 1;
  return crc >>> 0;
});

/** Return the CRC-32 of bytes, continued from `before`. */
export function crc32(bytes, before = 0) {
  let crc = ~before >>> 0;
  for (let i = 0; i < bytes.length; i++) crc = TABLE[(crc ^ bytes[i]) & 255] ^ (crc >>> 8);
  return ~crc >>> 0;
}

/** Return a CRC-32 in the format of the wire: `crc32:0123abcd`. */
export function checksumText(crc) {
  return `crc32:${crc.toString(16).padStart(8, "0")}`;
}

/** Return the value of a JSON text that may hold NaN and Infinity, as Python's does. */
export function parseJson(text) {
  const plain = text.replace(OF_JSON, (found) => {
    if (found[0] === '"') return found;
    return found === "NaN" ? '"\\u0000NaN"' : found.replace("Infinity", "1e999");
  });
  return JSON.parse(plain, (_, value) => (value === NAN ? NaN : value));
}

/**
 * See that a JSON text is not deep, and that no object has a field twice: of two, JSON.parse takes
 * the last without a word.
 * @throws {Error} it is not so
 */
function checkFields(text) {
  const open = []; // the fields of each object around a place; null: an array
  let last = "";
  for (const [part] of text.matchAll(PART_OF_JSON)) {
    if (part === "{" || part === "[") open.push(part === "{" ? new Set() : null);
    else if (part === "}" || part === "]") open.pop();
    else if (part === ":") {
      const [fields, name] = [open.at(-1), JSON.parse(last)];
      if (fields?.has(name)) throw new Error("it names a field twice");
      fields?.add(name);
    }
    if (open.length > MAX_DEPTH) throw new Error(`it is nested more than ${MAX_DEPTH} deep`);
    last = part;
  }
}

/** Return the bytes of pieces, one behind the other. */
export function joined(...pieces) {
  const whole = new Uint8Array(pieces.reduce((sum, piece) => sum + piece.length, 0));
  let at = 0;
  for (const piece of pieces) {
    whole.set(piece, at);
    at += piece.length;
  }
  return whole;
}

/**
 * Return the frame of a message.
 * @param {{type: string, sender?: string, receiver?: string, at?: Position, content?: any,
 *   payload?: Uint8Array}} message
 */
export function encode(message) {
  const { type, sender = "", receiver = "", at = NOWHERE, content = "" } = message;
  const payload = message.payload ?? new Uint8Array(0);
  const fields = {
    type, sender, receiver, run: at.run, round: at.round, step: at.step, client: at.client,
    link: at.link, content,
  };
  if (payload.length) fields.checksum = checksumText(crc32(payload));
  const text = new TextEncoder().encode(JSON.stringify(fields));
  const head = new DataView(new ArrayBuffer(HEAD_BYTES));
  head.setUint32(0, MAGIC);
  head.setUint8(4, VERSION);
  head.setUint32(8, text.length);
  head.setBigUint64(12, BigInt(payload.length));
  head.setUint32(20, crc32(text));
  const bytes = new Uint8Array(head.buffer);
  head.setUint32(24, crc32(bytes.subarray(0, 24)));
  return joined(bytes, text, payload);
}

/**
 * Decodes a stream of bytes, in pieces of any size, into messages.
 *
 * `limits`: the most bytes of a file by message type; other types carry none. Checked before
 * anything is kept for a file.
 */
export class Decoder {
  /** @param {Record<string, number>} limits */
  constructor(limits = {}) {
    this.limits = limits;
    this.pieces = []; // bytes that are not decoded yet
    this.size = 0;
    this.head = null;
    this.begun = null; // the JSON, once it is there
  }

  /** @param {Uint8Array} bytes */
  feed(bytes) {
    if (bytes.length) this.pieces.push(bytes);
    this.size += bytes.length;
  }

  /**
   * Return the next complete message, or null when more bytes are needed.
   * @returns {Message | null}
   */
  next() {
    if (!this.head) {
      if (this.size < HEAD_BYTES) return null;
      this.head = parseHead(this.take(HEAD_BYTES));
    }
    const { jsonBytes, payloadBytes, crc } = this.head;
    if (!this.begun) {
      if (this.size < jsonBytes) return null;
      this.begun = this.parseJson(this.take(jsonBytes), crc, payloadBytes);
    }
    if (this.size < payloadBytes) return null;
    const { checksum, ...message } = this.begun;
    const payload = this.take(payloadBytes);
    this.head = this.begun = null;
    if (payload.length && checksumText(crc32(payload)) !== checksum) {
      throw new ProtocolError(`the file of a ${message.type} arrived damaged: its checksum differs`);
    }
    return { ...message, payload, bytes: HEAD_BYTES + jsonBytes + payloadBytes };
  }

  take(count) {
    if (this.pieces.length > 1) this.pieces = [joined(...this.pieces)];
    const all = this.pieces[0] ?? new Uint8Array(0);
    this.pieces = [all.subarray(count)];
    this.size -= count;
    return all.slice(0, count);
  }

  parseJson(text, crc, payloadBytes) {
    if (crc32(text) !== crc) throw new ProtocolError("a message's JSON arrived damaged");
    const fields = parseMessage(text);
    const { type, run, round, step, client, link, content, checksum } = fields;
    if (FILE_TYPES.has(type) !== payloadBytes > 0) {
      throw new ProtocolError(`${type} comes ${payloadBytes ? "with" : "without"} a file`);
    }
    const allowed = payloadBytes ? this.limits[type] ?? 0 : 0;
    if (payloadBytes > allowed) {
      throw new ProtocolError(
        `${type} announces a file of ${payloadBytes} bytes; at most ${allowed} are accepted here`,
      );
    }
    return { type, content, checksum, at: { run, round, step, client, link } };
  }
}

function parseHead(bytes) {
  const head = new DataView(bytes.buffer, bytes.byteOffset, HEAD_BYTES);
  if (head.getUint32(0) !== MAGIC) throw new ProtocolError("the server does not speak SFL");
  if (head.getUint8(4) !== VERSION) {
    throw new ProtocolError(`the server speaks protocol ${head.getUint8(4)}, this page ${VERSION}`);
  }
  if (crc32(bytes.subarray(0, 24)) !== head.getUint32(24)) {
    throw new ProtocolError("the head of a message arrived damaged: its checksum differs");
  }
  if (head.getUint8(5) || head.getUint16(6)) {
    throw new ProtocolError("the head of a message has flags that this page does not know");
  }
  const jsonBytes = head.getUint32(8);
  if (jsonBytes > MAX_JSON_BYTES) {
    throw new ProtocolError(`a message of ${jsonBytes} bytes; at most ${MAX_JSON_BYTES} are read`);
  }
  return { jsonBytes, payloadBytes: Number(head.getBigUint64(12)), crc: head.getUint32(20) };
}

function parseMessage(text) {
  let fields;
  try {
    const plain = new TextDecoder("utf-8", { fatal: true }).decode(text);
    checkFields(plain);
    fields = parseJson(plain);
  } catch (error) {
    throw new ProtocolError(`a message's JSON cannot be read: ${error.message}`);
  }
  const numbers = ["round", "step", "client", "link"].every((name) => Number.isInteger(fields?.[name]));
  if (!numbers || typeof fields.type !== "string" || typeof fields.run !== "string") {
    throw new ProtocolError("a message's fields are not the protocol's");
  }
  return fields;
}
