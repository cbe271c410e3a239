/* Products by 4-bit weights: the ABI between native.py and int4.c.
 *
 * Element (n, k) of the weight is (code - zero) * scale, with a scale and a zero for every group
 * of `group_size` consecutive k. Weights lie in tiles of 32 outputs:
 *
 *   codes   uint16 [N/32][K/8][2][16][2]  the four nibbles of [tile][block][half][lane][parity],
 *                                         lowest first, are k = 8 block + 2 nibble + parity of
 *                                         output 32 tile + 16 half + lane
 *   scales  of the scale type  [N/32][K/group_size][32]
 *   zeros   uint8  [N/32][K/group_size][32], or NULL where all are 8
 *
 * with N rounded up to a multiple of 32.
 */
#ifndef VKV_INT4_H
#define VKV_INT4_H

#include <stdint.h>

/* An OpenMP runtime's way to run work(data) on several threads at once (GOMP_parallel). */
typedef void (*vkv_parallel)(void (*work)(void *), void *data, unsigned num_threads,
                             unsigned flags);

enum vkv_int4_scales { VKV_INT4_FLOAT32 = 0, VKV_INT4_FLOAT16 = 1, VKV_INT4_BFLOAT16 = 2 };

struct vkv_int4 {
    const void *inputs; /* bfloat16 [num_rows, in_features] */
    void *out;          /* bfloat16 [num_rows, out_features] */
    const void *codes;
    const void *scales;
    const uint8_t *zeros;
    void *workspace; /* 64-byte aligned */
    int64_t workspace_bytes;
    int64_t num_rows, in_features, out_features; /* in_features: a multiple of group_size */
    int64_t group_size;                          /* a multiple of 8 */
    int32_t scale_type;                          /* enum vkv_int4_scales */
    /* "avx512_bf16" or "avx2"; for inputs rounded to 8 bits "int8_avx512_vnni" or "int8_avx2" */
    const char *instruction_set;
    int32_t num_threads;
    vkv_parallel parallel; /* NULL: everything on the calling thread */
};

/* Fills out. Returns 0, or the workspace bytes it needs if it was given fewer, with nothing done;
 * -1 if this processor lacks the instruction set. */
int64_t vkv_int4_multiply(const struct vkv_int4 *args);

/* Whether this processor has the instruction set, and there is a kernel for it. */
int32_t vkv_int4_supported(const char *instruction_set);

/* Codes two a byte, the first in the low nibble, to tiles and back. Behind the last output tiles are
 * 0. */
struct vkv_int4_codes {
    uint8_t *packed; /* [out_features][in_features / 2] */
    void *tiles;
    int64_t out_features, in_features;
    int32_t num_threads;
    vkv_parallel parallel;
};
void vkv_int4_pack(const struct vkv_int4_codes *args);
void vkv_int4_unpack(const struct vkv_int4_codes *args);

#endif
