"""An interactive session, as in a notebook: memory is back at its floor when names are dropped.

The session runs in a process of its own, in IPython's shell, which holds on to results (`_`,
`Out`), to the exception shown last and to everything in its namespace.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SESSION = """
import json, os, sys
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
shell.run_line_magic("xmode", "Minimal")

def held():
    with open("/proc/self/smaps_rollup") as lines:  # counts exactly, which status does not
        fields = dict(line.split(":", 1) for line in lines if line.startswith("Pss_Shmem"))
    return int(fields["Pss_Shmem"].split()[0]) * 1024  # mapped pages of memfds, not shared

def target(number):
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except FileNotFoundError:  # the shell's own threads close files of theirs meanwhile
        return ""

def memfds():
    return sum("memfd:vkv" in target(number) for number in os.listdir("/proc/self/fd"))

def cell(source, fails=False):
    result = shell.run_cell(source, store_history=True)
    assert result.success is not fails, result

figures = []
shell.user_ns["folder"] = sys.argv[1]
cell("import vkv, torch; torch.set_num_threads(1)")
cell("from transformers import AutoModelForCausalLM")
cell("model = AutoModelForCausalLM.from_pretrained(folder)")
for name, opening, use, closing in json.load(sys.stdin):
    floor, files = held(), memfds()
    cell(opening)
    for line in use:
        cell(line)
    used = held() - floor
    for line in closing:
        cell(line)
    assert shell.user_ns["vkv"].vmem.janitor.drain(20)  # what was dropped comes a moment later
    left = held() - floor
    figures.append([name, used, left, memfds() - files])
print("figures", json.dumps(figures))
"""

_OPEN = "llm = vkv.LLM(folder, device='cpu', dtype='float32', kv_memory='64MiB', max_len=512)"
_USE = [
    "llm.generate(['hello'] * 4, vkv.SamplingParams(max_tokens=60, ignore_eos=True))",
    "llm.stats()",
]
_CACHE = "cache = vkv.VirtualCache(model.config, max_len=512)"
_DECODE = ["out = model.generate(torch.zeros(2, 40, dtype=int), past_key_values=cache)", "out"]
_ASYNC = _OPEN.replace("vkv.LLM", "vkv.AsyncLLM")
_TASKS = [
    "import asyncio",
    "async def ask():\n"
    "    params = vkv.SamplingParams(max_tokens=60, ignore_eos=True)\n"
    "    async for output in llm.generate('hello', params):\n"
    "        pass\n"
    "    return output",
    "await asyncio.gather(*(ask() for _ in range(4)))",
    "llm.stats()",
]
_HALF_READ = "half = llm.generate('hello'); await anext(half)"
_SLOTS = """
layer = vkv.LayerGeometry(num_kv_heads=2, key_dim=64, value_dim=64)
layout = vkv.KVLayout((layer,) * 4, torch.float32, max_len=512, page_bytes=16 << 10)
driver = vkv.open_driver("cpu", layout.page_bytes)
cache = vkv.KVCache(layout, vkv.PagePool(driver, 4 << 20), num_slots=4)
"""
_GROW = [
    "slots = [cache.open() for _ in range(2)]",
    "for slot in slots: cache.grow(slot, 100)",
    "keys, values = cache.layer(3)",
    "keys[slots[1].index, :100].fill_(1.0)",
]
_ENDINGS = [
    ("close", _OPEN, _USE, ["llm.close()"]),
    ("del", _OPEN, _USE, ["del llm"]),
    ("with", _OPEN, _USE, ["with llm: llm.generate('hi')"]),
    ("a stream half read", _OPEN, [*_USE, "s = llm.stream('hi'); next(s)"], ["del llm, s"]),
    ("another in its place", _OPEN, _USE, [_OPEN, "llm.close()"]),
    ("async, with", _ASYNC, _TASKS, ["async with llm: await ask()"]),
    ("async, close", _ASYNC, _TASKS, ["await llm.close()"]),
    ("async, a stream half read", _ASYNC, [*_TASKS, _HALF_READ], ["await llm.close()"]),
    ("slots, with", _SLOTS, _GROW, ["with driver, cache: cache.close(slots[0])"]),
    ("slots, close", _SLOTS, _GROW, ["cache.shutdown()", "driver.close()"]),
    ("slots, del", _SLOTS, _GROW, ["del cache, keys, values"]),
    ("cache", _CACHE, _DECODE, ["del cache"]),
    ("cache, reset", _CACHE, _DECODE, ["cache.reset()"]),
]


@pytest.mark.timeout(240)
def test_memory_is_back_at_its_floor(llama_folder: Path) -> None:
    pytest.importorskip("IPython")
    done = subprocess.run(
        [sys.executable, "-c", SESSION, str(llama_folder)],
        input=json.dumps(_ENDINGS),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("figures ")]
    for name, used, left, files in json.loads(line.removeprefix("figures ")):
        assert used >= 64 << 10, f"{name}: {used} bytes were held"
        assert left == 0, f"{name}: {left} bytes are still held"
        # A cache that was reset can be filled again; a driver is for its opener to close.
        expected = name in ("cache, reset", "slots, del")
        assert files == expected, f"{name}: {files} memory files are still open"
