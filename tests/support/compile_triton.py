"""Compiles the Triton kernel for GPUs that need not be there; prints a JSON line for each.

A process of its own: where kernels are interpreted they cannot be compiled.
"""

import json
import sys

from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vkv.quant.kernels import triton_linear
from vkv.quant.kernels.triton_kernels import dequantize_kernel, multiply_kernel

WORDS = {"words_ptr": "*i32", "zeros_ptr": "*u8", "partial_ptr": "*fp32", "arrivals_ptr": "*i32"}

SIXTEENS = ("num_outputs", "num_columns", "padded_n", "row_stride", "group_size")


def compiled(kernel, capability: int, dtype: str, options: dict[str, int], **constants):
    names = kernel.arg_names
    pointers = {name: f"*{dtype}" for name in names if name.endswith("_ptr")} | WORDS
    types = {
        name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names
    }
    places = {(names.index(name),): value for name, value in constants.items()}
    # As launches find them: addresses and sizes that are multiples of 16.
    aligned = [name for name in names if name.endswith("_ptr") or name in SIXTEENS]
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, types, constexprs=places, attrs=hints)
    target = GPUTarget("cuda", capability, 32)
    return compile(source, target=target, options={**options, "enable_fp_fusion": True})


def main() -> None:
    buckets = list(triton_linear._TILES.values())
    firsts = [(80, "bf16", True, 32, tiles[0]) for tiles in buckets]
    others = [(90, "fp16", False, 256, tile) for tile in (*buckets[0][1:], buckets[-1][-1])]
    for capability, dtype, has_zeros, span, tile in (*firsts, *others):
        result = compiled(
            multiply_kernel,
            capability,
            dtype,
            {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
            SPAN=span,
            HAS_ZEROS=has_zeros,
            WHOLE_UNITS=has_zeros,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.outputs,
            SPLIT_K=4,
            WIDE=False,
        )
        line = {"capability": capability, "first": capability == 80}
        line["shared_bytes"] = result.metadata.shared
        sys.stdout.write(json.dumps(line) + "\n")
    constants = {"SPAN": 128, "HAS_ZEROS": True, "BLOCK_N": 64}
    compiled(dequantize_kernel, 80, "bf16", {"num_warps": 4}, **constants)


if __name__ == "__main__":
    main()
