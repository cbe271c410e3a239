/* A list of kernel calls, made again one after the other: a step without Python in between. */
#include "kernels.h"

#include <stddef.h>

int64_t vkv_replay(const struct vkv_call *calls, int64_t first, int64_t num_calls,
                   int64_t *needed) {
    for (int64_t i = first; i < num_calls; i++) {
        const struct vkv_call *call = calls + i;
        *needed = call->second ? call->with_two(call->first, call->second)
                               : call->with_one(call->first);
        if (*needed) return i;
    }
    return num_calls;
}
