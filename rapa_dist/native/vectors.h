/* Vectors of eight floats, for what is done to all channels of a pixel alike. */

#ifndef RAPA_VECTORS_H
#define RAPA_VECTORS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define WIDE __attribute__((target("avx2"))) /* the library is not used where the processor has none */
#else
#include <arm_neon.h>
#define WIDE
#endif

#define INLINE static inline __attribute__((always_inline)) WIDE

enum { EIGHT = 8, CHUNK_VECTORS = 4 };

typedef float eight __attribute__((vector_size(32)));
typedef int32_t eight_ints __attribute__((vector_size(32)));

/* The first `n` of eight floats, the others 0; all of them in one go where `n` is a constant 8. */
INLINE eight load(const float *from, const int n)
{
    eight found = {0};
    memcpy(&found, from, n == EIGHT ? 32 : (size_t)n * sizeof(float));
    return found;
}

INLINE void put(float *to, const eight values, const int n)
{
    memcpy(to, &values, n == EIGHT ? 32 : (size_t)n * sizeof(float));
}

INLINE eight either(const eight_ints which, const eight yes, const eight no)
{
#if defined(__x86_64__)
    return (eight)_mm256_blendv_ps((__m256)no, (__m256)yes, (__m256)which);
#else
    return (eight)((which & (eight_ints)yes) | (~which & (eight_ints)no));
#endif
}

/* The larger ones of eight pairs; the other one where there is NaN. */
INLINE eight larger_of(const eight one, const eight other)
{
#if defined(__x86_64__)
    return (eight)_mm256_max_ps((__m256)one, (__m256)other);
#else
    return either(one > other, one, other);
#endif
}

#if !defined(__x86_64__)
union halves {
    eight all;
    eight_ints which;
    float32x4_t half[2];
    uint32x4_t bits[2];
};
#endif

/* Exact, as everywhere. */
INLINE eight root(const eight values)
{
#if defined(__x86_64__)
    return (eight)_mm256_sqrt_ps((__m256)values);
#else
    union halves both = {values};
    both.half[0] = vsqrtq_f32(both.half[0]), both.half[1] = vsqrtq_f32(both.half[1]);
    return both.all;
#endif
}

/* Whether one of eight comparisons holds. */
INLINE int some(const eight_ints which)
{
#if defined(__x86_64__)
    return _mm256_movemask_ps((__m256)which) != 0;
#else
    const union halves both = {.which = which};
    return vmaxvq_u32(vorrq_u32(both.bits[0], both.bits[1])) != 0;
#endif
}

/* Do something to all channels: to 32 at a time, to 8, and to those left over. `first` is the first of them, `vectors`
 * how many vectors they fill, `n` how many floats of the last one. */
#define FOR_CHANNELS(channels, call)                                                                                   \
    do {                                                                                                               \
        int64_t first = 0;                                                                                             \
        for (; first + CHUNK_VECTORS * EIGHT <= (channels); first += CHUNK_VECTORS * EIGHT)                            \
            call(first, CHUNK_VECTORS, EIGHT);                                                                         \
        for (; first + EIGHT <= (channels); first += EIGHT)                                                            \
            call(first, 1, EIGHT);                                                                                     \
        if (first < (channels))                                                                                        \
            call(first, 1, (int)((channels)-first));                                                                   \
    } while (0)

#endif
