/* Products of vectors with a matrix on an array with converters and noise: see rapa_dist/physics/periphery.py. */

#include "periphery.h"

#include "draws.h"

#include <math.h>

enum { BLOCK = 32 }; /* rows at a time */

INLINE eight nearest(const eight values)
{
#if defined(__x86_64__)
    return (eight)_mm256_round_ps((__m256)values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    union halves both = {values};
    both.half[0] = vrndnq_f32(both.half[0]), both.half[1] = vrndnq_f32(both.half[1]);
    return both.all;
#endif
}

INLINE eight within(const eight values, float bound)
{
    const eight above = either(values > bound, (eight){0} + bound, values);
    return either(above < -bound, (eight){0} - bound, above);
}

/* Values rounded to a step, half to even, or at random. */
INLINE eight rounded(const eight values, float step, const eight *uniform)
{
    eight steps = values / step;
    if (uniform)
        steps += *uniform - 0.5f;
    return nearest(steps) * step;
}

static WIDE float scale_of(const struct io *io, const float *vector, const struct array *array)
{
    if (io->management == NONE || io->management == CONSTANT)
        return io->management == CONSTANT && io->nm_thres > 0 ? io->nm_thres : 1;
    const size_t n = array->n - array->ones;
    float largest = io->management == ABS_MAX ? 0 : -INFINITY;
    for (size_t i = 0; i < n; i++) {
        const float value = io->management == ABS_MAX ? fabsf(vector[i]) : vector[i];
        largest = value > largest ? value : largest;
    }
    if (array->ones && largest < 1)
        largest = 1;
    return io->nm_thres > 0 && largest > io->nm_thres ? io->nm_thres : largest;
}

/* What the array is given of a vector. `to` has room for whole groups. */
static WIDE void convert(const struct io *io, const struct array *array, const float *vector, float scale,
                         struct place place, uint32_t kind, float *to)
{
    const size_t n = array->n, from_vector = n - array->ones;
    struct place of_rounding = place, of_noise = place;
    of_rounding.kind |= (kind + INPUT_ROUNDING) << KIND_BIT, of_noise.kind |= (kind + INPUT_NOISE) << KIND_BIT;
    for (size_t first = 0; first < n; first += GROUP) {
        eight uniform[4] = {{0}}, noise[4] = {{0}};
        if (io->inp_sto_round)
            uniform_group(&of_rounding, first / GROUP, uniform);
        if (io->inp_noise > 0)
            normal_group(&of_noise, first / GROUP, noise);
        for (size_t v = 0; v < 4 && first + v * EIGHT < n; v++) {
            const size_t at = first + v * EIGHT;
            eight values;
            if (at + EIGHT <= from_vector)
                values = load(vector + at, EIGHT);
            else {
                values = load(vector + at, at < from_vector ? (int)(from_vector - at) : 0);
                if (array->ones && n - 1 - at < EIGHT)
                    values[n - 1 - at] = 1;
            }
            values *= scale;
            if (io->inp_step > 0)
                values = rounded(values, io->inp_step, io->inp_sto_round ? &uniform[v] : NULL);
            if (io->inp_bound > 0)
                values = within(values, io->inp_bound);
            if (io->inp_noise > 0)
                values += io->inp_noise * noise[v];
            put(to + at, values, EIGHT);
        }
    }
}

/* What the converters make of an output row, and whether one of it was above the bound. */
static WIDE int finish(const struct io *io, size_t m, const float *weight_noise, struct place place, uint32_t kind,
                       float back, float *row)
{
    struct place of_weights = place, of_noise = place, of_rounding = place;
    of_weights.kind |= (kind + WEIGHT_NOISE) << KIND_BIT;
    of_noise.kind |= (kind + OUTPUT_NOISE) << KIND_BIT, of_rounding.kind |= (kind + OUTPUT_ROUNDING) << KIND_BIT;
    eight_ints above = {0};
    for (size_t first = 0; first < m; first += GROUP) {
        eight read[4] = {{0}}, noise[4] = {{0}}, uniform[4] = {{0}};
        if (weight_noise)
            normal_group(&of_weights, first / GROUP, read);
        if (io->out_noise > 0)
            normal_group(&of_noise, first / GROUP, noise);
        if (io->out_sto_round)
            uniform_group(&of_rounding, first / GROUP, uniform);
        for (size_t v = 0; v < 4 && first + v * EIGHT < m; v++) {
            const size_t at = first + v * EIGHT;
            const int n = m - at < EIGHT ? (int)(m - at) : EIGHT;
            eight values = load(row + at, n);
            if (weight_noise)
                values += load(weight_noise + at, n) * read[v];
            if (io->out_noise > 0)
                values += io->out_noise * noise[v];
            if (io->out_step > 0)
                values = rounded(values, io->out_step, io->out_sto_round ? &uniform[v] : NULL);
            if (io->out_bound > 0) {
                eight_ints which = (values > io->out_bound) | (values < -io->out_bound);
                for (int i = n; i < EIGHT; i++)
                    which[i] = 0; /* there is no such output */
                above |= which;
                values = within(values, io->out_bound);
            }
            put(row + at, values * back, n);
        }
    }
    return some(above);
}

static void multiply_with(multiplier *multiply, const struct array *array, const float *weights, const float *inputs,
                          size_t rows, size_t row, float *out)
{
    multiply(&(struct product){.left = inputs, .left_row = row, .left_step = 1, .right = weights,
                               .right_row = array->right_row, .right_panel = array->right_panel, .start = array->zeros,
                               .out = out, .out_row = array->m, .rows = rows, .columns = array->m, .length = array->n});
}

/* Take off what wires cost: (rows, m). */
static WIDE void drop(const struct io *io, multiplier *multiply, const struct array *array, float *inputs, size_t rows,
                      size_t row, float *outputs, float *room)
{
    const size_t n = array->n, m = array->m;
    float *currents = room, *weighted = room + rows * m, *other = room + 2 * rows * m;
    for (size_t r = 0; r < rows; r++)
        for (size_t i = 0; i < n; i++)
            other[r * row + i] = fabsf(inputs[r * row + i]);
    multiply_with(multiply, array, array->absolute, other, rows, row, currents);
    for (size_t r = 0; r < rows; r++)
        for (size_t i = 0; i < n; i++) {
            const float left = 1 - (float)i / (float)n;
            other[r * row + i] = inputs[r * row + i] * (1 - left * left);
        }
    multiply_with(multiply, array, array->weights, other, rows, row, weighted);
    for (size_t i = 0; i < rows * m; i++) {
        const float a = io->ir_drop_per_g * currents[i], c = a * (a * (0.05f * a - 0.2f) + 0.5f);
        outputs[i] -= io->ir_drop * c * weighted[i];
    }
}

/* Standard deviations of the noise of weights, (rows, m). */
static WIDE void noise_of_weights(const struct io *io, multiplier *multiply, const struct array *array,
                                  const float *inputs, size_t rows, size_t row, float *found, float *room)
{
    const size_t n = array->n, m = array->m;
    for (size_t r = 0; r < rows; r++) {
        float sum = 0;
        for (size_t i = 0; i < n; i++) {
            const float square = inputs[r * row + i] * inputs[r * row + i];
            room[r * row + i] = square, sum += square;
        }
        for (size_t c = 0; c < m && io->w_noise_type == ADDITIVE_CONSTANT; c++)
            found[r * m + c] = io->w_noise * sqrtf(sum);
    }
    if (io->w_noise_type == PCM_READ) {
        multiply_with(multiply, array, array->absolute, room, rows, row, found);
        for (size_t i = 0; i < rows * m; i++)
            found[i] = io->w_noise * sqrtf(found[i]);
    }
}

size_t periphery_room(const struct array *array)
{
    const size_t row = (array->n + GROUP) / GROUP * GROUP;
    return BLOCK * (2 * row + 4 * array->m + GROUP);
}

WIDE uint64_t periphery_multiply(const struct io *io, multiplier *multiply, const struct array *array,
                                 const float *vectors, size_t rows, uint64_t key, uint64_t cycle, int backward,
                                 float *out, float *room)
{
    const size_t n = array->n - array->ones, m = array->m, row = (array->n + GROUP) / GROUP * GROUP;
    const uint32_t kind = backward ? KINDS_OF_BACKWARD : 0;
    float *inputs = room, *outputs = inputs + BLOCK * row, *other = outputs + BLOCK * m;
    float *of_weights = other + BLOCK * (row + 2 * m);
    const int weight_noise = io->w_noise > 0 && io->w_noise_type != NO_NOISE;
    uint64_t repeated = 0;
    for (size_t first = 0; first < rows; first += BLOCK) {
        const size_t block = rows - first < BLOCK ? rows - first : BLOCK;
        size_t which[BLOCK], left = 0;
        float alpha[BLOCK];
        for (size_t r = 0; r < block; r++) {
            const float found = scale_of(io, vectors + (first + r) * n, array);
            alpha[r] = found > 0 ? found : 1;
            if (found > 0 || io->inp_noise > 0 || io->management == NONE)
                which[left++] = r;
            else
                memset(out + (first + r) * m, 0, m * sizeof *out);
        }
        float reduction = 1;
        for (uint32_t pass = 0; left; pass++, reduction *= 2) {
            float scales[BLOCK];
            for (size_t i = 0; i < left; i++) {
                const size_t r = which[i];
                scales[i] = 1 / alpha[r];
                if (io->iterative)
                    scales[i] /= reduction;
                const struct place place = {key, cycle, (uint32_t)(first + r), pass << PASS_BIT};
                convert(io, array, vectors + (first + r) * n, scales[i], place, kind, inputs + i * row);
            }
            multiply_with(multiply, array, array->weights, inputs, left, row, outputs);
            if (io->ir_drop > 0)
                drop(io, multiply, array, inputs, left, row, outputs, other);
            if (weight_noise)
                noise_of_weights(io, multiply, array, inputs, left, row, of_weights, other);
            size_t again = 0;
            for (size_t i = 0; i < left; i++) {
                const size_t r = which[i];
                const struct place place = {key, cycle, (uint32_t)(first + r), pass << PASS_BIT};
                const int above = finish(io, m, weight_noise ? of_weights + i * m : NULL, place, kind,
                                         io->out_scale / scales[i], outputs + i * m);
                memcpy(out + (first + r) * m, outputs + i * m, m * sizeof *out);
                if (above)
                    which[again++] = r;
            }
            if (!io->iterative || reduction > io->max_reduction)
                break;
            left = again, repeated += again;
        }
    }
    return repeated;
}
