/* The kernels for inputs that are rounded to 8 bits: of AVX512-VNNI, and of AVX2.
 *
 * A stretch of a row's inputs is divided by its largest and rounded to -127 .. 127. Codes are
 * multiplied by those as integers, four products at a time, and sums are exact. A register of codes
 * has, of each output, inputs 0, 4, 1 and 5 of a block in its low nibbles and 2, 6, 3 and 7 in its
 * high ones; inputs are brought in that order.
 */
#include "kernel.h"

#if defined(__x86_64__)
#include "vectors.h"

#include <math.h>

enum {
    ROWS_VNNI = 12,  /* at a time: their sums fill the registers */
    ROWS_AVX2 = 4,
    AHEAD = 4096,    /* bytes of codes that are fetched before they are needed */
    LARGEST = 127,
    BLOCKS_OF_16 = 4 /* whose products an integer of 16 bits holds: 8 times 2 * 15 * 127 */
};

#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")))
/* Loops are unrolled, so that every sum has a register. */
#define UNROLLED(i, count) _Pragma("GCC unroll 12") for (int i = 0; i < count; i++)

/* Compilers know that the order of integer sums does not matter, and take one that needs more
 * registers than there are. */
#define TIED(sum) __asm__("" : "+v"(sum))

/* -- inputs ------------------------------------------------------------------------------------ */

/* Fours of inputs of 8 bits, [length / 4][rows]. */
AVX2 static void arrange(const uint16_t *inputs, int64_t rows, int64_t in_features, int64_t length,
                         void *arranged, struct vkv_int4_note *notes) {
    const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, -1, -1, -1, -1, -1, -1, -1, -1);
    for (int64_t m = 0; m < rows; m++, inputs += in_features) {
        float largest = to_float(largest_of(inputs, length));
        if (largest == INFINITY) largest = NAN; /* its integers mean nothing */
        const float whole = LARGEST / largest; /* infinite where all are 0, or as good as that */
        const __m256 shrink = _mm256_set1_ps(whole < INFINITY ? whole : 0);
        int32_t *fours = (int32_t *)arranged + m;
        __m256i sum = _mm256_setzero_si256();
        for (int64_t k = 0; k < length; k += BLOCK, fours += 2 * rows) {
            const __m128i from = _mm_loadu_si128((const __m128i *)(inputs + k));
            const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(from), 16);
            const __m256i x = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(bits), shrink));
            sum = _mm256_add_epi32(sum, x);
            __m128i narrow = _mm_packs_epi32(_mm256_castsi256_si128(x),
                                             _mm256_extracti128_si256(x, 1));
            narrow = _mm_shuffle_epi8(_mm_packs_epi16(narrow, narrow), order);
            fours[0] = _mm_cvtsi128_si32(narrow);
            fours[rows] = _mm_extract_epi32(narrow, 1);
        }
        notes[m] = (struct vkv_int4_note){(float)sum_lanes(sum), largest / LARGEST};
    }
}

/* -- AVX512-VNNI ------------------------------------------------------------------------------- */

/* totals [rows][TILE] += scales * factors * (sums - zeros * inputs), of half a tile. */
INLINE VNNI void scale_in_16(const int rows, const int half, const __m512i *sums, float *totals,
                             const struct vkv_int4_stretches *of) {
    const __m512 scale = scales_16(of->scales, of->scale_type, 16 * half);
    __m512 zero = _mm512_set1_ps(NEUTRAL);
    if (of->zeros)
        zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(
            _mm_loadu_si128((const __m128i *)(of->zeros + 16 * half))));
    UNROLLED(m, rows) {
        float *total = totals + m * TILE + 16 * half;
        const __m512 sum = _mm512_fnmadd_ps(zero, _mm512_set1_ps(of->notes[m].sum),
                                            _mm512_cvtepi32_ps(sums[m]));
        const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(of->notes[m].factor));
        _mm512_storeu_ps(total, _mm512_fmadd_ps(factor, sum, _mm512_loadu_ps(total)));
    }
}

INLINE VNNI void multiply_rows_vnni(const int rows, const struct vkv_int4_stretches *stretches,
                                    float *totals) {
    const struct vkv_int4_stretches of = own_copy(stretches);
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i sums[2][ROWS_VNNI];
    UNROLLED(m, rows) sums[0][m] = sums[1][m] = _mm512_setzero_si512();
    const uint8_t *codes = of.codes;
    const int32_t *inputs = (const int32_t *)of.inputs;
    for (int64_t b = 0; b < of.length / BLOCK; b++, codes += 128, inputs += 2 * rows) {
        _mm_prefetch((const char *)codes + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)codes + AHEAD + 64, _MM_HINT_T0);
        UNROLLED(high, 2) {
            __m512i weights[2];
            UNROLLED(half, 2) {
                const __m512i both = _mm512_loadu_si512(codes + 64 * half);
                weights[half] =
                    _mm512_and_si512(high ? _mm512_srli_epi16(both, 4) : both, nibble);
            }
            UNROLLED(m, rows) {
                const __m512i four = _mm512_set1_epi32(inputs[high * rows + m]);
                UNROLLED(half, 2) {
                    sums[half][m] = _mm512_dpbusd_epi32(sums[half][m], weights[half], four);
                    TIED(sums[half][m]);
                }
            }
        }
    }
    scale_in_16(rows, 0, sums[0], totals, &of);
    scale_in_16(rows, 1, sums[1], totals, &of);
}

/* The number of rows becomes a constant, so that sums stay in registers. */
VNNI static void multiply_vnni(int64_t rows, const struct vkv_int4_stretches *of, float *totals) {
    switch (rows) {
#define CASE(n) case n: multiply_rows_vnni(n, of, totals); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11)
        CASE(12)
#undef CASE
    }
}

/* -- AVX2 -------------------------------------------------------------------------------------- */

/* Of eight outputs, from `at` on. */
INLINE AVX2 void multiply_eight(const int rows, int64_t at, const struct vkv_int4_stretches *of,
                                float *totals) {
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const uint8_t *codes = of->codes + 4 * at;
    const int32_t *inputs = (const int32_t *)of->inputs;
    const int64_t num_blocks = of->length / BLOCK;
    __m256i sums[ROWS_AVX2];
    UNROLLED(m, rows) sums[m] = _mm256_setzero_si256();
    for (int64_t first = 0; first < num_blocks; first += BLOCKS_OF_16) {
        const int64_t last = least(first + BLOCKS_OF_16, num_blocks);
        __m256i narrow[ROWS_AVX2];
        UNROLLED(m, rows) narrow[m] = _mm256_setzero_si256();
        for (int64_t b = first; b < last; b++, codes += 128, inputs += 2 * rows) {
            _mm_prefetch((const char *)codes + AHEAD, _MM_HINT_T0);
            const __m256i both = _mm256_loadu_si256((const __m256i *)codes);
            UNROLLED(high, 2) {
                const __m256i weights =
                    _mm256_and_si256(high ? _mm256_srli_epi16(both, 4) : both, nibble);
                UNROLLED(m, rows) {
                    const __m256i four = _mm256_set1_epi32(inputs[high * rows + m]);
                    narrow[m] = _mm256_add_epi16(narrow[m], _mm256_maddubs_epi16(weights, four));
                }
            }
        }
        UNROLLED(m, rows)
            sums[m] = _mm256_add_epi32(sums[m], _mm256_madd_epi16(narrow[m], ones));
    }
    scale_in_8(rows, at, sums, of, totals);
}

AVX2 static void multiply_avx2(int64_t rows, const struct vkv_int4_stretches *of, float *totals) {
    for (int64_t at = 0; at < TILE; at += 8)
        switch (rows) {
#define CASE(n) case n: multiply_eight(n, at, of, totals); break;
            CASE(1) CASE(2) CASE(3) CASE(4)
#undef CASE
        }
}

const struct vkv_int4_kernel vkv_int4_int8_vnni = {
    .rows = ROWS_VNNI,
    .arrange = arrange,
    .multiply = multiply_vnni,
    .write_out = vkv_int4_write_out,
};

const struct vkv_int4_kernel vkv_int4_int8_avx2 = {
    .rows = ROWS_AVX2,
    .arrange = arrange,
    .multiply = multiply_avx2,
    .write_out = vkv_int4_write_out,
};

#endif
