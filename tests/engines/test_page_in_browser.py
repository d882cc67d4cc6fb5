"""The page at `/` in a real browser: values and charts move with the server, and no error is logged."""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Page, chromium, with_page

for needed in ("aiohttp", "openai", "fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(needed, reason="a server for OpenAI's clients (extra: serve)")
if chromium() is None:
    pytest.skip("no chromium on this machine (Debian: apt-get install chromium)", allow_module_level=True)

from served import PROMPT, Served, save_served, serving  # noqa: E402 (after what the server needs)


def text(key: str) -> str:
    return f"document.querySelector('[data-key=\"{key}\"]').textContent"


def chart(name: str) -> str:
    return f"[...document.querySelectorAll('[data-chart=\"{name}\"] path')].map((p) => p.getAttribute('d')).join(' ')"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_served(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture
def served(folder: Path) -> Iterator[Served]:
    with serving(folder) as made:
        yield made


def in_browser(served: Served, folder: Path, work: Any) -> None:
    asyncio.run(with_page(folder, f"{served.url}/", work))


def complete(served: Served, tokens: int) -> None:
    served.client.completions.create(model="tiny", prompt=PROMPT, max_tokens=tokens)


def test_values_and_charts_move_and_nothing_goes_wrong(served: Served, tmp_path: Path) -> None:
    async def work(page: Page) -> None:
        assert await page.until(text("model"), lambda found: found == "tiny")
        assert await page.ask(text("strength")) == "0.00"
        await asyncio.to_thread(served.model.controller.set_pressure, 0.5)
        await page.until(text("strength"), lambda found: found == "0.50")
        assert "set by hand" in await page.ask(text("reason")) and await page.ask(text("pinned")) == "yes"
        before = await page.ask(text("tokens"))
        await asyncio.to_thread(complete, served, 5)
        assert await page.until(text("tokens"), lambda found: found != before) == "5"
        assert await page.ask(text("requests.answered")) == "1"
        assert "MiB" in await page.ask(text("memory.process_bytes"))
        # Lines with more than one point, in all charts whose values are known.
        for name in ("strength pressure", "memory.process_bytes"):
            await page.until(chart(name), lambda found: "L" in found.replace("L120", ""))
        label = await page.ask("document.querySelector('[data-chart]').getAttribute('aria-label')")
        assert "now strength 0.50, pressure 0.50" in label
        if kept := os.environ.get("REMOE_SCREENSHOTS"):
            for scheme in ("light", "dark"):
                feature = {"name": "prefers-color-scheme", "value": scheme}
                await page.call("Emulation.setEmulatedMedia", features=[feature])
                shot = await page.call("Page.captureScreenshot")
                Path(kept, f"page-{scheme}.png").write_bytes(base64.b64decode(shot["data"]))
        assert page.faults == []
        loaded = await page.ask("performance.getEntriesByType('resource').map((e) => new URL(e.name).pathname)")
        assert set(loaded) == {"/remoe/status"}

    in_browser(served, tmp_path, work)


def test_a_server_with_a_key_is_shown_to_whoever_types_it(folder: Path, tmp_path: Path) -> None:
    async def work(page: Page) -> None:
        shown, trouble = "document.getElementById('ask').hidden", "document.getElementById('trouble').textContent"
        await page.until(shown, lambda hidden: hidden is False)
        assert "wants its API key" in await page.ask(trouble) and await page.ask(text("strength")) == "–"
        typed = "document.getElementById('api-key').value = '{}'; document.getElementById('ask').requestSubmit()"
        await page.ask(typed.format("wrong"))
        await page.until(trouble, lambda said: "not the server's API key" in said)
        await page.ask(typed.format("secret"))
        await page.until(text("strength"), lambda found: found == "0.00")
        assert await page.ask(shown) is True and await page.ask(trouble) == ""

    with serving(folder, api_key="secret") as served:
        in_browser(served, tmp_path, work)


def test_text_of_the_server_is_never_a_part_of_the_page(served: Served, tmp_path: Path) -> None:
    async def work(page: Page) -> None:
        await page.until(text("strength"), lambda found: found == "0.00")
        reason = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
        with served.model.controller.hold(0.5, reason):
            await page.until(text("reason"), lambda found: found == reason)
        assert "taken" not in await page.ask("document.title") and page.faults == []

    in_browser(served, tmp_path, work)


def test_a_served_gguf_has_the_same_page_and_its_values_move(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp's server (extra: llamacpp)")
    from gguf_writer import small_model, write_gguf
    from preloaded import asked, prompts, running
    from preloaded import served as served_gguf

    async def work(page: Page) -> None:
        await page.until(text("engine"), lambda found: found == "llama.cpp")
        assert await page.ask(text("recency")) == "ema"
        await page.until(text("strength"), lambda found: found == "0.00")
        server.hold(strength=0.5)
        await page.until(text("strength"), lambda found: found == "0.50")
        assert await page.ask(text("gain")) == "0.60" and await page.ask(text("reason")) == "set by hand"
        await asyncio.to_thread(asked, server.port, prompts(1)[0])
        assert await page.until(text("tokens"), lambda found: found != "0") == "16"
        # What llama.cpp does not count is no 0; look-ups of experts are counted by our cache of the mapped file.
        assert await page.ask(text("requests.answered")) == "–"
        await page.until(text("hit_rate"), lambda found: found not in ("–", ""))
        assert "MiB" in await page.ask(text("memory.process_bytes"))
        await page.until(chart("strength pressure"), lambda found: "L" in found.replace("L120", ""))
        assert page.faults == []

    path = write_gguf(small_model("qwen3moe"), "qwen3moe", tmp_path / "model.gguf")
    with served_gguf(path, gain=1.2, interval_s=0.05) as server, running(server):
        asyncio.run(with_page(tmp_path, f"{server.page_url}/", work))


def test_it_says_when_the_server_is_gone(folder: Path, tmp_path: Path) -> None:
    async def work(page: Page) -> None:
        await page.until(text("strength"), lambda found: found == "0.00")
        await asyncio.to_thread(served.server.stop)
        trouble = "document.getElementById('trouble').textContent"
        await page.until(trouble, lambda said: said == "The server does not answer.")

    with serving(folder) as served:
        in_browser(served, tmp_path, work)
