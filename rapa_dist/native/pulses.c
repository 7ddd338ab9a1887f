/* Updates of an array by pulses, one row after the other: see rapa_dist/physics/pulses.py and devices.py. */

#include "draws.h"
#include "physics.h"

#include <math.h>

enum { SLOTS = 32, LINE_BLOCKS = 8, LINE_DRAWN = 6, BITS = 24 };

struct train {
    uint32_t length; /* BL; 0: nothing to do */
    float of_patch, of_error;
};

/* What the update of a row works with. */
struct row {
    const struct pulsing *update;
    const struct devices *devices;
    float *stored, *seen;
    const float *patch, *error;
    size_t k, lines, columns; /* k elements of the patch, then a 1 if there is one line more */
    struct place place;
    size_t used; /* normal numbers so far */
    struct {
        size_t group; /* that `values` are of, plus one */
        float values[GROUP];
    } kept[2];
};

INLINE float element(const struct row *row, size_t line)
{
    return line < row->k ? row->patch[line] : 1;
}

/* Normal number `number` of the row's pulses; those of one stream come in order. */
static WIDE float normal(struct row *row, int stream, size_t number)
{
    const size_t group = number / GROUP;
    if (row->kept[stream].group != group + 1) {
        eight found[4];
        struct place place = row->place;
        place.kind = (uint32_t)PULSES << KIND_BIT;
        normal_group(&place, group, found);
        memcpy(row->kept[stream].values, found, sizeof row->kept[stream].values);
        row->kept[stream].group = group + 1;
    }
    return row->kept[stream].values[number % GROUP];
}

/* e to the power of a number: Cephes' expf. */
static float exponential(float x)
{
    if (x > 88)
        return INFINITY;
    if (x < -87)
        return 0;
    const float n = rintf(1.44269504088896341f * x);
    x -= n * 0.693359375f;
    x -= n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * x + 1.3981999507e-3f;
    p = p * x + 8.3334519073e-3f;
    p = p * x + 4.1665795894e-2f;
    p = p * x + 1.6666665459e-1f;
    p = p * x + 5.0000001201e-1f;
    union {
        float value;
        uint32_t bits;
    } scale = {.bits = (uint32_t)((int32_t)n + 127) << 23};
    return (p * x * x + x + 1) * scale.value;
}

static WIDE float power(float x, float y)
{
    if (x <= 0)
        return y == 0;
    return x >= 1 ? 1 : exponential(y * logarithm((eight){0} + x)[0]);
}

/* What one pulse changes a weight by, in its direction; `factor` is 1 and the noise. */
static WIDE float change(const struct devices *d, size_t at, int up, float weight, float factor)
{
    const float step = (up ? d->step_up : d->step_down)[at], room = d->b_max[at] - d->b_min[at];
    switch (d->kind) {
    case LINEAR_STEP: {
        const float slope = (up ? d->shape_up : d->shape_down)[at];
        return d->mult_noise ? (slope * weight + step) * factor : slope * weight + step * factor;
    }
    case EXP_STEP: {
        if (!(room > 0))
            return 0;
        const float z = 2 * weight / room * d->a + d->b;
        const float y = 1 - (up ? d->a_up * exponential(d->gamma_up * z) : d->a_down * exponential(d->gamma_down * -z));
        return (y > 0 ? y : 0) * factor * step;
    }
    case POW_STEP: {
        if (!(room > 0))
            return 0;
        const float left = (up ? d->b_max[at] - weight : weight - d->b_min[at]) / room;
        return step * power(left, (up ? d->shape_up : d->shape_down)[at]) * factor;
    }
    default:
        return step * factor;
    }
}

/* One pulse; the noise that it takes has these numbers. */
INLINE void pulse(struct row *row, size_t line, size_t column, size_t of_step, size_t of_write)
{
    const struct devices *d = row->devices;
    const size_t at = line * row->columns + column;
    const int up = (element(row, line) < 0) != (row->error[column] < 0);
    const float factor = d->dw_min_std > 0 ? 1 + d->dw_min_std * normal(row, 0, of_step) : 1;
    const float before = row->stored[at], by = change(d, at, up, before, factor);
    float after = up ? before + by : before - by;
    after = after > d->b_max[at] ? d->b_max[at] : after;
    after = after < d->b_min[at] ? d->b_min[at] : after;
    row->stored[at] = after;
    if (d->write_noise > 0)
        row->seen[at] = after + d->write_noise * normal(row, 1, of_write);
}

/* Give devices a pulse each: of all pairs of a line and a column. */
static WIDE void pulse_pairs(struct row *row, const uint32_t *lines, size_t n_lines, const uint32_t *columns,
                             size_t n_columns)
{
    const size_t count = n_lines * n_columns, spread = row->devices->dw_min_std > 0 ? count : 0;
    size_t number = row->used;
    for (size_t i = 0; i < n_lines; i++)
        for (size_t j = 0; j < n_columns; j++, number++)
            pulse(row, lines[i], columns[j], number, number + spread);
    row->used += spread + (row->devices->write_noise > 0 ? count : 0);
}

/* 32 independent trials for each of eight lines, see bernoulli() of pulses.py. */
INLINE eight_words trials(const struct place *place, const eight_words lines, const eight probabilities)
{
    const eight scaled = either(probabilities > 1, (eight){0} + 1, probabilities) * 0x1p24f;
#if defined(__x86_64__)
    const eight_words whole = (eight_words)_mm256_cvtps_epi32((__m256)scaled);
#else
    eight_words whole;
    for (int i = 0; i < EIGHT; i++)
        whole[i] = (uint32_t)rintf(scaled[i]);
#endif
    eight_words undecided = ~(eight_words){0}, ones = -(whole >> BITS);
    for (int block = 0; block < LINE_DRAWN && some((eight_ints)undecided != 0); block++) {
        eight_words words[4];
        philox(place, lines * LINE_BLOCKS + (uint32_t)block, words);
        for (int i = 0; i < 4; i++) {
            const eight_words is_one = -(whole >> (BITS - 1 - 4 * block - i) & 1u);
            ones |= is_one & undecided & ~words[i];
            undecided &= is_one ^ ~words[i];
        }
    }
    return ones;
}

/* By slot the lines that have a 1: lists of `most`, and how long they are. */
static WIDE void draw_lists(const struct row *row, uint32_t kind, uint32_t part, uint32_t slots, const float *values,
                            size_t count, size_t ones, float factor, uint32_t *lists, size_t most, uint32_t *lengths)
{
    struct place place = row->place;
    place.kind = kind << KIND_BIT | part << PASS_BIT;
    memset(lengths, 0, SLOTS * sizeof *lengths);
    uint32_t lines[EIGHT];
    float probabilities[EIGHT];
    size_t waiting = 0;
    for (size_t line = 0; line <= count + ones; line++) {
        const int is_end = line == count + ones;
        const float value = is_end ? 0 : line < count ? fabsf(values[line]) : 1, p = value * factor;
        if (p > 0)
            lines[waiting] = (uint32_t)line, probabilities[waiting] = p, waiting++;
        if (waiting < EIGHT && !(is_end && waiting))
            continue;
        for (size_t i = waiting; i < EIGHT; i++)
            lines[i] = 0, probabilities[i] = 0;
        eight_words of_lines;
        eight p_of_lines;
        memcpy(&of_lines, lines, sizeof lines), memcpy(&p_of_lines, probabilities, sizeof probabilities);
        const eight_words found = trials(&place, of_lines, p_of_lines);
        for (size_t i = 0; i < waiting; i++) {
            uint32_t bits = found[i];
            if (slots < SLOTS)
                bits &= (1u << slots) - 1;
            for (; bits; bits &= bits - 1) {
                const uint32_t slot = (uint32_t)__builtin_ctz(bits);
                lists[slot * most + lengths[slot]++] = lines[i];
            }
        }
        waiting = 0;
    }
}

static WIDE float implicit(float value, float resolution)
{
    value = value < 1 ? value : 1;
    if (!(resolution > 0))
        return value;
    const float found = rintf(value / resolution) * resolution;
    return found < 1 ? found : 1;
}

/* Pulses where nothing is drawn: by cross-point as many as the train says. Returns how many. */
static WIDE uint64_t send_counted(struct row *row, const struct train *train)
{
    const struct pulsing *u = row->update;
    const float length = (float)train->length;
    uint64_t sent = 0, left = 1;
    for (uint32_t number = 0; left; number++) {
        const size_t before = row->used;
        size_t count = 0;
        for (int counting = 1; counting >= 0; counting--) { /* first count them: the noise of writing follows that of steps */
            size_t i = 0;
            for (size_t line = 0; line < row->lines; line++) {
                const float x = fabsf(element(row, line)) * train->of_patch;
                for (size_t column = 0; column < row->columns; column++) {
                    const float d = fabsf(row->error[column]) * train->of_error;
                    float pulses;
                    if (u->pulse_type == MEAN_COUNT) {
                        const float of_patch = rintf(length * (x < 1 ? x : 1)), of_error = rintf(length * (d < 1 ? d : 1));
                        pulses = rintf(of_error * of_patch / length);
                    } else
                        pulses = rintf(length * implicit(d, u->d_resolution) * implicit(x, u->x_resolution));
                    if (pulses <= (float)number)
                        continue;
                    if (!counting)
                        pulse(row, line, column, before + i, before + i + (row->devices->dw_min_std > 0 ? count : 0));
                    i++;
                }
            }
            count = i;
        }
        row->used += count * (size_t)((row->devices->dw_min_std > 0) + (row->devices->write_noise > 0));
        sent += count, left = count;
    }
    return sent;
}

static WIDE uint64_t send_drawn(struct row *row, const struct train *train, uint32_t *room)
{
    uint32_t *of_patch = room, *of_error = room + SLOTS * row->lines;
    uint32_t n_lines[SLOTS], n_columns[SLOTS];
    uint64_t sent = 0;
    for (uint32_t first = 0; first < train->length; first += SLOTS) {
        const uint32_t slots = train->length - first < SLOTS ? train->length - first : SLOTS, part = first / SLOTS;
        draw_lists(row, PATCH_PULSES, part, slots, row->patch, row->k, row->lines - row->k, train->of_patch, of_patch,
                   row->lines, n_lines);
        draw_lists(row, ERROR_PULSES, part, slots, row->error, row->columns, 0, train->of_error, of_error, row->columns,
                   n_columns);
        for (uint32_t slot = 0; slot < slots; slot++)
            if (n_lines[slot] && n_columns[slot]) {
                pulse_pairs(row, of_patch + slot * row->lines, n_lines[slot], of_error + slot * row->columns,
                            n_columns[slot]);
                sent += (uint64_t)n_lines[slot] * n_columns[slot];
            }
    }
    return sent;
}

static struct train train_of(const struct pulsing *u, float x, float d, float rate)
{
    if (!(x > 0) || !(d > 0) || !(rate > 0))
        return (struct train){0};
    d = u->um_grad_scale * d;
    const float desired = (float)u->desired_bl, k = rate * x * d / u->granularity;
    float length = desired;
    if (u->bl_management) {
        const float needed = ceilf(k);
        length = needed < desired ? needed : desired;
    }
    const float scale = sqrtf(rate / (u->granularity * length));
    if (!u->management)
        return (struct train){(uint32_t)length, scale, scale};
    if (k > desired)
        d = d * (desired / k);
    return (struct train){(uint32_t)length, scale * sqrtf(d / x), scale * sqrtf(x / d)};
}

static float largest_of(const float *values, size_t count, float largest)
{
    for (size_t i = 0; i < count; i++)
        largest = fabsf(values[i]) > largest ? fabsf(values[i]) : largest;
    return largest;
}

size_t pulses_room(size_t lines, size_t columns)
{
    return SLOTS * (lines + columns); /* numbers of 32 bits */
}

/* Update an array by rows: patches (rows, k), followed by a 1 if lines = k + 1, and errors (rows, columns). What is
 * stored, and what is seen of it, may be the same memory, (lines, columns). */
WIDE struct sent pulse_rows(const struct pulsing *update, const struct devices *devices, float *stored, float *seen,
                            const float *patches, const float *errors, size_t rows, size_t k, size_t lines,
                            size_t columns, float rate, uint64_t key, uint64_t cycle, uint32_t *room)
{
    struct sent sent = {0};
    for (size_t r = 0; r < rows; r++) {
        struct row row = {.update = update, .devices = devices, .stored = stored, .seen = seen,
                          .patch = patches + r * k, .error = errors + r * columns, .k = k, .lines = lines,
                          .columns = columns, .place = {key, cycle, (uint32_t)r, 0}};
        const struct train train = train_of(update, largest_of(row.patch, k, lines > k ? 1 : 0),
                                            largest_of(row.error, columns, 0), rate);
        if (!train.length)
            continue;
        sent.trains++, sent.slots += train.length;
        sent.pulses += update->pulse_type == STOCHASTIC_COMPRESSED ? send_drawn(&row, &train, room)
                                                                    : send_counted(&row, &train);
    }
    return sent;
}
