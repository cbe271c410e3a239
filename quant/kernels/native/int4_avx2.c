/* The kernel for processors with AVX2.
 *
 * Integers: a code is moved down within its half word and multiplied by an input of 16 bits, two
 * of each at a time. For that, a stretch of inputs is divided by its largest and rounded to 16
 * bits, which keeps of all but the smallest what a bfloat16 has; an infinity or a NaN makes all
 * results of its row NaN. Sums are exact: a stretch of 256 products of 4 and 16 bits fills 28.
 */
#include "kernel.h"

#if defined(__x86_64__)
#include "vectors.h"

#include <math.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

enum {
    ROWS = 4,     /* at a time; six were no faster for many rows, and overflowed the registers */
    AHEAD = 4096, /* bytes of codes that are fetched before they are needed */
    LARGEST = 32767
};

/* Pairs of inputs of 16 bits, [length / 2][rows]. */
static void arrange(const uint16_t *inputs, int64_t rows, int64_t in_features, int64_t length,
                    void *arranged, struct vkv_int4_note *notes) {
    for (int64_t m = 0; m < rows; m++, inputs += in_features) {
        float largest = to_float(largest_of(inputs, length));
        if (largest == INFINITY) largest = NAN; /* its integers mean nothing */
        const float whole = LARGEST / largest; /* infinite where all are 0, or as good as that */
        const __m256 shrink = _mm256_set1_ps(whole < INFINITY ? whole : 0);
        int32_t *pairs = (int32_t *)arranged + m;
        __m256i sum = _mm256_setzero_si256();
        for (int64_t k = 0; k < length; k += 8) {
            const __m128i from = _mm_loadu_si128((const __m128i *)(inputs + k));
            const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(from), 16);
            const __m256i x = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(bits), shrink));
            sum = _mm256_add_epi32(sum, x);
            int32_t four[4]; /* pairs */
            _mm_storeu_si128((__m128i *)four, _mm_packs_epi32(_mm256_castsi256_si128(x),
                                                              _mm256_extracti128_si256(x, 1)));
            for (int i = 0; i < 4; i++, pairs += rows) *pairs = four[i];
        }
        notes[m] = (struct vkv_int4_note){(float)sum_lanes(sum), largest / LARGEST};
    }
}

/* Loops are unrolled, so that every sum has a register. */
#define UNROLLED(i, count) _Pragma("GCC unroll 4") for (int i = 0; i < count; i++)

/* totals [rows][TILE] += the products of a stretch with some eights of outputs, from `at` on. */
INLINE void multiply_eights(const int rows, const int eights, const int at,
                            const struct vkv_int4_stretches *of, float *totals) {
    const uint8_t *codes = of->codes + 4 * at;
    const int32_t *inputs = (const int32_t *)of->inputs;
    const int64_t num_blocks = of->length / BLOCK;
    __m256i sums[4][ROWS];
    UNROLLED(e, eights) UNROLLED(m, rows) sums[e][m] = _mm256_setzero_si256();
    for (int64_t b = 0; b < num_blocks; b++, codes += 128, inputs += 4 * rows) {
        UNROLLED(line, eights / 2)
            _mm_prefetch((const char *)codes + 64 * line + AHEAD, _MM_HINT_T0);
        UNROLLED(nibble, 4) {
            __m256i wide[4];
            UNROLLED(e, eights) {
                wide[e] = _mm256_loadu_si256((const __m256i *)(codes + 32 * e));
                if (nibble) wide[e] = _mm256_srli_epi16(wide[e], 4 * nibble);
                if (nibble < 3) wide[e] = _mm256_and_si256(wide[e], _mm256_set1_epi16(15));
            }
            UNROLLED(m, rows) {
                const __m256i pair = _mm256_set1_epi32(inputs[nibble * rows + m]);
                UNROLLED(e, eights) {
                    sums[e][m] = _mm256_add_epi32(sums[e][m], _mm256_madd_epi16(wide[e], pair));
                    /* Compilers know that the order of integer sums does not matter, and take one
                     * that needs more registers than there are. */
                    __asm__("" : "+x"(sums[e][m]));
                }
            }
        }
    }
    UNROLLED(e, eights) scale_in_8(rows, at + 8 * e, sums[e], of, totals);
}

/* Up to two rows have registers for a whole tile at a time, whose codes are then read in order. */
INLINE void multiply_rows(const int rows, const struct vkv_int4_stretches *stretch,
                          float *totals) {
    const struct vkv_int4_stretches of = own_copy(stretch);
    const int eights = rows <= 2 ? 4 : 2;
    for (int at = 0; at < TILE; at += 8 * eights) multiply_eights(rows, eights, at, &of, totals);
}

/* The number of rows becomes a constant, so that sums stay in registers. */
static void multiply(int64_t rows, const struct vkv_int4_stretches *stretch, float *totals) {
    switch (rows) {
#define CASE(n) case n: multiply_rows(n, stretch, totals); break;
        CASE(1) CASE(2) CASE(3) CASE(4)
#undef CASE
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
    .write_out = vkv_int4_write_out,
};

#endif
