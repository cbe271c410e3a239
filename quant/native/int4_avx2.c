/* The kernel for processors with AVX2.
 *
 * Integers: a code is moved down within its half word and multiplied by an input of 16 bits, two
 * of each at a time. For that, a stretch of inputs is divided by its largest and rounded to 16
 * bits, which keeps of all but the smallest what a bfloat16 has. Sums are exact: a stretch of 256
 * products of 4 and 16 bits fills 28.
 */
#include "kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

enum {
    ROWS = 6,     /* at a time: their sums fill the registers */
    AHEAD = 1024, /* bytes of codes that are fetched before they are needed */
    LARGEST = 32767,
    NEUTRAL = 8 /* the zero of weights that have none */
};

/* Pairs of inputs of 16 bits, [length / 2][rows]. */
static void arrange(const uint16_t *inputs, int64_t rows, int64_t in_features, int64_t length,
                    void *arranged, struct vkv_int4_note *notes) {
    int16_t *to = arranged;
    for (int64_t m = 0; m < rows; m++, inputs += in_features) {
        uint16_t largest = 0; /* without its sign: a NaN is larger than all numbers, and stays */
        for (int64_t k = 0; k < length; k++) {
            const uint16_t size = inputs[k] & 0x7fff;
            largest = size > largest ? size : largest;
        }
        const float factor = to_float(largest) / LARGEST;
        const float shrink = largest ? LARGEST / to_float(largest) : 0.0f;
        int32_t numbers[STRETCH], sum = 0;
        for (int64_t k = 0; k < length; k++) {
            const __m128 x = _mm_set_ss(to_float(inputs[k]) * shrink);
            sum += numbers[k] = _mm_cvtss_si32(x);
        }
        for (int64_t k = 0; k < length; k += 2) {
            to[k * rows + 2 * m] = (int16_t)numbers[k];
            to[k * rows + 2 * m + 1] = (int16_t)numbers[k + 1];
        }
        notes[m] = (struct vkv_int4_note){.sum = (float)sum, .factor = factor};
    }
}

/* Loops over rows are unrolled, so that every sum has a register. */
#define FOR_ROWS _Pragma("GCC unroll 6") for (int m = 0; m < rows; m++)

static inline __attribute__((always_inline)) __m256i codes_at(__m256i words, int nibble) {
    if (nibble) words = _mm256_srli_epi16(words, 4 * nibble);
    return nibble == 3 ? words : _mm256_and_si256(words, _mm256_set1_epi16(15));
}

/* Sums of one stretch of half a tile: its first eight outputs and its last. */
static inline __attribute__((always_inline)) void
sum_products(const int rows, const uint8_t *codes, const int32_t *inputs, int64_t num_blocks,
             __m256i *low, __m256i *high) {
    FOR_ROWS low[m] = high[m] = _mm256_setzero_si256();
    for (int64_t b = 0; b < num_blocks; b++, codes += 128, inputs += 4 * rows) {
        const __m256i first = _mm256_loadu_si256((const __m256i *)codes);
        const __m256i second = _mm256_loadu_si256((const __m256i *)(codes + 32));
        _mm_prefetch((const char *)codes + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int s = 0; s < 4; s++) {
            const __m256i a = codes_at(first, s), c = codes_at(second, s);
            FOR_ROWS {
                const __m256i pair = _mm256_set1_epi32(inputs[s * rows + m]);
                low[m] = _mm256_add_epi32(low[m], _mm256_madd_epi16(a, pair));
                high[m] = _mm256_add_epi32(high[m], _mm256_madd_epi16(c, pair));
            }
        }
    }
}

/* totals [rows][TILE] += scales * (sums - zeros * inputs) * factors, for eight outputs. */
static inline __attribute__((always_inline)) void
scale_in(const int rows, const __m256i *sums, float *totals, const float *scales,
         const uint8_t *zeros, const struct vkv_int4_note *notes) {
    __m256 zero = _mm256_set1_ps(NEUTRAL);
    if (zeros)
        zero = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)zeros)));
    FOR_ROWS {
        float *total = totals + m * TILE;
        const __m256 sum = _mm256_fnmadd_ps(zero, _mm256_broadcast_ss(&notes[m].sum),
                                            _mm256_cvtepi32_ps(sums[m]));
        const __m256 scale =
            _mm256_mul_ps(_mm256_loadu_ps(scales), _mm256_broadcast_ss(&notes[m].factor));
        _mm256_storeu_ps(total, _mm256_fmadd_ps(scale, sum, _mm256_loadu_ps(total)));
    }
}

static inline __attribute__((always_inline)) void
multiply_rows(const int rows, const uint8_t *codes, const void *inputs, int64_t length,
              const float *scales, const uint8_t *zeros, const struct vkv_int4_note *notes,
              float *totals) {
    for (int at = 0; at < TILE; at += 16) {
        __m256i low[ROWS], high[ROWS];
        sum_products(rows, codes + 4 * at, inputs, length / BLOCK, low, high);
        scale_in(rows, low, totals + at, scales + at, zeros ? zeros + at : zeros, notes);
        scale_in(rows, high, totals + at + 8, scales + at + 8, zeros ? zeros + at + 8 : zeros,
                 notes);
    }
}

/* The number of rows becomes a constant, so that sums stay in registers. */
static void multiply(int64_t rows, const uint8_t *codes, const void *inputs, int64_t length,
                     const float *scales, const uint8_t *zeros, const struct vkv_int4_note *notes,
                     float *totals) {
    switch (rows) {
#define CASE(n)                                                                \
    case n:                                                                    \
        multiply_rows(n, codes, inputs, length, scales, zeros, notes, totals); \
        break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
    }
}

static inline uint16_t to_bf16(float x) { /* to nearest, ties to even; a NaN stays one */
    const union { float value; uint32_t bits; } both = {x};
    const uint32_t rounded = (both.bits + 0x7fff + (both.bits >> 16 & 1)) >> 16;
    return (uint16_t)(x != x ? both.bits >> 16 | 0x40 : rounded);
}

static void write_out(const struct vkv_int4 *args, int64_t tile, const float *totals) {
    const int64_t first = tile * TILE, count = least(TILE, args->out_features - first);
    for (int64_t m = 0; m < args->num_rows; m++) {
        uint16_t *goal = (uint16_t *)args->out + m * args->out_features + first;
        for (int64_t i = 0; i < count; i++) goal[i] = to_bf16(totals[m * TILE + i]);
    }
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const struct vkv_int4_kernel vkv_int4_avx2 = {
    .rows = ROWS,
    .arrange = arrange,
    .multiply = multiply,
    .write_out = write_out,
};

#endif
