"""What `vkv bench throughput` times: prompts and outputs of given lengths."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..options import words


@dataclass(frozen=True, kw_only=True)
class DecodeStep:
    """A step of a decode, on average: tokens that it makes, and tokens whose KV it reads."""

    num_tokens: float
    kv_tokens: float


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One thing to time. `seconds` of it are divided into `num_tokens`."""

    name: str
    kind: Literal["prefill", "decode", "total"]
    prompt_lens: tuple[int, ...]
    output_lens: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """The tokens that are counted: of prompts, or of outputs."""
        if self.kind == "prefill":
            return sum(self.prompt_lens)
        return sum(self.output_lens) - (len(self.output_lens) if self.kind == "decode" else 0)

    @property
    def held_tokens(self) -> int:
        """The most tokens whose KV is held at once."""
        return sum(self.prompt_lens) + sum(self.output_lens)

    @property
    def decode_step(self) -> DecodeStep:
        """The mean of the steps that a decode is timed for: those after the first token."""
        num_steps = max(self.output_lens) - 1
        lengths = zip(self.prompt_lens, self.output_lens, strict=True)
        read = sum((n - 1) * prompt + n * (n - 1) // 2 for prompt, n in lengths)
        return DecodeStep(num_tokens=self.num_tokens / num_steps, kv_tokens=read / num_steps)


def _ragged_cell(name: str, num_requests: int, seed: int = 7) -> Cell:
    """Requests of 274 prompt and 111 output tokens on average, as 8,769 and 3,550 are of 32."""
    rng = random.Random(seed)
    prompts = _spread(
        [rng.randint(16, 532) for _ in range(num_requests)], 8769 * num_requests // 32
    )
    outputs = _spread(
        [rng.randint(16, 206) for _ in range(num_requests)], 3550 * num_requests // 32
    )
    return Cell(name=name, kind="total", prompt_lens=prompts, output_lens=outputs)


def _spread(lengths: Sequence[int], total: int) -> tuple[int, ...]:
    """The lengths, stretched to add up to `total`."""
    scaled = [max(1, n * total // sum(lengths)) for n in lengths]
    scaled[-1] += total - sum(scaled)
    return tuple(scaled)


def _uniform(name: str, kind: Any, batch: int, prompt: int, output: int) -> Cell:
    return Cell(name=name, kind=kind, prompt_lens=(prompt,) * batch, output_lens=(output,) * batch)


CELLS: Mapping[str, Cell] = {
    cell.name: cell
    for cell in (
        _uniform("prefill-1", "prefill", 1, 512, 1),
        _uniform("prefill-8", "prefill", 8, 256, 1),
        _uniform("decode-1", "decode", 1, 128, 65),
        _uniform("decode-8", "decode", 8, 128, 65),
        _uniform("decode-32", "decode", 32, 128, 49),
        _ragged_cell("ragged", 32),
        # For GPUs: too long for the weakest of the systems on a CPU.
        _uniform("decode-16", "decode", 16, 128, 65),
        _ragged_cell("ragged-64", 64),
    )
}
ON_A_CPU = "prefill-1,prefill-8,decode-1,decode-8,decode-32,ragged"


def cells_named(listed: str) -> tuple[Cell, ...]:
    """The cells in a list with commas. Raises ValueError for a name that is none."""
    names = words(listed)
    if unknown := [name for name in names if name not in CELLS]:
        raise ValueError(f"{', '.join(unknown)}: use some of {', '.join(CELLS)}")
    if not names:
        raise ValueError(f"give one at least of {', '.join(CELLS)}")
    return tuple(CELLS[name] for name in names)
