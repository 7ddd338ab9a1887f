/* The loop of a tile's process: wait for a ring, do its cycle, hold the answer if an array would be slower, answer.
 *
 * What serve() of rapa_dist/fabric/serving.py does, with the messages of rapa_dist/fabric/doorbell.py, as fast as a
 * process can wake up: between two cycles others have had its core, and whatever is touched here has to come from afar.
 */

#include "rings.h"
#include "tile.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>

struct answer {
    uint64_t token, number;
    uint32_t tile;
    int32_t status;
};

enum status { DONE = 0, FAILED = 2 };

struct loop {
    struct tile *tile;
    float *arena;
    uint64_t floats; /* of the arena */
    const uint64_t *board;
    uint64_t token, failed; /* number of the last ring that failed here */
    uint64_t free_ns;       /* when the array that this tile stands for is done with its last cycle */
    uint32_t number;
    int bell;
    struct sockaddr_un answers;
};

/* Serve a tile that has this number: rings come on the socket `bell`, answers go to the one named `answers`.
 * Returns NULL where there is no memory, or the name is too long. */
EXPORT struct loop *rapa_loop_new(struct tile *tile, float *arena, uint64_t floats, const uint64_t *board,
                                  uint64_t token, uint32_t number, int bell, const char *answers)
{
    struct loop *loop = calloc(1, sizeof *loop);
    if (!loop || strlen(answers) >= sizeof loop->answers.sun_path) {
        free(loop);
        return NULL;
    }
    loop->tile = tile, loop->arena = arena, loop->floats = floats, loop->board = board;
    loop->token = token, loop->number = number, loop->bell = bell;
    loop->answers.sun_family = AF_UNIX;
    strcpy(loop->answers.sun_path, answers);
    return loop;
}

EXPORT void rapa_loop_free(struct loop *loop)
{
    free(loop);
}


static int answer(const struct loop *loop, uint64_t number, enum status status)
{
    const struct answer message = {loop->token, number, loop->number, status};
    ssize_t sent;
    do
        sent = sendto(loop->bell, &message, sizeof message, 0, (const struct sockaddr *)&loop->answers,
                      sizeof loop->answers);
    while (sent < 0 && errno == EINTR);
    return sent < 0 ? errno : 0;
}

/* Whether rows of so many floats, from a place on, lie in the arena. */
static int is_in_arena(const struct loop *loop, uint64_t at, uint64_t rows, uint64_t columns)
{
    return at <= loop->floats && rows <= (loop->floats - at) / columns;
}

/* Whether a ring asks for a cycle that there is, on rows that there are. */
static int makes_sense(const struct loop *loop, const struct ring *ring)
{
    const uint32_t backward = DO_INPUT_ERROR | DO_UPDATE | DO_COMMIT;
    const int known = ring->cycle == DO_FORWARD || ring->cycle == DO_DISCARD || (ring->cycle & ~backward) == 0;
    return known && is_in_arena(loop, ring->patches, ring->rows, loop->tile->k) &&
           is_in_arena(loop, ring->outputs, ring->rows, loop->tile->c_out);
}

static void compute(const struct loop *loop, const struct ring *ring)
{
    struct tile *tile = loop->tile;
    float *patches = loop->arena + ring->patches, *outputs = loop->arena + ring->outputs;
    if (ring->cycle == DO_FORWARD) {
        tile->words[STATE] = FORWARD;
        rapa_tile_forward(tile, patches, outputs, ring->rows);
    } else if (ring->cycle == DO_DISCARD) {
        rapa_tile_discard(tile, ring->number);
    } else if (ring->cycle) {
        tile->words[STATE] = BACKWARD;
        rapa_tile_backward(tile, patches, outputs, ring->rows, ring->number, (int)ring->cycle, ring->rate, ring->decay);
    }
}

static void hold(struct loop *loop, const struct ring *ring)
{
    loop->tile->words[STATE] = HOLDING;
    loop->free_ns = (loop->free_ns > ring->rung_ns ? loop->free_ns : ring->rung_ns) + ring->hold_ns;
    const struct timespec until = {(time_t)(loop->free_ns / 1000000000), (long)(loop->free_ns % 1000000000)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR)
        ;
}

/* Returns 0, or why nobody could be told of it, as errno. */
static int obey(struct loop *loop, const struct ring *ring)
{
    uint64_t *words = loop->tile->words;
    if (ring->token != loop->token || ring->number <= loop->failed)
        return 0;
    if (ring->number <= words[ANSWERED])
        return 0; /* done, by this process or one before it; the rows may be in use again */
    if (ring->after > words[ANSWERED])
        return 0; /* a ring was missed, or its cycle failed: that one has to come first */
    if (!makes_sense(loop, ring)) {
        fprintf(stderr, "Ring %llu asks for cycle %u on %u rows at %llu and %llu; the arena has %llu floats.\n",
                (unsigned long long)ring->number, ring->cycle, ring->rows, (unsigned long long)ring->patches,
                (unsigned long long)ring->outputs, (unsigned long long)loop->floats);
        loop->failed = ring->number;
        return answer(loop, ring->number, FAILED);
    }
    compute(loop, ring);
    if (ring->hold_ns)
        hold(loop, ring);
    words[STATE] = IDLE;
    store(&words[ANSWERED], ring->number);
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* done is written, and then it is looked who is awaited: see board.py */
    if (__atomic_load_n(loop->board, __ATOMIC_RELAXED) == (uint64_t)loop->number + 1)
        return answer(loop, ring->number, DONE);
    return 0;
}

/* Obey the rings of one message; what is none is ignored. Returns as `obey` does. */
int rapa_obey(struct loop *loop, const void *message, size_t length)
{
    if (length % sizeof(struct ring) || length > MOST_RINGS * sizeof(struct ring))
        return 0;
    for (size_t at = 0; at < length; at += sizeof(struct ring)) {
        struct ring ring;
        memcpy(&ring, (const char *)message + at, sizeof ring);
        const int failure = obey(loop, &ring);
        if (failure)
            return failure;
    }
    return 0;
}

/* Serve until the socket fails or nobody hears the answers; returns errno. */
EXPORT int rapa_serve(struct loop *loop)
{
    char message[MOST_RINGS * sizeof(struct ring) + 1]; /* one byte more: what is longer shows */
    for (;;) {
        const ssize_t length = recv(loop->bell, message, sizeof message, 0);
        if (length < 0 && errno != EINTR)
            return errno;
        const int failure = length > 0 ? rapa_obey(loop, message, (size_t)length) : 0;
        if (failure)
            return failure;
    }
}
