/* The kernel for processors with AVX512-BF16.
 *
 * A code is looked up as the bfloat16 of code - 8, which is exact, and multiplied as it is. Codes
 * are looked up in registers, anew for every dozen rows: that costs a tenth of the product itself,
 * less than to write the looked-up weights anywhere and read them again.
 */
#include "kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#endif

enum {
    ROWS = 12,   /* at a time: their sums fill the registers */
    AHEAD = 2048 /* bytes of codes that are fetched before they are needed */
};

/* bfloat16 of 0 .. 15 less 8, twice: a look-up heeds five bits, of which the top one is another's. */
static inline __m512i code_values(void) {
    const __m256i values = _mm256_setr_epi16(
        (short)0xc100, (short)0xc0e0, (short)0xc0c0, (short)0xc0a0, (short)0xc080, (short)0xc040,
        (short)0xc000, (short)0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0,
        0x40e0);
    return _mm512_broadcast_i64x4(values);
}

static inline __m512i look_up(__m512i table, __m512i codes, int nibble) {
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * nibble), table);
}

static inline __m512 add_product(__m512 sum, __m512i weights, __m512i inputs) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)inputs);
}

/* Loops over rows are unrolled, so that every sum has a register. */
#define FOR_ROWS _Pragma("GCC unroll 12") for (int m = 0; m < rows; m++)

/* totals [rows][TILE] += scales * (sums + (8 - zeros) * inputs) over a stretch. */
static inline __attribute__((always_inline)) void
scale_in(const int rows, const int half, __m512 *sums, float *totals, const float *scales,
         const uint8_t *zeros, const struct vkv_int4_note *notes) {
    const __m512 scale = _mm512_loadu_ps(scales + 16 * half);
    if (zeros) {
        const __m128i bytes = _mm_loadu_si128((const __m128i *)(zeros + 16 * half));
        const __m512i less = _mm512_sub_epi32(_mm512_set1_epi32(8), _mm512_cvtepu8_epi32(bytes));
        const __m512 shift = _mm512_cvtepi32_ps(less);
        FOR_ROWS sums[m] = _mm512_fmadd_ps(shift, _mm512_set1_ps(notes[m].sum), sums[m]);
    }
    FOR_ROWS {
        float *total = totals + m * TILE + 16 * half;
        _mm512_storeu_ps(total, _mm512_fmadd_ps(scale, sums[m], _mm512_loadu_ps(total)));
    }
}

/* Sums of one stretch of one tile for a block of rows. */
static inline __attribute__((always_inline)) void
sum_products(const int rows, const uint8_t *codes, const int32_t *inputs, int64_t num_blocks,
           __m512 *low_sums, __m512 *high_sums) {
    const __m512i table = code_values();
    const __m512 none = _mm512_setzero_ps();
    const int odd = rows <= 3 ? ROWS / 2 : 0; /* two sums for one, lest each wait for the last */
    FOR_ROWS low_sums[m] = high_sums[m] = low_sums[m + odd] = high_sums[m + odd] = none;
    for (int64_t b = 0; b < num_blocks; b++, codes += 128, inputs += 4 * rows) {
        const __m512i first = _mm512_loadu_si512(codes), second = _mm512_loadu_si512(codes + 64);
        _mm_prefetch((const char *)codes + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)codes + AHEAD + 64, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int s = 0; s < 4; s++) {
            const __m512i low = look_up(table, first, s), high = look_up(table, second, s);
            FOR_ROWS {
                const __m512i pair = _mm512_set1_epi32(inputs[s * rows + m]);
                const int at = m + (s & 1) * odd;
                low_sums[at] = add_product(low_sums[at], low, pair);
                high_sums[at] = add_product(high_sums[at], high, pair);
            }
        }
    }
    if (odd) FOR_ROWS {
        low_sums[m] = _mm512_add_ps(low_sums[m], low_sums[m + odd]);
        high_sums[m] = _mm512_add_ps(high_sums[m], high_sums[m + odd]);
    }
}

static inline __attribute__((always_inline)) void
multiply_rows(const int rows, const uint8_t *codes, const void *inputs, int64_t length,
              const float *scales, const uint8_t *zeros, const struct vkv_int4_note *notes,
              float *totals) {
    __m512 low[ROWS], high[ROWS];
    sum_products(rows, codes, inputs, length / BLOCK, low, high);
    scale_in(rows, 0, low, totals, scales, zeros, notes);
    scale_in(rows, 1, high, totals, scales, zeros, notes);
}

/* The number of rows becomes a constant, so that sums stay in registers. */
static void multiply(int64_t rows, const uint8_t *codes, const void *inputs, int64_t length,
                     const float *scales, const uint8_t *zeros, const struct vkv_int4_note *notes,
                     float *totals) {
    switch (rows) {
#define CASE(n)                                                                  \
    case n:                                                                      \
        multiply_rows(n, codes, inputs, length, scales, zeros, notes, totals); \
        break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
    }
}

/* Writes a tile's totals as bfloat16. */
static void write_out(const struct vkv_int4 *args, int64_t tile, const float *totals) {
    const int64_t first = tile * TILE, count = least(TILE, args->out_features - first);
    for (int64_t m = 0; m < args->num_rows; m++)
        for (int half = 0; half < 2; half++) {
            const int64_t lanes = least(16, count - 16 * half);
            if (lanes <= 0) break;
            const __m512 total = _mm512_loadu_ps(totals + m * TILE + 16 * half);
            uint16_t *goal =
                (uint16_t *)args->out + m * args->out_features + first + 16 * half;
            _mm256_mask_storeu_epi16(goal, (__mmask16)((1u << lanes) - 1),
                                     (__m256i)_mm512_cvtneps_pbh(total));
        }
}

/* Pairs of inputs, [length / 2][rows]. */
static void arrange(const uint16_t *inputs, int64_t rows, int64_t in_features, int64_t length,
                    void *arranged, struct vkv_int4_note *notes) {
    const int32_t *pairs = (const int32_t *)inputs;
    for (int64_t m = 0; m < rows; m++) {
        for (int64_t p = 0; p < length / 2; p++)
            ((int32_t *)arranged)[p * rows + m] = pairs[m * in_features / 2 + p];
        float sum[8] = {0};
        for (int64_t k = 0; k < length; k += 8)
            for (int i = 0; i < 8; i++) sum[i] += to_float(inputs[m * in_features + k + i]);
        notes[m].sum = ((sum[0] + sum[1]) + (sum[2] + sum[3])) +
                       ((sum[4] + sum[5]) + (sum[6] + sum[7]));
    }
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const struct vkv_int4_kernel vkv_int4_avx512 = {
    .rows = ROWS,
    .reads_a_row = 1,
    .centred = 1,
    .arrange = arrange,
    .multiply = multiply,
    .write_out = write_out,
};

#endif
