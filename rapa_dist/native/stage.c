/* ReLU, pooling over 3 × 3 windows with stride 2, and normalisation of channels-last planes: see rapa_dist/nn/stage.py,
 * pooling.py and normalisation.py.
 *
 * Only operations that round alike everywhere: the bits depend neither on the processor nor on the compiler. */

#include "parallel.h"
#include "tile.h"
#include "vectors.h"

#include <math.h>
#include <stdlib.h>

enum { SIDE = 3, STRIDE = 2 }; /* of a window */

struct stage {
    int64_t images, h, w, channels, pooled_h, pooled_w;
    int64_t average, relu_first;
    double alpha, beta; /* of the normalisation */
};

/* What a pass works on, of one image. */
struct image {
    const float *plane;
    float *smaller, *scale, *factor, *normalised;
    uint8_t *places;
    const float *errors;
    float *direct, *ratio, *back;
};

typedef uint8_t eight_bytes __attribute__((vector_size(8)));

INLINE int64_t least(int64_t one, int64_t other)
{
    return one < other ? one : other;
}

INLINE eight relu(const eight values)
{
    return either(values < 0, (eight){0}, values);
}

INLINE eight root(const eight values)
{
    eight found = {0};
    for (int i = 0; i < EIGHT; i++)
        found[i] = sqrtf(values[i]);
    return found;
}

/* Some channels of a window's largest values, and the place, counted row by row, of the first that is the largest; NaN
 * counts as largest. */
INLINE void pool_max(const struct stage *s, const struct image *image, int64_t py, int64_t px, int64_t first,
                     const int vectors, const int n)
{
    const int64_t corner = (STRIDE * py * s->w + STRIDE * px) * s->channels + first;
    const int64_t at = (py * s->pooled_w + px) * s->channels + first;
    const int64_t last_y = least(SIDE, s->h - STRIDE * py), last_x = least(SIDE, s->w - STRIDE * px);
    eight largest[CHUNK_VECTORS];
    eight_ints places[CHUNK_VECTORS];
    for (int v = 0; v < vectors; v++)
        largest[v] = load(image->plane + corner + v * EIGHT, n), places[v] = (eight_ints){0};
    for (int64_t y = 0; y < last_y; y++)
        for (int64_t x = 0; x < last_x; x++) {
            const float *values = image->plane + corner + (y * s->w + x) * s->channels;
            const eight_ints place = (eight_ints){0} + (int32_t)(SIDE * y + x);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                const eight value = load(values + v * EIGHT, n);
                const eight_ints larger = (value > largest[v]) | (value != value);
                largest[v] = either(larger, value, largest[v]);
                places[v] = (larger & place) | (~larger & places[v]);
            }
        }
    for (int v = 0; v < vectors; v++) {
        const eight_bytes bytes = __builtin_convertvector(places[v], eight_bytes);
        put(image->smaller + at + v * EIGHT, relu(largest[v]), n); /* before it, ReLU would change nothing */
        memcpy(image->places + at + v * EIGHT, &bytes, (size_t)n);
    }
}

INLINE void pool_average(const struct stage *s, const struct image *image, int64_t py, int64_t px, int64_t first,
                         const int vectors, const int n, const int relu_first)
{
    const int64_t corner = (STRIDE * py * s->w + STRIDE * px) * s->channels + first;
    const int64_t at = (py * s->pooled_w + px) * s->channels + first;
    const int64_t last_y = least(SIDE, s->h - STRIDE * py), last_x = least(SIDE, s->w - STRIDE * px);
    eight sums[CHUNK_VECTORS] = {{0}};
    for (int64_t y = 0; y < last_y; y++)
        for (int64_t x = 0; x < last_x; x++) {
            const float *values = image->plane + corner + (y * s->w + x) * s->channels;
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                const eight value = load(values + v * EIGHT, n);
                sums[v] += relu_first ? relu(value) : value;
            }
        }
    for (int v = 0; v < vectors; v++) {
        const eight mean = sums[v] / (float)(last_y * last_x);
        put(image->smaller + at + v * EIGHT, relu_first ? mean : relu(mean), n);
    }
}

/* Some channels of the mean of what lies around a pixel, itself included; beyond the edge there are zeros. */
INLINE void mean_around(const struct stage *s, const float *plane, int square, int64_t y, int64_t x, int64_t first,
                        const int vectors, const int n, eight *mean)
{
    for (int v = 0; v < vectors; v++)
        mean[v] = (eight){0};
    for (int64_t b = y > 0 ? y - 1 : 0; b < least(y + 2, s->pooled_h); b++)
        for (int64_t a = x > 0 ? x - 1 : 0; a < least(x + 2, s->pooled_w); a++) {
            const float *values = plane + (b * s->pooled_w + a) * s->channels + first;
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                const eight value = load(values + v * EIGHT, n);
                mean[v] += square ? value * value : value;
            }
        }
    for (int v = 0; v < vectors; v++)
        mean[v] /= SIDE * SIDE;
}

INLINE void normalise(const struct stage *s, const struct image *image, int64_t y, int64_t x, int64_t first,
                      const int vectors, const int n)
{
    const int64_t at = (y * s->pooled_w + x) * s->channels + first;
    eight mean[CHUNK_VECTORS];
    mean_around(s, image->smaller, 1, y, x, first, vectors, n, mean);
    for (int v = 0; v < vectors; v++) {
        const eight scale = 1 + (float)s->alpha * mean[v], inverse = 1 / root(scale);
        const eight factor = root(inverse) * inverse; /* scale to the power of −0.75 */
        put(image->scale + at + v * EIGHT, scale, n);
        put(image->factor + at + v * EIGHT, factor, n);
        put(image->normalised + at + v * EIGHT, load(image->smaller + at + v * EIGHT, n) * factor, n);
    }
}

/* Back through the normalisation, and through ReLU where that follows the pooling. */
INLINE void denormalise(const struct stage *s, const struct image *image, int64_t y, int64_t x, int64_t first,
                        const int vectors, const int n, const int average, const int relu_first)
{
    const int64_t at = (y * s->pooled_w + x) * s->channels + first;
    const float share = (float)(2 * s->alpha * s->beta);
    const float count = (float)(least(SIDE, s->h - STRIDE * y) * least(SIDE, s->w - STRIDE * x));
    eight mean[CHUNK_VECTORS];
    mean_around(s, image->ratio, 0, y, x, first, vectors, n, mean);
    for (int v = 0; v < vectors; v++) {
        const eight value = load(image->smaller + at + v * EIGHT, n);
        eight error = load(image->errors + at + v * EIGHT, n) * load(image->factor + at + v * EIGHT, n);
        error -= share * (mean[v] * value);
        if (!relu_first)
            error = either(value <= 0, (eight){0}, error);
        put(image->direct + at + v * EIGHT, average ? error / count : error, n);
    }
}

/* Back through the pooling: what a pixel gets from the windows that it is in, row by row. */
INLINE void unpool(const struct stage *s, const struct image *image, int64_t y, int64_t x, int64_t first,
                   const int vectors, const int n, const int average, const int relu_first)
{
    const int64_t at = (y * s->w + x) * s->channels + first;
    eight sums[CHUNK_VECTORS] = {{0}};
    for (int64_t py = y < SIDE ? 0 : (y - SIDE + STRIDE) / STRIDE; py < least(y / STRIDE + 1, s->pooled_h); py++)
        for (int64_t px = x < SIDE ? 0 : (x - SIDE + STRIDE) / STRIDE; px < least(x / STRIDE + 1, s->pooled_w); px++) {
            const int64_t window = (py * s->pooled_w + px) * s->channels + first;
            const eight_ints place = (eight_ints){0} + (int32_t)(SIDE * (y - STRIDE * py) + x - STRIDE * px);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                const eight error = load(image->direct + window + v * EIGHT, n);
                if (average) {
                    sums[v] += error;
                    continue;
                }
                eight_bytes bytes = {0};
                memcpy(&bytes, image->places + window + v * EIGHT, (size_t)n);
                const eight_ints mine = __builtin_convertvector(bytes, eight_ints) == place;
                sums[v] += (eight)(mine & (eight_ints)error);
            }
        }
    for (int v = 0; v < vectors; v++) {
        const eight hidden = relu_first ? load(image->plane + at + v * EIGHT, n) : (eight){0} + 1;
        put(image->back + at + v * EIGHT, either(hidden <= 0, (eight){0}, sums[v]), n);
    }
}

#define POOL_MAX(first, vectors, n) pool_max(s, image, y, x, first, vectors, n)
#define POOL_AVERAGE(first, vectors, n) pool_average(s, image, y, x, first, vectors, n, relu_first)
#define NORMALISE(first, vectors, n) normalise(s, image, y, x, first, vectors, n)
#define DENORMALISE(first, vectors, n) denormalise(s, image, y, x, first, vectors, n, average, relu_first)
#define UNPOOL(first, vectors, n) unpool(s, image, y, x, first, vectors, n, average, relu_first)

INLINE void forward(const struct stage *s, const struct image *image, const int average, const int relu_first)
{
    for (int64_t y = 0; y < s->pooled_h; y++)
        for (int64_t x = 0; x < s->pooled_w; x++)
            if (average)
                FOR_CHANNELS(s->channels, POOL_AVERAGE);
            else
                FOR_CHANNELS(s->channels, POOL_MAX);
    for (int64_t y = 0; y < s->pooled_h; y++)
        for (int64_t x = 0; x < s->pooled_w; x++)
            FOR_CHANNELS(s->channels, NORMALISE);
}

INLINE void backward(const struct stage *s, const struct image *image, const int average, const int relu_first)
{
    const float *errors = image->errors, *factor = image->factor, *smaller = image->smaller, *scale = image->scale;
    float *ratio = image->ratio;
    for (int64_t i = 0; i < s->pooled_h * s->pooled_w * s->channels; i++)
        ratio[i] = errors[i] * factor[i] * smaller[i] / scale[i];
    for (int64_t y = 0; y < s->pooled_h; y++)
        for (int64_t x = 0; x < s->pooled_w; x++)
            FOR_CHANNELS(s->channels, DENORMALISE);
    for (int64_t y = 0; y < s->h; y++)
        for (int64_t x = 0; x < s->w; x++)
            FOR_CHANNELS(s->channels, UNPOOL);
}

typedef void pass(const struct stage *s, const struct image *image);

/* A pass for each kind of pooling, with the widest vectors and with those that every processor has. */
#define PASSES(name, attribute, average, relu_first)                                                                   \
    static attribute void name##_forward(const struct stage *s, const struct image *image)                             \
    {                                                                                                                  \
        forward(s, image, average, relu_first);                                                                        \
    }                                                                                                                  \
    static attribute void name##_backward(const struct stage *s, const struct image *image)                            \
    {                                                                                                                  \
        backward(s, image, average, relu_first);                                                                       \
    }
PASSES(max, , 0, 0)
PASSES(average, , 1, 0)
PASSES(relu_average, , 1, 1)
PASSES(wide_max, WIDE, 0, 0)
PASSES(wide_average, WIDE, 1, 0)
PASSES(wide_relu_average, WIDE, 1, 1)

static pass *const forward_passes[2][3] = {{max_forward, average_forward, relu_average_forward},
                                           {wide_max_forward, wide_average_forward, wide_relu_average_forward}};
static pass *const backward_passes[2][3] = {{max_backward, average_backward, relu_average_backward},
                                            {wide_max_backward, wide_average_backward, wide_relu_average_backward}};

/* Before a maximum ReLU is the same as behind it. */
static size_t kind_of(const struct stage *s)
{
    return s->average ? s->relu_first ? 2 : 1 : 0;
}

/* What the passes take: each as rapa_stage_forward and rapa_stage_backward have it. */
struct job {
    const struct stage *s;
    const float *planes;
    float *smaller;
    uint8_t *places;
    float *scale, *factor, *normalised;
    const float *errors;
    float *room, *back;
};

static void some_forward(void *what, size_t part, size_t parts)
{
    const struct job *job = what;
    const struct stage *s = job->s;
    const size_t plane = (size_t)(s->h * s->w * s->channels), size = (size_t)(s->pooled_h * s->pooled_w * s->channels);
    const size_t images = (size_t)s->images, last = begin_of(images, part + 1, parts);
    pass *one = forward_passes[IS_WIDE != 0][kind_of(s)];
    for (size_t i = begin_of(images, part, parts); i < last; i++) {
        const struct image image = {
            .plane = job->planes + i * plane,
            .smaller = job->smaller + i * size,
            .scale = job->scale + i * size,
            .factor = job->factor + i * size,
            .normalised = job->normalised + i * size,
            .places = s->average ? NULL : job->places + i * size,
        };
        one(s, &image);
    }
}

static void some_backward(void *what, size_t part, size_t parts)
{
    const struct job *job = what;
    const struct stage *s = job->s;
    const size_t plane = (size_t)(s->h * s->w * s->channels), size = (size_t)(s->pooled_h * s->pooled_w * s->channels);
    const size_t images = (size_t)s->images, last = begin_of(images, part + 1, parts);
    float *room = job->room + 2 * part * size;
    pass *one = backward_passes[IS_WIDE != 0][kind_of(s)];
    for (size_t i = begin_of(images, part, parts); i < last; i++) {
        const struct image image = {
            .plane = job->planes + i * plane,
            .smaller = job->smaller + i * size,
            .scale = job->scale + i * size,
            .factor = job->factor + i * size,
            .places = s->average ? NULL : job->places + i * size,
            .errors = job->errors + i * size,
            .direct = room,
            .ratio = room + size,
            .back = job->back + i * plane,
        };
        one(s, &image);
    }
}

/* planes (images, h, w, channels). All others are overwritten, each (images, pooled_h, pooled_w, channels): the smaller
 * planes, where the largest values were (not where averages are taken), scale and factor of the normalisation, and the
 * result. */
EXPORT void rapa_stage_forward(const struct stage *s, const float *planes, float *smaller, uint8_t *places, float *scale,
                               float *factor, float *normalised)
{
    struct job job = {s, planes, smaller, places, scale, factor, normalised, NULL, NULL, NULL};
    in_parts(some_forward, &job, (size_t)s->images);
}

/* The errors of the planes, back, from those of the result, and what the forward pass left.
 * Returns 0, or 1 without memory. */
EXPORT int rapa_stage_backward(const struct stage *s, const float *planes, float *smaller, uint8_t *places, float *scale,
                               float *factor, const float *errors, float *back)
{
    const size_t most = s->images < MOST_PARTS ? (size_t)s->images : MOST_PARTS;
    float *room = malloc(most * 2 * (size_t)(s->pooled_h * s->pooled_w * s->channels) * sizeof *room);
    if (!room)
        return 1;
    struct job job = {s, planes, smaller, places, scale, factor, NULL, errors, room, back};
    in_parts(some_backward, &job, most);
    free(room);
    return 0;
}
