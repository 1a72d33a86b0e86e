"""What the site answers over HTTP: files of the page, the inference runtime, and routes.

A route is given the parameters of a request's query. What raises one of our errors is answered by
its line.
"""

import gzip
import http
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl

from sfl.errors import SflError, reason_of
from sfl.wire.link import one_line

HERE = Path(__file__).parent
INSTALL = "npm ci --ignore-scripts --prefix experiments/web"  # brings the inference runtime
_RUNTIME = HERE / "node_modules" / "onnxruntime-web" / "dist"
# The builds for wasm and for WebGPU, each with what it loads.
RUNTIME_FILES = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
JSON, ONNX = "application/json", "application/octet-stream"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
}
_OF_THE_PAGE = (".html", ".js", ".css", ".svg")
DAY_S = 86400
MOST_PARAMETERS = 16
# Kinds of requests: files of the page; routes; routes that ask the server of ``--train``.
KINDS = FILE, ROUTE, ASKING = "file", "route", "asking"
_ASKING = "/training"  # how their paths begin
_WORTH_PACKING = 1024  # bytes
_LEVEL = 6  # of gzip: 26 MB to 6 MB in a second


class Answer(NamedTuple):
    """What a request is answered with."""

    content_type: str
    body: bytes
    max_age_s: int = 0  # for which a browser may keep it; 0: it asks each time


Route = Callable[[Mapping[str, str]], Answer]


class Response(NamedTuple):
    """An answer as it is sent."""

    status: http.HTTPStatus
    content_type: str
    body: bytes
    max_age_s: int = 0
    packed: bool = False  # by gzip


def refusal(status: http.HTTPStatus, why: str) -> Response:
    """Return a response that says in one line why there is nothing else."""
    return Response(status, "text/plain; charset=utf-8", f"{one_line(why)}\n".encode())


def has_runtime() -> bool:
    """Return whether the inference runtime is installed."""
    return all((_RUNTIME / name).is_file() for name in RUNTIME_FILES)


class Pages:
    """Answers requests; safe to use from several threads."""

    def __init__(
        self, routes: Mapping[str, Route], tell: Callable[[str], None], folder: Path = HERE / "page"
    ) -> None:
        """``tell`` gets a line for each fault of ours."""
        self._routes, self._tell, self._folder = routes, tell, folder
        self._packed: dict[tuple[Path, int], bytes] = {}  # by file and time of its last change
        self._lock = threading.Lock()

    def kind_of(self, path: str) -> str:
        """Return which of ``KINDS`` a request for a path is."""
        if path not in self._routes:
            return FILE
        return ASKING if path.startswith(_ASKING) else ROUTE

    def respond(self, target: str, *, accepts_gzip: bool) -> Response:
        """Return the response to a GET of a path with its query."""
        path, _, query = target.partition("?")
        try:
            if path in self._routes:
                given = parse_qsl(query, keep_blank_values=True, max_num_fields=MOST_PARAMETERS)
                return _of_route(self._routes[path](dict(given)), accepts_gzip=accepts_gzip)
            return self._of_file(path, accepts_gzip=accepts_gzip)
        except (SflError, ValueError) as error:
            return refusal(http.HTTPStatus.BAD_REQUEST, reason_of(error))
        except Exception as error:  # noqa: BLE001 - the edge of one request
            self._tell(f"warning: cannot answer {path[:80]!r}: {reason_of(error)}")
            return refusal(http.HTTPStatus.INTERNAL_SERVER_ERROR, reason_of(error))

    def _of_file(self, path: str, *, accepts_gzip: bool) -> Response:
        folder, _, name = path.rpartition("/")
        if folder == "/ort":
            if not has_runtime():
                why = f"the inference runtime is not installed: {INSTALL}"
                return refusal(http.HTTPStatus.NOT_FOUND, why)
            if name in RUNTIME_FILES:
                return self._read(_RUNTIME / name, DAY_S, accepts_gzip=accepts_gzip)
        # One of the folder's own files: a name from outside is compared, and opens nothing.
        if not folder and Path(name or "index.html").suffix in _OF_THE_PAGE:
            wanted = name or "index.html"
            for file in self._folder.iterdir():
                if file.name == wanted and file.is_file():
                    return self._read(file, 0, accepts_gzip=accepts_gzip)
        return refusal(http.HTTPStatus.NOT_FOUND, "there is no such page")

    def _read(self, file: Path, max_age_s: int, *, accepts_gzip: bool) -> Response:
        kind = _TYPES[file.suffix]
        if not accepts_gzip:
            return Response(http.HTTPStatus.OK, kind, file.read_bytes(), max_age_s)
        key = (file, file.stat().st_mtime_ns)
        with self._lock:
            if key not in self._packed:
                self._packed = {k: v for k, v in self._packed.items() if k[0] != file}
                self._packed[key] = gzip.compress(file.read_bytes(), _LEVEL)
            return Response(http.HTTPStatus.OK, kind, self._packed[key], max_age_s, packed=True)


def _of_route(answer: Answer, *, accepts_gzip: bool) -> Response:
    kind, body, max_age_s = answer
    packs = accepts_gzip and len(body) > _WORTH_PACKING and kind == JSON
    body = gzip.compress(body, _LEVEL) if packs else body
    return Response(http.HTTPStatus.OK, kind, body, max_age_s, packed=packs)
