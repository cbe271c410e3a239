"""The page in a browser: strips grow during a chat, and hands, eyes and ears find their way."""

import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from page_app import KEY, MODEL, page_app, run_elsewhere, served
from vkv import AsyncLLM
from vkv.allocator import Lane, PageRuns
from vkv.runtime.engine.memory.memory_map import AdapterShown, MemoryMap, Strip
from vkv.runtime.serving.cluster_map import ClusterMap, InstanceMap, Loans, Moving
from vkv.vmem.errors import EngineDied

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("there is no chromium here", allow_module_level=True)

PATIENCE_MS = 30_000


@contextmanager
def _brought_along() -> Iterator[AsyncLLM]:
    """The model that vkv brings along."""
    llm = AsyncLLM(max_seqs=8, max_parked=4)
    yield llm
    run_elsewhere(llm.close())


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    with _brought_along() as llm:
        yield llm


@pytest.fixture
def unasked() -> Iterator[tuple[str, AsyncLLM]]:
    """A server that no other test has asked anything, in whatever order they come."""
    with _brought_along() as llm, served(page_app(llm, llm)) as address:
        yield address, llm


@pytest.fixture(scope="module")
def address(llm: AsyncLLM) -> Iterator[str]:
    with served(page_app(llm, llm)) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page, what it complained of, and where it went."""

    page: Any
    errors: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Visit]]:
    contexts = []

    def open_page(address: str, **options: Any) -> Visit:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        contexts.append(context)
        visit = Visit(context.new_page())
        visit.page.set_default_timeout(PATIENCE_MS)
        visit.page.on(
            "console", lambda said: said.type == "error" and visit.errors.append(said.text)
        )
        visit.page.on("pageerror", lambda error: visit.errors.append(str(error)))
        visit.page.on("request", lambda request: visit.urls.append(request.url))
        visit.page.goto(address)
        return visit

    yield open_page
    for context in contexts:
        context.close()


def _live(page: Any) -> None:
    page.wait_for_selector("#link[data-state=live]")


def _ask(page: Any, text: str, *, most: int) -> None:
    page.get_by_role("spinbutton").fill(str(most))
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def _backed(page: Any) -> int:
    """Pixels of the strips that have a request's colour, which no text and no free slot has."""
    return page.evaluate(
        """() => {
          const canvas = document.getElementById("strips");
          const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
          let count = 0;
          for (let i = 0; i < data.length; i += 4) {
            const channels = [data[i], data[i + 1], data[i + 2]];
            if (data[i + 3] === 255 && Math.max(...channels) - Math.min(...channels) > 60) count++;
          }
          return count;
        }"""
    )


def _tokens(page: Any) -> int:
    """Tokens of the slot that is chosen, as the line under the strips says."""
    told = re.search(r"([\d\u202f]+) tokens? of", page.locator("#detail").inner_text())
    return int(told[1].replace("\u202f", ""))


def _skip(page: Any, time_ms: int) -> None:
    """So much time has passed at once, as far as the page knows."""
    page.evaluate(
        """(time) => {
          const now = performance.now.bind(performance);
          performance.now = () => now() + time;
        }""",
        time_ms,
    )


# -- watching a conversation ------------------------------------------------------------------


def test_a_chat_takes_memory_before_ones_eyes(
    unasked: tuple[str, AsyncLLM], visit: Callable[..., Visit]
) -> None:
    address, llm = unasked
    seen = visit(address)
    page = seen.page
    _live(page)
    page.get_by_text("Nothing has been asked yet").wait_for()
    assert page.locator("#model").inner_text() == MODEL
    assert page.locator("#says").inner_text().endswith("0 B backed")
    assert _backed(page) == 0
    _ask(page, "Tell me of the sea.", most=1800)
    page.wait_for_function(
        "() => document.getElementById('slots-line').textContent.startsWith('1 live')"
    )
    page.wait_for_function("() => Number(document.getElementById('out-rate').textContent) > 0")
    assert page.get_by_text("Nothing has been asked yet").is_hidden()
    page.focus("#strips")
    page.keyboard.press("Home")
    words = page.locator("#spoken").inner_text()
    assert words.startswith("Slot 0: request #")
    assert "with tokens" in words
    backed, tokens = _backed(page), _tokens(page)
    assert backed > 0
    while _tokens(page) < tokens + 130:  # two pages of every range and more
        page.wait_for_timeout(50)
    assert _backed(page) > backed
    page.wait_for_selector(".turn.assistant:not(.busy)")
    assert "1\u202f800 tokens in" in page.locator(".turn.assistant .note").inner_text()
    page.wait_for_function(
        "() => document.getElementById('slots-line').textContent.startsWith('0 live, 1 p')"
    )
    reserved = f"{llm.stats().virtual_bytes >> 20} MiB reserved"
    assert page.locator("#says").inner_text().startswith(reserved)
    assert len(page.locator("#said").inner_text()) > 20  # told once, when it is whole
    assert seen.errors == []
    assert {url.split("/")[2] for url in seen.urls if not url.startswith("data:")} == {
        address.split("/")[2]
    }


def test_an_answer_can_be_stopped_and_another_conversation_begun(
    visit: Callable[..., Visit], address: str
) -> None:
    page = visit(address).page
    _live(page)
    _ask(page, "Tell me of the wind.", most=1500)
    page.wait_for_function(
        "() => document.querySelector('.turn.assistant .text')?.textContent.length > 5"
    )
    assert page.get_by_role("button", name="Send").is_disabled()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("stopped", exact=True).wait_for()
    assert page.get_by_role("button", name="Stop").is_hidden()
    assert page.evaluate("document.activeElement.id") == "ask"
    page.wait_for_function(
        "() => document.getElementById('slots-line').textContent.startsWith('0 live')"
    )
    page.get_by_role("button", name="New conversation").click()
    assert page.locator(".turn").count() == 0
    assert page.get_by_text("Ask something, and watch").is_visible()


def test_what_a_model_or_a_server_says_is_text_and_never_markup(
    visit: Callable[..., Visit], address: str
) -> None:
    page = visit(address).page
    _live(page)
    _ask(page, "<img src=x onerror=alert(1)>", most=3)
    page.wait_for_selector(".turn.assistant:not(.busy)")
    assert page.locator("#log img").count() == 0
    assert "<img" in page.locator(".turn.user").inner_text()
    _ask(page, "refuse", most=3)
    assert page.get_by_role("alert").inner_text() == "refused: <b>as asked</b>"
    _ask(page, "think", most=3)
    page.wait_for_function(
        "() => document.querySelectorAll('.turn.assistant:not(.busy)').length === 3"
    )
    details = page.locator(".turn details")
    assert details.get_attribute("open") is None
    details.locator("summary").click()
    assert "first <i>this</i>" in details.inner_text()


# -- without a mouse, without sight -----------------------------------------------------------


def test_keys_alone_reach_everything(visit: Callable[..., Visit], address: str) -> None:
    page = visit(address).page
    _live(page)
    reached = []
    for _ in range(11):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.id || document.activeElement.className")
        )
    order = ["skip", "key-toggle", "theme", "zoom", "as-table", "strips"]
    assert reached[: len(order)] == order
    assert {"ask", "send"} <= set(reached)
    page.focus("#strips")
    page.keyboard.press("End")
    assert page.locator("#detail").inner_text().startswith("Slot 11: free.")
    page.keyboard.press("ArrowUp")
    assert page.locator("#spoken").inner_text().startswith("Slot 10: ")
    page.keyboard.press("Escape")
    assert page.locator("#detail").inner_text() == ""


def test_all_has_a_name_a_role_and_a_table_in_its_place(
    visit: Callable[..., Visit], address: str
) -> None:
    page = visit(address).page
    _live(page)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, canvas, section, [role]")]
          .filter((node) => !node.closest("[aria-hidden]"))
          .filter((node) => !(node.ariaLabel || node.getAttribute("aria-labelledby")
            || node.labels?.length || node.textContent.trim() || node.matches("[role=status]")))
          .map((node) => node.outerHTML)"""
    )
    assert unnamed == []
    assert page.get_by_role("heading", name="Slots").is_visible()
    assert page.get_by_role("log", name="Conversation").get_attribute("aria-live") == "off"
    _ask(page, "hello there", most=30)
    page.wait_for_selector(".turn.assistant:not(.busy)")
    page.get_by_role("button", name="As a table").click()
    assert page.locator("#strips").is_hidden()
    row = page.locator("#rows tr").filter(has_text="parked").first
    assert int(row.locator("td").nth(3).inner_text().replace("\u202f", "")) >= 30
    assert page.get_by_role("columnheader", name="Shared").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_follow_the_system_and_the_switch(
    visit: Callable[..., Visit], address: str, scheme: str
) -> None:
    page = visit(address, color_scheme=scheme).page
    _live(page)

    def brightness() -> int:
        return page.evaluate(
            "Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"
        )

    assert (brightness() > 127) == (scheme == "light")
    contrast = page.evaluate(CONTRAST)
    assert min(contrast.values()) >= 4.5, contrast
    theme = page.locator("#theme")
    theme.click()
    assert (theme.inner_text(), brightness() > 127) == ("Theme: light", True)
    theme.click()
    assert (theme.inner_text(), brightness() > 127) == ("Theme: dark", False)
    page.reload()
    assert (theme.inner_text(), brightness() > 127) == ("Theme: dark", False)


CONTRAST = """() => {
  const light = (color) => {
    const parts = color.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255)
      .map((part) => part <= .04045 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4);
    return .2126 * parts[0] + .7152 * parts[1] + .0722 * parts[2];
  };
  const behind = (node) => {
    const color = getComputedStyle(node).backgroundColor;
    return color === "rgba(0, 0, 0, 0)" && node.parentElement ? behind(node.parentElement) : color;
  };
  const found = {};
  for (const node of document.querySelectorAll("h1, h2, p, dt, dd, li, span, button, label, b")) {
    if (!node.textContent.trim() || !node.offsetParent || node.disabled) continue;
    const [a, b] = [light(getComputedStyle(node).color), light(behind(node))];
    found[`${node.tagName} ${node.textContent.trim().slice(0, 30)}`] =
      (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  }
  return found;
}"""


def test_a_phone_shows_all_of_it_without_sideways_scrolling(
    visit: Callable[..., Visit], address: str
) -> None:
    page = visit(address, viewport={"width": 360, "height": 740}).page
    _live(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.get_by_label("Message").scroll_into_view_if_needed()
    assert page.get_by_role("button", name="Send").is_visible()


# -- when it goes wrong -----------------------------------------------------------------------


def test_a_key_is_asked_for_and_sent_with_all_but_the_page(
    visit: Callable[..., Visit], llm: AsyncLLM
) -> None:
    with served(page_app(llm, llm, needs_key=True)) as address:
        page = visit(address).page
        page.get_by_text("An API key is needed").wait_for()
        page.get_by_role("textbox", name="API key").fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_text("The API key is not known here").wait_for()
        page.get_by_role("textbox", name="API key").fill(KEY)
        page.get_by_role("button", name="Use it").click()
        _live(page)
        page.wait_for_function(f"() => document.getElementById('model').textContent === '{MODEL}'")
        _ask(page, "hello", most=3)
        page.locator(".turn.assistant .note").filter(has_text="3 tokens in").wait_for()
        page.reload()
        _live(page)
        stored = "[...Object.keys(localStorage)].join() + '|' + Object.keys(sessionStorage).join()"
        assert page.evaluate(stored) == "vkv-theme|vkv-key"


def test_a_server_that_went_and_came_back_is_found_again(
    visit: Callable[..., Visit], llm: AsyncLLM
) -> None:
    with served(page_app(llm, llm)) as address:
        page = visit(address).page
        _live(page)
    page.wait_for_selector("#link[data-state=lost]")
    assert page.locator("#link").inner_text().startswith("Reconnecting")
    _ask(page, "hello?", most=3)
    assert page.get_by_role("alert").inner_text() == "The server cannot be reached."
    with served(page_app(llm, llm), int(address.rsplit(":", 1)[1])):
        _live(page)


class Changing:
    """A source of large maps, each unlike the one before; or of trouble."""

    def __init__(self, drawn: MemoryMap, num_slots: int) -> None:
        self._drawn = drawn
        self._num_slots = num_slots
        self._turn = 0
        self.is_gone = False

    async def memory_map(self) -> MemoryMap:
        if self.is_gone:
            raise EngineDied("the process that had the engine has ended")
        self._turn += 1
        strips = tuple(self._strip(slot) for slot in range(self._num_slots))
        return msgspec.structs.replace(
            self._drawn,
            num_slots=self._num_slots,
            max_len=32768,
            lanes=(Lane(64, 128),),
            strips=strips,
            num_running=self._num_slots,
        )

    def _strip(self, slot: int) -> Strip:
        pages = (slot * 7 + self._turn) % 97
        return Strip(
            slot=slot,
            state="parked" if slot % 5 == 4 else "live",
            request="" if slot % 5 == 4 else f"req-{slot + self._turn}",
            num_tokens=pages * 256,
            num_prompt_tokens=100,
            num_promised=64 * (slot % 3),
            runs=(PageRuns(pages // 4, pages // 2, 2, 3 if slot % 5 == 4 else 0),),
        )


def test_a_thousand_slots_are_drawn_and_an_engine_that_died_is_said(
    visit: Callable[..., Visit], llm: AsyncLLM, record_property: Callable[[str, object], None]
) -> None:
    source = Changing(run_elsewhere(llm.memory_map()), 1000)
    with served(page_app(source, llm)) as address:
        seen = visit(address)
        page = seen.page
        _live(page)
        times = []
        for _ in range(20):
            page.wait_for_timeout(120)
            times.append(float(page.locator("#strips").get_attribute("data-draw-ms")))
        record_property("draw_ms", sorted(times))
        print(f"1,000 slots: {sorted(times)[10]} ms at the median, {max(times)} ms at most")  # noqa: T201
        page.focus("#strips")
        page.keyboard.press("End")
        assert page.locator("#detail").inner_text().startswith("Slot 999: ")
        assert seen.errors == []
        source.is_gone = True
        page.get_by_text("the process that had the engine has ended").wait_for()
        assert page.locator("#memory.stale").count() == 1
        source.is_gone = False
        _live(page)


# -- several instances ------------------------------------------------------------------------


class Instances:
    """A source of maps of a cluster that is arranged by hand.

    Attributes:
        strips: by instance, of its four slots.
        states: of each instance.
        moves: under way.
        loans: between them.
        more: of the map that is their own together.
    """

    num_slots = 4

    def __init__(self, drawn: MemoryMap) -> None:
        self._drawn = drawn
        self.strips: dict[int, list[Strip]] = {0: [], 1: []}
        self.states = {0: "working", 1: "working"}
        self.moves: tuple[Moving, ...] = ()
        self.num_moved = 0
        self.loans: tuple[Loans, ...] = ()
        self.more: dict[str, Any] = {}

    async def memory_map(self) -> MemoryMap:
        return (await self.cluster_map()).map

    async def cluster_map(self) -> ClusterMap:
        parts, strips = [], []
        for place, number in enumerate(self.strips):
            first = place * self.num_slots
            its = self.strips[number]
            strips += [msgspec.structs.replace(s, slot=first + s.slot) for s in its]
            part = InstanceMap(number, "both", self.states[number], first, self.num_slots, len(its))
            parts.append(part)
        whole = msgspec.structs.replace(
            self._drawn,
            num_slots=self.num_slots * len(self.strips),
            max_len=4096,
            lanes=(Lane(2, 16),),
            strips=tuple(strips),
            **self.more,
        )
        return ClusterMap(
            whole, tuple(parts), self.moves, self.num_moved, num_recomputed=0, loans=self.loans
        )


def _strip(slot: int, request: str, state: Any = "live") -> Strip:
    pages = 6 if state != "arriving" else 0
    return Strip(slot, state, request, pages * 256, 100, 4, (PageRuns(0, pages, 0, 0),))


# How many pixels of each half of the strips have the colour of a request.
HALVES = """(request) => {
  const canvas = document.getElementById("strips"), wide = canvas.width / 2;
  const probe = document.body.appendChild(document.createElement("i"));
  probe.style.color = `var(--hue-${request % 8})`;
  const color = getComputedStyle(probe).color.match(/\\d+/g).map(Number);
  probe.remove();
  return [0, wide].map((left) => {
    const data = canvas.getContext("2d").getImageData(left, 0, wide, canvas.height).data;
    let count = 0;
    for (let i = 0; i < data.length; i += 4) {
      if (color.every((channel, at) => Math.abs(channel - data[i + at]) < 3)) count++;
    }
    return count;
  });
}"""


def test_a_request_is_seen_to_move_between_instances_and_keeps_its_colour(
    visit: Callable[..., Visit], llm: AsyncLLM
) -> None:
    source = Instances(run_elsewhere(llm.memory_map()))
    source.strips[0] = [_strip(0, "front-7"), _strip(1, "front-8")]
    with served(page_app(source, llm)) as address:
        seen = visit(address)
        page = seen.page
        _live(page)
        page.wait_for_function("() => document.querySelectorAll('#instances li').length === 2")
        assert page.locator("#instances li").first.inner_text().startswith("Instance 0 · both: 2 r")
        assert page.locator("#moves-line").inner_text() == "0 moves"
        here, there = page.evaluate(HALVES, 7)
        assert here > 100
        assert there == 0
        source.strips[1] = [_strip(2, "front-7", "arriving")]  # its pages are on their way
        source.moves = (Moving("front-7", 0, 1),)
        page.get_by_text("0 moves, 1 under way").wait_for()
        page.wait_for_timeout(200)
        assert page.evaluate(HALVES, 7)[1] > there  # the line to where it goes
        page.focus("#strips")
        page.keyboard.press("Home")
        for _ in range(6):
            page.keyboard.press("ArrowDown")
        assert (
            page.locator("#detail")
            .inner_text()
            .startswith("Instance 1, slot 2: request #7, on its way here.")
        )
        source.strips = {0: [_strip(1, "front-8")], 1: [_strip(2, "front-7")]}
        source.moves, source.num_moved = (), 1
        page.wait_for_function(
            "() => document.getElementById('moves-line').textContent === '1 move'"
        )
        page.wait_for_timeout(200)
        assert page.evaluate(HALVES, 7)[0] > 0  # it is seen to go
        _skip(page, 1800)
        page.wait_for_timeout(400)
        assert page.evaluate(HALVES, 7)[0] == 0
        assert page.evaluate(HALVES, 7)[1] > 100
        page.get_by_role("button", name="As a table").click()
        page.locator("#rows tr").filter(has_text="1/2").filter(has_text="#7").wait_for()
        assert seen.errors == []


def test_what_is_lent_has_its_requests_colour_and_adapters_say_who_uses_them(
    visit: Callable[..., Visit], llm: AsyncLLM
) -> None:
    drawn = run_elsewhere(llm.memory_map())
    source = Instances(drawn)
    source.strips[0] = [msgspec.structs.replace(_strip(0, "front-7"), adapter="odd")]
    with served(page_app(source, llm)) as address:
        seen = visit(address)
        page = seen.page
        _live(page)
        assert page.locator("#loans").is_hidden()
        assert page.locator("#adapters").is_hidden()
        assert page.locator("#legend").get_by_text("Lent to another").is_hidden()
        assert page.evaluate(HALVES, 7)[1] == 0
        source.strips[1] = [_strip(2, "front-7", "lent"), _strip(3, "", "lent")]
        source.loans = (Loans(0, 1, 2, 3072, 10, 20 * 1024), Loans(1, 0, 0, 0, 10, 500))
        source.more = {
            "counters": msgspec.structs.replace(drawn.counters, called_back=3, lost=1),
            "adapters": (
                AdapterShown("<b>even</b>", 3 << 20, 0, 0, False),
                AdapterShown("odd", 1 << 20, 2, 1, False),
            ),
        }
        page.locator("#loans li").filter(has_text="called back").wait_for()
        assert page.locator("#loans li").all_inner_texts() == [
            "Lent",
            "1 → 0: 3 072 tokens, 2 KiB a step".replace("3 0", "3\u202f0"),
            "3 called back",
            "1 lost",
        ]
        source.loans = (Loans(0, 1, 2, 3072, 12, 20 * 1024 + 1000),)
        page.locator("#loans li").filter(has_text="500 B a step").wait_for()  # of late
        assert page.locator("#adapters li").all_inner_texts() == [
            "Adapters: 1 of 2 in memory, 2 MiB",
            "odd: 1 MiB in 2 instances, 1 request",
            "<b>even</b>: not in memory",
        ]
        assert page.locator("#legend").get_by_text("Lent to another").is_visible()
        page.wait_for_timeout(200)
        assert page.evaluate(HALVES, 7)[1] > 100
        assert page.locator("#slots-line").inner_text().startswith("1 live, 2 lent, 0 parked, 5 f")
        page.focus("#strips")
        page.keyboard.press("Home")
        assert ": request #7 with adapter odd." in page.locator("#detail").inner_text()
        for _ in range(6):
            page.keyboard.press("ArrowDown")
        words = page.locator("#detail").inner_text()
        assert words.startswith("Instance 1, slot 2: lent to request #7 of instance 0, which asks")
        assert "pages: 12 lent." in words
        page.get_by_role("button", name="As a table").click()
        page.locator("#rows tr").filter(has_text="1/2").filter(has_text="lent").wait_for()
        assert seen.errors == []


def test_an_instance_that_drains_or_ends_says_so(
    visit: Callable[..., Visit], llm: AsyncLLM
) -> None:
    source = Instances(run_elsewhere(llm.memory_map()))
    source.strips[1] = [_strip(0, "front-3")]
    with served(page_app(source, llm)) as address:
        seen = visit(address, viewport={"width": 360, "height": 740})
        page = seen.page
        _live(page)
        source.states[0] = "draining"
        page.locator("#instances li").filter(has_text="Instance 0 · both · draining").wait_for(
            state="attached"
        )
        del source.strips[0]
        page.wait_for_function("() => document.querySelectorAll('#instances li').length === 1")
        page.focus("#strips")
        page.keyboard.press("Home")
        words = page.locator("#detail").inner_text()
        assert words.startswith("Instance 1, slot 0: request #3.")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        _skip(page, 6000)
        page.wait_for_timeout(1500)  # until the one that is gone is shown no longer
        assert seen.errors == []


def test_a_page_that_nobody_sees_asks_nothing(visit: Callable[..., Visit], llm: AsyncLLM) -> None:
    source = Changing(run_elsewhere(llm.memory_map()), 3)
    with served(page_app(source, llm)) as address:
        page = visit(address).page
        _live(page)
        page.evaluate(
            """() => {
              Object.defineProperty(document, "hidden", { value: true, configurable: true });
              document.dispatchEvent(new Event("visibilitychange"));
            }"""
        )
        turn, settled = -1, time.monotonic() + 20
        while source._turn != turn:
            assert time.monotonic() < settled, "it goes on asking"
            turn = source._turn
            page.wait_for_timeout(400)
        page.evaluate(
            """() => {
              delete document.hidden;
              document.dispatchEvent(new Event("visibilitychange"));
            }"""
        )
        _live(page)
        page.wait_for_timeout(400)
        assert source._turn > turn
