"""Gathers what a bare machine with a GPU lacks into `gpu-kit/`: wheels, and kernels built ahead.

`make gpu-kit` runs this. The machine meant has PyTorch, Python 3.12 and no network; see
`gpu_check.py` for what is done there. Only what is stale is made again, and what cannot be made
here is left out and named, in the output and in `gpu-kit/kit.json`.

FlashInfer compiles its kernels when they are first used, minutes that such a machine does not have.
A package `flashinfer_jit_cache` hands it the modules compiled here instead (flashinfer/jit/env.py).
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KIT = ROOT / "gpu-kit"
SCRATCH = ROOT / "build" / "gpu-kit"
LIMIT_BYTES = 63 << 20  # of the kit and the working tree, which travel together

FLASHINFER = "0.6.18.post1"
PYTHON = "3.12"
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in (31, 28, 17)),
    "manylinux2014_x86_64",
    "any",
)
ARCHITECTURE = "9.0a"  # H100, H200

# What our own wheel is made of.
PACKAGED = (
    "pyproject.toml",
    "vmem",
    "allocator",
    "attention_backends",
    "runtime",
    "quant",
    "benchmarks/harness",
    "examples",
)

# What is installed there in any case, and what only where the machine has no version of its own.
ALWAYS = (
    f"flashinfer-python=={FLASHINFER}",
    "apache-tvm-ffi>=0.1.6,<0.2",
    "typing-extensions>=4.16",  # older ones are common
)
IF_MISSING = (
    "humming-kernels",
    "cuda-python>=13,<14",
    "cuda-bindings>=13,<14",
    *("msgspec", "xxhash", "llguidance", "jinja2"),
    *("typer", "shellingham", "rich", "markdown-it-py", "mdurl", "pygments"),
    # A server, and who asks it.
    *("fastapi", "starlette", "pydantic", "annotated-types", "annotated-doc", "opentelemetry-api"),
    *("typing-inspection", "anyio", "uvicorn", "uvloop", "httptools"),
    *("prometheus_client", "httpx", "httpcore", "h11", "idna", "certifi", "sniffio", "click"),
    *("pytest", "iniconfig", "pluggy", "pytest-timeout", "hypothesis", "sortedcontainers"),
    # FlashInfer's.
    *("requests", "urllib3", "charset-normalizer"),
    *("einops", "tabulate", "tqdm", "nvidia-ml-py", "packaging", "filelock"),
)
# What FlashInfer needs to compile, beside the above; installed into the scratch folder only.
TO_COMPILE = ("requests", "urllib3", "idna", "certifi", "charset-normalizer", "ninja")

# (kernel, sliding window), of the one wrapper that is used: bfloat16, int32 page numbers, heads of
# 128.
MODULES = (("prefill", False), ("prefill", True))
_COMPILE = """
import sys, torch
from flashinfer.jit.attention import gen_batch_prefill_module

kernel, window = sys.argv[1], sys.argv[2] == "True"
types = (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.int32, 128, 128, 0, window, False)
spec = gen_batch_prefill_module("fa2", *types, False)
spec.build()
print(spec.get_library_path())
"""
_CACHE_PACKAGE = f'''"""FlashInfer's kernels, built ahead for sm_{ARCHITECTURE.replace(".", "")}."""

from pathlib import Path

__version__ = "{FLASHINFER}"


def get_jit_cache_dir() -> str:
    return str(Path(__file__).parent / "modules")
'''


class CannotMake(Exception):
    """A part of the kit that this machine cannot make, and why."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Gather the kit for a bare machine with a GPU.")
    parser.add_argument("--jobs", type=int, default=1, help="compilers that run at once")
    parser.add_argument("--no-kernels", action="store_true", help="leave FlashInfer's kernels out")
    parser.add_argument(
        "--there",
        type=Path,
        help="names of packages that the machine has, as `pip list` prints them: left out",
    )
    options = parser.parse_args()
    (KIT / "wheels").mkdir(parents=True, exist_ok=True)
    missing: dict[str, str] = {}
    for name, make in (
        ("vkv", build_wheel),
        ("wheels", lambda: download_wheels(_names(options.there))),
        ("kernels", lambda: build_kernels(options.jobs)),
    ):
        if name == "kernels" and options.no_kernels:
            missing[name] = "left out on request"
            continue
        try:
            make()
        except CannotMake as error:
            missing[name] = str(error)
    return report(missing)


# -- our wheel ---------------------------------------------------------------------------------


def build_wheel() -> None:
    """vkv's own wheel, if a file of it is newer."""
    wheels = list((KIT / "wheels").glob("vkv-*.whl"))
    built_s = min((wheel.stat().st_mtime for wheel in wheels), default=0.0)
    if wheels and built_s > max(path.stat().st_mtime for path in _tracked_files()):
        return
    for wheel in wheels:
        wheel.unlink()
    # setuptools would pack files left in its own build folder, though they are gone from the tree.
    for stale in [*(ROOT / "build").glob("lib*"), *(ROOT / "build").glob("bdist*")]:
        shutil.rmtree(stale)
    _run([sys.executable, "-m", "build", "--wheel", "--outdir", KIT / "wheels", ROOT])


def _tracked_files() -> list[Path]:
    listed = _run(["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard", *PACKAGED])
    return [path for line in listed.splitlines() if (path := ROOT / line).exists()]


# -- others' wheels ----------------------------------------------------------------------------


def download_wheels(there: frozenset[str]) -> None:
    """One wheel a requirement, for the other machine's Python, of packages that are not `there`."""
    have = _read_list()
    failures = []
    wanted = [r for r in (*IF_MISSING, _core_of_pydantic()) if _name(r) not in there]
    for requirement in set(have).difference(wanted, ALWAYS):
        for name in have.pop(requirement):
            (KIT / "wheels" / name).unlink(missing_ok=True)
    for requirement in (*ALWAYS, *wanted):
        if any((KIT / "wheels" / name).exists() for name in have.get(requirement, [])):
            continue
        before = set(os.listdir(KIT / "wheels"))
        try:
            _download(requirement)
        except CannotMake as error:
            failures.append(f"{requirement}: {error}")
            continue
        have[requirement] = sorted(set(os.listdir(KIT / "wheels")) - before)
        _list_path().write_text(json.dumps(have, indent=1))
    if failures:
        raise CannotMake("; ".join(failures))


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0].replace("_", "-").lower()


def _names(listed: Path | None) -> frozenset[str]:
    """The names that begin the lines of a list."""
    if listed is None:
        return frozenset()
    return frozenset(_name(line) for line in listed.read_text().splitlines() if line.strip())


def _core_of_pydantic() -> str:
    """The one version that the pydantic of `constraints.txt`, which is installed here, runs on."""
    try:
        wanted = metadata.requires("pydantic") or []
    except metadata.PackageNotFoundError as error:
        raise CannotMake("pydantic is not installed here, to say which core it wants") from error
    return next(one for one in wanted if one.startswith("pydantic-core"))


def _download(requirement: str) -> None:
    platforms = [argument for name in PLATFORMS for argument in ("--platform", name)]
    target = ["--python-version", PYTHON, "--implementation", "cp", *platforms]
    options = ["--no-deps", "--only-binary=:all:", "--dest", KIT / "wheels"]
    options += ["--constraint", ROOT / "constraints.txt"]
    _run([sys.executable, "-m", "pip", "download", "-q", *options, *target, requirement])


def _list_path() -> Path:
    return KIT / "wheels.json"


def _read_list() -> dict[str, list[str]]:
    return json.loads(_list_path().read_text()) if _list_path().exists() else {}


# -- FlashInfer's kernels ----------------------------------------------------------------------


def build_kernels(jobs: int) -> None:
    """The modules of MODULES, compiled for ARCHITECTURE; about two minutes of one core each."""
    package = KIT / "flashinfer_jit_cache"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text(_CACHE_PACKAGE)
    stamp = package / "modules" / "built.json"
    built = json.loads(stamp.read_text()) if stamp.exists() else []
    wanted = [[FLASHINFER, ARCHITECTURE, kernel, window] for kernel, window in MODULES]
    if all(entry in built for entry in wanted):
        return
    environment = _compile_environment(_cuda_home(), jobs)
    for entry in wanted:
        if entry in built:
            continue
        *_, kernel, window = entry
        print(f"compiling FlashInfer's {kernel}, window {window} …", flush=True)
        command = [sys.executable, "-W", "ignore", "-c", _COMPILE, kernel, str(window)]
        library = Path(_run(command, environment).splitlines()[-1])
        goal = package / "modules" / library.stem
        goal.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, goal)
        built.append(entry)
        stamp.write_text(json.dumps(built))


def _cuda_home() -> Path:
    """The CUDA toolkit: where CUDA_HOME says, where it usually is, or around the nvcc found."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and Path(nvcc).parent.parent]
    for place in filter(None, places):
        if (Path(place) / "bin" / "nvcc").exists() and (Path(place) / "include/cuda.h").exists():
            return Path(place).resolve()
    raise CannotMake("no CUDA toolkit (nvcc and headers) to compile FlashInfer's kernels with")


def _compile_environment(cuda_home: Path, jobs: int) -> dict[str, str]:
    """Where FlashInfer finds itself, the compiler and a driver to link to; no GPU is needed."""
    site = SCRATCH / "site"
    if not (site / "flashinfer").exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site]
        helpers = [r for r in IF_MISSING if r in ("click", "einops", "tabulate", "tqdm")]
        helpers += ["nvidia-ml-py", "packaging", "filelock", *TO_COMPILE]
        _run([*pip, *ALWAYS, *helpers])
    # The driver itself is on machines with a GPU only; the linker wants no more than its name.
    stub = SCRATCH / "stub" / "libcuda.so"
    if not stub.exists():
        stub.parent.mkdir(parents=True, exist_ok=True)
        flags = ["-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", os.devnull, "-o", stub]
        _run([shutil.which("cc") or "gcc", *flags])
    libraries = [stub.parent, cuda_home / "lib", cuda_home / "lib64"]
    return {
        **os.environ,
        "CUDA_HOME": str(cuda_home),
        "LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
        "PATH": os.pathsep.join((str(site / "bin"), os.environ["PATH"])),
        "PYTHONPATH": str(site),
        "FLASHINFER_WORKSPACE_BASE": str(SCRATCH),
        "FLASHINFER_CUDA_ARCH_LIST": ARCHITECTURE,
        "MAX_JOBS": str(jobs),
    }


# -- the whole ---------------------------------------------------------------------------------


def report(missing: dict[str, str]) -> int:
    """Write `kit.json`, print sizes, and fail if the kit is too large to carry."""
    files = [path for path in sorted(KIT.rglob("*")) if path.is_file() and path.name != "kit.json"]
    sizes = {str(path.relative_to(KIT)): path.stat().st_size for path in files}
    total = sum(sizes.values())
    listed = _run(["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard"]).splitlines()
    tree = sum(path.stat().st_size for name in listed if (path := ROOT / name).is_file())
    always = ["vkv", *(requirement.split("==")[0].split(">")[0] for requirement in ALWAYS)]
    contents = {"always": always, "missing": missing, "bytes": total, "files": sizes}
    (KIT / "kit.json").write_text(json.dumps(contents, indent=1))
    for name, size in sizes.items():
        if size > 1 << 20:
            print(f"{size / 2**20:7.1f} MiB  {name}")
    print(f"{total / 2**20:7.1f} MiB  in {len(sizes)} files under {KIT.name}/")
    for name, reason in missing.items():
        print(f"left out: {name}: {reason}")
    print(f"{tree / 2**20:7.1f} MiB  in the working tree")
    if total + tree > LIMIT_BYTES:
        print(f"both exceed {LIMIT_BYTES >> 20} MiB; leave out what the machine has, by --there")
        return 1
    return 0


def _run(command: Sequence[str | Path], environment: dict[str, str] | None = None) -> str:
    """The command's output; CannotMake with the end of it if it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CannotMake(f"{command[0]} failed: …{done.stdout.strip()[-800:]}")
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
