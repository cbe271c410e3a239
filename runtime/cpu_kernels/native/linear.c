/* Linear layers: which kernel reads their weights. */
#include "kernels.h"

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
