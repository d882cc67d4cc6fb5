"""A real browser without a window, told what to do by its DevTools protocol: Chromium, as Debian has it.

`REMOE_CHROMIUM` names another executable than the `chromium` that is on the path.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

HANGS_S = 60.0


def chromium() -> str | None:
    """The executable, or None where there is none."""
    named = os.environ.get("REMOE_CHROMIUM")
    return named or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """One page of a browser. `faults` are exceptions, console errors and refused requests, in words."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self.faults: list[str] = []
        self._reading = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        async for message in self._socket:
            found = json.loads(message.data)
            if "id" in found:
                self._answers.pop(found["id"]).set_result(found)
            method, said = found.get("method"), found.get("params", {})
            wrong = method == "Runtime.exceptionThrown"
            wrong |= method == "Runtime.consoleAPICalled" and said.get("type") in ("error", "assert")
            wrong |= method == "Log.entryAdded" and said["entry"]["level"] == "error"
            if wrong:
                self.faults.append(json.dumps(said))

    async def call(self, method: str, **params: Any) -> Any:
        """What the browser answers."""
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        answer = await asyncio.wait_for(self._answers[number], HANGS_S)
        assert "error" not in answer, answer
        return answer["result"]

    async def ask(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, script: str, condition: Callable[[Any], object]) -> Any:
        """Its value, once the condition holds of it."""
        async with asyncio.timeout(HANGS_S):
            while not condition(found := await self.ask(script)):
                await asyncio.sleep(0.05)
        return found


async def with_page(folder: Path, url: str, work: Callable[[Page], Any]) -> None:
    """Opens the address in a browser whose own files are in `folder`, and runs `work(page)`."""
    import aiohttp

    executable = chromium()
    assert executable is not None
    command = [
        executable, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0",
        f"--user-data-dir={folder / 'browser'}", "about:blank",
    ]  # fmt: skip
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    try:
        async with asyncio.timeout(HANGS_S):
            while True:
                line = (await process.stderr.readline()).decode(errors="replace")
                assert line, "the browser has ended"
                if found := re.search(r"DevTools listening on ws://([^/]+)/", line):
                    break
        draining = asyncio.ensure_future(process.stderr.read())
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://{found[1]}/json/list") as listed:
                target = next(one for one in await listed.json() if one["type"] == "page")
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                for domain in ("Runtime", "Log", "Page", "Network"):
                    await page.call(f"{domain}.enable")
                await page.call("Page.navigate", url=url)
                here = "`${location.href} ${document.readyState}`"
                await page.until(here, lambda found: found == f"{url} complete")
                await work(page)
                page._reading.cancel()
        draining.cancel()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
