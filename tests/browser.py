"""A real browser, headless, over the DevTools protocol: Chromium's own pipe, so that no package and no port is needed."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--force-color-profile=srgb", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
TIMEOUT_S = 120
ON_THREE_AND_FOUR = """import fcntl, os, sys
one, other = (fcntl.fcntl(int(pipe), fcntl.F_DUPFD_CLOEXEC, 5) for pipe in sys.argv[1:3])  # out of the way
os.dup2(one, 3)
os.dup2(other, 4)
os.execv(sys.argv[3], sys.argv[3:])"""  # where Chromium looks for its pipe


def find_browser() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Tab:
    """One page: what it asks for, logs and throws is kept."""

    def __init__(self, to_browser: int, from_browser: int):
        self._to, self._from, self._rest, self._id = to_browser, from_browser, b"", 0
        self._events: list[dict] = []
        self._session = None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params) -> dict:
        self._id += 1
        message = {"id": self._id, "method": method, "params": params} | ({"sessionId": self._session} if self._session else {})
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(method)
            if answer.get("id") == self._id:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self._events.append(answer)
            if answer.get("method") == "Page.javascriptDialogOpening":  # else the page hangs; the test sees it among the events
                self._id += 1
                closing = {"id": self._id, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}, "sessionId": self._session}
                os.write(self._to, json.dumps(closing).encode() + b"\0")
                self._id -= 1

    def _next(self, waiting_for: str) -> dict:
        end = time.monotonic() + TIMEOUT_S
        while b"\0" not in self._rest:
            assert select.select([self._from], [], [], max(0.0, end - time.monotonic()))[0], f"the browser does not answer {waiting_for}"
            piece = os.read(self._from, 2**20)
            assert piece, "the browser ended"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path) -> None:
        """Load a file, and wait until it is there."""
        self._events.clear()
        answer = self("Page.navigate", url=path.resolve().as_uri())
        assert "errorText" not in answer, answer
        for _ in range(TIMEOUT_S * 20):
            if self.value("document.readyState === 'complete' && location.protocol === 'file:'"):
                return
            time.sleep(0.05)
        raise AssertionError(f"{path} does not load")

    def value(self, expression: str):
        """Of an expression, as JSON; a promise is waited for."""
        result = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def emulate(self, *, width: int = 1280, height: int = 900, dark: bool = False, media: str = "screen") -> None:
        """Set the window and what the reader prefers."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self("Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def key(self, name: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode={"Tab": 9, "Enter": 13}[name])

    def screenshot(self, path: Path, whole: bool = True) -> None:
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]))

    def complaints(self) -> list[str]:
        """What stands in the console, what was thrown, and dialogs."""
        self.value("0")  # whatever comes before has come
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening")
        return [json.dumps(event["params"]) for event in self._events if event.get("method") in kinds]

    def requests(self) -> list[str]:
        """Addresses that were asked for."""
        return [event["params"]["request"]["url"] for event in self._events if event.get("method") == "Network.requestWillBeSent"]


@contextmanager
def open_tab(folder: Path) -> Iterator[Tab]:
    """A browser of its own, with its files in `folder`, ended by its own id."""
    theirs_in, to_browser = os.pipe()
    from_browser, theirs_out = os.pipe()

    browser = [find_browser(), *FLAGS, f"--user-data-dir={folder}", "about:blank"]
    command = [sys.executable, "-c", ON_THREE_AND_FOUR, str(theirs_in), str(theirs_out), *browser]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(theirs_in, theirs_out)
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        tab = Tab(to_browser, from_browser)
        yield tab
        tab._session = None
        tab("Browser.close")
        process.wait(10)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(to_browser)
        os.close(from_browser)
