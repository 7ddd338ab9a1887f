/* im2col and col2im in tile order: see rapa_dist/fabric/im2col.py. */

#include "parallel.h"
#include "tile.h"
#include "vectors.h"

#include <stdlib.h>

/* One convolution on channels-last planes (images, h, w, channels), as class Geometry has it. */
struct geometry {
    int64_t h, w, kh, kw, down, across, top, left, dilation_y, dilation_x, out_h, out_w, channels;
};

static inline void copy(float *to, const float *from, size_t floats)
{
    if (floats < 8) {
        for (size_t i = 0; i < floats; i++)
            to[i] = from[i];
        return;
    }
    for (size_t i = 0; i + 8 < floats; i += 8)
        memcpy(to + i, from + i, 32);
    memcpy(to + floats - 8, from + floats - 8, 32); /* the last ones, some of them twice */
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

static inline void zero(float *to, size_t floats)
{
    for (size_t i = 0; i < floats; i++)
        to[i] = 0;
}

/* What a row of the kernel sees at (y, x0) …: pixels beyond the plane are zero. */
static inline void copy_run(const struct geometry *g, const float *plane, int64_t y, int64_t x0, float *to)
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

static void gather(void *what, size_t part, size_t parts)
{
    const struct gathering *job = what;
    const struct geometry *g = job->g;
    const size_t channels = (size_t)g->channels, run = (size_t)g->kw * channels;
    const size_t plane = (size_t)(g->h * g->w) * channels, places = (size_t)(g->kh * g->kw);
    const uint32_t n_patches = (uint32_t)(g->out_h * g->out_w);
    const struct divisor per_image = {n_patches, 1.0 / n_patches}, per_line = {(uint32_t)g->out_w, 1.0 / (double)g->out_w};
    const size_t first = begin_of(job->rows, part, parts), last = begin_of(job->rows, part + 1, parts);
    float *patches = job->patches + first * places * channels;
    for (size_t r = first; r < last; r++, patches += places * channels) {
        uint32_t pixel, x;
        const uint32_t image = divide((uint32_t)job->order[r], per_image, &pixel), y = divide(pixel, per_line, &x);
        const int64_t y0 = y * g->down - g->top, x0 = x * g->across - g->left;
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

/* The patch, counted across or down, that sees a pixel through place k of the kernel; -1 if none does. */
static inline int64_t seen_from(int64_t at, int64_t before, int64_t step, int64_t dilation, int64_t k, int64_t count)
{
    const int64_t from = at + before - dilation * k;
    if (from < 0)
        return -1;
    if (step == 1)
        return from < count ? from : -1;
    return from % step == 0 && from / step < count ? from / step : -1;
}

/* What a pixel's sum is made of, in the order of (ky, kx). */
struct pieces {
    size_t count;
    const float **from; /* (places) where a piece lies */
    uint32_t *tile;     /* (places) whose it is */
};

/* Which rows there are, and whose. */
struct rows {
    const float *input_errors;
    const uint32_t *tile_of; /* (count) */
    int64_t first, count;
    const uint8_t *mask;
};

/* List what the pixel at (y, x) of an image is made of, and fetch it. */
INLINE void list_pieces(const struct geometry *g, const struct rows *rows, const int64_t *row_of_patch, int64_t y,
                        int64_t x, struct pieces *p)
{
    const size_t channels = (size_t)g->channels, places = (size_t)(g->kh * g->kw), k = places * channels;
    p->count = 0;
    for (int64_t ky = 0; ky < g->kh; ky++) {
        const int64_t py = seen_from(y, g->top, g->down, g->dilation_y, ky, g->out_h);
        for (int64_t kx = 0; py >= 0 && kx < g->kw; kx++) {
            const int64_t px = seen_from(x, g->left, g->across, g->dilation_x, kx, g->out_w);
            if (px < 0)
                continue;
            const size_t pixel = (size_t)(py * g->out_w + px), place = (size_t)(ky * g->kw + kx);
            const int64_t row = row_of_patch[pixel] - rows->first;
            if (row < 0 || row >= rows->count || (rows->mask && !rows->mask[pixel * places + place]))
                continue;
            const float *piece = rows->input_errors + (size_t)row * k + place * channels;
            for (size_t c = 0; c < channels; c += 16)
                __builtin_prefetch(piece + c);
            p->from[p->count] = piece;
            p->tile[p->count++] = rows->tile_of[row];
        }
    }
}

INLINE void add_pieces_of_one(const struct pieces *p, float *sum, int64_t first, const int vectors, const int n)
{
    eight sums[CHUNK_VECTORS] = {{0}};
    for (size_t i = 0; i < p->count; i++) {
        const float *piece = p->from[i] + first;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            sums[v] += load(piece + v * EIGHT, n);
    }
    for (int v = 0; v < vectors; v++)
        put(sum + first + v * EIGHT, sums[v], n);
}

INLINE void add_to(float *sum, const float *other, int64_t first, const int vectors, const int n)
{
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
        float *at = sum + first + v * EIGHT;
        put(at, load(at, n) + load(other + first + v * EIGHT, n), n);
    }
}

#define ADD_PIECES(first, vectors, n) add_pieces_of_one(p, sums, first, vectors, n)
#define ADD_PIECE(first, vectors, n) add_to(sums + p->tile[i] * channels, p->from[i], first, vectors, n)
#define ADD_PAIR(first, vectors, n) add_to(sums + i * channels, sums + (i + stride) * channels, first, vectors, n)

/* The sum of a pixel, into the first of sums (n_tiles, channels): each tile's pieces, and then the tiles' sums pair by
 * pair, the pairs' sums pair by pair, and so on. */
INLINE void add_up(const struct pieces *p, size_t n_tiles, size_t channels, float *sums)
{
    if (n_tiles == 1) {
        FOR_CHANNELS((int64_t)channels, ADD_PIECES);
        return;
    }
    memset(sums, 0, n_tiles * channels * sizeof *sums);
    for (size_t i = 0; i < p->count; i++)
        FOR_CHANNELS((int64_t)channels, ADD_PIECE);
    for (size_t stride = 1; stride < n_tiles; stride *= 2)
        for (size_t i = 0; i + stride < n_tiles; i += 2 * stride)
            FOR_CHANNELS((int64_t)channels, ADD_PAIR);
}

/* `pieces`: of two pixels, as those of the next one are fetched while one is added up. */
INLINE void scatter(const struct geometry *g, const struct rows *rows, const int64_t *row_of_patch, size_t images,
                    size_t n_tiles, struct pieces pieces[2], float *sums, float *planes)
{
    const int64_t n_patches = g->out_h * g->out_w, n_pixels = g->h * g->w, total = (int64_t)images * n_pixels;
    const size_t channels = (size_t)g->channels;
    int64_t y = 0, x = 0;
    for (int64_t i = 0; i <= total; i++) {
        if (i < total)
            list_pieces(g, rows, row_of_patch, y, x, &pieces[i % 2]);
        if (i > 0) {
            add_up(&pieces[(i - 1) % 2], n_tiles, channels, sums);
            memcpy(planes, sums, channels * sizeof *sums);
            planes += channels;
        }
        if (++x == g->w) {
            x = 0;
            if (++y == g->h)
                y = 0, row_of_patch += n_patches;
        }
    }
}

typedef void scattering(const struct geometry *g, const struct rows *rows, const int64_t *row_of_patch, size_t images,
                        size_t n_tiles, struct pieces pieces[2], float *sums, float *planes);

static WIDE void wide_scatter(const struct geometry *g, const struct rows *rows, const int64_t *row_of_patch,
                              size_t images, size_t n_tiles, struct pieces pieces[2], float *sums, float *planes)
{
    scatter(g, rows, row_of_patch, images, n_tiles, pieces, sums, planes);
}

static void plain_scatter(const struct geometry *g, const struct rows *rows, const int64_t *row_of_patch, size_t images,
                          size_t n_tiles, struct pieces pieces[2], float *sums, float *planes)
{
    scatter(g, rows, row_of_patch, images, n_tiles, pieces, sums, planes);
}

struct scattering_job {
    const struct geometry *g;
    struct rows rows;
    const int64_t *row_of_patch;
    size_t images, n_tiles, room;
    char *rooms; /* (threads, room) */
    float *planes;
};

/* Bytes in whole cache lines, with one to spare, so that no two threads write to the same. */
static size_t lines(size_t bytes)
{
    return (bytes / 128 + 2) * 128;
}

static void scatter_some(void *what, size_t part, size_t parts)
{
    const struct scattering_job *job = what;
    const struct geometry *g = job->g;
    const size_t places = (size_t)(g->kh * g->kw), channels = (size_t)g->channels;
    const size_t first = begin_of(job->images, part, parts), last = begin_of(job->images, part + 1, parts);
    char *room = job->rooms + part * job->room;
    const float **from = (const float **)room;
    float *sums = (float *)(room + lines(2 * places * sizeof *from));
    uint32_t *tile = (uint32_t *)((char *)sums + lines(job->n_tiles * channels * sizeof *sums));
    struct pieces pieces[2] = {{0, from, tile}, {0, from + places, tile + places}};
    scattering *run = IS_WIDE ? wide_scatter : plain_scatter;
    run(g, &job->rows, job->row_of_patch + first * (size_t)(g->out_h * g->out_w), last - first, job->n_tiles, pieces,
        sums, job->planes + first * (size_t)(g->h * g->w) * channels);
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
    const size_t channels = (size_t)g->channels, places = (size_t)(g->kh * g->kw);
    const size_t count = (size_t)(offsets[n_tiles] - offsets[0]), most = images < MOST_PARTS ? images : MOST_PARTS;
    const size_t room = lines(2 * places * sizeof(float *)) + lines(n_tiles * channels * sizeof(float)) +
                        lines(2 * places * sizeof(uint32_t));
    char *rooms = malloc(most * room);
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
