/* What the kernels of several instruction sets have in common. Each function here is compiled for
 * the least that it needs, and becomes part of kernels for that and more. */
#ifndef VKV_INT4_VECTORS_H
#define VKV_INT4_VECTORS_H

#include "kernel.h"

#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define INLINE static inline __attribute__((always_inline))

enum { NEUTRAL = 8 }; /* the zero of weights that have none */

/* A copy that no total lies in. Field by field: the caller has only just written some of them, and
 * several read at once would wait until those had reached the cache. */
INLINE struct vkv_int4_stretches own_copy(const struct vkv_int4_stretches *from) {
    struct vkv_int4_stretches of;
    of.count = from->count, of.length = from->length;
    of.codes = from->codes, of.inputs = from->inputs;
    of.scales = from->scales, of.zeros = from->zeros, of.notes = from->notes;
    of.scales_apart = from->scales_apart, of.scale_type = from->scale_type;
    of.weights = from->weights, of.kept = from->kept;
    return of;
}

/* -- inputs that are rounded ------------------------------------------------------------------- */

INLINE AVX2 int32_t sum_lanes(__m256i x) {
    __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}

/* The largest without its sign: a NaN is larger than all numbers, and stays. */
INLINE AVX2 uint16_t largest_of(const uint16_t *inputs, int64_t length) {
    const __m128i size = _mm_set1_epi16(0x7fff), ones = _mm_set1_epi16(-1);
    __m128i largest = _mm_setzero_si128();
    for (int64_t k = 0; k < length; k += BLOCK)
        largest = _mm_max_epu16(
            largest, _mm_and_si128(_mm_loadu_si128((const __m128i *)(inputs + k)), size));
    return (uint16_t)~_mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(largest, ones)), 0);
}

/* -- scales and zeros, of outputs from `at` on -------------------------------------------------- */

INLINE AVX2 __m256 scales_8(const void *scales, int32_t type, int64_t at) {
    if (type == VKV_INT4_FLOAT32) return _mm256_loadu_ps((const float *)scales + at);
    const __m128i narrow = _mm_loadu_si128((const __m128i *)((const uint16_t *)scales + at));
    if (type == VKV_INT4_FLOAT16) return _mm256_cvtph_ps(narrow);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}

INLINE AVX512 __m512 scales_16(const void *scales, int32_t type, int64_t at) {
    if (type == VKV_INT4_FLOAT32) return _mm512_loadu_ps((const float *)scales + at);
    const __m256i narrow = _mm256_loadu_si256((const __m256i *)((const uint16_t *)scales + at));
    if (type == VKV_INT4_FLOAT16) return _mm512_cvtph_ps(narrow);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

INLINE AVX2 __m256 zeros_8(const uint8_t *zeros, int64_t at) {
    if (!zeros) return _mm256_set1_ps(NEUTRAL);
    const __m128i bytes = _mm_loadl_epi64((const __m128i *)(zeros + at));
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}

/* totals [rows][TILE] += scales * factors * (sums - zeros * inputs), of eight outputs: the products
 * of a stretch of rounded inputs. */
INLINE AVX2 void scale_in_8(const int rows, int64_t at, const __m256i *sums,
                            const struct vkv_int4_stretches *of, float *totals) {
    const __m256 scale = scales_8(of->scales, of->scale_type, at), zero = zeros_8(of->zeros, at);
    _Pragma("GCC unroll 4") for (int m = 0; m < rows; m++) {
        float *total = totals + m * TILE + at;
        const __m256 sum = _mm256_fnmadd_ps(zero, _mm256_broadcast_ss(&of->notes[m].sum),
                                            _mm256_cvtepi32_ps(sums[m]));
        const __m256 factor = _mm256_mul_ps(scale, _mm256_broadcast_ss(&of->notes[m].factor));
        _mm256_storeu_ps(total, _mm256_fmadd_ps(factor, sum, _mm256_loadu_ps(total)));
    }
}

#endif
