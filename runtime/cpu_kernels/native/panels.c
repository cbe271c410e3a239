/* How weights come to lie in panels, and back. A model waits for it when it is loaded. */
#include "rows.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

enum { GROUP = 16 }; /* columns that are moved together: a cache line of a panel's row */

/* The column of the weight that lies at a column of the panels. */
static int64_t column_at(int64_t panel, int64_t within, int64_t panel_columns,
                         int64_t num_columns, int32_t gated) {
    const int64_t half = panel_columns / 2;
    if (!gated) return panel * panel_columns + within;
    return panel * half + within % half + (within < half ? 0 : num_columns / 2);
}

/* The words of a column of all weights, or NULL behind the last. */
static const int32_t *words_of(const struct vkv_pack *a, int64_t column) {
    for (int32_t w = 0; w < a->num_weights; w++) {
        if (column < a->columns[w]) return a->weights[w] + column * a->num_words;
        column -= a->columns[w];
    }
    return NULL;
}

/* Words first .. last of a group of columns, to lines that lie panel_columns apart. */
static void move_words(const int32_t *const *columns, int32_t *lines, int64_t panel_columns,
                       int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++)
        for (int64_t c = 0; c < GROUP; c++)
            lines[i * panel_columns + c] = columns[c] ? columns[c][i] : 0;
}

#if defined(__SSE2__)
/* Four words of a group of columns. The lines are written whole and past the cache: the next to
 * read them is a step of the model, with all other weights in between. */
static void move_four(const int32_t *const *columns, int32_t *lines, int64_t panel_columns,
                      int64_t first) {
    __m128i found[4][GROUP / 4];
    for (int64_t g = 0; g < GROUP / 4; g++) {
        __m128i x[4];
        for (int64_t c = 0; c < 4; c++) {
            const int32_t *words = columns[4 * g + c];
            x[c] = words ? _mm_loadu_si128((const __m128i *)(words + first)) : _mm_setzero_si128();
        }
        const __m128i a = _mm_unpacklo_epi32(x[0], x[1]), b = _mm_unpacklo_epi32(x[2], x[3]);
        const __m128i c = _mm_unpackhi_epi32(x[0], x[1]), d = _mm_unpackhi_epi32(x[2], x[3]);
        found[0][g] = _mm_unpacklo_epi64(a, b);
        found[1][g] = _mm_unpackhi_epi64(a, b);
        found[2][g] = _mm_unpacklo_epi64(c, d);
        found[3][g] = _mm_unpackhi_epi64(c, d);
    }
    for (int64_t i = 0; i < 4; i++)
        for (int64_t g = 0; g < GROUP / 4; g++)
            _mm_stream_si128((__m128i *)(lines + (first + i) * panel_columns) + g, found[i][g]);
}
#endif

static void pack_panels(const void *data, int64_t first, int64_t last) {
    const struct vkv_pack *a = data;
    const int64_t panel = a->panel_columns, words = a->num_words;
    int64_t num_columns = 0, moved = 0;
    for (int32_t w = 0; w < a->num_weights; w++) num_columns += a->columns[w];
#if defined(__SSE2__)
    if ((uintptr_t)a->packed % sizeof(__m128i) == 0) moved = words / 4 * 4;
#endif
    for (int64_t p = first; p < last; p++)
        for (int64_t start = 0; start < panel; start += GROUP) {
            const int32_t *columns[GROUP];
            for (int64_t c = 0; c < GROUP; c++)
                columns[c] = words_of(a, column_at(p, start + c, panel, num_columns, a->gated));
            int32_t *lines = a->packed + p * words * panel + start;
#if defined(__SSE2__)
            for (int64_t i = 0; i < moved; i += 4) move_four(columns, lines, panel, i);
#endif
            move_words(columns, lines, panel, moved, words);
        }
#if defined(__SSE2__)
    _mm_sfence(); /* what went past the cache is there for other threads */
#endif
}

int64_t vkv_pack(const struct vkv_pack *a) {
    int64_t columns = 0;
    for (int32_t w = 0; w < a->num_weights; w++) columns += a->columns[w];
    const int64_t panels = (columns + a->panel_columns - 1) / a->panel_columns;
    run(pack_panels, a, panels, a->num_words * a->panel_columns, a->num_threads, a->parallel);
    return 0;
}

void vkv_unpack(const int32_t *packed, int32_t *weight, int64_t num_columns, int64_t num_words,
                int64_t panel_columns, int32_t gated) {
    const int64_t panels = (num_columns + panel_columns - 1) / panel_columns;
    for (int64_t p = 0; p < panels; p++)
        for (int64_t c = 0; c < panel_columns; c++) {
            const int64_t column = column_at(p, c, panel_columns, num_columns, gated);
            if (column >= num_columns) continue;
            for (int64_t i = 0; i < num_words; i++)
                weight[column * num_words + i] = packed[(p * num_words + i) * panel_columns + c];
        }
}
