/* What adapters add to a linear: out[r] += scale (x[r] downᵀ) up, for rows of several adapters.
 *
 * Rows of one adapter are taken four at a time, so that its weights are read once for four; those
 * that are left over one at a time. Both sums of a row have one order, whatever other rows there
 * are. Written with the compiler's vectors of 16 floats, which it makes two or four of where
 * registers are shorter; there are fewer sums at a time then, so that each has a register. For
 * bfloat16 with AVX512-BF16 there is `lora_avx512.c`.
 */
#include "kernels.h"
#include "rows.h"
#include "scalars.h"

#include <stddef.h>

enum { ROWS = 4, RANKS = 4, VECTORS = 4, LANES = 16, CHUNK = 512, MOST_RANK = VKV_LORA_MOST_RANK };

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2), may_alias));

#define LOAD(goal, is_bf16, from, at)                                                          \
    do {                                                                                       \
        if (is_bf16)                                                                           \
            goal = (vec)(__builtin_convertvector(*(const halves *)((const uint16_t *)(from) + (at)), \
                                                 words) << 16);                                \
        else                                                                                   \
            goal = *(const vec *)((const float *)(from) + (at));                               \
    } while (0)

/* Unrolled, so that every sum has a register: none may be reached by an address. */
#define FOR(i, count) _Pragma("GCC unroll 4") for (int i = 0; i < count; i++)

INLINE float one(const int is_bf16, const void *from, int64_t at) {
    return is_bf16 ? from_bf16(((const uint16_t *)from)[at]) : ((const float *)from)[at];
}

INLINE float total(const vec *lanes) {
    float sums[LANES];
    memcpy(sums, lanes, sizeof sums);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) sums[i] += sums[i + width];
    return sums[0];
}

/* Adds to sums[r][j] the products of `count` inputs of some rows with `ranks` rows of `down`. */
INLINE void shrink(const int rows, const int ranks, const int is_bf16, float (*x)[CHUNK],
                   const void *down, int64_t stride, int count, float (*sums)[MOST_RANK], int j) {
    vec acc[ROWS][RANKS];
    FOR(r, rows) FOR(k, ranks) acc[r][k] = (vec){0};
    int i = 0;
    for (; i + LANES <= count; i += LANES) {
        vec weight[RANKS];
        FOR(k, ranks) LOAD(weight[k], is_bf16, down, (j + k) * stride + i);
        FOR(r, rows) {
            const vec input = *(const vec *)(x[r] + i);
            FOR(k, ranks) acc[r][k] += input * weight[k];
        }
    }
    vec lanes[ROWS][RANKS];
    FOR(r, rows) FOR(k, ranks) lanes[r][k] = acc[r][k];
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < ranks; k++) {
            float sum = total(&lanes[r][k]);
            for (int at = i; at < count; at++) /* as one operation, or compilers choose */
                sum = __builtin_fmaf(x[r][at], one(is_bf16, down, (j + k) * stride + at), sum);
            sums[r][j + k] += sum;
        }
}

INLINE void put(const struct vkv_lora *a, int64_t at, const float *sums, int count) {
    float old[VECTORS * LANES];
    if (a->sets) {
        memcpy((float *)a->out + at, sums, 4 * (size_t)count);
    } else if (a->dtype == VKV_BFLOAT16) {
        uint16_t *out = (uint16_t *)a->out + at;
        for (int i = 0; i < count; i++) old[i] = from_bf16(out[i]) + sums[i];
        for (int i = 0; i < count; i++) out[i] = to_bf16(old[i]);
    } else {
        float *out = (float *)a->out + at;
        for (int i = 0; i < count; i++) out[i] += sums[i];
    }
}

INLINE void expand(const int rows, const int vectors, const int is_bf16, const struct vkv_lora *a,
                   const void *up, int rank, const int32_t *at, float (*low)[MOST_RANK]) {
    const int64_t width = a->out_features, step = vectors * LANES;
    int64_t column = 0;
    for (; column + step <= width; column += step) {
        vec acc[ROWS][VECTORS];
        FOR(r, rows) FOR(v, vectors) acc[r][v] = (vec){0};
        for (int j = 0; j < rank; j++) {
            vec weight[VECTORS];
            FOR(v, vectors) LOAD(weight[v], is_bf16, up, j * width + column + v * LANES);
            FOR(r, rows) FOR(v, vectors) acc[r][v] += weight[v] * low[r][j];
        }
        float sums[ROWS][VECTORS * LANES];
        FOR(r, rows) FOR(v, vectors) *(vec *)(sums[r] + v * LANES) = acc[r][v];
        for (int r = 0; r < rows; r++)
            put(a, at[r] * a->out_stride + column, sums[r], vectors * LANES);
    }
    if (column == width) return;
    const int left = (int)(width - column);
    for (int r = 0; r < rows; r++) {
        float sums[VECTORS * LANES] = {0};
        for (int j = 0; j < rank; j++)
            for (int i = 0; i < left; i++)
                sums[i] = __builtin_fmaf(one(is_bf16, up, j * width + column + i), low[r][j], sums[i]);
        put(a, at[r] * a->out_stride + column, sums, left);
    }
}

/* Rows `at` of one adapter; with `is_wide` there are registers for 16 sums of 16 floats. */
INLINE void some_rows(const int rows, const int is_wide, const int is_bf16,
                      const struct vkv_lora *a, const struct vkv_lora_entry *entry,
                      const int32_t *at) {
    float x[ROWS][CHUNK], low[ROWS][MOST_RANK];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < entry->rank; j++) low[r][j] = 0;
    for (int first = 0; first < a->in_features; first += CHUNK) {
        const int left = a->in_features - first, count = left < CHUNK ? left : CHUNK;
        for (int r = 0; r < rows; r++)
            take(a->inputs, at[r] * a->input_stride + first, count, a->dtype, x[r]);
        const void *down = (const char *)entry->down + (is_bf16 ? 2 : 4) * first;
        int j = 0;
        for (; is_wide && j + RANKS <= entry->rank; j += RANKS)
            shrink(rows, RANKS, is_bf16, x, down, a->in_features, count, low, j);
        for (; j < entry->rank; j++)
            shrink(rows, 1, is_bf16, x, down, a->in_features, count, low, j);
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < entry->rank; j++) low[r][j] *= entry->scale;
    expand(rows, is_wide ? VECTORS : 1, is_bf16, a, entry->up, entry->rank, at, low);
}

INLINE void rows_of(const int is_wide, const int is_bf16, const struct vkv_lora *a,
                    const struct vkv_lora_entry *entry, const int32_t *at, int count) {
    for (; count >= ROWS; count -= ROWS, at += ROWS) some_rows(ROWS, is_wide, is_bf16, a, entry, at);
    for (; count; count--, at++) some_rows(1, is_wide, is_bf16, a, entry, at);
}

INLINE void tiles(const int is_wide, const int has_dots, const void *data, int64_t first,
                  int64_t last) {
    const struct vkv_lora *a = data;
    for (int64_t t = first; t < last; t++) {
        const struct vkv_lora_tile *tile = a->plan->tiles + t;
        const int32_t *rows = a->plan->rows + tile->first;
        const struct vkv_lora_entry *entry = tile->adapter ? tile->adapter + a->site : NULL;
        if (entry && entry->rank) {
            if (has_dots) vkv_lora_rows_avx512(a, entry, rows, tile->count);
            else if (a->dtype == VKV_BFLOAT16) rows_of(is_wide, 1, a, entry, rows, tile->count);
            else rows_of(is_wide, 0, a, entry, rows, tile->count);
        } else if (a->sets) {
            for (int r = 0; r < tile->count; r++)
                memset((float *)a->out + rows[r] * a->out_stride, 0, 4 * (size_t)a->out_features);
        }
    }
}

INLINE void narrow(const void *data, int64_t first, int64_t last) { tiles(0, 0, data, first, last); }

VERSION(narrow, plain, )
#if defined(__x86_64__)
INLINE void wide(const void *data, int64_t first, int64_t last) { tiles(1, 0, data, first, last); }
INLINE void dots(const void *data, int64_t first, int64_t last) { tiles(0, 1, data, first, last); }
VERSION(wide, avx512, __attribute__((target("avx512f"))))
VERSION(narrow, avx2, __attribute__((target("avx2,fma"))))
VERSION(dots, plain, )

static rows_kernel best(int32_t dtype, int32_t most) {
    __builtin_cpu_init();
    const int is_bf16 = dtype == VKV_BFLOAT16 && vkv_has_panel(VKV_PANEL_AVX512, dtype);
    if (most >= VKV_LORA_AVX512_BF16 && is_bf16) return dots_plain;
    if (most >= VKV_LORA_AVX512 && __builtin_cpu_supports("avx512f")) return wide_avx512;
    if (most >= VKV_LORA_AVX2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return narrow_avx2;
    return narrow_plain;
}
#else
static rows_kernel best(int32_t dtype, int32_t most) {
    return (void)dtype, (void)most, narrow_plain;
}
#endif

int64_t vkv_lora(const struct vkv_lora *args) {
    const int64_t elements = 16 * ((int64_t)args->in_features + args->out_features);
    run(best(args->dtype, args->most), args, args->plan->num_tiles, elements, args->num_threads,
        args->parallel);
    return 0;
}
