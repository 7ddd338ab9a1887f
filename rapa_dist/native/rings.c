/* Rings of many tiles in one system call: see NodeDoorbell of rapa_dist/fabric/doorbell.py. */

#define _GNU_SOURCE /* sendmmsg */

#include "tile.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/un.h>

struct bells {
    int socket;
    size_t n_tiles;
    struct mmsghdr *headers; /* one for each tile, as all the others here */
    struct iovec *messages;
    struct sockaddr_un names[];
};

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
    free(bells->headers), free(bells->messages), free(bells);
    return NULL;
}

EXPORT void rapa_bells_free(struct bells *bells)
{
    free(bells->headers), free(bells->messages), free(bells);
}

/* Send a message of `length` bytes to each of some tiles; a tile that is down misses it.
 *
 * tiles: their numbers, each below n_tiles and once. messages: (count, length). wait: whether to give a tile that has no
 * room for it the moment that the socket has. left: set to 1 for each that has none even so, else to 0.
 * Returns 0, or errno. */
EXPORT int rapa_ring(struct bells *bells, const uint32_t *tiles, const void *messages, size_t count, size_t length,
                     int wait, uint8_t *left)
{
    for (size_t i = 0; i < count; i++) {
        bells->messages[i] = (struct iovec){(char *)messages + i * length, length};
        bells->headers[i].msg_hdr = (struct msghdr){
            .msg_name = &bells->names[tiles[i]],
            .msg_namelen = sizeof bells->names[0],
            .msg_iov = &bells->messages[i],
            .msg_iovlen = 1,
        };
        left[i] = 0;
    }
    for (size_t done = 0; done < count;) {
        const int sent = sendmmsg(bells->socket, bells->headers + done, count - done, wait ? 0 : MSG_DONTWAIT);
        if (sent > 0) {
            done += (size_t)sent;
            continue;
        }
        if (errno == EINTR)
            continue;
        if (errno == EAGAIN)
            left[done] = 1;
        else if (errno != ECONNREFUSED && errno != ENOENT && errno != ECONNRESET)
            return errno;
        done++;
    }
    return 0;
}
