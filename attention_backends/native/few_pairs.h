/* Few query rows of bfloat16 against keys and values as they lie, as in a decode. tile.h includes
 * this file where a word is a pair of bfloat16.
 *
 * The order of sums is that of keys and values that are laid out: a lane is a token, or a
 * dimension, and words come in turn. Keys are transposed in registers, eight words of sixteen tokens
 * at a time, and not stored: few rows would spend more on that than on their products.
 */

/* Whether a share's rows are few, and can be read as they lie. */
INLINE int NAME(are_few)(const struct vkv_attention *args, const struct share *share) {
    return rows_of_head(args, share) <= FEW_ROWS && args->key_dim % 32 == 0 &&
           args->value_dim % 32 == 0;
}

/* Eight words of sixteen tokens, `stride` bytes apart: word[i] becomes word i of each. */
INLINE void NAME(eight_words)(const char *row, int64_t stride, IVEC *word) {
    __m512i a[8], b[8];
    for (int i = 0; i < 8; i++) { /* tokens i, i + 4 of the first eight, then of the others */
        const char *const at = row + (i % 4 + i / 4 * 8) * stride;
        a[i] = _mm512_inserti64x4(
            _mm512_castsi256_si512(_mm256_loadu_si256((const void *)at)),
            _mm256_loadu_si256((const void *)(at + 4 * stride)), 1);
    }
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        word[i] = (IVEC)_mm512_shuffle_i32x4(a[i], a[4 + i], 0x88);
        word[4 + i] = (IVEC)_mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
    }
}

/* scores[rows][PAIR_STEP] of `groups` times sixteen tokens. What lies `lead_bytes` on is
 * fetched, to the second cache. */
INLINE void NAME(score_pairs)(const int rows, const int groups, const char *keys, int64_t stride,
                              int64_t lead_bytes, int dim, const int32_t *query, int query_words,
                              float *scores) {
    VEC acc[2][FEW_ROWS];
#pragma GCC unroll 2
    for (int g = 0; g < groups; g++)
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) acc[g][r] = (VEC){0};
    for (int d = 0; d < dim; d += 16, query += 8) {
        IVEC word[2][8];
#pragma GCC unroll 2
        for (int g = 0; g < groups; g++) {
            const char *const row = keys + 16 * g * stride + 2 * d;
            NAME(eight_words)(row, stride, word[g]);
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) /* half of the rows, whose line this is */
                __builtin_prefetch(row + lead_bytes + (i + d / 2 % 16) * stride, 0, 2);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                const IVEC of_query = NAME(isplat)(query[r * query_words + i]);
#pragma GCC unroll 2
                for (int g = 0; g < groups; g++)
                    acc[g][r] = (VEC)_mm512_dpbf16_ps((__m512)acc[g][r], (__m512bh)of_query,
                                                      (__m512bh)word[g][i]);
            }
    }
#pragma GCC unroll 2
    for (int g = 0; g < groups; g++)
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
            NAME(store)(scores + r * PAIR_STEP + g * LANES, acc[g][r]);
}

/* out[rows][columns * 16] += weights[rows][PAIR_STEP] times as much of the values. */
INLINE void NAME(add_pairs)(const int rows, const int columns, const char *values, int64_t stride,
                            int64_t lead_bytes, const int32_t *weights, float *out, int width) {
    const __m512i first = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
        35, 3, 34, 2, 33, 1, 32, 0); /* words 0 to 15 of both rows, alternating */
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    VEC acc[FEW_ROWS][COLUMNS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < columns; v++) acc[r][v] = NAME(load)(out + r * width + v * LANES);
#pragma GCC unroll 1
    for (int t = 0; t < PAIR_STEP / 2; t++, values += 2 * stride) {
        IVEC word[COLUMNS];
#pragma GCC unroll 2
        for (int v = 0; v < columns; v += 2) {
            const __m512i even = _mm512_loadu_si512(values + 32 * v);
            const __m512i odd = _mm512_loadu_si512(values + stride + 32 * v);
            word[v] = (IVEC)_mm512_permutex2var_epi16(even, first, odd);
            word[v + 1] = (IVEC)_mm512_permutex2var_epi16(even, second, odd);
            __builtin_prefetch(values + lead_bytes + 32 * v, 0, 2);
            __builtin_prefetch(values + lead_bytes + stride + 32 * v, 0, 2);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const IVEC weight = NAME(isplat)(weights[r * WORDS(PAIR_STEP) + t]);
#pragma GCC unroll 4
            for (int v = 0; v < columns; v++)
                acc[r][v] = (VEC)_mm512_dpbf16_ps((__m512)acc[r][v], (__m512bh)weight,
                                                  (__m512bh)word[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < columns; v++) NAME(store)(out + r * width + v * LANES, acc[r][v]);
}

/* The number of rows becomes a constant, so that sums stay in registers. */
#define FOR_ROWS(rows, CALL)   \
    switch (rows) {            \
        case 1: CALL(1) break; \
        case 2: CALL(2) break; \
        case 3: CALL(3) break; \
        case 4: CALL(4) break; \
        case 5: CALL(5) break; \
        case 6: CALL(6) break; \
        case 7: CALL(7) break; \
        case 8: CALL(8) break; \
    }

/* scores[rows][PAIR_STEP]. Of up to four rows, two groups of tokens find room in registers. */
static void NAME(score_few)(int rows, const char *keys, int64_t stride, int64_t lead_bytes,
                            int dim, const int32_t *query, int query_words, float *scores) {
#define CALL(n)                                                                                \
    for (int t = 0; t < PAIR_STEP; t += n > 4 ? LANES : 2 * LANES)                             \
        NAME(score_pairs)(n, n > 4 ? 1 : 2, keys + t * stride, stride, lead_bytes, dim, query, \
                          query_words, scores + t);
    FOR_ROWS(rows, CALL)
#undef CALL
}

/* out[rows][dim] += weights times values. */
static void NAME(add_few)(int rows, const char *values, int64_t stride, int64_t lead_bytes,
                          int dim, const int32_t *weights, float *out, int width) {
#define CALL(n)                                                                                 \
    {                                                                                           \
        int d = 0;                                                                              \
        for (; n <= 4 && d + 64 <= dim; d += 64)                                                \
            NAME(add_pairs)(n, 4, values + 2 * d, stride, lead_bytes, weights, out + d, width); \
        for (; d < dim; d += 32)                                                                \
            NAME(add_pairs)(n, 2, values + 2 * d, stride, lead_bytes, weights, out + d, width); \
    }
    FOR_ROWS(rows, CALL)
#undef CALL
}

#undef FOR_ROWS

/* Tokens `first` to `last` of PAIR_STEP, copied side by side, zero around them. */
static void NAME(copy_some)(const char *rows, int64_t stride, int first, int last,
                            int64_t row_bytes, char *goal) {
    memset(goal, 0, (size_t)(PAIR_STEP * row_bytes));
    for (int t = first; t < last; t++)
        memcpy(goal + t * row_bytes, rows + t * stride, (size_t)row_bytes);
}

/* Fetches tokens of a share's KV heads, which lie side by side, to the second cache. */
static void NAME(fetch_tokens)(const struct vkv_attention *args, const struct share *share,
                               int first, int last) {
    const int64_t slot = args->slots[share->seq], num_heads = share->last_head - share->first_head;
    const uint16_t *keys = (const uint16_t *)args->keys + slot * args->key_slot_stride +
                           share->first_head * args->key_head_stride;
    const uint16_t *values = (const uint16_t *)args->values + slot * args->value_slot_stride +
                             share->first_head * args->value_head_stride;
    for (int64_t t = first; t < last; t++) {
        for (int64_t i = 0; i < num_heads * args->key_dim; i += 32)
            __builtin_prefetch(keys + t * args->key_token_stride + i, 0, 2);
        for (int64_t i = 0; i < num_heads * args->value_dim; i += 32)
            __builtin_prefetch(values + t * args->value_token_stride + i, 0, 2);
    }
}

/* A part of few rows, PAIR_STEP at a time on a grid, while as many are fetched. */
static void NAME(attend_few)(const struct vkv_attention *args, const struct share *share,
                             struct scratch *s, int first, int last) {
    const int rows = rows_of_head(args, share), width = s->value_width;
    const int64_t key_bytes = 2 * args->key_dim, value_bytes = 2 * args->value_dim;
    const int64_t slot = args->slots[share->seq];
    const uint16_t *const all_keys = (const uint16_t *)args->keys + slot * args->key_slot_stride;
    const uint16_t *const all_values =
        (const uint16_t *)args->values + slot * args->value_slot_stride;
    for (int t = first / PAIR_STEP * PAIR_STEP; t < last; t += PAIR_STEP) {
        const int begin = t < first ? first - t : 0; /* tokens before it no query sees */
        const int end = last - t < PAIR_STEP ? last - t : PAIR_STEP;
        const int is_whole = begin == 0 && end == PAIR_STEP;
        const int next = t + PAIR_STEP;
        const int num_next = (int)max64(0, min64(share->last_key - next, PAIR_STEP));
        const int lead = is_whole ? num_next : 0; /* in tokens: none behind the last is fetched */
        if (t <= share->first_key) NAME(fetch_tokens)(args, share, first, t + end);
        if (!is_whole) NAME(fetch_tokens)(args, share, next, next + num_next);
        for (int h = share->first_head; h < share->last_head; h++) {
            const int base = (h - share->first_head) * rows;
            const void *keys = all_keys + t * args->key_token_stride + h * args->key_head_stride;
            const void *values =
                all_values + t * args->value_token_stride + h * args->value_head_stride;
            int64_t key_stride = 2 * args->key_token_stride;
            int64_t value_stride = 2 * args->value_token_stride;
            if (!is_whole) {
                NAME(copy_some)(keys, key_stride, begin, end, key_bytes, (char *)s->keys);
                NAME(copy_some)(values, value_stride, begin, end, value_bytes, (char *)s->values);
                keys = s->keys, values = s->values;
                key_stride = key_bytes, value_stride = value_bytes;
            }
            NAME(score_few)(rows, keys, key_stride, lead * key_stride, args->key_dim,
                            s->query + base * s->query_words, s->query_words, s->scores);
            NAME(weigh)(PAIR_STEP, args, share, s, base, 0, rows, t, end);
            NAME(add_few)(rows, values, value_stride, lead * value_stride, args->value_dim,
                          s->weights, s->part.out + base * width, width);
        }
    }
}
