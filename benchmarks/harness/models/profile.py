"""`vkv bench profile`: where a decode step's time goes on a CPU, kernel by kernel.

The engine decodes a batch from recordings, as it always does. Every other step makes the recorded
calls one at a time and times each; what no kernel accounts for is the engine's: scheduling, the
step's numbers, sampling, and some microseconds a call that timing takes itself. The steps between
run undisturbed, and show what that comes to.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from ...runtime.cpu_kernels.packing import PackedGatedLayer, PackedLinear
from ...runtime.execution.tape import KernelClock
from ...runtime.frontend.llm import LLM
from ...runtime.frontend.progress import counted
from ...vmem.errors import InvalidConfig
from ..driver import Driver
from ..limits import Limits, LimitsProbe
from ..options import torch_dtype
from ..record import Findings, Record, Table, record_name
from .checkpoints import Checkpoints, save_checkpoints
from .options import ProfileOptions

_ROWS = {  # kernels, by what they do
    "linear layers": ("linear",),
    "linear layers in 4 bits": ("int4_multiply",),
    "attention": ("attend",),
    "storing keys and values": ("store",),
    "norms": ("rms_norm",),
    "rotary embedding": ("rotate",),
    "gates": ("gated",),
    "residuals": ("add",),
    "operations of PyTorch": ("torch",),
}
_REST = "the engine, sampling, Python"
_CLOCKED = "step"  # in `kernel_s`: all of a step whose kernels are timed
_WARM_UPS = 4  # decodes: a recording is made by the first and compared with a run by the second


@dataclass(frozen=True, kw_only=True)
class BatchProfile:
    """The decode steps of one batch.

    Attributes:
        step_s: of undisturbed steps.
        kernel_s: of the others, by kernel; "step" is all of it.
    """

    batch: int
    step_s: list[float]
    kernel_s: dict[str, list[float]]

    @property
    def median_s(self) -> float:
        return statistics.median(self.step_s)

    @property
    def parts_s(self) -> dict[str, float]:
        """Medians by row of the table, of steps whose kernels are timed."""
        kernels = [times for name, times in self.kernel_s.items() if name != _CLOCKED]
        steps = zip(self.kernel_s[_CLOCKED], *kernels, strict=True)
        rest = [whole - sum(parts) for whole, *parts in steps]
        medians = {name: statistics.median(times) for name, times in self.kernel_s.items()}
        parts = {row: sum(medians.get(n, 0.0) for n in names) for row, names in _ROWS.items()}
        return parts | {_REST: statistics.median(rest)}


def run(options: ProfileOptions, folder: Path, command: str) -> tuple[Path, list[Table]]:
    """Measure, and write record, table and plot into `folder`; returns the record's path.

    Raises InvalidConfig if an option is out of range, or if decodes of the model are not recorded.
    """
    if min(options.batches, default=0) < 1 or options.context < 1 or options.steps < 1:
        raise InvalidConfig(
            f"batches are {options.batches}, the context {options.context} and steps "
            f"{options.steps}; each must be at least 1"
        )
    cpu = torch.device("cpu")
    model = options.shape if options.model is None else Path(options.model).name
    name = record_name("profile", model, options.quant, options.label)
    record = Record(folder, name, device=cpu, config=asdict(options), command=command)
    dtype = torch_dtype(options.dtype)
    probe = LimitsProbe(cpu, dtype if dtype == torch.bfloat16 else torch.float32)
    profiles: list[BatchProfile] = []
    model_facts: dict[str, int] = {}

    def steps() -> Generator[None, None, None]:
        with tempfile.TemporaryDirectory() as scratch:
            saved = save_checkpoints(
                options.shape, options.model, dtype, options.quant, Path(scratch)
            )
            model_facts["flops_per_token"] = _flops_per_token(saved, dtype)
            with _llm(options, saved, dtype) as llm:
                driver = Driver(llm)
                model_facts["weight_bytes"] = _product_bytes(driver.modules())
                for batch in options.batches:
                    probe.measure()
                    profiles.append(_decode(driver, options, batch, saved.vocab_size))
                    yield

    def findings() -> Findings:
        weight_bytes, flops = model_facts["weight_bytes"], model_facts["flops_per_token"]
        return Findings(
            results=model_facts | {"profiles": [asdict(profile) for profile in profiles]},
            tables=[_table(profiles, weight_bytes, flops, probe.limits())],
            draw=partial(_plot, profiles),
        )

    return record.grow(steps(), findings, probe)


# -- measuring ---------------------------------------------------------------------------------


def _llm(options: ProfileOptions, checkpoints: Checkpoints, dtype: torch.dtype) -> LLM:
    """The model, with room for the largest batch."""
    return LLM(
        str(checkpoints.int4 or checkpoints.dense),
        device="cpu",
        dtype=dtype,
        max_len=options.context + _num_outputs(options, max(options.batches)),
        max_seqs=max(options.batches),
        prefix_reuse=False,
        max_parked=0,
    )


def _decode(driver: Driver, options: ProfileOptions, batch: int, vocab_size: int) -> BatchProfile:
    num_decodes = _WARM_UPS + 2 * options.steps
    max_tokens = _num_outputs(options, batch)
    chooser = random.Random(options.seed)
    for index in range(batch):
        prompt = [chooser.randrange(vocab_size) for _ in range(options.context)]
        driver.submit(f"{batch}-{index}", prompt, max_tokens)
    recorder = driver.tape()
    while sum(request.num_output_tokens > 0 for request in driver.running()) < batch:
        driver.step()
    step_s: list[float] = []
    kernel_s: dict[str, list[float]] = {}
    with counted(f"batch {batch}", num_decodes) as advance:
        for index in range(num_decodes):
            is_timed = index >= _WARM_UPS and index % 2 == 1
            recorder.clock = KernelClock() if is_timed else None
            start = time.perf_counter()
            driver.step()
            spent = time.perf_counter() - start
            if recorder.clock is not None:
                for name, seconds in {_CLOCKED: spent, **recorder.clock.seconds}.items():
                    kernel_s.setdefault(name, []).append(seconds)
            elif index >= _WARM_UPS:
                step_s.append(spent)
            advance()
    recorder.clock = None
    driver.tape()  # or it was refused meanwhile
    driver.finish_all()
    return BatchProfile(batch=batch, step_s=step_s, kernel_s=kernel_s)


def _num_outputs(options: ProfileOptions, batch: int) -> int:
    """Of each request: the first to be admitted decodes while the last is, for a step each."""
    return _WARM_UPS + 2 * options.steps + batch + 1


def _product_bytes(modules: Sequence[nn.Module]) -> int:
    """Of linear layers as they are laid out; embeddings are looked up, a row a token."""
    packed = {id(m.product): m.product for m in modules if isinstance(m, PackedLinear)}
    packed |= {id(m.product): m.product for m in modules if isinstance(m, PackedGatedLayer)}
    plain = sum(m.weight.nbytes for m in modules if isinstance(m, nn.Linear))
    return plain + sum(product.num_bytes for product in packed.values())


def _flops_per_token(checkpoints: Checkpoints, dtype: torch.dtype) -> int:
    """Of the products with weights: two for each element, but for an embedding of its own."""
    config = AutoConfig.from_pretrained(checkpoints.dense)
    elements = checkpoints.weight_bytes // dtype.itemsize
    if not config.tie_word_embeddings:
        elements -= config.vocab_size * config.hidden_size
    return 2 * elements


# -- results -----------------------------------------------------------------------------------


def _table(
    profiles: Sequence[BatchProfile], weight_bytes: int, flops: int, limits: Limits
) -> Table:
    parts = [profile.parts_s for profile in profiles]
    rows = [
        [row, *(_milliseconds(part[row]) for part in parts)]
        for row in (*_ROWS, _REST)
        if any(part[row] for part in parts)
    ]
    whole = (statistics.median(profile.kernel_s[_CLOCKED]) for profile in profiles)
    rows.append(["together", *map(_milliseconds, whole)])
    rows.append(["undisturbed", *(_milliseconds(profile.median_s) for profile in profiles)])
    read_s = weight_bytes / limits.read_bytes_per_s
    rows.append(["limit: weights read once", *(_milliseconds(read_s) for _ in profiles)])
    products = (profile.batch * flops / limits.flops_per_s for profile in profiles)
    rows.append([f"limit: products in {limits.dtype}", *map(_milliseconds, products)])
    return Table(
        title="A decode step, ms (medians)",
        columns=["", *(f"batch {profile.batch}" for profile in profiles)],
        rows=rows,
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds < 0.01 else f"{seconds * 1e3:.1f}"


def _plot(profiles: Sequence[BatchProfile], path: Path) -> None:
    """A bar for each batch, in shares of its step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.5 + 0.6 * len(profiles)))
    axes: Any = figure.subplots()
    names = [f"batch {profile.batch}" for profile in profiles]
    parts: list[Mapping[str, float]] = [profile.parts_s for profile in profiles]
    left = [0.0] * len(profiles)
    for row in (*_ROWS, _REST):
        shares = [
            100 * part[row] / profile.median_s
            for part, profile in zip(parts, profiles, strict=True)
        ]
        if any(shares):
            axes.barh(names, shares, left=left, label=row)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    axes.set_xlabel("% of a decode step")
    axes.invert_yaxis()
    axes.legend(fontsize="small", bbox_to_anchor=(1, 1), loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
