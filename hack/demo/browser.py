"""Controls a headless Chromium that opens pages at a given size, in light or dark, and prints them.

It uses the DevTools protocol. Chromium is whichever is on PATH, such as Debian's.
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
    """Returns the path of this machine's browser, None if it has none."""
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


class Page:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._session: dict[str, str] = {}
        self._number = 0

    async def attach(self) -> Page:
        """Opens the tab that all later commands are sent to."""
        target = (await self.command("Target.createTarget", url="about:blank"))["targetId"]
        attached = await self.command("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        return self

    async def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command and returns its result. Raises RuntimeError with the error message."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters, **self._session})
        async for message in self._socket:
            answer = message.json()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result
        raise RuntimeError(f"{method}: the browser ended")

    async def value(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression."""
        answer = await self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return answer["result"].get("value")

    async def show(self, url: str, view: View, until: str = "true", seconds: float = 60) -> None:
        """Opens `url` on that screen and waits until the expression `until` holds.

        Raises TimeoutError after `seconds`.
        """
        await self.command(
            "Emulation.setDeviceMetricsOverride",
            width=view.width, height=view.height, deviceScaleFactor=1, mobile=view.width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if view.dark else "light"}
        await self.command("Emulation.setEmulatedMedia", features=[scheme])
        await self.command("Page.navigate", url=url)
        for _ in range(int(seconds / 0.3)):
            if await self.value(f"document.readyState === 'complete' && Boolean({until})"):
                await asyncio.sleep(0.5)  # transitions, and fonts that load late
                return
            await asyncio.sleep(0.3)
        raise TimeoutError(f"{url} did not reach `{until}` within {seconds:.0f} s")

    async def picture(self, *, full_page: bool = False) -> bytes:
        """Returns a PNG of the screen, or of the full page."""
        options: dict[str, Any] = {}
        if full_page:
            size = (await self.command("Page.getLayoutMetrics"))["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
            options = {"captureBeyondViewport": True, "clip": clip}
        return base64.b64decode((await self.command("Page.captureScreenshot", format="png", **options))["data"])

    async def printed(self) -> bytes:
        """Returns a PDF on A4 paper."""
        answer = await self.command("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, printBackground=True)
        return base64.b64decode(answer["data"])

    async def overflow(self) -> int:
        """Returns the pixels by which the page is wider than the screen; 0 is correct."""
        return int(await self.value("document.documentElement.scrollWidth - window.innerWidth"))


@asynccontextmanager
async def browser() -> AsyncIterator[Page]:
    """Starts a browser with one tab and ends it afterwards.

    Raises FileNotFoundError if there is none.
    """
    path = program()
    if path is None:
        raise FileNotFoundError(f"none of {', '.join(PROGRAMS)} is on PATH; Debian: apt-get install chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--remote-debugging-port=0", f"--user-data-dir={profile}", "--hide-scrollbars"]
        options += ["--disable-gpu", "--no-first-run", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        process = await asyncio.create_subprocess_exec(path, *options, stdout=DEVNULL, stderr=DEVNULL)
        try:
            port, socket_path = await asyncio.to_thread(_devtools_address, Path(profile) / "DevToolsActivePort")
            async with aiohttp.ClientSession() as session:
                address = f"ws://127.0.0.1:{port}{socket_path}"
                async with session.ws_connect(address, max_msg_size=256 * _MIB) as socket:
                    yield await Page(socket).attach()
        finally:
            process.terminate()
            await process.wait()


def _devtools_address(file: Path) -> tuple[str, str]:
    """Waits for the browser's port and WebSocket path, which it writes to `file` when it is up."""
    for _ in range(300):
        if file.exists() and len(lines := file.read_text().split()) == 2:
            return lines[0], lines[1]
        time.sleep(0.1)
    raise RuntimeError("the browser did not start in 30 s")
