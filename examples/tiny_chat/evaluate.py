"""Measures the tiny chat model on held-out conversations, by greedy generation.

python -m vkv.tiny_chat.evaluate --json examples/tiny_chat/scores.json
"""

import json
import math
import os
import platform
import random
import re
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from vkv.quant import adopt, int4_linears

from . import heldout, model_path
from .heldout import Case

MODEL = model_path()
BUCKETS = ((0, 100), (100, 300), (300, 600), (600, 1000))
LIMITS = (300, 1000)  # "recall at distances up to …"
FAR = (1000, 1800)


def make_cases(
    tokenizer: PreTrainedTokenizerFast, num_cases: int, seed: int
) -> dict[str, list[Case]]:
    """Return `num_cases` cases for every row of the table; the same seed gives the same."""

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    rng = random.Random(f"evaluate-{seed}")
    cases: dict[str, list[Case]] = {}
    for held_out in (True, False):
        for low, high in BUCKETS:
            name = f"recall {low}-{high}" + ("" if held_out else " (trained phrasings)")
            cases[name] = [
                heldout.recall_case(rng, count, low, high, held_out=held_out)
                for _ in range(num_cases)
            ]
    cases["recall {}-{}".format(*FAR)] = [
        heldout.recall_case(rng, count, *FAR) for _ in range(num_cases)
    ]
    cases["same thing of three owners"] = [
        heldout.rivals_case(rng, count) for _ in range(num_cases)
    ]
    cases["latest value after a change"] = [
        heldout.update_case(rng, count) for _ in range(num_cases)
    ]
    cases["says it was not told"] = [heldout.unknown_case(rng, count) for _ in range(num_cases)]
    for kind in ("arithmetic", "echo"):
        cases[kind] = [heldout.skill_case(rng, count, kind) for _ in range(num_cases)]
    return cases


def load_model(folder: Path, dtype: str) -> PreTrainedModel:
    """Return the model; a 4-bit one computes with its dequantised weights, which is far faster
    in float32 than to dequantise them at every token."""
    config = AutoConfig.from_pretrained(folder)
    adopt(config, torch.device("cpu"))  # which concerns 4-bit checkpoints alone
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype).eval()
    for name, layer in list(int4_linears(model)):
        dense = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=model.dtype)
        dense.weight.data.copy_(layer.weight_int4.dequantize())
        model.set_submodule(name, dense)
    return model


@torch.inference_mode()
def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, messages: tuple[dict[str, str], ...]
) -> str:
    """Return the model's greedy answer to the last message."""
    prompt = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, do_sample=False, max_new_tokens=48)
    new_tokens = tokens[0, prompt["input_ids"].shape[1] :]
    return tokenizer.decode(new_tokens, skip_special_tokens=True).strip()


def is_right(case: Case, text: str) -> bool:
    """Say whether the expected value stands in the answer, as whole words."""
    if case.kind in ("arithmetic", "echo"):
        return text == case.answer
    return re.search(rf"(?<!\w){re.escape(case.value)}(?!\w)", text) is not None


def interval(right: int, total: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a proportion."""
    z, p = 1.96, right / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total**2)) / (1 + z * z / total)
    return max(0.0, middle - half), min(1.0, middle + half)


def _record(results: list[tuple[Case, str]]) -> dict[str, float | int | list[float]]:
    right = sum(is_right(case, text) for case, text in results)
    exact = sum(text == case.answer for case, text in results)
    return {
        "cases": len(results),
        "right": right,
        "share": round(right / len(results), 4),
        "interval_95": [round(x, 4) for x in interval(right, len(results))],
        "exact_answer_share": round(exact / len(results), 4),
    }


def summarise(results: dict[str, list[tuple[Case, str]]]) -> dict[str, dict]:
    """Return the scores of every row, and of recall up to each of the distance limits."""
    scores = {name: _record(pairs) for name, pairs in results.items()}
    for limit in LIMITS:
        pairs = [
            pair
            for (low, high) in BUCKETS
            if high <= limit
            for pair in results[f"recall {low}-{high}"]
        ]
        scores[f"recall up to {limit}"] = _record(pairs)
    return scores


def print_table(console: Console, scores: dict[str, dict]) -> None:
    """Print one line per score."""
    table = Table("what", "right", "share", "95 % interval", "exact answer")
    for name, s in scores.items():
        low, high = s["interval_95"]
        table.add_row(
            name,
            f"{s['right']}/{s['cases']}",
            f"{s['share']:.1%}",
            f"{low:.1%} to {high:.1%}",
            f"{s['exact_answer_share']:.1%}",
        )
    console.print(table)


def main(
    model: Annotated[Path, typer.Option(help="Folder of the model.")] = MODEL,
    num_cases: Annotated[int, typer.Option(help="Conversations per row of the table.")] = 250,
    seed: Annotated[int, typer.Option(help="Of the conversations.")] = 11,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write scores.")] = None,
    show_mistakes: Annotated[int, typer.Option(help="Mistakes to print per row.")] = 0,
) -> None:
    """Measure recall by distance, arithmetic, echo and knowing what was not told."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(threads)
    console = Console()
    tokenizer = AutoTokenizer.from_pretrained(model)
    language_model = load_model(model, dtype)
    started = time.monotonic()
    results: dict[str, list[tuple[Case, str]]] = defaultdict(list)
    for name, cases in make_cases(tokenizer, num_cases, seed).items():
        for case in cases:
            results[name].append((case, answer(language_model, tokenizer, case.messages)))
        wrong = [(case, text) for case, text in results[name] if not is_right(case, text)]
        for case, text in wrong[:show_mistakes]:
            console.print(f"{name}: {case.messages[-1]['content']} | {text} | {case.answer}")
    scores = summarise(results)
    print_table(console, scores)
    if json_path:
        record = {
            "num_cases": num_cases,
            "seed": seed,
            "dtype": dtype,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "seconds": round(time.monotonic() - started, 1),
            "scores": scores,
        }
        json_path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
