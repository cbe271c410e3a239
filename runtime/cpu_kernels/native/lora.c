/* What adapters add to a linear: out[r] += scale (x[r] downᵀ) up, for rows of several adapters.
 *
 * Rows of one adapter are taken four at a time, so that its weights are read once for four; those
 * that are left over one at a time. Both sums of a row have one order, whatever other rows there
 * are. Written with the compiler's vectors (`lora_rows.h`), as many sums at a time as have a
 * register each. For bfloat16 with AVX512-BF16 there is `lora_avx512.c`.
 */
#include "kernels.h"
#include "rows.h"
#include "scalars.h"

#include <stddef.h>

enum { ROWS = 4, CHUNK = 512, MOST_RANK = VKV_LORA_MOST_RANK, MOST_COLUMNS = 64 };

/* Unrolled, so that every sum has a register: none may be reached by an address. */
#define FOR(i, count) _Pragma("GCC unroll 4") for (int i = 0; i < count; i++)

INLINE float one(const int is_bf16, const void *from, int64_t at) {
    return is_bf16 ? from_bf16(((const uint16_t *)from)[at]) : ((const float *)from)[at];
}

INLINE void put(const struct vkv_lora *a, int64_t at, const float *sums, int count) {
    float old[MOST_COLUMNS];
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

#define LANES 16
#define RANKS 4
#define VECTORS 4
#define NAME(name) name##_16
#include "lora_rows.h"
#undef LANES
#undef RANKS
#undef VECTORS
#undef NAME

#define LANES 8
#define RANKS 2
#define VECTORS 2
#define NAME(name) name##_8
#include "lora_rows.h"

INLINE void tiles(const int is_wide, const int has_dots, const void *data, int64_t first,
                  int64_t last) {
    const struct vkv_lora *a = data;
    for (int64_t t = first; t < last; t++) {
        const struct vkv_lora_tile *tile = a->plan->tiles + t;
        const int32_t *rows = a->plan->rows + tile->first;
        const struct vkv_lora_entry *entry = tile->adapter ? tile->adapter + a->site : NULL;
        if (entry && entry->rank) {
            if (has_dots) vkv_lora_rows_avx512(a, entry, rows, tile->count);
            else if (is_wide && a->dtype == VKV_BFLOAT16) rows_16(1, a, entry, rows, tile->count);
            else if (is_wide) rows_16(0, a, entry, rows, tile->count);
            else if (a->dtype == VKV_BFLOAT16) rows_8(1, a, entry, rows, tile->count);
            else rows_8(0, a, entry, rows, tile->count);
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
