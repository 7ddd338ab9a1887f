/* The products and the update of a tile, called by rapa_dist/native/__init__.py through ctypes. */

#include "products.h"

#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define BLOCK 48 /* rows of a part of a gradient: they stay in the first cache */

static multiplier *multiply;

/* A digest of the files that this was made from. */
EXPORT const char *rapa_sources(void)
{
    return RAPA_SOURCES;
}

/* Choose a kind of vectors: "avx512", "avx2", "neon", or NULL for the best. Returns its name, NULL if there is none. */
EXPORT const char *rapa_choose(const char *kind)
{
    if (!kind)
        kind = best_kind();
    multiplier *found = kind ? multiplier_of(kind) : NULL;
    if (!found)
        return NULL;
    multiply = found;
    return kind;
}

/* M = I K + bias. patches (rows, k) I, kernel (k, c_out) K, bias (c_out) or NULL, outputs (rows, c_out) M. */
EXPORT void rapa_forward(const float *patches, const float *kernel, const float *bias, float *outputs, size_t rows,
                         size_t k, size_t c_out)
{
    if (!bias)
        memset(outputs, 0, rows * c_out * sizeof(float));
    multiply(&(struct product){patches, k, 1, kernel, c_out, bias, outputs, c_out, rows, c_out, k});
}

/* dI = D transposed(K). errors (rows, c_out) D, kernel (k, c_out) K, transposed (c_out, k) to work in, input_errors
 * (rows, k) dI, which may not overlap with the others. */
EXPORT void rapa_input_error(const float *errors, const float *kernel, float *transposed, float *input_errors,
                             size_t rows, size_t k, size_t c_out)
{
    for (size_t first = 0; first < k; first += 16) { /* a cache line is written while it is there */
        const size_t last = first + 16 < k ? first + 16 : k;
        for (size_t c = 0; c < c_out; c++)
            for (size_t i = first; i < last; i++)
                transposed[c * k + i] = kernel[i * c_out + c];
    }
    memset(input_errors, 0, rows * k * sizeof(float));
    multiply(&(struct product){errors, c_out, 1, transposed, k, NULL, input_errors, k, rows, k, c_out});
}

/* K' = keep * K - rate * transposed(I) D, and the bias, the last row of K, as if its input were 1.
 * patches (rows, k) I, errors (rows, c_out) D, kernel (k + bias, c_out) K, gradient and upcoming (k + bias, c_out)
 * overwritten, the second with K'. */
EXPORT void rapa_update(const float *patches, const float *errors, const float *kernel, float *gradient, float *upcoming,
                        size_t rows, size_t k, size_t c_out, int bias, float keep, float rate)
{
    static const float one = 1;
    const size_t size = (k + (bias != 0)) * c_out;
    memset(gradient, 0, size * sizeof(float));
    for (size_t first = 0; first < rows; first += BLOCK) {
        const size_t block = rows - first < BLOCK ? rows - first : BLOCK;
        const float *of_errors = errors + first * c_out;
        multiply(&(struct product){patches + first * k, 1, k, of_errors, c_out, NULL, gradient, c_out, k, c_out, block});
        if (bias)
            multiply(&(struct product){&one, 0, 0, of_errors, c_out, NULL, gradient + k * c_out, c_out, 1, c_out, block});
    }
    for (size_t i = 0; i < size; i++)
        upcoming[i] = keep * kernel[i] - rate * gradient[i]; /* never fused, see setup.py: one meaning everywhere */
}
