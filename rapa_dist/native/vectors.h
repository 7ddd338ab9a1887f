/* Vectors of eight floats, for what is done to all channels of a pixel alike. */

#ifndef RAPA_VECTORS_H
#define RAPA_VECTORS_H

#include "processor.h"

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__)
#define WIDE __attribute__((target("avx2")))
#define IS_WIDE has_avx2()
#else
#define WIDE
#define IS_WIDE 1
#endif

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
    return (eight)((which & (eight_ints)yes) | (~which & (eight_ints)no));
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
