"""One command for a bare machine with a GPU: install, prove, measure, within a time budget.

    python3 benchmarks/gpu/gpu_check.py --kit gpu-kit --out results

It wants nothing but Python, PyTorch and the kit (`make gpu-kit`), and changes nothing of what the
machine has: the kit goes into a folder of its own. Then come the GPU tests and the benchmarks, in
order of worth, each in a process and within a time of its own, until the budget is spent. Records
and logs are in the output folder as soon as they exist, and `summary.md` says what passed, what
failed and what was skipped. One failing step stops no other.

`make gpu-check` rehearses all of it on a CPU, with small sizes.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from gpu_plan import Step, plan

ROOT = Path(__file__).resolve().parents[2]
_RESERVE_S = 8.0  # kept for the summary


@dataclasses.dataclass
class Outcome:
    """What became of a step: "passed", "failed", "timed out" or "skipped"."""

    name: str
    status: str
    seconds: float = 0.0
    detail: str = ""


def main() -> int:
    options = _parse()
    deadline = time.monotonic() + options.budget
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="vkv-check-") as scratch:
        site, records = Path(scratch) / "site", Path(scratch) / "records"
        site.mkdir()
        records.mkdir()
        check = Check(options, options.out if options.pack is None else records, site, deadline)
        check.install()
        for step in plan(options.device, check.backends()):
            if options.only and not any(word in step.name for word in options.only):
                continue
            check.run(step)
        check.summarise()
    return any(outcome.status in ("failed", "timed out") for outcome in check.outcomes)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Install the kit, run the GPU tests and the benchmarks, in order of worth."
    )
    parser.add_argument("--kit", type=Path, default=ROOT / "gpu-kit", help="made by: make gpu-kit")
    parser.add_argument("--out", type=Path, required=True, help="folder for records and summary")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: rehearse")
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument("--only", nargs="*", help="run only steps whose names hold such a word")
    parser.add_argument(
        "--pack",
        action="store_const",
        const=True,
        help="keep records and logs in one archive, records.tgz, where few files are taken back",
    )
    return parser.parse_args()


# -- how it is run -------------------------------------------------------------------------------


class Check:
    """Runs steps one after the other and remembers what became of them.

    Args: site, an empty folder that packages are installed into; deadline, of the monotonic clock.
    """

    def __init__(
        self, options: argparse.Namespace, records: Path, site: Path, deadline: float
    ) -> None:
        self.options = options
        self.records = records.resolve()
        self.deadline = deadline
        self.started = time.monotonic()
        self.outcomes: list[Outcome] = []
        self.site = site
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                filter(None, (str(self.site), os.environ.get("PYTHONPATH")))
            ),
            "PYTHONUNBUFFERED": "1",
            "FLASHINFER_WORKSPACE_BASE": str(self.site),
            "HF_HUB_OFFLINE": "1",
        }

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic() - _RESERVE_S

    # -- installing --

    def install(self) -> None:
        """The kit's wheels into a folder of their own, those that this machine lacks."""
        start = time.monotonic()
        kit, problems, unfit = self.options.kit, [], []
        if not (kit / "kit.json").exists():
            self._note("install", "failed", start, f"no kit at {kit}; make one with: make gpu-kit")
            return
        always = json.loads((kit / "kit.json").read_text())["always"]
        for wheel in sorted((kit / "wheels").glob("*.whl")):
            name = wheel.name.split("-")[0].replace("_", "-").lower()
            if name not in always and _is_installed(name):
                continue
            if problem := self._install(wheel):
                # Made for the machine with the GPU; the one that rehearses may have another Python.
                (unfit if "not a supported wheel" in problem else problems).append(problem)
        if (kit / "flashinfer_jit_cache" / "modules").exists():
            target = self.site / "flashinfer_jit_cache"
            shutil.copytree(kit / "flashinfer_jit_cache", target)
            self.environment["FLASHINFER_DISABLE_JIT"] = "1"  # compiling would take the budget
        unfit_fails = self.options.device == "cuda"
        status = "failed" if problems or (unfit and unfit_fails) else "passed"
        self._note("install", status, start, "; ".join(problems + unfit))

    def _install(self, wheel: Path) -> str:
        """What went wrong, or nothing."""
        pip = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        command = [sys.executable, *pip, "--disable-pip-version-check", "--target", self.site]
        done = subprocess.run(
            [*command, wheel], capture_output=True, text=True, check=False, timeout=120
        )
        return f"{wheel.name}: {done.stderr.strip()[-300:]}" if done.returncode else ""

    def backends(self) -> list[str]:
        """Attention backends that can run here; none if even asking fails."""
        code = (
            "from vkv.attention_backends import describe_backends;"
            "print(*(b['name'] for b in describe_backends() if b['available']))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=self.site,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.split()

    # -- running --

    def run(self, step: Step) -> None:
        if self.left_s < step.least_s:
            self._note(step.name, "skipped", time.monotonic(), "no time left")
            return
        start = time.monotonic()
        status, detail = self._execute(step, min(step.limit_s, self.left_s))
        if step.tries and status != "passed":
            shutil.rmtree(self.site / step.tries, ignore_errors=True)
            detail = f"later steps go on without {step.tries}; {detail}"
        counts, failed = self._read_report(step)
        self._note(step.name, status, start, f"{counts} {detail}".strip())
        self._look_into(failed)

    def _execute(self, step: Step, limit_s: float) -> tuple[str, str]:
        """Run a step in a process group of its own; its status, and the end of a failure's log."""
        log = self.records / f"{_slug(step.name)}.log"
        words = [word.replace("RECORDS", str(self.records)) for word in step.command]
        print(f"[{time.monotonic() - self.started:5.0f} s] {step.name}", flush=True)
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT if step.is_test else self.records,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return "timed out", f"after {limit_s:.0f} s: {_tail(log)}"
        return ("passed", "") if code == 0 else ("failed", f"exit {code}: {_tail(log)}")

    def _read_report(self, step: Step) -> tuple[str, list[str]]:
        """Counts in words, and the names of the tests that failed."""
        path = self.records / f"{step.name.replace(' ', '-')}.xml"
        if not path.exists():
            return "", []
        failed, skipped, cases = [], 0, list(ElementTree.parse(path).iter("testcase"))
        for case in cases:
            if case.find("failure") is not None or case.find("error") is not None:
                failed.append(_node_id(case))
            skipped += case.find("skipped") is not None
        passed = len(cases) - len(failed) - skipped
        return f"{passed} passed, {len(failed)} failed, {skipped} skipped", failed

    def _look_into(self, failed: Sequence[str]) -> None:
        """Run failed tests again, alone: one illegal access fails every test after it."""
        for name in failed[:6]:
            options = ("-q", "-x", "-W", "default", "-p", "no:cacheprovider")
            command = ("-m", "pytest", *options, name)
            self.run(Step(f"alone: {name}", command, 60, is_test=True))

    # -- telling --

    def _note(self, name: str, status: str, start: float, detail: str = "") -> None:
        outcome = Outcome(name, status, round(time.monotonic() - start, 1), detail)
        self.outcomes.append(outcome)
        print(f"          {status} in {outcome.seconds} s  {detail[-2000:]}", flush=True)
        self.summarise()

    def summarise(self) -> None:
        """Write what has become of each step so far; and the archive, where one is wanted."""
        summary = {
            "device": self.options.device,
            "budget_s": self.options.budget,
            "used_s": round(time.monotonic() - self.started, 1),
            "steps": [dataclasses.asdict(outcome) for outcome in self.outcomes],
        }
        lines = [f"# GPU check on {self.options.device}, {summary['used_s']} s", ""]
        lines += ["| step | status | s | |", "|---|---|---:|---|"]
        for outcome in self.outcomes:
            detail = " ".join(outcome.detail.replace("|", "\\|").split())[-300:]
            lines.append(f"| {outcome.name} | {outcome.status} | {outcome.seconds} | {detail} |")
        out = self.options.out
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        (out / "summary.md").write_text("\n".join(lines) + "\n")
        if self.options.pack:
            unfinished = out / "records.part"
            with tarfile.open(unfinished, "w:gz") as archive:
                archive.add(self.records, arcname="records")
            unfinished.rename(out / "records.tgz")


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return importlib.util.find_spec(name.replace("-", "_")) is not None
    return True


def _node_id(case: ElementTree.Element) -> str:
    """What pytest calls the test of a report: file, class if any, name."""
    file = case.get("file", "")
    module = file.removesuffix(".py").replace("/", ".")
    classes = case.get("classname", "").removeprefix(module).strip(".")
    return "::".join(filter(None, (file, classes.replace(".", "::"), case.get("name"))))


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name).strip("-")


def _tail(log: Path) -> str:
    return log.read_text(errors="replace").strip()[-1500:]


if __name__ == "__main__":
    sys.exit(main())
