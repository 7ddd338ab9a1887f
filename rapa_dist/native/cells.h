/* The non-volatile memory of a tile, as rapa_dist/tile.py lays it out: a page of words, three buffers for kernels, and
 * beside each of them room for the gradient of an update. */

#ifndef RAPA_CELLS_H
#define RAPA_CELLS_H

#include <stddef.h>
#include <stdint.h>

enum { PAGE = 4096 }; /* bytes */

enum word {
    STATE,
    COMMIT, /* cycle << 5 | prepared << 4 | buffer of the kernel to be << 2 | buffer of the kernel in force */
    PID,
    STARTS,
    ROWS_FORWARD,
    ROWS_BACKWARD,
    ROWS_UPDATE,
    UPDATES,
    BUSY_NS,
    ANSWERED,
    STEP,
    SINCE_NS,
    THREAD,
    HANGS,
    REPEATED,
    TRAINS,
    SLOTS,
    PULSES_SENT,
    NEXT_STEP,
};

enum state { IDLE, FORWARD, BACKWARD, HOLDING };

enum cycle { DO_FORWARD = 1, DO_INPUT_ERROR = 2, DO_UPDATE = 4, DO_COMMIT = 8, DO_DISCARD = 16 };

/* Store a word that says how far a cycle has come: what was written before it is there by then, and what is written
 * after it is not. */
static inline void store(uint64_t *word, uint64_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
    __atomic_signal_fence(__ATOMIC_SEQ_CST); /* for the compiler; a process that is killed stops between two stores */
}

#endif
