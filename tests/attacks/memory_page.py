"""A picture of the page of memory under load: `runtime/serving/memory_page.png`.

    python tests/attacks/memory_page.py [--dark] [--instances N [--long]] [--to FILE]

Half a minute, with Playwright and Chromium; with instances requests move between them all the
time, or, with `--long`, one is longer than an instance's memory, and others use adapters.
`tests/runtime/serving/test_page_browser.py` tests what is seen here.
"""

import argparse
import asyncio
import contextlib
import random
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import lending_attack
import lora
import zoo
from page_app import page_app, run_elsewhere, served
from playwright.sync_api import Page, sync_playwright
from vkv import AsyncLLM, Cluster, SamplingParams
from vkv.runtime.serving.cluster_engine import ClusterEngine
from vkv.vmem.errors import InvalidOperation

ROOT = Path(__file__).parents[2]
NUM_REQUESTS = 18
SYSTEM = "You help the keeper of a lighthouse. Be short, be kind, and think of the weather. " * 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dark", action="store_true", help="in dark colours")
    parser.add_argument("--instances", type=int, help="of a cluster, in place of one engine")
    parser.add_argument("--long", action="store_true", help="requests that borrow memory")
    parser.add_argument("--to", type=Path, default=ROOT / "runtime/serving/memory_page.png")
    options = parser.parse_args()
    if options.instances:
        picture = picture_of_loans if options.long else picture_of_instances
        picture(options.instances, dark=options.dark, path=options.to)
        return
    llm = AsyncLLM(max_seqs=18, max_parked=4)
    load = threading.Thread(target=lambda: asyncio.run(ask_all(llm)))
    with served(page_app(llm, llm)) as address:
        take_picture(address, load, dark=options.dark, path=options.to)
        load.join()
    run_elsewhere(llm.close())


def picture_of_instances(count: int, *, dark: bool, path: Path) -> None:
    """Requests move between instances when the picture is taken."""
    engine = ClusterEngine()
    with Cluster(instances=count, device="cpu", max_seqs=8, max_parked=2, threads=1) as cluster:
        engine.cluster = cluster
        load = threading.Thread(target=move_all, args=(cluster,))
        with served(page_app(engine, None)) as address:
            take_picture(address, load, dark=dark, path=path, chats=False)
            load.join()


def picture_of_loans(count: int, *, dark: bool, path: Path) -> None:
    """Requests borrow from other instances when the picture is taken."""
    engine = ClusterEngine()
    with tempfile.TemporaryDirectory() as folder:
        model = lending_attack.save_model(Path(folder))
        names = ("formal", "pirate", "idle")
        adapters = {
            name: lora.save_adapter(Path(folder) / name, model, seed=place)
            for place, name in enumerate(names)
        }
        with Cluster(
            folder,
            instances=count,
            threads=1,
            kv_memory=3 * lending_attack.POOL,
            adapters=adapters,
            **lending_attack.OPTIONS,
        ) as cluster:
            engine.cluster = cluster
            load = threading.Thread(target=ask_long, args=(cluster,))
            with served(page_app(engine, None)) as address:
                take_picture(address, load, dark=dark, path=path, chats=False)
                load.join()


def ask_long(cluster: Cluster) -> None:
    """One request longer than an instance's memory, and short ones with adapters."""
    prompts = [{"prompt_token_ids": p} for p in zoo.random_prompts([4000, 200, 150, 90, 300])]
    params = [
        SamplingParams(
            temperature=1, seed=number, max_tokens=1600 if number else 4900, ignore_eos=True
        )
        for number in range(len(prompts))
    ]
    cluster.generate(prompts, params, adapter=[None, "formal", "pirate", "formal", None])


def move_all(cluster: Cluster) -> None:
    """Have requests move to and fro as long as there are any."""
    params = [
        SamplingParams(temperature=1, seed=n, max_tokens=900 + 60 * n, ignore_eos=True)
        for n in range(NUM_REQUESTS)
    ]
    prompts = ["Tell me of the sea. " * (1 + n * 7 % 12) for n in range(NUM_REQUESTS)]
    asking = threading.Thread(target=cluster.generate, args=(prompts, params))
    asking.start()
    while asking.is_alive():
        stats = cluster.stats()
        for (name, index), owner in list(stats.requests.items())[:2]:
            others = [one.id for one in stats.instances if one.id != owner]
            with contextlib.suppress(InvalidOperation):  # it has just ended, or moves already
                cluster.migrate(name, random.choice(others), index=index)
        time.sleep(0.3)
    asking.join()


async def ask_all(llm: AsyncLLM) -> None:
    """Requests of many lengths, one after the other so that some end while others begin."""

    async def ask(number: int) -> None:
        await asyncio.sleep(0.25 * number)
        words = "Tell me of the sea. " * (1 + number * 7 % 12)
        system = SYSTEM if number % 3 else ""
        params = SamplingParams(
            temperature=1,
            seed=number,
            max_tokens=300 + 170 * (number % 6),
            ignore_eos=True,
            n=3 if number % 6 == 2 else 1,
        )
        async for _ in llm.generate(system + words, params):
            pass

    await asyncio.gather(*(ask(number) for number in range(NUM_REQUESTS)))


def take_picture(
    address: str, load: threading.Thread, *, dark: bool, path: Path, chats: bool = True
) -> None:
    """Once the load has run for a while, with a chat beside it."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = chromium.new_page(
            viewport={"width": 1280, "height": 800}, color_scheme="dark" if dark else "light"
        )
        page.goto(address)
        page.wait_for_selector("#link[data-state=live]")
        load.start()
        page.wait_for_timeout(1000)
        if chats:
            ask(page, "hello", most=11)
        page.wait_for_timeout(6500)
        if chats:
            ask(page, "tell me about the moon", most=400)
        page.wait_for_timeout(900)
        page.screenshot(path=path)
        chromium.close()


def ask(page: Page, text: str, *, most: int) -> None:
    """In the chat, for so many tokens."""
    page.get_by_role("spinbutton").fill(str(most))
    page.fill("#ask", text)
    page.keyboard.press("Enter")


if __name__ == "__main__":
    main()
