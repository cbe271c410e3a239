/* Attention over contiguous, strided slots: the ABI between native.py and attention.c.
 *
 * Sequence b owns the query rows query_starts[b] .. query_starts[b + 1], the last of its
 * kv_lens[b] tokens; its keys and values are rows 0 .. kv_lens[b] of slot slots[b]. No row past a
 * sequence's length, nor one that all its queries' windows have passed, is ever read.
 *
 * A slot may also have a stretch of a sequence's keys alone, from a multiple of 512 tokens on. Then
 * its queries may lie behind all of them (`positions`), and what comes of several stretches is added
 * up by vkv_merge, to the same bits as if all keys had been in one slot.
 */
#ifndef VKV_ATTENTION_H
#define VKV_ATTENTION_H

#include <stdint.h>

enum vkv_dtype { VKV_FLOAT32 = 0, VKV_BFLOAT16 = 1 };

/* An OpenMP runtime's way to run work(data) on several threads at once (GOMP_parallel). */
typedef void (*vkv_parallel)(void (*work)(void *), void *data, unsigned num_threads,
                             unsigned flags);

/* Strides count elements; the last dimension of every tensor is contiguous. */
struct vkv_attention {
    const void *query; /* [num_tokens, num_heads, key_dim] */
    const void *keys;  /* [num_slots, tokens, num_kv_heads, key_dim] */
    const void *values;
    void *out;          /* [num_tokens, num_heads, value_dim] */
    float *lse;         /* [num_tokens, num_heads], or NULL */
    const float *sinks; /* [num_heads], or NULL */
    void *workspace;    /* 64-byte aligned */
    int64_t workspace_bytes;
    const int32_t *query_starts; /* [num_seqs + 1] */
    const int32_t *kv_lens;      /* [num_seqs] */
    const int32_t *slots;        /* [num_seqs] */
    const int32_t *positions;    /* [num_seqs] of the first query among the rows of the slot, which
                                    it may lie behind; NULL: all queries are the last rows */
    const int32_t *first_parts;  /* [num_seqs] the part of the sequence that row 0 begins; NULL: 0 */
    float *sums; /* in place of out and lse: nodes (sums.h), [node][num_queries][num_heads]
                    [value_dim + 2]: the sums, the peak and the weight; or NULL */
    const int64_t *sum_rows; /* [num_seqs] where a sequence's first node is, in queries */
    int64_t query_token_stride, query_head_stride;
    int64_t key_slot_stride, key_token_stride, key_head_stride;
    int64_t value_slot_stride, value_token_stride, value_head_stride;
    int64_t out_token_stride, out_head_stride;
    int32_t num_seqs, num_heads, num_kv_heads, key_dim, value_dim;
    int32_t dtype;  /* enum vkv_dtype, of query, keys, values and out */
    int32_t window; /* keys that a query sees, itself included; 0 for all */
    float scale;
    float softcap; /* 0 for none */
    int32_t num_threads;
    vkv_parallel parallel; /* NULL: everything on the calling thread */
};

/* Fills out (and lse). Returns 0, or the workspace bytes it needs if it was given fewer, with
 * nothing done. */
int64_t vkv_attend(const struct vkv_attention *args);

/* Adds up the nodes of several stretches, in place, and fills out (and lse). The nodes of a sequence
 * are in the order of its keys. Returns 0. */
struct vkv_merge {
    float *sums;                 /* as of vkv_attention */
    const int64_t *node_rows;    /* [num_nodes] where each node is, in queries */
    const int32_t *node_parts;   /* [num_nodes] its first part */
    const int32_t *node_starts;  /* [num_seqs + 1] which nodes are a sequence's */
    const int32_t *query_starts; /* [num_seqs + 1] */
    void *out;                   /* [num_tokens, num_heads, value_dim] */
    float *lse;                  /* [num_tokens, num_heads], or NULL */
    const float *sinks;          /* [num_heads], or NULL */
    int64_t out_token_stride, out_head_stride;
    int32_t num_seqs, num_heads, value_dim, dtype;
};
int64_t vkv_merge(const struct vkv_merge *args);

/* Copies the rows of new tokens, [num_tokens, num_heads, dim], to the last rows of their sequences
 * in a cache, [num_slots, tokens, num_heads, dim]. Returns 0. */
struct vkv_rows {
    const void *rows;
    void *cache;
    int64_t row_token_stride, row_head_stride;
    int64_t slot_stride, token_stride, head_stride;
    int32_t num_heads, dim, item_bytes;
};
struct vkv_sequences {
    const int32_t *query_starts, *kv_lens, *slots;
    int32_t num_seqs;
};
int64_t vkv_store(const struct vkv_rows *rows, const struct vkv_sequences *sequences);

/* The instruction set in use for a dtype: "avx512_bf16", "avx512", "avx2" or "portable". */
const char *vkv_instruction_set(int32_t dtype);

/* For tests: use this instruction set at most, by its name. Not while anything runs. */
void vkv_limit_instruction_set(const char *name);

#endif
