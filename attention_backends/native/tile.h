/* One share of the work, for one instruction set. attention.c includes this file once for each,
 * with these defined:
 *
 *   NAME(x)    x with the instruction set's suffix
 *   LANES      32-bit lanes of a vector
 *   COLUMNS    vectors in a row of the register tile; ROWS, its rows
 *   PAIRS      1: a word is two bfloat16, multiplied by one instruction; 0: a word is a float
 *
 * Keys are transposed a block of BLOCK tokens at a time, so that a lane is a token, and values
 * laid out so that a lane is a dimension; both products are then the same small matrix product.
 * Few rows are read as they lie: floats by few_rows.h, in whose order of sums others are added here,
 * and pairs by few_pairs.h.
 *
 * The softmax runs along, block by block, in base 2, and relative to a whole power of two. A score
 * is taken apart in a whole number and a fraction before that power is known: so a larger one later
 * scales what was summed by a power of two, which rounds nothing, and a sum is the same whatever
 * scores came with it, in whichever steps.
 *
 * Source: FlashAttention-2, arXiv:2307.08691, section 3 (the online softmax).
 */

typedef float NAME(vec) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t NAME(ivec) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define VEC NAME(vec)
#define IVEC NAME(ivec)
#define INLINE static inline __attribute__((always_inline))

INLINE VEC NAME(splat)(float x) { return x - (VEC){0}; }
INLINE IVEC NAME(isplat)(int32_t x) { return x - (IVEC){0}; }
INLINE VEC NAME(select)(IVEC mask, VEC a, VEC b) {
    return (VEC)((mask & (IVEC)a) | (~mask & (IVEC)b));
}
INLINE VEC NAME(max)(VEC a, VEC b) {
#if LANES == 16
    return (VEC)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (VEC)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return NAME(select)(a > b, a, b);
#endif
}
INLINE VEC NAME(load)(const float *p) { return *(const VEC *)p; }
INLINE void NAME(store)(float *p, VEC x) { *(VEC *)p = x; }

/* The largest lane, and the sum of all; whether a lane reaches y. */
#if LANES == 16
INLINE int NAME(reaches)(VEC x, float y) {
    return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(y), _CMP_GE_OQ) != 0;
}
INLINE float NAME(highest)(VEC x) { return _mm512_reduce_max_ps((__m512)x); }
INLINE float NAME(total)(VEC x) { return _mm512_reduce_add_ps((__m512)x); }
#elif LANES == 8
INLINE int NAME(reaches)(VEC x, float y) {
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_set1_ps(y), _CMP_GE_OQ)) != 0;
}
INLINE float NAME(highest)(VEC x) {
    __m128 top = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    top = _mm_max_ps(top, _mm_movehl_ps(top, top));
    return _mm_cvtss_f32(_mm_max_ss(top, _mm_movehdup_ps(top)));
}
INLINE float NAME(total)(VEC x) {
    __m128 sum = _mm256_castps256_ps128((__m256)x) + _mm256_extractf128_ps((__m256)x, 1);
    sum += _mm_movehl_ps(sum, sum);
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
#else
INLINE int NAME(reaches)(VEC x, float y) {
    int any = 0;
    for (int i = 0; i < LANES; i++) any |= x[i] >= y;
    return any;
}
INLINE float NAME(highest)(VEC x) {
    float top = x[0];
    for (int i = 1; i < LANES; i++) top = x[i] > top ? x[i] : top;
    return top;
}
INLINE float NAME(total)(VEC x) {
    float sum = x[0];
    for (int i = 1; i < LANES; i++) sum += x[i];
    return sum;
}
#endif

/* The nearest whole number, of any finite x. */
INLINE VEC NAME(whole)(VEC x) {
#if LANES == 16
    return (VEC)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif LANES == 8
    return (VEC)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const VEC size = (VEC)((IVEC)x & 0x7fffffff), magic = NAME(splat)(8388608.0f);
    const VEC near = (VEC)(((IVEC)x & (IVEC)NAME(splat)(-0.0f)) | (IVEC)((size + magic) - magic));
    return NAME(select)(size < magic, near, x);
#endif
}

/* x * 2^y for a whole number y of at most 127: exactly, where the result is a normal number. Below
 * 2^-126 AVX512 rounds to a denormal; elsewhere the result is zero for y below -126. */
INLINE VEC NAME(scale)(VEC x, VEC y) {
#if LANES == 16
    return (VEC)_mm512_scalef_ps((__m512)x, (__m512)y);
#else
    const VEC magic = NAME(splat)(12582912.0f); /* adding it leaves a whole number in low bits */
    y = NAME(max)(y, NAME(splat)(-127.0f)) + magic;
    return x * (VEC)(((IVEC)y - (IVEC)magic + 127) << 23);
#endif
}

/* 2^x of x from -1/2 to 1/2, within 1e-7 of it; 3e-6 where weights become bfloat16, which is 700
 * times as coarse. A soft cap is made of it, too: there logits are off by 1.5e-6 of the cap at most.
 * Least largest errors, with 2^0 = 1. */
INLINE VEC NAME(exp2_near)(VEC x) {
#if PAIRS
    VEC p = NAME(splat)(9.5828442e-3f);
    p = p * x + 5.5906439e-2f;
    p = p * x + 2.4024099e-1f;
    p = p * x + 6.9312419e-1f;
#else
    VEC p = NAME(splat)(1.3264715e-3f);
    p = p * x + 9.6715135e-3f;
    p = p * x + 5.5507338e-2f;
    p = p * x + 2.4022242e-1f;
    p = p * x + 6.9314698e-1f;
#endif
    return p * x + 1.0f;
}

/* 2^(x + y) for a whole number y, and their sum at most 127; of a small one as `scale`. */
INLINE VEC NAME(exp2)(VEC x, VEC y) {
    const VEC whole = NAME(whole)(x);
    return NAME(scale)(NAME(exp2_near)(x - whole), whole + y);
}

/* -- words: what a product multiplies ------------------------------------------------------- */

#if PAIRS
#define WORDS(count) (((count) + 1) / 2)
#else
#define WORDS(count) (count)
#endif

#if !PAIRS
/* LANES bfloat16 as floats. */
INLINE IVEC NAME(widen)(const void *row) {
#if LANES == 16
    return (IVEC)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(row)), 16);
#elif LANES == 8
    return (IVEC)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(row)), 16);
#else
    IVEC words;
    for (int i = 0; i < LANES; i++) words[i] = (int32_t)((uint32_t)((const uint16_t *)row)[i] << 16);
    return words;
#endif
}
#endif

/* LANES words from the first `count` elements at `row`, zero behind them. */
INLINE IVEC NAME(load_words)(const void *row, int count, int is_bf16) {
#if PAIRS
    (void)is_bf16;
    __mmask32 mask = count >= 32 ? 0xffffffffu : (1u << count) - 1;
    return (IVEC)_mm512_maskz_loadu_epi16(mask, row);
#else
    int32_t words[LANES] __attribute__((aligned(64))) = {0};
    if (count > LANES) count = LANES;
    if (!is_bf16) {
        if (count == LANES) return *(const IVEC *)row;
        memcpy(words, row, 4 * (size_t)count);
        return *(IVEC *)words;
    }
    if (count == LANES) return NAME(widen)(row);
    uint16_t halves[LANES] = {0};
    memcpy(halves, row, 2 * (size_t)count);
    for (int i = 0; i < LANES; i++) words[i] = (int32_t)((uint32_t)halves[i] << 16);
    return *(IVEC *)words;
#endif
}

#define ROW_WORDS (PAIRS ? 2 * LANES : LANES) /* elements that load_words takes */

/* How a product meets what is in its goal: it adds to that term by term, it is summed by itself and
 * then added, or it takes its place. */
enum { NAME(GO_ON), NAME(APART), NAME(ANEW) };

/* c[rows][nv * LANES] of a[rows][k words] times b[k words][nv * LANES]. */
INLINE void NAME(product)(const int rows, const int nv, const int how, const int32_t *a, int lda,
                          const int32_t *b, int ldb, int k, float *c, int ldc) {
    VEC acc[ROWS][COLUMNS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < nv; v++)
            acc[r][v] = how == NAME(GO_ON) ? NAME(load)(c + r * ldc + v * LANES) : (VEC){0};
    for (int i = 0; i < k; i++) {
        IVEC column[COLUMNS];
        for (int v = 0; v < nv; v++) column[v] = *(const IVEC *)(b + i * ldb + v * LANES);
        for (int r = 0; r < rows; r++) {
            IVEC word = NAME(isplat)(a[r * lda + i]);
            for (int v = 0; v < nv; v++) {
#if PAIRS
                acc[r][v] = (VEC)_mm512_dpbf16_ps((__m512)acc[r][v], (__m512bh)word,
                                                  (__m512bh)column[v]);
#else
                acc[r][v] += (VEC)word * (VEC)column[v];
#endif
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < nv; v++) {
            float *goal = c + r * ldc + v * LANES;
            if (how == NAME(APART)) acc[r][v] += NAME(load)(goal);
            NAME(store)(goal, acc[r][v]);
        }
}

INLINE void NAME(product_columns)(const int rows, const int how, const int32_t *a, int lda,
                                  const int32_t *b, int ldb, int k, float *c, int ldc, int n) {
    int j = 0;
    for (; j + COLUMNS * LANES <= n; j += COLUMNS * LANES)
        NAME(product)(rows, COLUMNS, how, a, lda, b + j, ldb, k, c + j, ldc);
    for (; j < n; j += LANES) NAME(product)(rows, 1, how, a, lda, b + j, ldb, k, c + j, ldc);
}

/* The same for any number of rows, and n a multiple of 16. */
INLINE void NAME(product_rows)(int rows, const int how, const int32_t *a, int lda,
                               const int32_t *b, int ldb, int k, float *c, int ldc, int n) {
    int r = 0;
    for (; r + ROWS <= rows; r += ROWS)
        NAME(product_columns)(ROWS, how, a + r * lda, lda, b, ldb, k, c + r * ldc, ldc, n);
    if (ROWS > 4 && r + 4 <= rows) {
        NAME(product_columns)(4, how, a + r * lda, lda, b, ldb, k, c + r * ldc, ldc, n);
        r += 4;
    }
    if (ROWS > 2 && r + 2 <= rows) {
        NAME(product_columns)(2, how, a + r * lda, lda, b, ldb, k, c + r * ldc, ldc, n);
        r += 2;
    }
    for (; r < rows; r++)
        NAME(product_columns)(1, how, a + r * lda, lda, b, ldb, k, c + r * ldc, ldc, n);
}

static void NAME(multiply)(int rows, const int32_t *a, int lda, const int32_t *b, int ldb, int k,
                           float *c, int ldc, int n) {
    NAME(product_rows)(rows, NAME(GO_ON), a, lda, b, ldb, k, c, ldc, n);
}

static void NAME(multiply_anew)(int rows, const int32_t *a, int lda, const int32_t *b, int ldb,
                                int k, float *c, int ldc, int n) {
    NAME(product_rows)(rows, NAME(ANEW), a, lda, b, ldb, k, c, ldc, n);
}

#if !PAIRS
static void NAME(multiply_apart)(int rows, const int32_t *a, int lda, const int32_t *b, int ldb,
                                 int k, float *c, int ldc, int n) {
    NAME(product_rows)(rows, NAME(APART), a, lda, b, ldb, k, c, ldc, n);
}
#endif

/* -- keys and values of a block -------------------------------------------------------------- */

/* The block after it is fetched meanwhile, to the second cache: the first has what is laid out. */

#if LANES == 16
INLINE void NAME(transpose)(IVEC *row) { /* 16 x 16 words, in place */
    __m512i t[16], u[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32((__m512i)row[i], (__m512i)row[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32((__m512i)row[i], (__m512i)row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) { /* u[4 g + i] holds column i of each quarter, of row group g */
        __m512i low = _mm512_shuffle_i32x4(u[i], u[4 + i], 0x88);
        __m512i high = _mm512_shuffle_i32x4(u[8 + i], u[12 + i], 0x88);
        row[i] = (IVEC)_mm512_shuffle_i32x4(low, high, 0x88);
        row[8 + i] = (IVEC)_mm512_shuffle_i32x4(low, high, 0xdd);
        low = _mm512_shuffle_i32x4(u[i], u[4 + i], 0xdd);
        high = _mm512_shuffle_i32x4(u[8 + i], u[12 + i], 0xdd);
        row[4 + i] = (IVEC)_mm512_shuffle_i32x4(low, high, 0x88);
        row[12 + i] = (IVEC)_mm512_shuffle_i32x4(low, high, 0xdd);
    }
}
#elif LANES == 8
INLINE void NAME(transpose)(IVEC *row) { /* 8 x 8 words, in place */
    __m256i t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32((__m256i)row[i], (__m256i)row[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32((__m256i)row[i], (__m256i)row[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        u[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        u[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        u[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        u[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        row[i] = (IVEC)_mm256_permute2x128_si256(u[i], u[4 + i], 0x20);
        row[4 + i] = (IVEC)_mm256_permute2x128_si256(u[i], u[4 + i], 0x31);
    }
}
#else
INLINE void NAME(transpose)(IVEC *row) {
    for (int i = 0; i < LANES; i++)
        for (int j = i + 1; j < LANES; j++) {
            int32_t kept = row[i][j];
            row[i][j] = row[j][i];
            row[j][i] = kept;
        }
}
#endif

/* Whether heads are whole vectors. Few rows are then read as they lie, lane by lane, and other rows
 * take the same order (`score_block`). */
INLINE int NAME(by_lanes)(const struct vkv_attention *args) {
    return !PAIRS && args->key_dim % (2 * LANES) == 0 && args->value_dim % (2 * LANES) == 0;
}

/* Where a word of a head lies in queries and keys that are laid out: in turn, or, `by_lanes`, one
 * lane of few_rows.h after the other, whose elements are apart as load_two has them. */
INLINE int NAME(place)(int d, int dim, int is_bf16, int by_lanes) {
    if (!by_lanes) return d;
    const int within = d % (2 * LANES);
    const int lane = is_bf16 ? within / 2 : within % LANES;
    return lane * (dim / LANES) + d / (2 * LANES) * 2 + (is_bf16 ? within % 2 : within / LANES);
}

/* Keys of a block as packed[word][token], BLOCK tokens wide, of which only whole vectors that hold a
 * token are written: zero before the first and behind the last. */
static void NAME(pack_keys)(const struct block *block, int dim, int is_bf16, int by_lanes,
                            int32_t *packed) {
    const int item = is_bf16 ? 2 : 4;
    const int64_t stride = block->key_stride;
    for (int t = block->skip / LANES * LANES; t < block->len; t += LANES) {
        for (int d = 0; d < dim; d += ROW_WORDS) {
            IVEC words[LANES];
            for (int i = 0; i < LANES; i++) {
                const char *row = block->keys + (t + i) * stride + d * item;
                const int is_there = t + i >= block->skip && t + i < block->len;
                words[i] = is_there ? NAME(load_words)(row, dim - d, is_bf16) : (IVEC){0};
                if (t + i < block->num_next) __builtin_prefetch(row + BLOCK * stride, 0, 2);
            }
            NAME(transpose)(words);
            for (int i = 0; i < LANES && WORDS(d) + i < WORDS(dim); i++) {
                const int word = NAME(place)(WORDS(d) + i, dim, is_bf16, by_lanes);
                *(IVEC *)(packed + word * BLOCK + t) = words[i];
            }
        }
    }
}

/* Values as packed[token or pair of tokens][dim], `width` dims wide (a multiple of 16): zero before
 * the first. */
static void NAME(pack_values)(const struct block *block, int dim, int width, int is_bf16,
                              int32_t *packed) {
    const int item = is_bf16 ? 2 : 4, skip = block->skip;
    const int64_t stride = block->value_stride;
#if PAIRS
    const __m512i first = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
        35, 3, 34, 2, 33, 1, 32, 0); /* words 0 to 15 of both rows, alternating */
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    for (int t = 0; t < block->len; t += 2)
        for (int d = 0; d < dim; d += 32) {
            const char *row = block->values + t * stride + d * item;
            IVEC even = (IVEC){0}, odd = (IVEC){0};
            if (t >= skip) even = NAME(load_words)(row, dim - d, 1);
            if (t + 1 >= skip && t + 1 < block->len)
                odd = NAME(load_words)(row + stride, dim - d, 1);
            if (t + 1 < block->num_next) {
                __builtin_prefetch(row + BLOCK * stride, 0, 2);
                __builtin_prefetch(row + (BLOCK + 1) * stride, 0, 2);
            }
            int32_t *goal = packed + (t / 2) * width + d;
            *(IVEC *)goal = (IVEC)_mm512_permutex2var_epi16((__m512i)even, first, (__m512i)odd);
            if (d + 16 < width)
                *(IVEC *)(goal + 16) =
                    (IVEC)_mm512_permutex2var_epi16((__m512i)even, second, (__m512i)odd);
        }
#else
    for (int t = 0; t < block->len; t++)
        for (int d = 0; d < width; d += LANES) {
            const char *row = block->values + t * stride + d * item;
            IVEC words = (IVEC){0};
            if (d < dim && t >= skip) words = NAME(load_words)(row, dim - d, is_bf16);
            if (t < block->num_next && d < dim) __builtin_prefetch(row + BLOCK * stride, 0, 2);
            *(IVEC *)(packed + t * width + d) = words;
        }
#endif
}

/* -- the softmax ----------------------------------------------------------------------------- */

/* One row: scores[columns], times `factor` in base 2, become weights; its running peak, sums of
 * weights by lane and output row follow. Unless `is_plain`, logits are capped, and weights outside
 * [first, last) are zero. */
INLINE void NAME(softmax_row)(const int columns, const int is_plain,
                              const struct vkv_attention *args, float factor, const float *scores,
                              int first, int last, int32_t *weights, float *peak, float *sums,
                              float *out, int width) {
    const int masked = !is_plain && (first > 0 || last < columns);
    VEC x[BLOCK / LANES], top = NAME(splat)(-FLT_MAX);
    IVEC lane, seen[BLOCK / LANES] = {0};
    for (int i = 0; i < LANES; i++) lane[i] = i;
    for (int v = 0; v < columns / LANES; v++) {
        x[v] = NAME(load)(scores + v * LANES);
        if (!is_plain && args->softcap != 0.0f) { /* tanh(y) = 1 - 2 / (exp(2 y) + 1) */
            VEC y = x[v] * (2 * factor / args->softcap);
            y = NAME(select)(y > 60.0f, NAME(splat)(60.0f), y);
            x[v] = (args->softcap * LOG2E) *
                   (1.0f - 2.0f / (NAME(exp2)(y, (VEC){0}) + 1.0f));
        } else {
            x[v] = x[v] * factor;
        }
        if (masked) {
            IVEC column = lane + v * LANES;
            seen[v] = (column >= first) & (column < last);
            x[v] = NAME(select)(seen[v], x[v], NAME(splat)(-FLT_MAX));
        }
        top = NAME(max)(top, x[v]);
    }
    VEC total = NAME(load)(sums);
    if (NAME(reaches)(top, *peak + 0.5f)) { /* seldom: it may round to more than the peak */
        const float near = NAME(whole)(NAME(splat)(NAME(highest)(top)))[0];
        const float highest = near > *peak ? near : *peak;
        const VEC shrink = NAME(scale)(NAME(splat)(1.0f), NAME(splat)(*peak - highest));
        total *= shrink;
        for (int d = 0; d < width; d += LANES) NAME(store)(out + d, NAME(load)(out + d) * shrink);
        *peak = highest;
    }
    for (int v = 0; v < columns / LANES; v++) {
        x[v] = NAME(exp2)(x[v], NAME(splat)(-*peak));
        if (masked) x[v] = (VEC)((IVEC)x[v] & seen[v]);
        total += x[v];
    }
    NAME(store)(sums, total);
#if PAIRS
    for (int v = 0; v < columns / LANES; v += 2)
        *(IVEC *)(weights + v * LANES / 2) =
            (IVEC)_mm512_cvtne2ps_pbh((__m512)x[v + 1], (__m512)x[v]);
#else
    for (int v = 0; v < columns / LANES; v++) *(VEC *)(weights + v * LANES) = x[v];
#endif
}

/* The scores of `count` rows of a KV head from `row` on, whose rows begin at `base` of the share's,
 * against `len` tokens from `start` on, in columns of their own: the softmax of each within its
 * causal bounds and its window. */
INLINE void NAME(weigh)(const int columns, const struct vkv_attention *args,
                        const struct share *share, struct scratch *s, int base, int row, int count,
                        int start, int len) {
    const int group = args->num_heads / args->num_kv_heads, width = s->value_width;
    const int first_position = share->first_position + row / group;
    const int last_position = share->first_position + (row + count - 1) / group;
    const float factor = args->scale * LOG2E;
    float *peak = s->part.peaks + base + row, *lanes = s->lanes + (base + row) * LANES;
    float *out = s->part.out + (base + row) * width;
    const float *scores = s->scores;
    int32_t *weights = s->weights;
#define SOFTMAX(is_plain, first, last)                                                           \
    NAME(softmax_row)(columns, is_plain, args, factor, scores, first, last, weights, peak, lanes, \
                      out, width)
#define NEXT                                                                        \
    scores += columns, weights += WORDS(columns), peak++, lanes += LANES, out += width
    if (len == columns && first_position >= start + columns - 1 && args->softcap == 0.0f &&
        !(args->window && last_position - args->window >= start)) {
        for (int i = 0; i < count; i++, NEXT) SOFTMAX(1, 0, columns);
        return;
    }
    for (int i = 0; i < count; i++, NEXT) {
        const int position = share->first_position + (row + i) / group;
        int last = position + 1 - start, first = 0;
        if (last > len) last = len;
        if (args->window && position - args->window >= start)
            first = position - args->window + 1 - start;
        if (last <= first)
            memset(weights, 0, 4 * (size_t)WORDS(columns));
        else
            SOFTMAX(0, first, last);
    }
#undef SOFTMAX
#undef NEXT
}

#if PAIRS
#include "few_pairs.h"
#else
#include "few_rows.h"
#endif

/* -- one share -------------------------------------------------------------------------------- */

/* Copies the share's queries into scratch->query, a row for each (KV head, query, head of it). */
static void NAME(take_queries)(const struct vkv_attention *args, const struct share *share,
                               struct scratch *s) {
    const int is_bf16 = args->dtype == VKV_BFLOAT16, item = is_bf16 ? 2 : 4;
    const int group = args->num_heads / args->num_kv_heads, dim = args->key_dim;
#if !PAIRS
    const int by_lanes = NAME(by_lanes)(args), few = NAME(are_few)(args, share);
#endif
    int32_t *goal = s->query;
    for (int h = share->first_head; h < share->last_head; h++)
        for (int q = share->first_query; q < share->last_query; q++)
            for (int g = 0; g < group; g++, goal += s->query_words) {
                const char *row = (const char *)args->query +
                                  item * (q * args->query_token_stride +
                                          (h * group + g) * args->query_head_stride);
#if !PAIRS
                for (int d = 0; few && d < dim; d += 2 * LANES)
                    NAME(load_two)(row + d * item, is_bf16, (VEC *)(goal + d),
                                   (VEC *)(goal + d + LANES));
                if (few) continue;
#endif
                for (int d = 0; d < dim; d += ROW_WORDS) {
                    const IVEC words = NAME(load_words)(row + d * item, dim - d, is_bf16);
#if !PAIRS
                    for (int i = 0; by_lanes && i < LANES; i++)
                        goal[NAME(place)(d + i, dim, is_bf16, 1)] = words[i];
                    if (by_lanes) continue;
#endif
                    *(IVEC *)(goal + WORDS(d)) = words;
                }
            }
}

/* scores[rows][BLOCK] of queries and keys that are laid out. */
static void NAME(score_block)(const struct vkv_attention *args, struct scratch *s, int rows,
                              const int32_t *query, int columns) {
#if !PAIRS
    if (NAME(by_lanes)(args)) { /* in the order of `sums` */
        const size_t bytes = sizeof(float) * BLOCK * (size_t)rows;
        memset(s->scores, 0, bytes);
        const int words = args->key_dim / LANES;
#define ADD_LANE(lane, goal)                                                        \
    NAME(multiply_apart)(rows, query + (lane) * words, s->query_words,              \
                         s->keys + (lane) * words * BLOCK, BLOCK, words, goal, BLOCK, columns)
#if LANES == 8
        float *const odd = s->apart, *const high = s->apart + SOFTMAX_ROWS * BLOCK;
        memset(high, 0, bytes);
        for (int lane = 0; lane < LANES; lane += 4) {
            float *const even = lane ? high : s->scores;
            memset(odd, 0, bytes);
            ADD_LANE(lane, even);
            ADD_LANE(lane + 2, even);
            ADD_LANE(lane + 1, odd);
            ADD_LANE(lane + 3, odd);
            for (int i = 0; i < rows * BLOCK; i++) even[i] += odd[i];
        }
        for (int i = 0; i < rows * BLOCK; i++) s->scores[i] += high[i];
#else
        for (int lane = 0; lane < LANES; lane++) ADD_LANE(lane, s->scores);
#endif
#undef ADD_LANE
        return;
    }
#endif
    NAME(multiply_anew)(rows, query, s->query_words, s->keys, BLOCK, WORDS(args->key_dim),
                        s->scores, BLOCK, columns);
}

/* The rows of one KV head against one block, a few rows at a time. */
INLINE void NAME(attend_block)(const struct vkv_attention *args, const struct share *share,
                               struct scratch *s, int head, const struct block *block) {
    const int group = args->num_heads / args->num_kv_heads, is_bf16 = args->dtype == VKV_BFLOAT16;
    const int rows = rows_of_head(args, share);
    const int base = (head - share->first_head) * rows, width = s->value_width;
    NAME(pack_keys)(block, args->key_dim, is_bf16, NAME(by_lanes)(args), s->keys);
    NAME(pack_values)(block, args->value_dim, width, is_bf16, s->values);
    for (int r = 0; r < rows; r += SOFTMAX_ROWS) {
        const int count = rows - r < SOFTMAX_ROWS ? rows - r : SOFTMAX_ROWS;
        const int last_seen = share->first_position + (r + count - 1) / group;
        const int first_seen = share->first_position + r / group;
        if (last_seen < block->start) continue; /* this block is all to come for these rows */
        if (args->window && first_seen - args->window >= block->start + block->len - 1) continue;
        const int to_last = last_seen - block->start + 1;
        const int seen = to_last < block->len ? to_last : block->len; /* by any of these rows */
        const int columns = (seen + LANES - 1) / LANES * LANES;
        NAME(score_block)(args, s, count, s->query + (base + r) * s->query_words, columns);
        NAME(weigh)(BLOCK, args, share, s, base, r, count, block->start, block->len);
        NAME(multiply)(count, s->weights, WORDS(BLOCK), s->values, width, WORDS(seen),
                       s->part.out + (base + r) * width, width, width);
    }
}

static void NAME(attend_blocks)(const struct vkv_attention *args, const struct share *share,
                                struct scratch *s, int first, int last) {
    const int item = args->dtype == VKV_BFLOAT16 ? 2 : 4;
    const int64_t slot = args->slots[share->seq];
    const int64_t key_stride = item * args->key_token_stride;
    const int64_t value_stride = item * args->value_token_stride;
    const char *const keys = (const char *)args->keys + item * slot * args->key_slot_stride;
    const char *const values = (const char *)args->values + item * slot * args->value_slot_stride;
    const int64_t key_head = item * args->key_head_stride;
    const int64_t value_head = item * args->value_head_stride;
    for (int t = first / BLOCK * BLOCK; t < last; t += BLOCK) {
        const int left = last - t;
        for (int h = share->first_head; h < share->last_head; h++) {
            const struct block block = {
                .keys = keys + t * key_stride + h * key_head,
                .values = values + t * value_stride + h * value_head,
                .key_stride = key_stride,
                .value_stride = value_stride,
                .start = t,
                .skip = t < first ? first - t : 0,
                .len = left < BLOCK ? left : BLOCK,
                .num_next = share->last_key - t - BLOCK,
            };
            NAME(attend_block)(args, share, s, h, &block);
        }
    }
}

static void NAME(attend)(const struct vkv_attention *args, const struct share *share,
                         struct scratch *s, int first, int last) {
    const int rows = share->num_rows;
    if (first == share->first_key) NAME(take_queries)(args, share, s);
    for (int i = 0; i < rows; i++) s->part.peaks[i] = -FLT_MAX;
    memset(s->part.out, 0, sizeof(float) * (size_t)rows * (size_t)s->value_width);
    memset(s->lanes, 0, sizeof(float) * (size_t)rows * LANES);
    if (NAME(are_few)(args, share))
        NAME(attend_few)(args, share, s, first, last);
    else
        NAME(attend_blocks)(args, share, s, first, last);
    for (int i = 0; i < rows; i++)
        s->part.weights[i] = NAME(total)(NAME(load)(s->lanes + i * LANES));
}

#undef VEC
#undef IVEC
#undef INLINE
#undef WORDS
#undef ROW_WORDS
#undef NAME
#undef LANES
#undef COLUMNS
#undef ROWS
#undef PAIRS
