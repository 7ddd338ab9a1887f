/* The message that starts cycles: see Ring of rapa_dist/fabric/doorbell.py. */

#ifndef RAPA_RINGS_H
#define RAPA_RINGS_H

#include <stdint.h>

enum { MOST_RINGS = 4 }; /* in one message */

struct ring {
    uint64_t token, number;
    uint32_t cycle, rows;
    uint64_t patches, outputs; /* where the first of them is, in floats of the arena */
    double rate, decay;
    uint64_t hold_ns, rung_ns, after, draw;
};

#endif
