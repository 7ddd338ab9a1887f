/* im2col and col2im in tile order: see rapa_dist/fabric/im2col.py. */

#include "parallel.h"
#include "tile.h"
#include "vectors.h"

#include <stdlib.h>

/* One convolution on channels-last planes (images, h, w, channels), as class Geometry has it. */
struct geometry {
    int64_t h, w, kh, kw, down, across, top, left, dilation_y, dilation_x, out_h, out_w, channels;
};

/* Keeps a compiler from taking a loop for memcpy or memset, which look longer at some dozen floats than it takes to
 * copy them. */
#define PLAIN_LOOP(index) __asm__("" : "+r"(index))

INLINE void copy(float *to, const float *from, size_t floats)
{
    size_t i = 0;
    if (floats < EIGHT) {
        for (; i < floats; i++) {
            PLAIN_LOOP(i);
            to[i] = from[i];
        }
        return;
    }
    for (; i + EIGHT < floats; i += EIGHT) {
        PLAIN_LOOP(i);
        put(to + i, load(from + i, EIGHT), EIGHT);
    }
    put(to + floats - EIGHT, load(from + floats - EIGHT, EIGHT), EIGHT); /* the last ones, some of them twice */
}

/* Copy runs that begin `step` floats from one to the next, and end up side by side. */
static WIDE __attribute__((noinline)) void copy_runs(float *to, const float *from, size_t runs, size_t step, size_t run)
{
    for (; runs; runs--, from += step, to += run)
        copy(to, from, run);
}

/* Division by the same number again and again: a product with its inverse is off by one at most. */
struct divisor {
    uint32_t by;
    double inverse;
};

static inline uint32_t divide(uint32_t value, struct divisor d, uint32_t *rest)
{
    int64_t quotient = (int64_t)((double)value * d.inverse), left = (int64_t)value - quotient * d.by;
    if (left < 0)
        quotient--, left += d.by;
    else if (left >= d.by)
        quotient++, left -= d.by;
    *rest = (uint32_t)left;
    return (uint32_t)quotient;
}

INLINE void zero(float *to, size_t floats)
{
    size_t i = 0;
    if (floats < EIGHT) {
        for (; i < floats; i++) {
            PLAIN_LOOP(i);
            to[i] = 0;
        }
        return;
    }
    for (; i + EIGHT < floats; i += EIGHT) {
        PLAIN_LOOP(i);
        put(to + i, (eight){0}, EIGHT);
    }
    put(to + floats - EIGHT, (eight){0}, EIGHT);
}

/* What a row of the kernel sees at (y, x0) …: pixels beyond the plane are zero. */
static WIDE void copy_run(const struct geometry *g, const float *plane, int64_t y, int64_t x0, float *to)
{
    const size_t channels = (size_t)g->channels, run = (size_t)g->kw * channels;
    if (y < 0 || y >= g->h) {
        zero(to, run);
        return;
    }
    const float *line = plane + (size_t)(y * g->w) * channels;
    if (g->dilation_x == 1) {
        if (x0 >= 0 && x0 + g->kw <= g->w) {
            copy(to, line + (size_t)x0 * channels, run);
            return;
        }
        const int64_t begin = x0 < 0 ? (x0 < -g->kw ? g->kw : -x0) : 0, left = g->w - x0;
        const int64_t end = left < begin ? begin : left < g->kw ? left : g->kw;
        zero(to, (size_t)begin * channels);
        copy(to + (size_t)begin * channels, line + (size_t)(x0 + begin) * channels, (size_t)(end - begin) * channels);
        zero(to + (size_t)end * channels, (size_t)(g->kw - end) * channels);
        return;
    }
    for (int64_t kx = 0; kx < g->kw; kx++, to += channels) {
        const int64_t x = x0 + kx * g->dilation_x;
        if (x < 0 || x >= g->w)
            zero(to, channels);
        else
            copy(to, line + (size_t)x * channels, channels);
    }
}

struct gathering {
    const struct geometry *g;
    const float *planes;
    const int64_t *order;
    size_t rows;
    const uint8_t *mask;
    float *patches;
};

static WIDE void gather(void *what, size_t part, size_t parts)
{
    const struct gathering *job = what;
    const struct geometry *g = job->g;
    const size_t channels = (size_t)g->channels, run = (size_t)g->kw * channels;
    const size_t plane = (size_t)(g->h * g->w) * channels, places = (size_t)(g->kh * g->kw);
    const size_t step = (size_t)(g->dilation_y * g->w) * channels; /* from a run of a patch to the next */
    const int64_t inner_h = g->h - g->dilation_y * (g->kh - 1); /* where a patch may begin that lies in the plane */
    const int64_t inner_w = g->dilation_x == 1 ? g->w - g->kw + 1 : 0;
    const uint32_t n_patches = (uint32_t)(g->out_h * g->out_w);
    const struct divisor per_image = {n_patches, 1.0 / n_patches}, per_line = {(uint32_t)g->out_w, 1.0 / (double)g->out_w};
    const size_t first = begin_of(job->rows, part, parts), last = begin_of(job->rows, part + 1, parts);
    float *patches = job->patches + first * places * channels;
    for (size_t r = first; r < last; r++, patches += places * channels) {
        uint32_t pixel, x;
        const uint32_t image = divide((uint32_t)job->order[r], per_image, &pixel), y = divide(pixel, per_line, &x);
        const int64_t y0 = y * g->down - g->top, x0 = x * g->across - g->left;
        if (y0 >= 0 && x0 >= 0 && y0 < inner_h && x0 < inner_w)
            copy_runs(patches, job->planes + image * plane + (size_t)(y0 * g->w + x0) * channels, (size_t)g->kh, step,
                      run);
        else
            for (int64_t ky = 0; ky < g->kh; ky++)
                copy_run(g, job->planes + image * plane, y0 + ky * g->dilation_y, x0, patches + (size_t)ky * run);
        if (job->mask)
            for (size_t place = 0; place < places; place++)
                if (!job->mask[pixel * places + place])
                    zero(patches + place * channels, channels);
    }
}

/* Write patches (rows, kh · kw · channels): row r is patch order[r]. mask (n_p, kh · kw): 0 where a patch sees zero
 * instead of the pixel; NULL: it sees all. */
EXPORT void rapa_gather(const struct geometry *g, const float *planes, const int64_t *order, size_t rows,
                        const uint8_t *mask, float *patches)
{
    struct gathering job = {g, planes, order, rows, mask, patches};
    in_parts(gather, &job, rows / 256); /* few rows are not worth to wake somebody */
}

/* By patch its row, or `rows` if it has none; row r is patch order[r]. */
EXPORT void rapa_rows_of_patches(const int64_t *order, size_t rows, int64_t *row_of_patch, size_t n_patches)
{
    if (rows < n_patches)
        for (size_t patch = 0; patch < n_patches; patch++)
            row_of_patch[patch] = (int64_t)rows;
    for (size_t row = 0; row < rows; row++)
        row_of_patch[order[row]] = (int64_t)row;
}

enum { WORD = 64, LINE = 64 }; /* tiles of which a word says who has a sum; bytes of a cache line */

/* The patches that see a row of pixels, or a column, through one place of the kernel: what that adds to the number of
 * the patch, and to the place, in pixels and in floats. */
struct sight {
    int32_t patch, place, floats;
};

/* The input errors of a patch, or a piece of them; NULL if there are none. */
struct patch {
    const float *input_errors;
    int64_t tile;
};

/* What a pixel's sum is made of, in the order of (ky, kx). */
struct pieces {
    struct patch *piece; /* (places) */
    size_t count;
};

/* Room to work in. */
struct room {
    eight (*of_tile)[CHUNK_VECTORS]; /* sums; before the first lies one that stays 0 */
    uint64_t *has;                   /* (words) which tiles have a sum */
    size_t words;                    /* 0 for a single tile */
    struct pieces pieces[2];         /* of a pixel, and of the next one */
    struct patch *patches;           /* (n_p) of an image */
    struct sight *down, *across;     /* (h, kh), (w, kw) by row and column of pixels, in the order of their places */
    int32_t *n_down, *n_across;      /* (h), (w) how many these are */
};

/* Which rows there are, and whose. */
struct rows {
    const float *input_errors;
    const uint32_t *tile_of; /* (count) */
    int64_t first, count;
    const uint8_t *mask;
};

/* left += right, where the left one may have no sum yet: 0 then. No branch, as nobody can foretell which. */
INLINE void join(const int vectors, eight (*of_tile)[CHUNK_VECTORS], int64_t left, const eight *right, uint64_t has_left)
{
    const eight *before = of_tile[((left + 1) & -(int64_t)(has_left & 1)) - 1];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++)
        of_tile[left][v] = before[v] + right[v];
}

/* Add the pieces up tile by tile, each sum from 0 on. */
INLINE void add_pieces(const int vectors, const int n, const struct pieces *pieces, int64_t first,
                       const struct room *room, const size_t words, uint64_t *has)
{
    for (size_t i = 0; i < pieces->count; i++) {
        const int64_t tile = pieces->piece[i].tile, word = words == 1 ? 0 : tile / WORD;
        const float *from = pieces->piece[i].input_errors + first;
        eight piece[CHUNK_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            piece[v] = load(from + v * EIGHT, n);
        join(vectors, room->of_tile, tile, piece, has[word] >> tile % WORD);
        has[word] |= (uint64_t)1 << tile % WORD;
    }
}

/* Add the sums of up to 64 tiles up into that of the first, pair by pair, then the pairs' sums, and so on. Those that
 * have none count as 0, which would change no bit, as no sum is ever -0. Returns whether there is one. */
INLINE uint64_t add_word(const int vectors, const struct room *room, const size_t word, uint64_t has)
{
    static const uint64_t right_ones[] = {0xAAAAAAAAAAAAAAAA, 0x4444444444444444, 0x1010101010101010,
                                          0x0100010001000100, 0x0001000000010000, 0x0000000100000000};
    const int64_t first = (int64_t)(word * WORD);
    for (int level = 0; has > 1; level++) {
        const uint64_t right = has & right_ones[level];
        for (uint64_t rest = right; rest; rest &= rest - 1) {
            const int tile = __builtin_ctzll(rest), left = tile - (1 << level);
            join(vectors, room->of_tile, first + left, room->of_tile[first + tile], has >> left);
        }
        has = (has & ~right) | right >> (1 << level);
    }
    return has;
}

INLINE uint64_t add_tiles(const int vectors, const int n, const struct pieces *pieces, const struct room *room,
                          int64_t first)
{
    if (room->words == 1) {
        uint64_t has = 0;
        add_pieces(vectors, n, pieces, first, room, 1, &has);
        return add_word(vectors, room, 0, has);
    }
    uint64_t *has = room->has;
    memset(has, 0, room->words * sizeof *has);
    add_pieces(vectors, n, pieces, first, room, room->words, has);
    for (size_t word = 0; word < room->words; word++)
        has[word] = add_word(vectors, room, word, has[word]);
    for (size_t step = 1; step < room->words; step *= 2)
        for (size_t left = 0; left + step < room->words; left += 2 * step)
            if (has[left + step]) {
                join(vectors, room->of_tile, (int64_t)(left * WORD), room->of_tile[(left + step) * WORD], has[left]);
                has[left] = 1;
            }
    return has[0];
}

/* Some channels of the sum of a pixel: each tile's pieces, and then the tiles' sums in a tree. */
INLINE void add_up(const struct pieces *pieces, const struct room *room, float *sum, int64_t first, const int vectors,
                   const int n)
{
    eight total[CHUNK_VECTORS] = {{0}};
    if (!room->words) {
        for (size_t i = 0; i < pieces->count; i++) {
            const float *from = pieces->piece[i].input_errors + first;
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                total[v] += load(from + v * EIGHT, n);
        }
    } else if (add_tiles(vectors, n, pieces, room, first))
        for (int v = 0; v < vectors; v++)
            total[v] = room->of_tile[0][v];
    for (int v = 0; v < vectors; v++)
        put(sum + first + v * EIGHT, total[v], n);
}

#define ADD_UP(first, vectors, n) add_up(now, room, sum, first, vectors, n)

/* List what the pixel at (y, x) of an image is made of, and fetch it. */
INLINE void list_pieces(const struct geometry *g, const size_t channels, const struct room *room, const uint8_t *mask,
                        int64_t y, int64_t x, struct pieces *pieces)
{
    const struct sight *down = room->down + y * g->kh, *across = room->across + x * g->kw;
    const struct sight *last_down = down + room->n_down[y], *last_across = across + room->n_across[x];
    struct patch *found = pieces->piece;
    for (; down < last_down; down++) {
        const struct patch *patches = room->patches + down->patch;
        for (const struct sight *next = across; next < last_across; next++) {
            const struct patch patch = patches[next->patch];
            if (!patch.input_errors ||
                (mask && !mask[(down->patch + next->patch) * g->kh * g->kw + down->place + next->place]))
                continue;
            const float *piece = patch.input_errors + down->floats + next->floats;
            for (size_t c = 0; c < channels; c += LINE / sizeof *piece)
                __builtin_prefetch(piece + c);
            *found++ = (struct patch){piece, patch.tile};
        }
    }
    pieces->count = (size_t)(found - pieces->piece);
}

/* The pieces of the next pixel are fetched while those of one are added up. */
INLINE void scatter(const struct geometry *g, const size_t channels, const struct rows *rows,
                    const int64_t *row_of_patch, size_t images, struct room *room, float *planes)
{
    const int64_t n_p = g->out_h * g->out_w;
    const size_t k = (size_t)(g->kh * g->kw) * channels;
    struct pieces *now = &room->pieces[0], *next = &room->pieces[1], *other;
    float *sum = NULL;
    for (size_t image = 0; image < images; image++, row_of_patch += n_p) {
        for (int64_t i = 0; i < n_p; i++) {
            const int64_t row = row_of_patch[i] - rows->first;
            const int theirs = row >= 0 && row < rows->count;
            room->patches[i] = theirs ? (struct patch){rows->input_errors + (size_t)row * k, rows->tile_of[row]}
                                      : (struct patch){NULL, 0};
        }
        for (int64_t y = 0; y < g->h; y++)
            for (int64_t x = 0; x < g->w; x++, planes += channels) {
                list_pieces(g, channels, room, rows->mask, y, x, next);
                if (sum)
                    FOR_CHANNELS((int64_t)channels, ADD_UP);
                sum = planes;
                other = now, now = next, next = other;
            }
    }
    if (sum)
        FOR_CHANNELS((int64_t)channels, ADD_UP);
}

/* Fill in for each pixel of a side who sees it, in the order of their places, and how many these are. */
static void look(int64_t side, int64_t kernel, int64_t stride, int64_t dilation, int64_t before, int64_t out,
                 struct sight step, struct sight *sights, int32_t *counts)
{
    for (int64_t pixel = 0; pixel < side; pixel++, sights += kernel) {
        int32_t count = 0;
        for (int32_t place = 0; place < kernel; place++) {
            const int64_t from = pixel + before - dilation * place; /* of the patch, times the stride */
            if (from >= 0 && from % stride == 0 && from / stride < out)
                sights[count++] = (struct sight){(int32_t)(from / stride) * step.patch, place * step.place,
                                                 place * step.floats};
        }
        counts[pixel] = count;
    }
}

/* How much room it takes, and where its parts are in memory that begins with a cache line; NULL: only how much. */
static size_t make_room(const struct geometry *g, size_t n_tiles, char *memory, struct room *room)
{
    const size_t words = n_tiles > 1 ? (n_tiles + WORD - 1) / WORD : 0, places = (size_t)(g->kh * g->kw);
    const size_t h = (size_t)g->h, w = (size_t)g->w, n_p = (size_t)(g->out_h * g->out_w);
    const size_t sizes[] = {(1 + words * WORD) * sizeof *room->of_tile,
                            words * sizeof *room->has,
                            places * sizeof(struct patch),
                            places * sizeof(struct patch),
                            n_p * sizeof(struct patch),
                            h * (size_t)g->kh * sizeof(struct sight),
                            w * (size_t)g->kw * sizeof(struct sight),
                            h * sizeof(int32_t),
                            w * sizeof(int32_t)};
    enum { PARTS = sizeof sizes / sizeof *sizes };
    size_t at[PARTS + 1] = {0};
    for (int i = 0; i < PARTS; i++)
        at[i + 1] = at[i] + (sizes[i] + LINE - 1) / LINE * LINE;
    if (memory) {
        memset(memory, 0, sizeof *room->of_tile);
        *room = (struct room){
            .of_tile = (eight(*)[CHUNK_VECTORS])memory + 1,
            .has = (uint64_t *)(memory + at[1]),
            .words = words,
            .pieces = {{(struct patch *)(memory + at[2]), 0}, {(struct patch *)(memory + at[3]), 0}},
            .patches = (struct patch *)(memory + at[4]),
            .down = (struct sight *)(memory + at[5]),
            .across = (struct sight *)(memory + at[6]),
            .n_down = (int32_t *)(memory + at[7]),
            .n_across = (int32_t *)(memory + at[8]),
        };
        const int32_t channels = (int32_t)g->channels, kw = (int32_t)g->kw;
        const struct sight line = {(int32_t)g->out_w, kw, kw * channels}, column = {1, 1, channels};
        look(g->h, g->kh, g->down, g->dilation_y, g->top, g->out_h, line, room->down, room->n_down);
        look(g->w, g->kw, g->across, g->dilation_x, g->left, g->out_w, column, room->across, room->n_across);
    }
    return at[PARTS] + 2 * LINE; /* so that no two threads write to neighbouring lines */
}

struct scattering_job {
    const struct geometry *g;
    struct rows rows;
    const int64_t *row_of_patch;
    size_t images, n_tiles, room;
    char *rooms; /* (threads, room) */
    float *planes;
};

static WIDE void scatter_some(void *what, size_t part, size_t parts)
{
    const struct scattering_job *job = what;
    const struct geometry *g = job->g;
    const size_t channels = (size_t)g->channels;
    const size_t first = begin_of(job->images, part, parts), last = begin_of(job->images, part + 1, parts);
    const int64_t *row_of_patch = job->row_of_patch + first * (size_t)(g->out_h * g->out_w);
    float *planes = job->planes + first * (size_t)(g->h * g->w) * channels;
    struct room room;
    make_room(g, job->n_tiles, job->rooms + part * job->room, &room);
    if (channels == CHUNK_VECTORS * EIGHT)
        scatter(g, CHUNK_VECTORS * EIGHT, &job->rows, row_of_patch, last - first, &room, planes);
    else
        scatter(g, channels, &job->rows, row_of_patch, last - first, &room, planes);
}

/* Add input errors (rows, kh · kw · channels), in tile order, up to those of planes (images, h, w, channels).
 *
 * row_of_patch: (images · n_p); a row that is none of theirs, such as `rows`, is left out. offsets: (n_tiles + 1) the
 * rows of each tile. Of each pixel, a tile's pieces are added in the order of (ky, kx), beginning with +0, and then the
 * tiles' sums in a tree: the bits do not depend on who adds which part of the tree. mask as in rapa_gather.
 * Returns 0, or 1 without memory. */
EXPORT int rapa_scatter(const struct geometry *g, const float *input_errors, const int64_t *row_of_patch,
                        const int64_t *offsets, size_t n_tiles, size_t images, const uint8_t *mask, float *planes)
{
    const size_t count = (size_t)(offsets[n_tiles] - offsets[0]), most = images < MOST_PARTS ? images : MOST_PARTS;
    const size_t room = make_room(g, n_tiles, NULL, NULL);
    char *rooms = aligned_alloc(LINE, (most + 1) * room);
    uint32_t *tile_of = malloc((count + 1) * sizeof *tile_of);
    const int whole = rooms && tile_of;
    if (whole) {
        for (size_t t = 0; t < n_tiles; t++)
            for (int64_t row = offsets[t]; row < offsets[t + 1]; row++)
                tile_of[row - offsets[0]] = (uint32_t)t;
        const struct rows rows = {input_errors, tile_of, offsets[0], (int64_t)count, mask};
        struct scattering_job job = {g, rows, row_of_patch, images, n_tiles, room, rooms, planes};
        in_parts(scatter_some, &job, most);
    }
    free(rooms), free(tile_of);
    return !whole;
}
