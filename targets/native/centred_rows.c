/* Activations as kernels of int4 weights multiply them: int8, in whole chunks, with zeros at the end.
 *
 * Those weights are stored 8 more than they are, so that the sums of a chunk start at -8 times the sum
 * of its activations. */
#include <string.h>

#include "qmatmul.h"

/* Bytes that a core centres in a nanosecond. */
static const double CENTRE_RATE = 8;

__attribute__((target("avx2"))) static int32_t centre(const uint8_t *q, int64_t count, int8_t *centred) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; i++) {
        centred[i] = (int8_t)(q[i] ^ 0x80);
        sum += centred[i];
    }
    return sum;
}

static void centre_row(const struct centred_rows *rows, int64_t row) {
    const uint8_t *q = rows->q + row * rows->k;
    int8_t *target = rows->centred + row * rows->chunk * rows->chunks;
    for (int64_t chunk = 0; chunk < rows->chunks; chunk++) {
        const int64_t first = chunk * rows->chunk;
        const int64_t count = max(min(rows->chunk, rows->k - first), 0);
        rows->starts[row * rows->chunks + chunk] = -8 * centre(q + first, count, target + first);
        memset(target + first + count, 0, (size_t)(rows->chunk - count));
    }
}

static size_t rounded(int64_t bytes) { return ((size_t)bytes + 63) / 64 * 64; }

size_t qc_plan_centred(const struct centred_rows *rows) {
    const int64_t chunks = rows->rows * rows->chunks;
    return rounded(chunks * rows->chunk) + rounded(chunks * (int64_t)sizeof(int32_t));
}

void qc_place_centred(struct centred_rows *rows, char *memory) {
    rows->centred = (int8_t *)memory;
    rows->starts = (int32_t *)(memory + rounded(rows->rows * rows->chunks * rows->chunk));
}

static void centre_task(void *argument, size_t index) {
    const struct centred_rows *rows = argument;
    const int64_t end = rows->rows * ((int64_t)index + 1) / rows->tasks;
    for (int64_t row = rows->rows * (int64_t)index / rows->tasks; row < end; row++)
        centre_row(rows, row);
}

OrtStatus *qc_centre(struct centred_rows *rows, OrtKernelContext *context) {
    rows->tasks = min(qc_task_count((double)rows->rows * (double)rows->k / CENTRE_RATE), rows->rows);
    return qc_parallel(context, centre_task, (size_t)rows->tasks, rows);
}

void qc_read_centred(const struct centred_rows *rows, int64_t row, struct qc_qmatmul_args *args) {
    args->q = (const uint8_t *)rows->centred + row * rows->chunk * rows->chunks;
    args->init = rows->starts + row * rows->chunks;
}
