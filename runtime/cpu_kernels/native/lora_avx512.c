/* What adapters add to a linear (`lora.c`), in bfloat16 on processors with AVX512-BF16.
 *
 * Inputs meet `down` as they lie, a pair of them a lane and instruction; what comes of that is
 * float32, and meets `up` in float32, rounded once into the result. Both sums of a row have one
 * order, whatever other rows there are.
 */
#include "kernels.h"

#include <stddef.h>

#if defined(__x86_64__)
#include <immintrin.h>

enum { ROWS = 8, SHRINK_ROWS = 4, RANKS = 4, VECTORS = 2, LANES = 16 };

typedef float lows[VKV_LORA_MOST_RANK][ROWS]; /* what inputs became by `down` */

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))
#define INLINE static inline __attribute__((always_inline)) TARGET

/* Unrolled, so that every sum has a register. */
#define FOR(i, count) _Pragma("GCC unroll 8") for (int i = 0; i < count; i++)

INLINE __m512i pairs(const uint16_t *from, const int is_whole, __mmask32 mask) {
    return is_whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(mask, from);
}

INLINE __m512 widened(const uint16_t *from, const int is_whole, __mmask16 mask) {
    const __m256i bits = is_whole ? _mm256_loadu_si256((const __m256i *)from)
                                  : _mm256_maskz_loadu_epi16(mask, from);
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}

/* The sums of four vectors, each in one order. */
INLINE __m128 totals(__m512 a, __m512 b, __m512 c, __m512 d) {
#define HALF(x) _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1))
    const __m256 ab = _mm256_hadd_ps(HALF(a), HALF(b)), cd = _mm256_hadd_ps(HALF(c), HALF(d));
#undef HALF
    const __m256 all = _mm256_hadd_ps(ab, cd);
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

INLINE void add_products(const int rows, const int ranks, const int is_whole, __mmask32 mask,
                         const uint16_t *const *x, const uint16_t *down, int64_t width, int64_t i,
                         __m512 (*acc)[RANKS]) {
    __m512i weight[RANKS];
    FOR(k, ranks) weight[k] = pairs(down + k * width + i, is_whole, mask);
    FOR(r, rows) {
        const __m512i input = pairs(x[r] + i, is_whole, mask);
        FOR(k, ranks)
            acc[r][k] = _mm512_dpbf16_ps(acc[r][k], (__m512bh)input, (__m512bh)weight[k]);
    }
}

/* low[k][r] for some rows and `ranks` rows of `down`. */
INLINE void shrink(const int rows, const int ranks, const uint16_t *const *x, const uint16_t *down,
                   int64_t width, float scale, float (*low)[ROWS]) {
    __m512 acc[SHRINK_ROWS][RANKS];
    FOR(r, rows) FOR(k, RANKS) acc[r][k] = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + 2 * LANES <= width; i += 2 * LANES)
        add_products(rows, ranks, 1, 0, x, down, width, i, acc);
    if (i < width)
        add_products(rows, ranks, 0, (1u << (width - i)) - 1, x, down, width, i, acc);
    FOR(r, rows) {
        float sums[RANKS];
        _mm_storeu_ps(sums, _mm_mul_ps(_mm_set1_ps(scale),
                                       totals(acc[r][0], acc[r][1], acc[r][2], acc[r][3])));
        FOR(k, ranks) low[k][r] = sums[k];
    }
}

INLINE void put(const struct vkv_lora *a, int64_t at, const int is_whole, __mmask16 mask, __m512 x) {
    if (a->sets) {
        _mm512_mask_storeu_ps((float *)a->out + at, mask, x);
    } else {
        uint16_t *out = (uint16_t *)a->out + at;
        const __m512 sum = _mm512_add_ps(widened(out, is_whole, mask), x);
        _mm256_mask_storeu_epi16(out, mask, (__m256i)_mm512_cvtneps_pbh(sum));
    }
}

/* Columns from `column` on: as many as the vectors have, or fewer. */
INLINE void expand(const int rows, const int is_whole, const struct vkv_lora *a,
                   const uint16_t *up, int rank, const int32_t *at, int64_t column,
                   float (*low)[ROWS]) {
    const int64_t width = a->out_features;
    __mmask16 mask[VECTORS];
    FOR(v, VECTORS) {
        const int64_t left = width - column - v * LANES;
        mask[v] = left >= LANES ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
    }
    __m512 acc[ROWS][VECTORS];
    FOR(r, rows) FOR(v, VECTORS) acc[r][v] = _mm512_setzero_ps();
    up += column;
    for (int j = 0; j < rank; j++, up += width) {
        __m512 weight[VECTORS];
        FOR(v, VECTORS) weight[v] = widened(up + v * LANES, is_whole, mask[v]);
        FOR(r, rows) {
            const __m512 input = _mm512_set1_ps(low[j][r]);
            FOR(v, VECTORS) acc[r][v] = _mm512_fmadd_ps(weight[v], input, acc[r][v]);
        }
    }
    FOR(r, rows) FOR(v, VECTORS)
        put(a, at[r] * a->out_stride + column + v * LANES, is_whole, mask[v], acc[r][v]);
}

/* Rows `at` of one adapter. */
INLINE void some_rows(const int rows, const struct vkv_lora *a, const struct vkv_lora_entry *entry,
                      const int32_t *at) {
    lows low;
    const uint16_t *x[ROWS];
    FOR(r, rows) x[r] = (const uint16_t *)a->inputs + at[r] * a->input_stride;
    const int64_t width = a->in_features;
    const int together = rows < SHRINK_ROWS ? rows : SHRINK_ROWS;
    int j = 0;
    for (; j < entry->rank / RANKS * RANKS; j += RANKS)
        for (int r = 0; r < rows; r += together)
            shrink(together, RANKS, x + r, (const uint16_t *)entry->down + j * width, width,
                   entry->scale, (float(*)[ROWS])&low[j][r]);
    for (; j < entry->rank; j++)
        for (int r = 0; r < rows; r += together)
            shrink(together, 1, x + r, (const uint16_t *)entry->down + j * width, width,
                   entry->scale, (float(*)[ROWS])&low[j][r]);
    int64_t column = 0;
    for (; column + VECTORS * LANES <= a->out_features; column += VECTORS * LANES)
        expand(rows, 1, a, entry->up, entry->rank, at, column, low);
    if (column < a->out_features) expand(rows, 0, a, entry->up, entry->rank, at, column, low);
}

TARGET void vkv_lora_rows_avx512(const struct vkv_lora *a, const struct vkv_lora_entry *entry,
                                 const int32_t *at, int count) {
    for (; count >= 8; count -= 8, at += 8) some_rows(8, a, entry, at);
    for (; count >= 4; count -= 4, at += 4) some_rows(4, a, entry, at);
    for (; count >= 2; count -= 2, at += 2) some_rows(2, a, entry, at);
    if (count) some_rows(1, a, entry, at);
}

#else

void vkv_lora_rows_avx512(const struct vkv_lora *a, const struct vkv_lora_entry *entry,
                          const int32_t *at, int count) {
    (void)a, (void)entry, (void)at, (void)count;
}

#endif
