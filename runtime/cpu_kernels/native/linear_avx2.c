/* The linear for processors with AVX2.
 *
 * Half of a word is one bfloat16 of a pair, and a shift or a mask away from its float: weights are
 * widened in registers, between multiplications. Inputs are widened ahead, the rows of a tile side
 * by side, so that a tile reads them in order. A tile is up to six rows against a panel of 16
 * columns: 12 accumulators of 8 lanes. Threads take a few panels at a time, as many as stay in the
 * second cache while all rows pass by. Floats go the same way, but for the widening.
 */
#include "kernels.h"
#include "ranges.h"
#include "scalars.h"

#if defined(__x86_64__)
#include <immintrin.h>

enum {
    PANEL = VKV_PANEL_AVX2,
    ROWS = 6,
    AHEAD_BYTES = 2048,
    SHARE_BYTES = 128 << 10,   /* of panels that a thread takes at a time, about */
    SHARES_A_THREAD = 8,       /* for an even load */
    THREADED_ELEMENTS = 64 << 10 /* of inputs, from which widening is worth other threads */
};

#define TARGET __attribute__((target("avx2,fma")))

struct job {
    const struct vkv_linear *args;
    float *inputs;            /* [tile][dim][rows of the tile]; of a single tile, [thread] of these */
    int64_t dim;              /* of a row, in elements */
    int64_t num_tiles, share; /* tiles of rows; panels of a share */
    int64_t next_tile;        /* atomic */
    struct ranges *ranges;
};

/* Rows are divided evenly among tiles. */
static int64_t first_row(const struct job *job, int64_t tile) {
    return job->args->num_rows * tile / job->num_tiles;
}

INLINE TARGET void widen_tile(const int is_bf16, const struct job *job, int64_t first,
                              int64_t rows) {
    const int64_t stride = job->args->input_stride, dim = job->dim;
    const void *inputs = job->args->inputs;
    float *to = job->inputs + first * dim;
#define INPUT(r, k)                                                               \
    (is_bf16 ? from_bf16(((const uint16_t *)inputs)[(first + (r)) * stride + (k)]) \
             : ((const float *)inputs)[(first + (r)) * stride + (k)])
    if (rows == 1) {
        for (int64_t k = 0; k < dim; k++) to[k] = INPUT(0, k);
        return;
    }
    for (int64_t k = 0; k < dim; k += 32) /* a line or two of each row at a time */
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = k; i < k + 32 && i < dim; i++) to[i * rows + r] = INPUT(r, i);
#undef INPUT
}

TARGET static void widen_rows(const struct job *job, int64_t first, int64_t last) {
    if (job->args->dtype == VKV_BFLOAT16) widen_tile(1, job, first, last - first);
    else widen_tile(0, job, first, last - first);
}

TARGET static void widen(void *data) {
    struct job *job = data;
    for (;;) {
        const int64_t tile = __atomic_fetch_add(&job->next_tile, 1, __ATOMIC_RELAXED);
        if (tile >= job->num_tiles) return;
        widen_rows(job, first_row(job, tile), first_row(job, tile + 1));
    }
}

/* 2^x; relative error about 1e-7 from -126 to 127. */
INLINE TARGET __m256 exp2_(__m256 x) {
    x = _mm256_max_ps(x, _mm256_set1_ps(-126.0f));
    x = _mm256_min_ps(x, _mm256_set1_ps(127.0f));
    const __m256 whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 f = _mm256_sub_ps(x, whole);
    __m256 p = _mm256_set1_ps(1.535336e-4f);
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.339887e-3f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(9.618437e-3f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(5.550332e-2f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(2.402264e-1f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(6.931472e-1f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
    const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
}

/* x * sigmoid(y), as scalars.h has it. */
INLINE TARGET __m256 gate_(__m256 x, int gate) {
    const __m256 one = _mm256_set1_ps(1.0f);
    __m256 y = _mm256_mul_ps(x, _mm256_set1_ps(-1.44269504f));
    if (gate == VKV_GELU_TANH) {
        const __m256 cubic = _mm256_fmadd_ps(_mm256_mul_ps(x, x), _mm256_set1_ps(0.044715f), one);
        y = _mm256_mul_ps(_mm256_mul_ps(y, cubic), _mm256_set1_ps(1.59576912f));
    }
    return _mm256_div_ps(x, _mm256_add_ps(one, exp2_(y)));
}

/* Writes a tile's sums, each row's PANEL side by side; a gate overwrites their first half. */
INLINE TARGET void write_out(const int is_bf16, const struct vkv_linear *args, float *sums,
                             int rows, int64_t panel, int64_t row) {
    const int columns = args->gate ? PANEL / 2 : PANEL;
    const int64_t at = panel * columns;
    const int64_t left = (args->gate ? args->num_columns / 2 : args->num_columns) - at;
    const size_t count = (size_t)(left < columns ? left : columns);
    for (int r = 0; r < rows; r++, sums += PANEL) {
        if (args->gate) {
            const __m256 gated = gate_(_mm256_loadu_ps(sums), args->gate);
            _mm256_storeu_ps(sums, _mm256_mul_ps(gated, _mm256_loadu_ps(sums + PANEL / 2)));
        }
        const int64_t goal = (row + r) * args->out_stride + at;
        if (!is_bf16) {
            memcpy((float *)args->out + goal, sums, sizeof(float) * count);
            continue;
        }
        uint16_t rounded[PANEL];
        for (int i = 0; i < PANEL; i++) rounded[i] = to_bf16(sums[i]);
        memcpy((uint16_t *)args->out + goal, rounded, sizeof(uint16_t) * count);
    }
}

/* Loops are unrolled, so that every sum has a register. */
#define FOR_ROWS(r, count) _Pragma("GCC unroll 6") for (int r = 0; r < count; r++)

static const uint32_t UPPER_HALF[8] __attribute__((aligned(32))) = {
    0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000,
    0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000};

/* Reads once more what a compiler would keep in a register, where there is none left. */
INLINE TARGET __m256i load_again(const void *from) {
    __asm__("" : "+r"(from));
    return _mm256_loadu_si256((const __m256i *)from);
}

/* Some rows against one panel or two side by side. The first tile fetches the weights ahead; later
 * ones find them in the cache. */
INLINE TARGET void tile(const int rows, const int panels, const int fetch, const int is_bf16,
                        const struct job *job, int64_t panel, int64_t row) {
    const struct vkv_linear *args = job->args;
    __m256 low[ROWS], high[ROWS]; /* [panels][rows] */
    FOR_ROWS(i, rows * panels) low[i] = high[i] = _mm256_setzero_ps();
    if (args->bias)
        FOR_ROWS(i, rows * panels) {
            low[i] = _mm256_loadu_ps(args->bias + (panel + i / rows) * PANEL);
            high[i] = _mm256_loadu_ps(args->bias + (panel + i / rows) * PANEL + 8);
        }
    if (args->addend)
        FOR_ROWS(i, rows * panels) {
            const float *from = args->addend + (row + i % rows) * (int64_t)args->num_columns
                + (panel + i / rows) * (PANEL / 2);
            low[i] = _mm256_add_ps(low[i], _mm256_loadu_ps(from));
            high[i] = _mm256_add_ps(high[i], _mm256_loadu_ps(from + args->num_columns / 2));
        }
    const int64_t panel_words = (int64_t)PANEL * args->num_words;
    const int32_t *weight = args->weight + panel * panel_words, *end = weight + panel_words;
    const float *inputs = job->inputs + row * job->dim;
    for (; weight < end; weight += is_bf16 ? PANEL : 2 * PANEL, inputs += 2 * rows)
        FOR_ROWS(p, panels) {
            const int32_t *words = weight + p * panel_words;
            if (fetch) __builtin_prefetch((const char *)words + AHEAD_BYTES);
            if (fetch && !is_bf16) __builtin_prefetch((const char *)words + AHEAD_BYTES + 64);
            __m256i first = _mm256_loadu_si256((const __m256i *)words);
            __m256i second = _mm256_loadu_si256((const __m256i *)(words + 8));
            __m256 a = _mm256_castsi256_ps(is_bf16 ? _mm256_slli_epi32(first, 16) : first);
            __m256 b = _mm256_castsi256_ps(is_bf16 ? _mm256_slli_epi32(second, 16) : second);
            FOR_ROWS(r, rows) {
                const __m256 input = _mm256_broadcast_ss(inputs + r);
                low[p * rows + r] = _mm256_fmadd_ps(a, input, low[p * rows + r]);
                high[p * rows + r] = _mm256_fmadd_ps(b, input, high[p * rows + r]);
            }
            if (is_bf16) {
                __m256i upper = _mm256_load_si256((const __m256i *)UPPER_HALF);
                if (rows * panels > 3) {
                    first = load_again(words);
                    second = load_again(words + 8);
                }
                if (rows * panels == ROWS) upper = load_again(UPPER_HALF);
                a = _mm256_castsi256_ps(_mm256_and_si256(first, upper));
                b = _mm256_castsi256_ps(_mm256_and_si256(second, upper));
            } else {
                a = _mm256_loadu_ps((const float *)words + PANEL);
                b = _mm256_loadu_ps((const float *)words + PANEL + 8);
            }
            FOR_ROWS(r, rows) {
                const __m256 input = _mm256_broadcast_ss(inputs + rows + r);
                low[p * rows + r] = _mm256_fmadd_ps(a, input, low[p * rows + r]);
                high[p * rows + r] = _mm256_fmadd_ps(b, input, high[p * rows + r]);
            }
        }
    float sums[ROWS * PANEL];
    FOR_ROWS(i, rows * panels) {
        _mm256_storeu_ps(sums + i * PANEL, low[i]);
        _mm256_storeu_ps(sums + i * PANEL + 8, high[i]);
    }
    for (int p = 0; p < panels; p++)
        write_out(is_bf16, args, sums + p * rows * PANEL, rows, panel + p, row);
}

/* Rows against the panels from `first` to `last`. Their number becomes a constant, so that sums stay
 * in registers. */
INLINE TARGET void tiles(const int rows, const int fetch, const int is_bf16, const struct job *job,
                         int64_t first, int64_t last, int64_t row) {
    const int panels = rows <= ROWS / 2 ? 2 : 1;
    for (; first + panels <= last; first += panels)
        tile(rows, panels, fetch, is_bf16, job, first, row);
    if (first < last) tile(rows, 1, fetch, is_bf16, job, first, row);
}

/* Tiles after the first have four rows or more. */
TARGET static void tiles_of(int64_t rows, int fetch, const struct job *job, int64_t first,
                            int64_t last, int64_t row) {
#define FETCHING(n)                                                   \
    case n: tiles(n, 1, 0, job, first, last, row); break;             \
    case n + ROWS: tiles(n, 1, 1, job, first, last, row); break;
#define FINDING(n)                                                    \
    case n + 2 * ROWS: tiles(n, 0, 0, job, first, last, row); break;  \
    case n + 3 * ROWS: tiles(n, 0, 1, job, first, last, row); break;
    switch (rows + ROWS * ((job->args->dtype == VKV_BFLOAT16) + 2 * !fetch)) {
        FETCHING(1) FETCHING(2) FETCHING(3) FETCHING(4) FETCHING(5) FETCHING(6)
        FINDING(4) FINDING(5) FINDING(6)
    }
#undef FETCHING
#undef FINDING
}

static int64_t num_panels(const struct vkv_linear *args) {
    return (args->num_columns + PANEL - 1) / PANEL;
}

TARGET static void multiply(void *data) {
    struct job own = *(const struct job *)data;
    struct turn turn = begin_turn(own.ranges);
    if (own.num_tiles == 1) { /* lines that another core has widened would take longer to come */
        own.inputs += turn.range * own.args->num_rows * own.dim;
        widen_rows(&own, 0, own.args->num_rows);
    }
    int64_t first, end;
    while (next_panels(own.ranges, &turn, own.share, &first, &end)) {
        const int64_t last = first + own.share < end ? first + own.share : end;
        for (int64_t t = 0; t < own.num_tiles; t++) {
            const int64_t row = first_row(&own, t), rows = first_row(&own, t + 1) - row;
            tiles_of(rows, t == 0, &own, first, last, row);
        }
    }
}

/* On all threads or one: an OpenMP runtime lets those go that a smaller team leaves out. */
static void run(struct job *job, void (*work)(void *), int threaded) {
    if (threaded && job->args->num_threads > 1 && job->args->parallel)
        job->args->parallel(work, job, (unsigned)job->args->num_threads, 0);
    else
        work(job);
}

int64_t vkv_linear_avx2(const struct vkv_linear *args) {
    struct ranges ranges;
    struct job job = {.args = args, .inputs = args->workspace, .ranges = &ranges};
    job.dim = args->num_words * (args->dtype == VKV_BFLOAT16 ? 2 : 1);
    const int64_t elements = args->num_rows * job.dim;
    job.num_tiles = (args->num_rows + ROWS - 1) / ROWS;
    divide(&ranges, num_panels(args), 2, args->parallel ? args->num_threads : 1);
    const int64_t copies = job.num_tiles == 1 ? ranges.count : 1;
    const int64_t needed = copies * elements * (int64_t)sizeof(float);
    if (args->workspace_bytes < needed) return needed;
    const int64_t even = num_panels(args) / (SHARES_A_THREAD * (int64_t)args->num_threads);
    job.share = SHARE_BYTES / (4 * PANEL * (int64_t)args->num_words);
    if (job.share > even) job.share = even;
    job.share += job.share % 2; /* in twos */
    if (job.share < 2) job.share = 2;
    if (job.num_tiles > 1) run(&job, widen, elements > THREADED_ELEMENTS);
    run(&job, multiply, num_panels(args) > job.share);
    return 0;
}

#endif
