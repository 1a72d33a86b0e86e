"""What the page asks the site for when things go wrong, and the samples that a user gives it."""

from tests.support.javascript import needs_node, run_module

ASKING = """
import { getBytes, getJson } from "./asking.js";
import { Templates } from "./torchfile.js";
const answers = {
  busy: async () => new Response("too many\\nat once", { status: 503 }),
  wrong: async () => new Response("no such round", { status: 400 }),
  away: async () => { throw new TypeError("fetch failed"); },
  cut: async () =>
    new Response(new ReadableStream({ start: (one) => one.error(new TypeError("cut")) })),
};
const told = (error) => ({ said: error.message, again: error.again === true });
const found = {};
for (const [name, fetcher] of Object.entries(answers)) {
  const templates = new Templates("http://127.0.0.1/", fetcher);
  const asked = [getJson(fetcher, ""), getBytes(fetcher, ""), templates.of("float32", [1])];
  found[name] = await Promise.all(asked.map((one) => one.catch(told)));
}
answer(found);
"""


@needs_node
def test_what_may_pass_is_worth_another_try() -> None:
    found = run_module(ASKING)
    whys = {
        "busy": ("the site cannot answer now: too many at once", True),
        "wrong": ("no such round", False),
        "away": ("the site cannot be reached: fetch failed", True),
        "cut": ("the site cannot be reached: cut", True),
    }
    for name, (said, again) in whys.items():
        assert found[name] == [{"said": said, "again": again}] * 3


COLLECTION = """
import { Collection } from "./collection.js";
const own = new Collection(["0", "1", "2"]);
const bytes = (...values) => new Uint8Array(values);
const all = () => own.all({ withPixels: true });
const told = (act) => {
  try {
    return act() ?? "";
  } catch (error) {
    return error.message;
  }
};
own.draw(bytes(7), 2);
const drawn = all();
const others = { classes: ["0", "1"], train: { pixels: bytes(1), labels: [1] } };
const lost = told(() => own.take(others));
own.take({ classes: ["2", "1"], train: { pixels: bytes(1, 2), labels: [0, 1] }, test: "kept" });
const alien = told(() => own.draw(bytes(9), 0));
own.draw(bytes(8), 1);
answer({ drawn, lost, alien, both: all() });
"""


@needs_node
def test_drawings_and_a_folder_are_kept_together_or_refused() -> None:
    found = run_module(COLLECTION)
    assert found["drawn"]["train"] == {"pixels": b"\x07", "labels": [2]}
    assert found["lost"].startswith("drawings of 2 do not go with samples of 0, 1:")
    assert found["alien"].startswith("drawings of 0 do not go with samples of 2, 1:")
    both = found["both"]
    assert (both["classes"], both["test"]) == (["2", "1"], "kept")
    assert both["train"] == {"pixels": b"\x01\x02\x07\x08", "labels": [0, 1, 0, 1]}
