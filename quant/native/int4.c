/* Products by 4-bit weights on a CPU with AVX512-BF16.
 *
 * A code is looked up as the bfloat16 of code - 8, which is exact, and multiplied as it is: scales
 * come in once a group, in float32, and so do zeros, through the sum of the group's inputs. So
 * weights are never rounded.
 *
 * Codes are looked up in registers, anew for every dozen rows: that costs a tenth of the product
 * itself, less than to write the looked-up weights anywhere and read them again.
 */
#include "int4.h"

#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#endif

enum {
    TILE = 32,     /* outputs */
    BLOCK = 8,     /* inputs of one register of codes, for half a tile */
    ROWS = 12,     /* at a time: their sums fill the registers */
    STRETCH = 256, /* inputs, at most, that are summed before scales come in */
    AHEAD = 2048   /* bytes of codes that are fetched before they are needed */
};

struct job {
    const struct vkv_int4 *args;
    int64_t next_tile, next_rows, next_thread; /* atomic */
    int64_t block_rows, num_blocks;            /* rows of a block, and blocks */
    const int32_t *inputs;                     /* pairs: [block][in_features / 2][rows] */
    const float *sums;                         /* [block][groups][rows], if there are zeros */
    char *scratch;
    int64_t scratch_bytes;
};

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

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

/* Loops over rows are unrolled, so that every sum has a register. */
#define FOR_ROWS _Pragma("GCC unroll 12") for (int m = 0; m < rows; m++)

/* totals [rows][TILE] += scales * (sums + (8 - zeros) * inputs) over a stretch of one group. */
static inline __attribute__((always_inline)) void
scale_in(const int rows, const int half, __m512 *sums, float *totals, const float *scales,
         const uint8_t *zeros, const float *input_sums) {
    const __m512 scale = _mm512_loadu_ps(scales + 16 * half);
    if (zeros) {
        const __m128i bytes = _mm_loadu_si128((const __m128i *)(zeros + 16 * half));
        const __m512i less = _mm512_sub_epi32(_mm512_set1_epi32(8), _mm512_cvtepu8_epi32(bytes));
        const __m512 shift = _mm512_cvtepi32_ps(less);
        FOR_ROWS sums[m] = _mm512_fmadd_ps(shift, _mm512_set1_ps(input_sums[m]), sums[m]);
    }
    FOR_ROWS {
        float *total = totals + m * TILE + 16 * half;
        _mm512_storeu_ps(total, _mm512_fmadd_ps(scale, sums[m], _mm512_loadu_ps(total)));
    }
}

/* Sums of one stretch of one tile for a block of rows. */
static inline __attribute__((always_inline)) void
sum_products(const int rows, const uint8_t *codes, const int32_t *inputs, int64_t num_blocks,
           __m512 *low_sums, __m512 *high_sums) {
    const __m512i table = code_values();
    const __m512 none = _mm512_setzero_ps();
    const int odd = rows <= 3 ? ROWS / 2 : 0; /* two sums for one, lest each wait for the last */
    FOR_ROWS low_sums[m] = high_sums[m] = low_sums[m + odd] = high_sums[m + odd] = none;
    for (int64_t b = 0; b < num_blocks; b++, codes += 128, inputs += 4 * rows) {
        const __m512i first = _mm512_loadu_si512(codes), second = _mm512_loadu_si512(codes + 64);
        _mm_prefetch((const char *)codes + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)codes + AHEAD + 64, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int s = 0; s < 4; s++) {
            const __m512i low = look_up(table, first, s), high = look_up(table, second, s);
            FOR_ROWS {
                const __m512i pair = _mm512_set1_epi32(inputs[s * rows + m]);
                const int at = m + (s & 1) * odd;
                low_sums[at] = add_product(low_sums[at], low, pair);
                high_sums[at] = add_product(high_sums[at], high, pair);
            }
        }
    }
    if (odd) FOR_ROWS {
        low_sums[m] = _mm512_add_ps(low_sums[m], low_sums[m + odd]);
        high_sums[m] = _mm512_add_ps(high_sums[m], high_sums[m + odd]);
    }
}

static inline __attribute__((always_inline)) void
stretch_of(const int rows, const uint8_t *codes, const int32_t *inputs,
           int64_t num_blocks, float *totals, const float *scales, const uint8_t *zeros,
           const float *input_sums) {
    __m512 low[ROWS], high[ROWS];
    sum_products(rows, codes, inputs, num_blocks, low, high);
    scale_in(rows, 0, low, totals, scales, zeros, input_sums);
    scale_in(rows, 1, high, totals, scales, zeros, input_sums);
}

/* The number of rows becomes a constant, so that sums stay in registers. */
static void stretch(int64_t rows, const uint8_t *codes, const int32_t *inputs, int64_t num_blocks, float *totals, const float *scales,
                    const uint8_t *zeros, const float *input_sums) {
    switch (rows) {
#define CASE(n)                                                                            \
    case n:                                                                                \
        stretch_of(n, codes, inputs, num_blocks, totals, scales, zeros, input_sums); \
        break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
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

static void multiply_tile(const struct job *job, int64_t tile, char *scratch) {
    const struct vkv_int4 *args = job->args;
    const int64_t groups = args->in_features / args->group_size, m_all = args->num_rows;
    const uint8_t *codes = (const uint8_t *)args->codes + tile * args->in_features * (TILE / 2);
    float *totals = (float *)scratch; /* [num_rows][TILE] */
    memset(totals, 0, (size_t)(m_all * TILE) * sizeof(float));
    for (int64_t g = 0; g < groups; g++) {
        const float *scales = args->scales + (tile * groups + g) * TILE;
        const uint8_t *zeros = args->zeros ? args->zeros + (tile * groups + g) * TILE : NULL;
        for (int64_t k = g * args->group_size, last = k + args->group_size; k < last;) {
            const int64_t length = least(STRETCH, last - k), num_blocks = length / BLOCK;
            /* the sum of a group's inputs comes in with the group's last stretch */
            const uint8_t *with = k + length == last ? zeros : NULL;
            for (int64_t b = 0; b < job->num_blocks; b++) {
                const int64_t row = b * job->block_rows;
                const int64_t rows = least(job->block_rows, m_all - row);
                const int32_t *inputs =
                    job->inputs + row * (args->in_features / 2) + k / 2 * rows;
                stretch(rows, codes + k * (TILE / 2), inputs, num_blocks,
                        totals + row * TILE, scales, with, job->sums + row * groups + g * rows);
            }
            k += length;
        }
    }
    write_out(args, tile, totals);
}

static void multiply(void *data) {
    struct job *job = data;
    const int64_t thread = __atomic_fetch_add(&job->next_thread, 1, __ATOMIC_RELAXED);
    if (thread >= job->args->num_threads) return; /* more came than there is scratch for */
    char *scratch = job->scratch + thread * job->scratch_bytes;
    const int64_t num_tiles = (job->args->out_features + TILE - 1) / TILE;
    for (;;) {
        const int64_t tile = __atomic_fetch_add(&job->next_tile, 1, __ATOMIC_RELAXED);
        if (tile >= num_tiles) return;
        multiply_tile(job, tile, scratch);
    }
}

static float to_float(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Brings the rows of each block side by side, and sums the inputs of every group. */
static void arrange(void *data) {
    struct job *job = data;
    const struct vkv_int4 *args = job->args;
    const int64_t pairs = args->in_features / 2, groups = args->in_features / args->group_size;
    for (;;) {
        const int64_t block = __atomic_fetch_add(&job->next_rows, 1, __ATOMIC_RELAXED);
        if (block >= job->num_blocks) return;
        const int64_t row = block * job->block_rows;
        const int64_t rows = least(job->block_rows, args->num_rows - row);
        const int32_t *from = (const int32_t *)args->inputs + row * pairs;
        int32_t *to = (int32_t *)job->inputs + row * pairs;
        for (int64_t p = 0; p < pairs; p += 16) /* a line of each row at a time */
            for (int64_t m = 0; m < rows; m++)
                for (int64_t q = p; q < least(p + 16, pairs); q++)
                    to[q * rows + m] = from[m * pairs + q];
        if (!args->zeros) continue;
        float *sums = (float *)job->sums + row * groups;
        for (int64_t g = 0; g < groups; g++)
            for (int64_t m = 0; m < rows; m++) {
                const uint16_t *x =
                    (const uint16_t *)args->inputs + (row + m) * args->in_features;
                float sum[8] = {0};
                for (int64_t k = g * args->group_size; k < (g + 1) * args->group_size; k += 8)
                    for (int i = 0; i < 8; i++) sum[i] += to_float(x[k + i]);
                sums[g * rows + m] = ((sum[0] + sum[1]) + (sum[2] + sum[3])) +
                                     ((sum[4] + sum[5]) + (sum[6] + sum[7]));
            }
    }
}

static void run(const struct job *job, void (*work)(void *), int threaded) {
    if (threaded && job->args->parallel && job->args->num_threads > 1)
        job->args->parallel(work, (void *)job, (unsigned)job->args->num_threads, 0);
    else
        work((void *)job);
}

static int64_t multiply_rows(const struct vkv_int4 *args) {
    struct job job = {.args = args};
    const int64_t groups = args->in_features / args->group_size;
    job.num_blocks = (args->num_rows + ROWS - 1) / ROWS;
    job.block_rows = (args->num_rows + job.num_blocks - 1) / job.num_blocks;
    job.num_blocks = (args->num_rows + job.block_rows - 1) / job.block_rows;
    job.scratch_bytes = args->num_rows * TILE * 4;
    const int64_t inputs_bytes = round_up(args->num_rows * args->in_features * 2, 64);
    const int64_t sums_bytes = round_up(args->num_rows * groups * 4, 64);
    const int64_t needed = inputs_bytes + sums_bytes + args->num_threads * job.scratch_bytes;
    if (args->workspace_bytes < needed) return needed;
    job.inputs = args->workspace;
    job.sums = (float *)((char *)args->workspace + inputs_bytes);
    job.scratch = (char *)args->workspace + inputs_bytes + sums_bytes;
    if (args->num_rows == 1 && !args->zeros)
        job.inputs = args->inputs; /* one row lies as it should */
    else
        run(&job, arrange, args->num_rows * args->in_features > 65536);
    run(&job, multiply, 1);
    return 0;
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

int32_t vkv_int4_supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bf16");
}

int64_t vkv_int4_multiply(const struct vkv_int4 *args) {
    return vkv_int4_supported() ? multiply_rows(args) : -1;
}

#else

int32_t vkv_int4_supported(void) { return 0; }

int64_t vkv_int4_multiply(const struct vkv_int4 *args) {
    (void)args;
    return -1;
}

#endif
