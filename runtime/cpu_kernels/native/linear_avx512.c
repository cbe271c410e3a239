/* The linear for processors with AVX512-BF16.
 *
 * A tile is up to six rows of the input against a panel of 64 columns: 24 accumulators of 16
 * lanes. A dot-product instruction multiplies a pair of inputs with a pair of weights a lane.
 * Threads take panels from a counter.
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

INLINE void put(uint16_t *out, __m512 x, int count) {
    const __mmask16 mask = count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1;
    _mm256_mask_storeu_epi16(out, mask, (__m256i)_mm512_cvtneps_pbh(x));
}

/* Some rows against one panel. The first tile fetches the weights ahead; later ones find them. */
INLINE void tile(const int rows, const int fetch, const struct vkv_linear *args, int64_t panel,
                 int first_row) {
    __m512 acc[ROWS][VECTORS];
    for (int v = 0; v < VECTORS; v++) {
        const __m512 start = args->bias
            ? _mm512_loadu_ps(args->bias + panel * PANEL + 16 * v) : _mm512_setzero_ps();
        for (int r = 0; r < rows; r++) acc[r][v] = start;
    }
    const int32_t *weight = args->weight + panel * PANEL * args->num_words;
    const int64_t stride = 2 * args->input_stride;
    const char *inputs = (const char *)args->inputs + first_row * stride;
    for (int i = 0; i < args->num_words; i++, weight += PANEL, inputs += 4) {
        __m512bh column[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            column[v] = (__m512bh)_mm512_loadu_si512(weight + 16 * v);
            if (fetch) __builtin_prefetch((const char *)(weight + 16 * v) + AHEAD_BYTES);
        }
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, inputs + r * stride, 4);
            const __m512bh word = (__m512bh)_mm512_set1_epi32(pair);
            for (int v = 0; v < VECTORS; v++)
                acc[r][v] = _mm512_dpbf16_ps(acc[r][v], word, column[v]);
        }
    }
    for (int r = 0; r < rows; r++) {
        uint16_t *out = (uint16_t *)args->out + (first_row + r) * args->out_stride;
        if (args->gate) {
            const int64_t at = panel * (PANEL / 2);
            for (int v = 0; v < VECTORS / 2; v++)
                put(out + at + 16 * v,
                    _mm512_mul_ps(gate_(acc[r][v], args->gate), acc[r][VECTORS / 2 + v]),
                    (int)(args->num_columns / 2 - at - 16 * v));
        } else {
            const int64_t at = panel * PANEL;
            for (int v = 0; v < VECTORS; v++)
                put(out + at + 16 * v, acc[r][v], (int)(args->num_columns - at - 16 * v));
        }
    }
}

TARGET static void tile_of(int rows, int fetch, const struct vkv_linear *args, int64_t panel,
                           int row) {
#define CASE(n)                                              \
    case n:                                                  \
        if (fetch) tile(n, 1, args, panel, row);             \
        else tile(n, 0, args, panel, row);                   \
        break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
    }
#undef CASE
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
