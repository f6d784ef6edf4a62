"""A page -> what a person would see of it: headless Chromium, driven through its debugging pipe."""

import base64
import json
import os
import subprocess
import time
from pathlib import Path

CHROMIUM = Path("/usr/bin/chromium")

_STICKING_OUT = """(() => {
  const wide = document.documentElement.clientWidth;
  const found = document.documentElement.scrollWidth > wide ? [`page ${document.documentElement.scrollWidth}`] : [];
  for (const one of document.body.querySelectorAll('*')) {
    const box = one.getBoundingClientRect();
    if (!box.width || one.closest('.unseen, .track, select, input, progress')) continue;
    const parent = one.parentElement.closest('div, section, article, figure, dialog');
    const edge = parent ? Math.min(wide, parent.getBoundingClientRect().right) : wide;
    const inside = one.clientWidth && one.scrollWidth > one.clientWidth + 1;
    const text = `${one.textContent}`.slice(0, 60);
    if (box.right > edge + 1 || box.left < -1 || inside) found.push(`${one.tagName} ${one.className}: ${text}`);
  }
  return found;
})()"""


class Browser:
    """Headless Chromium, told what to do through a pipe (Chrome DevTools Protocol); `with Browser(tmp) as browser`."""

    def __init__(self, profile: Path) -> None:
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        switches = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        switches += " --disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe"
        switches += f" --user-data-dir={profile}"
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{to_browser} 4>&{from_browser}', "bash", CHROMIUM, *switches.split()],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._replies = os.fdopen(self._read, "rb")
        self._number, self._session, self._rest = 0, None, b""

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None
        self.tell("Browser.close")
        os.close(self._write)
        self._process.wait(20)
        self._replies.close()

    def tell(self, method: str, **parameters: object) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                self._rest += os.read(self._replies.fileno(), 1 << 20) or b'{"id": -1, "error": "gone"}\0'
            text, _, self._rest = self._rest.partition(b"\0")
            reply = json.loads(text)
            assert "error" not in reply, reply
            if reply.get("id") == self._number:
                return reply["result"]

    def open(self, url: str, width: int = 1280, height: int = 800, dark: bool = False) -> None:
        self._session = None
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.tell("Emulation.setEmulatedMedia", features=scheme)
        self.tell(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.tell("Page.navigate", url=url)

    def value(self, expression: str) -> object:
        return self.tell("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until it is true: 20 s at most."""
        end = time.monotonic() + 20
        while not self.value(expression):
            assert time.monotonic() < end, (expression, self.value("document.body.innerText"))
            time.sleep(0.02)

    def press(self, key: str, **more: object) -> None:
        self.tell("Input.dispatchKeyEvent", type="keyDown", key=key, **({"text": key} | more))
        self.tell("Input.dispatchKeyEvent", type="keyUp", key=key)

    def click(self, selector: str) -> None:
        where = "(({x, y, width, height}) => [x + width / 2, y + height / 2])"
        x, y = self.value(f"{where}(document.querySelector({json.dumps(selector)}).getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.tell("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def sticking_out(self) -> list[str]:
        """What is beyond the window's or its container's edge, or is wider than it is shown: a reader has to scroll.

        What is found is looked at for up to 3 s: a busy machine may still be laying the page out.
        """
        end = time.monotonic() + 3
        while (found := self.value(_STICKING_OUT)) and time.monotonic() < end:
            time.sleep(0.05)
        return found

    def picture(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.tell("Page.captureScreenshot")["data"]))
