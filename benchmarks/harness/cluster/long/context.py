"""The longest context that so many instances run together, seen by running it."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ....runtime.cluster.cluster import Cluster
from ....runtime.frontend.llm import LLM
from ....runtime.request.outputs import RequestOutput
from ....runtime.request.sampling_params import SamplingParams
from ....vmem.errors import InvalidOperation
from ...models.checkpoints import Checkpoints
from ...record import Table
from .options import PART_TOKENS, LongOptions

_MOST_TRIES = 4
_LIVENESS_S = 120.0  # a long step of a busy machine is no sign of death


@dataclass
class Longest:
    """What came of a number of instances.

    Attributes:
        num_tokens: of the longest request that ran to its end, prompt and output.
        refused: longer ones that were let in and did not end well, and why.
        took_s: that it took, prompt included.
        lent_tokens: that went to other instances.
        same_tokens: whether it had the tokens of one engine with room for all.
        logprob_difference: of those tokens, the most that one differs by.
        expected_s: that the one engine took, for what it had not computed before.
    """

    num_tokens: int
    refused: dict[int, str]
    took_s: float
    lent_tokens: int
    same_tokens: bool
    logprob_difference: float
    expected_s: float


def measure(options: LongOptions, saved: Checkpoints, found: dict[int, Longest]) -> Iterator[None]:
    """Go through the numbers of instances; yields after each."""
    draw = np.random.default_rng(options.seed)
    most = most_positions(options)
    text = draw.integers(0, saved.vocab_size, most).tolist()
    common: dict[str, Any] = {
        "device": "cpu",
        "dtype": str(options.dtype).removeprefix("torch."),
        "max_len": most,
        "max_seqs": 4,
    }
    large = 2 * most * saved.kv_bytes_per_token
    with LLM(saved.dense, kv_memory=large, **common) as reference:
        for count in options.counts:
            with Cluster(
                saved.dense,
                instances=count,
                policy="round_robin",
                threads=1,
                liveness_s=_LIVENESS_S,
                kv_memory=options.pool_tokens * saved.kv_bytes_per_token,
                **common,
            ) as cluster:
                found[count] = _longest(cluster, reference, text, options)
            yield


def most_positions(options: LongOptions) -> int:
    """Tokens that no number of instances could hold."""
    return max(options.counts) * options.pool_tokens + 2 * PART_TOKENS


def _longest(cluster: Cluster, reference: LLM, text: list[int], options: LongOptions) -> Longest:
    """What the cluster lets in, or a little less where that does not run to its end."""
    refused: dict[int, str] = {}
    first = cluster.face.admission.longest + 1  # the last token needs no room
    for num_tokens in range(first, first - _MOST_TRIES * PART_TOKENS, -PART_TOKENS):
        prompt, params = text[: num_tokens - options.output_tokens], _params(options)
        start_s = time.perf_counter()
        (output,) = cluster.generate([prompt], params, progress=False)
        took_s = time.perf_counter() - start_s
        if output.error is not None:
            refused[num_tokens] = str(output.error)
            continue
        start_s = time.perf_counter()
        (expected,) = reference.generate([prompt], params, progress=False)
        expected_s = time.perf_counter() - start_s
        return Longest(
            num_tokens=num_tokens,
            refused=refused,
            took_s=took_s,
            lent_tokens=lent_tokens(cluster),
            same_tokens=_ids(output) == _ids(expected),
            logprob_difference=_difference(output, expected),
            expected_s=expected_s,
        )
    raise InvalidOperation(f"no context near {first} tokens ran to its end: {refused}")


def _params(options: LongOptions) -> SamplingParams:
    return SamplingParams(
        temperature=0,
        max_tokens=options.output_tokens,
        logprobs=1,
        ignore_eos=True,
        detokenize=False,
    )


def lent_tokens(cluster: Cluster) -> int:
    """Tokens that went from one instance to another as a loan, so far."""
    every = [member.stats for member in cluster.stats().instances]
    return sum(one.segments.lent.num_tokens for one in every if one and one.segments)


def _ids(output: RequestOutput) -> list[int]:
    return list(output.outputs[0].token_ids)


def _difference(output: RequestOutput, expected: RequestOutput) -> float:
    """The most by which log probabilities of the tokens that came differ."""
    pairs = zip(_logprobs(output), _logprobs(expected), strict=True)
    return max((abs(one - other) for one, other in pairs), default=0.0)


def _logprobs(output: RequestOutput) -> list[float]:
    one = output.outputs[0]
    assert one.logprobs is not None
    return [entry[token].logprob for entry, token in zip(one.logprobs, one.token_ids, strict=True)]


# -- results -----------------------------------------------------------------------------------


def table(found: Mapping[int, Longest], options: LongOptions) -> Table:
    """A row a number of instances."""
    first = next(iter(found.values())).num_tokens
    least = next(iter(found))
    return Table(
        title=f"The longest context, where an instance's pool holds {options.pool_tokens} tokens",
        columns=(
            *("instances", "tokens", f"times {least}", "lent", "tokens are the same"),
            *("logprobs differ by", "s", "tokens a second"),
        ),
        rows=[
            [
                str(count),
                str(one.num_tokens),
                f"{one.num_tokens / first:.2f}",
                str(one.lent_tokens),
                "yes" if one.same_tokens else "NO",
                f"{one.logprob_difference:.1e}" if one.logprob_difference else "0",
                f"{one.took_s:.1f}",
                f"{one.num_tokens / one.took_s:.0f}",
            ]
            for count, one in found.items()
        ],
        notes=[
            "Each is the longest that is let in, run to its end beside nothing else, and compared "
            "with one engine whose pool has room for all. An owner keeps half of its pool at most "
            f"for one request, and a lender {PART_TOKENS} tokens' room for its own. The paper: 2 "
            "to 19 times, on 32 GPUs (arXiv:2401.02669).",
            *(
                f"{count} instances let {tokens} tokens in, which then failed: {why}"
                for count, one in found.items()
                for tokens, why in one.refused.items()
            ),
        ],
    )
