"""A page in a browser: what it asks for, says and shows; a user's hands on it."""

import base64
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

TIMEOUT_S = 60  # of a command or a wait; two cores are slow beside other tests
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowLeft": 37, "ArrowUp": 38}
KEYS |= {"ArrowRight": 39, "ArrowDown": 40, "Delete": 46}
TEXTS = {"Enter": "\r", " ": " "}  # what a key writes


class JavaScriptError(AssertionError):
    """What an expression threw in the page."""


class Frame(NamedTuple):
    """A WebSocket message that a page has sent or received."""

    sent: bool
    data: bytes
    url: str


class Box(NamedTuple):
    """Where an element lies in the window, in CSS pixels."""

    x: float
    y: float
    width: float
    height: float


class Browser(Protocol):
    """What a tab needs of its browser."""

    def command(
        self, method: str, parameters: Mapping[str, Any] | None = None, session: str = ""
    ) -> dict[str, Any]: ...


def eventually(is_so: Callable[[], bool], timeout_s: float = 20) -> None:
    """Wait for something: the browser tells of frames when they have been sent."""
    end = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.03)


class Tab:
    """One page. ``errors``: what its console shows in red; ``requests``: all URLs it asked for."""

    def __init__(self, browser: Browser, session: str, target: str, context: str) -> None:
        self._browser, self._session = browser, session
        self._target, self._context = target, context
        self._sockets: dict[str, str] = {}  # URLs, by request
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.frames: list[Frame] = []

    def command(self, method: str, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return self._browser.command(method, parameters, self._session)

    @property
    def hosts(self) -> set[str]:
        """The HOST:PORTs that were asked or connected to; ``data:`` and ``blob:`` have none."""
        return {urlsplit(url).netloc for url in self.requests} - {""}

    def go(self, url: str) -> None:
        """Load a page, and wait for it."""
        found = self.command("Page.navigate", {"url": url})
        assert "errorText" not in found, f"{url}: {found['errorText']}"
        loaded = "document.readyState === 'complete'"
        self.wait_for(
            f"location.href !== 'about:blank' && {loaded}" if url[:6] != "about:" else loaded
        )

    def evaluate(self, expression: str) -> Any:
        """Return an expression's value, awaited, as JSON has it.

        Raises:
            JavaScriptError: it threw.
        """
        asked = {
            "expression": expression,
            "awaitPromise": True,
            "returnByValue": True,
            "userGesture": True,
        }
        found = self.command("Runtime.evaluate", asked)
        if details := found.get("exceptionDetails"):
            thrown = details.get("exception", {})
            raise JavaScriptError(
                thrown.get("description") or thrown.get("value") or details["text"]
            )
        return found["result"].get("value")

    def wait_for(self, expression: str, timeout_s: float = TIMEOUT_S) -> Any:
        """Wait until an expression is true, and return its value; the test fails if it never is.

        What it throws counts as false: a page that is being loaded has no elements yet.
        """
        end, last = time.monotonic() + timeout_s, ""
        while time.monotonic() < end:
            try:
                if value := self.evaluate(expression):
                    return value
                last = "it is false"
            except AssertionError as error:
                last = str(error)
            time.sleep(0.03)
        text = self.text("body") if "document" not in last else ""
        raise AssertionError(f"{expression}: {last}; errors {self.errors}; page: {text[:1500]}")

    def text(self, selector: str) -> str:
        """Return the text of an element as it is shown."""
        return str(
            self.evaluate(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")
        )

    def box(self, selector: str) -> Box:
        """Return where an element lies, after scrolling it into the window."""
        found = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center', behavior: 'instant'});"
            " const r = e.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; })()"
        )
        return Box(*found)

    def click(self, selector: str) -> None:
        """Click into the middle of an element, once it lies still."""
        before = self.box(selector)
        while (now := self.box(selector)) != before:
            before = now
            time.sleep(0.03)
        self.draw(selector, [(0.5, 0.5)])

    def draw(
        self, selector: str, points: Sequence[tuple[float, float]], kind: str = "mouse"
    ) -> None:
        """Draw one stroke with a "mouse", "pen" or "touch".

        ``points``: each across and down from an element's upper left corner, in its widths and
        heights.
        """
        box = self.box(selector)
        at = [(box.x + x * box.width, box.y + y * box.height) for x, y in points]
        for name, (x, y) in _stroke(at):
            if kind == "touch":
                points_now = [] if name == "Released" else [{"x": x, "y": y}]
                touch = {"Pressed": "touchStart", "Moved": "touchMove", "Released": "touchEnd"}
                event: dict[str, Any] = {"type": touch[name], "touchPoints": points_now}
                self.command("Input.dispatchTouchEvent", event)
                continue
            event = {"type": f"mouse{name}", "x": x, "y": y, "pointerType": kind, "force": 0.5}
            event |= {"button": "left", "buttons": 0 if name == "Released" else 1, "clickCount": 1}
            self.command("Input.dispatchMouseEvent", event)

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press a key, such as "Tab", "Enter", " " or "a"."""
        code = KEYS.get(key) or ord(key.upper())
        event: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        event["modifiers"] = 8 if shift else 0
        if text := TEXTS.get(key, key if len(key) == 1 else ""):
            event["text"] = text
        self.command("Input.dispatchKeyEvent", {"type": "keyDown", **event})
        self.command("Input.dispatchKeyEvent", {"type": "keyUp", **event})

    def type(self, text: str) -> None:
        """Write a text into what has the focus."""
        self.command("Input.insertText", {"text": text})

    def choose(self, selector: str, *files: Path) -> None:
        """Pick files, or a folder, in an ``<input type=file>``."""
        root = self.command("DOM.getDocument")["root"]["nodeId"]
        asked = {"nodeId": root, "selector": selector}
        node = self.command("DOM.querySelector", asked)["nodeId"]
        chosen = {"files": [str(file) for file in files], "nodeId": node}
        self.command("DOM.setFileInputFiles", chosen)

    def set_window(
        self, width: int, height: int, *, scale: float = 1, mobile: bool = False
    ) -> None:
        """Make the window ``width`` x ``height`` CSS pixels; a phone also has touch."""
        asked = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": mobile}
        self.command("Emulation.setDeviceMetricsOverride", asked)
        self.command("Emulation.setTouchEmulationEnabled", {"enabled": mobile})

    def set_dark(self, dark: bool) -> None:
        """Say which colours the user prefers."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", {"features": [feature]})

    def screenshot(self, path: Path, *, whole: bool = True) -> Path:
        """Write a PNG of the page: all of it, or what the window shows."""
        asked = {"format": "png", "captureBeyondViewport": whole}
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot", asked)["data"]))
        return path

    def close(self) -> None:
        """Close the tab, as a user does."""
        self._browser.command("Target.closeTarget", {"targetId": self._target})
        self._browser.command("Target.disposeBrowserContext", {"browserContextId": self._context})

    def take_event(self, method: str, event: dict[str, Any]) -> None:
        """Note what happened in the page or one of its workers."""
        if method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])
        elif method == "Network.webSocketCreated":
            self.requests.append(event["url"])
            self._sockets[event["requestId"]] = event["url"]
        elif method in ("Network.webSocketFrameSent", "Network.webSocketFrameReceived"):
            data, url = _payload(event["response"]), self._sockets.get(event["requestId"], "")
            self.frames.append(Frame(method.endswith("Sent"), data, url))
        elif error := _error_of(method, event):
            self.errors.append(error)


def _stroke(points: Sequence[tuple[float, float]]) -> Iterator[tuple[str, tuple[float, float]]]:
    yield "Pressed", points[0]
    for point in points[1:]:
        yield "Moved", point
    yield "Released", points[-1]


def _payload(response: Mapping[str, Any]) -> bytes:
    text = str(response["payloadData"])
    return text.encode() if response["opcode"] == 1 else base64.b64decode(text)


def _error_of(method: str, event: Mapping[str, Any]) -> str:
    """Return what the console shows in red; "" if this is no such event."""
    if method == "Runtime.exceptionThrown":
        details = event["exceptionDetails"]
        return str(details.get("exception", {}).get("description") or details["text"])
    if method == "Runtime.consoleAPICalled" and event["type"] in ("error", "assert"):
        return " ".join(str(a.get("value", a.get("description", ""))) for a in event["args"])
    if method == "Log.entryAdded" and event["entry"]["level"] == "error":
        return f"{event['entry']['text']} {event['entry'].get('url', '')}".strip()
    return ""
