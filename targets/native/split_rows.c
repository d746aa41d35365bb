/* Activations as AVX2 multiplies them: int8, in pairs that vpmaddubsw does not saturate.
 *
 * It adds two products of a uint8 and an int8 as int16, which holds 255 * 128.  A pair a, b of
 * activations less 128 that adds up to more than 128 becomes 128 - b, b (or -128 - b, b below -128);
 * what that lacks, a + b - 128, is noted, to be multiplied by the same weights once more.  One pair in
 * 40 to 2000 of a transformer's is such a one.  Weights are uint8, 128 more than they are, so that sums
 * start at -128 times those of a row. */
#include <immintrin.h>
#include <string.h>

#include "qmatmul.h"

#define AVX2 __attribute__((target("avx2")))

enum { QUAD = 4, QUADS = 8, LIMIT = 128, MOST_QUADS = 1 << 15 };

/* Bytes that a core splits in a nanosecond. */
static const double SPLIT_RATE = 10;

/* What the rows of a tile lack; `seen` has a bit for each group of four. */
struct lacking {
    int64_t tile_rows;
    int32_t *count, *groups, *values;
    uint8_t seen[MOST_QUADS / 8];
};

static void note(struct lacking *lacking, int64_t row, int64_t group, int32_t value) {
    int32_t *values = lacking->values + group * lacking->tile_rows;
    uint8_t bit = (uint8_t)(1 << group % 8);
    if (!(lacking->seen[group / 8] & bit)) {
        lacking->seen[group / 8] |= bit;
        lacking->groups[(*lacking->count)++] = (int32_t)group;
        memset(values, 0, (size_t)lacking->tile_rows * sizeof *values);
    }
    values[row] = value;
}

/* 32 activations; adds them to `total`, and notes what is missing in the result. */
AVX2 static __m256i split_vector(__m256i q, __m256i *total, struct lacking *lacking, int64_t row,
                                 int64_t group) {
    const __m256i one = _mm256_set1_epi8(1), limit = _mm256_set1_epi16(LIMIT);
    __m256i a = _mm256_xor_si256(q, _mm256_set1_epi8((char)0x80));
    __m256i pairs = _mm256_maddubs_epi16(one, a);
    __m256i bounded = _mm256_max_epi16(_mm256_min_epi16(pairs, limit), _mm256_set1_epi16(-LIMIT));
    __m256i excess = _mm256_and_si256(_mm256_sub_epi16(pairs, bounded), _mm256_set1_epi16(0xff));
    *total = _mm256_add_epi32(*total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    __m256i none = _mm256_cmpeq_epi32(excess, _mm256_setzero_si256());
    unsigned some = (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(none)) ^ 0xff;
    if (some) {
        int32_t values[QUADS];
        _mm256_storeu_si256((__m256i *)values, excess);
        for (; some; some &= some - 1) {
            int i = __builtin_ctz(some);
            note(lacking, row, group + i, values[i]);
        }
    }
    return _mm256_sub_epi8(a, excess);
}

/* Row `row` of a tile, to whole groups with zeros at the end unless `split` is NULL; returns where its
 * sums start. */
AVX2 static int32_t split_row(const uint8_t *q, int64_t k, int8_t *split, struct lacking *lacking,
                              int64_t row) {
    __m256i total = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 32 <= k; i += 32) {
        __m256i part = _mm256_loadu_si256((const __m256i *)(q + i));
        part = split_vector(part, &total, lacking, row, i / QUAD);
        if (split) _mm256_storeu_si256((__m256i *)(split + i), part);
    }
    if (i < k) {
        uint8_t last[32];
        memset(last, 128, sizeof last);
        memcpy(last, q + i, (size_t)(k - i));
        __m256i part = _mm256_loadu_si256((const __m256i *)last);
        part = split_vector(part, &total, lacking, row, i / QUAD);
        _mm256_storeu_si256((__m256i *)last, part);
        if (split) memcpy(split + i, last, (size_t)(ceil_div(k - i, QUAD) * QUAD));
    }
    int32_t parts[8], sum = 0;
    _mm256_storeu_si256((__m256i *)parts, total);
    for (int part = 0; part < 8; part++) sum += parts[part];
    return -128 * sum;
}

/* A block of rows, cut into tiles as its kernel cuts it, see qmatmul.py. */
struct cut {
    int64_t tiles, height;
};

static struct cut cut(int64_t rows, int64_t tile_rows) {
    int64_t tiles = ceil_div(rows, tile_rows);
    return (struct cut){tiles, ceil_div(rows, tiles)};
}

/* Tile `index` of all blocks.  The last of a block overlaps the one before, whose rows are not
 * written again: another thread may be at it. */
static void split_tile(const struct split_rows *split, int64_t index) {
    const int64_t groups = ceil_div(split->k, QUAD), tile_rows = split->tile_rows;
    const int64_t block = index / split->block_tiles * split->block_rows;
    const int64_t rows = min(split->rows - block, split->block_rows);
    const struct cut tiles = cut(rows, tile_rows);
    const int64_t begin = index % split->block_tiles * tiles.height;
    const int64_t first = min(begin, rows - tiles.height);
    struct lacking lacking;
    lacking.tile_rows = tile_rows;
    lacking.count = split->counts + index;
    lacking.groups = split->groups + index * groups;
    lacking.values = split->values + index * groups * tile_rows;
    *lacking.count = 0;
    memset(lacking.seen, 0, (size_t)ceil_div(groups, 8)); /* 4 KiB would take longer than a row */
    for (int64_t i = 0; i < tiles.height; i++) {
        int64_t row = block + first + i;
        int8_t *target = first + i < begin ? NULL : split->split + row * groups * QUAD;
        int32_t start = split_row(split->q + row * split->k, split->k, target, &lacking, i);
        if (target) split->starts[row] = start;
    }
}

static int64_t all_tiles(const struct split_rows *split) {
    int64_t whole = split->rows / split->block_rows, rest = split->rows % split->block_rows;
    return whole * split->block_tiles + ceil_div(rest, split->tile_rows);
}

static size_t rounded(int64_t bytes) { return ((size_t)bytes + 63) / 64 * 64; }

size_t qc_plan_split(struct split_rows *split) {
    const int64_t groups = ceil_div(split->k, QUAD), word = sizeof(int32_t);
    split->block_tiles = ceil_div(split->block_rows, split->tile_rows);
    split->tiles = all_tiles(split);
    return rounded(split->rows * groups * QUAD) + rounded(split->rows * word) +
           rounded(split->tiles * word) + rounded(split->tiles * groups * word) +
           rounded(split->tiles * split->tile_rows * groups * word);
}

void qc_place_split(struct split_rows *split, char *memory) {
    const int64_t groups = ceil_div(split->k, QUAD), word = sizeof(int32_t);
    split->split = (int8_t *)memory;
    split->starts = (int32_t *)(memory += rounded(split->rows * groups * QUAD));
    split->counts = (int32_t *)(memory += rounded(split->rows * word));
    split->groups = (int32_t *)(memory += rounded(split->tiles * word));
    split->values = (int32_t *)(memory + rounded(split->tiles * groups * word));
}

static void split_task(void *argument, size_t index) {
    const struct split_rows *split = argument;
    int64_t end = split->tiles * ((int64_t)index + 1) / split->tasks;
    for (int64_t tile = split->tiles * (int64_t)index / split->tasks; tile < end; tile++)
        split_tile(split, tile);
}

OrtStatus *qc_split(struct split_rows *split, OrtKernelContext *context) {
    double work = (double)split->rows * (double)split->k / SPLIT_RATE;
    split->tasks = context ? min(qc_task_count(work), split->tiles) : 1;
    if (split->tasks > 1) return qc_parallel(context, split_task, (size_t)split->tasks, split);
    split_task(split, 0);
    return NULL;
}

void qc_read_split(const struct split_rows *split, int64_t row, struct qc_qmatmul_args *args) {
    const int64_t groups = ceil_div(split->k, QUAD);
    const int64_t tile = row / split->block_rows * split->block_tiles;
    args->q = (const uint8_t *)split->split + row * groups * QUAD;
    args->init = split->starts + row;
    args->excess = (struct qc_excess){split->counts + tile, split->groups + tile * groups,
                                      split->values + tile * groups * split->tile_rows};
}
