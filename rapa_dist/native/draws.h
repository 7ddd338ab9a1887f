/* Random numbers of a tile, each a function of what it is for: see rapa_dist/physics/draws.py, whose bits these are. */

#ifndef RAPA_DRAWS_H
#define RAPA_DRAWS_H

#include "vectors.h"

enum { GROUP = 4 * EIGHT, PASS_BIT = 23, KIND_BIT = 28 }; /* numbers that are drawn at once; places in a counter */

typedef uint32_t eight_words __attribute__((vector_size(32)));

enum kind { DEVICES, INPUT_ROUNDING, INPUT_NOISE, WEIGHT_NOISE, OUTPUT_NOISE, OUTPUT_ROUNDING, PATCH_PULSES = 11,
            ERROR_PULSES, PULSES, DIFFUSION, WRITE_NOISE };

enum { KINDS_OF_BACKWARD = 5 }; /* what is added to a kind of the forward cycle for that of the backward cycle */

/* Where in a run numbers are drawn. */
struct place {
    uint64_t key, cycle;
    uint32_t row;
    uint32_t kind; /* kind << KIND_BIT | pass << PASS_BIT */
};

#if defined(__x86_64__)
INLINE void multiply_words(const eight_words value, const uint32_t factor, eight_words *high, eight_words *low)
{
    const __m256i all = (__m256i)value, by = _mm256_set1_epi32((int)factor);
    const __m256i even = _mm256_mul_epu32(all, by), odd = _mm256_mul_epu32(_mm256_srli_epi64(all, 32), by);
    *low = (eight_words)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
    *high = (eight_words)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
}
#else
INLINE void multiply_words(const eight_words value, const uint32_t factor, eight_words *high, eight_words *low)
{
    for (int i = 0; i < EIGHT; i++) {
        const uint64_t product = (uint64_t)value[i] * factor;
        (*low)[i] = (uint32_t)product, (*high)[i] = (uint32_t)(product >> 32);
    }
}
#endif

/* Philox 4x32-10 of eight counters that differ in their block. */
INLINE void philox(const struct place *place, const eight_words block, eight_words found[4])
{
    eight_words c0 = block | place->kind, c1 = (eight_words){0} + place->row;
    eight_words c2 = (eight_words){0} + (uint32_t)place->cycle, c3 = (eight_words){0} + (uint32_t)(place->cycle >> 32);
    uint32_t k0 = (uint32_t)place->key, k1 = (uint32_t)(place->key >> 32);
    for (int round = 0; round < 10; round++) {
        eight_words high0, low0, high2, low2;
        multiply_words(c0, 0xD2511F53u, &high0, &low0);
        multiply_words(c2, 0xCD9E8D57u, &high2, &low2);
        c0 = high2 ^ c1 ^ k0, c1 = low2;
        c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    found[0] = c0, found[1] = c1, found[2] = c2, found[3] = c3;
}

INLINE eight_words eight_from(uint32_t first)
{
    return (eight_words){0, 1, 2, 3, 4, 5, 6, 7} + first;
}

/* The first 24 bits of words as floats. */
INLINE eight as_floats(const eight_words words)
{
    return __builtin_convertvector((eight_ints)(words >> 8), eight);
}

/* Natural logarithms of numbers in (0, 1). */
INLINE eight logarithm(const eight values)
{
    const eight_words bits = (eight_words)values;
    eight mantissa = (eight)((bits & 0x7FFFFFu) | 0x3F800000u);
    const eight_ints large = mantissa > 1.41421356f;
    mantissa = either(large, mantissa * 0.5f, mantissa);
    const eight exponent = __builtin_convertvector((eight_ints)(bits >> 23) - 127 - large, eight);
    const eight f = mantissa - 1.0f, square = f * f;
    eight p = (eight){0} + 7.0376836292e-2f;
    p = p * f + -1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f + -1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f + -1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f + -2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    eight found = p * f * square;
    found = found + -2.12194440e-4f * exponent;
    found = found - 0.5f * square;
    found = f + found;
    return found + 0.693359375f * exponent;
}

/* Two standard normal numbers for every two words, by Box and Muller. */
INLINE void normal_pairs(const eight_words first, const eight_words second, eight *one, eight *other)
{
    const eight radius = root(-2.0f * logarithm((as_floats(first) + 0.5f) * 0x1p-24f));
    const eight angle = (as_floats((second & 0x3FFFFFFFu) << 2) * 0x1p-24f - 0.5f) * 1.57079632679489662f;
    const eight square = angle * angle;
    const eight sine =
        ((-1.9515295891e-4f * square + 8.3321608736e-3f) * square + -1.6666654611e-1f) * square * angle + angle;
    const eight cosine =
        ((2.443315711809948e-5f * square + -1.388731625493765e-3f) * square + 4.166664568298827e-2f) * square * square -
        0.5f * square + 1.0f;
    const eight_ints swapped = -(eight_ints)(second >> 30 & 1u);
    const eight_words sign = second & 0x80000000u;
    *one = radius * (eight)((eight_words)either(swapped, -sine, cosine) ^ sign);
    *other = radius * (eight)((eight_words)either(swapped, cosine, sine) ^ sign);
}

/* Normal numbers, GROUP of them: those of a group of blocks. */
INLINE void normal_group(const struct place *place, size_t group, eight found[4])
{
    eight_words words[4];
    philox(place, eight_from((uint32_t)(group * EIGHT)), words);
    normal_pairs(words[0], words[1], &found[0], &found[1]);
    normal_pairs(words[2], words[3], &found[2], &found[3]);
}

/* Numbers in [0, 1), GROUP of them. */
INLINE void uniform_group(const struct place *place, size_t group, eight found[4])
{
    eight_words words[4];
    philox(place, eight_from((uint32_t)(group * EIGHT)), words);
    for (int i = 0; i < 4; i++)
        found[i] = as_floats(words[i]) * 0x1p-24f;
}

#endif
