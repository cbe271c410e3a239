"""Every causal architecture of `transformers`, tiny and random, against its own `generate`.

    python tests/sweep.py                      # all; goes on where an earlier run stopped
    python tests/sweep.py --only llama gemma2  # these again
    python tests/sweep.py --table              # write tests/sweep.md from what was found

Each runs in a process of its own, with limits of time and memory, so that a crash is a row too.
All take a quarter of an hour on one core, and are no part of the suite. The exit status is 1 if any
differs. Those that read images are tried for their text.
"""

import argparse
import json
import os
import platform
import resource
import select
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import gettempdir
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent / "support"))

import tiny_configs
import torch
import transformers
import zoo
from rich.progress import Progress
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto
from vkv import LLM, SamplingParams, VirtualCache
from vkv.runtime.cpu_kernels.packing import packed_bytes
from vkv.vmem.errors import VkvError

HERE = Path(__file__).parent
NUM_TOKENS = 12
LENGTHS = (5, 40, 23)  # below and beyond the window, 13
MAX_PARAMETERS = 130_000_000
TOLERANCE = 5e-3  # of log probabilities; two orders of the same float32 sums differ by less

SAME, REFUSED, NO_CACHE, UNBUILT, NO_REFERENCE, DIFFERENT = (
    "same",
    "refused",
    "takes no `DynamicCache`",
    "cannot be built tiny",
    "transformers' own generate fails",
    "DIFFERENT",
)
KINDS = (SAME, REFUSED, NO_CACHE, UNBUILT, NO_REFERENCE, DIFFERENT)


@dataclass(frozen=True)
class Row:
    """What came of one architecture: of each way a kind, and words."""

    model_type: str
    engine: str
    engine_words: str
    virtual: str
    virtual_words: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Reference:
    """What `generate` gave: tokens [num], and the logs of all probabilities [num, vocab]."""

    tokens: list[int]
    scores: torch.Tensor


class NoCache(Exception):
    """The model takes no cache of `transformers`' growing kind either, in words."""


class Tie(Exception):
    """At a token that has another one's score, within the tolerance; what follows differs."""


class NoReference(Exception):
    """There is nothing to compare with, in words."""


class Different(Exception):
    """Another result than the reference, in words."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these architectures, anew")
    parser.add_argument("--results", type=Path, default=Path(gettempdir()) / "vkv-sweep.jsonl")
    parser.add_argument("--table", action="store_true", help="write tests/sweep.md and stop")
    parser.add_argument("--seconds", type=float, default=120, help="limit for one architecture")
    parser.add_argument("--memory-gib", type=float, default=4, help="limit for one architecture")
    options = parser.parse_args()
    if options.table:
        (HERE / "sweep.md").write_text(table(read(options.results)))
        return
    names = options.only or [n for n in every() if n not in read(options.results)]
    found: Counter[str] = Counter()
    with Progress() as progress:
        bar = progress.add_task("architectures", total=len(names))
        for name in names:
            progress.update(bar, description=name)
            row = apart(name, options.seconds, int(options.memory_gib * 2**30))
            with options.results.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
            found.update([row.engine, row.virtual])
            if options.only or DIFFERENT in (row.engine, row.virtual):
                progress.console.print(row)
            progress.advance(bar)
    sys.stdout.write(f"{dict(found)}\n")
    sys.exit(bool(found[DIFFERENT]))


CAUSAL = frozenset(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
WITH_IMAGES = frozenset(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - CAUSAL


def every() -> list[str]:
    """Names of what the installed `transformers` generates text with, images aside."""
    return [*sorted(CAUSAL), *sorted(WITH_IMAGES)]


def read(path: Path) -> dict[str, Row]:
    """The newest row of each architecture."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {row.model_type: row for row in (Row(**json.loads(line)) for line in lines)}


# -- a process for each ----------------------------------------------------------------------


def apart(name: str, seconds: float, memory_bytes: int) -> Row:
    """Examine an architecture in a child, which may crash, hang or eat memory."""
    ours, theirs = Pipe(duplex=False)
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _in_child(name, theirs, memory_bytes)
    theirs.close()
    ready, _, _ = select.select([ours], [], [], seconds)
    try:
        row = ours.recv() if ready else None
    except EOFError:
        row = None
    if not ready:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if row is None:
        words = f"more than {seconds:.0f} s" if not ready else f"the process died, status {status}"
        row = Row(name, DIFFERENT, words, DIFFERENT, words)
    return Row(**{**asdict(row), "seconds": round(time.monotonic() - start, 1)})


def _in_child(name: str, pipe: Connection, memory_bytes: int) -> None:
    try:
        # Not the address space, of which slots reserve much and use little.
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        pipe.send(examine(name))
        pipe.close()
    except BaseException:  # noqa: BLE001 - the parent sees that no row came
        traceback.print_exc()
    finally:
        os._exit(0)


# -- one architecture ------------------------------------------------------------------------


def examine(name: str) -> Row:
    """The row of one architecture."""
    try:
        model = build(name)
    except Exception as error:  # noqa: BLE001 - whatever a config or a constructor raises
        return Row(name, UNBUILT, words(error), UNBUILT, words(error))
    prompts = zoo.random_prompts(LENGTHS)
    try:
        alone = [reference(model, [prompt])[0] for prompt in prompts]
        together = reference(model, prompts[:2])
    except Exception as failed:  # noqa: BLE001 - whatever a model raises
        error = failed
        engine = verdict(lambda: check_refused(model, prompts, words(error)))
        return Row(name, *engine, NO_REFERENCE, words(error))
    doubt = own_difference(model, prompts, alone)
    virtual = verdict(lambda: check_virtual(model, prompts, alone, together))
    engine = verdict(lambda: check_engines(model, prompts, alone))
    said = [", ".join(filter(None, (words, doubt))) for _, words in (engine, virtual)]
    return Row(name, engine[0], said[0], virtual[0], said[1])


def build(name: str) -> PreTrainedModel:
    """A tiny model with sharp random weights."""
    config = tiny_configs.config_of(name)
    auto: Any = AutoModelForCausalLM if name in CAUSAL else AutoModelForImageTextToText
    with torch.device("meta"):
        empty = auto.from_config(config, attn_implementation="eager")
    num = sum(parameter.numel() for parameter in empty.parameters())
    if num > MAX_PARAMETERS:
        raise ValueError(f"{num:,} parameters")
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation="eager")
    zoo.sharpen(model)
    model.generation_config = GenerationConfig()  # nothing ends a generation but its length
    return model.float().eval()


def verdict(check: Callable[[], str]) -> tuple[str, str]:
    """The kind of a check's result, and its words."""
    try:
        return SAME, check()
    except VkvError as error:
        return REFUSED, words(error)
    except NoReference as error:
        return NO_REFERENCE, str(error)
    except Tie as tie:
        return SAME, f"up to token {tie}, where two tokens have one score"
    except NoCache as error:
        return NO_CACHE, str(error)
    except Different as error:
        return DIFFERENT, str(error)
    except Exception as error:  # noqa: BLE001 - an error without a name of ours is a fault too
        return DIFFERENT, words(error)


def words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"


# -- three ways to the same tokens -----------------------------------------------------------


@torch.inference_mode()
def reference(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], **options: Any
) -> list[Reference]:
    """Greedy tokens and scores of prompts in one batch, the shorter ones padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out: Any = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    scores = torch.stack(out.logits, dim=1).float().log_softmax(-1)  # [batch, num, vocab]
    if not scores.isfinite().all():
        raise ValueError("scores that are not finite")
    tokens = out.sequences[:, longest:].tolist()
    return [Reference(*pair) for pair in zip(tokens, scores, strict=True)]


@torch.inference_mode()
def own_difference(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], alone: Sequence[Reference]
) -> str:
    """Whether a forward of the model without a cache says something else than `generate`."""
    for prompt, one in zip(prompts, alone, strict=True):
        try:
            scores = zoo.full_logits(model, [*prompt, *one.tokens[:-1]]).log_softmax(-1)
        except Exception:  # noqa: BLE001 - a model that does not run without a cache
            return ""
        if (scores[len(prompt) - 1 :] - one.scores).abs().max() > TOLERANCE:
            return "(its own forward without a cache differs from its generate)"
    return ""


def check_virtual(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    alone: Sequence[Reference],
    together: Sequence[Reference],
) -> str:
    """`generate` over a `VirtualCache`, each prompt alone and two in a batch."""
    uses = False
    for batch, expected in [*(([p], [r]) for p, r in zip(prompts, alone, strict=True)),
                            (prompts[:2], together)]:  # fmt: skip
        cache = VirtualCache(model.config, max_len=128)
        try:
            found = reference(model, batch, past_key_values=cache)
        except VkvError:
            raise
        except Exception as error:
            check_takes_cache(model, batch)
            raise Different(f"where DynamicCache runs: {words(error)}") from error
        uses = uses or cache.get_seq_length() > 0
        for one, other in zip(found, expected, strict=True):
            compare(one.tokens, other, one.scores)
    return "" if uses else "the model uses no cache of this kind"


def check_takes_cache(model: PreTrainedModel, batch: Sequence[Sequence[int]]) -> None:
    try:
        reference(model, batch, past_key_values=DynamicCache(config=model.config))
    except Exception as error:
        raise NoCache(words(error)) from error


def check_refused(model: PreTrainedModel, prompts: Sequence[Sequence[int]], said: str) -> str:
    """Whether `LLM` refuses what `generate` cannot run; raises NoReference where it does not."""
    with LLM(model, **zoo.with_defaults({"max_len": 64, "device": "cpu"})) as llm:
        llm.generate(prompts, zoo.greedy(3), on_error="raise")
    raise NoReference(said)


def check_engines(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], alone: Sequence[Reference]
) -> str:
    """`LLM`: chunks of prompts beside decodes, the same again from parked prefixes, and packed."""
    notes = []
    for pack in (False, True):
        options = zoo.with_defaults(
            {"max_batch_tokens": 16, "max_len": 64, "pack_weights": pack, "device": "cpu"}
        )
        with LLM(model, **options) as llm:
            for _ in range(2):
                check_outputs(llm, prompts, alone)
            if pack and not packed_bytes(llm.loaded.model):
                notes.append("not packed")
    return ", ".join(notes)


def check_outputs(
    llm: LLM, prompts: Sequence[Sequence[int]], expected: Sequence[Reference]
) -> None:
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=5)
    for out, one in zip(llm.generate(prompts, params, on_error="raise"), expected, strict=True):
        assert out.outputs[0].logprobs is not None
        scores = torch.full_like(one.scores, torch.nan)
        for step, table in enumerate(out.outputs[0].logprobs):
            for token, record in table.items():
                scores[step, token] = record.logprob
        compare(out.outputs[0].token_ids, one, scores)


def compare(tokens: Sequence[int], expected: Reference, scores: torch.Tensor) -> None:
    """Scores, where there are some, up to the first token that is another one."""
    if len(tokens) != len(expected.tokens):
        raise Different(f"{len(tokens)} tokens instead of {len(expected.tokens)}")
    for step, (token, other) in enumerate(zip(tokens, expected.tokens, strict=True)):
        known = ~scores[step].isnan()
        off = (scores[step] - expected.scores[step])[known].abs().max().item()
        if off > TOLERANCE:
            raise Different(f"scores of token {step} are {off:.3g} off, {token} for {other}")
        if token != other:
            raise Tie(step)  # from here on they read different tokens


# -- the table -------------------------------------------------------------------------------


_INTRODUCTION = """# Every causal architecture, tiny

Written by `python tests/sweep.py --table`, and by no hand. Each architecture is built tiny, with
random weights in float32. Three prompts, of {lengths} tokens, are completed greedily by
{num_tokens} tokens, across a sliding window of {window}.

- **`LLM`**: all three together, in chunks of 16 tokens beside decodes; the same again from kept
  prefixes; and both once more with packed weights.
- **`VirtualCache`**: each alone, and two in a batch, the shorter one padded.

*Same*: log probabilities of all tokens within {tolerance:g} of those of `generate` over its own
cache.
transformers {transformers}, torch {torch}, {processor}.
"""


def table(rows: dict[str, Row]) -> str:
    """The rows in Markdown, with a summary."""
    causal = {name: row for name, row in rows.items() if name in CAUSAL}
    images = {name: row for name, row in rows.items() if name not in CAUSAL}
    encoders = set(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES) - set(rows)
    return "\n".join(
        [
            _INTRODUCTION.format(
                lengths=", ".join(map(str, LENGTHS)),
                num_tokens=NUM_TOKENS,
                window=tiny_configs.WINDOW,
                tolerance=TOLERANCE,
                transformers=transformers.__version__,
                torch=torch.__version__,
                processor=processor(),
            ),
            *_section("Causal language models", causal),
            "",
            *_section("Models with images, for their text alone", images),
            "",
            "## Out of scope",
            "",
            "Encoder-decoder models, which no causal class stands for: "
            + ", ".join(f"`{name}`" for name in sorted(encoders))
            + ". And remote code.",
            "",
        ]
    )


def _section(title: str, rows: dict[str, Row]) -> list[str]:
    engine = Counter(row.engine for row in rows.values())
    virtual = Counter(row.virtual for row in rows.values())
    lines = [
        f"## {title}",
        "",
        f"| of {len(rows)} | `LLM` | `VirtualCache` |",
        "|---|---:|---:|",
        *(f"| {kind} | {engine[kind]} | {virtual[kind]} |" for kind in KINDS),
        "",
        "| architecture | `LLM` | `VirtualCache` |",
        "|---|---|---|",
    ]
    for name, row in sorted(rows.items()):
        cells = [_cell(row.engine, row.engine_words), _cell(row.virtual, row.virtual_words)]
        if cells[0] == cells[1] != SAME:
            cells[1] = "the same"
        lines.append(f"| `{name}` | {cells[0]} | {cells[1]} |")
    return lines


def _cell(kind: str, said: str) -> str:
    escaped = said.replace("|", "\\|").replace("<", "&lt;")
    return f"{kind}: {escaped}" if said else kind


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
