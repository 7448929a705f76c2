"""A real browser (chromium, without a window) that shows pages at a given size, in light or dark, and prints them.

Called by demo.keep. Speaks the DevTools protocol; chromium comes from Debian or from wherever PATH has it.
"""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import tempfile
import time
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
_MIB = 1 << 20


@dataclass(frozen=True)
class View:
    """A screen: width and height in CSS pixels."""

    name: str
    width: int
    height: int
    dark: bool = False


def program() -> str | None:
    """The browser of this machine, if it has one."""
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


class Page:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._session: dict[str, str] = {}
        self._number = 0

    async def attach(self) -> Page:
        """Opens the tab that everything after goes to."""
        target = (await self.ask("Target.createTarget", url="about:blank"))["targetId"]
        attached = await self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        return self

    async def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command's result. Raises RuntimeError with the browser's words."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters, **self._session})
        async for message in self._socket:
            answer = message.json()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                found: dict[str, Any] = answer["result"]
                return found
        raise RuntimeError(f"{method}: the browser ended")

    async def value(self, expression: str) -> Any:
        """What a JavaScript expression gives."""
        answer = await self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return answer["result"].get("value")

    async def show(self, url: str, view: View, until: str = "true", seconds: float = 60) -> None:
        """Opens `url` on that screen and waits until an expression holds. Raises TimeoutError."""
        await self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=view.width, height=view.height, deviceScaleFactor=1, mobile=view.width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if view.dark else "light"}
        await self.ask("Emulation.setEmulatedMedia", features=[scheme])
        await self.ask("Page.navigate", url=url)
        for _ in range(int(seconds / 0.3)):
            if await self.value(f"document.readyState === 'complete' && Boolean({until})"):
                await asyncio.sleep(0.5)  # fades and late fonts
                return
            await asyncio.sleep(0.3)
        raise TimeoutError(f"{url} did not come to show {until} in {seconds:.0f} s")

    async def picture(self, *, whole: bool = False) -> bytes:
        """PNG of the screen, or of the whole page."""
        more: dict[str, Any] = {}
        if whole:
            size = (await self.ask("Page.getLayoutMetrics"))["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
            more = {"captureBeyondViewport": True, "clip": clip}
        return base64.b64decode((await self.ask("Page.captureScreenshot", format="png", **more))["data"])

    async def printed(self) -> bytes:
        """PDF on A4."""
        answer = await self.ask("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, printBackground=True)
        return base64.b64decode(answer["data"])

    async def overflow(self) -> int:
        """Pixels by which the page is wider than the screen; 0 is right."""
        return int(await self.value("document.documentElement.scrollWidth - window.innerWidth"))


@asynccontextmanager
async def browser() -> AsyncIterator[Page]:
    """A browser with one tab, ended afterwards. Raises FileNotFoundError where there is none."""
    path = program()
    if path is None:
        raise FileNotFoundError(f"none of {', '.join(PROGRAMS)} is on PATH; Debian: apt-get install chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--remote-debugging-port=0", f"--user-data-dir={profile}", "--hide-scrollbars"]
        options += ["--disable-gpu", "--no-first-run", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        process = await asyncio.create_subprocess_exec(path, *options, stdout=DEVNULL, stderr=DEVNULL)
        try:
            port, door = await asyncio.to_thread(_door, Path(profile) / "DevToolsActivePort")
            async with aiohttp.ClientSession() as session:
                address = f"ws://127.0.0.1:{port}{door}"
                async with session.ws_connect(address, max_msg_size=256 * _MIB) as socket:
                    yield await Page(socket).attach()
        finally:
            process.terminate()
            await process.wait()


def _door(file: Path) -> tuple[str, str]:
    for _ in range(300):
        if file.exists() and len(lines := file.read_text().split()) == 2:
            return lines[0], lines[1]
        time.sleep(0.1)
    raise RuntimeError("the browser did not start in 30 s")
