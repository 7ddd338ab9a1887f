/* Calls the library with random sizes on memory of just these sizes; compiled with sanitizers by test_native.py. */

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tile.h"

static float *some(size_t floats)
{
    float *memory = malloc(floats ? floats * sizeof(float) : 1);
    for (size_t i = 0; i < floats; i++)
        memory[i] = (float)rand() / (float)RAND_MAX;
    return memory;
}

int main(void)
{
    const char *kinds[] = {"avx512", "avx2", "neon"};
    int cycles = 0;
    for (size_t kind = 0; kind < 3; kind++) {
        if (!rapa_choose(kinds[kind]))
            continue;
        for (int i = 0; i < 600; i++, cycles++) {
            const size_t rows = rand() % 70, k = 1 + rand() % 150, c_out = 1 + rand() % 70, bias = rand() % 2;
            const size_t kernel = ((k + bias) * c_out + 15) / 16 * 16;
            float *patches = some(rows * k), *errors = some(rows * c_out), *outputs = some(rows * c_out);
            float *cells = some(PAGE / sizeof(float) + 6 * kernel);
            memset(cells, 0, PAGE);
            struct tile *tile = rapa_tile_new(cells, k, c_out, (int)bias);
            rapa_tile_forward(tile, patches, outputs, rows);
            rapa_tile_backward(tile, patches, errors, rows, 1, DO_UPDATE, 0.1, 0.01);
            rapa_tile_backward(tile, patches, errors, rows, 2, DO_UPDATE | DO_COMMIT | DO_INPUT_ERROR, 0.1, 0.01);
            rapa_tile_free(tile);
            free(patches), free(errors), free(outputs), free(cells);
        }
    }
    printf("%d cycles\n", cycles);
    return cycles ? 0 : 1;
}
