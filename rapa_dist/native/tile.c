/* The cycles of a tile: what AnalogTile of rapa_dist/tile.py does, in the same order. Read there why in this order. */

#include "tile.h"

#include "products.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#define BLOCK 48 /* rows of a part of a gradient: they stay in the first cache */

static multiplier *multiply;

/* Choose a kind of vectors: "avx512", "avx2", "neon", or NULL for the best. Returns its name, NULL if there is none. */
const char *rapa_choose(const char *kind)
{
    if (!kind)
        kind = best_kind();
    multiplier *found = kind ? multiplier_of(kind) : NULL;
    if (!found)
        return NULL;
    multiply = found;
    return kind;
}

multiplier *chosen(void)
{
    return multiply;
}

/* Work on the cells of a kernel (k + bias, c_out); `bias`: 1 if its last row is the bias, else 0. NULL without memory. */
struct tile *rapa_tile_new(void *cells, size_t k, size_t c_out, int bias)
{
    const size_t n_panels = (k + PANEL - 1) / PANEL, n_zeros = k > c_out ? k : c_out;
    struct tile *tile = calloc(1, sizeof *tile + (n_panels * PANEL * c_out + n_zeros) * sizeof(float));
    if (!tile)
        return NULL;
    tile->words = cells;
    tile->k = k, tile->c_out = c_out, tile->bias = bias != 0;
    tile->zeros = tile->panels + n_panels * PANEL * c_out;
    return tile;
}

void rapa_tile_free(struct tile *tile)
{
    free(tile);
}

static size_t kernel_floats(const struct tile *tile)
{
    return (tile->k + tile->bias) * tile->c_out;
}

/* A buffer's kernel, (k + bias, c_out); that of its gradient lies `beside` it. */
static float *kernel_in(const struct tile *tile, size_t buffer, int beside)
{
    const size_t padded = (kernel_floats(tile) + 15) / 16 * 16;
    return (float *)((char *)tile->words + PAGE) + (2 * buffer + beside) * padded;
}

static uint64_t thread_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return 1000000000u * (uint64_t)now.tv_sec + (uint64_t)now.tv_nsec;
}

typedef float four __attribute__((vector_size(16), aligned(4), may_alias));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (int32_t __attribute__((vector_size(16)))){__VA_ARGS__})
#endif

void transpose(const float *kernel, size_t k, size_t c_out, float *panels)
{
    for (size_t first = 0; first < k; first += PANEL, panels += PANEL * c_out) {
        const float *from = kernel + first * c_out;
        const size_t columns = k - first < PANEL ? k - first : PANEL;
        size_t i = 0;
        for (; i + 4 <= columns; i += 4) {
            size_t c = 0;
            for (; c + 4 <= c_out; c += 4) {
                const float *corner = from + i * c_out + c;
                const four row0 = *(const four *)corner, row1 = *(const four *)(corner + c_out);
                const four row2 = *(const four *)(corner + 2 * c_out), row3 = *(const four *)(corner + 3 * c_out);
                const four low01 = SHUFFLE(row0, row1, 0, 4, 1, 5), high01 = SHUFFLE(row0, row1, 2, 6, 3, 7);
                const four low23 = SHUFFLE(row2, row3, 0, 4, 1, 5), high23 = SHUFFLE(row2, row3, 2, 6, 3, 7);
                float *to = panels + c * PANEL + i;
                *(four *)to = SHUFFLE(low01, low23, 0, 1, 4, 5);
                *(four *)(to + PANEL) = SHUFFLE(low01, low23, 2, 3, 6, 7);
                *(four *)(to + 2 * PANEL) = SHUFFLE(high01, high23, 0, 1, 4, 5);
                *(four *)(to + 3 * PANEL) = SHUFFLE(high01, high23, 2, 3, 6, 7);
            }
            for (; c < c_out; c++)
                for (size_t j = i; j < i + 4; j++)
                    panels[c * PANEL + j] = from[j * c_out + c];
        }
        for (; i < columns; i++)
            for (size_t c = 0; c < c_out; c++)
                panels[c * PANEL + i] = from[i * c_out + c];
    }
}

/* dI = D transposed(K), over the patches. transposed(K) is made in panels: what is multiplied at a time lies in one
 * piece. */
static void pass_back(struct tile *tile, const float *kernel, const float *errors, float *input_errors, size_t rows)
{
    const size_t k = tile->k, c_out = tile->c_out;
    transpose(kernel, k, c_out, tile->panels);
    multiply(&(struct product){
        .left = errors,
        .left_row = c_out,
        .left_step = 1,
        .right = tile->panels,
        .right_row = PANEL,
        .right_panel = PANEL * c_out,
        .start = tile->zeros,
        .out = input_errors,
        .out_row = k,
        .rows = rows,
        .columns = k,
        .length = c_out,
    });
}

/* K' = keep * K - rate * transposed(I) D, the bias as if its input were 1; K in buffer `source`, K' in `target`. */
static void add_update(const struct tile *tile, size_t source, size_t target, const float *patches, const float *errors,
                       size_t rows, float keep, float rate)
{
    static const float one = 1;
    const size_t k = tile->k, c_out = tile->c_out, floats = kernel_floats(tile);
    const float *kernel = kernel_in(tile, source, 0);
    float *gradient = kernel_in(tile, source, 1), *upcoming = kernel_in(tile, target, 0);
    if (!rows)
        memset(gradient, 0, floats * sizeof(float));
    for (size_t first = 0; first < rows; first += BLOCK) {
        const size_t block = rows - first < BLOCK ? rows - first : BLOCK;
        const float *of_errors = errors + first * c_out;
        struct product part = {
            .left = patches + first * k,
            .left_row = 1,
            .left_step = k,
            .ahead = 16, /* the next cache line of the same patch */
            .right = of_errors,
            .right_row = c_out,
            .right_panel = PANEL,
            .start = first ? NULL : tile->zeros,
            .out = gradient,
            .out_row = c_out,
            .rows = k,
            .columns = c_out,
            .length = block,
        };
        multiply(&part);
        if (tile->bias) {
            part.left = &one, part.left_step = part.ahead = 0, part.rows = 1, part.out = gradient + k * c_out;
            multiply(&part);
        }
    }
    for (size_t i = 0; i < floats; i++)
        upcoming[i] = keep * kernel[i] - rate * gradient[i]; /* never fused, see build.py: one meaning everywhere */
}

/* M = I K + bias. patches (rows, k) I, outputs (rows, c_out) M. */
void rapa_tile_forward(struct tile *tile, const float *patches, float *outputs, size_t rows)
{
    const uint64_t started = thread_ns();
    const size_t k = tile->k, c_out = tile->c_out;
    uint64_t *words = tile->words;
    const float *kernel = kernel_in(tile, words[COMMIT] & 3, 0);
    multiply(&(struct product){
        .left = patches,
        .left_row = k,
        .left_step = 1,
        .right = kernel,
        .right_row = c_out,
        .right_panel = PANEL,
        .start = tile->bias ? kernel + k * c_out : tile->zeros,
        .out = outputs,
        .out_row = c_out,
        .rows = rows,
        .columns = c_out,
        .length = k,
    });
    words[ROWS_FORWARD] += rows;
    words[BUSY_NS] += thread_ns() - started;
}

/* What `flags` ask for: the kernel to be (DO_UPDATE), the input error dI over the patches (DO_INPUT_ERROR), the kernel
 * to be put in force (DO_COMMIT). patches (rows, k) I, errors (rows, c_out) D. */
void rapa_tile_backward(struct tile *tile, float *patches, const float *errors, size_t rows, uint64_t cycle, int flags,
                        double rate, double decay)
{
    const uint64_t started = thread_ns();
    uint64_t *words = tile->words;
    const uint64_t state = words[COMMIT], done = state >> 5, prepared = state & 16, active = state & 3;
    uint64_t upcoming = state >> 2 & 3;
    if (flags & DO_UPDATE) {
        if (done == cycle && !prepared) { /* done before the process was killed; only the answer was lost */
            words[STEP] = words[NEXT_STEP];
            return;
        }
        if (done != cycle) {
            const int first = upcoming == active;
            if (first || rows) { /* without rows the kernel that earlier parts prepared stays as it is */
                const uint64_t target = first ? (active + 1) % 3 : 3 - active - upcoming;
                const float keep = first ? (float)(1 - rate * decay) : 1;
                add_update(tile, upcoming, target, patches, errors, rows, keep, (float)rate);
                upcoming = target;
            }
            words[NEXT_STEP] = words[STEP] + !!(flags & DO_COMMIT);
            store(&words[COMMIT], cycle << 5 | 16 | upcoming << 2 | active);
        }
    }
    if (flags & DO_INPUT_ERROR) {
        pass_back(tile, kernel_in(tile, active, 0), errors, patches, rows);
        words[ROWS_BACKWARD] += rows;
    }
    if (flags & DO_UPDATE) {
        const int commit = flags & DO_COMMIT;
        store(&words[COMMIT], cycle << 5 | upcoming << 2 | (commit ? upcoming : active));
        words[ROWS_UPDATE] += rows;
        if (commit) {
            words[UPDATES]++;
            words[STEP] = words[NEXT_STEP];
        }
    }
    words[BUSY_NS] += thread_ns() - started;
}

/* Forget what parts of an update have prepared: the kernel to be is the one in force again. */
void rapa_tile_discard(struct tile *tile, uint64_t cycle)
{
    const uint64_t state = tile->words[COMMIT], active = state & 3;
    if (state >> 5 != cycle)
        store(&tile->words[COMMIT], cycle << 5 | active << 2 | active);
}
