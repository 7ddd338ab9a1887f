/* Sends random messages, near-rings among them, to a tile's loop; compiled with sanitizers by test_native.py. Whatever
 * comes, the loop may write nowhere but into its rows and cells, and what is no ring of its run's changes nothing.
 *
 *     messages COUNT SEED
 */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "rings.h"
#include "tile.h"

struct loop;
struct loop *rapa_loop_new(struct tile *tile, float *arena, uint64_t floats, const uint64_t *board, uint64_t token,
                           uint32_t number, int bell, const char *answers);
void rapa_loop_free(struct loop *loop);
int rapa_obey(struct loop *loop, const void *message, size_t length);

enum { K = 7, C_OUT = 5, FLOATS = 600, CELLS = PAGE + 6 * 48 * 4, TILE = 3 };
static const uint64_t TOKEN = 0x0123456789abcdef;
static const char ANSWERS[] = "answers";

static uint64_t draw(void)
{
    static uint64_t state = 1;
    state += 0x9e3779b97f4a7c15;
    uint64_t z = state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

/* A number near something that matters, or any. */
static uint64_t some(uint64_t limit)
{
    const uint64_t edges[] = {0, 1, limit / 2, limit - 1, limit, limit + 1, UINT32_MAX, UINT64_MAX, UINT64_MAX - limit};
    const uint64_t which = draw() % 16;
    return which < 9 ? edges[which] : which < 15 ? draw() % (limit + 1) : draw();
}

static struct ring some_ring(const uint64_t *words)
{
    const uint32_t cycles[] = {0, DO_FORWARD, DO_DISCARD, DO_INPUT_ERROR, DO_UPDATE, DO_UPDATE | DO_COMMIT,
                               DO_UPDATE | DO_COMMIT | DO_INPUT_ERROR, DO_COMMIT, 32, DO_FORWARD | DO_UPDATE};
    const int usual = draw() % 4 > 0;
    static uint64_t newest = 10;
    struct ring ring = {
        .token = draw() % 8 ? TOKEN : draw(),
        .number = draw() % 8 ? ++newest : newest - draw() % 3, /* one that failed is not tried again */
        .cycle = draw() % 8 ? cycles[draw() % 10] : (uint32_t)draw(),
        .rows = (uint32_t)(usual ? draw() % 30 : some(FLOATS / C_OUT)),
        .patches = usual ? draw() % 300 : some(FLOATS),
        .outputs = usual ? 300 + draw() % 150 : some(FLOATS),
        .rate = 0.01,
        .decay = draw() % 2 ? 1e-4 : -1e300,
        .hold_ns = draw() % 64 ? 0 : draw() % 1000, /* longer ones are obeyed, and take as long */
        .rung_ns = 0,
        .after = draw() % 8 ? words[ANSWERED] : draw(),
    };
    return ring;
}

static int listener(void)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    strcpy(name.sun_path, ANSWERS);
    unlink(ANSWERS);
    const int found = socket(AF_UNIX, SOCK_DGRAM, 0);
    return found < 0 || bind(found, (struct sockaddr *)&name, sizeof name) ? -1 : found;
}

int main(int count_of_arguments, char **arguments)
{
    if (count_of_arguments < 3 || !rapa_choose(NULL))
        return 2;
    const long count = atol(arguments[1]);
    for (long skipped = atol(arguments[2]); skipped > 0; skipped--)
        draw();
    if (!getenv("SHOW"))
        stderr = fopen("/dev/null", "w"); /* the loop's own messages; sanitizers write to the descriptor */
    const int answers = listener(), bell = socket(AF_UNIX, SOCK_DGRAM, 0);
    float *arena = malloc(FLOATS * sizeof *arena);
    uint64_t *cells = calloc(1, CELLS), *board = malloc(8);
    void *before = malloc(CELLS + FLOATS * sizeof *arena);
    for (size_t i = 0; i < FLOATS; i++)
        arena[i] = 0.001f * (float)i;
    struct tile *tile = rapa_tile_new(cells, K, C_OUT, 1);
    struct loop *loop = rapa_loop_new(tile, arena, FLOATS, board, TOKEN, TILE, bell, ANSWERS);
    if (!loop || answers < 0 || bell < 0)
        return 2;
    long obeyed = 0, ignored = 0;
    for (long i = 0; i < count; i++) {
        const size_t rings = draw() % 6;
        size_t length = rings * sizeof(struct ring);
        if (draw() % 4 == 0)
            length = draw() % (6 * sizeof(struct ring));
        char *message = malloc(length + !length); /* of just this size */
        for (size_t at = 0; at < length; at++)
            message[at] = (char)draw();
        int ours = length && length % sizeof(struct ring) == 0 && length <= MOST_RINGS * sizeof(struct ring);
        int with_token = 0;
        for (size_t at = 0; at + sizeof(struct ring) <= length; at += sizeof(struct ring)) {
            const struct ring ring = some_ring(cells);
            memcpy(message + at, &ring, sizeof ring);
            with_token |= ring.token == TOKEN;
        }
        *board = draw() % 2 ? TILE + 1 : draw() % 5;
        memcpy(before, cells, CELLS);
        memcpy((char *)before + CELLS, arena, FLOATS * sizeof *arena);
        if (rapa_obey(loop, message, length))
            return 3;
        if (ours && with_token)
            obeyed++;
        else if (memcmp(before, cells, CELLS) || memcmp((char *)before + CELLS, arena, FLOATS * sizeof *arena))
            return 4;
        else
            ignored++;
        free(message);
        char answer[64];
        while (recv(answers, answer, sizeof answer, MSG_DONTWAIT) >= 0)
            ;
    }
    printf("%ld of %ld messages obeyed, %llu rows done\n", obeyed, obeyed + ignored,
           (unsigned long long)(cells[ROWS_FORWARD] + cells[ROWS_BACKWARD] + cells[ROWS_UPDATE]));
    rapa_loop_free(loop), rapa_tile_free(tile);
    free(arena), free(cells), free(board), free(before);
    unlink(ANSWERS);
    return 0;
}
