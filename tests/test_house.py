"""How the house is kept: privates stay private, folders and functions stay small."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("vmem", "allocator", "attention_backends", "quant", "runtime", "benchmarks/harness")
SCRIPTS = "benchmarks/harness/peers/workers"
MOST_LINES = 60  # of a function
MOST_METHODS = 20
MOST_FILES = 12  # of a folder
LONG = {  # with its reason
    "quant/kernels/triton_kernels.py: multiply_kernel",  # one kernel, whose parts share registers
}
_WHY_LARGE = r"One class|many\s+methods|hence their number|They\s+are many"  # the reason follows
# Private names of libraries, for which they have no public ones.
FOREIGN = {
    "_apply_gate",
    "_attn_implementation",
    "_can_set_attn_implementation",
    "_from_model_config",
    "_get_dtype_plan",
    "_is_hf_initialized",
    "_keys_to_ignore_on_load_unexpected",
    "_model_mapping",
    "_is_expert_parallel",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_parameters",
    "_modules",
    "_fields_",
    "_schema",
    "_cdata",
    "_supports_attention_backend",
    "_supports_sdpa",
}


def _files(root: Path) -> Iterator[tuple[str, ast.Module]]:
    for folder in PRODUCT:
        for path in sorted((root / folder).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            if not name.startswith(SCRIPTS):
                yield name, ast.parse(path.read_text())


def _own_names(tree: ast.Module) -> set[str]:
    """What the classes and functions of a file call their own."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and _is_own(node.value):
            names.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def _is_own(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def reaches(root: Path) -> list[str]:
    """Where a file reaches into what another file's objects call private."""
    found = []
    for name, tree in _files(root):
        own = _own_names(tree)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or _is_own(node.value):
                continue
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            text = ast.unparse(node)
            if private and node.attr not in own | FOREIGN and not text.startswith("torch."):
                found.append(f"{name}:{node.lineno}: {text}")
    return found


def too_large(root: Path) -> list[str]:
    """Functions that are too long, and classes of many methods that do not say why."""
    found = []
    for name, tree in _files(root):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if num_lines > MOST_LINES and f"{name}: {node.name}" not in LONG:
                    found.append(f"{name}: {node.name} has {num_lines} lines")
            elif isinstance(node, ast.ClassDef):
                methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
                says_why = re.search(_WHY_LARGE, ast.get_docstring(node) or "")
                if len(methods) > MOST_METHODS and not says_why:
                    found.append(f"{name}: {node.name} has {len(methods)} methods")
    return found


def test_nothing_reaches_into_anothers_privates() -> None:
    assert not reaches(ROOT), "\n" + "\n".join(reaches(ROOT))


def test_functions_fit_on_a_screen_and_large_classes_say_why() -> None:
    assert not too_large(ROOT), "\n" + "\n".join(too_large(ROOT))


def test_no_folder_of_the_runtime_holds_more_than_a_dozen_files() -> None:
    folders = [path for path in (ROOT / "runtime").rglob("*") if path.is_dir()]
    crowded = {
        folder.relative_to(ROOT).as_posix(): count
        for folder in folders
        if (count := len(list(folder.glob("*.py")))) > MOST_FILES
    }
    assert not crowded


def test_every_package_is_listed_and_so_lands_in_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {folder: name for name, folder in settings["package-dir"].items()}
    assert sorted(folders.values()) == sorted(settings["packages"])
    for part in PRODUCT:
        for path in (ROOT / part).rglob("__init__.py"):
            assert path.parent.relative_to(ROOT).as_posix() in {*folders, "runtime/facade"}, path


def test_what_differs_by_device_is_in_few_files() -> None:
    files = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "runtime").rglob("*.py")
        if "device.type" in path.read_text()
    ]
    assert len(files) <= 4, files


@pytest.mark.parametrize(
    ("text", "check", "words"),
    [
        ("def f(llm):\n    return llm._engine", reaches, "runtime/a.py:2: llm._engine"),
        ("def f(llm):\n    return llm.engine._cache.x", reaches, "llm.engine._cache"),
        ("def f():\n" + "    x = 1\n" * 60, too_large, "f has 61 lines"),
        (
            'class A:\n    """Much."""\n'
            + "".join(f"    def f{i}(self): ...\n" for i in range(21)),
            too_large,
            "A has 21 methods",
        ),
    ],
)
def test_a_planted_fault_is_caught(tmp_path: Path, text: str, check: object, words: str) -> None:
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "a.py").write_text(text)
    (found,) = check(tmp_path)  # type: ignore[operator]
    assert words in found


def test_what_is_ones_own_is_let_pass(tmp_path: Path) -> None:
    (tmp_path / "vmem").mkdir()
    (tmp_path / "vmem" / "a.py").write_text(
        "class A:\n"
        "    def f(self, other):\n"
        "        self._x = other._x\n"
        "        return torch._C._y, other.__dict__\n"
    )
    assert reaches(tmp_path) == []


def test_every_c_file_is_in_the_library_that_a_wheel_has() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    modules = tomllib.loads(text)["tool"]["setuptools"]["ext-modules"]
    for module in modules:
        sources, depends = module["sources"], module.get("depends", [])
        folder = (ROOT / sources[0]).parent
        there = sorted(str(path.relative_to(ROOT)) for path in folder.iterdir())
        assert [name for name in there if name.endswith(".c")] == sorted(sources)
        assert [name for name in there if name.endswith(".h")] == sorted(depends)
