"""A thousand random JSON schemas, each followed by an output: every whole one must be valid.

    python tests/attacks/structured.py [--count 1000] [--records benchmarks/records]

Half of the requests have no grammar, so that batches are mixed. Then it measures what masks add to
a step of a model with 128,256 tokens. A few minutes; the exit status is 1 if an output is wrong.
`tests/runtime/execution/test_grammars.py` is its short form.
"""

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import jsonschema
import schemas
import torch
import vocabularies
import zoo
from vkv import LLM, RequestOutput, SamplingParams, StructuredOutputsParams
from vkv.bench.limits import LimitsProbe
from vkv.bench.record import Findings, Record, Table
from vkv.vmem.errors import InvalidSamplingParams

BATCH = 16
MAX_TOKENS = 240
LARGE = 128_256
Outcome = tuple[str, int, str]  # what became of it, the schema's seed, the output's text


def attack(llm: LLM, seeds: Sequence[int]) -> list[Outcome]:
    """Follow a schema for each seed, beside as many requests without one."""
    asked: dict[int, Any] = {}
    outcomes: list[Outcome] = []
    for seed in seeds:
        outputs = StructuredOutputsParams(
            json=schemas.random_schema(random.Random(seed)), disable_any_whitespace=True
        )
        params = SamplingParams(structured_outputs=outputs, seed=seed, max_tokens=MAX_TOKENS)
        try:
            llm.check([1], params)
            asked[seed] = params
        except InvalidSamplingParams as error:
            outcomes.append(("refused", seed, str(error)))
    free = SamplingParams(max_tokens=60, seed=0)
    prompts = [[3 + seed % 500, 7] for seed in asked]
    outs = llm.generate(prompts * 2, [*asked.values(), *[free] * len(asked)])
    for seed, out in zip(asked, outs, strict=False):
        outcomes.append((judge(seed, out), seed, out.outputs[0].text))
    return outcomes


def judge(seed: int, out: RequestOutput) -> str:
    """What became of a request."""
    if out.error is not None:
        return "failed"
    if out.outputs[0].finish_reason != "stop":
        return "cut by max_tokens"
    schema = schemas.random_schema(random.Random(seed))
    checker = jsonschema.FormatChecker()
    try:
        value = json.loads(out.outputs[0].text)
        jsonschema.Draft202012Validator(schema, format_checker=checker).validate(value)
    except (ValueError, jsonschema.ValidationError):
        return "not valid"
    return "whole and valid"


def step_times(repeats: int) -> dict[str, list[float]]:
    """Milliseconds of a decode step at batch 8, without and with masks, in turn."""
    model = zoo.tiny_model("llama", vocab_size=LARGE, eos_token_id=1)
    tokenizer = vocabularies.byte_level_of_size(LARGE)
    schema = {
        "type": "object",
        "properties": {name: {"type": "string"} for name in ("name", "note")},
        "required": ["name", "note"],
    }
    outputs = StructuredOutputsParams(json=schema, disable_any_whitespace=True)
    cases = {
        f"{how}, {what}": SamplingParams(
            temperature=temperature,
            seed=1,
            max_tokens=64,
            ignore_eos=True,
            structured_outputs=outputs if what == "masks" else None,
        )
        for how, temperature in (("greedy", 0.0), ("drawn", 1.0))
        for what in ("plain", "masks")
    }
    times: dict[str, list[float]] = {case: [] for case in cases}
    with LLM(model, tokenizer=tokenizer, device="cpu", max_len=128, max_seqs=8) as llm:
        for repeat in range(repeats + 1):
            for case, params in cases.items():
                before = llm.stats()
                llm.generate([[5, i] for i in range(300, 308)], params)
                after = llm.stats()
                if repeat:  # the first warms up
                    spent_s = after.step_time_s - before.step_time_s
                    times[case].append(1e3 * spent_s / (after.num_steps - before.num_steps))
    return times


def tables(outcomes: Sequence[Outcome], times: dict[str, list[float]]) -> list[Table]:
    """What was found."""
    counts = Counter(what for what, *_ in outcomes)
    rows = [[what, f"{count:,}"] for what, count in counts.most_common()]
    found = [Table(title="Outputs that follow random schemas", columns=("", "outputs"), rows=rows)]
    if times:
        rows = []
        for how in ("greedy", "drawn"):
            plain, masks = (sorted(times[f"{how}, {what}"]) for what in ("plain", "masks"))
            ratios = sorted(
                b / a for a, b in zip(times[f"{how}, plain"], times[f"{how}, masks"], strict=True)
            )
            middle = len(ratios) // 2
            rows.append(
                [how, f"{plain[middle]:.2f}", f"{masks[middle]:.2f}", f"{ratios[middle]:.2f}"]
            )
        columns = ("a step at batch 8, 128,256 tokens", "plain ms", "with masks ms", "ratio")
        notes = ("Medians over runs that took turns; the ratio is the median of pairs.",)
        found.append(Table(title="What masks cost", columns=columns, rows=rows, notes=notes))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="schemas")
    parser.add_argument("--repeats", type=int, default=7, help="of the measurement; 0 for none")
    parser.add_argument("--records", type=Path, help="a folder for the record; none else")
    options = parser.parse_args()
    probe = LimitsProbe(torch.device("cpu"), torch.float32)
    probe.measure()
    model = zoo.tiny_model("llama", vocab_size=520, eos_token_id=[1, 2])
    outcomes: list[Outcome] = []
    config = zoo.with_defaults({"max_seqs": BATCH, "max_len": 512, "kv_memory": "64MiB"})
    with LLM(model, tokenizer=vocabularies.byte_level(), device="cpu", **config) as llm:
        for start in range(0, options.count, 100):
            outcomes += attack(llm, range(start, min(start + 100, options.count)))
            sys.stderr.write(f"{len(outcomes)} of {options.count}\n")
    times = step_times(options.repeats) if options.repeats else {}
    found = tables(outcomes, times)
    for table in found:
        sys.stdout.write(table.markdown() + "\n")
    wrong = [outcome for outcome in outcomes if outcome[0] in ("not valid", "failed")]
    for what, seed, text in wrong[:20]:
        sys.stdout.write(f"{what}: seed {seed}: {text!r}\n")
    if options.records is not None:
        results = {"outcomes": outcomes, "step_ms": times}
        command = f"python tests/attacks/structured.py --count {options.count}"
        settings = {"batch": BATCH, "max_tokens": MAX_TOKENS, **vars(options)}
        cpu = torch.device("cpu")
        record = Record(options.records, "structured", device=cpu, config=settings, command=command)
        probe.measure()
        nothing = Findings(results=results, tables=found, draw=lambda _: None)
        record.write(nothing, probe.limits())
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
