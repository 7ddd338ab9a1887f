/* Passing a baton between threads in one call, for the whole of which Python's lock is free: see rapa_dist/nn/turns.py. */

#include "tile.h"

#include <errno.h>
#include <unistd.h>

/* Open another thread's gate, by a byte into the pipe that it reads, and wait at one's own. */
EXPORT void rapa_swap(int other, int mine)
{
    char byte = 0;
    while (write(other, &byte, 1) < 0 && errno == EINTR)
        ;
    while (read(mine, &byte, 1) < 0 && errno == EINTR)
        ;
}
