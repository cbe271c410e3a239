"""The `vkv` command, as a user types it."""

import importlib.metadata
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import vkv
import zoo
from typer.testing import CliRunner
from vkv.quant import quantize_output
from vkv.runtime.cli import main as cli
from vkv.runtime.cli.chat import ChatSession, run_chat
from vkv.runtime.cli.commands import tolerate_bytes
from vkv.runtime.cli.generate import run_generate
from vkv.runtime.execution.model_runner import ModelRunner
from vkv.runtime.frontend.llm import LLM
from vkv.runtime.request.sampling_params import SamplingParams
from vkv.vmem.errors import (
    InvalidOperation,
    InvalidPrompt,
    InvalidSamplingParams,
    StepFailed,
    VkvError,
)

torch.set_num_threads(1)


def run(*arguments: str, stdin: str = "") -> str:
    """The standard output of a command that must succeed."""
    result = CliRunner().invoke(cli.app, list(arguments), input=stdin, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_version() -> None:
    assert run("--version") == f"vkv {importlib.metadata.version('vkv')}\n"


def test_chat_through_a_pipe_remembers_what_it_was_told() -> None:
    lines = run("chat", stdin="my gate code is 4821\nhello\nwhat is my gate code?\n").splitlines()
    assert len(lines) == 3
    assert "4821" in lines[2]
    assert "4821" not in lines[1]


def test_chat_commands_show_memory_and_give_it_back() -> None:
    shown = run("chat", stdin="hello\n/stats\n/trim\n/stats\n/nonsense\n/reset\n/help\n")
    before, after = shown.split("returned ")
    assert "virtual memory reserved" in before
    assert "0 mapped" not in before
    assert "0 mapped" in after
    assert "no command /nonsense" in after
    assert "/stats" in after


def test_reset_forgets() -> None:
    told = "my gate code is 4821\n"
    shown = run("chat", stdin=f"{told}/reset\nwhat is my gate code?\n").splitlines()
    assert "4821" not in shown[-1]


def test_a_long_chat_drops_its_oldest_turns_and_goes_on() -> None:
    with LLM(device="cpu", max_seqs=1, max_len=96) as llm:
        session = ChatSession(llm, SamplingParams(temperature=0, max_tokens=24))
        for turn in range(12):
            assert "".join(session.answer(f"my locker number is {turn + 10}"))
        assert session.num_dropped > 0
        assert len(session.turns) + session.num_dropped == 24
        with pytest.raises(VkvError, match="max_len"):
            list(session.answer("word " * 200))
        assert "".join(session.answer("hello")), "a refused message must not stay"


def test_a_refused_turn_leaves_the_session_as_it_was() -> None:
    """Through a pipe: an empty line in its place, what is wrong beside it, and a status."""
    lines = [b"my gate code is 4821", b"caf\xe9", b"word " * 3000, b"what is my gate code?"]
    result = CliRunner().invoke(cli.app, ["chat"], input=b"\n".join(lines))
    assert result.exit_code == 2, result.output
    first, second, third, last = result.stdout.splitlines()
    assert first
    assert (second, third) == ("", "")
    assert "4821" in last, "neither refused turn may cost the conversation its beginning"
    told, longer = (line for line in result.stderr.splitlines() if line.startswith("vkv: "))
    assert "no UTF-8" in told
    assert "max_len" in longer


def test_an_error_in_a_terminal_is_told_and_the_session_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["my gate code is 4821", "caf\udce9", "what is my gate code?", "/exit"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("rich.console.Console.input", lambda self, prompt: next(typed))
    with LLM(device="cpu", max_seqs=1) as llm:
        run_chat(llm, SamplingParams(temperature=0, max_tokens=32))
    shown = " ".join(capsys.readouterr().out.split())
    assert "no UTF-8" in shown
    assert "4821" in shown.split("no UTF-8")[1]


def test_a_turn_that_fails_before_a_word_leaves_the_conversation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with LLM(device="cpu", max_seqs=1) as llm:
        session = ChatSession(llm, SamplingParams(temperature=0, max_tokens=8))
        list(session.answer("hello"))
        with monkeypatch.context() as patched:
            patched.setattr(llm.engine.runner, "launch", lambda *_, **__: 1 / 0)
            with pytest.raises(StepFailed):
                list(session.answer("hello"))
        assert [turn["role"] for turn in session.turns] == ["user", "assistant"]
        assert "".join(session.answer("hello"))


def test_a_system_message_that_cannot_be_is_refused_at_once(llama_folder: Path) -> None:
    with pytest.raises(InvalidPrompt, match="no system"), LLM(llama_folder, device="cpu") as llm:
        ChatSession(llm, SamplingParams(), system="be brief")


@pytest.mark.parametrize("arguments", [["generate"], ["generate", "caf\udce9"]])
def test_bytes_that_are_no_text_are_refused(arguments: list[str]) -> None:
    with pytest.raises(InvalidPrompt, match=r"caf\\udce9.*no UTF-8"):
        CliRunner().invoke(cli.app, arguments, input=b"hello\ncaf\xe9\n", catch_exceptions=False)
    with pytest.raises(InvalidSamplingParams, match=r"stop = .*no UTF-8"):
        CliRunner().invoke(cli.app, ["generate", "x", "--stop", "\udce9"], catch_exceptions=False)


def test_what_the_terminal_cannot_show_is_a_question_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding="latin-1"))
    tolerate_bytes()
    print("café ☕", end="", flush=True)  # noqa: T201
    assert shown.getvalue() == "café ?".encode("latin-1")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"temperature": 0.25, "top_p": 0.75, "max_tokens": 64}),
        (["--temperature", "0"], {"temperature": 0, "top_p": 0.75, "max_tokens": 64}),
        (["--top-p", "1", "--max-tokens", "3"], {"temperature": 0.25, "max_tokens": 3}),
        (["--generation-config", "vllm"], {"temperature": 0, "max_tokens": 64}),
    ],
)
def test_what_is_not_typed_is_the_models_to_say(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    expected: dict[str, Any],
) -> None:
    zoo.save_checkpoint(tmp_path)
    said = {"do_sample": True, "temperature": 0.25, "top_p": 0.75, "max_new_tokens": 5}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    used: list[SamplingParams] = []
    monkeypatch.setattr(
        "vkv.runtime.cli.generate.run_generate",
        lambda llm, prompts, params, **_: used.append(params),
    )
    run("generate", "hello", "--model", str(tmp_path), "--device", "cpu", *arguments)
    assert used == [SamplingParams(**expected)]


def test_chat_reuses_the_rows_of_earlier_turns() -> None:
    with LLM(device="cpu", max_seqs=1) as llm:
        session = ChatSession(llm, SamplingParams(temperature=0, max_tokens=32))
        list(session.answer("my gate code is 4821"))
        computed = llm.stats().num_prompt_tokens
        list(session.answer("hello"))
        tokens = len(llm.render_chat(session.turns[:-1]))
        assert llm.stats().num_prompt_tokens - computed < tokens / 2
        assert llm.stats().prefix_hit_tokens > 0


def test_generate_completes_arguments_and_lines() -> None:
    out = run("generate", "hello", "my gate code", "--max-tokens", "4").splitlines()
    assert out[0].startswith("hello")
    assert out[1].startswith("my gate code")
    lines = run("generate", "--max-tokens", "4", "--json", stdin="hello\n\nhow are you\n")
    records = [json.loads(line) for line in lines.splitlines()]
    assert [record["prompt"] for record in records] == ["hello", "how are you"]
    assert all(1 <= len(record["outputs"][0]["token_ids"]) <= 4 for record in records)


def test_generate_as_chat_answers() -> None:
    out = run("generate", "--chat", "my gate code is 4821. what is my gate code?")
    assert "4821" in out


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("command", [["chat"], ["generate", "hello"]])
def test_the_output_layer_is_quantised_if_asked_for(
    monkeypatch: pytest.MonkeyPatch, command: list[str], bits: int
) -> None:
    asked: list[int] = []

    def quantize(head: torch.nn.Linear, bits: int) -> torch.nn.Module:
        asked.append(bits)
        return quantize_output(head, bits)

    monkeypatch.setattr("vkv.runtime.model.loading.quantize_output", quantize)
    arguments = [*command, "--lm-head-bits", str(bits), "--max-tokens", "4"]
    assert run(*arguments, stdin="hello\n").strip()
    assert asked == [bits]


def test_info_names_drivers_and_backends() -> None:
    shown = run("info")
    for name in ("sdpa", "torch_flash", "flashinfer", "paged_sdpa", "cpu", "cuda", "Gemma 2"):
        assert name in shown


def test_info_of_a_model_says_what_it_gets_and_why(llama_folder: Path) -> None:
    shown = " ".join(run("info", str(llama_folder)).split())
    assert "attention backend" in shown
    assert "native" in shown
    assert "decode steps │ recorded" in shown
    assert "none taken yet" in shown


@pytest.mark.usefixtures("quick_limits")
def test_bench_memory_writes_a_true_record(tmp_path: Path) -> None:
    arguments = ["--num-requests", "6", "--prompt-lens", "8", "150", "--output-lens", "4", "12"]
    arguments += ["--max-seqs", "3", "--idle-s", "0.02"]
    shown = run("bench", "memory", *arguments, "--out", str(tmp_path))
    (path,) = tmp_path.glob("memory-llama-tiny_*.json")
    record = json.loads(path.read_text())
    results = record["results"]
    assert set(results["samples"]) == {"virtual", "paged", "static", "dynamic"}
    virtual = results["samples"]["virtual"]
    both = zip(virtual["token_bytes"], virtual["kv_bytes"], strict=True)
    assert all(0 <= tokens <= backed for tokens, backed in both)
    # Every kind generates the same tokens, so the plot's axis means the same for each.
    ends = {kind: samples["output_tokens"][-1] for kind, samples in results["samples"].items()}
    assert len(set(ends.values())) == 1, ends
    assert results["engines"]["virtual"]["worst_waste_rows_per_request"] <= 1
    assert results["engines"]["virtual"]["physical_bytes_before_rest"] > 0
    assert results["engines"]["virtual"]["physical_bytes_after_rest"] == 0
    _check_returns(results, record["tables"][1])
    _check_times(results)
    assert record["limits"]["read_bytes_per_s"] > 0
    assert "matrix product" in " ".join(shown.split())
    assert "matrix product" in path.with_suffix(".md").read_text()
    assert results["summary"]["static"]["mean_waste"] > results["summary"]["virtual"]["mean_waste"]
    assert path.with_suffix(".md").exists()
    assert path.with_suffix(".png").stat().st_size > 1000


def _check_returns(results: dict[str, Any], table: dict[str, Any]) -> None:
    """What the engine's table says of driver calls and of the way back, from the samples."""
    places = [
        table["columns"].index(name)
        for name in ("driver calls a token, steady", "s to memory returned (waited)")
    ]
    for row, kind in zip(table["rows"], ("virtual", "paged"), strict=True):
        work, rest = results["samples"][kind], results["rest"][kind]
        calls, tokens = work["driver_calls"], work["output_tokens"]
        half = next(i for i, count in enumerate(tokens) if 2 * count >= tokens[-1])
        steady = (calls[-1] - calls[half]) / (tokens[-1] - tokens[half])
        returned = "stays"
        if kind == "virtual":
            first = next(i for i, size in enumerate(rest["physical_bytes"]) if size == 0)
            assert 0 <= steady < calls[-1] / tokens[-1]  # the first requests found nothing mapped
            assert calls[-1] <= sum(results["engines"][kind]["driver_calls"].values())
            returned = f"{rest['time_s'][first] - work['time_s'][-1]:.3f} (0.02)"
            assert float(returned.split()[0]) >= 0.02
        assert [row[place] for place in places] == [f"{steady:.3f}", returned]


def _check_times(results: dict[str, Any]) -> None:
    """Time goes on, memory is a part of the address space, and rest ends with none."""
    for kind in ("virtual", "paged"):
        work, rest = results["samples"][kind], results["rest"][kind]
        times = [*work["time_s"], *rest["time_s"]]
        assert times == sorted(times)
        for sample in (work, rest):
            both = zip(sample["physical_bytes"], sample["virtual_bytes"], strict=True)
            assert all(physical <= virtual for physical, virtual in both)
        assert min(work["rss_bytes"]) > 0
        assert rest["parked_bytes"][0] > 0 == rest["parked_bytes"][-1]
    assert results["rest"]["virtual"]["physical_bytes"][-1] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chat", "--kv-memory", "much"], "'much'"),
        (["chat", "--temperature", "-1"], "temperature"),
        (["generate", "x", "--model", "./nowhere"], "nowhere"),
        (["chat", "--lm-head-bits", "3"], "lm_head_bits is 3"),
        (["generate", "x", "--attention", "magic"], "magic"),
    ],
)
def test_a_mistake_is_a_message_and_not_a_traceback(
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # or it would stay set
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # of which Typer sets its own
    monkeypatch.setattr(sys, "argv", ["vkv", *arguments])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))
    with pytest.raises(SystemExit) as ended:  # and nothing else, which would be a traceback
        cli.main()
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_a_mistake_ends_the_process_with_its_message_alone() -> None:
    code = "import sys; from vkv.runtime.cli.main import main; sys.argv[0] = 'vkv'; main()"
    words = ["bench", "memory", "--shape", "giant"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert "giant" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_prompt_that_goes_wrong_is_told_when_the_others_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    computed, is_first = ModelRunner.logits, iter([True])

    def broken(self: ModelRunner, *args: Any, **options: Any) -> torch.Tensor:
        logits = computed(self, *args, **options)
        if next(is_first, False):  # both prompts are in it
            logits[-1] = torch.nan
        return logits

    monkeypatch.setattr(ModelRunner, "logits", broken)
    prompts, params = ["hello", "what is 3 + 4?"], vkv.SamplingParams(temperature=0, max_tokens=3)
    with vkv.LLM(device="cpu", max_seqs=4) as llm, pytest.raises(InvalidOperation, match="finite"):
        run_generate(llm, prompts, params, as_chat=True, as_json=True)
    whole, failed = map(json.loads, capsys.readouterr().out.splitlines())
    assert (whole["error"], len(whole["outputs"][0]["token_ids"])) == (None, 3)
    assert "finite" in failed["error"]
