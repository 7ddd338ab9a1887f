/* Matrix products as a tile needs them: tall and narrow, on one thread, with the same bits on every processor. */

#ifndef RAPA_PRODUCTS_H
#define RAPA_PRODUCTS_H

#include <stddef.h>

/* out[r][c] = start[c] + sum over i of left(r, i) * right[i][c]
 *
 * left(r, i) is left[r * left_row + i * left_step], so that a matrix can be multiplied as it lies or transposed. With
 * `start` NULL the sums go on from what `out` holds. Every result is one sum over i in ascending order, each step of it
 * a fused multiply and add: the bits depend neither on blocks nor on the width of vectors. */
struct product {
    const float *left;
    size_t left_row, left_step;
    size_t ahead; /* floats from what is read of `left` to what is read next from far away, and fetched now; 0: nothing */
    const float *right;
    size_t right_row, right_panel; /* floats to the next row, and to the next PANEL columns, which `right` ends with */
    const float *start;
    float *out;
    size_t out_row;
    size_t rows, columns, length;
};

enum { PANEL = 32 }; /* columns: whole blocks of every kind of vectors */

typedef void multiplier(const struct product *);

/* How to multiply with a kind of vectors, and what kind the processor has; NULL if it has none of these. */
multiplier *multiplier_of(const char *kind);
const char *best_kind(void);

#endif
