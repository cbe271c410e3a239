/* Norms, rotary embedding and gates in one pass each, where PyTorch makes five to ten. */
#include "kernels.h"
#include "rows.h"
#include "scalars.h"

#include <math.h>
#include <stddef.h>

enum { CHUNK = 256 }; /* elements widened at a time */

INLINE void give(const float *values, int count, int32_t dtype, void *goal, int64_t at) {
    if (dtype == VKV_BFLOAT16) {
        uint16_t *p = (uint16_t *)goal + at;
        for (int i = 0; i < count; i++) p[i] = to_bf16(values[i]);
    } else {
        memcpy((float *)goal + at, values, 4 * (size_t)count);
    }
}

INLINE int chunk_at(int at, int dim) { return dim - at < CHUNK ? dim - at : CHUNK; }

/* -- norms ----------------------------------------------------------------------------------- */

INLINE void rms_norm_rows(const void *data, int64_t first, int64_t last) {
    const struct vkv_rms_norm *a = data;
    float x[CHUNK], w[CHUNK];
    for (int64_t r = first; r < last; r++) {
        float sums[16] = {0}, sum = 0;
        for (int at = 0; at < a->dim; at += CHUNK) {
            const int count = chunk_at(at, a->dim), whole = count / 16 * 16;
            take(a->inputs, r * a->input_stride + at, count, a->dtype, x);
            for (int i = 0; i < whole; i += 16)
                for (int j = 0; j < 16; j++) sums[j] += x[i + j] * x[i + j];
            for (int i = whole; i < count; i++) sum += x[i] * x[i];
        }
        for (int j = 0; j < 16; j++) sum += sums[j];
        const float factor = 1.0f / sqrtf(sum / (float)a->dim + a->eps);
        for (int at = 0; at < a->dim; at += CHUNK) {
            const int count = chunk_at(at, a->dim);
            take(a->inputs, r * a->input_stride + at, count, a->dtype, x);
            take(a->weight, at, count, a->dtype, w);
            for (int i = 0; i < count; i++) x[i] = x[i] * factor * (a->offset + w[i]);
            give(x, count, a->dtype, a->out, r * a->dim + at);
        }
    }
}

VERSIONS(rms_norm_rows)

int64_t vkv_rms_norm(const struct vkv_rms_norm *args) {
    run(best_rms_norm_rows(), args, args->num_rows, args->dim, args->num_threads, args->parallel);
    return 0;
}

/* -- rotary embedding ------------------------------------------------------------------------ */

INLINE void rotate_rows(const void *data, int64_t first, int64_t last) {
    const struct vkv_rotate *a = data;
    const int half = a->dim / 2;
    float low[CHUNK], high[CHUNK], out[CHUNK];
    float cos_low[CHUNK], cos_high[CHUNK], sin_low[CHUNK], sin_high[CHUNK];
    for (int64_t t = first; t < last; t++)
        for (int at = 0; at < half; at += CHUNK) {
            const int count = chunk_at(at, half);
            take(a->cosine, t * a->dim + at, count, a->dtype, cos_low);
            take(a->cosine, t * a->dim + half + at, count, a->dtype, cos_high);
            take(a->sine, t * a->dim + at, count, a->dtype, sin_low);
            take(a->sine, t * a->dim + half + at, count, a->dtype, sin_high);
            for (int h = 0; h < a->num_heads; h++) {
                const int64_t from = t * a->token_stride + h * a->head_stride + at;
                const int64_t to = (t * a->num_heads + h) * a->dim + at;
                take(a->inputs, from, count, a->dtype, low);
                take(a->inputs, from + half, count, a->dtype, high);
                for (int i = 0; i < count; i++) out[i] = low[i] * cos_low[i] - high[i] * sin_low[i];
                give(out, count, a->dtype, a->out, to);
                for (int i = 0; i < count; i++)
                    out[i] = high[i] * cos_high[i] + low[i] * sin_high[i];
                give(out, count, a->dtype, a->out, to + half);
            }
        }
}

VERSIONS(rotate_rows)

int64_t vkv_rotate(const struct vkv_rotate *args) {
    run(best_rotate_rows(), args, args->num_tokens, (int64_t)args->num_heads * args->dim,
        args->num_threads, args->parallel);
    return 0;
}

/* -- gates ----------------------------------------------------------------------------------- */

INLINE void gated_rows(const void *data, int64_t first, int64_t last) {
    const struct vkv_gated *a = data;
    float x[CHUNK], up[CHUNK];
    for (int64_t r = first; r < last; r++)
        for (int at = 0; at < a->dim; at += CHUNK) {
            const int count = chunk_at(at, a->dim);
            take(a->inputs, r * a->input_stride + at, count, a->dtype, x);
            take(a->inputs, r * a->input_stride + a->dim + at, count, a->dtype, up);
            for (int i = 0; i < count; i++) x[i] = gate_of(x[i], a->gate) * up[i];
            give(x, count, a->dtype, a->out, r * a->dim + at);
        }
}

VERSIONS(gated_rows)

int64_t vkv_gated(const struct vkv_gated *args) {
    run(best_gated_rows(), args, args->num_rows, 4 * (int64_t)args->dim, args->num_threads,
        args->parallel);
    return 0;
}

/* -- residual connections --------------------------------------------------------------------- */

/* In stretches of CHUNK elements. */
INLINE void add_chunks(const void *data, int64_t first, int64_t last) {
    const struct vkv_add *a = data;
    float left[CHUNK], right[CHUNK];
    for (int64_t at = first * CHUNK; at < last * CHUNK && at < a->count; at += CHUNK) {
        const int count = a->count - at < CHUNK ? (int)(a->count - at) : CHUNK;
        take(a->left, at, count, a->dtype, left);
        take(a->right, at, count, a->dtype, right);
        for (int i = 0; i < count; i++) left[i] += right[i];
        give(left, count, a->dtype, a->out, at);
    }
}

VERSIONS(add_chunks)

int64_t vkv_add(const struct vkv_add *args) {
    run(best_add_chunks(), args, (args->count + CHUNK - 1) / CHUNK, CHUNK, args->num_threads,
        args->parallel);
    return 0;
}
