/* The work of a product: blocks of rows times groups of panels of columns, one task each. */
#include <stdlib.h>
#include <string.h>

#include "qmatmul.h"

/* What one core does per nanosecond: multiply-adds, weight bytes from memory, results stored. */
static const double MULTIPLY_RATE = 500, STREAM_RATE = 40, EPILOGUE_RATE = 10;
/* Activations of a block of rows, which every panel reads again: half of a 1 MiB L2. */
static const int64_t BLOCK_BYTES = 512 * 1024;
/* As many bytes of activations as a kernel reads lie on the stack. */
enum { FEW_ACTIVATIONS = 16 * 1024 };
/* Kernels index a block with int32. */
static const int64_t MAX_BLOCK_ELEMENTS = (int64_t)1 << 30;

/* Each call of the kernel stores to one result. */
void qc_run_panels(const struct qmatmul_run *run, struct qc_qmatmul_args *args, char *const *y,
                   int64_t row, int64_t begin, int64_t end) {
    const struct qc_op *op = run->kernel->op;
    const int64_t panel_columns = op->variant->tile_vectors * 16;
    int64_t first = 0;
    for (size_t part = 0; first < op->spec->n; part++) {
        int64_t columns = width(op, part);
        args->panel_begin = (int32_t)max(begin, first / panel_columns);
        args->panel_end = (int32_t)min(end, ceil_div(first + columns, panel_columns));
        args->y = y[part] + row * columns * result_size(op);
        args->y_columns = (int32_t)columns;
        args->y_first = (int32_t)first;
        if (args->panel_begin < args->panel_end) op->variant->qmatmul(args);
        first += columns;
    }
}

/* Copies window `index` of a batch, with zeros where there is no row of x. */
static void copy_window(const struct qmatmul_run *run, const float *x, int64_t index, float *window) {
    const struct qc_op_spec *spec = run->kernel->op->spec;
    const int64_t columns = spec->k / spec->r, rows = run->batch_stride / columns;
    int64_t row = index * spec->s - spec->pads[0];
    for (int64_t tap = 0; tap < spec->r; tap++, row += spec->dilations[0], window += columns) {
        const size_t bytes = (size_t)columns * sizeof *window;
        if (row >= 0 && row < rows)
            memcpy(window, x + row * columns, bytes);
        else
            memset(window, 0, bytes);
    }
}

/* Windows from `index` on, as many as there is room for and at most so many; how many. */
static int64_t copy_windows(const struct qmatmul_run *run, const float *x, int64_t index, int64_t most,
                            float *windows) {
    const int64_t k = run->kernel->op->spec->k, count = min(most, WINDOW_FLOATS / k);
    for (int64_t i = 0; i < count; i++) copy_window(run, x, index + i, windows + i * k);
    return count;
}

void qc_quantize_rows(const struct qmatmul_run *run, int64_t row, int64_t rows,
                      struct quantized *memory, struct qc_qmatmul_args *args) {
    const struct qc_op *op = run->kernel->op;
    float windows[WINDOW_FLOATS];
    row += run->first_row;
    for (int64_t done = 0, count; done < rows; done += count) {
        const int64_t batch = (row + done) / run->batch_rows, first = (row + done) % run->batch_rows;
        const int is_inner = first >= run->inner_begin && first < run->inner_end;
        const float *x = run->x + batch * run->batch_stride;
        int64_t end = run->batch_rows;
        if (is_inner) end = run->inner_end;
        if (first < run->inner_begin) end = min(end, run->inner_begin);
        count = min(rows - done, end - first);
        if (!is_inner) count = copy_windows(run, x, first, count, windows);
        const struct qc_quantize_args part = {
            .x = is_inner ? x + run->inner_offset + first * run->x_stride : windows,
            .q = memory->q + done * op->spec->k,
            .s = memory->s + done,
            .rows = (int32_t)count,
            .x_stride = (int32_t)(is_inner ? run->x_stride : op->spec->k),
        };
        qc_quantize_block(op->variant, &part, op->spec->k);
    }
    args->q = memory->q;
    args->s = memory->s;
}

static struct split_rows rows_to_split(const struct qmatmul_run *run, const uint8_t *q, int64_t rows,
                                       int64_t block_rows) {
    const struct qc_op *op = run->kernel->op;
    return (struct split_rows){.q = q, .zero_point = run->zero_point,
                               .is_centred = has_zero_point(op), .rows = rows, .k = op->spec->k,
                               .block_rows = block_rows, .tile_rows = op->variant->tile_rows,
                               .most_lacking = op->variant->most_lacking};
}

/* All panels of rows that were just quantized. */
static void split_and_run(const struct qmatmul_run *run, struct qc_qmatmul_args *args, int64_t row) {
    char memory[SPLIT_BYTES] __attribute__((aligned(64)));
    struct split_rows split = rows_to_split(run, args->q, args->rows, args->rows);
    qc_plan_split(&split);
    qc_place_split(&split, memory);
    (void)qc_split(&split, NULL);
    qc_read_split(&split, 0, args);
    qc_run_panels(run, args, run->y, row, 0, run->kernel->panels);
}

/* The rows of a task, which it quantizes first. */
static void quantize_and_run(const struct qmatmul_run *run, struct qc_qmatmul_args *args,
                             int64_t row) {
    const struct qc_op *op = run->kernel->op;
    struct quantized memory;
    qc_quantize_rows(run, row, args->rows, &memory, args);
    if (op->variant->most_lacking)
        split_and_run(run, args, row);
    else
        qc_run_panels(run, args, run->y, row, 0, run->kernel->panels);
}

static void qmatmul_task(void *argument, size_t index) {
    const struct qmatmul_run *run = argument;
    const struct qmatmul *kernel = run->kernel;
    const struct qc_op_spec *spec = kernel->op->spec;
    int64_t row = (int64_t)index / run->panel_groups * run->block_rows;
    int64_t group = (int64_t)index % run->panel_groups;
    int64_t rows = run->rows - row < run->block_rows ? run->rows - row : run->block_rows;

    struct qc_qmatmul_args args = run->args;
    for (size_t i = 0; spec->extras[i]; i++)
        if (spec->extras[i] != 'C') args.extra[i] += row * spec->n;
    args.rows = (int32_t)rows;
    if (run->x) {
        quantize_and_run(run, &args, row);
        return;
    }
    if (run->split.split)
        qc_read_split(&run->split, row, &args);
    else if (run->centred.centred)
        qc_read_centred(&run->centred, row, &args);
    else
        args.q += row * spec->k;
    if (!has_zero_point(kernel->op)) args.s += row;
    if (args.row_sums) args.row_sums += row;
    if (run->in_tasks) {
        qc_run_and_quantize(run, &args, row);
        return;
    }
    qc_run_panels(run, &args, run->y, row, kernel->panels * group / run->panel_groups,
               kernel->panels * (group + 1) / run->panel_groups);
}

/* Whole tiles that a task can quantize. */
static int64_t most_quantized(const struct qc_op *op) {
    const int64_t tile_rows = op->variant->tile_rows;
    return min(QUANTIZED_BYTES / op->spec->k, QUANTIZED_ROWS) / tile_rows * tile_rows;
}

/* Rows of a block that all panels are multiplied with in turn, for about so many tasks. */
static int64_t choose_block_rows(const struct qmatmul_run *run, int64_t tasks) {
    const struct qc_op *op = run->kernel->op;
    const int64_t tile_rows = op->variant->tile_rows, k = op->spec->k, n = op->spec->n;
    /* Never below two tiles, since every block reads all of w. */
    const int64_t least = 2 * tile_rows;
    if (run->x) return min(max(ceil_div(run->rows, min(tasks, 16)), least), most_quantized(op));
    if (run->in_tasks) {
        const int64_t tiles = ceil_div(max(ceil_div(run->rows, min(tasks, 16)), least), tile_rows);
        return min(tiles, max(RESULT_FLOATS / n / tile_rows, 1)) * tile_rows;
    }
    int64_t rows = max(BLOCK_BYTES / k, 4 * tile_rows);
    /* Few panels: cut the rows too. */
    int64_t wanted_blocks = ceil_div(min(tasks, 16), run->kernel->panels);
    rows = min(rows, max(ceil_div(run->rows, wanted_blocks), least));
    rows = ceil_div(rows, tile_rows) * tile_rows;
    return max(min(rows, MAX_BLOCK_ELEMENTS / max(k, n)), 1);
}

/* Cuts the work into blocks of rows times groups of panels; returns the number of tasks. */
static int64_t split(struct qmatmul_run *run) {
    const struct qmatmul *kernel = run->kernel;
    const struct qc_op_spec *spec = kernel->op->spec;
    double m = (double)run->rows, k = (double)spec->k, n = (double)spec->n;
    double multiply = m * k * n / MULTIPLY_RATE, stream = k * n / STREAM_RATE;
    int64_t tasks =
        qc_task_count((multiply > stream ? multiply : stream) + m * n / EPILOGUE_RATE);
    if (tasks == 1 && !run->x && !run->in_tasks && run->rows * spec->k <= BLOCK_BYTES) {
        run->block_rows = run->rows;
        run->panel_groups = 1;
        return 1;
    }
    run->block_rows = choose_block_rows(run, tasks);
    int64_t blocks = ceil_div(run->rows, run->block_rows);
    /* A single row reads two panels at a time, so it wants them in pairs. */
    int64_t most_groups = run->rows == 1 ? max(kernel->panels / 2, 1) : kernel->panels;
    int64_t groups = run->x || run->in_tasks ? 1 : min(ceil_div(tasks, blocks), most_groups);
    run->panel_groups = groups;
    /* Equal groups finish together; look for such a number, but not below half. */
    for (int64_t equal = groups; equal > groups / 2; equal--)
        if (kernel->panels % equal == 0) {
            run->panel_groups = equal;
            break;
        }
    return blocks * run->panel_groups;
}

static void plan_activations(struct qmatmul_run *run) {
    const struct qc_op *op = run->kernel->op;
    if (op->variant->chunk)
        run->centred = (struct centred_rows){.q = run->args.q, .rows = run->rows, .k = op->spec->k,
                                             .chunk = op->variant->chunk,
                                             .chunks = op->variant->chunks};
    else
        run->split = rows_to_split(run, run->args.q, run->rows, run->block_rows);
}

/* Activations as the kernel reads them, in `memory`. */
static OrtStatus *make_activations(struct qmatmul_run *run, OrtKernelContext *context, char *memory) {
    if (run->kernel->op->variant->chunk) {
        qc_place_centred(&run->centred, memory);
        return qc_centre(&run->centred, context);
    }
    qc_place_split(&run->split, memory);
    return qc_split(&run->split, context);
}

OrtStatus *qc_run_qmatmul(struct qmatmul_run *run, OrtKernelContext *context) {
    const struct qc_op *op = run->kernel->op;
    const int is_centred = op->variant->chunk != 0, is_split = op->variant->most_lacking != 0;
    const size_t tasks = (size_t)split(run);
    if (run->x || (!is_centred && !is_split)) return qc_parallel(context, qmatmul_task, tasks, run);
    plan_activations(run);
    const size_t bytes = is_centred ? qc_plan_centred(&run->centred) : qc_plan_split(&run->split);
    char few[FEW_ACTIVATIONS] __attribute__((aligned(64)));
    char *memory = bytes <= sizeof few ? few : malloc(bytes);
    if (!memory) return qc_error(op, "out of memory for %zu bytes of activations", bytes);
    OrtStatus *status = make_activations(run, context, memory);
    if (!status) status = qc_parallel(context, qmatmul_task, tasks, run);
    if (memory != few) free(memory);
    return status;
}
