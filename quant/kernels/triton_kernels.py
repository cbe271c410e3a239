"""Triton: 16-bit activations by 4-bit weights, without another package than Triton itself.

Weights are laid out once, so that the loop over them only streams: `words`, int32
[units, padded_n, 32], holds 256 columns of a row in 128 adjacent bytes. Nibble i of word j is
column `32 i + j` of the unit, so that one shift of the whole tile yields 32 columns in their own
order, ready for the tensor cores, and nothing is ever shuffled.

The product is computed transposed, `weight @ inputs.T`: the weight is the operand that may stay
in registers, and a batch of one pads to 16 columns instead of 64 rows. Codes less zero
points are whole numbers and exact in 16 bits; scales multiply the sums of a group, in float32.

With few rows one block of outputs is shared by `SPLIT_K` programs, each over a part of the
columns. The last to arrive adds their partial sums, always in the same order, so that results do
not vary from call to call.

Set TRITON_INTERPRET=1 before Triton is imported to run this on the CPU, slowly.
Source of the tiling: MARLIN, arXiv:2408.11743, section 3, without its hand-placed instructions.
"""

import triton
import triton.language as tl

UNIT = tl.constexpr(256)  # columns that share a word row: 8 nibbles of 32 words
WORDS = tl.constexpr(32)


@triton.jit
def _values(words, nibble: tl.constexpr, zeros):
    """Code less zero point, float32, for one nibble of every word: exact.

    A nibble that stays in its place is the low end of the mantissa of 2**23; one multiplication
    and subtraction, a single instruction, takes it from there to its value. The upper three are
    moved down first, all by the same shift.
    """
    place: tl.constexpr = nibble if nibble < 5 else nibble - 3
    scale: tl.constexpr = 1.0 / 16**place
    if nibble >= 5:
        words = words >> 12
    mask: tl.constexpr = 15 * 16**place
    bits = (words & mask) | 0x4B000000
    return bits.to(tl.float32, bitcast=True) * scale - (zeros[:, None] + 8388608.0 * scale)


@triton.jit
def _zeros(zeros_ptr, offsets, HAS_ZEROS: tl.constexpr):
    if HAS_ZEROS:
        return tl.load(zeros_ptr + offsets).to(tl.float32)
    return tl.full(offsets.shape, 8, tl.float32)


@triton.jit(do_not_specialize=["num_rows"])  # or batches of other sizes compile it again
def multiply_kernel(
    inputs_ptr,  # [num_rows, num_columns] of 16 bits
    words_ptr,  # int32 [num_units, padded_n, 32]
    scales_ptr,  # [groups, padded_n]
    zeros_ptr,  # uint8 [groups, padded_n]
    outputs_ptr,  # [num_rows, num_outputs]
    partial_ptr,  # float32 [SPLIT_K, padded rows, padded_n]
    arrivals_ptr,  # int32 [row blocks, column blocks], all 0 before and after
    num_rows,
    num_outputs,
    num_columns,
    padded_n,
    num_units,
    row_stride,
    group_size,
    SPAN: tl.constexpr,  # columns of a unit that share a scale
    HAS_ZEROS: tl.constexpr,
    WHOLE_UNITS: tl.constexpr,  # num_columns is a multiple of 256
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    WIDE: tl.constexpr,  # multiply in float32: the interpreter has no products of bfloat16
):
    """One block of the outputs, [BLOCK_M rows, BLOCK_N columns], over its share of the units.

    Longer than a screen: a third of it is parameters, and its parts share all their state.
    """
    block_n, block_m, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dtype: tl.constexpr = inputs_ptr.dtype.element_ty
    outputs = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    lanes = tl.arange(0, WORDS)
    # Rows past the end repeat the last one; they are not stored.
    row_ptrs = inputs_ptr + tl.minimum(rows, num_rows - 1)[None, :].to(tl.int64) * row_stride
    word_offsets = outputs[:, None] * WORDS + lanes[None, :]

    sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    first, end = num_units * split // SPLIT_K, num_units * (split + 1) // SPLIT_K
    tile_ptr = words_ptr + first.to(tl.int64) * padded_n * WORDS
    for unit in range(first, end):
        words = tl.load(tile_ptr + word_offsets, eviction_policy="evict_first")
        tile_ptr += padded_n * WORDS
        for span in tl.static_range(UNIT // SPAN):
            group = (unit * UNIT + span * SPAN) // group_size
            scales = tl.load(scales_ptr + group * padded_n + outputs).to(tl.float32)
            zeros = _zeros(zeros_ptr, group * padded_n + outputs, HAS_ZEROS)
            part = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            for step in tl.static_range(SPAN // WORDS):
                columns = unit * UNIT + span * SPAN + step * WORDS + lanes[:, None]
                if WHOLE_UNITS:
                    inputs = tl.load(row_ptrs + columns)  # [32, BLOCK_M]
                else:
                    inputs = tl.load(row_ptrs + columns, mask=columns < num_columns, other=0.0)
                weights = _values(words, span * (SPAN // WORDS) + step, zeros).to(dtype)
                if WIDE:
                    weights, inputs = weights.to(tl.float32), inputs.to(tl.float32)
                part = tl.dot(weights, inputs, part, input_precision="ieee")
            sums += part * scales[:, None]

    here = (rows[None, :] < num_rows) & (outputs[:, None] < num_outputs)
    out_ptrs = outputs_ptr + rows[None, :].to(tl.int64) * num_outputs + outputs[:, None]
    if SPLIT_K == 1:
        tl.store(out_ptrs, sums.to(dtype), mask=here)
    else:
        padded_rows = tl.num_programs(1) * BLOCK_M
        tile = rows[None, :] * padded_n + outputs[:, None]
        size = padded_rows.to(tl.int64) * padded_n
        tl.store(partial_ptr + split * size + tile, sums)
        tl.debug_barrier()  # all of this program's sums are written before it is counted
        arrival_ptr = arrivals_ptr + block_m * tl.num_programs(0) + block_n
        if tl.atomic_add(arrival_ptr, 1, sem="acq_rel") == SPLIT_K - 1:
            total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            for part_index in range(SPLIT_K):
                # Past the first-level cache, which does not see what other processors wrote.
                total += tl.load(partial_ptr + part_index * size + tile, cache_modifier=".cg")
            tl.store(out_ptrs, total.to(dtype), mask=here)
            tl.store(arrival_ptr, 0)


@triton.jit
def dequantize_kernel(
    words_ptr,
    scales_ptr,
    zeros_ptr,
    dense_ptr,  # [num_outputs, num_columns] of 16 bits
    num_outputs,
    num_columns,
    padded_n,
    group_size,
    SPAN: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block_n, unit = tl.program_id(0), tl.program_id(1)
    dtype: tl.constexpr = dense_ptr.dtype.element_ty
    outputs = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, WORDS)
    tile_ptr = words_ptr + unit.to(tl.int64) * padded_n * WORDS
    words = tl.load(tile_ptr + outputs[:, None] * WORDS + lanes[None, :])
    dense_rows = dense_ptr + outputs[:, None].to(tl.int64) * num_columns
    for span in tl.static_range(UNIT // SPAN):
        group = (unit * UNIT + span * SPAN) // group_size
        scales = tl.load(scales_ptr + group * padded_n + outputs).to(tl.float32)
        zeros = _zeros(zeros_ptr, group * padded_n + outputs, HAS_ZEROS)
        for step in tl.static_range(SPAN // WORDS):
            columns = unit * UNIT + span * SPAN + step * WORDS + lanes[None, :]
            values = _values(words, span * (SPAN // WORDS) + step, zeros)
            here = (outputs[:, None] < num_outputs) & (columns < num_columns)
            tl.store(dense_rows + columns, (values * scales[:, None]).to(dtype), mask=here)
