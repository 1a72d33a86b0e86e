// A picked folder of images as samples: FOLDER/<class>/*.png, or FOLDER/train/<class>/... with, if
// there are any, FOLDER/val/<class>/... and FOLDER/test/<class>/..., as SFL's own image folders.

import { sumBlocks } from "./drawing.js";

const SUFFIX = /\.(png|jpe?g|bmp|gif|webp)$/i;
const PARTS = { train: "train", val: "validation", test: "test" };
const FINER = 8; // by how much an image of another size is drawn larger before its blocks are summed
const MOST_FILES = 100_000;

/**
 * Read the images of a picked folder.
 * @param {Iterable<File>} files of an `<input webkitdirectory>`
 * @param {number[]} shape [channels, height, width] of a sample
 * @param {(done: number, of: number) => void} onProgress
 * @returns {Promise<{classes: string[], train: object, validation?: object, test?: object}>} as
 *   samples.js takes it; classes are the folders' names, sorted
 * @throws {Error} the folder has another layout, or an image cannot be read
 */
export async function readFolder(files, shape, onProgress = () => {}) {
  const found = [...files].map(placeOf).filter((place) => place !== null);
  const train = found.filter(({ part }) => part === "train");
  if (!train.length) {
    throw new Error("no images there: wanted are FOLDER/<class>/<image>.png, or FOLDER/train/<class>/<image>.png");
  }
  if (found.length > MOST_FILES) throw new Error(`${found.length} images; at most ${MOST_FILES} are read`);
  const classes = [...new Set(train.map(({ name }) => name))].sort();
  const others = found.find(({ name }) => !classes.includes(name));
  if (others) throw new Error(`the class ${others.name} is in ${others.part} alone`);
  found.sort((a, b) => (a.path < b.path ? -1 : 1));
  const given = { classes };
  let done = 0;
  for (const part of Object.values(PARTS)) {
    const places = found.filter((place) => place.part === part);
    if (!places.length) continue;
    const size = shape.reduce((product, side) => product * side, 1);
    const pixels = new Uint8Array(places.length * size);
    for (const [row, { file }] of places.entries()) {
      pixels.set(await pixelsOf(file, shape), row * size);
      onProgress(++done, found.length);
    }
    given[part] = { pixels, labels: places.map(({ name }) => classes.indexOf(name)) };
  }
  return given;
}

/** Return where an image belongs; null for what is none, or lies elsewhere. */
function placeOf(file) {
  const [, ...inner] = file.webkitRelativePath.split("/");
  if (!SUFFIX.test(file.name) || inner.some((name) => name.startsWith("."))) return null;
  const part = inner.length === 3 ? PARTS[inner[0]] : inner.length === 2 ? "train" : undefined;
  return part ? { part, name: inner.at(-2), path: inner.join("/"), file } : null;
}

async function pixelsOf(file, shape) {
  const [, height, width] = shape;
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
  } catch {
    throw new Error(`${file.webkitRelativePath} is no image that this browser reads`);
  }
  const block = bitmap.width === width && bitmap.height === height ? 1 : FINER;
  const canvas = new OffscreenCanvas(width * block, height * block);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return sumBlocks(context.getImageData(0, 0, canvas.width, canvas.height).data, shape, block);
}
