/* Products on an array with converters and noise. */

#ifndef RAPA_PERIPHERY_H
#define RAPA_PERIPHERY_H

#include "products.h"

#include <stdint.h>

enum management { NONE, ABS_MAX, MAX_OF, CONSTANT };
enum weight_noise { NO_NOISE, ADDITIVE_CONSTANT, PCM_READ };

/* Parameters of one direction; steps and bounds are 0 where there are none. */
struct io {
    float inp_step, inp_bound, inp_noise, out_step, out_bound, out_noise, out_scale;
    float nm_thres, w_noise, ir_drop, ir_drop_per_g; /* the last one times n */
    int32_t management, iterative, inp_sto_round, out_sto_round, w_noise_type;
    double max_reduction; /* after a pass with a larger one bound management gives up */
};

/* What is multiplied. The matrix lies in panels, see struct product. */
struct array {
    const float *weights; /* (n, m) */
    size_t right_row, right_panel;
    const float *absolute; /* their absolute values, laid out alike; NULL where nobody wants them */
    size_t n, m, ones;     /* the last `ones` elements of a vector, 0 or 1, are 1 */
    const float *zeros;    /* m of them */
};

/* Floats of the room that a product takes. */
size_t periphery_room(const struct array *array);

/* vectors (rows, n - ones) times the array: out (rows, m). Returns how many passes bound management has repeated. */
uint64_t periphery_multiply(const struct io *io, multiplier *multiply, const struct array *array, const float *vectors,
                            size_t rows, uint64_t key, uint64_t cycle, int backward, float *out, float *room);

#endif
