"""vLLM's paged attention for CPUs, the kernel alone, over the numbers that the harness makes.

A request {"shape": …, "layers": n, "seed": …} fills a cache; {"pass": true} goes through its layers
once and answers with seconds; "result" asks for the first values of the last layer's output.
"""

import math
import time
from typing import Any

import torch
from protocol import Answer, answer_all

_BLOCK_TOKENS = 128  # vLLM's own choice on a CPU
_SHOWN = 4096  # values of the result


def load(options: dict[str, Any]) -> Answer:
    torch.set_num_threads(options["threads"])
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    problem: dict[str, Any] = {}

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if "shape" in request:
            problem.clear()
            problem.update(_problem(request, getattr(torch, options["dtype"])))
            return {}
        _pass(problem)  # as the harness does for its own: threads wake up here
        start = time.perf_counter()
        out = _pass(problem)
        seconds = time.perf_counter() - start
        shown = out.flatten()[:_SHOWN].tolist() if request.get("result") else []
        return {"seconds": seconds, "result": shown}

    return answer


def _problem(request: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    shape, layers = request["shape"], request["layers"]
    batch, context, queries = shape["batch"], shape["context"], shape["queries"]
    kv_heads, dim = shape["num_kv_heads"], shape["head_dim"]
    isa = _get_attn_isa(dtype, _BLOCK_TOKENS, dim)
    generator = torch.Generator().manual_seed(request["seed"])
    key, value = torch.randn(2, context, kv_heads, dim, generator=generator).to(dtype)
    blocks = math.ceil(context / _BLOCK_TOKENS)
    shuffle = torch.randperm(batch * blocks, generator=torch.Generator().manual_seed(1))
    tables = shuffle.view(batch, blocks).to(torch.int32)
    positions = torch.arange(context)
    caches = []
    for _ in range(layers):
        cache = torch.zeros(batch * blocks, kv_heads, 2 * _BLOCK_TOKENS, dim, dtype=dtype)
        keys, values = cache.chunk(2, dim=2)
        for table in tables.long():
            slots = table[positions // _BLOCK_TOKENS] * _BLOCK_TOKENS + positions % _BLOCK_TOKENS
            ops.cpu_attn_reshape_and_cache(key, value, keys, values, slots, isa)
        caches.append((keys, values))
    asked = torch.Generator().manual_seed(request["seed"] + 1)
    query = torch.randn(batch * queries, shape["num_heads"], dim, generator=asked).to(dtype)
    return {
        "shape": shape,
        "isa": isa,
        "caches": caches,
        "tables": tables,
        "query": query,
        "starts": torch.arange(batch + 1, dtype=torch.int32) * queries,
        "lens": torch.full((batch,), context, dtype=torch.int32),
    }


@torch.inference_mode()
def _pass(problem: dict[str, Any]) -> torch.Tensor:
    """All layers once, with the plan that vLLM makes once a step."""
    from vllm import _custom_ops as ops

    shape, query = problem["shape"], problem["query"]
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=shape["batch"],
        num_heads=shape["num_heads"],
        num_kv_heads=shape["num_kv_heads"],
        head_dim=shape["head_dim"],
        seq_lens=problem["lens"],
        dtype=query.dtype,
        query_start_loc=problem["starts"],
        causal=True,
        sliding_window_size=-1,
        isa=problem["isa"],
        enable_kv_split=True,
    )
    out = torch.empty_like(query)
    for keys, values in problem["caches"]:
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=keys,
            value_cache=values,
            output=out,
            query_start_loc=problem["starts"],
            seq_lens=problem["lens"],
            scale=shape["head_dim"] ** -0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=problem["tables"],
            softcap=0.0,
            scheduler_metadata=plan,
            s_aux=None,
        )
    return out


if __name__ == "__main__":
    answer_all(load)
