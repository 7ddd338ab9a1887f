/* Rings of many tiles in one system call: see NodeDoorbell of rapa_dist/fabric/ringing.py. */

#define _GNU_SOURCE /* sendmmsg */

#include "rings.h"

#include "tile.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/un.h>

struct bells {
    int socket;
    size_t n_tiles;
    struct mmsghdr *headers; /* one for each tile */
    struct iovec (*messages)[MOST_RINGS];
    struct sockaddr_un names[];
};

EXPORT void rapa_bells_free(struct bells *bells)
{
    free(bells->headers), free(bells->messages), free(bells);
}

/* Ring tiles, up to so many, whose sockets are named `prefix` and their number. NULL where there is no memory, or a name
 * is too long. */
EXPORT struct bells *rapa_bells_new(int socket, size_t n_tiles, const char *prefix)
{
    struct bells *bells = calloc(1, sizeof *bells + n_tiles * sizeof *bells->names);
    if (!bells)
        return NULL;
    bells->socket = socket, bells->n_tiles = n_tiles;
    bells->headers = calloc(n_tiles, sizeof *bells->headers);
    bells->messages = calloc(n_tiles, sizeof *bells->messages);
    int whole = bells->headers && bells->messages;
    for (size_t tile = 0; whole && tile < n_tiles; tile++) {
        struct sockaddr_un *name = &bells->names[tile];
        name->sun_family = AF_UNIX;
        whole = snprintf(name->sun_path, sizeof name->sun_path, "%s%zu", prefix, tile) < (int)sizeof name->sun_path;
    }
    if (whole)
        return bells;
    rapa_bells_free(bells);
    return NULL;
}

/* Write a ring for each of some tiles, all for the same cycle, on the rows of a passage whose patches (…, k) and outputs
 * (…, c_out) begin at these floats of the arena.
 *
 * first, last: of each tile, its first row and one past its last. last_ring: by tile the number of its newest ring.
 * row_ns: nanoseconds for which an answer is held, for each row. draw: number of the passage. */
EXPORT void rapa_write_rings(struct ring *rings, const uint32_t *tiles, const int64_t *first, const int64_t *last,
                             size_t count, const uint64_t *last_ring, uint64_t number, uint32_t cycle, uint64_t patches,
                             uint64_t outputs, uint64_t k, uint64_t c_out, double rate, double decay, double row_ns,
                             uint64_t rung_ns, uint64_t draw)
{
    for (size_t i = 0; i < count; i++)
        rings[i] = (struct ring){
            .number = number,
            .cycle = cycle,
            .rows = (uint32_t)(last[i] - first[i]),
            .patches = patches + (uint64_t)first[i] * k,
            .outputs = outputs + (uint64_t)first[i] * c_out,
            .rate = rate,
            .decay = decay,
            .hold_ns = (uint64_t)((double)(last[i] - first[i]) * row_ns),
            .rung_ns = rung_ns,
            .after = last_ring[tiles[i]],
            .draw = draw,
        };
}

/* Send a message to each of some tiles, of one ring or a few; a tile that is down misses it.
 *
 * tiles: their numbers, each below n_tiles and once. rings: `together` arrays of `count` rings. wait: whether to give a
 * tile that has no room the moment that the socket has. left: set to 1 for each that has none even so, else to 0.
 * Returns how many have none, or -errno. */
EXPORT int rapa_ring(struct bells *bells, uint64_t token, const uint32_t *tiles, struct ring *const *rings,
                     size_t together, size_t count, int wait, uint8_t *left)
{
    for (size_t i = 0; i < count; i++) {
        for (size_t j = 0; j < together; j++) {
            rings[j][i].token = token;
            bells->messages[i][j] = (struct iovec){&rings[j][i], sizeof(struct ring)};
        }
        bells->headers[i].msg_hdr = (struct msghdr){
            .msg_name = &bells->names[tiles[i]],
            .msg_namelen = sizeof bells->names[0],
            .msg_iov = bells->messages[i],
            .msg_iovlen = together,
        };
        left[i] = 0;
    }
    int n_left = 0;
    for (size_t done = 0; done < count;) {
        const int sent = sendmmsg(bells->socket, bells->headers + done, count - done, wait ? 0 : MSG_DONTWAIT);
        if (sent > 0) {
            done += (size_t)sent;
            continue;
        }
        if (errno == EINTR)
            continue;
        if (errno == EAGAIN)
            n_left++, left[done] = 1;
        else if (errno != ECONNREFUSED && errno != ENOENT && errno != ECONNRESET)
            return -errno;
        done++;
    }
    return n_left;
}
