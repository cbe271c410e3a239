"""Triton: what adapters add to a linear, the rows of several adapters in two launches.

A tile is up to 16 rows of one adapter; where its weights are it finds in tables of addresses, so
that a recorded step serves other adapters once those are filled anew. `shrink_kernel` multiplies a
tile's rows by `down`, `expand_kernel` the few sums that come of it by `up`. Each sum has one order,
whatever other rows there are. All sites of a shape share what was compiled.

Set TRITON_INTERPRET=1 before Triton is imported to run this on the CPU, slowly.
Source: segmented products over adapters, as Punica has them (arXiv:2310.18547, section 4).
"""

import triton
import triton.language as tl

FIELDS = tl.constexpr(4)  # of an adapter's entry: addresses of down and up, rank, scale
TILE = tl.constexpr(3)  # of a tile: address of the adapter's entries, first row, how many


@triton.jit
def _tile_rows(tiles_ptr, rows_ptr, tile, BLOCK_M: tl.constexpr):
    """The rows of the step that a tile has, and which of the block's lanes have one."""
    first = tl.load(tiles_ptr + tile * TILE + 1)
    count = tl.load(tiles_ptr + tile * TILE + 2)
    lanes = tl.arange(0, BLOCK_M)
    here = lanes < count
    return tl.load(rows_ptr + first + lanes, mask=here, other=0).to(tl.int64), here


@triton.jit(do_not_specialize=["site"])
def shrink_kernel(
    tiles_ptr,  # int64 [num_tiles, 3]
    rows_ptr,  # int32 [num_rows]
    inputs_ptr,  # [num_rows, in_features]
    low_ptr,  # float32 [num_rows, low_stride], filled
    site,
    in_features,
    input_stride,
    low_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,  # multiply in float32: the interpreter has no products of bfloat16
):
    tile, block_r = tl.program_id(0), tl.program_id(1)
    dtype: tl.constexpr = inputs_ptr.dtype.element_ty
    address = tl.load(tiles_ptr + tile * TILE)
    if address != 0:
        entry = address.to(tl.pointer_type(tl.int64)) + site * FIELDS
        rank = tl.load(entry + 2)
        if block_r * BLOCK_R < rank:
            rows, here = _tile_rows(tiles_ptr, rows_ptr, tile, BLOCK_M)
            down_ptr = tl.load(entry).to(tl.pointer_type(dtype))  # type: ignore[arg-type]
            ranks = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
            sums = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            for first in range(0, in_features, BLOCK_K):
                columns = first + tl.arange(0, BLOCK_K)
                inside = columns < in_features
                inputs = tl.load(
                    inputs_ptr + rows[:, None] * input_stride + columns[None, :],
                    mask=here[:, None] & inside[None, :],
                    other=0.0,
                )
                weights = tl.load(
                    down_ptr + ranks[None, :] * in_features + columns[:, None],
                    mask=(ranks[None, :] < rank) & inside[:, None],
                    other=0.0,
                )
                if WIDE:
                    inputs, weights = inputs.to(tl.float32), weights.to(tl.float32)
                sums = tl.dot(inputs, weights, sums, input_precision="ieee")
            low = low_ptr + rows[:, None] * low_stride + ranks[None, :]
            tl.store(low, sums, mask=here[:, None])


@triton.jit(do_not_specialize=["site"])
def expand_kernel(
    tiles_ptr,
    rows_ptr,
    low_ptr,  # float32 [num_rows, low_stride]
    outputs_ptr,  # [num_rows, out_features]
    site,
    out_features,
    low_stride,
    output_stride,
    DTYPE: tl.constexpr,  # of the weights
    SETS: tl.constexpr,  # outputs become the sums, zero without an adapter; or these are added
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tile, block_n = tl.program_id(0), tl.program_id(1)
    rows, here = _tile_rows(tiles_ptr, rows_ptr, tile, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = here[:, None] & (columns < out_features)[None, :]
    outputs = outputs_ptr + rows[:, None] * output_stride + columns[None, :]
    address = tl.load(tiles_ptr + tile * TILE)
    rank = (address * 0).to(tl.int64)
    if address != 0:
        rank = tl.load(address.to(tl.pointer_type(tl.int64)) + site * FIELDS + 2)
    if rank > 0:
        entry = address.to(tl.pointer_type(tl.int64)) + site * FIELDS  # type: ignore[union-attr]
        up_ptr = tl.load(entry + 1).to(tl.pointer_type(DTYPE))  # type: ignore[arg-type]
        scale = tl.load(entry + 3).to(tl.int32).to(tl.float32, bitcast=True)
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for first in range(0, rank, BLOCK_R):
            ranks = first + tl.arange(0, BLOCK_R)
            low = tl.load(
                low_ptr + rows[:, None] * low_stride + ranks[None, :],
                mask=here[:, None] & (ranks < rank)[None, :],
                other=0.0,
            )
            weights = tl.load(
                up_ptr + ranks[:, None] * out_features + columns[None, :],
                mask=(ranks < rank)[:, None] & (columns < out_features)[None, :],
                other=0.0,
            )
            sums = tl.dot(low, weights.to(tl.float32), sums, input_precision="ieee")
        sums = sums * scale
        if SETS:
            tl.store(outputs, sums, mask=inside)
        else:
            before = tl.load(outputs, mask=inside, other=0.0).to(tl.float32)
            tl.store(outputs, (before + sums).to(outputs_ptr.dtype.element_ty), mask=inside)
    elif SETS:
        tl.store(outputs, tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), mask=inside)
