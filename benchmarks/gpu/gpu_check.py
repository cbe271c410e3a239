"""One command for a bare machine with a GPU: install, prove, measure, within a time budget.

    python3 benchmarks/gpu/gpu_check.py --kit gpu-kit --out build/gpu-check --copy results

It wants nothing but Python, PyTorch and the kit (`make gpu-kit`), and changes nothing of what the
machine has: the kit goes into a folder of its own. Then come the GPU tests and the benchmarks, in
order of worth, each in a process and within a time of its own, until the budget is spent. One
failing step stops no other. Records and logs are in the output folder as soon as they exist, with
what became of each step: the same command again goes on where it stopped. What `--copy` names gets
three files after every step: `summary.md`, `state.json` and `records.tgz`.

`make gpu-check` rehearses all of it on a CPU, with small sizes.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import re
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
_MOST_SHOWN = 11_000  # characters of output, all told
_ENDED = ("passed", "failed", "timed out")
_CUDA_ERROR = re.compile(r"CUDA (?:error|out of memory)|CUDA_ERROR|cudaError|CU[A-Z]+_STATUS")
_CUT_SHORT = "under way"  # of a step that nobody saw end: tried again, after all others


@dataclasses.dataclass
class Outcome:
    """What became of a step: "passed", "failed", "timed out", "skipped" or "under way"."""

    name: str
    status: str
    seconds: float = 0.0
    detail: str = ""


def main() -> int:
    options = _parse()
    deadline = time.monotonic() + options.budget
    options.out.mkdir(parents=True, exist_ok=True)
    check = Check(options, deadline)
    check.install()
    for step in check.order(plan(options.device, check.backends())):
        check.run(step)
        if step.is_first and check.outcomes[step.name].status != "passed":
            break  # without a device or a driver: time that the next call can have
    check.summarise()
    print(check.shown(), flush=True)
    return any(outcome.status in ("failed", "timed out") for outcome in check.outcomes.values())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Install the kit, run the GPU tests and the benchmarks, in order of worth; "
        "a second time, those that are left."
    )
    parser.add_argument("--kit", type=Path, default=ROOT / "gpu-kit", help="made by: make gpu-kit")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for records, and what is done already"
    )
    parser.add_argument("--copy", type=Path, help="folder that gets three files after each step")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: rehearse")
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument(
        "--only", nargs="*", help="run only steps whose names hold such a word, done or not"
    )
    parser.add_argument("--again", action="store_true", help="run what is done already, too")
    return parser.parse_args()


# -- how it is run -------------------------------------------------------------------------------


class Check:
    """Runs steps one after the other and remembers what became of them, in this call or before.

    Args: deadline, of the monotonic clock.

    Attributes: outcomes, by name, in the order in which steps ran.
    """

    def __init__(self, options: argparse.Namespace, deadline: float) -> None:
        self.options = options
        self.out = options.out.resolve()
        self.records, self.site = self.out / "records", self.out / "site"
        self.records.mkdir(parents=True, exist_ok=True)
        self.deadline = deadline
        self.started = time.monotonic()
        self.outcomes: dict[str, Outcome] = {}
        self.used_s = 0.0  # by calls before
        if (self.out / "state.json").exists():
            state = json.loads((self.out / "state.json").read_text())
            if state["device"] == options.device:
                self.outcomes = {step["name"]: Outcome(**step) for step in state["steps"]}
                self.used_s = state["used_s"]
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                filter(None, (str(self.site), os.environ.get("PYTHONPATH")))
            ),
            "PYTHONUNBUFFERED": "1",
            "FLASHINFER_WORKSPACE_BASE": str(self.site),
            "HF_HUB_OFFLINE": "1",
            "VKV_TRAFFIC_S": "45",
        }

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic() - _RESERVE_S

    def order(self, steps: Sequence[Step]) -> list[Step]:
        """What is to be run now: what has not ended, and last what was cut short."""
        if self.options.only:
            return [s for s in steps if any(word in s.name for word in self.options.only)]
        status = {name: outcome.status for name, outcome in self.outcomes.items()}
        if self.options.again:
            return list(steps)
        left = [step for step in steps if status.get(step.name) not in _ENDED]
        return sorted(left, key=lambda step: status.get(step.name) == _CUT_SHORT)

    # -- installing --

    def install(self) -> None:
        """The kit's wheels into a folder of their own, those that this machine lacks."""
        start = time.monotonic()
        kit, problems, unfit = self.options.kit, [], []
        if not (kit / "kit.json").exists():
            self._note("install", "failed", start, f"no kit at {kit}; make one with: make gpu-kit")
            return
        contents = (kit / "kit.json").read_text()
        modules = kit / "flashinfer_jit_cache" / "modules"
        if modules.exists():
            self.environment["FLASHINFER_DISABLE_JIT"] = "1"  # compiling would take the budget
        stamp = self.site / "kit.json"
        if stamp.exists() and stamp.read_text() == contents:
            return
        shutil.rmtree(self.site, ignore_errors=True)
        self.site.mkdir()
        wheels = []
        for wheel in sorted((kit / "wheels").glob("*.whl")):
            name = wheel.name.split("-")[0].replace("_", "-").lower()
            if name in json.loads(contents)["always"] or not _is_installed(name):
                wheels.append(wheel)
        # At once, since pip takes as long to start as to install; by itself each where one fails.
        for wheel in wheels if wheels and self._install(wheels) else ():
            if problem := self._install([wheel]):
                # Made for the machine with the GPU; the one that rehearses may have another Python.
                (unfit if "not a supported wheel" in problem else problems).append(problem)
        if modules.exists():
            shutil.copytree(kit / "flashinfer_jit_cache", self.site / "flashinfer_jit_cache")
        unfit_fails = self.options.device == "cuda"
        is_bad = bool(problems or (unfit and unfit_fails))
        if not is_bad:
            stamp.write_text(contents)
        self._note("install", "failed" if is_bad else "passed", start, "; ".join(problems + unfit))

    def _install(self, wheels: Sequence[Path]) -> str:
        """What went wrong, or nothing."""
        pip = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        command = [sys.executable, *pip, "--disable-pip-version-check", "--target", self.site]
        try:
            done = subprocess.run(
                [*command, *wheels], capture_output=True, text=True, check=False, timeout=120
            )
        except subprocess.TimeoutExpired as error:
            return f"{wheels[0].name}: {error}"
        return f"{wheels[0].name}: {done.stderr.strip()[-300:]}" if done.returncode else ""

    def backends(self) -> list[str]:
        """Attention backends that can run here; none if even asking fails."""
        code = (
            "from vkv.attention_backends import describe_backends;"
            "print(*(b['name'] for b in describe_backends() if b['available']))"
        )
        try:
            done = subprocess.run(
                [sys.executable, "-c", code],
                cwd=self.records,
                env=self.environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=90,
            )
        except subprocess.TimeoutExpired:
            return []
        return done.stdout.split()

    # -- running --

    def run(self, step: Step) -> None:
        """Run a step, if there is time, and look into what went wrong."""
        if self.left_s < step.least_s:
            self._note(step.name, "skipped", time.monotonic(), "no time left")
            return
        start = time.monotonic()
        self.outcomes.pop(step.name, None)
        self.outcomes[step.name] = Outcome(step.name, _CUT_SHORT)
        self.summarise()
        status, detail = self._execute(step, min(step.limit_s, self.left_s))
        if (
            status == "timed out"
            and self.left_s < 1
            and step.limit_s > time.monotonic() - start + 5
        ):
            self._note(step.name, "skipped", start, "no time left; it had begun")
            return
        if step.tries and status != "passed":
            shutil.rmtree(self.site / step.tries, ignore_errors=True)
            detail = f"later steps go on without {step.tries}; {detail}"
        counts, failed = self._read_report(step)
        self._note(step.name, status, start, f"{counts} {detail}".strip())
        if step.is_test and status != "passed":
            self._look_into(step, failed)

    def _execute(self, step: Step, limit_s: float) -> tuple[str, str]:
        """Run a step in a process group of its own; its status, and the end of a failure's log."""
        log = self._log(step)
        words = [word.replace("RECORDS", str(self.records)) for word in step.command]
        self._report_path(step).unlink(missing_ok=True)
        # What is ended leaves its files: a benchmark's model is a quarter of such a machine's disk.
        with (
            tempfile.TemporaryDirectory(prefix="vkv-", ignore_cleanup_errors=True) as scratch,
            log.open("w") as output,
        ):
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT if step.is_test else self.records,
                env={**self.environment, "TMPDIR": scratch},
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

    def _log(self, step: Step) -> Path:
        return self.records / f"{_slug(step.name)[:100]}.log"

    def _report_path(self, step: Step) -> Path:
        return self.records / f"{step.name.replace(' ', '-').replace('/', '-')[:100]}.xml"

    def _read_report(self, step: Step) -> tuple[str, list[str]]:
        """Counts in words, and the names of the tests that failed by an error of CUDA's."""
        path = self._report_path(step)
        if not path.exists():
            return "", []
        cases = list(ElementTree.parse(path).iter("testcase"))
        failures = {_node_id(case): words for case in cases if (words := _failure(case))}
        skipped = sum(case.find("skipped") is not None for case in cases)
        passed = len(cases) - len(failures) - skipped
        counts = f"{passed} passed, {len(failures)} failed, {skipped} skipped"
        return counts, [name for name, words in failures.items() if _CUDA_ERROR.search(words)]

    def _look_into(self, step: Step, failed: Sequence[str]) -> None:
        """Run `failed` tests again, alone: one illegal access fails every test after it. After one
        that hung, or took the process with it, run those that have not passed before."""
        for name in failed[:4]:
            options = ("-q", "-x", "-W", "default", "-p", "no:cacheprovider", "--timeout=50")
            command = ("-m", "pytest", *options, "--timeout-method=thread", name)
            self.run(Step(f"alone: {name}", command, 60, is_test=True))
        ended = _last_test(self._log(step)) if not self._report_path(step).exists() else ""
        if ended and not step.name.startswith(("alone", "after")):
            words = [word for word in step.command if not word.startswith("--junitxml")]
            name = f"after {ended.split('::')[-1]}: {step.name}"
            report = f"--junitxml=RECORDS/{name.replace(' ', '-').replace('/', '-')[:100]}.xml"
            without = [f"--deselect={test}" for test in (ended, *_passed_tests(self._log(step)))]
            command = (*words, report, *without)
            self.run(dataclasses.replace(step, name=name, command=command))

    # -- telling --

    def _note(self, name: str, status: str, start: float, detail: str = "") -> None:
        outcome = Outcome(name, status, round(time.monotonic() - start, 1), detail[-2000:])
        self.outcomes.pop(name, None)
        self.outcomes[name] = outcome
        line = " ".join(detail.split())[:60]
        now_s = time.monotonic() - self.started
        print(f"[{now_s:4.0f} s] {status:9} {outcome.seconds:6.1f} s  {name}  {line}", flush=True)
        self.summarise()

    def summarise(self) -> None:
        """Write what has become of each step so far, and the copy, where one is wanted."""
        used_s = round(self.used_s + time.monotonic() - self.started, 1)
        state = {
            "device": self.options.device,
            "used_s": used_s,
            "steps": [dataclasses.asdict(outcome) for outcome in self.outcomes.values()],
        }
        (self.out / "state.json").write_text(json.dumps(state, indent=1) + "\n")
        (self.out / "summary.md").write_text(self._table(300))
        if self.options.copy is not None:
            self.options.copy.mkdir(parents=True, exist_ok=True)
            for name in ("state.json", "summary.md"):
                shutil.copy(self.out / name, self.options.copy / name)
            unfinished = self.options.copy / "records.part"
            with tarfile.open(unfinished, "w:gz") as archive:
                archive.add(self.records, arcname="records")
            unfinished.rename(self.options.copy / "records.tgz")

    def _table(self, most: int) -> str:
        """All steps, with so many characters of what is to be said of each."""
        used_s = self.used_s + time.monotonic() - self.started
        lines = [f"# GPU check on {self.options.device}, {used_s:.0f} s", ""]
        lines += ["| step | status | s | |", "|---|---|---:|---|"]
        for outcome in self.outcomes.values():
            detail = " ".join(outcome.detail.replace("|", "\\|").split())
            if outcome.status == "passed":
                detail = detail[:most]
            elif len(detail) > most:
                detail = f"{detail[: most // 4]} … {detail[-most + most // 4 :]}"
            lines.append(f"| {outcome.name} | {outcome.status} | {outcome.seconds} | {detail} |")
        return "\n".join(lines) + "\n"

    def shown(self) -> str:
        """The table, as much of it as fits a screen whose end alone may be kept."""
        room = _MOST_SHOWN - 150 * (len(self.outcomes) + 2)  # what was printed by the way
        for most in (300, 200, 120, 60, 0):
            table = self._table(most)
            if len(table) <= room:
                return table
        return table[: max(0, room)]


def _last_test(log: Path) -> str:
    """The test that was running when pytest ended; "" if none was."""
    lines = [line for line in _text(log).splitlines() if re.match(r"tests/\S+::", line)]
    if not lines or re.search(r" (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b", lines[-1]):
        return ""
    return re.split(r" *(?:\+{5}|Fatal Python error)", lines[-1])[0].strip()


def _passed_tests(log: Path) -> list[str]:
    """The tests that passed or were skipped, but those whose name begins another's: pytest takes
    what is to be left out for a beginning."""
    names = re.findall(r"^(tests/\S+::.*?) (?:PASSED|SKIPPED)\b", _text(log), re.MULTILINE)
    return [name for name in names if name.endswith("]") or not _begins_another(name)]


def _begins_another(name: str) -> bool:
    path, own = name.split("::")[0], name.split("::")[-1]
    written = re.findall(r"def (test_\w+)", (ROOT / path).read_text())
    return any(other.startswith(own) and other != own for other in written)


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return importlib.util.find_spec(name.replace("-", "_")) is not None
    return True


def _failure(case: ElementTree.Element) -> str:
    """What a test failed by; "" if it did not."""
    found = [e for e in (case.find("failure"), case.find("error")) if e is not None]
    return "".join(f"{element.get('message', '')} {element.text}" for element in found)


def _node_id(case: ElementTree.Element) -> str:
    """What pytest calls the test of a report: file, class if any, name."""
    file = case.get("file", "")
    module = file.removesuffix(".py").replace("/", ".")
    classes = case.get("classname", "").removeprefix(module).strip(".")
    return "::".join(filter(None, (file, classes.replace(".", "::"), case.get("name"))))


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name).strip("-")


def _text(log: Path) -> str:
    return log.read_text(errors="replace")


def _tail(log: Path) -> str:
    return _text(log).strip()[-1500:]


if __name__ == "__main__":
    sys.exit(main())
