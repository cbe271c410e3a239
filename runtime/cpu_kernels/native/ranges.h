/* How threads share the panels of a weight: each has a range of them and reads it in order, so that
 * what it fetches ahead no other reads. Who is done helps the others.
 */
#ifndef VKV_RANGES_H
#define VKV_RANGES_H

#include <stdint.h>

enum { MOST_RANGES = 64 };

struct range {
    int64_t next; /* atomic; a cache line apart from those of other ranges */
    int64_t end;
    char apart[48];
};

struct ranges {
    int64_t count, next_thread; /* next_thread: atomic */
    struct range of[MOST_RANGES];
};

/* Where a thread is. */
struct turn {
    int64_t range, left; /* ranges that it has yet to find empty */
};

/* All but the last range begin and end at a multiple of `unit`. */
static inline void divide(struct ranges *ranges, int64_t num_panels, int64_t unit,
                          int64_t num_threads) {
    ranges->count = num_threads < 1 ? 1 : num_threads < MOST_RANGES ? num_threads : MOST_RANGES;
    ranges->next_thread = 0;
    for (int64_t r = 0; r < ranges->count; r++) {
        ranges->of[r].next = num_panels * r / ranges->count / unit * unit;
        ranges->of[r].end = num_panels * (r + 1) / ranges->count / unit * unit;
    }
    ranges->of[ranges->count - 1].end = num_panels;
}

static inline struct turn begin_turn(struct ranges *ranges) {
    const int64_t thread = __atomic_fetch_add(&ranges->next_thread, 1, __ATOMIC_RELAXED);
    return (struct turn){thread % ranges->count, ranges->count};
}

/* Takes up to `count` panels from `first` on, of a range that ends at `end`; 0 if none are left. */
static inline int next_panels(struct ranges *ranges, struct turn *turn, int64_t count,
                              int64_t *first, int64_t *end) {
    for (; turn->left > 0; turn->left--, turn->range = (turn->range + 1) % ranges->count) {
        struct range *range = &ranges->of[turn->range];
        *first = __atomic_fetch_add(&range->next, count, __ATOMIC_RELAXED);
        *end = range->end;
        if (*first < *end) return 1;
    }
    return 0;
}

#endif
