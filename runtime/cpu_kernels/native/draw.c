/* One token of each row, drawn by a random number for every token.
 *
 * The token with the largest log probability + g is drawn, where the g are independent and follow
 * Gumbel's distribution: the chances are then the probabilities (Gumbel's trick), no sum over the
 * row is needed, and where a logit moves by a rounding, few draws change.
 */
#include "kernels.h"
#include "rows.h"
#include "scalars.h"

#include <math.h>

enum { CHUNK = 256 };

/* 32 random bits of a token: a mix of its id with the row's key. */
INLINE uint32_t random_bits(uint32_t token, uint32_t low, uint32_t high) {
    uint32_t x = (token ^ low) * 0x9e3779b1u;
    x = (x ^ x >> 16) + high;
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

/* -log(-log(1 - u)), where u is uniform between 0 and 1, to a relative 2^-24 where it is small. */
INLINE float gumbel(uint32_t bits) {
    /* Two halves: vectors convert signed numbers alone. */
    float u = ((float)(int32_t)(bits >> 16) * 65536.0f + (float)(int32_t)(bits & 0xffff) + 0.5f) *
              2.3283064e-10f;
    u = u > 0.99999994f ? 0.99999994f : u;
    const float rest = 1.0f - u, lost = 1.0f - rest; /* of u, what survives the subtraction */
    const float exponential = lost > 0.0f ? -log_of(rest) * (u / lost) : u;
    return -log_of(exponential);
}

INLINE void draw_rows(const void *data, int64_t first, int64_t last) {
    const struct vkv_draw *a = data;
    float scores[CHUNK];
    for (int64_t r = first; r < last; r++) {
        const float peak = a->peaks[r], temperature = a->temperatures[r], floor = a->floors[r];
        const uint32_t low = (uint32_t)a->keys[r], high = (uint32_t)(a->keys[r] >> 32);
        float best = -INFINITY;
        int64_t token = 0;
        for (int at = 0; at < a->vocab_size; at += CHUNK) {
            const int count = a->vocab_size - at < CHUNK ? a->vocab_size - at : CHUNK;
            take(a->logits, a->rows[r] * a->row_stride + at, count, a->dtype, scores);
            float top = -INFINITY;
            for (int i = 0; i < count; i++) {
                const float scaled = (scores[i] - peak) / temperature; /* at most 0 */
                const float score = scaled + gumbel(random_bits((uint32_t)(at + i), low, high));
                scores[i] = scaled >= floor ? score : -INFINITY;
            }
            for (int i = 0; i < count; i++) top = scores[i] > top ? scores[i] : top;
            if (top > best) { /* the first of equals */
                int i = 0;
                while (scores[i] != top) i++;
                best = top;
                token = at + i;
            }
        }
        a->tokens[r] = token;
    }
}

VERSIONS(draw_rows)

int64_t vkv_draw(const struct vkv_draw *args) {
    run(best_draw_rows(), args, args->num_rows, 8 * (int64_t)args->vocab_size, args->num_threads,
        args->parallel);
    return 0;
}
