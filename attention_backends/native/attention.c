/* Attention over contiguous, strided slots on a CPU: shares of work, threads, and the sums.
 *
 * The work is cut into shares: some queries of a sequence, some KV heads, a stretch of keys.
 * Threads take shares as they come.
 *
 * A query's result does not depend on what else is computed, nor by how many threads. Its sum over
 * the keys has one order: PART keys at a time, on a grid from token 0, and then these parts in turn.
 * A thread that attends all parts of a tile adds them up as it goes. Where a tile's keys are cut in
 * several shares, each leaves its parts in the workspace, and whoever finishes the last adds up.
 * What is summed is relative to a power of two (tile.h), so that to scale it rounds nothing.
 */
#include "attention.h"

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum {
    PART = 512,         /* keys of a part, on a grid from token 0 */
    BLOCK = 64,         /* keys at a time, on a grid that divides it */
    FEW_TOKENS = 16,    /* and where few rows are attended: of all heads they stay near */
    SOFTMAX_ROWS = 24,  /* query rows at a time: their scores stay in the first cache */
    MAX_ROWS = 512,     /* query rows of a share: the packing of a block is spread over them */
    MIN_ROWS = 64,      /* unless a head has fewer; below it, packing costs more than it saves */
    MAX_LANES = 16,     /* of a vector */
    SHARES_A_THREAD = 4 /* for an even load */
};

struct share {
    int32_t seq, first_query, last_query, first_head, last_head, first_key, last_key;
    int32_t first_position; /* of first_query, within its sequence */
    int32_t num_rows;
    int32_t num_shares; /* that the keys of this tile are cut in */
    int32_t first_part; /* of several: index of the tile's first part in the workspace */
    int32_t num_parts;  /* of the tile; they lie side by side */
    int32_t part;       /* which of them is this share's first */
};

/* Sums over some keys, of rows [KV head][query][head of the KV head]. Weights are relative to
 * 2^peak, a whole number no less than any score, or -FLT_MAX where no key was seen. */
struct sums {
    float *out;     /* [rows][value_width] */
    float *peaks;   /* [rows] */
    float *weights; /* [rows] */
};

/* What a thread works in. */
struct scratch {
    int32_t *query, *keys, *values, *weights;
    float *scores, *apart; /* [SOFTMAX_ROWS][BLOCK], and room for two more of them */
    float *lanes;          /* sums of weights, [rows][lanes] */
    struct sums part, total;
    int query_words, value_width;
};

/* Where fetching is, FEW_TOKENS before reading: rows of all KV heads of a share, which lie side by
 * side, line by line. Of heads that lie apart a share has one. */
struct ahead {
    const char *row;
    int64_t stride, row_bytes, at; /* at: the next line of the row */
    int64_t num_rows;              /* left */
};

/* Keys and values of BLOCK tokens or fewer, of one KV head. */
struct block {
    const char *keys, *values;
    int64_t key_stride, value_stride; /* bytes from token to token */
    int start, len; /* first token, on the grid, and how many */
    int skip;       /* of them, that no query sees: they are not read */
    int ahead;      /* tokens of it whose row a block on is read later: worth fetching */
};

struct plan {
    int64_t num_shares, num_parts, scratch_bytes, part_bytes;
    int64_t shares_at, left_at, parts_at, scratch_at, total_bytes;
    int32_t max_rows, query_words, value_width;
};

struct job {
    const struct vkv_attention *args;
    const struct plan *plan;
    int64_t next_share, next_thread; /* atomic */
};

#define NAME(x) x##_portable
#define LANES 4
#define COLUMNS 4
#define ROWS 2
#define PAIRS 0
#include "tile.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define NAME(x) x##_avx2
#define LANES 8
#define COLUMNS 2
#define ROWS 6
#define PAIRS 0
#include "tile.h"
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#endif
#define NAME(x) x##_avx512
#define LANES 16
#define COLUMNS 4
#define ROWS 6
#define PAIRS 0
#include "tile.h"
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma"))), \
    apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#endif
#define NAME(x) x##_avx512_bf16
#define LANES 16
#define COLUMNS 4
#define ROWS 6
#define PAIRS 1
#include "tile.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

/* Fills scratch->part with the sums of a share's keys from `first` to `last`, of one part. Parts of
 * a share come in order. */
typedef void (*attend_part)(const struct vkv_attention *, const struct share *, struct scratch *,
                            int first, int last);

struct instruction_set {
    const char *name;
    attend_part attend;
};

/* Narrowest first. */
static const struct instruction_set instruction_sets[] = {
    {"portable", attend_portable},
#if defined(__x86_64__)
    {"avx2", attend_avx2},
    {"avx512", attend_avx512},
    {"avx512_bf16", attend_avx512_bf16},
#endif
};

enum { NUM_SETS = sizeof(instruction_sets) / sizeof(*instruction_sets) };

static int widest_allowed = NUM_SETS - 1; /* tests lower it to try the narrower ones */

static const struct instruction_set *choose(int32_t dtype) {
    int widest = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        widest = 1;
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
            widest = dtype == VKV_BFLOAT16 && __builtin_cpu_supports("avx512bf16") ? 3 : 2;
    }
#endif
    (void)dtype;
    return instruction_sets + (widest < widest_allowed ? widest : widest_allowed);
}

const char *vkv_instruction_set(int32_t dtype) { return choose(dtype)->name; }

void vkv_limit_instruction_set(const char *name) {
    for (int i = 0; i < NUM_SETS; i++)
        if (!strcmp(instruction_sets[i].name, name)) widest_allowed = i;
}

/* -- the plan -------------------------------------------------------------------------------- */

static int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }
static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

/* Parts of keys that tiles of so many queries have, of one KV head. */
static int64_t parts_of_keys(const struct vkv_attention *args, int32_t tile_queries) {
    int64_t parts = 0;
    for (int32_t b = 0; b < args->num_seqs; b++) {
        const int32_t queries = args->query_starts[b + 1] - args->query_starts[b];
        const int64_t keys =
            args->window ? min64(args->window, args->kv_lens[b]) : args->kv_lens[b];
        parts += (queries + tile_queries - 1) / tile_queries * ((keys + PART - 1) / PART);
    }
    return parts;
}

/* Queries of a tile, and KV heads of a share: many, unless threads would be left without work. */
static void tile_shape(const struct vkv_attention *args, int32_t *tile_queries,
                       int32_t *tile_heads) {
    const int32_t group = args->num_heads / args->num_kv_heads;
    const int32_t num_tokens = args->query_starts[args->num_seqs];
    const int64_t wanted = args->num_threads > 1 ? SHARES_A_THREAD * args->num_threads : 1;
    int64_t rows = (int64_t)num_tokens * args->num_heads / wanted;
    rows = min64(max64(rows, MIN_ROWS), MAX_ROWS);
    *tile_queries = (int32_t)max64(1, rows / group);
    *tile_heads = 1;
    if (args->key_head_stride != args->key_dim || args->value_head_stride != args->value_dim)
        return; /* each head is a stream of its own */
    /* A decode's tile is one query: take several heads at once, which lie side by side. */
    const int64_t queries = max64(1, num_tokens / args->num_seqs);
    int64_t heads = min64(max64(1, rows / (group * min64(queries, *tile_queries))),
                          args->num_kv_heads);
    if (args->num_threads > 1) { /* few short sequences: fewer heads, so that there are shares */
        const int64_t parts = parts_of_keys(args, *tile_queries);
        while (heads > 1 &&
               parts * ((args->num_kv_heads + heads - 1) / heads) < 2 * args->num_threads)
            heads = (heads + 1) / 2;
    }
    *tile_heads = (int32_t)heads;
}

/* What a share costs, in keys times rows, with the packing counted as some rows more. */
static int64_t cost(int64_t num_keys, int64_t num_rows, int64_t num_heads) {
    return num_keys * (num_rows + 16 * num_heads);
}

/* Cuts the work; with `shares` NULL only counts. Each tile is cut in shares of about `target`. */
static void cut(const struct vkv_attention *args, struct share *shares, int64_t target,
                int64_t *num_shares, int64_t *num_parts, int64_t *total_cost) {
    const int32_t group = args->num_heads / args->num_kv_heads;
    int32_t tile_queries, tile_heads;
    tile_shape(args, &tile_queries, &tile_heads);
    *num_shares = *num_parts = *total_cost = 0;
    for (int32_t b = 0; b < args->num_seqs; b++) {
        const int32_t begin = args->query_starts[b], end = args->query_starts[b + 1];
        const int32_t before = args->kv_lens[b] - (end - begin); /* tokens before the queries */
        for (int32_t q = begin; q < end; q += tile_queries)
            for (int32_t h = 0; h < args->num_kv_heads; h += tile_heads) {
                struct share share = {.seq = b, .first_query = q, .first_head = h};
                share.last_query = (int32_t)min64(end, q + tile_queries);
                share.last_head = (int32_t)min64(args->num_kv_heads, h + tile_heads);
                share.first_position = before + q - begin;
                share.num_rows =
                    (share.last_query - q) * group * (share.last_head - share.first_head);
                const int32_t last = before + share.last_query - begin;
                int32_t first = 0;
                if (args->window && share.first_position >= args->window)
                    first = share.first_position - args->window + 1;
                const int64_t work =
                    cost(last - first, share.num_rows, share.last_head - share.first_head);
                *total_cost += work;
                const int32_t first_part = first / PART;
                const int32_t parts = (last + PART - 1) / PART - first_part;
                const int64_t wanted = target ? max64(min64(work / target, parts), 1) : 1;
                const int32_t stretch = (int32_t)((parts + wanted - 1) / wanted); /* in parts */
                share.num_shares = (parts + stretch - 1) / stretch;
                share.num_parts = parts;
                share.first_part = (int32_t)*num_parts;
                for (int32_t p = 0; p < parts; p += stretch, ++*num_shares) {
                    share.part = p;
                    share.first_key = p ? (first_part + p) * PART : first;
                    share.last_key = (int32_t)min64(last, (int64_t)(first_part + p + stretch) * PART);
                    if (shares) shares[*num_shares] = share;
                }
                if (share.num_shares > 1) *num_parts += parts;
            }
    }
}

static struct plan make_plan(const struct vkv_attention *args, int64_t *target) {
    struct plan plan = {0};
    int32_t tile_queries, tile_heads;
    int64_t total;
    *target = 0;
    cut(args, NULL, 0, &plan.num_shares, &plan.num_parts, &total);
    if (args->num_threads > 1) {
        *target = max64(1, total / (SHARES_A_THREAD * args->num_threads));
        cut(args, NULL, *target, &plan.num_shares, &plan.num_parts, &total);
    }
    tile_shape(args, &tile_queries, &tile_heads);
    plan.max_rows = tile_queries * tile_heads * (args->num_heads / args->num_kv_heads);
    plan.query_words = (int32_t)round_up(args->key_dim, 32);
    plan.value_width = (int32_t)round_up(args->value_dim, 16);
    const int64_t row_bytes = 4 * (plan.query_words + MAX_LANES + 2 * (plan.value_width + 2));
    const int64_t block_bytes = 4 * BLOCK * (plan.query_words + plan.value_width);
    plan.scratch_bytes =
        round_up(plan.max_rows * row_bytes + block_bytes + 16 * SOFTMAX_ROWS * BLOCK, 64) + 768;
    plan.part_bytes = round_up(4 * plan.max_rows * (plan.value_width + 2), 64);
    plan.shares_at = 0;
    plan.left_at = round_up(plan.num_shares * (int64_t)sizeof(struct share), 64);
    plan.parts_at = round_up(plan.left_at + 4 * plan.num_parts, 64);
    plan.scratch_at = plan.parts_at + plan.num_parts * plan.part_bytes;
    plan.total_bytes = plan.scratch_at + args->num_threads * plan.scratch_bytes;
    return plan;
}

static struct scratch thread_scratch(const struct vkv_attention *args, const struct plan *plan,
                                     int64_t thread) {
    char *at = (char *)args->workspace + plan->scratch_at + thread * plan->scratch_bytes;
    struct scratch s = {.query_words = plan->query_words, .value_width = plan->value_width};
#define TAKE(field, count)  \
    s.field = (void *)at; \
    at += round_up(4 * (int64_t)(count), 64)
    TAKE(keys, BLOCK * plan->query_words);
    TAKE(values, BLOCK * plan->value_width);
    TAKE(scores, SOFTMAX_ROWS * BLOCK);
    TAKE(apart, 2 * SOFTMAX_ROWS * BLOCK);
    TAKE(weights, SOFTMAX_ROWS * BLOCK);
    TAKE(query, plan->max_rows * plan->query_words);
    TAKE(lanes, plan->max_rows * MAX_LANES);
    TAKE(part.out, plan->max_rows * plan->value_width);
    TAKE(part.peaks, plan->max_rows);
    TAKE(part.weights, plan->max_rows);
    TAKE(total.out, plan->max_rows * plan->value_width);
    TAKE(total.peaks, plan->max_rows);
    TAKE(total.weights, plan->max_rows);
#undef TAKE
    return s;
}

/* -- results --------------------------------------------------------------------------------- */

static uint16_t to_bf16(float x) { /* to nearest, ties to even; a NaN stays one */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Writes a tile's rows: with sinks, divided by their sums, in the dtype of out. */
static void finish(const struct vkv_attention *args, const struct share *share,
                   const struct sums *sums, int width) {
    const float log2e = 1.44269504f, ln2 = 0.693147181f;
    const int32_t group = args->num_heads / args->num_kv_heads;
    int32_t row = 0;
    for (int32_t h = share->first_head; h < share->last_head; h++)
        for (int32_t q = share->first_query; q < share->last_query; q++)
            for (int32_t g = 0; g < group; g++, row++) {
                const int32_t head = h * group + g;
                float peak = sums->peaks[row], sum = sums->weights[row], factor = 1.0f;
                if (args->sinks) { /* a logit that takes weight and has no value */
                    const float sink = args->sinks[head] * log2e, top = fmaxf(peak, sink);
                    factor = exp2f(peak - top);
                    sum = sum * factor + exp2f(sink - top);
                    peak = top;
                }
                factor /= sum;
                const float *from = sums->out + (int64_t)row * width;
                const int64_t to = q * args->out_token_stride + head * args->out_head_stride;
                if (args->dtype == VKV_BFLOAT16) {
                    uint16_t *goal = (uint16_t *)args->out + to;
                    for (int32_t d = 0; d < args->value_dim; d++)
                        goal[d] = to_bf16(from[d] * factor);
                } else {
                    float *goal = (float *)args->out + to;
                    for (int32_t d = 0; d < args->value_dim; d++) goal[d] = from[d] * factor;
                }
                if (args->lse)
                    args->lse[(int64_t)q * args->num_heads + head] = (peak + log2f(sum)) * ln2;
            }
}

/* 2^x for a whole number x, exactly; zero below -126. */
static float power_of_two(float x) {
    const uint32_t bits = x < -126 ? 0 : x > 127 ? 0x7f800000 : (uint32_t)((int)x + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return power;
}

/* total += part, each of `rows` rows. */
static void add_part(const struct sums *total, const struct sums *part, int rows, int width) {
    for (int row = 0; row < rows; row++) {
        const float old = total->peaks[row], new = part->peaks[row], peak = old > new ? old : new;
        const float keep = power_of_two(old - peak), add = power_of_two(new - peak);
        float *goal = total->out + (int64_t)row * width;
        const float *from = part->out + (int64_t)row * width;
        for (int d = 0; d < width; d++) goal[d] = goal[d] * keep + from[d] * add;
        total->weights[row] = total->weights[row] * keep + part->weights[row] * add;
        total->peaks[row] = peak;
    }
}

static void copy_sums(const struct sums *goal, const struct sums *from, int rows, int width) {
    memcpy(goal->out, from->out, sizeof(float) * (size_t)rows * (size_t)width);
    memcpy(goal->peaks, from->peaks, sizeof(float) * (size_t)rows);
    memcpy(goal->weights, from->weights, sizeof(float) * (size_t)rows);
}

/* A part in the workspace. */
static struct sums kept_part(const struct vkv_attention *args, const struct plan *plan,
                             int64_t part) {
    float *at = (float *)((char *)args->workspace + plan->parts_at + part * plan->part_bytes);
    return (struct sums){.out = at,
                         .peaks = at + (int64_t)plan->max_rows * plan->value_width,
                         .weights = at + (int64_t)plan->max_rows * (plan->value_width + 1)};
}

/* -- threads --------------------------------------------------------------------------------- */

/* Attends a share part by part. Returns where the sums of its tile are, or NULL if other shares of
 * the tile are still at work. */
static const struct sums *attend_share(const struct job *job, const struct share *share,
                                       struct scratch *s, attend_part attend) {
    const struct vkv_attention *args = job->args;
    const struct plan *plan = job->plan;
    const int rows = share->num_rows, width = s->value_width;
    const struct sums *sums = &s->part;
    int part = share->part;
    for (int at = share->first_key; at < share->last_key; part++) {
        const int end = (int)min64(share->last_key, (int64_t)(at / PART + 1) * PART);
        attend(args, share, s, at, end);
        if (share->num_shares > 1) {
            const struct sums kept = kept_part(args, plan, share->first_part + part);
            copy_sums(&kept, &s->part, rows, width);
        } else if (end < share->last_key || at > share->first_key) {
            if (at == share->first_key) copy_sums(&s->total, &s->part, rows, width);
            else add_part(&s->total, &s->part, rows, width);
            sums = &s->total;
        }
        at = end;
    }
    if (share->num_shares == 1) return sums;
    int32_t *left = (int32_t *)((char *)args->workspace + plan->left_at) + share->first_part;
    if (__atomic_sub_fetch(left, 1, __ATOMIC_ACQ_REL)) return NULL;
    for (part = 0; part < share->num_parts; part++) {
        const struct sums kept = kept_part(args, plan, share->first_part + part);
        if (part) add_part(&s->total, &kept, rows, width);
        else copy_sums(&s->total, &kept, rows, width);
    }
    return &s->total;
}

static void work(void *data) {
    struct job *job = data;
    const struct vkv_attention *args = job->args;
    const struct plan *plan = job->plan;
    const int64_t thread = __atomic_fetch_add(&job->next_thread, 1, __ATOMIC_RELAXED);
    if (thread >= args->num_threads) return; /* more threads came than there is scratch for */
    struct scratch s = thread_scratch(args, plan, thread);
    const struct share *shares = (void *)((char *)args->workspace + plan->shares_at);
    const attend_part attend = choose(args->dtype)->attend;
    for (;;) {
        const int64_t index = __atomic_fetch_add(&job->next_share, 1, __ATOMIC_RELAXED);
        if (index >= plan->num_shares) return;
        const struct sums *sums = attend_share(job, shares + index, &s, attend);
        if (sums) finish(args, shares + index, sums, s.value_width);
    }
}

int64_t vkv_attend(const struct vkv_attention *args) {
    int64_t target, total;
    struct plan plan = make_plan(args, &target);
    if (args->workspace_bytes < plan.total_bytes) return plan.total_bytes;
    struct share *shares = (void *)((char *)args->workspace + plan.shares_at);
    int32_t *left = (void *)((char *)args->workspace + plan.left_at);
    cut(args, shares, target, &plan.num_shares, &plan.num_parts, &total);
    for (int64_t i = 0; i < plan.num_shares; i++)
        if (shares[i].num_shares > 1) left[shares[i].first_part] = shares[i].num_shares;
    struct job job = {.args = args, .plan = &plan};
    if (args->num_threads > 1 && args->parallel && plan.num_shares > 1)
        args->parallel(work, &job, (unsigned)args->num_threads, 0);
    else
        work(&job);
    return 0;
}

/* -- new tokens ------------------------------------------------------------------------------ */

int64_t vkv_store(const struct vkv_rows *rows, const struct vkv_sequences *sequences) {
    const int64_t item = rows->item_bytes, head_bytes = item * rows->dim;
    const int whole = rows->row_head_stride == rows->dim && rows->head_stride == rows->dim;
    for (int32_t b = 0; b < sequences->num_seqs; b++) {
        const int32_t begin = sequences->query_starts[b], end = sequences->query_starts[b + 1];
        const int64_t first = sequences->kv_lens[b] - (end - begin);
        for (int32_t t = begin; t < end; t++) {
            const char *from = (const char *)rows->rows + item * t * rows->row_token_stride;
            char *to = (char *)rows->cache + item * (sequences->slots[b] * rows->slot_stride +
                                                     (first + t - begin) * rows->token_stride);
            if (whole) {
                memcpy(to, from, (size_t)(head_bytes * rows->num_heads));
                continue;
            }
            for (int32_t h = 0; h < rows->num_heads; h++)
                memcpy(to + item * h * rows->head_stride, from + item * h * rows->row_head_stride,
                       (size_t)head_bytes);
        }
    }
    return 0;
}
