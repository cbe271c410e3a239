"""What the README says is true: its code runs, its commands exist, its links lead somewhere."""

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path

import architectures
import pytest
import typer
from vkv.runtime.cli import main as cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path.relative_to(ROOT)
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("*/*/README.md")]
)


def blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_python_in_the_readme_runs(index: int) -> None:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile("import vkv\n" + blocks("python")[index], "README.md", "exec"), {})
    assert shown.getvalue().strip()


def test_commands_in_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text()
    root = typer.main.get_command(cli.app)
    named = set(re.findall(r"^\| `vkv ([a-z]+)", text, flags=re.MULTILINE))
    assert named == set(root.commands)  # type: ignore[attr-defined]
    (bench,) = re.findall(r"^\| `vkv bench` ([^|]*) \|", text, flags=re.MULTILINE)
    assert set(re.findall(r"`([a-z-]+)`", bench)) == set(root.commands["bench"].commands)  # type: ignore[attr-defined]
    targets = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", targets, flags=re.MULTILINE), f"make {target}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    text = (ROOT / page).read_text()
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", text)
    targets += re.findall(r"^\[\w+\]: (\S+)$", text, flags=re.MULTILINE)
    for target in targets:
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_the_picture_names_what_there_is() -> None:
    text = (ROOT / "architecture.svg").read_text()
    listed = " ".join(re.findall(r'class="folder[^>]*>([^<]*)<', text))
    folders = re.findall(r"\b[a-z_]+/(?:[a-z_]+/)*", listed)
    names = re.findall(r"\b[A-Z]\w+", " ".join(re.findall(r'class="name[^>]*>([^<]*)<', text)))
    assert len(folders) > 5
    assert len(names) > 10
    for folder in folders:
        assert (ROOT / folder).is_dir(), folder
    homes = ("vmem", "allocator", "attention_backends", "runtime")
    sources = "\n".join(p.read_text() for home in homes for p in (ROOT / home).rglob("*.py"))
    for name in names:
        assert re.search(rf"^class {name}\b", sources, flags=re.MULTILINE), name


def test_the_code_to_read_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    (listed,) = re.findall(r"<!-- reading -->(.*?)<!-- end -->", text, flags=re.DOTALL)
    files = re.findall(r"^\| \[`[^`]+`\]\(([^)]+)\) \|", listed, flags=re.MULTILINE)
    assert 10 <= len(files) <= 15
    num_lines = sum(len((ROOT / file).read_text().splitlines()) for file in files)
    assert num_lines <= 3500, f"{num_lines} lines in {files}"


# What the design promises to run, by name.
_PROMISED = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mixtral",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "phi",
    "phi3",
    "olmo2",
    "olmo3",
    "granite",
    "gpt_neox",
    "gpt2",
    "opt",
    "starcoder2",
    "stablelm",
    "cohere2",
    "smollm3",
    "gpt_oss",
    "deepseek_v3",
    "glm4_moe",
    "minimax_m2",
]


def test_the_sweep_found_what_the_readme_says() -> None:
    causal, images = (ROOT / "tests/sweep.md").read_text().split("\n## Models with images")
    rows = re.findall(r"^\| `[^`]+` \| ([^|:]*)[^|]*\| ([^|:]*)", causal, flags=re.MULTILINE)
    rows = [(engine.strip(), virtual.strip()) for engine, virtual in rows]
    counts = {kind: sum(engine == kind for engine, _ in rows) for kind in ("same", "refused")}
    same = sum(virtual == "same" for _, virtual in rows)
    said = (
        rf"the {len(rows)} causal architectures .* for {counts['same']}, refused "
        rf"{counts['refused']} and differed in none; `VirtualCache` gave them for {same}\."
    )
    assert re.search(said, " ".join((ROOT / "README.md").read_text().split())), said
    for part in (causal, images):
        assert "| DIFFERENT | 0 | 0 |" in part
        assert part.count("DIFFERENT") == 1


def test_the_architectures_named_are_those_proven() -> None:
    text = (ROOT / "runtime/model/README.md").read_text()
    (listed,) = re.findall(r"<!-- architectures -->(.*?)<!-- end -->", text, flags=re.DOTALL)
    assert listed.strip() == architectures.table(), "python tests/support/architectures.py"
    assert set(_PROMISED) <= set(re.findall(r"^\| `(\w+)` .*tokens, logits", listed, re.MULTILINE))


def test_every_folder_has_a_page() -> None:
    folders = ["vmem", "allocator", "attention_backends", "runtime", "quant", "examples", "tests"]
    for folder in [*folders, "benchmarks", "examples/tiny_chat"]:
        assert (ROOT / folder / "README.md").is_file(), folder


def test_the_chat_example_remembers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["chat.py"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("my gate code is 4821\nwhat is my gate code?\n"))
    runpy.run_path(str(ROOT / "examples" / "chat.py"), run_name="__main__")
    assert "4821" in capsys.readouterr().out.splitlines()[1]


def test_the_other_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "embed.py"), run_name="__main__")
    shown = capsys.readouterr().out.splitlines()
    assert "7" in shown[1]
    assert re.fullmatch(r"[\d,]+ of [\d,]+ bytes are real", shown[2])
    runpy.run_path(str(ROOT / "examples" / "bring_your_own_model.py"), run_name="__main__")
    held, told = capsys.readouterr().out.splitlines()
    physical, virtual = (int(n.replace(",", "")) for n in re.findall(r"[\d,]{4,}", held))
    assert 0 < physical < virtual
    assert told.startswith("6 requests")
