/* The kernel for processors with AVX512-BF16.
 *
 * A code is looked up as the bfloat16 of code - 8, which is exact, and multiplied as it is. Codes
 * are looked up in registers, anew for every dozen rows: that costs a tenth of the product itself,
 * less than to write the looked-up weights anywhere and read them again. Few rows take two stretches
 * at a time, lest each sum wait for its last term.
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
    PAIR_ROWS = 3,
    AHEAD = 4096 /* bytes of codes that are fetched before they are needed */
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

/* Loops over sums are unrolled, so that every one has a register. */
#define UNROLLED(i, count) _Pragma("GCC unroll 12") for (int i = 0; i < count; i++)

/* totals [rows][TILE] += scales * (sums + (8 - zeros) * inputs) over a stretch. */
static inline __attribute__((always_inline)) void
scale_in(const int rows, const int half, __m512 *sums, float *totals, const float *scales,
         const uint8_t *zeros, const struct vkv_int4_note *notes) {
    const __m512 scale = _mm512_loadu_ps(scales + 16 * half);
    if (zeros) {
        const __m128i bytes = _mm_loadu_si128((const __m128i *)(zeros + 16 * half));
        const __m512i less = _mm512_sub_epi32(_mm512_set1_epi32(8), _mm512_cvtepu8_epi32(bytes));
        const __m512 shift = _mm512_cvtepi32_ps(less);
        UNROLLED(m, rows)
            sums[m] = _mm512_fmadd_ps(shift, _mm512_set1_ps(notes[m].sum), sums[m]);
    }
    UNROLLED(m, rows) {
        float *total = totals + m * TILE + 16 * half;
        _mm512_storeu_ps(total, _mm512_fmadd_ps(scale, sums[m], _mm512_loadu_ps(total)));
    }
}

static inline __attribute__((always_inline)) void
multiply_rows(const int rows, const int count, const struct vkv_int4_stretches *stretches,
              float *totals) {
    const struct vkv_int4_stretches of = *stretches; /* totals might lie in the original */
    const __m512i table = code_values();
    __m512 low_sums[ROWS], high_sums[ROWS]; /* [count][rows], of each half of a tile */
    UNROLLED(i, rows * count) low_sums[i] = high_sums[i] = _mm512_setzero_ps();
    const uint8_t *codes = of.codes;
    const int32_t *inputs = (const int32_t *)of.inputs;
    const int64_t codes_apart = of.length * (TILE / 2), inputs_apart = of.length / 2 * rows;
    const char *ahead = (const char *)codes + AHEAD; /* in the order of memory */
    for (int64_t b = 0; b < of.length / BLOCK; b++, codes += 128, inputs += 4 * rows) {
        UNROLLED(line, 2 * count) _mm_prefetch(ahead + 64 * line, _MM_HINT_T0);
        ahead += 128 * count;
        UNROLLED(t, count) {
            const uint8_t *from = codes + t * codes_apart;
            const int32_t *by = inputs + t * inputs_apart;
            const __m512i first = _mm512_loadu_si512(from), second = _mm512_loadu_si512(from + 64);
            UNROLLED(s, 4) {
                const __m512i low = look_up(table, first, s), high = look_up(table, second, s);
                UNROLLED(m, rows) {
                    const __m512i pair = _mm512_set1_epi32(by[s * rows + m]);
                    const int at = t * rows + m;
                    low_sums[at] = add_product(low_sums[at], low, pair);
                    high_sums[at] = add_product(high_sums[at], high, pair);
                }
            }
        }
    }
    UNROLLED(t, count) {
        const float *scales = of.scales + t * of.scales_apart;
        const uint8_t *zeros = of.zeros ? of.zeros + t * of.scales_apart : NULL;
        const struct vkv_int4_note *notes = of.notes + t * rows;
        scale_in(rows, 0, low_sums + t * rows, totals, scales, zeros, notes);
        scale_in(rows, 1, high_sums + t * rows, totals, scales, zeros, notes);
    }
}

/* The number of rows becomes a constant, so that sums stay in registers. */
static void multiply(int64_t rows, const struct vkv_int4_stretches *stretches, float *totals) {
    switch (stretches->count == 2 ? ROWS + rows : rows) {
#define ONE(n) case n: multiply_rows(n, 1, stretches, totals); break;
#define TWO(n) case ROWS + n: multiply_rows(n, 2, stretches, totals); break;
        ONE(1) ONE(2) ONE(3) ONE(4) ONE(5) ONE(6) ONE(7) ONE(8) ONE(9) ONE(10) ONE(11) ONE(12)
        TWO(1) TWO(2) TWO(3)
#undef ONE
#undef TWO
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
    .pair_rows = PAIR_ROWS,
    .reads_a_row = 1,
    .centred = 1,
    .arrange = arrange,
    .multiply = multiply,
    .write_out = write_out,
};

#endif
