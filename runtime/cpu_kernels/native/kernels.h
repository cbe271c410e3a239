/* The CPU kernels between attention calls: the ABI between kernels.py and the C files beside this
 * one. Strides and sizes count elements; the last dimension is contiguous.
 */
#ifndef VKV_KERNELS_H
#define VKV_KERNELS_H

#include <stdint.h>

enum vkv_dtype { VKV_FLOAT32 = 0, VKV_BFLOAT16 = 1 };
enum vkv_gate { VKV_NO_GATE = 0, VKV_SILU = 1, VKV_GELU_TANH = 2 };

/* An OpenMP runtime's way to run work(data) on several threads at once (GOMP_parallel). */
typedef void (*vkv_parallel)(void (*work)(void *), void *data, unsigned num_threads,
                             unsigned flags);

/* out = inputs x weightᵀ + bias, or with a gate, gate(first half) * second half.
 *
 * A row of the input is a number of 32-bit words: pairs of bfloat16, or an even number of floats.
 * The weight lies in panels of some columns, [panel][word][column]: a thread reads it in order, once
 * for every six rows of the input, from the cache all but the first time. The panel's width tells
 * the kernel.
 */
enum { VKV_PANEL_AVX2 = 16, VKV_PANEL_AVX512 = 64 };

struct vkv_linear {
    const void *inputs; /* num_rows rows of num_words words; strides count elements */
    const int32_t *weight;
    const float *bias; /* [panels * panel_columns], in the order of the panels, or NULL */
    const float *addend; /* with a gate: [num_rows, num_columns], added ahead of it; or NULL */
    void *out;         /* [num_rows, num_columns], or half of that with a gate */
    void *workspace;   /* 64-byte aligned */
    int64_t workspace_bytes, input_stride, out_stride;
    int32_t num_rows, num_columns, num_words, panel_columns, gate, dtype;
    int32_t num_threads;
    vkv_parallel parallel; /* NULL: everything on the calling thread */
};

/* Fills out. Returns 0, or the workspace bytes it needs if it was given fewer, with nothing done. */
int64_t vkv_linear(const struct vkv_linear *args);
int64_t vkv_linear_avx2(const struct vkv_linear *args);   /* AVX2 and FMA */
int64_t vkv_linear_avx512(const struct vkv_linear *args); /* AVX512; AVX512-BF16 for bfloat16 */

/* Whether this processor has the instructions of the panels' kernel, and that takes the dtype. */
int32_t vkv_has_panel(int32_t panel_columns, int32_t dtype);

/* The panels to lay a weight out in here; 0 where there is no kernel. */
int32_t vkv_best_panel(int32_t dtype);

/* Whether this processor has a matrix unit for the dtype, which no kernel here uses. */
int32_t vkv_has_matrix_unit(int32_t dtype);

/* Weights [columns of each, num_words], one below the other, to panels (zero behind the last column).
 * With `gated`, the columns of both halves lie in turns of half a panel; then a half is a multiple
 * of half a panel. Returns 0. */
struct vkv_pack {
    const int32_t *const *weights; /* [num_weights] */
    const int64_t *columns;        /* [num_weights] */
    int32_t *packed;
    int64_t num_words;
    int32_t num_weights, panel_columns, gated;
    int32_t num_threads;
    vkv_parallel parallel;
};
int64_t vkv_pack(const struct vkv_pack *args);

/* And back, to one weight [num_columns, num_words]. */
void vkv_unpack(const int32_t *packed, int32_t *weight, int64_t num_columns, int64_t num_words,
                int64_t panel_columns, int32_t gated);

/* The kernels below need no workspace, and return 0. */

/* out[r] = x[r] / sqrt(mean(x[r]²) + eps) * (offset + weight). */
struct vkv_rms_norm {
    const void *inputs; /* [num_rows, dim] */
    const void *weight; /* [dim], of the same dtype */
    void *out;          /* [num_rows, dim], without gaps */
    int64_t input_stride;
    int32_t num_rows, dim, dtype;
    float eps, offset;
    int32_t num_threads;
    vkv_parallel parallel;
};
int64_t vkv_rms_norm(const struct vkv_rms_norm *args);

/* Rotates the halves of every head: out = x * cos + (-second half, first half) * sin. */
struct vkv_rotate {
    const void *inputs; /* [num_tokens, num_heads, dim] */
    const void *cosine; /* [num_tokens, dim], without gaps */
    const void *sine;
    void *out; /* [num_tokens, num_heads, dim], without gaps */
    int64_t token_stride, head_stride;
    int32_t num_tokens, num_heads, dim, dtype;
    int32_t num_threads;
    vkv_parallel parallel;
};
int64_t vkv_rotate(const struct vkv_rotate *args);

/* out[r][i] = gate(x[r][i]) * x[r][dim + i]: the gate, where no linear kernel has it built in. */
struct vkv_gated {
    const void *inputs; /* [num_rows, 2 dim] */
    void *out;          /* [num_rows, dim], without gaps */
    int64_t input_stride;
    int32_t num_rows, dim, dtype, gate;
    int32_t num_threads;
    vkv_parallel parallel;
};
int64_t vkv_gated(const struct vkv_gated *args);

/* out = left + right, a residual connection. */
struct vkv_add {
    const void *left, *right;
    void *out; /* [count], like both without gaps */
    int64_t count;
    int32_t dtype;
    int32_t num_threads;
    vkv_parallel parallel;
};
int64_t vkv_add(const struct vkv_add *args);

/* Draws a token of each row: one whose chance is its share of exp((logit - peak) / temperature) over
 * the tokens of at least exp(floor). */
struct vkv_draw {
    const void *logits;         /* [.., vocab_size], rows `row_stride` apart */
    const int64_t *rows;        /* [num_rows], where each lies in `logits` */
    const float *peaks;         /* [num_rows], the largest logit */
    const float *temperatures;  /* [num_rows] */
    const float *floors;        /* [num_rows], -INFINITY for none */
    const uint64_t *keys;       /* [num_rows], random */
    int64_t *tokens;            /* [num_rows], filled */
    int64_t row_stride;
    int32_t num_rows, vocab_size, dtype;
    int32_t num_threads;
    vkv_parallel parallel;
};
int64_t vkv_draw(const struct vkv_draw *args);

/* What adapters add to the results of a linear, some rows for each of several adapters. */
enum { VKV_LORA_MOST_RANK = 512 };
enum { VKV_LORA_PLAIN, VKV_LORA_AVX2, VKV_LORA_AVX512, VKV_LORA_AVX512_BF16 };
struct vkv_lora_entry { /* of one adapter, at one place in the model */
    const void *down; /* [rank, in_features], of the inputs' dtype */
    const void *up;   /* [rank, out_features] */
    int32_t rank;     /* 0 where it does nothing */
    float scale;
};
struct vkv_lora_tile { /* rows of one adapter */
    const struct vkv_lora_entry *adapter; /* its entries, one for each place; NULL for none */
    int32_t first, count;                 /* which of the plan's rows */
};
struct vkv_lora_plan { /* of a step, for all places: every row is in one tile */
    const struct vkv_lora_tile *tiles;
    const int32_t *rows;
    int64_t num_tiles;
};
struct vkv_lora {
    const struct vkv_lora_plan *plan;
    const void *inputs; /* [num_rows, in_features] */
    void *out;          /* [num_rows, out_features]: of the same dtype, or floats with `sets` */
    int64_t input_stride, out_stride;
    int32_t site, in_features, out_features, dtype;
    int32_t sets; /* rows become the addends, zeros where there are none; or these are added */
    int32_t most; /* the last of VKV_LORA_… that may be taken, if the processor has it */
    int32_t num_threads;
    vkv_parallel parallel;
};
int64_t vkv_lora(const struct vkv_lora *args);
void vkv_lora_rows_avx512(const struct vkv_lora *args, const struct vkv_lora_entry *entry,
                          const int32_t *rows, int count); /* bfloat16, with AVX512-BF16 */

/* A call of a kernel, of this library or another, that returns 0 when it is done, or the bytes of
 * workspace that it lacks. */
struct vkv_call {
    union {
        int64_t (*with_one)(const void *);
        int64_t (*with_two)(const void *, const void *);
    };
    const void *first, *second; /* its arguments; the second NULL if it takes one */
};

/* Makes calls from `first` on. Returns num_calls, or the index of a call that did not return 0,
 * and what it returned in `needed`. */
int64_t vkv_replay(const struct vkv_call *calls, int64_t first, int64_t num_calls,
                   int64_t *needed);

#endif
