/* How codes come to lie in tiles, and back. A model waits for it when it is loaded. */
#include "kernel.h"

#include <string.h>

enum { LINE_BLOCKS = 16 }; /* of a cache line of one output's codes */

struct job {
    const struct vkv_int4_codes *args;
    void (*move)(const struct vkv_int4_codes *args, int64_t tile);
    int64_t num_tiles, next; /* next: atomic */
};

/* Eight nibbles: those of even places in the lower half, those of odd places in the upper. */
static inline uint32_t apart(uint32_t x) {
    uint32_t even = x & 0x0f0f0f0f, odd = x >> 4 & 0x0f0f0f0f;
    even = (even | even >> 4) & 0x00ff00ff, odd = (odd | odd >> 4) & 0x00ff00ff;
    return ((even | even >> 8) & 0xffff) | (odd | odd >> 8) << 16;
}

static inline uint32_t together(uint32_t x) {
    uint32_t even = x & 0xffff, odd = x >> 16;
    even = (even | even << 8) & 0x00ff00ff, odd = (odd | odd << 8) & 0x00ff00ff;
    even = (even | even << 4) & 0x0f0f0f0f, odd = (odd | odd << 4) & 0x0f0f0f0f;
    return even | odd << 4;
}

static void pack_tile(const struct vkv_int4_codes *args, int64_t tile) {
    const int64_t blocks = args->in_features / BLOCK, first = tile * TILE;
    uint32_t *tiled = (uint32_t *)args->tiles + first * blocks;
    for (int64_t line = 0; line < blocks; line += LINE_BLOCKS)
        for (int64_t n = 0; n < TILE; n++) {
            const int64_t last = least(line + LINE_BLOCKS, blocks);
            for (int64_t b = line; b < last; b++) {
                uint32_t eight = 0;
                if (first + n < args->out_features)
                    memcpy(&eight, args->packed + ((first + n) * blocks + b) * 4, 4);
                tiled[b * TILE + n] = apart(eight);
            }
        }
}

static void unpack_tile(const struct vkv_int4_codes *args, int64_t tile) {
    const int64_t blocks = args->in_features / BLOCK, first = tile * TILE;
    const uint32_t *tiled = (const uint32_t *)args->tiles + first * blocks;
    for (int64_t line = 0; line < blocks; line += LINE_BLOCKS)
        for (int64_t n = 0; n < least(TILE, args->out_features - first); n++) {
            const int64_t last = least(line + LINE_BLOCKS, blocks);
            for (int64_t b = line; b < last; b++) {
                const uint32_t eight = together(tiled[b * TILE + n]);
                memcpy(args->packed + ((first + n) * blocks + b) * 4, &eight, 4);
            }
        }
}

static void work(void *data) {
    struct job *job = data;
    for (;;) {
        const int64_t tile = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (tile >= job->num_tiles) return;
        job->move(job->args, tile);
    }
}

static void run(struct job job) {
    job.num_tiles = (job.args->out_features + TILE - 1) / TILE;
    if (job.num_tiles > 1 && job.args->num_threads > 1 && job.args->parallel)
        job.args->parallel(work, &job, (unsigned)job.args->num_threads, 0);
    else
        work(&job);
}

void vkv_int4_pack(const struct vkv_int4_codes *args) {
    run((struct job){.args = args, .move = pack_tile});
}

void vkv_int4_unpack(const struct vkv_int4_codes *args) {
    run((struct job){.args = args, .move = unpack_tile});
}
