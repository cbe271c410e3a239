"""`vkv bench speculate`: tokens a second with guesses against without, by how a text repeats.

The texts are written beforehand (`scripts.py`). Both ways take turns in one process, and must give
the very tokens that were written. A draft model is told how often it is right. A surrogate's is
always, since the blocks of a model that says what is written add nothing: it shows the most that
leaving layers out can bring. With random weights nobody's guesses are right.
"""

import copy
import statistics
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from ...runtime.frontend.llm import LLM
from ...runtime.request.sampling_params import SamplingParams
from ..limits import LimitsProbe
from ..record import Findings, Record, Table, record_name
from .options import SpeculateOptions
from .scripts import Script, scripted_model, write
from .shapes import SHAPES, build_model

_WORDS = {
    "quotations": "a summary: 40 tokens quoted, 10 of its own",
    "edits": "code once more, every 25th token changed",
    "loop": "the same 50 tokens again and again",
    "novel": "nothing that was said before",
    "misleading": "every guess is wrong",
}

Run = dict[str, Any]
"""One call: its way, streams, seconds, and what was guessed."""


def run(options: SpeculateOptions, folder: Path, command: str) -> tuple[Path, list[Table]]:
    """Measure, and write record, table and plot into `folder`; returns the record's path.

    Raises RuntimeError if a token is not the one that was written.
    """
    dtype, device = getattr(torch, options.dtype), torch.device("cpu")
    torch.set_num_threads(options.threads)
    name = record_name(
        "speculate",
        options.shape,
        None if options.drafter == "ngram" else options.drafter,
        "random" if options.random else None,
        options.label,
    )
    record = Record(folder, name, device=device, config=asdict(options), command=command)
    probe = LimitsProbe(device, dtype, threads=options.threads)
    found: dict[str, list[Run]] = {text: [] for text in options.texts}

    def findings() -> Findings:
        return Findings(
            results={"texts": found}, tables=[_table(found)], draw=partial(_plot, found)
        )

    return record.grow(_steps(options, dtype, probe, found), findings, probe)


def _steps(
    options: SpeculateOptions,
    dtype: torch.dtype,
    probe: LimitsProbe,
    found: Mapping[str, list[Run]],
) -> Generator[None, None, None]:
    vocab_size = SHAPES[options.shape]["vocab_size"]
    scripts = write(options.texts, vocab_size, options.document, options.tokens)
    model = _model(options, options.shape, scripts, dtype)
    guesser = _guesser(options, scripts, dtype)
    with ExitStack() as stack:
        llms = {
            way: stack.enter_context(
                LLM(
                    copy.deepcopy(model),
                    device="cpu",
                    pack_weights=True,
                    speculative=speculative,
                    speculative_tokens=options.speculative_tokens,
                    max_seqs=options.max_seqs,
                )
            )
            for way, speculative in (("plain", None), (options.drafter, guesser))
        }
        del model, guesser
        probe.measure()
        for text, script in zip(options.texts, scripts, strict=True):
            yield from _compare(options, llms, text, script, found[text])


def _model(
    options: SpeculateOptions,
    shape: str,
    scripts: Sequence[Script],
    dtype: torch.dtype,
    error_rate: float = 0.0,
) -> PreTrainedModel:
    """A model over the vocabulary of the scripts, which it says unless it is a random one."""
    vocab_size = SHAPES[options.shape]["vocab_size"]
    if options.random:
        return build_model(
            shape,
            dtype=dtype,
            device=torch.device("cpu"),
            seed=options.seed,
            vocab_size=vocab_size,
        )
    return scripted_model(
        shape,
        scripts,
        dtype=dtype,
        seed=options.seed,
        error_rate=error_rate,
        vocab_size=vocab_size,
    )


def _guesser(
    options: SpeculateOptions, scripts: Sequence[Script], dtype: torch.dtype
) -> str | PreTrainedModel:
    """As of `speculative`."""
    if options.drafter == "draft":
        return _model(options, options.draft_shape, scripts, dtype, 1 - options.acceptance)
    return f"surrogate:{options.layers}" if options.drafter == "surrogate" else "ngram"


def _compare(
    options: SpeculateOptions,
    llms: Mapping[str, LLM],
    text: str,
    script: Script,
    found: list[Run],
) -> Generator[None, None, None]:
    console = Console(stderr=True)
    for num_streams in options.streams:
        for llm in llms.values():  # the prompt's keys and values are there from now on
            _call(llm, script, num_streams, is_random=options.random)
        for repeat in range(options.repeats):
            for way, llm in llms.items():
                one = _call(llm, script, num_streams, is_random=options.random)
                found.append({"way": way, "streams": num_streams, **one})
                console.print(
                    f"{text} x {num_streams}, {repeat + 1}/{options.repeats}  {way}: "
                    f"{one['tokens'] / one['seconds']:.1f} tokens/s",
                    highlight=False,
                )
            yield


def _call(llm: LLM, script: Script, num_streams: int, *, is_random: bool) -> Run:
    params = SamplingParams(
        temperature=0, max_tokens=len(script.said), ignore_eos=True, detokenize=False
    )
    before, start = llm.stats(), time.perf_counter()
    outs = llm.generate([list(script.prompt)] * num_streams, params, progress=False)
    seconds, after = time.perf_counter() - start, llm.stats()
    for out in outs:
        if not is_random and tuple(out.outputs[0].token_ids) != script.said:
            raise RuntimeError("the model did not say what was written for it; report this")
    return {
        "seconds": seconds,
        "tokens": num_streams * len(script.said),
        "steps": after.num_steps - before.num_steps,
        "drafted": after.num_drafted - before.num_drafted,
        "accepted": after.num_accepted - before.num_accepted,
    }


# -- results ---------------------------------------------------------------------------------


def _rows(found: Mapping[str, Sequence[Run]]) -> list[tuple[str, int, list[float], list[Run]]]:
    """Text, streams, ratios of the repeats, and the runs with guesses."""
    rows: list[tuple[str, int, list[float], list[Run]]] = []
    for text, runs in found.items():
        for streams in dict.fromkeys(run["streams"] for run in runs):
            some = [run for run in runs if run["streams"] == streams]
            plain = [run for run in some if run["way"] == "plain"]
            guessing = [run for run in some if run["way"] != "plain"]
            ratios = [a["seconds"] / b["seconds"] for a, b in zip(plain, guessing, strict=False)]
            rows.append((text, streams, ratios, guessing))
    return rows


def _table(found: Mapping[str, Sequence[Run]]) -> Table:
    rows = []
    for text, streams, ratios, guessing in _rows(found):
        if ratios:
            one = guessing[-1]
            speed = statistics.median(run["tokens"] / run["seconds"] for run in guessing)
            rows.append(
                [
                    _WORDS[text],
                    f"{streams}",
                    f"{statistics.median(ratios):.2f}",
                    f"{min(ratios):.2f} to {max(ratios):.2f}",
                    f"{speed:.1f}",
                    f"{one['accepted']:,} of {one['drafted']:,}",
                    f"{one['tokens'] / streams / one['steps']:.2f}",
                ]
            )
    return Table(
        title="Tokens a second with guesses, as a multiple of without (medians of paired runs)",
        columns=["text", "streams", "times", "from, to", "tokens/s", "right", "tokens a step"],
        rows=rows,
    )


def _plot(found: Mapping[str, Sequence[Run]], path: Path) -> None:
    from matplotlib.figure import Figure

    shown = {
        f"{text}, {streams}": statistics.median(ratios)
        for text, streams, ratios, _ in _rows(found)
        if ratios
    }
    figure = Figure(figsize=(7, 1 + 0.3 * len(shown)))
    axes = figure.subplots()
    axes.barh(list(shown), list(shown.values()), color="#0a7")
    axes.axvline(1, color="#888", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as without guesses")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
