"""Samples that a page trains with: what is refused, in words."""

from tests.support.javascript import needs_node, run_module

LAYOUTS = """
import { Samples } from "./samples.js";
const plan = { input_shape: [1, 2, 2], classes: ["a", "b"], most_samples: 1200 };
const told = (train) => {
  try { return new Samples(plan, { train }) && ""; } catch (error) { return error.message; }
};
answer([
  { pixels: new Uint8Array(8), labels: [0, 1] },
  { pixels: [0, 0, 0, 0], labels: [0] },
  { pixels: new Uint8Array(8) },
  undefined,
  { pixels: new Uint8Array(9), labels: [0, 1] },
  { pixels: new Uint8Array(4), labels: [2] },
  { pixels: new Uint8Array(0), labels: [] },
  { pixels: new Uint8Array(4 * 1201), labels: Array(1201).fill(0) },
].map(told));
"""


@needs_node
def test_samples_of_another_layout_are_refused_in_words() -> None:
    layout = "train: give {pixels: a Uint8Array, labels: an array of numbers}"
    assert run_module(LAYOUTS) == [
        "", layout, layout, layout,
        "train: 2 labels need 8 pixels, 4 for each sample; there are 9",
        "train: there is no class 2: classes are numbered from 0 to 1",
        "there are no samples to train on",
        "more than 1,200 samples",
    ]  # fmt: skip
