"""A real headless Chromium, driven over its debugging pipe: what a page logs, asks for, and shows.

As a script it photographs a page: python tests/support/browser.py PAGE.html PICTURE.png [WIDTH [HEIGHT [dark]]]
All of it, or with a height a window of that size.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--remote-debugging-pipe"),
]
NO_NETWORK = "--host-resolver-rules=MAP * ~NOTFOUND"


class Browser:
    """One tab. `events` are what the browser told of its own accord, oldest first."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._buffer, self._last = b"", 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """What the browser answers; see https://chromedevtools.github.io/devtools-protocol"""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._last:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._answers, 1 << 16)
            assert part, "the browser has ended"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(line))

    def resize(self, width: int, height: int, scheme: str = "light") -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def open(self, page: Path) -> None:
        self.call("Page.navigate", url=page.absolute().as_uri())
        give_up = time.monotonic() + 30
        while self.js("document.readyState + location.protocol") != "completefile:":
            assert time.monotonic() < give_up, "the page does not load"
            time.sleep(0.02)

    def js(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def point_at(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, exceptions, and what the page's policy refused."""
        told = [e["params"]["entry"]["text"] for e in self.events if e.get("method") == "Log.entryAdded"]
        told += [json.dumps(e) for e in self.events if e.get("method") == "Runtime.exceptionThrown"]
        return told + [json.dumps(e) for e in self.events if e.get("method") == "Runtime.consoleAPICalled"]

    def requests(self) -> list[str]:
        """Addresses of all that was asked for."""
        return [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]

    def photograph(self, picture: Path, whole: bool = True) -> None:
        """The page as PNG: also what is below the window, or what is in it."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        picture.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def browsing() -> Iterator[Browser]:
    """A browser that finds no host, with a profile of its own."""
    assert CHROMIUM is not None
    read_commands, commands = os.pipe()
    answers, write_answers = os.pipe()
    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as profile:
        order = [CHROMIUM, *FLAGS, NO_NETWORK, f"--user-data-dir={profile}"]
        on_3_and_4 = f'exec "$@" 3<&{read_commands} 4>&{write_answers}'
        process = subprocess.Popen(
            ["bash", "-c", on_3_and_4, "bash", *order],
            pass_fds=(read_commands, write_answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_answers)
        try:
            browser = Browser(commands, answers)
            yield browser
        finally:
            os.close(commands)  # it ends when nobody can command it any more
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(answers)


if __name__ == "__main__":
    page, photo, *rest = sys.argv[1:]
    with browsing() as chromium:
        chromium.resize(int(rest[0]) if rest else 1280, int(rest[1]) if rest[1:] else 900, *rest[2:])
        chromium.open(Path(page))
        chromium.photograph(Path(photo), whole=len(rest) < 2)
