/* Linear layers: how their weights lie, and which kernel reads them. */
#include "kernels.h"

#include <stddef.h>

/* The column of the weight that lies at a column of the panels. */
static int64_t column_at(int64_t panel, int64_t within, int64_t panel_columns,
                         int64_t num_columns, int32_t gated) {
    const int64_t half = panel_columns / 2;
    if (!gated) return panel * panel_columns + within;
    return panel * half + within % half + (within < half ? 0 : num_columns / 2);
}

void vkv_pack(const int32_t *weight, int32_t *packed, int64_t num_columns, int64_t num_words,
              int64_t panel_columns, int32_t gated) {
    const int64_t panels = (num_columns + panel_columns - 1) / panel_columns;
    for (int64_t p = 0; p < panels; p++)
        for (int64_t first = 0; first < num_words; first += 16)
            for (int64_t c = 0; c < panel_columns; c++) {
                const int64_t column = column_at(p, c, panel_columns, num_columns, gated);
                const int64_t last = first + 16 < num_words ? first + 16 : num_words;
                for (int64_t i = first; i < last; i++)
                    packed[(p * num_words + i) * panel_columns + c] =
                        column < num_columns ? weight[column * num_words + i] : 0;
            }
}

void vkv_unpack(const int32_t *packed, int32_t *weight, int64_t num_columns, int64_t num_words,
                int64_t panel_columns, int32_t gated) {
    const int64_t panels = (num_columns + panel_columns - 1) / panel_columns;
    for (int64_t p = 0; p < panels; p++)
        for (int64_t c = 0; c < panel_columns; c++) {
            const int64_t column = column_at(p, c, panel_columns, num_columns, gated);
            if (column >= num_columns) continue;
            for (int64_t i = 0; i < num_words; i++)
                weight[column * num_words + i] = packed[(p * num_words + i) * panel_columns + c];
        }
}

#if defined(__x86_64__)

static int has_avx512(int32_t dtype) {
    if (dtype == VKV_BFLOAT16 && !__builtin_cpu_supports("avx512bf16")) return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

static int has_amx_bf16(void) {
    uint32_t a = 7, b, c = 0, d;
    __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return d >> 22 & 1;
}

int32_t vkv_has_panel(int32_t panel_columns, int32_t dtype) {
    __builtin_cpu_init();
    if (panel_columns == VKV_PANEL_AVX512) return has_avx512(dtype);
    return panel_columns == VKV_PANEL_AVX2 && __builtin_cpu_supports("avx2") &&
           __builtin_cpu_supports("fma");
}

int32_t vkv_best_panel(int32_t dtype) {
    if (vkv_has_panel(VKV_PANEL_AVX512, dtype)) return VKV_PANEL_AVX512;
    return vkv_has_panel(VKV_PANEL_AVX2, dtype) ? VKV_PANEL_AVX2 : 0;
}

int32_t vkv_has_matrix_unit(int32_t dtype) {
    __builtin_cpu_init();
    return dtype == VKV_BFLOAT16 && has_amx_bf16();
}

int64_t vkv_linear(const struct vkv_linear *args) {
    return args->panel_columns == VKV_PANEL_AVX512 ? vkv_linear_avx512(args)
                                                   : vkv_linear_avx2(args);
}

#else

int32_t vkv_has_panel(int32_t panel_columns, int32_t dtype) {
    return (void)panel_columns, (void)dtype, 0;
}
int32_t vkv_best_panel(int32_t dtype) { return (void)dtype, 0; }
int32_t vkv_has_matrix_unit(int32_t dtype) { return (void)dtype, 0; }
int64_t vkv_linear(const struct vkv_linear *args) { return (void)args, 0; }

#endif
