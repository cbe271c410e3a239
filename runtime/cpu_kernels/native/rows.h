/* Kernels that compute rows one by one: compiled for what a processor has, and shared by threads. */
#ifndef VKV_ROWS_H
#define VKV_ROWS_H

#include "kernels.h"

#include <stddef.h>

enum { SHARE_ELEMENTS = 64 << 10 }; /* below it, waiting for a thread costs more than it saves */

/* Rows first .. last of a kernel. */
typedef void (*rows_kernel)(const void *args, int64_t first, int64_t last);

/* best_NAME(): the kernel NAME, compiled for what this processor has. (GCC's `target_clones` will
 * not do: it takes "arch=haswell" for that one processor alone.) */
#define VERSION(name, suffix, attributes)                                                    \
    attributes static void name##_##suffix(const void *args, int64_t first, int64_t last) { \
        name(args, first, last);                                                             \
    }
#if defined(__x86_64__)
#define VERSIONS(name)                                               \
    VERSION(name, avx512, __attribute__((target("avx512f"))))        \
    VERSION(name, avx2, __attribute__((target("avx2,fma"))))         \
    VERSION(name, plain, )                                           \
    static rows_kernel best_##name(void) {                           \
        __builtin_cpu_init();                                        \
        if (__builtin_cpu_supports("avx512f")) return name##_avx512; \
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return name##_avx2; \
        return name##_plain;                                         \
    }
#else
#define VERSIONS(name)      \
    VERSION(name, plain, )  \
    static rows_kernel best_##name(void) { return name##_plain; }
#endif

struct job {
    rows_kernel kernel;
    const void *args;
    int64_t num_rows, share, next; /* next: atomic */
};

static void work(void *data) {
    struct job *job = data;
    for (;;) {
        const int64_t first = __atomic_fetch_add(&job->next, job->share, __ATOMIC_RELAXED);
        if (first >= job->num_rows) return;
        const int64_t last = first + job->share;
        job->kernel(job->args, first, last < job->num_rows ? last : job->num_rows);
    }
}

static void run(rows_kernel kernel, const void *args, int64_t num_rows, int64_t row_elements,
                int32_t num_threads, vkv_parallel parallel) {
    struct job job = {kernel, args, num_rows, 1 + SHARE_ELEMENTS / row_elements, 0};
    if (num_threads > 1 && parallel && num_rows > job.share)
        parallel(work, &job, (unsigned)num_threads, 0);
    else
        kernel(args, 0, num_rows);
}

#endif
