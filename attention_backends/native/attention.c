/* Attention over contiguous, strided slots on a CPU: shares of work, threads, and the sums.
 *
 * The work is cut into shares: some queries of a sequence, some KV heads, a stretch of keys.
 * Threads take shares as they come.
 *
 * A query's result does not depend on what else is computed, nor by how many threads. Its sum over
 * the keys has one order: PART keys at a time, on a grid from token 0, and then these parts by halves
 * (sums.h). A thread that attends all parts of a tile adds them up as it goes. Where a tile's keys are
 * cut in several shares, each leaves its parts in the workspace, and whoever finishes the last adds
 * up.
 */
#include "attention.h"

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "sums.h"

enum {
    PART = 512,         /* keys of a part, on a grid from token 0 */
    BLOCK = 64,         /* keys at a time, on a grid that divides it */
    FEW_ROWS = 8,       /* query rows of a KV head at most, to read keys and values as they lie */
    FLOAT_STEP = 16,    /* keys at a time there, of floats: those of all KV heads stay near */
    PAIR_STEP = 32,     /* and of pairs of bfloat16 */
    SOFTMAX_ROWS = 24,  /* query rows at a time: their scores stay in the first cache */
    MAX_ROWS = 512,     /* query rows of a share: the packing of a block is spread over them */
    MIN_ROWS = 64,      /* unless a head has fewer; below it, packing costs more than it saves */
    MAX_LANES = 16,     /* of a vector */
    SHARES_A_THREAD = 4 /* for an even load */
};

#define LOG2E 1.44269504f

static int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }
static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

struct share {
    int32_t seq, first_query, last_query, first_head, last_head, first_key, last_key;
    int32_t first_position; /* of first_query, within its sequence */
    int32_t num_rows;
    int32_t num_shares; /* that the keys of this tile are cut in */
    int32_t num_parts;  /* of the tile */
    int32_t part;       /* which of them is this share's first */
    int32_t tile_part;  /* the tile's first part, among those of the sequence */
    /* Of several, which leave their parts in the workspace: */
    int32_t cut_tile; /* index of the tile among those that are cut */
    int64_t kept_at;  /* where its parts lie side by side, in bytes behind those of other tiles */
};

/* Query rows of each of its KV heads. */
static int rows_of_head(const struct vkv_attention *args, const struct share *share) {
    return (share->last_query - share->first_query) * (args->num_heads / args->num_kv_heads);
}

/* What a thread works in. */
struct scratch {
    int32_t *query, *keys, *values, *weights;
    float *scores, *apart; /* [SOFTMAX_ROWS][BLOCK], and room for two more of them */
    float *lanes;          /* sums of weights, [rows][lanes] */
    struct sums part;
    struct tower tower;
    int query_words, value_width;
};

/* What is fetched, FLOAT_STEP tokens before it is read: rows of all KV heads of a share, which lie
 * side by side, line by line. Of heads that lie apart a share has one. */
struct stream {
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
    int num_next;   /* tokens of the share behind it: those of the next block are fetched */
};

struct plan {
    int64_t num_shares, num_cut_tiles, kept_bytes, cost, scratch_bytes;
    int64_t shares_at, left_at, kept_at, scratch_at, total_bytes;
    int32_t max_rows, query_words, value_width, levels;
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

/* How work is cut: rows of a share, queries of a tile and KV heads of a share, each at most. */
struct tiling {
    int32_t rows, queries, heads;
};

/* Large ones, unless threads would be left without work. */
static struct tiling tiling_of(const struct vkv_attention *args) {
    const int32_t group = args->num_heads / args->num_kv_heads;
    const int32_t num_tokens = args->query_starts[args->num_seqs];
    const int64_t wanted = args->num_threads > 1 ? SHARES_A_THREAD * args->num_threads : 1;
    const int64_t rows = (int64_t)num_tokens * args->num_heads / wanted;
    struct tiling tiling = {.rows = (int32_t)min64(max64(rows, MIN_ROWS), MAX_ROWS), .heads = 1};
    tiling.queries = (int32_t)max64(1, tiling.rows / group);
    if (args->key_head_stride != args->key_dim || args->value_head_stride != args->value_dim)
        return tiling; /* each head is a stream of its own */
    tiling.heads = args->num_kv_heads;
    if (args->num_threads > 1) { /* few short sequences: fewer heads, so that there are shares */
        const int64_t parts = parts_of_keys(args, tiling.queries), kv_heads = args->num_kv_heads;
        while (tiling.heads > 1 &&
               parts * ((kv_heads + tiling.heads - 1) / tiling.heads) < 2 * args->num_threads)
            tiling.heads = (tiling.heads + 1) / 2;
    }
    return tiling;
}

/* KV heads of a share with so many queries. Of a decode, which has one, several at once, which lie
 * side by side; of a prompt chunk beside it no more than its rows allow. */
static int32_t heads_of_share(const struct tiling *tiling, int32_t group, int32_t num_queries) {
    return (int32_t)min64(max64(1, tiling->rows / (group * num_queries)), tiling->heads);
}

/* What a share costs, in keys times rows. To read keys and values of a KV head, and to lay them out
 * where rows are many, counts as some rows more. */
static int64_t cost(int64_t num_keys, int64_t num_rows, int64_t num_heads) {
    return num_keys * (num_rows + 16 * num_heads);
}

/* Where a sequence's stretch of keys begins, in parts, and where it ends. */
static int32_t first_part_of(const struct vkv_attention *args, int32_t seq) {
    return args->first_parts ? args->first_parts[seq] : 0;
}
static int32_t last_part_of(const struct vkv_attention *args, int32_t seq) {
    return first_part_of(args, seq) + (args->kv_lens[seq] + PART - 1) / PART;
}

/* Bytes of a part that is kept in the workspace. */
static int64_t bytes_of_part(const struct plan *plan, int32_t num_rows) {
    return round_up((int64_t)sizeof(float) * num_rows * (plan->value_width + 2), 64);
}

/* Cuts the keys of a share, which has its queries and KV heads, in shares of about `target`. */
static void cut_keys(const struct vkv_attention *args, struct share share, int64_t target,
                     struct share *shares, struct plan *plan) {
    const int32_t num_queries = share.last_query - share.first_query;
    const int32_t num_heads = share.last_head - share.first_head;
    share.num_rows = rows_of_head(args, &share) * num_heads;
    plan->max_rows = (int32_t)max64(plan->max_rows, share.num_rows);
    const int32_t last =
        (int32_t)min64(args->kv_lens[share.seq], share.first_position + num_queries);
    int32_t first = 0;
    if (args->window && share.first_position >= args->window)
        first = (int32_t)min64(last, share.first_position - args->window + 1);
    const int64_t work = cost(last - first, share.num_rows, num_heads);
    plan->cost += work;
    const int32_t first_part = first / PART;
    const int32_t parts = (int32_t)max64(1, (last + PART - 1) / PART - first_part);
    const int64_t wanted = target ? max64(min64(work / target, parts), 1) : 1;
    const int32_t stretch = (int32_t)((parts + wanted - 1) / wanted); /* in parts */
    share.num_shares = (parts + stretch - 1) / stretch;
    share.num_parts = parts;
    share.cut_tile = (int32_t)plan->num_cut_tiles;
    share.kept_at = plan->kept_bytes;
    share.tile_part = first_part_of(args, share.seq) + first_part;
    for (int32_t p = 0; p < parts; p += stretch, plan->num_shares++) {
        share.part = p;
        share.first_key = p ? (first_part + p) * PART : first;
        share.last_key = (int32_t)min64(last, (int64_t)(first_part + p + stretch) * PART);
        if (shares) shares[plan->num_shares] = share;
    }
    if (share.num_shares > 1) {
        plan->num_cut_tiles++;
        plan->kept_bytes += parts * bytes_of_part(plan, share.num_rows);
    }
}

/* Cuts the work; with `shares` NULL only counts. Each tile is cut in shares of about `target`. */
static void cut(const struct vkv_attention *args, struct share *shares, int64_t target,
                struct plan *plan) {
    const int32_t group = args->num_heads / args->num_kv_heads;
    const struct tiling tiling = tiling_of(args);
    plan->num_shares = plan->num_cut_tiles = plan->kept_bytes = plan->cost = plan->max_rows = 0;
    for (int32_t b = 0; b < args->num_seqs; b++) {
        const int32_t begin = args->query_starts[b], end = args->query_starts[b + 1];
        const int32_t before = /* tokens before the queries, from row 0 on */
            args->positions ? args->positions[b] : args->kv_lens[b] - (end - begin);
        const int32_t queries = (int32_t)min64(end - begin, tiling.queries);
        for (int32_t q = begin; q < end; q += queries) {
            const int32_t heads = heads_of_share(&tiling, group, queries);
            for (int32_t h = 0; h < args->num_kv_heads; h += heads) {
                const struct share share = {
                    .seq = b,
                    .first_query = q,
                    .last_query = (int32_t)min64(end, q + queries),
                    .first_head = h,
                    .last_head = (int32_t)min64(args->num_kv_heads, h + heads),
                    .first_position = before + q - begin,
                };
                cut_keys(args, share, target, shares, plan);
            }
        }
    }
}

static struct plan make_plan(const struct vkv_attention *args, int64_t *target) {
    struct plan plan = {.query_words = (int32_t)round_up(args->key_dim, 32),
                        .value_width = (int32_t)round_up(args->value_dim, 16)};
    *target = 0;
    cut(args, NULL, 0, &plan);
    if (args->num_threads > 1) {
        *target = max64(1, plan.cost / (SHARES_A_THREAD * args->num_threads));
        cut(args, NULL, *target, &plan);
    }
    int32_t num_parts = 1;
    for (int32_t b = 0; b < args->num_seqs; b++)
        num_parts = (int32_t)max64(num_parts, last_part_of(args, b));
    plan.levels = levels_of(num_parts);
    const int64_t num_sums = 1 + plan.levels;
    const int64_t row_bytes =
        4 * (plan.query_words + MAX_LANES + num_sums * (plan.value_width + 2));
    const int64_t block_bytes = 4 * BLOCK * (plan.query_words + plan.value_width);
    plan.scratch_bytes =
        round_up(plan.max_rows * row_bytes + block_bytes + 16 * SOFTMAX_ROWS * BLOCK, 64) +
        64 * (7 + 3 * num_sums);
    plan.shares_at = 0;
    plan.left_at = round_up(plan.num_shares * (int64_t)sizeof(struct share), 64);
    plan.kept_at = round_up(plan.left_at + 4 * plan.num_cut_tiles, 64);
    plan.scratch_at = plan.kept_at + plan.kept_bytes;
    plan.total_bytes = plan.scratch_at + args->num_threads * plan.scratch_bytes;
    return plan;
}

static struct scratch thread_scratch(const struct vkv_attention *args, const struct plan *plan,
                                     int64_t thread) {
    char *at = (char *)args->workspace + plan->scratch_at + thread * plan->scratch_bytes;
    struct scratch s = {.query_words = plan->query_words, .value_width = plan->value_width};
#define TAKE_OF(pointer, count) \
    pointer = (void *)at;       \
    at += round_up(4 * (int64_t)(count), 64)
#define TAKE(field, count) TAKE_OF(s.field, count)
    TAKE(keys, BLOCK * plan->query_words);
    TAKE(values, BLOCK * plan->value_width);
    TAKE(scores, SOFTMAX_ROWS * BLOCK);
    TAKE(apart, 2 * SOFTMAX_ROWS * BLOCK);
    TAKE(weights, SOFTMAX_ROWS * BLOCK);
    TAKE(query, plan->max_rows * plan->query_words);
    TAKE(lanes, plan->max_rows * MAX_LANES);
    for (int level = -1; level < plan->levels; level++) {
        struct sums *const sums = level < 0 ? &s.part : s.tower.levels + level;
        TAKE_OF(sums->out, plan->max_rows * plan->value_width);
        TAKE_OF(sums->peaks, plan->max_rows);
        TAKE_OF(sums->weights, plan->max_rows);
    }
#undef TAKE
#undef TAKE_OF
    return s;
}

/* -- results --------------------------------------------------------------------------------- */

static uint16_t to_bf16(float x) { /* to nearest, ties to even; a NaN stays one */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* What becomes of a row of sums: divided by its weight, in the dtype of out. */
struct goal {
    void *out;
    float *lse; /* or NULL */
    const float *sinks; /* or NULL */
    int64_t token_stride, head_stride;
    int32_t num_heads, value_dim, dtype;
};

static void write_row(const struct goal *goal, int64_t q, int32_t head, const float *from,
                      float peak, float sum) {
    const float ln2 = 0.693147181f;
    float factor = 1.0f;
    if (goal->sinks) { /* a logit that takes weight and has no value */
        const float sink = goal->sinks[head] * LOG2E, top = fmaxf(peak, sink);
        factor = exp2f(peak - top);
        sum = sum * factor + exp2f(sink - top);
        peak = top;
    }
    factor /= sum;
    const int64_t to = q * goal->token_stride + head * goal->head_stride;
    if (goal->dtype == VKV_BFLOAT16) {
        uint16_t *out = (uint16_t *)goal->out + to;
        for (int32_t d = 0; d < goal->value_dim; d++) out[d] = to_bf16(from[d] * factor);
    } else {
        float *out = (float *)goal->out + to;
        for (int32_t d = 0; d < goal->value_dim; d++) out[d] = from[d] * factor;
    }
    if (goal->lse) goal->lse[q * goal->num_heads + head] = (peak + log2f(sum)) * ln2;
}

/* Writes a tile's rows to out, or, if `node` is not negative, as a node; of nothing without sums. */
static void write_rows(const struct vkv_attention *args, const struct share *share,
                       const struct sums *sums, int width, int32_t node) {
    const struct goal goal = {args->out, args->lse, args->sinks, args->out_token_stride,
                              args->out_head_stride, args->num_heads, args->value_dim, args->dtype};
    const int32_t group = args->num_heads / args->num_kv_heads, dim = args->value_dim;
    const int32_t begin = args->query_starts[share->seq];
    const int64_t num_queries = args->query_starts[share->seq + 1] - begin;
    int32_t row = 0;
    for (int32_t h = share->first_head; h < share->last_head; h++)
        for (int32_t q = share->first_query; q < share->last_query; q++)
            for (int32_t head = h * group; head < (h + 1) * group; head++, row++) {
                const float *from = sums ? sums->out + (int64_t)row * width : NULL;
                if (node < 0) {
                    write_row(&goal, q, head, from, sums->peaks[row], sums->weights[row]);
                    continue;
                }
                const int64_t at = args->sum_rows[share->seq] + node * num_queries + q - begin;
                float *to = args->sums + (at * args->num_heads + head) * (dim + 2);
                if (from) memcpy(to, from, sizeof(float) * (size_t)dim);
                else memset(to, 0, sizeof(float) * (size_t)dim);
                to[dim] = sums ? sums->peaks[row] : -FLT_MAX;
                to[dim + 1] = sums ? sums->weights[row] : 0.0f;
            }
}

/* A part of a share's tile, kept in the workspace. */
static struct sums kept_part(const struct vkv_attention *args, const struct plan *plan,
                             const struct share *share, int64_t part) {
    float *const at = (float *)((char *)args->workspace + plan->kept_at + share->kept_at +
                                part * bytes_of_part(plan, share->num_rows));
    float *const peaks = at + (int64_t)share->num_rows * plan->value_width;
    return (struct sums){.out = at, .peaks = peaks, .weights = peaks + share->num_rows};
}

/* -- threads --------------------------------------------------------------------------------- */

/* Adds the part in scratch, or nothing, to those of a tile that came before it. */
static void add_part(const struct vkv_attention *args, const struct share *share,
                     struct scratch *s, int is_there) {
    const int32_t lowest = args->sums ? first_part_of(args, share->seq) : 0;
    const int32_t node = s->tower.num_emitted;
    if (add_next(&s->tower, &s->part, &is_there, lowest, share->num_rows, s->value_width))
        write_rows(args, share, is_there ? &s->part : NULL, s->value_width, node);
}

/* Before a tile's first part. Its nodes, if they are wanted, begin where the stretch does. */
static void begin_tile(const struct vkv_attention *args, const struct share *share,
                       struct scratch *s) {
    begin_tower(&s->tower, args->sums ? first_part_of(args, share->seq) : share->tile_part);
    while (s->tower.next < share->tile_part) add_part(args, share, s, 0);
}

/* Behind its last: the result. */
static void end_tile(const struct vkv_attention *args, const struct share *share,
                     struct scratch *s) {
    struct tower *tower = &s->tower;
    if (!args->sums) {
        const struct sums *sums = add_up(tower, share->num_rows, s->value_width);
        if (!sums) { /* no key was seen: the log-sum-exp says so */
            for (int i = 0; i < share->num_rows; i++)
                s->part.peaks[i] = -FLT_MAX, s->part.weights[i] = 0.0f;
            sums = &s->part;
        }
        write_rows(args, share, sums, s->value_width, -1);
        return;
    }
    while (tower->next < last_part_of(args, share->seq)) add_part(args, share, s, 0);
    for (int level = 31; level >= 0; level--)
        if (tower->open >> level & 1)
            write_rows(args, share, tower->filled >> level & 1 ? tower->levels + level : NULL,
                       s->value_width, tower->num_emitted++);
}

/* Attends a share part by part. Whoever attends the last one of a tile also adds them up. */
static void attend_share(const struct job *job, const struct share *share, struct scratch *s,
                         attend_part attend) {
    const struct vkv_attention *args = job->args;
    const struct plan *plan = job->plan;
    const int is_whole = share->num_shares == 1;
    if (is_whole) begin_tile(args, share, s);
    int part = share->part;
    for (int at = share->first_key; at < share->last_key; part++) {
        const int end = (int)min64(share->last_key, (int64_t)(at / PART + 1) * PART);
        attend(args, share, s, at, end);
        if (is_whole) {
            add_part(args, share, s, 1);
        } else {
            const struct sums kept = kept_part(args, plan, share, part);
            copy_sums(&kept, &s->part, share->num_rows, s->value_width);
        }
        at = end;
    }
    if (is_whole) {
        end_tile(args, share, s);
        return;
    }
    int32_t *left = (int32_t *)((char *)args->workspace + plan->left_at) + share->cut_tile;
    if (__atomic_sub_fetch(left, 1, __ATOMIC_ACQ_REL)) return;
    struct scratch sum = *s; /* takes the memory of parts in exchange, too small for other tiles */
    begin_tile(args, share, &sum);
    for (part = 0; part < share->num_parts; part++) {
        sum.part = kept_part(args, plan, share, part);
        add_part(args, share, &sum, 1);
    }
    end_tile(args, share, &sum);
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
        attend_share(job, shares + index, &s, attend);
    }
}

int64_t vkv_attend(const struct vkv_attention *args) {
    if (!args->num_seqs) return 0;
    int64_t target;
    struct plan plan = make_plan(args, &target);
    if (args->workspace_bytes < plan.total_bytes) return plan.total_bytes;
    struct share *shares = (void *)((char *)args->workspace + plan.shares_at);
    int32_t *left = (void *)((char *)args->workspace + plan.left_at);
    cut(args, shares, target, &plan);
    for (int64_t i = 0; i < plan.num_shares; i++)
        if (shares[i].num_shares > 1) left[shares[i].cut_tile] = shares[i].num_shares;
    struct job job = {.args = args, .plan = &plan};
    if (args->num_threads > 1 && args->parallel && plan.num_shares > 1)
        args->parallel(work, &job, (unsigned)args->num_threads, 0);
    else
        work(&job);
    return 0;
}

/* -- several stretches ------------------------------------------------------------------------ */

/* Adds up, in the first of them, the nodes from `first` to `last`, all of whose parts are among the
 * 2^level from `part` on. */
static void add_nodes(const struct vkv_merge *args, int32_t first, int32_t last, int32_t part,
                      int level, int64_t num_rows) {
    if (last - first < 2) return;
    const int32_t half = part + (1 << (level - 1));
    int32_t middle = first;
    while (middle < last && args->node_parts[middle] < half) middle++;
    add_nodes(args, first, middle, part, level - 1, num_rows);
    add_nodes(args, middle, last, half, level - 1, num_rows);
    if (middle == first || middle == last) return;
    const int64_t row_words = args->value_dim + 2, dim = args->value_dim;
    float *goal = args->sums + args->node_rows[first] * args->num_heads * row_words;
    const float *from = args->sums + args->node_rows[middle] * args->num_heads * row_words;
    for (int64_t row = 0; row < num_rows; row++, goal += row_words, from += row_words)
        add_row(goal, goal + dim, goal + dim + 1, from, from[dim], from[dim + 1], (int)dim);
}

int64_t vkv_merge(const struct vkv_merge *args) {
    const struct goal goal = {args->out, args->lse, args->sinks, args->out_token_stride,
                              args->out_head_stride, args->num_heads, args->value_dim, args->dtype};
    const int64_t row_words = args->value_dim + 2;
    for (int32_t b = 0; b < args->num_seqs; b++) {
        const int32_t begin = args->query_starts[b], end = args->query_starts[b + 1];
        const int32_t first = args->node_starts[b];
        add_nodes(args, first, args->node_starts[b + 1], 0, 31,
                  (int64_t)(end - begin) * args->num_heads);
        const float *row = args->sums + args->node_rows[first] * args->num_heads * row_words;
        for (int32_t q = begin; q < end; q++)
            for (int32_t head = 0; head < args->num_heads; head++, row += row_words)
                write_row(&goal, q, head, row, row[args->value_dim], row[args->value_dim + 1]);
    }
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
