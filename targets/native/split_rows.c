/* Activations as AVX2 multiplies them: int8, in fours whose products with uint8 do not saturate.
 *
 * vpmaddubsw adds two products of a uint8 and an int8 as int16, and vpaddw another two: an int16 holds
 * 255 * 128 either way.  Two neighbouring pairs, of eight elements the first and third or the second
 * and fourth, make a four.  Of one whose activations above the zero point add up to more than 127, as
 * much as an int8 holds, the rest is noted, to be multiplied by the same weights once more, or several
 * times; so of one whose activations below add up to more than 128.  A row that lies elsewhere than
 * around the zero point is split at its mean, for which the sums of columns make up.  Of a transformer's groups of eight one in 3 to 200 has such a four.  Weights
 * are uint8, 128 more than they are, so that sums start at -128 times those of a row. */
#include <immintrin.h>
#include <string.h>

#include "qmatmul.h"

#define AVX2 __attribute__((target("avx2")))

enum { QUAD = 4, QUADS = 8, MOST_ABOVE = 127, MOST_BELOW = 128, CLOSE = 16 };

/* Bytes that a core splits in a nanosecond. */
static const double SPLIT_RATE = 6;

/* What a row of a tile lacks. */
struct lacking {
    int64_t count, tile_rows;
    uint16_t *groups; /* each `tile_rows` from the one before, like values */
    int32_t *values;
};

static void note(struct lacking *lacking, int64_t group, int32_t value) {
    const int64_t index = lacking->count++ * lacking->tile_rows;
    lacking->groups[index] = (uint16_t)group;
    lacking->values[index] = value;
}

AVX2 static void note_vector(struct lacking *lacking, int64_t group, __m256i excess) {
    int32_t values[QUADS];
    __m256i none = _mm256_cmpeq_epi32(excess, _mm256_setzero_si256());
    unsigned some = (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(none)) ^ 0xff;
    _mm256_storeu_si256((__m256i *)values, excess);
    for (; some; some &= some - 1) {
        const int i = __builtin_ctz(some);
        note(lacking, group + i, values[i]);
    }
}

AVX2 static int is_zero(__m256i value) { return _mm256_testz_si256(value, value); }

/* Of the bytes of each pair as much as `share`, an int16, from the first as far as it goes. */
AVX2 static __m256i take(__m256i magnitudes, __m256i share) {
    __m256i first = _mm256_and_si256(magnitudes, _mm256_set1_epi16(0xff));
    first = _mm256_min_epi16(first, share);
    return _mm256_or_si256(first, _mm256_slli_epi16(_mm256_sub_epi16(share, first), 8));
}

/* The part of its four's `over` that a pair of this sum gives.  One pair gives all, if it can; the
 * earlier only if that is no more than `limit`, which can be multiplied at once. */
AVX2 static __m256i share(__m256i over, __m256i pairs, __m256i limit) {
    const __m256i most = _mm256_blend_epi32(_mm256_min_epi16(pairs, limit), pairs, 0xaa);
    const __m256i lacks = _mm256_cmpgt_epi16(over, most);
    const __m256i other_lacks = _mm256_shuffle_epi32(lacks, 0xb1);
    const __m256i rest = _mm256_subs_epu16(over, _mm256_shuffle_epi32(pairs, 0xb1));
    const __m256i all_or_rest = _mm256_blendv_epi8(_mm256_and_si256(over, other_lacks), rest, lacks);
    const __m256i other_gives_all = _mm256_andnot_si256(other_lacks, lacks);
    const __m256i later = _mm256_andnot_si256(other_gives_all, _mm256_min_epi16(over, pairs));
    return _mm256_blend_epi32(all_or_rest, later, 0xaa);
}

/* Notes of each pair of `above` and `below` as much as these shares. */
AVX2 static void note_shares(struct lacking *lacking, int64_t group, __m256i above, __m256i below,
                             __m256i from_above, __m256i from_below) {
    const __m256i most_above = _mm256_set1_epi16(MOST_ABOVE);
    const __m256i most_below = _mm256_set1_epi16(MOST_BELOW);
    above = take(above, from_above), below = take(below, from_below);
    /* At the zero point in the middle a pair lacks at most twice what can be multiplied at once. */
    for (int times = 0; times < 2 || !is_zero(_mm256_or_si256(above, below)); times++) {
        const __m256i some_above = take(above, _mm256_min_epi16(from_above, most_above));
        const __m256i some_below = take(below, _mm256_min_epi16(from_below, most_below));
        note_vector(lacking, group, _mm256_sub_epi8(some_above, some_below));
        above = _mm256_sub_epi8(above, some_above), below = _mm256_sub_epi8(below, some_below);
        from_above = _mm256_subs_epu16(from_above, most_above);
        from_below = _mm256_subs_epu16(from_below, most_below);
    }
}

/* 32 activations less `zero_point`; adds them to `total`, and notes what is missing in the result. */
AVX2 static __m256i split_vector(__m256i q, __m256i zero_point, __m256i *total,
                                 struct lacking *lacking, int64_t group) {
    const __m256i one = _mm256_set1_epi8(1);
    const __m256i most_above = _mm256_set1_epi16(MOST_ABOVE);
    const __m256i most_below = _mm256_set1_epi16(MOST_BELOW);
    const __m256i above = _mm256_subs_epu8(q, zero_point), below = _mm256_subs_epu8(zero_point, q);
    const __m256i up = _mm256_maddubs_epi16(above, one), down = _mm256_maddubs_epi16(below, one);
    const __m256i other_up = _mm256_shuffle_epi32(up, 0xb1), other_down = _mm256_shuffle_epi32(down, 0xb1);
    const __m256i over = _mm256_subs_epu16(_mm256_add_epi16(up, other_up), most_above);
    const __m256i under = _mm256_subs_epu16(_mm256_add_epi16(down, other_down), most_below);
    const __m256i sums = _mm256_sub_epi16(up, down);
    *total = _mm256_add_epi32(*total, _mm256_madd_epi16(sums, _mm256_set1_epi16(1)));
    const __m256i a = _mm256_sub_epi8(above, below);
    if (is_zero(_mm256_or_si256(over, under))) return a;

    const __m256i from_above = share(over, up, most_above);
    const __m256i from_below = share(under, down, most_below);
    note_shares(lacking, group, above, below, from_above, from_below);
    return _mm256_sub_epi8(a, _mm256_sub_epi8(take(above, from_above), take(below, from_below)));
}

AVX2 static int64_t distance(const uint8_t *q, int64_t k, uint8_t from) {
    const __m256i there = _mm256_set1_epi8((char)from);
    __m256i total = _mm256_setzero_si256();
    int64_t i = 0, parts[4], sum = 0;
    for (; i + 32 <= k; i += 32)
        total = _mm256_add_epi64(
            total, _mm256_sad_epu8(_mm256_loadu_si256((const __m256i *)(q + i)), there));
    _mm256_storeu_si256((__m256i *)parts, total);
    for (int part = 0; part < 4; part++) sum += parts[part];
    for (; i < k; i++) sum += q[i] > from ? q[i] - from : from - q[i];
    return sum;
}

/* Where a row is split: what it lacks takes longer than finding the mean. */
static uint8_t centre(const uint8_t *q, int64_t k, uint8_t zero_point) {
    const int64_t far = distance(q, k, zero_point);
    if (far < CLOSE * k) return zero_point;
    const uint8_t mean = (uint8_t)(distance(q, k, 0) / k);
    return distance(q, k, mean) * 5 < far * 4 ? mean : zero_point;
}

/* Row `row` of a tile, less z, to whole groups with zeros at the end unless `split` is NULL; returns
 * where its sums start. */
AVX2 static int32_t split_row(const uint8_t *q, uint8_t z, int64_t k, int8_t *split,
                              struct lacking *lacking) {
    const __m256i zero_point = _mm256_set1_epi8((char)z);
    __m256i total = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 32 <= k; i += 32) {
        __m256i part = _mm256_loadu_si256((const __m256i *)(q + i));
        part = split_vector(part, zero_point, &total, lacking, i / QUAD);
        if (split) _mm256_storeu_si256((__m256i *)(split + i), part);
    }
    if (i < k) {
        uint8_t last[32];
        memset(last, z, sizeof last);
        memcpy(last, q + i, (size_t)(k - i));
        __m256i part = _mm256_loadu_si256((const __m256i *)last);
        part = split_vector(part, zero_point, &total, lacking, i / QUAD);
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

/* How many numbers a row may lack. */
static int64_t most_lacking(const struct split_rows *split) {
    return split->most_lacking * ceil_div(split->k, 2 * QUAD);
}

/* Tile `index` of all blocks.  The last of a block overlaps the one before, whose rows are not
 * written again: another thread may be at it. */
static void split_tile(const struct split_rows *split, int64_t index) {
    const int64_t length = ceil_div(split->k, QUAD) * QUAD, tile_rows = split->tile_rows;
    const int64_t block = index / split->block_tiles * split->block_rows;
    const int64_t rows = min(split->rows - block, split->block_rows);
    const struct cut tiles = cut(rows, tile_rows);
    const int64_t begin = index % split->block_tiles * tiles.height;
    const int64_t first = min(begin, rows - tiles.height);
    const int64_t start = index * most_lacking(split) * tile_rows;
    struct lacking lacking[MOST_TILE_ROWS];
    int64_t most = 0;
    for (int64_t i = 0; i < tiles.height; i++) {
        const int64_t row = block + first + i;
        int8_t *target = first + i < begin ? NULL : split->split + row * length;
        lacking[i] = (struct lacking){0, tile_rows, split->groups + start + i, split->values + start + i};
        const uint8_t *q = split->q + row * split->k;
        const uint8_t z = split->zero_point, c = split->is_centred ? centre(q, split->k, z) : z;
        const int32_t sum = split_row(q, c, split->k, target, lacking + i);
        if (target) split->starts[row] = sum, split->offsets[row] = z - c;
        most = max(most, lacking[i].count);
    }
    for (int64_t i = 0; i < tiles.height; i++)
        while (lacking[i].count < most) note(lacking + i, 0, 0);
    split->counts[index] = (int32_t)most;
}

static int64_t all_tiles(const struct split_rows *split) {
    int64_t whole = split->rows / split->block_rows, rest = split->rows % split->block_rows;
    return whole * split->block_tiles + ceil_div(rest, split->tile_rows);
}

static size_t rounded(int64_t bytes) { return ((size_t)bytes + 63) / 64 * 64; }

size_t qc_plan_split(struct split_rows *split) {
    const int64_t length = ceil_div(split->k, QUAD) * QUAD, word = sizeof(int32_t);
    split->block_tiles = ceil_div(split->block_rows, split->tile_rows);
    split->tiles = all_tiles(split);
    split->numbers = split->tiles * most_lacking(split) * split->tile_rows;
    return rounded(split->rows * length) + 2 * rounded(split->rows * word) +
           rounded(split->tiles * word) + rounded(split->numbers * word) +
           rounded(split->numbers * (int64_t)sizeof(uint16_t));
}

void qc_place_split(struct split_rows *split, char *memory) {
    const int64_t length = ceil_div(split->k, QUAD) * QUAD, word = sizeof(int32_t);
    split->split = (int8_t *)memory;
    split->starts = (int32_t *)(memory += rounded(split->rows * length));
    split->offsets = (int32_t *)(memory += rounded(split->rows * word));
    split->counts = (int32_t *)(memory += rounded(split->rows * word));
    split->values = (int32_t *)(memory += rounded(split->tiles * word));
    split->groups = (uint16_t *)(memory + rounded(split->numbers * word));
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
    const int64_t length = ceil_div(split->k, QUAD) * QUAD;
    const int64_t tile = row / split->block_rows * split->block_tiles;
    const int64_t start = tile * most_lacking(split) * split->tile_rows;
    args->q = (const uint8_t *)split->split + row * length;
    args->init = split->starts + row;
    args->offsets = split->offsets + row;
    args->excess =
        (struct qc_excess){split->counts + tile, split->groups + start, split->values + start};
}
