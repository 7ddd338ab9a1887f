#include "products.h"

#include "processor.h"

#include <string.h>

#define CHUNK 128

#if defined(__x86_64__)

#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx2,fma")))
#define WIDTH 16
#define ROWS 12
#define PANELS 2
#define NAME(x) avx512_##x
#define REGISTER __m512
#define FMA(a, x, b) _mm512_fmadd_ps(_mm512_set1_ps(a), x, b)
#include "products.inc"

#define TARGET __attribute__((target("avx2,fma")))
#define WIDTH 8
#define ROWS 6
#define PANELS 2
#define NAME(x) avx2_##x
#define REGISTER __m256
#define FMA(a, x, b) _mm256_fmadd_ps(_mm256_set1_ps(a), x, b)
#include "products.inc"

multiplier *multiplier_of(const char *kind)
{
    if (!strcmp(kind, "avx2") && has_avx2())
        return avx2_multiply;
    if (!strcmp(kind, "avx512") && has_avx512())
        return avx512_multiply;
    return NULL;
}

const char *best_kind(void)
{
    return multiplier_of("avx512") ? "avx512" : multiplier_of("avx2") ? "avx2" : NULL;
}

#elif defined(__aarch64__)

#include <arm_neon.h>

#define TARGET
#define WIDTH 4
#define ROWS 6
#define PANELS 4
#define NAME(x) neon_##x
#define REGISTER float32x4_t
#define FMA(a, x, b) vfmaq_n_f32(b, x, a)
#include "products.inc"

multiplier *multiplier_of(const char *kind)
{
    return strcmp(kind, "neon") ? NULL : neon_multiply;
}

const char *best_kind(void)
{
    return "neon";
}

#else
#error "rapa-dist's library knows x86-64 and aarch64; elsewhere NumPy computes."
#endif
