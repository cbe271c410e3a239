/* Sums over keys, and the one order in which they are added: by halves.
 *
 * The keys of a sequence are cut in parts of PART, on a grid from its token 0. The sum of the parts
 * i * 2^k to (i + 1) * 2^k, a *node*, is that of its left half and then that of its right half. What
 * is not there, behind the last key or before a window, adds nothing and changes no bit. So keys that
 * lie in several places need not be together: each place makes the few nodes that its parts are made
 * of, and whoever has all nodes adds them up to the same bits as if all keys had been in one place.
 *
 * What is summed is relative to 2^peak, a whole number no less than any score, or -FLT_MAX where no
 * key was seen. To scale it rounds nothing, unless what comes of it is below 2^-126 (tile.h).
 */

/* Of rows [KV head][query][head of the KV head]. */
struct sums {
    float *out;     /* [rows][value_width] */
    float *peaks;   /* [rows] */
    float *weights; /* [rows] */
};

/* The nodes of the parts that came so far, which wait for their right halves. */
struct tower {
    struct sums levels[32]; /* a node of 2^level parts in each */
    uint32_t open;          /* levels where a node is waiting, be it of nothing */
    uint32_t filled;        /* those where it has sums */
    int32_t next;           /* the part that comes next */
    int32_t num_emitted;    /* nodes whose left half is elsewhere */
};

/* 2^x for a whole number x, exactly; zero below -126. */
static float power_of_two(float x) {
    const uint32_t bits = x < -126 ? 0 : x > 127 ? 0x7f800000 : (uint32_t)((int)x + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return power;
}

/* A row of sums += another. */
static inline void add_row(float *goal, float *peak, float *weight, const float *from,
                           float from_peak, float from_weight, int width) {
    const float top = *peak > from_peak ? *peak : from_peak;
    const float keep = power_of_two(*peak - top), add = power_of_two(from_peak - top);
    for (int d = 0; d < width; d++) goal[d] = goal[d] * keep + from[d] * add;
    *weight = *weight * keep + from_weight * add;
    *peak = top;
}

static void add_sums(const struct sums *total, const struct sums *part, int rows, int width) {
    for (int row = 0; row < rows; row++)
        add_row(total->out + (int64_t)row * width, total->peaks + row, total->weights + row,
                part->out + (int64_t)row * width, part->peaks[row], part->weights[row], width);
}

static void copy_sums(const struct sums *goal, const struct sums *from, int rows, int width) {
    memcpy(goal->out, from->out, sizeof(float) * (size_t)rows * (size_t)width);
    memcpy(goal->peaks, from->peaks, sizeof(float) * (size_t)rows);
    memcpy(goal->weights, from->weights, sizeof(float) * (size_t)rows);
}

static void exchange(struct sums *a, struct sums *b) {
    const struct sums kept = *a;
    *a = *b;
    *b = kept;
}

/* Levels of a tower for parts below `num_parts`. */
static int levels_of(int64_t num_parts) {
    int levels = 1;
    for (int64_t last = num_parts - 1; last > 0; last >>= 1) levels++;
    return levels;
}

static void begin_tower(struct tower *tower, int32_t first_part) {
    tower->open = tower->filled = 0;
    tower->next = first_part;
    tower->num_emitted = 0;
}

/* Adds the next part: the sums at `part`, which takes other memory in exchange, or nothing if it has
 * not been seen (`is_there` 0). Returns 1 if that ends a node whose left half lies before part
 * `lowest`: then its sums are at `part`, or it has none if *is_there is 0. */
static int add_next(struct tower *tower, struct sums *part, int *is_there, int32_t lowest, int rows,
                    int width) {
    const int32_t index = tower->next++;
    int level = 0;
    for (; index >> level & 1; level++) {
        if ((int64_t)((index >> level) - 1) << level < lowest) {
            tower->num_emitted++;
            return 1;
        }
        if (tower->filled >> level & 1) {
            if (*is_there) add_sums(tower->levels + level, part, rows, width);
            exchange(tower->levels + level, part);
            *is_there = 1;
        }
        tower->open &= ~(1u << level);
        tower->filled &= ~(1u << level);
    }
    tower->open |= 1u << level;
    if (*is_there) {
        exchange(tower->levels + level, part);
        tower->filled |= 1u << level;
    }
    return 0;
}

/* All nodes together. */
static const struct sums *add_up(const struct tower *tower, int rows, int width) {
    const struct sums *sum = NULL;
    for (int level = 0; tower->filled >> level; level++) {
        if (!(tower->filled >> level & 1)) continue;
        if (sum) add_sums(tower->levels + level, sum, rows, width);
        sum = tower->levels + level;
    }
    return sum;
}
