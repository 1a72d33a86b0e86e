// torch.save files of plain tensors, by templates of the site (/template): no pickle is made or
// interpreted here. A template is a real file, cut where the tensors' data and what is computed
// from them stand.

import { getJson } from "./asking.js";
import { crc32, joined, ProtocolError } from "./frames.js";

const NUMBERS = {
  float32: Float32Array, float64: Float64Array, int64: BigInt64Array, int32: Int32Array,
  uint8: Uint8Array,
};
const MASK = 2n ** 64n - 1n;

/**
 * @typedef {object} Template what experiments/web/templates.py makes
 * @property {{name: string, dtype: string, shape: number[], bytes: number}[]} tensors
 * @property {(string | {data: number} | {crc: number} | {id: true} | {id_crc: true})[]} pieces
 *   constant bytes in base64, and between them the places to fill in
 * @property {(number | {data: number})[]} crcs of all records but the id, in the file's order
 * @property {string} id the constant first half of the file's id
 * @property {string} pickle the record that says names, dtypes and shapes, in base64
 * @property {number} most the most bytes of such a file
 */

/** Return the bytes of a base64 text. */
export function fromBase64(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

/**
 * Return the file of tensors: what torch.save writes for them, byte for byte.
 * @param {Template} template
 * @param {(Float32Array | Float64Array | BigInt64Array | Int32Array | Uint8Array)[]} tensors
 */
export function fill(template, tensors) {
  const data = template.tensors.map(({ name, dtype, bytes }, index) => {
    const numbers = tensors[index];
    if (!(numbers instanceof NUMBERS[dtype]) || numbers.byteLength !== bytes) {
      throw new TypeError(`${name || "the tensor"}: wanted are ${bytes} bytes of ${dtype}`);
    }
    return new Uint8Array(numbers.buffer, numbers.byteOffset, bytes);
  });
  const crcs = data.map((bytes) => crc32(bytes));
  const id = idDigits(template.crcs.map((crc) => (typeof crc === "number" ? crc : crcs[crc.data])));
  const digits = new TextEncoder().encode(id);
  const idCrc = crc32(digits, crc32(new TextEncoder().encode(template.id)));
  const pieces = template.pieces.map((piece) => {
    if (typeof piece === "string") return fromBase64(piece);
    if ("data" in piece) return data[piece.data];
    if ("crc" in piece) return littleEndian(crcs[piece.crc]);
    return "id" in piece ? digits : littleEndian(idCrc);
  });
  return joined(...pieces);
}

/** Return the second half of a file's id: torch's hash of its records' CRCs. */
function idDigits(crcs) {
  let hash = 0n;
  for (const crc of crcs) {
    // boost's hash_combine
    hash ^= BigInt(crc) + 0x9e3779b9n + ((hash << 6n) & MASK) + (hash >> 2n);
    hash &= MASK;
  }
  return hash.toString().padStart(20, "0");
}

function littleEndian(number) {
  const bytes = new DataView(new ArrayBuffer(4));
  bytes.setUint32(0, number, true);
  return new Uint8Array(bytes.buffer);
}

/**
 * Return the tensors in a file of torch.save, whose pickle must be the template's: so names, dtypes
 * and shapes are as expected. The file may be of another version of torch.
 * @param {Template} template
 * @param {Uint8Array} file
 */
export function read(template, file) {
  const records = readRecords(file);
  const pickle = fromBase64(template.pickle);
  const theirs = records.get("data.pkl");
  if (theirs?.length !== pickle.length || theirs.some((byte, index) => byte !== pickle[index])) {
    throw new ProtocolError(`a file holds other tensors than ${described(template)}`);
  }
  return template.tensors.map(({ dtype, bytes }, index) => {
    const record = records.get(`data/${index}`);
    if (record?.length !== bytes) {
      throw new ProtocolError(`a file's tensor ${index} has ${record?.length ?? 0} bytes of ${bytes}`);
    }
    return new NUMBERS[dtype](record.slice().buffer);
  });
}

function described({ tensors }) {
  const one = ({ name, dtype, shape }) => `${name ? `${name} ` : ""}${dtype} [${shape}]`;
  return tensors.map(one).join(", ");
}

/** Return the contents of a zip's stored records by name, without the folder; check their CRCs. */
function readRecords(file) {
  const view = new DataView(file.buffer, file.byteOffset, file.length);
  try {
    return recordsOf(file, view);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    throw new ProtocolError("a file is no whole torch.save file");
  }
}

function recordsOf(file, view) {
  const end = file.length - 22;
  if (view.getUint32(end, true) !== 0x06054b50) {
    throw new ProtocolError("a file is no torch.save file: its end is not there");
  }
  const records = new Map();
  let entry = view.getUint32(end + 16, true);
  for (let left = view.getUint16(end + 10, true); left > 0; left--) {
    const names = view.getUint16(entry + 28, true);
    const size = view.getUint32(entry + 20, true);
    const head = view.getUint32(entry + 42, true);
    const isStored = view.getUint16(entry + 10, true) === 0;
    const name = new TextDecoder().decode(file.subarray(entry + 46, entry + 46 + names));
    const start = head + 30 + view.getUint16(head + 26, true) + view.getUint16(head + 28, true);
    const content = file.subarray(start, start + size);
    if (!isStored || content.length !== size || crc32(content) !== view.getUint32(entry + 16, true)) {
      throw new ProtocolError(`a file's record ${name.slice(0, 80)} is damaged`);
    }
    records.set(name.slice(name.indexOf("/") + 1), content);
    entry += 46 + names + view.getUint16(entry + 30, true) + view.getUint16(entry + 32, true);
  }
  return records;
}

/** Return whether a tensor holds finite numbers alone. */
export function areFinite(numbers) {
  return !(numbers instanceof Float32Array || numbers instanceof Float64Array) || numbers.every(Number.isFinite);
}

/** Fetches templates from the site and keeps them. */
export class Templates {
  /** @param {string | URL} base the address of the site */
  constructor(base, fetcher = (url) => fetch(url)) {
    this.base = base;
    this.fetcher = fetcher;
    this.known = new Map();
  }

  /**
   * Return the template of a file of one tensor.
   * @param {string} dtype
   * @param {number[]} shape
   * @returns {Promise<Template>}
   */
  of(dtype, shape) {
    const query = `template?dtype=${dtype}&shape=${shape.join(",")}`;
    if (!this.known.has(query)) {
      const found = getJson(this.fetcher, new URL(query, this.base));
      found.catch(() => this.known.delete(query));
      this.known.set(query, found);
    }
    return this.known.get(query);
  }
}
