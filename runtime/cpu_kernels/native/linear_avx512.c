/* The linear for processors with AVX512: of floats, and of bfloat16 where they have AVX512-BF16.
 *
 * A tile is up to six rows of the input against a panel of 64 columns: 24 accumulators of 16
 * lanes. Of bfloat16 a dot-product instruction multiplies a pair of inputs with a pair of weights a
 * lane. A sum has one order, whatever the number of rows. Threads take panels from a counter.
 */
#include "kernels.h"

#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>

enum { PANEL = VKV_PANEL_AVX512, ROWS = 6, VECTORS = PANEL / 16, AHEAD_BYTES = 4096 };

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))
#define INLINE static inline __attribute__((always_inline)) TARGET

struct job {
    const struct vkv_linear *args;
    int64_t next_panel; /* atomic */
};

/* 2^x; relative error about 1e-7 from -126 to 127. */
INLINE __m512 exp2_(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-126.0f));
    x = _mm512_min_ps(x, _mm512_set1_ps(127.0f));
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.535336e-4f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.339887e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.618437e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.550332e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.402264e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931472e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, whole);
}

/* x * sigmoid(y), where y is x (SiLU) or the cubic of GELU's tanh form, whose factor of two makes
 * its (1 + tanh) / 2 the same sigmoid. */
INLINE __m512 gate_(__m512 x, int gate) {
    const __m512 one = _mm512_set1_ps(1.0f);
    __m512 y = _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f));
    if (gate == VKV_GELU_TANH) {
        const __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f), one);
        y = _mm512_mul_ps(_mm512_mul_ps(y, cubic), _mm512_set1_ps(1.59576912f));
    }
    return _mm512_div_ps(x, _mm512_add_ps(one, exp2_(y)));
}

/* Up to 16 results from `at` on, of those that a row has. */
INLINE void put(const int is_bf16, const struct vkv_linear *args, int64_t row, int64_t at, __m512 x) {
    const int64_t left = (args->gate ? args->num_columns / 2 : args->num_columns) - at;
    const __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
    const int64_t goal = row * args->out_stride + at;
    if (is_bf16)
        _mm256_mask_storeu_epi16((uint16_t *)args->out + goal, mask,
                                 (__m256i)_mm512_cvtneps_pbh(x));
    else
        _mm512_mask_storeu_ps((float *)args->out + goal, mask, x);
}

/* Some rows against one panel. The first tile fetches the weights ahead; later ones find them. */
INLINE void tile(const int rows, const int fetch, const int is_bf16, const struct vkv_linear *args,
                 int64_t panel, int64_t first_row) {
    __m512 acc[ROWS][VECTORS];
    for (int v = 0; v < VECTORS; v++) {
        const __m512 start = args->bias
            ? _mm512_loadu_ps(args->bias + panel * PANEL + 16 * v) : _mm512_setzero_ps();
        for (int r = 0; r < rows; r++) acc[r][v] = start;
    }
    if (args->addend)
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < VECTORS; v++) {
                const int half = v >= VECTORS / 2;
                const float *from = args->addend + (first_row + r) * (int64_t)args->num_columns
                    + half * (args->num_columns / 2) + panel * (PANEL / 2)
                    + 16 * (v - half * (VECTORS / 2));
                acc[r][v] = _mm512_add_ps(acc[r][v], _mm512_loadu_ps(from));
            }
    const int32_t *weight = args->weight + panel * PANEL * args->num_words;
    const int64_t stride = (is_bf16 ? 2 : 4) * args->input_stride;
    const char *inputs = (const char *)args->inputs + first_row * stride;
    for (int i = 0; i < args->num_words; i++, weight += PANEL, inputs += 4) {
        __m512i column[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            column[v] = _mm512_loadu_si512(weight + 16 * v);
            if (fetch) __builtin_prefetch((const char *)(weight + 16 * v) + AHEAD_BYTES);
        }
        for (int r = 0; r < rows; r++) {
            int32_t word;
            memcpy(&word, inputs + r * stride, 4);
            const __m512i input = _mm512_set1_epi32(word);
            for (int v = 0; v < VECTORS; v++)
                acc[r][v] = is_bf16
                    ? _mm512_dpbf16_ps(acc[r][v], (__m512bh)input, (__m512bh)column[v])
                    : _mm512_fmadd_ps((__m512)input, (__m512)column[v], acc[r][v]);
        }
    }
    for (int r = 0; r < rows; r++) {
        if (args->gate) {
            for (int v = 0; v < VECTORS / 2; v++)
                put(is_bf16, args, first_row + r, panel * (PANEL / 2) + 16 * v,
                    _mm512_mul_ps(gate_(acc[r][v], args->gate), acc[r][VECTORS / 2 + v]));
        } else {
            for (int v = 0; v < VECTORS; v++)
                put(is_bf16, args, first_row + r, panel * PANEL + 16 * v, acc[r][v]);
        }
    }
}

TARGET static void tile_of(int rows, int fetch, const struct vkv_linear *args, int64_t panel,
                           int64_t row) {
#define CASES(is_bf16, fetch, at)                                 \
    case at + 1: tile(1, fetch, is_bf16, args, panel, row); break; \
    case at + 2: tile(2, fetch, is_bf16, args, panel, row); break; \
    case at + 3: tile(3, fetch, is_bf16, args, panel, row); break; \
    case at + 4: tile(4, fetch, is_bf16, args, panel, row); break; \
    case at + 5: tile(5, fetch, is_bf16, args, panel, row); break; \
    case at + 6: tile(6, fetch, is_bf16, args, panel, row); break;
    switch (rows + 8 * (2 * (args->dtype == VKV_BFLOAT16) + fetch)) {
        CASES(0, 0, 0) CASES(0, 1, 8) CASES(1, 0, 16) CASES(1, 1, 24)
    }
#undef CASES
}

TARGET static void work(void *data) {
    struct job *job = data;
    const struct vkv_linear *args = job->args;
    const int64_t num_panels = (args->num_columns + PANEL - 1) / PANEL;
    const int tiles = (args->num_rows + ROWS - 1) / ROWS;
    for (;;) {
        const int64_t panel = __atomic_fetch_add(&job->next_panel, 1, __ATOMIC_RELAXED);
        if (panel >= num_panels) return;
        for (int t = 0, row = 0; t < tiles; t++) { /* rows divided evenly */
            const int rows = (args->num_rows - row + tiles - t - 1) / (tiles - t);
            tile_of(rows, t == 0, args, panel, row);
            row += rows;
        }
    }
}

int64_t vkv_linear_avx512(const struct vkv_linear *args) {
    struct job job = {.args = args};
    if (args->num_threads > 1 && args->parallel)
        args->parallel(work, &job, (unsigned)args->num_threads, 0);
    else
        work(&job);
    return 0;
}

#endif
