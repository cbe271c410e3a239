/* What adapters add to some rows (`lora.c`), for registers of LANES floats.
 *
 * Included once for each width: with LANES, with RANKS and VECTORS, of which four times as many sums
 * have a register each, and with NAME, which makes names of that width.
 */

typedef float NAME(vec) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t NAME(words) __attribute__((vector_size(4 * LANES)));
typedef uint16_t NAME(halves) __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

#define LOAD(goal, is_bf16, from, at)                                                         \
    do {                                                                                      \
        if (is_bf16) {                                                                        \
            const NAME(halves) bits = *(const NAME(halves) *)((const uint16_t *)(from) + (at)); \
            goal = (NAME(vec))(__builtin_convertvector(bits, NAME(words)) << 16);             \
        } else {                                                                              \
            goal = *(const NAME(vec) *)((const float *)(from) + (at));                        \
        }                                                                                     \
    } while (0)

INLINE float NAME(total)(const NAME(vec) *lanes) {
    float sums[LANES];
    memcpy(sums, lanes, sizeof sums);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) sums[i] += sums[i + width];
    return sums[0];
}

/* Adds to sums[r][j] the products of `count` inputs of some rows with `ranks` rows of `down`. */
INLINE void NAME(shrink)(const int rows, const int ranks, const int is_bf16, float (*x)[CHUNK],
                         const void *down, int64_t stride, int count, float (*sums)[MOST_RANK],
                         int j) {
    NAME(vec) acc[ROWS][RANKS];
    FOR(r, rows) FOR(k, ranks) acc[r][k] = (NAME(vec)){0};
    int i = 0;
    for (; i + LANES <= count; i += LANES) {
        NAME(vec) weight[RANKS];
        FOR(k, ranks) LOAD(weight[k], is_bf16, down, (j + k) * stride + i);
        FOR(r, rows) {
            const NAME(vec) input = *(const NAME(vec) *)(x[r] + i);
            FOR(k, ranks) acc[r][k] += input * weight[k];
        }
    }
    NAME(vec) lanes[ROWS][RANKS];
    FOR(r, rows) FOR(k, ranks) lanes[r][k] = acc[r][k];
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < ranks; k++) {
            float sum = NAME(total)(&lanes[r][k]);
            for (int at = i; at < count; at++) /* as one operation, or compilers choose */
                sum = __builtin_fmaf(x[r][at], one(is_bf16, down, (j + k) * stride + at), sum);
            sums[r][j + k] += sum;
        }
}

/* As `put`, of LANES numbers. */
INLINE void NAME(put)(const struct vkv_lora *a, int64_t at, NAME(vec) sum) {
    if (a->dtype == VKV_BFLOAT16 && !a->sets) {
        NAME(vec) x;
        LOAD(x, 1, a->out, at);
        x += sum;
        const NAME(words) bits = (NAME(words))x, is_nan = (NAME(words))(x != x);
        const NAME(words) rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        const NAME(words) chosen = (is_nan & (bits >> 16 | 0x40)) | (~is_nan & rounded);
        *(NAME(halves) *)((uint16_t *)a->out + at) = __builtin_convertvector(chosen, NAME(halves));
    } else {
        NAME(vec) *out = (NAME(vec) *)((float *)a->out + at);
        if (!a->sets) sum += *out;
        *out = sum;
    }
}

INLINE void NAME(expand)(const int rows, const int is_bf16, const struct vkv_lora *a,
                         const void *up, int rank, const int32_t *at, float (*low)[MOST_RANK]) {
    const int64_t width = a->out_features, step = VECTORS * LANES;
    int64_t column = 0;
    for (; column + step <= width; column += step) {
        NAME(vec) acc[ROWS][VECTORS];
        FOR(r, rows) FOR(v, VECTORS) acc[r][v] = (NAME(vec)){0};
        for (int j = 0; j < rank; j++) {
            NAME(vec) weight[VECTORS];
            FOR(v, VECTORS) LOAD(weight[v], is_bf16, up, j * width + column + v * LANES);
            FOR(r, rows) FOR(v, VECTORS) acc[r][v] += weight[v] * low[r][j];
        }
        FOR(r, rows) FOR(v, VECTORS)
            NAME(put)(a, at[r] * a->out_stride + column + v * LANES, acc[r][v]);
    }
    if (column == width) return;
    const int left = (int)(width - column);
    for (int r = 0; r < rows; r++) {
        float sums[VECTORS * LANES] = {0};
        for (int j = 0; j < rank; j++)
            for (int i = 0; i < left; i++)
                sums[i] = __builtin_fmaf(one(is_bf16, up, j * width + column + i), low[r][j], sums[i]);
        put(a, at[r] * a->out_stride + column, sums, left);
    }
}

/* Rows `at` of one adapter. */
INLINE void NAME(some_rows)(const int rows, const int is_bf16, const struct vkv_lora *a,
                            const struct vkv_lora_entry *entry, const int32_t *at) {
    float x[ROWS][CHUNK], low[ROWS][MOST_RANK];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < entry->rank; j++) low[r][j] = 0;
    for (int first = 0; first < a->in_features; first += CHUNK) {
        const int left = a->in_features - first, count = left < CHUNK ? left : CHUNK;
        for (int r = 0; r < rows; r++)
            take(a->inputs, at[r] * a->input_stride + first, count, a->dtype, x[r]);
        const void *down = (const char *)entry->down + (is_bf16 ? 2 : 4) * first;
        int j = 0;
        for (; j + RANKS <= entry->rank; j += RANKS)
            NAME(shrink)(rows, RANKS, is_bf16, x, down, a->in_features, count, low, j);
        for (; j < entry->rank; j++)
            NAME(shrink)(rows, 1, is_bf16, x, down, a->in_features, count, low, j);
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < entry->rank; j++) low[r][j] *= entry->scale;
    NAME(expand)(rows, is_bf16, a, entry->up, entry->rank, at, low);
}

INLINE void NAME(rows)(const int is_bf16, const struct vkv_lora *a,
                       const struct vkv_lora_entry *entry, const int32_t *at, int count) {
    for (; count >= ROWS; count -= ROWS, at += ROWS) NAME(some_rows)(ROWS, is_bf16, a, entry, at);
    for (; count; count--, at++) NAME(some_rows)(1, is_bf16, a, entry, at);
}

#undef LOAD
