/* Few query rows of floats against a block, as in a decode: laying keys and values out would cost
 * more than it saves, so both are read as they lie. tile.h includes this file where a vector's
 * words are floats.
 *
 * Of bfloat16, the even and the odd elements of a vector are each one operation away from being
 * floats. Queries are taken in that order, which a sum over them does not notice, and results are
 * put in order once, when a share is done.
 */

/* Whether a share's rows are few, and can be read as they lie. */
INLINE int NAME(are_few)(const struct vkv_attention *args, const struct share *share) {
    return rows_of_head(args, share) <= FEW_ROWS && NAME(by_lanes)(args);
}

/* 2 * LANES elements: of bfloat16 the even ones and the odd ones, of floats a half and a half. */
INLINE void NAME(load_two)(const char *row, const int is_bf16, VEC *x, VEC *y) {
    if (is_bf16) {
        IVEC pairs;
        memcpy(&pairs, row, sizeof pairs);
        *x = (VEC)(pairs << 16);
        *y = (VEC)(pairs & (int32_t)0xffff0000);
    } else {
        memcpy(x, row, sizeof *x);
        memcpy(y, row + sizeof *x, sizeof *y);
    }
}

/* Undoes that order in the rows of a share's result. */
static void NAME(put_in_order)(float *out, int num_floats) {
    for (int i = 0; i < num_floats; i += 2 * LANES) {
        float apart[2 * LANES];
        memcpy(apart, out + i, sizeof apart);
        for (int d = 0; d < LANES; d++) {
            out[i + 2 * d] = apart[d];
            out[i + 2 * d + 1] = apart[LANES + d];
        }
    }
}

/* Lane i of the result is the sum of vector i's lanes. The vectors are overwritten. */
INLINE VEC NAME(sums)(VEC *x) {
#if LANES == 8
    for (int i = 0; i < 4; i++) {
        const __m256 a = (__m256)x[2 * i], b = (__m256)x[2 * i + 1];
        x[i] = (VEC)(_mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b));
    }
    for (int i = 0; i < 2; i++) {
        const __m256d a = (__m256d)x[2 * i], b = (__m256d)x[2 * i + 1];
        x[i] = (VEC)_mm256_unpacklo_pd(a, b) + (VEC)_mm256_unpackhi_pd(a, b);
    }
    const __m256 a = (__m256)x[0], b = (__m256)x[1];
    return (VEC)(_mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31));
#else
    NAME(transpose)((IVEC *)x);
    VEC sum = x[0];
    for (int i = 1; i < LANES; i++) sum += x[i];
    return sum;
#endif
}

/* Fetches the next lines of the rows to come, to the second cache. As many as are read meanwhile,
 * since memory has only so many reads under way, and for the second four rows (NULL) none. */
INLINE void NAME(fetch)(struct stream *stream, int64_t num_bytes) {
    if (!stream) return;
    struct stream to = *stream; /* in registers */
    for (; num_bytes > 0 && to.num_rows > 0; num_bytes -= 64) {
        __builtin_prefetch(to.row + to.at, 0, 2);
        to.at += 64;
        if (to.at < to.row_bytes) continue;
        to.at = 0;
        to.row += to.stride;
        to.num_rows--;
    }
    *stream = to;
}

INLINE int NAME(within)(int i, int first, int last) { return i < first ? first : i < last ? i : last; }

/* scores[rows][LANES] of tokens `first` to `last`; others mean nothing, and are not read. */
INLINE void NAME(score_rows)(const int rows, const int is_bf16, const char *keys, int64_t stride,
                             int first, int last, int dim, const int32_t *query, int query_words,
                             float *scores, struct stream *stream) {
    const int item = is_bf16 ? 2 : 4;
    VEC parts[4][LANES]; /* of a token each, to be summed */
    for (int i = 0; i < LANES; i += 2) {
        const char *k = keys + NAME(within)(i, first, last) * stride;
        const char *l = keys + NAME(within)(i + 1, first, last) * stride;
        VEC a0 = {0}, a1 = {0}, a2 = {0}, a3 = {0}, b0 = {0}, b1 = {0}, b2 = {0}, b3 = {0};
        NAME(fetch)(stream, 2 * dim * item);
        for (int d = 0; d < dim; d += 2 * LANES) {
            VEC k0, k1, l0, l1;
            NAME(load_two)(k + d * item, is_bf16, &k0, &k1);
            NAME(load_two)(l + d * item, is_bf16, &l0, &l1);
#define ROW(r, a, b)                                                 \
    if (r < rows) {                                                  \
        const float *q = (const float *)query + r * query_words + d; \
        const VEC q0 = NAME(load)(q), q1 = NAME(load)(q + LANES);    \
        a += k0 * q0;                                                \
        b += l0 * q0;                                                \
        a += k1 * q1;                                                \
        b += l1 * q1;                                                \
    }
            ROW(0, a0, b0) ROW(1, a1, b1) ROW(2, a2, b2) ROW(3, a3, b3)
#undef ROW
        }
        parts[0][i] = a0, parts[0][i + 1] = b0;
        parts[1][i] = a1, parts[1][i + 1] = b1;
        parts[2][i] = a2, parts[2][i + 1] = b2;
        parts[3][i] = a3, parts[3][i + 1] = b3;
    }
    for (int r = 0; r < rows; r++) NAME(store)(scores + r * FLOAT_STEP, NAME(sums)(parts[r]));
}

/* out[rows][width] += weights[rows][FLOAT_STEP] times the values of `len` tokens. */
INLINE void NAME(add_values)(const int rows, const int is_bf16, const char *values, int64_t stride,
                             int len, int dim, const int32_t *weights, float *out, int width,
                             struct stream *stream) {
    const int item = is_bf16 ? 2 : 4;
    for (int d = 0; d < dim; d += 2 * LANES) {
        const char *row = values + d * item;
        VEC a0, a1, a2, a3, b0, b1, b2, b3;
        NAME(fetch)(stream, len * 2 * LANES * item);
#define ROW(r, a, b)                                 \
    if (r < rows) {                                  \
        a = NAME(load)(out + r * width + d);         \
        b = NAME(load)(out + r * width + d + LANES); \
    }
        ROW(0, a0, b0) ROW(1, a1, b1) ROW(2, a2, b2) ROW(3, a3, b3)
#undef ROW
        for (int t = 0; t < len; t++, row += stride) {
            VEC x, y;
            NAME(load_two)(row, is_bf16, &x, &y);
#define ROW(r, a, b)                                                       \
    if (r < rows) {                                                        \
        const VEC weight = (VEC)NAME(isplat)(weights[r * FLOAT_STEP + t]); \
        a += weight * x;                                                   \
        b += weight * y;                                                   \
    }
            ROW(0, a0, b0) ROW(1, a1, b1) ROW(2, a2, b2) ROW(3, a3, b3)
#undef ROW
        }
#define ROW(r, a, b)                                 \
    if (r < rows) {                                  \
        NAME(store)(out + r * width + d, a);         \
        NAME(store)(out + r * width + d + LANES, b); \
    }
        ROW(0, a0, b0) ROW(1, a1, b1) ROW(2, a2, b2) ROW(3, a3, b3)
#undef ROW
    }
}

/* Four rows at a time; their number and type become constants, so that sums stay in registers. */
#define FOR_EACH_FEW(CALL)                                              \
    for (int r = 0; r < rows; r += 4)                                   \
        switch (4 * is_bf16 + (rows - r < 4 ? rows - r : 4)) {          \
            case 1: CALL(1, 0); break;                                  \
            case 2: CALL(2, 0); break;                                  \
            case 3: CALL(3, 0); break;                                  \
            case 4: CALL(4, 0); break;                                  \
            case 5: CALL(1, 1); break;                                  \
            case 6: CALL(2, 1); break;                                  \
            case 7: CALL(3, 1); break;                                  \
            case 8: CALL(4, 1); break;                                  \
        }

static void NAME(score_few)(int rows, int is_bf16, const char *keys, int64_t stride, int first,
                            int last, int dim, const int32_t *query, int query_words,
                            float *scores, struct stream *stream) {
#define CALL(n, bf16)                                                               \
    NAME(score_rows)(n, bf16, keys, stride, first, last, dim, query + r * query_words, \
                     query_words, scores + r * FLOAT_STEP, r ? NULL : stream)
    FOR_EACH_FEW(CALL)
#undef CALL
}

static void NAME(add_few)(int rows, int is_bf16, const char *values, int64_t stride, int len,
                          int dim, const int32_t *weights, float *out, int width,
                          struct stream *stream) {
#define CALL(n, bf16)                                                            \
    NAME(add_values)(n, bf16, values, stride, len, dim, weights + r * FLOAT_STEP, \
                     out + r * width, width, r ? NULL : stream)
    FOR_EACH_FEW(CALL)
#undef CALL
}

#undef FOR_EACH_FEW

/* A part of few rows, FLOAT_STEP at a time, while as much of the next is fetched as is read: in one
 * stream where values lie right behind keys. */
static void NAME(attend_few)(const struct vkv_attention *args, const struct share *share,
                             struct scratch *s, int first, int last) {
    const int is_bf16 = args->dtype == VKV_BFLOAT16, item = is_bf16 ? 2 : 4;
    const int rows = rows_of_head(args, share), width = s->value_width;
    const int64_t slot = args->slots[share->seq];
    const int64_t key_stride = item * args->key_token_stride;
    const int64_t value_stride = item * args->value_token_stride;
    const int64_t key_head = item * args->key_head_stride;
    const int64_t value_head = item * args->value_head_stride;
    const char *keys = (const char *)args->keys + item * slot * args->key_slot_stride +
                       first * key_stride + share->first_head * key_head;
    const char *values = (const char *)args->values + item * slot * args->value_slot_stride +
                         first * value_stride + share->first_head * value_head;
    /* A share has one head, or heads that lie side by side (tiling_of): a token's are one row. */
    const int64_t num_heads = share->last_head - share->first_head;
    struct stream key_rows = {.row = keys,
                              .stride = key_stride,
                              .row_bytes = num_heads * item * args->key_dim,
                              .num_rows = share->last_key - first};
    struct stream value_rows = {.row = values,
                                .stride = value_stride,
                                .row_bytes = num_heads * item * args->value_dim,
                                .num_rows = key_rows.num_rows};
    struct stream *of_keys = &key_rows, *of_values = &value_rows;
    if (key_stride == value_stride && values == keys + key_rows.row_bytes) {
        key_rows.row_bytes += value_rows.row_bytes;
        value_rows.num_rows = 0;
        of_values = of_keys;
    }
    NAME(fetch)(&key_rows, FLOAT_STEP * key_rows.row_bytes);
    NAME(fetch)(&value_rows, FLOAT_STEP * value_rows.row_bytes);
    int skip = first % FLOAT_STEP; /* tokens that no query sees */
    keys -= skip * key_stride;
    values -= skip * value_stride;
    for (int start = first - skip; start < last; start += FLOAT_STEP, skip = 0) {
        const int left = last - start, len = left < FLOAT_STEP ? left : FLOAT_STEP;
        for (int h = 0; h < num_heads; h++) {
            const int32_t *query = s->query + h * rows * s->query_words;
            for (int t = skip / LANES * LANES; t < len; t += LANES)
                NAME(score_few)(rows, is_bf16, keys + t * key_stride + h * key_head, key_stride,
                                t < skip ? skip - t : 0, (len - t < LANES ? len - t : LANES) - 1,
                                args->key_dim, query, s->query_words, s->scores + t, of_keys);
            NAME(weigh)(FLOAT_STEP, args, share, s, h * rows, 0, rows, start, len);
            NAME(add_few)(rows, is_bf16, values + skip * value_stride + h * value_head,
                          value_stride, len - skip, args->value_dim, s->weights + skip,
                          s->part.out + h * rows * width, width, of_values);
        }
        keys += FLOAT_STEP * key_stride;
        values += FLOAT_STEP * value_stride;
    }
    if (is_bf16) NAME(put_in_order)(s->part.out, share->num_rows * width);
}
