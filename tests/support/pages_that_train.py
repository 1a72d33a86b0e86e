"""Pages that train: the page's modules in node, with the inference runtime of ``node_modules``."""

import base64
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.support import digits
from tests.support.javascript import NODE, PAGE

TIMEOUT_S = 90
# Finds ``given`` and ``say``; makes trainers by ``trainer(more)``.
_BEGIN = """
import { readFileSync } from "node:fs";
import * as ort from "onnxruntime-web";
import { Front } from "./front.js";
import { Samples } from "./samples.js";
import { fill, Templates } from "./torchfile.js";
import { loadPlan, Trainer } from "./training.js";
const given = JSON.parse(readFileSync(0, "utf8"));
const { base, client } = given;
const say = (value) => process.stdout.write(`${JSON.stringify(value)}\\n`);
const part = ({ pixels, labels }) =>
  ({ pixels: new Uint8Array(Buffer.from(pixels, "base64")), labels });
ort.env.wasm.numThreads = 1;
const plan = await loadPlan(base);
const front = await Front.load(ort, plan, base);
const samples = new Samples(plan, { train: part(given.train), test: part(given.test) });
const templates = new Templates(base);
const url = new URL("train", base.replace("http", "ws"));
const runtime = `onnxruntime-web ${ort.env.versions.web}`;
let trainer = (more) => new Trainer(
  { url, base, plan, front, samples, templates, client, runtime, patienceS: 20, ...more });
"""
TRAIN = """
const notes = new Set();
const trains = trainer({ onProgress: (progress) => {
  if (progress.state !== "lost") notes.add(progress.note);
  if (given.until && progress.round === given.until.round && progress.step >= given.until.step)
    process.exit(7);
} });
const end = (value) => (say({ ...value, notes: [...notes] }), process.exit(0));
await trains.run().then(() => end(trains.progress), (error) => end({ error: error.message }));
"""
# In a round, the connection is cut once, and the site fails once to give what a page asks for.
UNLUCKY = """
const left = new Set(["order", "template"]);
const luckless = async (url) => {
  for (const name of left) if (String(url).includes(name) && left.delete(name)) {
    if (name === "order") return new Response("busy", { status: 503 });
    throw new TypeError("fetch failed");
  }
  return fetch(url);
};
const step = Trainer.prototype.step;
Trainer.prototype.step = async function (...given) {
  await step.apply(this, given);
  if (given[1] === 1 && !this.wasCut) {
    this.wasCut = true;
    this.link.socket.close();
  }
};
const plainly = trainer;
trainer = (more) =>
  plainly({ ...more, fetcher: luckless, templates: new Templates(base, luckless) });
"""
# What each hostile page does instead of a step's file; and what comes back.
HOSTILE = """
const at = (numbers, dtype, shape) => templates.of(dtype, shape).then((t) => fill(t, [numbers]));
const wrongs = {
  shape: (z) => at(z, "float32", [z.length]),
  dtype: (z, [n, size]) => at(Float64Array.from(z.slice(z.length / 2)), "float64", [n / 2, size]),
  samples: (z, [n, size]) => at(z.slice(size), "float32", [n - 1, size]),
  size: async () => new Uint8Array(5e6),
  garbage: async (z) => Uint8Array.from({ length: 4 * z.length }, (_, i) => i * 7),
  nan: (z, shape) => at(z.fill(NaN), "float32", shape),
  huge: (z, shape) => at(z.fill(3e38), "float32", shape),
};
const refusals = {};
for (const [name, wrong] of Object.entries(wrongs)) {
  const bad = trainer({});
  const encode = bad.encode.bind(bad);
  bad.encode = (dtype, numbers, shape) =>
    dtype === "float32" ? wrong(numbers.slice(), shape) : encode(dtype, numbers, shape);
  refusals[name] = await bad.run().then(() => "", (error) => error.message);
}
const labels = trainer({});
labels.encode = (dtype, numbers, shape) =>
  at(dtype === "int64" ? numbers.fill(99n) : numbers, dtype, shape);
refusals.labels = await labels.run().then(() => "", (error) => error.message);
const floods = trainer({});
floods.step = async (round, step, rows) => {
  const payload = await floods.encode("int64", new BigInt64Array(rows.length), [rows.length]);
  for (let i = 0; i < 3000; i++)
    floods.link.send("TRAINING_LABELS", "", { at: floods.at(round, step), payload });
  await floods.link.receive(["TRAINING_GRADS"]);
};
refusals.flood = await floods.run().then(() => "", (error) => error.message);
say(refusals);
"""


class Own(NamedTuple):
    """A client's own samples. x: (N, 1, 28, 28) uint8; y: (N,) int64."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    @classmethod
    def of(cls, client: int, num_train: int, num_test: int) -> "Own":
        """Return a client's share of the digits, which lie there class by class."""
        train, test = digits.both()
        rows, tests = (
            slice(client, client + n * (len(whole) // n), len(whole) // n)
            for whole, n in ((train, num_train), (test, num_test))
        )
        return cls(
            train.x[rows].numpy(), train.y[rows].numpy(), test.x[tests].numpy(),
            test.y[tests].numpy(),
        )  # fmt: skip

    def write(self, folder: Path) -> Path:
        """Write them as a Python client reads them; return the folder."""
        folder.mkdir(parents=True)
        np.savez(folder / "data.npz", **self._asdict())
        return folder

    def for_page(self) -> dict[str, Any]:
        """Return them as ``samples.js`` takes them, with pixels in base64."""
        return {"train": _part(self.x, self.y), "test": _part(self.x_test, self.y_test)}


def _part(x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    return {"pixels": base64.b64encode(x.tobytes()).decode(), "labels": y.tolist()}


def run_pages(
    text: str, base: str, client: int | None, own: Own, **more: Any
) -> tuple[int, list[Any]]:
    """Run a program of pages in node; return its exit code and what it said, line by line."""
    given: Mapping[str, Any] = {"base": base, "client": client, **own.for_page(), **more}
    assert NODE
    done = subprocess.run(
        [
            NODE,
            "--experimental-websocket",
            "--no-warnings",
            "--input-type=module",
            "-e",
            _BEGIN + text,
        ],
        cwd=PAGE,
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert not done.stderr, done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]
