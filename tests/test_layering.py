"""Who may import whom: read from the syntax tree of every file, so that no import is too lazy."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FACADE = "runtime/facade"  # the package `vkv` itself: its `.` is the root of all of them

# folder -> what of ours it may import, itself aside
ALLOWED = {
    "vmem": set(),
    "quant": {"vmem"},
    "allocator": {"vmem"},
    "attention_backends": {"vmem"},
    "runtime": {
        "vmem",
        "quant",
        "allocator",
        "attention_backends",
        "tiny_chat.model_path",  # the model of a bare `LLM()`, installed from examples/
        "bench.cli",  # started by the command
    },
    "benchmarks/harness": {"vmem", "quant", "allocator", "attention_backends", "runtime"},
}
# The stages that a request passes, each of which may import those below it.
FLOORS = (
    "facade",
    "cli",
    "serving",
    "cluster",
    "link",
    "frontend",
    "engine",
    "scheduling",
    "speculation",
    "execution",
    "chains",
    "adapters",
    "blocks",
    "model",
    "cpu_kernels",
    "request",
    "virtual_cache",
)
POLICIES = "runtime/scheduling/policies"  # pure: they see snapshots and make plans
CLUSTER_POLICIES = "runtime/cluster/policies"  # so are these
PURE = {  # what they may import, each other aside
    POLICIES: {
        "msgspec",
        "runtime.scheduling.plan",
        "runtime.scheduling.snapshot",
        "runtime.request.spec",
    },
    CLUSTER_POLICIES: {
        "msgspec",
        "runtime.cluster.snapshot",
        "runtime.request.spec",
        "vmem.errors",
    },
}
INSTALLED = {"benchmarks/harness": "bench"}  # in `vkv`
SCRIPTS = "benchmarks/harness/peers/workers"  # processes of their own, outside the library
USERS = ("tests", "examples", "benchmarks/gpu")  # they see the library as anybody does: `from vkv…`


def violations(root: Path) -> list[str]:
    """What is imported against the rules, as `file:line: why`."""
    found = []
    for folder in (*ALLOWED, *USERS):
        for path in sorted((root / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(), str(path))
            for node in _statements(tree):
                for name in _imported(node):
                    level = node.level if isinstance(node, ast.ImportFrom) else 0
                    if why := _objection(path.relative_to(root), level, name):
                        found.append(f"{path.relative_to(root)}:{node.lineno}: {why}")
    return found


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All of a file, however deep. No expressions: they are most of it, and import nothing."""
    left: list[ast.AST] = [tree]
    while left:
        yield (node := left.pop())
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            left += getattr(node, field, ())


def _imported(node: ast.AST) -> Iterator[str]:
    """The dotted names that an import statement asks for, as they stand."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (f"{node.module or ''}.{alias.name}".lstrip(".") for alias in node.names)


def _objection(path: Path, level: int, name: str) -> str | None:
    folder = _folder(path)
    for home in PURE:
        if path.is_relative_to(home) and (why := _impure(home, path, level, name)):
            return why
    if not level:
        top = name.split(".")[0]
        if top in ALLOWED:
            return f"`{top}` would be a second copy of `vkv.{top}`"
        if top == "vkv" and folder in ALLOWED and not path.is_relative_to(SCRIPTS):
            return f"`{name}` by its full name; inside the library imports are relative"
        return None
    target = _resolve(path, level, name)
    if folder == "runtime" and (why := _upward(path, target)):
        return why
    if folder in USERS:
        here = ".".join(path.parts[:-1])
        if f"{target}.".startswith(f"{here}."):
            return None
        return f"`{'.' * level}{name}` leaves its package; use `from vkv…`"
    own = INSTALLED.get(folder, folder)
    if any(f"{target}.".startswith(f"{home}.") for home in {own, *ALLOWED[folder]}):
        return None
    return f"{folder} may not import `{target}`"


def _resolve(path: Path, level: int, name: str) -> str:
    """The dotted path, from the root of the library, that a relative import means."""
    package = () if path.parent.as_posix() == FACADE else _package(path)
    assert level <= len(package) + 1, f"{path} climbs out of the library"
    return ".".join([*package[: len(package) - level + 1], name])


def _upward(path: Path, target: str) -> str | None:
    """Why one stage of runtime/ may not import another."""
    parts = target.split(".")
    if parts[0] != "runtime" or len(parts) < 2 or parts[1] not in FLOORS:
        return None
    own = path.parts[1]
    if own in FLOORS and FLOORS.index(parts[1]) < FLOORS.index(own):
        return f"runtime/{own} may not import `{target}`, which is above it"
    return None


def _impure(policies: str, path: Path, level: int, name: str) -> str | None:
    """Why a policy may not import this: it could then not drive a simulator."""
    if not level:
        top = name.split(".")[0]
        known = top in sys.stdlib_module_names or top in PURE[policies]
        return None if known else f"a policy may not import `{name}`"
    target = _resolve(path, level, name)
    own = policies.replace("/", ".")
    if any(f"{target}.".startswith(f"{home}.") for home in {own, *PURE[policies]}):
        return None
    return f"a policy may not import `{target}`"


def _folder(path: Path) -> str:
    """The entry of ALLOWED or USERS that a file belongs to."""
    return next(f for f in (*ALLOWED, *USERS) if path.is_relative_to(f))


def _package(path: Path) -> tuple[str, ...]:
    """The package of a file, from the root of the library."""
    for home, name in INSTALLED.items():
        if path.is_relative_to(home):
            return (name, *path.parent.relative_to(home).parts)
    return path.parent.parts


def test_every_folder_imports_only_what_it_may():
    assert not violations(ROOT), "\n" + "\n".join(violations(ROOT))


def test_all_folders_are_there_to_be_read():
    for folder in ALLOWED:
        assert (ROOT / folder).is_dir()
    assert (ROOT / FACADE / "__init__.py").is_file()
    assert sum(1 for _ in (ROOT / "allocator").glob("*.py")) > 5


def test_the_native_kernels_never_hear_of_pages():
    """Virtual memory is no business of a kernel: not a word of it, in code or comment."""
    folder = ROOT / "attention_backends"
    sources = [folder / "native.py", *sorted((folder / "native").iterdir())]
    assert {path.suffix for path in sources} == {".py", ".c", ".h"}
    for path in sources:
        assert "page" not in path.read_text().lower(), f"{path.name} speaks of pages"


@pytest.mark.parametrize(
    ("file", "statement", "why"),
    [
        ("vmem/host.py", "from ..allocator import Slot", "vmem may not import `allocator.Slot`"),
        ("vmem/host.py", "from .. import runtime", "vmem may not import `runtime`"),
        ("quant/a.py", "from ..allocator import Slot", "quant may not import `allocator.Slot`"),
        ("allocator/a.py", "from ..runtime.engine import Engine", "may not import `runtime.engine"),
        ("allocator/a.py", "from ..attention_backends import merge", "may not import"),
        ("allocator/deep/a.py", "from ...quant import x", "may not import `quant.x`"),
        ("attention_backends/a.py", "from ..allocator import Slot", "may not import `allocator.S"),
        ("allocator/a.py", "import vmem", "second copy of `vkv.vmem`"),
        ("allocator/a.py", "import vmem.host as host", "second copy"),
        ("allocator/a.py", "from vkv.vmem import Page", "imports are relative"),
        ("runtime/a.py", "import vkv", "imports are relative"),
        ("runtime/engine/a.py", "from ..frontend.llm import LLM", "which is above it"),
        ("runtime/request/a.py", "from ..execution import sampler", "which is above it"),
        ("runtime/frontend/deep/a.py", "from ...cli.main import app", "which is above it"),
        (f"{POLICIES}/a.py", "import torch", "a policy may not import `torch`"),
        (f"{POLICIES}/a.py", "from ..scheduler import Scheduler", "a policy may not import"),
        (f"{POLICIES}/a.py", "from ....allocator import Slot", "a policy may not import"),
        (f"{CLUSTER_POLICIES}/a.py", "import numpy", "a policy may not import `numpy`"),
        (f"{CLUSTER_POLICIES}/a.py", "from ..simulator import x", "a policy may not import"),
        (f"{CLUSTER_POLICIES}/a.py", "from ...scheduling.plan import Plan", "a policy may not"),
        ("runtime/scheduling/a.py", "from ..cluster.snapshot import x", "which is above it"),
        ("runtime/a.py", "from ..bench.load import serve", "may not import `bench.load.serve`"),
        ("benchmarks/harness/a.py", "import vkv", "imports are relative"),
        ("runtime/a.py", "def f():\n    from vkv.vmem import Page", "imports are relative"),
        ("tests/test_a.py", "from allocator import Slot", "second copy of `vkv.allocator`"),
        ("examples/chat/a.py", "import runtime.llm", "second copy"),
        ("examples/chat/a.py", "from ..other import a", "leaves its package"),
    ],
)
def test_a_planted_violation_is_caught(tmp_path, file, statement, why):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(f'"""A file."""\n\n{statement}\n')
    (found,) = violations(tmp_path)
    line = 3 + statement.count("\n")
    assert found.startswith(f"{file}:{line}: ")
    assert why in found


@pytest.mark.parametrize(
    ("file", "statement"),
    [
        ("vmem/host.py", "from . import linux\nfrom .base import Page\nimport os"),
        ("allocator/a.py", "from ..vmem import Page\nfrom ..vmem.errors import VkvError"),
        ("allocator/deep/a.py", "from ...vmem.errors import VkvError\nfrom ..slot import Slot"),
        ("quant/a.py", "from ..vmem.native_library import load_library"),
        ("attention_backends/a.py", "from ..vmem.errors import VkvError"),
        ("runtime/a.py", "from ..quant import x"),
        ("runtime/engine/a.py", "from ..scheduling.plan import Plan\nfrom .loop import x"),
        (f"{POLICIES}/a.py", "import math\nfrom ..plan import Plan\nfrom .splitfuse import x"),
        (f"{CLUSTER_POLICIES}/a.py", "from ..snapshot import Role\nfrom .policy import Move"),
        ("runtime/cluster/a.py", "from ..scheduling.scheduler import Scheduler"),
        ("runtime/cli/main.py", "from ...bench.cli import bench"),
        ("benchmarks/harness/a.py", "from ..allocator import Slot\nfrom .load import x"),
        ("benchmarks/harness/load/a.py", "from ...runtime.frontend.llm import LLM"),
        ("runtime/facade/__init__.py", "from .allocator import Slot\nfrom .runtime.llm import LLM"),
        ("tests/test_a.py", "import vkv\nfrom vkv.allocator import Slot"),
        ("examples/chat/a.py", "from .words import a\nfrom vkv import LLM"),
    ],
)
def test_what_is_allowed_is_let_pass(tmp_path, file, statement):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(statement)
    assert violations(tmp_path) == []
