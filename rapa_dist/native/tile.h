/* A tile: a kernel matrix in its cells, and the cycles that touch it. */

#ifndef RAPA_TILE_H
#define RAPA_TILE_H

#include "cells.h"
#include "products.h"

#define EXPORT __attribute__((visibility("default")))

struct tile {
    uint64_t *words; /* the cells begin with them */
    size_t k, c_out, bias;
    const float *zeros; /* as many as a row of results has */
    float panels[];     /* to transpose K into */
};

/* What rapa_choose has chosen. */
multiplier *chosen(void);

/* Write transposed(K) in panels: K (k, c_out), and of each panel (c_out, PANEL) the columns that there are. */
void transpose(const float *kernel, size_t k, size_t c_out, float *panels);

EXPORT const char *rapa_choose(const char *kind);
EXPORT struct tile *rapa_tile_new(void *cells, size_t k, size_t c_out, int bias);
EXPORT void rapa_tile_free(struct tile *tile);
EXPORT void rapa_tile_forward(struct tile *tile, const float *patches, float *outputs, size_t rows);
EXPORT void rapa_tile_backward(struct tile *tile, float *patches, const float *errors, size_t rows, uint64_t cycle,
                               int flags, double rate, double decay);
EXPORT void rapa_tile_discard(struct tile *tile, uint64_t cycle);

#endif
