/* Products by 4-bit weights on a CPU: blocks of rows, threads, and the choice of a kernel.
 *
 * A code is multiplied as it is, which is exact: scales come in once a group, in float32, and so do
 * zeros, through the sum of the group's inputs. So weights are never rounded.
 */
#include "kernel.h"

#include <stddef.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

enum {
    MOST_RANGES = 64,
    ARRANGED_APART = 64 << 10, /* inputs, from which arranging them is worth other threads */
    OWN_ROWS = 72,   /* that each of a few threads arranges for itself: lines that another core */
    OWN_THREADS = 4, /* has written take longer to come than to be made again */
    PASS_ROWS = 48 /* whose totals stay in the first cache, beside the weights kept of a stretch;
                      inputs are read once a tile, and need not */
};

/* Tiles side by side, which a thread reads in order. */
struct range {
    int64_t next; /* atomic; a cache line apart from those of other threads */
    int64_t end;
    char apart[48];
};

struct job {
    const struct vkv_int4 *args;
    const struct vkv_int4_kernel *kernel;
    int64_t next_block, next_thread; /* atomic */
    struct range *ranges;
    int64_t num_tiles, num_ranges;
    int64_t num_blocks, pass_blocks; /* of rows; of a pass over a tile, at most */
    int64_t stretches;               /* of a row */
    uint16_t *inputs;            /* [block][in_features][rows], as kernels differ; or as given */
    struct vkv_int4_note *notes; /* [block][stretch][rows], or NULL: none needed */
    int32_t each_arranges;       /* inputs and notes, in scratch: a thread has its own */
    int64_t inputs_bytes, scratch_bytes;
    char *scratch; /* of each thread: inputs and notes of its own, totals, kept weights */
};

static int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

/* Rows are divided evenly among blocks. */
static int64_t first_row(const struct job *job, int64_t block) {
    return job->args->num_rows * block / job->num_blocks;
}

/* Stretches that a group is cut in. */
static int64_t group_stretches(const struct vkv_int4 *args) {
    return (args->group_size + STRETCH - 1) / STRETCH;
}

/* The first input of a stretch, and how many it has. */
static int64_t stretch_at(const struct vkv_int4 *args, int64_t stretch, int64_t *length) {
    const int64_t group = stretch / group_stretches(args);
    const int64_t within = stretch % group_stretches(args) * STRETCH;
    *length = least(STRETCH, args->group_size - within);
    return group * args->group_size + within;
}

/* All stretches of a tile, by some blocks of rows. */
static void multiply_blocks(const struct job *job, int64_t tile, int64_t first, int64_t last,
                            float *totals) {
    const struct vkv_int4 *args = job->args;
    void *kept = totals + args->num_rows * TILE;
    const int64_t groups = args->in_features / args->group_size, in_group = group_stretches(args);
    const uint8_t *codes = (const uint8_t *)args->codes + tile * args->in_features * (TILE / 2);
    const int64_t scale_bytes = args->scale_type == VKV_INT4_FLOAT32 ? 4 : 2;
    struct vkv_int4_stretches some = {.scale_type = args->scale_type};
    for (int64_t s = 0; s < job->stretches; s += some.count) {
        const int64_t k = stretch_at(args, s, &some.length);
        int64_t next_length = 0;
        if (s + 1 < job->stretches && args->num_rows <= job->kernel->pair_rows)
            stretch_at(args, s + 1, &next_length);
        some.count = next_length == some.length ? 2 : 1;
        const int64_t group = s / in_group, at = (tile * groups + group) * TILE;
        some.codes = codes + k * (TILE / 2);
        some.scales = (const char *)args->scales + at * scale_bytes;
        some.zeros = args->zeros ? args->zeros + at : NULL;
        some.scales_apart = ((s + 1) / in_group - group) * TILE;
        some.weights = job->kernel->keeps && last - first > 1 ? kept : NULL;
        for (int64_t block = first; block < last; block++) {
            const int64_t row = first_row(job, block), rows = first_row(job, block + 1) - row;
            some.kept = block > first;
            some.inputs = job->inputs + row * args->in_features + k * rows;
            some.notes = job->notes ? job->notes + row * job->stretches + s * rows : NULL;
            job->kernel->multiply(rows, &some, totals + row * TILE);
        }
    }
}

static void multiply_tile(const struct job *job, int64_t tile, float *totals) {
    memset(totals, 0, (size_t)(job->args->num_rows * TILE) * sizeof(float));
    for (int64_t first = 0; first < job->num_blocks; first += job->pass_blocks)
        multiply_blocks(job, tile, first, least(first + job->pass_blocks, job->num_blocks), totals);
    job->kernel->write_out(job->args, tile, totals);
}

static void arrange_block(const struct job *job, int64_t block) {
    const struct vkv_int4 *args = job->args;
    const int64_t row = first_row(job, block), rows = first_row(job, block + 1) - row;
    for (int64_t s = 0; s < job->stretches; s++) {
        int64_t length;
        const int64_t k = stretch_at(args, s, &length);
        job->kernel->arrange((const uint16_t *)args->inputs + row * args->in_features + k, rows,
                             args->in_features, length,
                             job->inputs + row * args->in_features + k * rows,
                             job->notes ? job->notes + row * job->stretches + s * rows : NULL);
    }
}

/* A thread takes a block of rows at a time. */
static void arrange(void *data) {
    struct job *job = data;
    for (;;) {
        const int64_t block = __atomic_fetch_add(&job->next_block, 1, __ATOMIC_RELAXED);
        if (block >= job->num_blocks) return;
        arrange_block(job, block);
    }
}

static void multiply(void *data) {
    struct job *job = data;
    const int64_t thread = __atomic_fetch_add(&job->next_thread, 1, __ATOMIC_RELAXED);
    if (thread >= job->args->num_threads) return; /* more came than there is scratch for */
    struct job own = *job;
    char *const scratch = job->scratch + thread * job->scratch_bytes;
    float *const totals =
        (float *)(scratch + job->scratch_bytes - KEPT_BYTES) - job->args->num_rows * TILE;
    if (own.each_arranges) {
        own.inputs = (uint16_t *)scratch;
        if (own.notes) own.notes = (struct vkv_int4_note *)(scratch + own.inputs_bytes);
        for (int64_t block = 0; block < own.num_blocks; block++) arrange_block(&own, block);
    }
    for (int64_t i = 0; i < own.num_ranges; i++) { /* its own, then what is left of others' */
        struct range *range = &own.ranges[(thread + i) % own.num_ranges];
        for (;;) {
            const int64_t tile = __atomic_fetch_add(&range->next, 1, __ATOMIC_RELAXED);
            if (tile >= range->end) break;
            multiply_tile(&own, tile, totals);
        }
    }
}

static void run(struct job *job, void (*work)(void *), int threaded) {
    if (threaded && job->args->parallel && job->args->num_threads > 1)
        job->args->parallel(work, job, (unsigned)job->args->num_threads, 0);
    else
        work(job);
}

/* A range for every thread: what one fetches ahead, no other reads. */
static void divide_tiles(struct job *job) {
    job->num_ranges = least(least(job->args->num_threads, MOST_RANGES), job->num_tiles);
    for (int64_t r = 0; r < job->num_ranges; r++) {
        job->ranges[r].next = job->num_tiles * r / job->num_ranges;
        job->ranges[r].end = job->num_tiles * (r + 1) / job->num_ranges;
    }
}

static int64_t multiply_rows(const struct vkv_int4 *args, const struct vkv_int4_kernel *kernel) {
    struct range ranges[MOST_RANGES];
    struct job job = {.args = args, .kernel = kernel, .ranges = ranges};
    job.num_blocks = (args->num_rows + kernel->rows - 1) / kernel->rows;
    const int64_t passes = (args->num_rows + PASS_ROWS - 1) / PASS_ROWS;
    job.pass_blocks = (job.num_blocks + passes - 1) / passes;
    job.num_tiles = (args->out_features + TILE - 1) / TILE;
    divide_tiles(&job);
    job.stretches = args->in_features / args->group_size * group_stretches(args);
    job.inputs_bytes = round_up(args->num_rows * args->in_features * 2, 64);
    const int64_t notes_bytes =
        round_up(args->num_rows * job.stretches * (int64_t)sizeof(struct vkv_int4_note), 64);
    const int has_notes = !kernel->centred || args->zeros;
    const int is_arranged = args->num_rows > 1 || !kernel->reads_a_row || has_notes;
    const int64_t arranged_bytes = is_arranged ? job.inputs_bytes + notes_bytes : 0;
    const int are_few = args->num_rows <= OWN_ROWS && args->num_threads <= OWN_THREADS;
    job.each_arranges = is_arranged && (job.num_blocks == 1 || are_few);
    const int64_t shared_bytes = job.each_arranges ? 0 : arranged_bytes;
    job.scratch_bytes = arranged_bytes - shared_bytes +
                        args->num_rows * TILE * (int64_t)sizeof(float) + KEPT_BYTES;
    const int64_t needed = shared_bytes + args->num_threads * job.scratch_bytes;
    if (args->workspace_bytes < needed) return needed;
    job.inputs = is_arranged ? args->workspace : (uint16_t *)args->inputs;
    if (has_notes) job.notes = (struct vkv_int4_note *)((char *)args->workspace + job.inputs_bytes);
    job.scratch = (char *)args->workspace + shared_bytes;
    if (shared_bytes) run(&job, arrange, args->num_rows * args->in_features > ARRANGED_APART);
    run(&job, multiply, job.num_tiles > 1);
    return 0;
}

static inline uint16_t to_bf16(float x) { /* to nearest, ties to even; a NaN stays one */
    const union { float value; uint32_t bits; } both = {x};
    const uint32_t rounded = (both.bits + 0x7fff + (both.bits >> 16 & 1)) >> 16;
    return (uint16_t)(x != x ? both.bits >> 16 | 0x40 : rounded);
}

void vkv_int4_write_out(const struct vkv_int4 *args, int64_t tile, const float *totals) {
    const int64_t first = tile * TILE, count = least(TILE, args->out_features - first);
    for (int64_t m = 0; m < args->num_rows; m++) {
        uint16_t *goal = (uint16_t *)args->out + m * args->out_features + first;
        for (int64_t i = 0; i < count; i++) goal[i] = to_bf16(totals[m * TILE + i]);
    }
}

#if defined(__x86_64__)
/* Whether float16 scales can be read: not every compiler's __builtin_cpu_supports knows it. Asked
 * once, since a virtual processor takes a microsecond to say so. */
static int has_f16c(void) {
    enum { UNKNOWN, NO, YES };
    static int kept; /* atomic */
    int found = __atomic_load_n(&kept, __ATOMIC_RELAXED);
    if (found == UNKNOWN) {
        unsigned a, b, c, d;
        found = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) ? YES : NO;
        __atomic_store_n(&kept, found, __ATOMIC_RELAXED);
    }
    return found == YES;
}
#endif

static const struct vkv_int4_kernel *kernel_of(const char *name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
        if (!strcmp(name, "avx512_bf16") && __builtin_cpu_supports("avx512bf16"))
            return &vkv_int4_avx512;
        if (!strcmp(name, "int8_avx512_vnni") && __builtin_cpu_supports("avx512vnni"))
            return &vkv_int4_int8_vnni;
    }
    if (has_f16c() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        if (!strcmp(name, "avx2")) return &vkv_int4_avx2;
        if (!strcmp(name, "int8_avx2")) return &vkv_int4_int8_avx2;
    }
#endif
    (void)name;
    return NULL;
}

int32_t vkv_int4_supported(const char *instruction_set) {
    return kernel_of(instruction_set) != NULL;
}

int64_t vkv_int4_multiply(const struct vkv_int4 *args) {
    const struct vkv_int4_kernel *kernel = kernel_of(args->instruction_set);
    return kernel ? multiply_rows(args, kernel) : -1;
}
