"""A bucket for tests: gcp-storage-emulator, and in front of it what it lacks and what goes wrong.

The emulator (pinned in ``requirements-dev.txt``) ignores every generation precondition, so that
create-once would silently overwrite. ``Gate`` is an HTTP proxy that adds the two that the store
uses, as Cloud Storage documents them (https://cloud.google.com/storage/docs/request-preconditions):

- ``ifGenerationMatch=0`` on an upload: 412 if the object exists. Checked where the upload is made
  visible: at a multipart upload, and at the last part of a resumable one.
- ``ifGenerationMatch=G`` on a download: 412 if the object's generation is another.

A finished resumable upload that is asked for again gets its answer again, as from Cloud Storage.
The gate also misbehaves on demand: ``faults`` decide for each request.
"""

import contextlib
import http.client
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.support.launch import free_port

BUCKET = "sfl-tests"
HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive", "host"}


@dataclass(frozen=True)
class Request:
    """One request, before it is forwarded."""

    method: str
    path: str  # unquoted, without the query
    query: dict[str, list[str]]
    body: bytes

    @property
    def uploads(self) -> str:
        """The name of the object that this request makes visible if it succeeds, or ""."""
        if self.method != "POST" or not self.path.startswith("/upload/"):
            return ""
        found = re.search(rb'"name": *"((?:[^"\\]|\\.)*)"', self.body)
        return json.loads(b'"' + found[1] + b'"') if found else ""


DROP = "drop"  # a fault: forward, then close without the answer
STALL = "stall"  # a fault: say nothing for STALL_S, then close
STALL_S = 1.5
Fault = str | tuple[int, str] | None  # or an answer of our own; None: go on


@dataclass
class Gate:
    """The proxy. Closed by ``with``; ``stop`` and ``start`` take it from the net and back."""

    emulator_port: int
    port: int = field(default_factory=free_port)
    faults: Callable[[Request], Fault] = lambda request: None
    log: list[str] = field(default_factory=list)
    _sessions: dict[str, str] = field(default_factory=dict)  # upload id -> object
    _finished: dict[str, tuple[int, dict[str, str], bytes]] = field(default_factory=dict)
    _creating: threading.Lock = field(default_factory=threading.Lock)
    _server: ThreadingHTTPServer | None = None

    def __enter__(self) -> "Gate":
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        gate = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def _handle(self) -> None:
                with contextlib.suppress(ConnectionError):
                    gate._handle(self)

            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _handle  # noqa: N815

        ThreadingHTTPServer.allow_reuse_address = True
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(handler.path)
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        request = Request(handler.command, unquote(parts.path), parse_qs(parts.query), body)
        self.log.append(f"{request.method} {request.path} {request.uploads}".strip())
        if self._server is None:  # a kept connection of before the stop
            handler.close_connection = True
            return
        fault = self.faults(request)
        if isinstance(fault, tuple):
            self._answer(handler, fault[0], error(*fault), {})
            return
        if fault == STALL:
            time.sleep(STALL_S)
            handler.close_connection = True
            return
        upload_id = request.query.get("upload_id", [""])[0]
        name = request.uploads or self._sessions.get(upload_id, "")
        wants = request.query.get("ifGenerationMatch", [""])[0]
        with self._creating if name else contextlib.nullcontext():
            if upload_id in self._finished:
                status, headers, content = self._finished[upload_id]
            elif self._refuses(request, name, wants):
                self._answer(handler, 412, error(412, "conditionNotMet"), {})
                return
            else:
                status, headers, content = self._forward(handler, body)
            if upload_id and status == 200:
                self._finished[upload_id] = status, headers, content
        session = re.search(r"upload_id=([^&]+)", headers.get("Location", ""))
        if session and name:
            self._sessions[session[1]] = name
        if fault == DROP:
            handler.close_connection = True
            handler.connection.close()
            return
        self._answer(handler, status, content, headers)

    def _refuses(self, request: Request, name: str, wants: str) -> bool:
        """Say whether a precondition does not hold."""
        if name:
            return (wants == "0" or not request.uploads) and self.generation(name) is not None
        found = re.search(r"/b/[^/]+/o/(.+)$", request.path)
        if request.method == "GET" and wants and found:
            return self.generation(found[1]) not in (None, wants)
        return False

    def generation(self, name: str) -> str | None:
        """Return an object's generation, or None if there is none."""
        connection = http.client.HTTPConnection("127.0.0.1", self.emulator_port)
        connection.request("GET", f"/storage/v1/b/{BUCKET}/o/{quote(name, safe='')}")
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return str(json.loads(content)["generation"]) if answer.status == 200 else None

    def _forward(
        self, handler: BaseHTTPRequestHandler, body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.emulator_port)
        headers = {n: v for n, v in handler.headers.items() if n.lower() not in HOP_BY_HOP}
        try:
            connection.request(handler.command, handler.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
        except ConnectionError:  # the emulator is down
            return 503, {}, error(503, "backendError")
        finally:
            connection.close()
        kept = {n.title(): v for n, v in answer.headers.items() if n.lower() not in HOP_BY_HOP}
        # Addresses in answers lead through the gate, too: of sessions, and of downloads.
        theirs, ours = f"127.0.0.1:{self.emulator_port}", f"127.0.0.1:{self.port}"
        if "Location" in kept:
            kept["Location"] = kept["Location"].replace(theirs, ours)
        if "json" in kept.get("Content-Type", ""):
            content = content.replace(theirs.encode(), ours.encode())
        return answer.status, kept, content

    def _answer(
        self, handler: BaseHTTPRequestHandler, status: int, content: bytes, headers: dict[str, str]
    ) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)


def error(status: int, reason: str) -> bytes:
    """Return an error as Cloud Storage words it."""
    errors = [{"domain": "global", "reason": reason, "message": reason}]
    return json.dumps({"error": {"code": status, "message": reason, "errors": errors}}).encode()


@dataclass
class Emulator:
    """The emulator's process; its data survive a kill."""

    folder: Path
    port: int = field(default_factory=free_port)
    _process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        code = "from gcp_storage_emulator.__main__ import main; main()"
        command = [sys.executable, "-W", "ignore", "-c", code, "-d", str(self.folder), "start"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "-q"]
        command += ["--default-bucket", BUCKET]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(400):
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/")
                if connection.getresponse().status == 200:
                    connection.close()
                    return
            assert self._process.poll() is None, "the emulator ended"
            time.sleep(0.05)
        raise AssertionError("the emulator does not answer")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def emulated(folder: Path) -> Iterator[tuple[Emulator, Gate]]:
    """Run an emulator with a gate in front of it."""
    emulator = Emulator(folder)
    emulator.start()
    try:
        with Gate(emulator.port) as gate:
            yield emulator, gate
    finally:
        emulator.kill()
