"""`vkv bench adapters`: what adapters cost, many of them in one batch.

The same requests go through the model alone, with one adapter for all, with several among them, and
with half of them on the base. Then a few hundred tokens of prompts in one step. All ways take turns
on one engine.
"""

import json
import random
import statistics
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ...runtime.frontend.llm import LLM
from ...runtime.frontend.progress import counted
from ...runtime.request.sampling_params import SamplingParams
from ...vmem.errors import InvalidConfig
from ..limits import LimitsProbe
from ..options import torch_dtype
from ..record import Findings, Record, Table, record_name
from .checkpoints import Checkpoints, save_checkpoints
from .options import AdaptersOptions

BASE, ONE, SEVERAL, HALF = "the base alone", "one adapter", "several adapters", "half on the base"
_WAYS = (BASE, ONE, SEVERAL, HALF)
_REQUESTS, _PREFILL = "requests", "prompts in one step"
_WARM_UP_TOKENS = 4  # a recording is made by the first and compared with a run by the second
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

Names = list[str | None]


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests that run together.

    Attributes:
        prompts: token ids.
        max_tokens: that each generates.
    """

    name: str
    prompts: list[list[int]]
    max_tokens: int

    @property
    def num_tokens(self) -> int:
        """Prompts and outputs."""
        return sum(map(len, self.prompts)) + self.max_tokens * len(self.prompts)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One run of a load, in one way."""

    load: str
    way: str
    num_tokens: int
    time_s: float


def run(options: AdaptersOptions, folder: Path, command: str) -> tuple[Path, list[Table]]:
    """Measure, and write record, table and plot into `folder`; returns the record's path.

    Raises InvalidConfig if an option is out of range.
    """
    if not options.ranks or min(options.ranks) < 1:
        raise InvalidConfig(f"ranks are {options.ranks}; each must be at least 1")
    cpu = torch.device("cpu")
    model = options.shape if options.model is None else Path(options.model).name
    name = record_name("adapters", model, options.quant, options.label)
    record = Record(folder, name, device=cpu, config=asdict(options), command=command)
    probe = LimitsProbe(cpu, torch.float32)
    samples: list[Sample] = []
    held: dict[str, int] = {}

    def steps() -> Generator[None, None, None]:
        with tempfile.TemporaryDirectory() as scratch:
            dtype = torch_dtype(options.dtype)
            saved = save_checkpoints(
                options.shape, options.model, dtype, options.quant, Path(scratch)
            )
            names = _save_adapters(options, saved, Path(scratch))
            with _llm(options, saved, dtype) as llm:
                for adapter in names:
                    llm.load_adapter(adapter, Path(scratch) / adapter)
                yield from _measure(llm, options, names, _loads(options, saved), probe, samples)
                held["weights"] = llm.weight_bytes
                held["adapters"] = sum(one.num_bytes for one in llm.stats().adapters)

    def findings() -> Findings:
        return Findings(
            results={"samples": [asdict(sample) for sample in samples], "bytes": held},
            tables=[_table(options, samples, held)],
            draw=partial(_plot, samples),
        )

    return record.grow(steps(), findings, probe)


def _llm(options: AdaptersOptions, checkpoints: Checkpoints, dtype: torch.dtype) -> LLM:
    return LLM(
        str(checkpoints.int4 or checkpoints.dense),
        device="cpu",
        dtype=dtype,
        max_len=max(options.prompt_len + options.output_len, options.prefill) + 1,
        max_seqs=options.requests,
        max_batch_tokens=max(256, options.prefill),
        prefix_reuse=False,
        max_parked=0,
    )


def _loads(options: AdaptersOptions, checkpoints: Checkpoints) -> list[Load]:
    chooser = random.Random(options.seed)

    def prompts(count: int, length: int) -> list[list[int]]:
        return [
            [chooser.randrange(checkpoints.vocab_size) for _ in range(length)] for _ in range(count)
        ]

    each = max(1, options.prefill // options.adapters)
    return [
        Load(
            name=_REQUESTS,
            prompts=prompts(options.requests, options.prompt_len),
            max_tokens=options.output_len,
        ),
        Load(name=_PREFILL, prompts=prompts(options.adapters, each), max_tokens=1),
    ]


def _measure(
    llm: LLM,
    options: AdaptersOptions,
    names: Sequence[str],
    loads: Sequence[Load],
    probe: LimitsProbe,
    samples: list[Sample],
) -> Generator[None, None, None]:
    for way in _WAYS:  # recordings are made, and adapters read
        _generate(llm, loads[0].prompts, _WARM_UP_TOKENS, _adapters(way, names, loads[0]))
    with counted("runs", options.repeats * len(loads) * len(_WAYS)) as advance:
        for repeat in range(options.repeats):
            probe.measure()
            for load in loads:
                for way in _WAYS if repeat % 2 == 0 else _WAYS[::-1]:
                    adapters = _adapters(way, names, load)
                    time_s = _generate(llm, load.prompts, load.max_tokens, adapters)
                    samples.append(
                        Sample(load=load.name, way=way, num_tokens=load.num_tokens, time_s=time_s)
                    )
                    advance()
                yield


def _generate(llm: LLM, prompts: list[list[int]], max_tokens: int, adapters: Names) -> float:
    """Seconds that all of them took together."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    start = time.perf_counter()
    llm.generate(prompts, params, adapter=adapters, progress=False, on_error="raise")
    return time.perf_counter() - start


def _adapters(way: str, names: Sequence[str], load: Load) -> Names:
    """Whose each request is: neighbours' are different, which is the worst for them."""
    count = len(load.prompts)
    if way == BASE:
        return [None] * count
    if way == ONE:
        return [names[0]] * count
    several: Names = [names[i % len(names)] for i in range(count)]
    return several if way == SEVERAL else [n if i % 2 else None for i, n in enumerate(several)]


# -- adapters ------------------------------------------------------------------------------------


def _save_adapters(options: AdaptersOptions, saved: Checkpoints, scratch: Path) -> list[str]:
    """Adapters of random weights, as PEFT writes them; their names are those of the folders."""
    config = AutoConfig.from_pretrained(saved.dense)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    if options.targets == "attention":
        linears = {name: one for name, one in linears.items() if name.endswith(_ATTENTION)}
    names = []
    for number in range(options.adapters):
        rank = options.ranks[number % len(options.ranks)]
        names.append(f"adapter-{number}")
        _save_adapter(scratch / names[-1], linears, rank, seed=options.seed + number)
    return names


def _save_adapter(folder: Path, linears: dict[str, nn.Linear], rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, linear in linears.items():
        key = f"base_model.model.{name}.lora_"
        for side, shape in (("A", (rank, linear.in_features)), ("B", (linear.out_features, rank))):
            weight = torch.randn(shape, generator=generator) * 0.01
            tensors[f"{key}{side}.weight"] = weight.to(torch.bfloat16)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    said: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.split(".")[-1] for name in linears}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(said))


# -- results -------------------------------------------------------------------------------------


def _table(options: AdaptersOptions, samples: Sequence[Sample], held: dict[str, int]) -> Table:
    rows = []
    for load in (_REQUESTS, _PREFILL):
        base = _times(samples, load, BASE)
        for way in _WAYS:
            times = _times(samples, load, way)
            if not times:
                continue
            count = next(s.num_tokens for s in samples if s.load == load)
            ratios = [mine / its for mine, its in zip(times, base, strict=False)]
            rows.append(
                [
                    load,
                    way,
                    f"{statistics.median(times) * 1e3:.0f}",
                    f"{count / statistics.median(times):.0f}",
                    f"{statistics.median(ratios):.3f}",
                    f"{1 / statistics.median(ratios):.3f}",
                ]
            )
    ranks = ", ".join(map(str, options.ranks))
    notes = [
        f"{options.adapters} adapters of rank {ranks} on {options.targets} linears. "
        f"{options.requests} requests of {options.prompt_len} and {options.output_len} tokens; "
        f"then {options.prefill} tokens of prompts in one step. Ratios are medians of turns."
    ]
    if held:
        weights, adapters = held["weights"] / 2**20, held["adapters"] / 2**20
        notes.append(
            f"Weights take {weights:.0f} MiB and all adapters {adapters:.0f} MiB; a model for each "
            f"would take {weights * (1 + options.adapters):.0f} MiB."
        )
    return Table(
        title="Adapters in one batch",
        columns=["load", "way", "ms", "tokens/s", "time over the base's", "speed over the base's"],
        rows=rows,
        notes=notes,
    )


def _times(samples: Sequence[Sample], load: str, way: str) -> list[float]:
    return [s.time_s for s in samples if (s.load, s.way) == (load, way)]


def _plot(samples: Sequence[Sample], path: Path) -> None:
    """Time over the base's, turn by turn."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8))
    axes = figure.subplots()
    for load in (_REQUESTS, _PREFILL):
        base = _times(samples, load, BASE)
        for way in _WAYS[1:]:
            times = _times(samples, load, way)
            ratios = [mine / its for mine, its in zip(times, base, strict=False)]
            axes.plot(range(1, len(ratios) + 1), ratios, marker="o", label=f"{load}, {way}")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("turn")
    axes.set_ylabel("time over the base's")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
