/* The linear for processors with AVX512: of floats, and of bfloat16 where they have AVX512-BF16.
 *
 * A tile is up to six rows of the input against a panel of 64 columns: 24 sums of 16 lanes, each in
 * a register. Of bfloat16 a dot-product instruction multiplies a pair of inputs with a pair of
 * weights a lane. A sum has one order, whatever the number of rows.
 *
 * Several tiles meet a panel block by block. While they meet a block, one after the other, each
 * fetches a share of the next one into the second cache: memory is read all the while, and weights
 * once. Between blocks sums wait in memory. A single tile takes a whole panel and fetches some KiB
 * ahead.
 */
#include "kernels.h"
#include "ranges.h"

#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>

enum {
    PANEL = VKV_PANEL_AVX512,
    VECTORS = PANEL / 16,
    LINES = PANEL / 16,     /* of the cache, in a word of all columns */
    ROWS = 6,               /* of a tile */
    SHORT_WORDS = 256,      /* of a block for two or three tiles: 64 KiB, since they wait for memory */
    LONG_WORDS = 512,       /* and for more */
    AHEAD_BYTES = 8192,     /* that a single tile fetches ahead, past the second cache */
    MOST_ROWS = 96          /* whose sums wait together: 24 KiB */
};

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))
#define INLINE static inline __attribute__((always_inline)) TARGET
/* Loops over sums are unrolled, so that every one has a register. */
#define UNROLLED(i, count) _Pragma("GCC unroll 6") for (int i = 0; i < count; i++)

struct job {
    const struct vkv_linear *args;
    struct ranges ranges;
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

/* A tile and a block of a panel. */
struct block {
    const int32_t *weight; /* [num_words][PANEL] */
    const char *inputs;
    const char *next_inputs; /* of the next tile, fetched meanwhile */
    const char *ahead;       /* what of the weight is fetched meanwhile, */
    int64_t ahead_bytes;     /* and how much of it a word */
    float *sums;             /* [rows of the tile][PANEL] */
    int64_t stride;          /* of inputs, in bytes */
    int num_words, from_zero;
};

INLINE void tile(const int rows, const int lines, const int is_bf16, const struct block *of) {
    const __mmask16 keep = of->from_zero ? 0 : 0xffff;
    const int64_t stride = of->stride, ahead_bytes = of->ahead_bytes;
    float *sums = of->sums;
    __m512 acc[ROWS][VECTORS];
    UNROLLED(r, rows) UNROLLED(v, VECTORS)
        acc[r][v] = _mm512_maskz_loadu_ps(keep, sums + r * PANEL + 16 * v);
    const int32_t *weight = of->weight, *end = weight + (int64_t)of->num_words * PANEL;
    const char *inputs = of->inputs, *next_inputs = of->next_inputs, *ahead = of->ahead;
    while (weight < end) {
        if (lines < LINES) UNROLLED(r, rows) _mm_prefetch(next_inputs + r * stride, _MM_HINT_T0);
        next_inputs += 64;
        const int32_t *stop = end - weight > 16 * PANEL ? weight + 16 * PANEL : end;
        for (; weight < stop; weight += PANEL, inputs += 4, ahead += ahead_bytes) {
            __m512i column[VECTORS];
            UNROLLED(v, VECTORS) column[v] = _mm512_loadu_si512(weight + 16 * v);
            UNROLLED(l, lines) {
                if (lines == LINES) _mm_prefetch(ahead + 64 * l, _MM_HINT_NTA);
                else _mm_prefetch(ahead + 64 * l, _MM_HINT_T1);
            }
            UNROLLED(r, rows) {
                int32_t word;
                memcpy(&word, inputs + r * stride, 4);
                const __m512i input = _mm512_set1_epi32(word);
                UNROLLED(v, VECTORS)
                    acc[r][v] = is_bf16
                        ? _mm512_dpbf16_ps(acc[r][v], (__m512bh)input, (__m512bh)column[v])
                        : _mm512_fmadd_ps((__m512)input, (__m512)column[v], acc[r][v]);
            }
        }
    }
    UNROLLED(r, rows) UNROLLED(v, VECTORS)
        _mm512_storeu_ps(sums + r * PANEL + 16 * v, acc[r][v]);
}

/* Rows and lines become constants. */
TARGET static void tile_of(int rows, int lines, int is_bf16, const struct block *of) {
#define CASE(rows, lines, is_bf16) \
    case 16 * rows + 2 * lines + is_bf16: tile(rows, lines, is_bf16, of); break;
#define CASES(rows)                                    \
    CASE(rows, 1, 0) CASE(rows, 2, 0) CASE(rows, 4, 0) \
    CASE(rows, 1, 1) CASE(rows, 2, 1) CASE(rows, 4, 1)
    switch (16 * rows + 2 * lines + is_bf16) {
        CASES(1) CASES(2) CASES(3) CASES(4) CASES(5) CASES(6)
    }
#undef CASES
#undef CASE
}

/* What sums begin with where that is not zero. */
TARGET static void begin(const struct vkv_linear *args, int64_t panel, int64_t first_row,
                         int num_rows, float *sums) {
    const int64_t half = args->num_columns / 2;
    for (int r = 0; r < num_rows; r++)
        for (int v = 0; v < VECTORS; v++, sums += 16) {
            __m512 sum = args->bias ? _mm512_loadu_ps(args->bias + panel * PANEL + 16 * v)
                                    : _mm512_setzero_ps();
            if (args->addend) {
                const float *from =
                    args->addend + (first_row + r) * 2 * half + panel * (PANEL / 2);
                from += v < VECTORS / 2 ? 16 * v : half + 16 * (v - VECTORS / 2);
                sum = _mm512_add_ps(sum, _mm512_loadu_ps(from));
            }
            _mm512_storeu_ps(sums, sum);
        }
}

INLINE void finish(const int is_bf16, const struct vkv_linear *args, int64_t panel,
                   int64_t first_row, int num_rows, const float *sums) {
    for (int64_t r = first_row; r < first_row + num_rows; r++, sums += PANEL) {
        __m512 sum[VECTORS];
        UNROLLED(v, VECTORS) sum[v] = _mm512_loadu_ps(sums + 16 * v);
        if (args->gate)
            UNROLLED(v, VECTORS / 2)
                put(is_bf16, args, r, panel * (PANEL / 2) + 16 * v,
                    _mm512_mul_ps(gate_(sum[v], args->gate), sum[VECTORS / 2 + v]));
        else
            UNROLLED(v, VECTORS) put(is_bf16, args, r, panel * PANEL + 16 * v, sum[v]);
    }
}

/* The words from `word` on of a panel against all tiles. Several tiles fetch `next` meanwhile, unless
 * it is NULL; a single one, what follows in memory. */
TARGET static void multiply_block(const struct vkv_linear *args, int64_t panel, int word,
                                  int num_words, int64_t first_row, int num_rows,
                                  const int32_t *next, float *sums) {
    const int is_bf16 = args->dtype == VKV_BFLOAT16, tiles = (num_rows + ROWS - 1) / ROWS;
    const int least = num_rows / tiles, more = num_rows % tiles; /* divided evenly */
    const int lines = tiles == 1 ? LINES : tiles < LINES ? 2 : 1;
    const int64_t share = (64 * LINES + tiles - 1) / tiles;
    const int64_t stride = (is_bf16 ? 2 : 4) * args->input_stride;
    struct block block = {
        .weight = args->weight + (panel * args->num_words + word) * PANEL,
        .inputs = (const char *)args->inputs + first_row * stride + 4 * word,
        .ahead_bytes = next || tiles == 1 ? share : 0, .sums = sums, .stride = stride,
        .num_words = num_words, .from_zero = word == 0 && !args->bias && !args->addend,
    };
    block.ahead = (const char *)(next && tiles > 1 ? next : block.weight);
    if (tiles == 1) block.ahead += AHEAD_BYTES;
    for (int t = 0; t < tiles; t++) {
        const int rows = least + (t < more);
        block.next_inputs = block.inputs + (t + 1 < tiles ? rows * stride : 0);
        tile_of(rows, lines, is_bf16, &block);
        block.inputs = block.next_inputs;
        block.ahead += block.ahead_bytes * num_words;
        block.sums += rows * PANEL;
    }
}

/* Up to MOST_ROWS rows against a panel; `next` is read after it, or NULL. */
TARGET static void multiply(const struct vkv_linear *args, int64_t panel, int64_t first_row,
                            int num_rows, const int32_t *next) {
    float sums[MOST_ROWS * PANEL] __attribute__((aligned(64)));
    if (args->bias || args->addend) begin(args, panel, first_row, num_rows, sums);
    const int block_words = num_rows > 3 * ROWS ? LONG_WORDS : SHORT_WORDS;
    const int most = num_rows > ROWS ? block_words : args->num_words;
    for (int word = 0, words; word < args->num_words; word += words) {
        words = args->num_words - word < most ? args->num_words - word : most;
        const int32_t *more = args->weight + (panel * args->num_words + word + words) * PANEL;
        if (word + words == args->num_words) more = next;
        multiply_block(args, panel, word, words, first_row, num_rows, more, sums);
    }
    if (args->dtype == VKV_BFLOAT16) finish(1, args, panel, first_row, num_rows, sums);
    else finish(0, args, panel, first_row, num_rows, sums);
}

TARGET static void work(void *data) {
    struct job *job = data;
    const struct vkv_linear *args = job->args;
    const int parts = (args->num_rows + MOST_ROWS - 1) / MOST_ROWS;
    struct turn turn = begin_turn(&job->ranges);
    int64_t panel, end;
    while (next_panels(&job->ranges, &turn, 1, &panel, &end)) {
        const int32_t *weight = args->weight + panel * args->num_words * PANEL;
        const int32_t *other = panel + 1 < end ? weight + args->num_words * PANEL : NULL;
        for (int p = 0, row = 0; p < parts; p++) {
            const int rows = (args->num_rows - row + parts - p - 1) / (parts - p);
            multiply(args, panel, row, rows, p + 1 < parts ? weight : other);
            row += rows;
        }
    }
}

int64_t vkv_linear_avx512(const struct vkv_linear *args) {
    struct job job = {.args = args};
    const int64_t num_panels = (args->num_columns + PANEL - 1) / PANEL;
    /* All or one: an OpenMP runtime lets threads go that a smaller team leaves out. */
    const int threads = args->parallel && num_panels > 1 ? args->num_threads : 1;
    divide(&job.ranges, num_panels, 1, threads);
    if (threads > 1)
        args->parallel(work, &job, (unsigned)threads, 0);
    else
        work(&job);
    return 0;
}

#endif
