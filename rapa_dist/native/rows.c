/* Rows in another order. */

#include "parallel.h"
#include "tile.h"
#include "vectors.h"

enum { AHEAD = 12, LINE_FLOATS = 16 }; /* rows that are fetched ahead; floats of a cache line */

struct picking {
    const float *rows;
    size_t n_rows, width;
    const int64_t *which;
    size_t count;
    float *picked;
};

/* A row of `width` floats to where it goes; `width` is known where that is worth it. */
INLINE void pick_row(const float *from, float *to, const size_t width)
{
    size_t i = 0;
    for (; i + EIGHT <= width; i += EIGHT)
        put(to + i, load(from + i, EIGHT), EIGHT);
    if (i < width)
        put(to + i, load(from + i, (int)(width - i)), (int)(width - i));
}

INLINE void pick_some(const struct picking *job, size_t first, size_t last, const size_t width)
{
    float *to = job->picked + first * width;
    for (size_t i = first; i < last; i++, to += width) {
        if (i + AHEAD < last && (size_t)job->which[i + AHEAD] < job->n_rows) {
            const float *next = job->rows + (size_t)job->which[i + AHEAD] * width;
            for (size_t at = 0; at < width; at += LINE_FLOATS)
                __builtin_prefetch(next + at);
        }
        const size_t row = (size_t)job->which[i];
        if (row < job->n_rows)
            pick_row(job->rows + row * width, to, width);
        else
            memset(to, 0, width * sizeof *to);
    }
}

static WIDE void pick(void *what, size_t part, size_t parts)
{
    const struct picking *job = what;
    const size_t first = begin_of(job->count, part, parts), last = begin_of(job->count, part + 1, parts);
    if (job->width == 32)
        pick_some(job, first, last, 32);
    else if (job->width == 64)
        pick_some(job, first, last, 64);
    else
        pick_some(job, first, last, job->width);
}

/* picked[i] = rows[which[i]], or zeros where there is no such row. rows (n_rows, width), picked (count, width). */
EXPORT void rapa_pick_rows(const float *rows, size_t n_rows, size_t width, const int64_t *which, size_t count,
                           float *picked)
{
    struct picking job = {rows, n_rows, width, which, count, picked};
    in_parts(pick, &job, count / 1024); /* few rows are not worth to wake somebody */
}
