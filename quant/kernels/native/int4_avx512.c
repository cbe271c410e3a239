/* The kernel for processors with AVX512-BF16.
 *
 * A code is looked up in a register as the bfloat16 of code - 8, which is exact, and multiplied as
 * it is. For a dozen rows that takes a tenth of the product's time, so the first dozen keep what they
 * look up, if more follow: a stretch of a tile stays in the first cache until all rows have read it.
 * Few rows take two stretches at a time, lest each sum wait for its last term.
 */
#include "kernel.h"

#if defined(__x86_64__)
#include "vectors.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#endif

enum {
    ROWS = 12,           /* at a time: their sums fill the registers */
    PAIR_ROWS = 3,       /* up to so many take two stretches at a time */
    TRANSPOSED_ROWS = 4, /* from so many on, inputs are arranged in registers */
    AHEAD = 4096         /* bytes of codes that are fetched before they are needed */
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

/* totals [rows][TILE] += scales * (sums + (8 - zeros) * inputs), of one of the stretches and half
 * of the tile. */
INLINE void scale_in(const int rows, const int half, const int stretch, __m512 *sums,
                     float *totals, const struct vkv_int4_stretches *of) {
    const int64_t at = stretch * of->scales_apart + 16 * half;
    const __m512 scale = scales_16(of->scales, of->scale_type, at);
    if (of->zeros) {
        const struct vkv_int4_note *notes = of->notes + stretch * rows;
        const __m128i bytes = _mm_loadu_si128((const __m128i *)(of->zeros + at));
        const __m512i less = _mm512_sub_epi32(_mm512_set1_epi32(NEUTRAL), _mm512_cvtepu8_epi32(bytes));
        const __m512 shift = _mm512_cvtepi32_ps(less);
        UNROLLED(m, rows)
            sums[m] = _mm512_fmadd_ps(shift, _mm512_set1_ps(notes[m].sum), sums[m]);
    }
    UNROLLED(m, rows) {
        float *total = totals + m * TILE + 16 * half;
        _mm512_storeu_ps(total, _mm512_fmadd_ps(scale, sums[m], _mm512_loadu_ps(total)));
    }
}

/* Where weights come from: codes that are looked up, or what an earlier block of rows kept. */
enum source { LOOKED_UP, LOOKED_UP_AND_KEPT, KEPT };

INLINE void multiply_rows(const int rows, const int count, const enum source source,
                          const struct vkv_int4_stretches *stretches, float *totals) {
    const struct vkv_int4_stretches of = own_copy(stretches);
    const __m512i table = code_values();
    __m512 low_sums[ROWS], high_sums[ROWS]; /* [count][rows], of each half of a tile */
    UNROLLED(i, rows * count) low_sums[i] = high_sums[i] = _mm512_setzero_ps();
    const uint8_t *codes = of.codes;
    const int32_t *inputs = (const int32_t *)of.inputs;
    const int64_t codes_apart = of.length * (TILE / 2), inputs_apart = of.length / 2 * rows;
    const char *ahead = (const char *)codes + AHEAD; /* in the order of memory */
    __m512i *kept = of.weights;
    for (int64_t b = 0; b < of.length / BLOCK; b++, codes += 128, inputs += 4 * rows, kept += 8) {
        if (source != KEPT) {
            UNROLLED(line, 2 * count) _mm_prefetch(ahead + 64 * line, _MM_HINT_T0);
            ahead += 128 * count;
        }
        UNROLLED(t, count) {
            const uint8_t *from = codes + t * codes_apart;
            const int32_t *by = inputs + t * inputs_apart;
            __m512i first, second;
            if (source != KEPT) {
                first = _mm512_loadu_si512(from);
                second = _mm512_loadu_si512(from + 64);
            }
            UNROLLED(s, 4) {
                const __m512i low = source == KEPT ? kept[2 * s] : look_up(table, first, s);
                const __m512i high = source == KEPT ? kept[2 * s + 1] : look_up(table, second, s);
                if (source == LOOKED_UP_AND_KEPT) kept[2 * s] = low, kept[2 * s + 1] = high;
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
        scale_in(rows, 0, t, low_sums + t * rows, totals, &of);
        scale_in(rows, 1, t, high_sums + t * rows, totals, &of);
    }
}

/* The number of rows becomes a constant, so that sums stay in registers. Blocks that share weights
 * have half of the most rows, or more. */
static void multiply(int64_t rows, const struct vkv_int4_stretches *of, float *totals) {
    const enum source source = !of->weights ? LOOKED_UP : of->kept ? KEPT : LOOKED_UP_AND_KEPT;
    switch (of->count == 2 ? ROWS + rows : 100 * source + rows) {
#define ONE(n) case n: multiply_rows(n, 1, LOOKED_UP, of, totals); break;
#define TWO(n) case ROWS + n: multiply_rows(n, 2, LOOKED_UP, of, totals); break;
#define SHARED(n)                                                                       \
    case 100 + n: multiply_rows(n, 1, LOOKED_UP_AND_KEPT, of, totals); break;           \
    case 200 + n: multiply_rows(n, 1, KEPT, of, totals); break;
        ONE(1) ONE(2) ONE(3) ONE(4) ONE(5) ONE(6) ONE(7) ONE(8) ONE(9) ONE(10) ONE(11) ONE(12)
        TWO(1) TWO(2) TWO(3)
        SHARED(6) SHARED(7) SHARED(8) SHARED(9) SHARED(10) SHARED(11) SHARED(12)
#undef ONE
#undef TWO
#undef SHARED
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

/* Sixteen pairs of each row, `row_pairs` from the next, to [16][rows]. */
static inline void transpose(const int32_t *from, int64_t rows, int64_t row_pairs, int32_t *to) {
    __m512i a[16], b[16];
    UNROLLED(m, 12) a[m] = m < rows ? _mm512_loadu_si512(from + m * row_pairs)
                                    : _mm512_setzero_si512();
    UNROLLED(m, 4) a[12 + m] = _mm512_setzero_si512();
    UNROLLED(i, 8) {
        b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    }
    UNROLLED(i, 4) UNROLLED(j, 2) { /* a[4 i + j] has pairs j, 4 + j, 8 + j, 12 + j of four rows */
        a[4 * i + 2 * j] = _mm512_unpacklo_epi64(b[4 * i + j], b[4 * i + j + 2]);
        a[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(b[4 * i + j], b[4 * i + j + 2]);
    }
    UNROLLED(j, 4) {
        const __m512i even = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
        const __m512i odd = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
        const __m512i more_even = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
        const __m512i more_odd = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
        b[j] = _mm512_shuffle_i32x4(even, more_even, 0x88);
        b[4 + j] = _mm512_shuffle_i32x4(odd, more_odd, 0x88);
        b[8 + j] = _mm512_shuffle_i32x4(even, more_even, 0xdd);
        b[12 + j] = _mm512_shuffle_i32x4(odd, more_odd, 0xdd);
    }
    const __mmask16 kept = (__mmask16)((1u << rows) - 1);
    _Pragma("GCC unroll 16") for (int p = 0; p < 16; p++)
        _mm512_mask_storeu_epi32(to + p * rows, kept, b[p]);
}

/* Pairs of inputs, [length / 2][rows]. */
static void arrange(const uint16_t *inputs, int64_t rows, int64_t in_features, int64_t length,
                    void *arranged, struct vkv_int4_note *notes) {
    const int32_t *pairs = (const int32_t *)inputs;
    int32_t *to = arranged;
    int64_t first = 0;
    if (rows >= TRANSPOSED_ROWS)
        for (; first + 16 <= length / 2; first += 16)
            transpose(pairs + first, rows, in_features / 2, to + first * rows);
    for (int64_t m = 0; m < rows; m++) {
        for (int64_t p = first; p < length / 2; p++)
            to[p * rows + m] = pairs[m * in_features / 2 + p];
        if (!notes) continue;
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
    .keeps = 1,
    .arrange = arrange,
    .multiply = multiply,
    .write_out = write_out,
};

#endif
