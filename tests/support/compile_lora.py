"""Compiles the Triton kernels of adapters for GPUs that need not be there; prints a word for each.

A process of its own: where kernels are interpreted they cannot be compiled.
"""

import sys

import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vkv.runtime.adapters.triton_kernels import expand_kernel, shrink_kernel

TABLES = {"tiles_ptr": "*i64", "rows_ptr": "*i32", "low_ptr": "*fp32"}
TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}


def compiled(kernel, capability: int, pointers: dict[str, str], **constants) -> None:
    names = kernel.arg_names
    given = TABLES | pointers
    types = {name: "constexpr" if name in constants else given.get(name, "i32") for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, types, constexprs=places)
    compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})


def main() -> None:
    for capability in (80, 90):
        for dtype, kind in TYPES.items():
            blocks = {"BLOCK_M": 16, "BLOCK_R": 16}
            inputs = {"inputs_ptr": f"*{dtype}"}
            compiled(shrink_kernel, capability, inputs, **blocks, BLOCK_K=64, WIDE=False)
            for sets in (False, True):
                outputs = {"outputs_ptr": "*fp32" if sets else f"*{dtype}"}
                more = {"BLOCK_N": 64, "DTYPE": kind, "SETS": sets}
                compiled(expand_kernel, capability, outputs, **blocks, **more)
            sys.stdout.write(f"{capability}-{dtype}\n")


if __name__ == "__main__":
    main()
