/* Arrays that are not ideal: what their parameters are called here. */

#ifndef RAPA_PHYSICS_H
#define RAPA_PHYSICS_H

#include <stddef.h>
#include <stdint.h>

enum device { CONSTANT_STEP, LINEAR_STEP, EXP_STEP, POW_STEP };
enum pulse_type { STOCHASTIC_COMPRESSED, MEAN_COUNT, DETERMINISTIC_IMPLICIT };

/* The devices of a tile: each array has the shape of its kernel matrix. */
struct devices {
    const float *b_max, *b_min, *step_up, *step_down, *shape_up, *shape_down;
    int32_t kind, mult_noise;
    float dw_min_std, write_noise, a, b, a_up, a_down, gamma_up, gamma_down;
};

/* How pulses are sent; resolutions are 0 where there are none. */
struct pulsing {
    uint32_t desired_bl;
    int32_t pulse_type, bl_management, management;
    float um_grad_scale, granularity, x_resolution, d_resolution;
};

/* What updates have sent. */
struct sent {
    uint64_t trains, slots, pulses;
};

size_t pulses_room(size_t lines, size_t columns);
struct sent pulse_rows(const struct pulsing *update, const struct devices *devices, float *stored, float *seen,
                       const float *patches, const float *errors, size_t rows, size_t k, size_t lines, size_t columns,
                       float rate, uint64_t key, uint64_t cycle, uint32_t *room);

#endif
