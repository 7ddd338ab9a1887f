/* ReLU, pooling over 3 × 3 windows with stride 2, and normalisation of channels-last planes: see rapa_dist/nn/stage.py,
 * pooling.py and normalisation.py.
 *
 * Only operations that round alike everywhere: the bits depend neither on the processor nor on the compiler. */

#include "parallel.h"
#include "tile.h"
#include "vectors.h"

#include <stdlib.h>

enum { SIDE = 3, STRIDE = 2 }; /* of a window */

struct stage {
    int64_t images, h, w, channels, pooled_h, pooled_w;
    int64_t average, relu_first;
    double alpha, beta; /* of the normalisation */
};

/* What a pass works on, of one image; ratio is smaller over scale. */
struct image {
    const float *plane;
    float *smaller, *ratio, *factor, *normalised;
    uint8_t *places;
    const float *errors;
    float *direct, *back;
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

/* What is largest in a window, and where, of eight channels; NaN counts as largest. Seldom called. */
static WIDE __attribute__((noinline)) eight find_nan(const float *corner, int64_t row, int64_t channels, int64_t last_y,
                                                     int64_t last_x, const int n, eight_ints *found)
{
    eight largest = load(corner, n);
    eight_ints places = {0};
    for (int32_t y = 0; y < last_y; y++)
        for (int32_t x = 0; x < last_x; x++) {
            const eight value = load(corner + y * row + x * channels, n);
            const eight_ints which = (value > largest) | (value != value);
            largest = either(which, value, largest);
            places = (eight_ints)either(which, (eight)((eight_ints){0} + (SIDE * y + x)), (eight)places);
        }
    *found = places;
    return largest;
}

/* Eight channels of a window's largest values, and the place, counted row by row, of the first that is the largest. */
INLINE void pool_max(const struct stage *s, const struct image *image, int64_t py, int64_t px, size_t first,
                     const int n, const int64_t last_y, const int64_t last_x)
{
    const int64_t at = (py * s->pooled_w + px) * s->channels + (int64_t)first;
    const float *corner = image->plane + (STRIDE * py * s->w + STRIDE * px) * s->channels + first;
    eight largest = load(corner, n), sum = largest;
    eight_ints places = {0};
    for (int32_t y = 0; y < last_y; y++)
        for (int32_t x = !y; x < last_x; x++) {
            const eight value = load(corner + (y * s->w + x) * s->channels, n);
            const eight_ints place = (eight_ints){0} + (SIDE * y + x);
            places = (eight_ints)either(value > largest, (eight)place, (eight)places);
            largest = larger_of(value, largest);
            sum += value;
        }
    if (some(sum != sum)) { /* so may one of the values be */
        eight_ints found;
        largest = find_nan(corner, s->w * s->channels, s->channels, last_y, last_x, n, &found);
        places = found;
    }
    const eight_bytes bytes = __builtin_convertvector(places, eight_bytes);
    put(image->smaller + at, relu(largest), n); /* before it, ReLU would change nothing */
    memcpy(image->places + at, &bytes, (size_t)n);
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

/* Sums over what lies around a pixel, itself included, row after row; beyond the edge there are zeros. */
struct sums {
    float *terms;      /* of a row, with a pixel of zeros at either end */
    float *rows[SIDE]; /* sums of three terms side by side: those of row y in rows[y % 3] */
    const float *zeros;
};

static size_t row_floats(const struct stage *s)
{
    return (size_t)(s->pooled_w * s->channels);
}

/* Floats that sums take, whole cache lines and one to spare. */
static size_t sums_floats(const struct stage *s)
{
    return ((4 * row_floats(s) + (row_floats(s) + 2 * (size_t)s->channels)) / 16 + 2) * 16;
}

/* Put sums where there are zeros. */
static struct sums sums_in(const struct stage *s, float *room)
{
    const size_t row = row_floats(s);
    return (struct sums){room + 4 * row, {room, room + row, room + 2 * row}, room + 3 * row};
}

#define FOR_FLOATS(count, call)                                                                                        \
    do {                                                                                                               \
        size_t i = 0;                                                                                                  \
        for (; i + EIGHT <= (count); i += EIGHT)                                                                       \
            call(i, EIGHT);                                                                                            \
        if (i < (count))                                                                                               \
            call(i, (int)((count)-i));                                                                                 \
    } while (0)

INLINE void add_three(const struct stage *s, const struct sums *sums, int64_t y, size_t i, const int n)
{
    const float *left = sums->terms + i, *middle = left + s->channels, *right = middle + s->channels;
    put(sums->rows[y % SIDE] + i, load(left, n) + load(middle, n) + load(right, n), n);
}

INLINE eight mean_around(const struct stage *s, const struct sums *sums, int64_t y, size_t i, const int n)
{
    const float *above = y ? sums->rows[(y - 1) % SIDE] : sums->zeros;
    const float *below = y + 1 < s->pooled_h ? sums->rows[(y + 1) % SIDE] : sums->zeros;
    return (load(above + i, n) + load(sums->rows[y % SIDE] + i, n) + load(below + i, n)) * (1.0f / (SIDE * SIDE));
}

INLINE void normalise(const struct stage *s, const struct image *image, const struct sums *sums, int64_t y, size_t i,
                      const int n)
{
    const size_t at = (size_t)y * row_floats(s) + i;
    const eight value = load(image->smaller + at, n), scale = 1 + (float)s->alpha * mean_around(s, sums, y, i, n);
    const eight inverse = 1 / root(scale), factor = root(inverse) * inverse; /* scale to the power of −0.75 */
    put(image->factor + at, factor, n);
    put(image->ratio + at, value * inverse * inverse, n);
    put(image->normalised + at, value * factor, n);
}

/* Back through the normalisation, and through ReLU where that follows the pooling. */
INLINE void denormalise(const struct stage *s, const struct image *image, const struct sums *sums, int64_t y, size_t i,
                        const int n, const int relu_first)
{
    const size_t at = (size_t)y * row_floats(s) + i;
    const eight value = load(image->smaller + at, n), mean = mean_around(s, sums, y, i, n);
    eight error = load(image->errors + at, n) * load(image->factor + at, n);
    error -= (float)(2 * s->alpha * s->beta) * (mean * value);
    put(image->direct + at, relu_first ? error : either(value <= 0, (eight){0}, error), n);
}

#define ADD_THREE(i, n) add_three(s, sums, y, i, n)
#define NORMALISE(i, n) normalise(s, image, sums, y, i, n)
#define DENORMALISE(i, n) denormalise(s, image, sums, y, i, n, relu_first)

INLINE void normalise_row(const struct stage *s, const struct image *image, const struct sums *sums, int64_t y)
{
    FOR_FLOATS(row_floats(s), NORMALISE);
}

INLINE void denormalise_row(const struct stage *s, const struct image *image, const struct sums *sums, int64_t y,
                            const int average, const int relu_first)
{
    FOR_FLOATS(row_floats(s), DENORMALISE);
    float *direct = image->direct + (size_t)y * row_floats(s);
    for (int64_t x = 0; average && x < s->pooled_w; x++, direct += s->channels) {
        const float count = (float)(least(SIDE, s->h - STRIDE * y) * least(SIDE, s->w - STRIDE * x));
        for (int64_t c = 0; c < s->channels; c++)
            direct[c] /= count;
    }
}

/* The errors of some channels of a window, and where its largest values were; 9 is nowhere, if there is no window. */
struct window {
    eight error;
    eight_ints place;
};

INLINE struct window window(const struct image *image, int64_t at, const int n, const int average, const int is_there)
{
    struct window found = {{0}, (eight_ints){0} + SIDE * SIDE};
    if (!is_there)
        return found;
    found.error = load(image->direct + at, n);
    if (!average) {
        eight_bytes bytes = {0};
        memcpy(&bytes, image->places + at, (size_t)n);
        found.place = __builtin_convertvector(bytes, eight_ints);
    }
    return found;
}

/* What a window gives to its pixel at a place. */
INLINE eight given(const struct window *window, const int32_t place, const int average)
{
    return average ? window->error : (eight)((window->place == place) & (eight_ints)window->error);
}

INLINE void put_error(const struct image *image, int64_t at, const eight error, const int n, const int relu_first)
{
    put(image->back + at, relu_first ? either(load(image->plane + at, n) <= 0, (eight){0}, error) : error, n);
}

/* Back through the pooling: some channels of the pixels in rows 2y and 2y + 1, of which the second may be missing. Two
 * by two pixels get theirs from the four windows around the upper left one, added up in their order:
 *
 *     a | b   b
 *     --+------
 *     c | d   d
 *
 *     c   d   d
 */
INLINE void unpool(const struct stage *s, const struct image *image, int64_t y, int64_t first, const int n,
                   const int average, const int relu_first)
{
    const int64_t row = s->w * s->channels, pooled_row = s->pooled_w * s->channels;
    const int above = y > 0, below = y < s->pooled_h, second_row = STRIDE * y + 1 < s->h;
    struct window a = window(image, 0, n, average, 0), c = a;
    int64_t at = STRIDE * y * row + first, of_window = y * pooled_row + first;
    for (int64_t x = 0; STRIDE * x < s->w; x++, at += STRIDE * s->channels, of_window += s->channels) {
        const int right = x < s->pooled_w, second = STRIDE * x + 1 < s->w;
        const struct window b = window(image, of_window - pooled_row, n, average, above && right);
        const struct window d = window(image, of_window, n, average, below && right);
        const eight sum = given(&a, 8, average) + given(&b, 6, average) + given(&c, 2, average) + given(&d, 0, average);
        put_error(image, at, sum, n, relu_first);
        if (second)
            put_error(image, at + s->channels, given(&b, 7, average) + given(&d, 1, average), n, relu_first);
        if (second_row)
            put_error(image, at + row, given(&c, 5, average) + given(&d, 3, average), n, relu_first);
        if (second && second_row)
            put_error(image, at + row + s->channels, given(&d, 4, average), n, relu_first);
        a = b, c = d;
    }
}

#define POOL_WHOLE(i, n) pool_max(s, image, y, x, i, n, SIDE, SIDE)
#define POOL_CUT(i, n) pool_max(s, image, y, x, i, n, least(SIDE, s->h - STRIDE * y), least(SIDE, s->w - STRIDE * x))
#define POOL_AVERAGE(first, vectors, n) pool_average(s, image, y, x, first, vectors, n, relu_first)
#define UNPOOL(i, n) unpool(s, image, y, (int64_t)(i), n, average, relu_first)

INLINE void forward(const struct stage *s, const struct image *image, const struct sums *sums, const int average,
                    const int relu_first)
{
    const size_t row = row_floats(s);
    for (int64_t y = 0; y < s->pooled_h; y++) {
        for (int64_t x = 0; x < s->pooled_w; x++)
            if (average)
                FOR_CHANNELS(s->channels, POOL_AVERAGE);
            else if (STRIDE * y + SIDE <= s->h && STRIDE * x + SIDE <= s->w)
                FOR_FLOATS((size_t)s->channels, POOL_WHOLE);
            else
                FOR_FLOATS((size_t)s->channels, POOL_CUT);
        const float *smaller = image->smaller + (size_t)y * row;
        for (size_t i = 0; i < row; i++)
            sums->terms[(size_t)s->channels + i] = smaller[i] * smaller[i];
        FOR_FLOATS(row, ADD_THREE);
        if (y)
            normalise_row(s, image, sums, y - 1);
    }
    normalise_row(s, image, sums, s->pooled_h - 1);
}

INLINE void backward(const struct stage *s, const struct image *image, const struct sums *sums, const int average,
                     const int relu_first)
{
    const size_t row = row_floats(s);
    for (int64_t y = 0; y < s->pooled_h; y++) {
        const size_t at = (size_t)y * row;
        const float *errors = image->errors + at, *factor = image->factor + at, *ratio = image->ratio + at;
        for (size_t i = 0; i < row; i++)
            sums->terms[(size_t)s->channels + i] = errors[i] * factor[i] * ratio[i];
        FOR_FLOATS(row, ADD_THREE);
        if (y)
            denormalise_row(s, image, sums, y - 1, average, relu_first);
    }
    denormalise_row(s, image, sums, s->pooled_h - 1, average, relu_first);
    for (int64_t y = 0; STRIDE * y < s->h; y++)
        FOR_FLOATS((size_t)s->channels, UNPOOL);
}

typedef void pass(const struct stage *s, const struct image *image, const struct sums *sums);

/* A pass for each kind of pooling. */
#define PASSES(name, average, relu_first)                                                                              \
    static WIDE void name##_forward(const struct stage *s, const struct image *image, const struct sums *sums)         \
    {                                                                                                                  \
        const struct stage sizes = *s; /* nothing else can change what is here */                                      \
        const struct image here = *image;                                                                              \
        const struct sums around = *sums;                                                                              \
        forward(&sizes, &here, &around, average, relu_first);                                                          \
    }                                                                                                                  \
    static WIDE void name##_backward(const struct stage *s, const struct image *image, const struct sums *sums)        \
    {                                                                                                                  \
        const struct stage sizes = *s; /* nothing else can change what is here */                                      \
        const struct image here = *image;                                                                              \
        const struct sums around = *sums;                                                                              \
        backward(&sizes, &here, &around, average, relu_first);                                                         \
    }
PASSES(max, 0, 0)
PASSES(average, 1, 0)
PASSES(relu_average, 1, 1)

static pass *const forward_passes[] = {max_forward, average_forward, relu_average_forward};
static pass *const backward_passes[] = {max_backward, average_backward, relu_average_backward};

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
    float *ratio, *factor, *normalised;
    const float *errors;
    float *back, *rooms;
    size_t room; /* floats of the room of a part */
};

static void some_images(const struct job *job, size_t part, size_t parts, pass *one)
{
    const struct stage *s = job->s;
    const size_t plane = (size_t)(s->h * s->w * s->channels), size = (size_t)s->pooled_h * row_floats(s);
    const size_t images = (size_t)s->images, last = begin_of(images, part + 1, parts);
    float *room = job->rooms + part * job->room;
    const struct sums sums = sums_in(s, room);
    for (size_t i = begin_of(images, part, parts); i < last; i++) {
        const struct image image = {
            .plane = job->planes + i * plane,
            .smaller = job->smaller + i * size,
            .ratio = job->ratio + i * size,
            .factor = job->factor + i * size,
            .normalised = job->normalised ? job->normalised + i * size : NULL,
            .places = s->average ? NULL : job->places + i * size,
            .errors = job->errors ? job->errors + i * size : NULL,
            .direct = room + sums_floats(s),
            .back = job->back ? job->back + i * plane : NULL,
        };
        one(s, &image, &sums);
    }
}

static void some_forward(void *what, size_t part, size_t parts)
{
    const struct job *job = what;
    some_images(job, part, parts, forward_passes[kind_of(job->s)]);
}

static void some_backward(void *what, size_t part, size_t parts)
{
    const struct job *job = what;
    some_images(job, part, parts, backward_passes[kind_of(job->s)]);
}

static int work(some_work *some, struct job *job, size_t room)
{
    const size_t most = job->s->images < MOST_PARTS ? (size_t)job->s->images : MOST_PARTS;
    job->room = room;
    job->rooms = calloc(most * room, sizeof *job->rooms);
    if (!job->rooms)
        return 1;
    in_parts(some, job, most);
    free(job->rooms);
    return 0;
}

/* planes (images, h, w, channels). All others are overwritten, each (images, pooled_h, pooled_w, channels): the smaller
 * planes, where the largest values were (not where averages are taken), what the normalisation makes of them: over
 * scale, and its factor, and the result. Returns 0, or 1 without memory. */
EXPORT int rapa_stage_forward(const struct stage *s, const float *planes, float *smaller, uint8_t *places, float *ratio,
                              float *factor, float *normalised)
{
    struct job job = {.s = s, .planes = planes, .smaller = smaller, .places = places, .ratio = ratio,
                      .factor = factor, .normalised = normalised};
    return work(some_forward, &job, sums_floats(s));
}

/* The errors of the planes, back, from those of the result, and what the forward pass left.
 * Returns 0, or 1 without memory. */
EXPORT int rapa_stage_backward(const struct stage *s, const float *planes, float *smaller, uint8_t *places, float *ratio,
                               float *factor, const float *errors, float *back)
{
    struct job job = {.s = s, .planes = planes, .smaller = smaller, .places = places, .ratio = ratio,
                      .factor = factor, .errors = errors, .back = back};
    return work(some_backward, &job, sums_floats(s) + ((size_t)s->pooled_h * row_floats(s) / 16 + 2) * 16);
}
