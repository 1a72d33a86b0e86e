"""A headless Chromium, driven over the DevTools protocol: https://chromedevtools.github.io/devtools-protocol/.

::

    with Chromium(folder) as browser:
        tab = browser.open("http://127.0.0.1:8080/")
        tab.wait_for("document.title === 'ready'")
        tab.draw("canvas", [(0.2, 0.5), (0.8, 0.5)], "pen")
        assert not tab.errors and tab.hosts == {"127.0.0.1:8080"}

It reaches no host but this machine. Everything has a deadline.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from tests.support.tab import TIMEOUT_S, Tab

with contextlib.suppress(ModuleNotFoundError):
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ROOT_USER = 0
FLAGS = (
    "--headless=new",
    "--remote-debugging-port=0",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--disable-domain-reliability",
    "--disable-client-side-phishing-detection",
    "--disable-breakpad",
    "--metrics-recording-only",
    "--no-pings",
    "--mute-audio",
    "--hide-scrollbars",
    "--password-store=basic",
    "--disable-dev-shm-usage",
    "--disable-features=Translate,MediaRouter,OptimizationHints,CertificateTransparencyComponentUpdater",
    # a tab that lies behind another computes as fast
    "--disable-background-timer-throttling",
    "--disable-backgrounding-occluded-windows",
    "--disable-renderer-backgrounding",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)

needs_chromium = pytest.mark.skipif(
    not CHROMIUM or "connect" not in globals(),
    reason="chromium is not installed" if not CHROMIUM else "websockets is not installed",
)


class Chromium:
    """One browser with a fresh profile below ``folder``; each tab has its own cookies and cache."""

    def __init__(self, folder: Path, *flags: str, gpu: bool = False) -> None:
        """Start it. ``gpu``: leave the GPU's features on, as WebGPU needs them."""
        assert CHROMIUM, "mark the test with needs_chromium"
        profile = folder / f"chromium_{time.monotonic_ns()}"
        profile.mkdir(parents=True)
        more = [*flags, *([] if gpu else ["--disable-gpu"])]
        if os.getuid() == ROOT_USER:
            more.append("--no-sandbox")
        self._log = (profile / "log.txt").open("wb")
        self._process = subprocess.Popen(
            [CHROMIUM, *FLAGS, *more, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            env={**os.environ, "HOME": str(profile)},
        )
        self._at_end = contextlib.ExitStack()
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._answers: dict[int, Future[dict[str, Any]]] = {}
        self._tabs: dict[str, Tab] = {}  # by session, those of workers too
        try:
            connecting = connect(
                self._address(profile / "DevToolsActivePort"),
                max_size=None,
                max_queue=None,
                proxy=None,
                compression=None,
            )
            self._connection = self._at_end.enter_context(connecting)
        except BaseException:
            self._kill()
            raise
        self._reader = threading.Thread(target=self._read, name="chromium", daemon=True)
        self._reader.start()

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the browser and all of its processes."""
        self._at_end.close()
        self._kill()
        self._reader.join(TIMEOUT_S)

    def open(self, url: str, *, size: tuple[int, int] = (1280, 900), dark: bool = False) -> Tab:
        """Open a tab, and wait until its page has loaded."""
        context = self.command("Target.createBrowserContext")["browserContextId"]
        made = {"url": "about:blank", "browserContextId": context, "newWindow": True}
        target = self.command("Target.createTarget", made)["targetId"]
        attach = {"targetId": target, "flatten": True}
        session = self.command("Target.attachToTarget", attach)["sessionId"]
        tab = Tab(self, session, target, context)
        self._tabs[session] = tab
        for method in ("Page.enable", "Network.enable", "Runtime.enable", "Log.enable"):
            tab.command(method)
        tab.command("Target.setAutoAttach", _ATTACH)
        tab.command("Emulation.setFocusEmulationEnabled", {"enabled": True})
        tab.set_window(*size)
        tab.set_dark(dark)
        tab.go(url)
        return tab

    def command(
        self, method: str, parameters: Mapping[str, Any] | None = None, session: str = ""
    ) -> dict[str, Any]:
        """Send a command, and return its result."""
        return self.send(method, parameters, session).result(TIMEOUT_S)

    def send(
        self, method: str, parameters: Mapping[str, Any] | None = None, session: str = ""
    ) -> Future[dict[str, Any]]:
        """Send a command, and return what will have its result."""
        future: Future[dict[str, Any]] = Future()
        message = {"id": next(self._ids), "method": method, "params": dict(parameters or {})}
        if session:
            message["sessionId"] = session
        with self._lock:
            self._answers[message["id"]] = future
            self._connection.send(json.dumps(message))
        return future

    def _address(self, path: Path) -> str:
        """Return the address of the browser's end, as soon as it says one."""
        end = time.monotonic() + TIMEOUT_S
        while time.monotonic() < end and self._process.poll() is None:
            lines = path.read_text().splitlines() if path.exists() else []
            if len(lines) == 2:
                return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
            time.sleep(0.02)
        raise AssertionError(f"chromium did not start: {Path(self._log.name).read_text()[-2000:]}")

    def _read(self) -> None:
        """Take what comes: results go to who waits for them, events to their tab."""
        try:
            for text in self._connection:
                self._take(json.loads(text))
        except ConnectionClosed:
            pass
        finally:
            for future in list(self._answers.values()):
                future.set_exception(AssertionError("chromium has ended"))

    def _take(self, message: dict[str, Any]) -> None:
        if future := self._answers.pop(message.get("id", 0), None):
            if error := message.get("error"):
                future.set_exception(AssertionError(f"chromium: {error['message']}"))
            else:
                future.set_result(message["result"])
        elif tab := self._tabs.get(message.get("sessionId", "")):
            self._take_event(tab, message["method"], message["params"])

    def _take_event(self, tab: Tab, method: str, event: dict[str, Any]) -> None:
        if method != "Target.attachedToTarget":
            return tab.take_event(method, event)
        session = event["sessionId"]
        self._tabs[session] = tab
        for name in ("Network.enable", "Runtime.enable", "Log.enable"):
            self.send(name, session=session)
        self.send("Target.setAutoAttach", _ATTACH, session)
        self.send("Runtime.runIfWaitingForDebugger", session=session)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(TIMEOUT_S)
        self._log.close()


# Workers wait until their requests are seen.
_ATTACH = {"autoAttach": True, "waitForDebuggerOnStart": True, "flatten": True}
