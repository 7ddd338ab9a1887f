/* Calls the library with random sizes on memory of just these sizes; compiled with sanitizers by test_native.py. */

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

const char *rapa_choose(const char *kind);
void rapa_forward(const float *, const float *, const float *, float *, size_t, size_t, size_t);
void rapa_input_error(const float *, const float *, float *, float *, size_t, size_t, size_t);
void rapa_update(const float *, const float *, const float *, float *, float *, size_t, size_t, size_t, int, float,
                 float);

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
            float *patches = some(rows * k), *errors = some(rows * c_out), *outputs = some(rows * c_out);
            float *kernel = some((k + bias) * c_out), *gradient = some((k + bias) * c_out);
            float *upcoming = some((k + bias) * c_out), *transposed = some(k * c_out);
            rapa_forward(patches, kernel, bias ? kernel + k * c_out : NULL, outputs, rows, k, c_out);
            rapa_update(patches, errors, kernel, gradient, upcoming, rows, k, c_out, (int)bias, 0.9f, 0.1f);
            rapa_input_error(errors, kernel, transposed, patches, rows, k, c_out);
            free(patches), free(errors), free(outputs), free(kernel), free(gradient), free(upcoming), free(transposed);
        }
    }
    printf("%d cycles\n", cycles);
    return cycles ? 0 : 1;
}
