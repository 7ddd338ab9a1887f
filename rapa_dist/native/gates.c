/* Passing a baton between threads in one call, for the whole of which Python's lock is free: see rapa_dist/nn/turns.py. */

#include "tile.h"

#include <errno.h>
#include <poll.h>
#include <unistd.h>

enum { LOOK_MS = 100 }; /* after which Python is asked whether a signal came, just before the wait began */

/* Open another thread's gate, by a byte into the pipe that it reads, and wait at one's own. Returns whether that was
 * opened; 0 when a signal came, or may have come, which Python has to see to. */
EXPORT int rapa_swap(int other, int mine)
{
    char byte = 0;
    while (write(other, &byte, 1) < 0 && errno == EINTR)
        ;
    struct pollfd gate = {.fd = mine, .events = POLLIN};
    return poll(&gate, 1, LOOK_MS) == 1 && read(mine, &byte, 1) == 1;
}
