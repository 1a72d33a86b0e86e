"""JavaScript in node: a module's text in, what it answers out. And which tests need what.

Bytes travel as base64 and are a ``Uint8Array`` over there; other typed arrays come back as lists.
"""

import base64
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

WEB = Path(__file__).parent.parent.parent / "experiments/web"
PAGE = WEB / "page"
NODE = shutil.which("node")
INSTALL = "npm ci --ignore-scripts --prefix experiments/web"
TIMEOUT_S = 60

needs_node = pytest.mark.skipif(not NODE, reason="node is not installed")
needs_runtime = pytest.mark.skipif(
    not (WEB / "node_modules/onnxruntime-web").is_dir(),
    reason=f"onnxruntime-web is not installed: {INSTALL}",
)

_PRELUDE = """
import { readFileSync, writeSync } from "node:fs";
const args = JSON.parse(readFileSync(0, "utf8"), (_, value) =>
  typeof value?.base64 === "string" ? new Uint8Array(Buffer.from(value.base64, "base64")) : value);
const answer = (value) => {
  const text = JSON.stringify(value ?? null, (_, item) => {
    if (item instanceof Uint8Array) return { base64: Buffer.from(item).toString("base64") };
    if (ArrayBuffer.isView(item)) return Array.from(item);
    return typeof item === "bigint" ? Number(item) : item;
  });
  for (let rest = Buffer.from(`\\nANSWER${text}\\n`); rest.length; )
    rest = rest.subarray(writeSync(1, rest));
};
"""


def run_module(text: str, *args: object, folder: Path = PAGE) -> Any:
    """Run an ES module in node, and return what it gives to ``answer``.

    ``text`` imports files of ``folder`` as ``./NAME.js``, finds ``args`` and calls
    ``answer(VALUE)`` once. An error in it fails the test with node's own words.
    """
    assert NODE, "mark the test with needs_node"
    done = subprocess.run(
        [NODE, "--no-warnings", "--input-type=module", "--eval", _PRELUDE + text],
        cwd=folder,
        input=json.dumps(args, default=_as_base64),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    said, found, value = done.stdout.partition("\nANSWER")
    assert found, f"the module did not call answer(): {said}{done.stderr}"
    return json.loads(value.splitlines()[0], object_hook=_from_base64)


def call(module: str, function: str, *args: object, folder: Path = PAGE) -> Any:
    """Return what an exported function of a page's module returns, awaited."""
    text = f'import {{ {function} }} from "./{module}"; answer(await {function}(...args));'
    return run_module(text, *args, folder=folder)


def _as_base64(value: object) -> object:
    if isinstance(value, bytes | bytearray | memoryview):
        return {"base64": base64.b64encode(value).decode()}
    if hasattr(value, "tolist"):  # arrays and tensors
        return value.tolist()
    raise TypeError(f"not for JSON: {type(value).__name__}")


def _from_base64(value: dict[str, Any]) -> Any:
    return base64.b64decode(value["base64"]) if set(value) == {"base64"} else value
