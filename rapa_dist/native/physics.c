/* What tiles that are not ideal ask of the library; see rapa_dist/physics/tile.py. */

#include "physics.h"

#include "periphery.h"
#include "tile.h"

#include <math.h>
#include <stdlib.h>

/* Products of rows with a kernel K (k + bias, c_out), `bias` 0 or 1: forward I K from patches (rows, k), or backward
 * D transposed(K) from errors (rows, c_out); `out` is (rows, c_out) or (rows, k). Writes how many passes bound management
 * has repeated. Returns 0, or 1 without memory. */
EXPORT int rapa_analog_product(const struct io *io, const float *kernel, size_t k, size_t c_out, size_t bias,
                               const float *vectors, size_t rows, uint64_t key, uint64_t cycle, int backward, float *out,
                               uint64_t *repeated)
{
    const size_t columns = backward ? k : c_out, panels = (columns + PANEL - 1) / PANEL;
    struct array array = {.weights = kernel, .right_row = c_out, .right_panel = PANEL, .n = k + bias, .m = c_out,
                          .ones = bias};
    if (backward)
        array = (struct array){.right_row = PANEL, .right_panel = PANEL * c_out, .n = c_out, .m = k};
    const size_t floats = backward ? panels * PANEL * c_out : (k + bias) * c_out;
    const int absolute = io->ir_drop > 0 || io->w_noise_type == PCM_READ;
    float *transposed = backward ? calloc(floats, sizeof(float)) : NULL;
    float *magnitudes = absolute ? malloc(floats * sizeof(float)) : NULL;
    float *zeros = calloc(columns, sizeof(float)), *room = malloc(periphery_room(&array) * sizeof(float));
    const int whole = (transposed || !backward) && (magnitudes || !absolute) && zeros && room;
    if (whole) {
        if (backward) {
            transpose(kernel, k, c_out, transposed);
            array.weights = transposed;
        }
        for (size_t i = 0; absolute && i < floats; i++)
            magnitudes[i] = fabsf(array.weights[i]);
        array.absolute = magnitudes, array.zeros = zeros;
        *repeated = periphery_multiply(io, chosen(), &array, vectors, rows, key, cycle, backward, out, room);
    }
    free(transposed), free(magnitudes), free(zeros), free(room);
    return !whole;
}

/* See pulse_rows. Returns 0, or 1 without memory. */
EXPORT int rapa_analog_update(const struct pulsing *update, const struct devices *devices, float *stored, float *seen,
                              const float *patches, const float *errors, size_t rows, size_t k, size_t bias, size_t c_out,
                              float rate, uint64_t key, uint64_t cycle, struct sent *sent)
{
    uint32_t *room = malloc(pulses_room(k + bias, c_out) * sizeof *room);
    if (!room)
        return 1;
    *sent = pulse_rows(update, devices, stored, seen, patches, errors, rows, k, k + bias, c_out, rate, key, cycle, room);
    free(room);
    return 0;
}
