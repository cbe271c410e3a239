"""What `gpu_check.py` runs on a machine with a GPU, and in small on a CPU; the best comes first.

What each step is expected to show is in `README.md`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

MOST_OF_A_TEST_S = 60


@dataclass(frozen=True)
class Step:
    """One thing to run.

    Attributes:
        command: arguments of Python; RECORDS stands for the folder of records, which is also
            where all but tests run.
        limit_s: the most it may take.
        least_s: time below which it is not worth starting.
        is_test: whether it is a run of pytest, whose failures are looked into.
        tries: a package of the kit without which later steps go on if this one does not pass.
        is_first: whether a call ends where it does not pass: nothing else could.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    least_s: float = 20.0
    is_test: bool = False
    tries: str = ""
    is_first: bool = False


def plan(device: str, backends: Sequence[str]) -> list[Step]:
    """All steps, best first. `backends` are the attention backends that can run here."""
    return [
        Step("facts", ("-c", _FACTS), 60, is_first=True),
        _tests("memory", device, 100),
        _tests("pages between processes", device, 90),
        _tests("engine", device, 150),
        _bench("vmm", device, _VMM[device], 60),
        _bench("stall", device, _STALL[device], 90),
        _attention("llama-8b decode", device, backends),
        _tests("moves", device, 120),
        _throughput("throughput", device, 150),
        _attention("llama-8b chunks", device, backends),
        _tests("backends", device, 90),
        _tests("adapters", device, 60),
        _tests("4 bits", device, 90),
        _tests("random traffic", device, 90),
        _throughput("throughput, ragged", device, 150),
        _bench("memory", device, _MEMORY[device], 90),
        Step("humming, for linear and throughput, 4 bits", ("-c", _HUMMING), 60, tries="humming"),
        _bench("linear", device, _LINEAR[device], 100, least_s=40),
        _throughput("throughput, 4 bits", device, 150),
        _tests("other tests", device, 120),
        _bench("switch", device, _SWITCH[device], 100),
        _throughput("throughput, generate", device, 150),
        _attention("yi-6b decode", device, backends),
        _attention("long chunks", device, backends),
    ]


_FACTS = """
import json, torch, vkv
from vkv.attention_backends import describe_backends
from vkv.runtime.cli.machine import hardware, versions
from vkv.vmem import open_driver
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
facts = {"vkv": vkv.__path__[0], "hardware": hardware(device), "versions": versions()}
facts["backends"] = describe_backends()
if device.type == "cuda":
    facts["cuda"] = torch.version.cuda
    facts["free_and_total_bytes"] = torch.cuda.mem_get_info()
with open_driver(device) as driver:
    facts["driver"] = {"page_bytes": driver.page_bytes, "granularity": driver.granularity}
    facts["driver"]["memory"] = driver.memory_name
    (page,) = driver.create(1)
    facts["driver"]["can_be_handed_over"] = driver.bundle_of(page) is not None
with open("facts.json", "w") as file:
    json.dump(facts, file, indent=1)
"""

# humming compiles its kernels when they are first used; where it cannot, Triton's are chosen.
_HUMMING = """
import sys, torch
from vkv.quant import Int4Linear, Int4Weight
from vkv.quant.kernels.table import kernel_class
if reason := kernel_class("humming").unavailable_reason():
    print(reason)
    sys.exit()
codes = torch.randint(0, 16, (256, 512), dtype=torch.uint8)
weight = Int4Weight.from_codes(codes, torch.rand(256, 4).half(), None).to("cuda")
dense = weight.dequantize(torch.float64)
for rows in (1, 64):
    inputs = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
    found = Int4Linear(weight, kernel_name="humming")(inputs)
    expected = inputs.double() @ dense.T
    error = ((found.double() - expected).norm() / expected.norm()).item()
    print(rows, "rows, relative error", error)
    assert error < 1e-2
"""

_FIRST = "tests/runtime/engine/test_gpu_memory.py"
_CHANNELS = "tests/allocator/transfer/channels/test_two_processes.py"
_ENGINE = "tests/runtime/engine/test_engine_cuda.py"
_MOVES = "tests/runtime/engine/test_moves_cuda.py"
_BACKENDS = "tests/attention_backends/test_cuda.py"
_ADAPTERS = "tests/runtime/adapters/test_lora_kernel.py"
_TESTS: dict[str, tuple[str, ...]] = {  # what each step of tests is
    "memory": (_FIRST, "-k", "not random_traffic"),
    "pages between processes": (_CHANNELS, "-k", "cuda"),
    "engine": (_ENGINE,),
    "moves": (_MOVES,),
    "backends": (_BACKENDS,),
    "adapters": (_ADAPTERS,),
    "4 bits": tuple(f"tests/quant/test_{what}.py" for what in ("humming", "loading", "triton")),
    "random traffic": (_FIRST, "-k", "random_traffic"),
    "other tests": (
        "tests/vmem",
        "tests/allocator",
        "tests/runtime/virtual_cache",
        f"--ignore={_CHANNELS}",
    ),
}
_SMALL_TESTS = {  # on a CPU: what a GPU will be asked first, and what is quick
    "pages between processes": (_CHANNELS, "-k", "standin and dies"),
    "4 bits": ("tests/quant/test_humming.py",),
    "other tests": ("tests/vmem/test_contract.py",),
}
_EVERYWHERE = {"adapters"}  # tests that go by what machine they find, and have no mark

_VMM = {
    "cuda": "--max-memory 4GiB --repeats 7",
    "cpu": "--pages 2MiB --runs 1,8 --repeats 2 --max-memory 64MiB",
}
_STALL = {
    "cuda": "--heads 32:8x128 --layers 32 --batch 4 --context 32768 --steps 500 --repeats 3",
    "cpu": "--heads 16:4x64 --layers 2 --batch 2 --context 256 --steps 80 --repeats 1",
}
_MEMORY = {
    "cuda": "--shape llama3-8b --dtype bfloat16 --num-requests 32 --kinds virtual,paged",
    "cpu": "--shape llama-tiny --num-requests 4 --kinds virtual,paged --idle-s 0.2",
}
_SWITCH = {
    "cuda": "--shape llama-455m --dtype bfloat16 --num-conversations 16 --rate 4 --pause-s 0.5 "
    "--kv-memory 64MiB --systems recompute,blocks,beside-reuse --changes random",
    "cpu": "--num-conversations 3 --rate 5 --pause-s 0.05 --scale 0.05 --max-len 128 "
    "--kv-memory 1MiB --swap-memory 64MiB --systems recompute,beside-reuse --changes random",
}
_LINEAR = {
    "cuda": "--layers 8192x8192,llama3-8b --kernels all --max-memory 1GiB",
    "cpu": "--layers llama-455m --rows 1 --repeats 1 --max-memory 32MiB",
}
# All systems of a step hold the 8B model on the card at once: three fit into 80 GB beside what
# they work with, so transformers' generate, which pads to 64 times the longest, has its own step.
_THROUGHPUT = {
    "throughput": "--systems vkv,vkv-paged --cells decode-1,decode-32",
    "throughput, ragged": "--systems vkv,vkv-paged,transformers-continuous --cells ragged-64 "
    "--label ragged",
    "throughput, 4 bits": "--systems vkv --quant gptq --cells decode-1,decode-16",
    "throughput, generate": "--systems vkv,transformers --cells decode-1,ragged-64 --batch 64 "
    "--label generate",
}
_SMALL_THROUGHPUT = {  # on a CPU
    "throughput": "--systems vkv,vkv-paged --cells decode-1",
    "throughput, ragged": "--systems vkv,transformers-continuous --cells decode-1 --label ragged",
    "throughput, 4 bits": "--systems vkv --quant gptq --cells decode-1",
    "throughput, generate": "--systems vkv,transformers --cells decode-1 --label generate",
}
_ATTENTION = {  # heads, batches, contexts, chunk, memory, limit
    "cuda": {
        "llama-8b decode": ("32:8x128", "1,8,64", "1024,8192,32768,131072", 0, "8GiB", 100),
        "llama-8b chunks": ("32:8x128", "1", "16384,65536,131072,196608", 2048, "8GiB", 90),
        "yi-6b decode": ("32:4x128", "1,8,64", "1024,16384,131072", 0, "8GiB", 100),
        "long chunks": ("32:4x128", "1", "16384,65536,131072,196608", 8192, "8GiB", 90),
    },
    "cpu": {
        "llama-8b decode": ("32:8x128", "1,2", "1024", 0, "64MiB", 60),
        "llama-8b chunks": ("32:8x128", "1", "1024", 64, "64MiB", 60),
        "yi-6b decode": ("32:4x128", "1", "1024", 0, "64MiB", 60),
        "long chunks": ("32:4x128", "1", "1024", 128, "64MiB", 60),
    },
}
_KERNELS = ("torch_flash", "flashinfer", "flash_attn", "flash_attn_3")
_PAGED_KERNELS = ("paged_flash", "paged_flash_attn", "paged_flashinfer")


def _attention(name: str, device: str, backends: Sequence[str]) -> Step:
    """Each library's kernel over slots, and the same over a paged cache."""
    heads, batches, contexts, chunk, memory, limit_s = _ATTENTION[device][name]
    wanted = (_KERNELS, _PAGED_KERNELS) if device == "cuda" else (("native",), ("paged_sdpa",))
    contiguous, paged = (",".join(b for b in kind if b in backends) for kind in wanted)
    arguments = (
        f"--heads {heads} --batches {batches} --contexts {contexts} --chunk {chunk} "
        f"--contiguous {contiguous or 'auto'} --paged {paged or 'auto'} --max-memory {memory} "
        f"--label {name.replace(' ', '-')}"
    )
    return _bench(f"attention, {name}", device, arguments, limit_s, command="attention")


def _throughput(name: str, device: str, limit_s: float) -> Step:
    shape, steps = (
        ("llama3-8b", _THROUGHPUT) if device == "cuda" else ("llama-tiny", _SMALL_THROUGHPUT)
    )
    arguments = f"--shape {shape} --repeats 1 {steps[name]}"
    return _bench(name, device, arguments, limit_s, least_s=60, command="throughput")


def _bench(
    name: str,
    device: str,
    arguments: str,
    limit_s: float,
    *,
    least_s: float = 20.0,
    command: str | None = None,
) -> Step:
    words = ("bench", command or name, "--device", device, "--out", ".", *arguments.split())
    entry = "import sys; from vkv.runtime.cli.main import main; sys.argv[0] = 'vkv'; main()"
    return Step(f"bench {name}", ("-c", entry, *words), limit_s, least_s)


def _tests(name: str, device: str, limit_s: float) -> Step:
    arguments = _TESTS[name]
    if device == "cpu":
        arguments = _SMALL_TESTS.get(name, arguments)
    marks = ("-m", "gpu") if device == "cuda" and name not in _EVERYWHERE else ()
    return pytest_step(name, (*marks, *arguments), limit_s)


def pytest_step(name: str, arguments: Sequence[str], limit_s: float) -> Step:
    """A run of pytest. A test that hangs ends it, and is named at the end of the log."""
    # Another machine's plugins and packages warn of what they like.
    options = ("-v", "-W", "default", "-p", "no:cacheprovider", "-o", "junit_family=xunit1")
    report = f"--junitxml=RECORDS/{name.replace(' ', '-')}.xml"
    most_s = min(MOST_OF_A_TEST_S, limit_s / 2)
    limits = (f"--timeout={most_s:.0f}", "--timeout-method=thread")
    others = ("--continue-on-collection-errors", "--durations=15", "--tb=short")
    command = ("-m", "pytest", *options, *limits, *others, report, *arguments)
    return Step(name, command, limit_s, is_test=True)
