/* What the kernel of an instruction set supplies, and int4.c calls. */
#ifndef VKV_INT4_KERNEL_H
#define VKV_INT4_KERNEL_H

#include "int4.h"

enum {
    TILE = 32,    /* outputs */
    BLOCK = 8,    /* inputs of one register of codes, for half a tile */
    STRETCH = 256, /* inputs, at most, that are summed before scales come in */
    KEPT_BYTES = 2 * STRETCH * TILE /* of a stretch's weights, as an instruction multiplies them */
};

/* What a kernel keeps of a stretch of a row's inputs. */
struct vkv_int4_note {
    float sum;    /* of the inputs as they are multiplied */
    float factor; /* that their products are to be multiplied by */
};

/* A stretch of a tile, or two of the same length, the second right behind the first. */
struct vkv_int4_stretches {
    int64_t count, length;
    const uint8_t *codes;
    const uint16_t *inputs;             /* arranged */
    const void *scales;                 /* [TILE] */
    const uint8_t *zeros;               /* [TILE], or NULL: all 8 */
    const struct vkv_int4_note *notes;  /* [count][rows], or NULL */
    int64_t scales_apart;               /* from the first to the second; zeros too */
    int32_t scale_type;
    void *weights;                      /* KEPT_BYTES for a single stretch's, or NULL */
    int32_t kept;                       /* they are those of the codes; or they are to be */
};

/* A stretch is up to STRETCH inputs of one group, a multiple of BLOCK. A result is a sum in one
 * order, whatever the number of rows, and of stretches at a time. */
struct vkv_int4_kernel {
    int64_t rows;        /* of the inputs that it takes at a time, at most */
    int64_t pair_rows;   /* up to so many rows take two stretches at a time */
    int32_t reads_a_row; /* a single row may be read as it is given, unless it needs notes */
    int32_t centred;     /* codes are multiplied less 8: notes matter to other zeros only */
    int32_t keeps;       /* several blocks of rows share the weights that the first one kept */

    /* Brings a stretch of some rows side by side, two bytes an input, as `multiply` reads them, and
     * fills notes [rows]. */
    void (*arrange)(const uint16_t *inputs, int64_t rows, int64_t in_features, int64_t length,
                    void *arranged, struct vkv_int4_note *notes);

    /* totals [rows][TILE] += the products of one stretch, or of two in turn. */
    void (*multiply)(int64_t rows, const struct vkv_int4_stretches *stretches, float *totals);

    /* totals [num_rows][TILE] as bfloat16, to a tile of the outputs. */
    void (*write_out)(const struct vkv_int4 *args, int64_t tile, const float *totals);
};

extern const struct vkv_int4_kernel vkv_int4_avx2;      /* AVX2 and FMA */
extern const struct vkv_int4_kernel vkv_int4_avx512;    /* AVX512-BF16 */
extern const struct vkv_int4_kernel vkv_int4_int8_avx2; /* inputs of 8 bits; AVX2 and FMA */
extern const struct vkv_int4_kernel vkv_int4_int8_vnni; /* the same; AVX512-VNNI */

/* What a kernel without instructions for it writes out with. */
void vkv_int4_write_out(const struct vkv_int4 *args, int64_t tile, const float *totals);

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline float to_float(uint16_t x) {
    const union { uint32_t bits; float value; } both = {(uint32_t)x << 16};
    return both.value;
}

#endif
