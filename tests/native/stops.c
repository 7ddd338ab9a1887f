/* Kills a tile's cycle between any two instructions, repeats it, and compares the bits: test_tile.py's test of the same
 * name, for the library. A traced child does the cycle one instruction at a time on memory that this process shares;
 * whenever that memory has changed, what a kill would leave behind is kept, and tried afterwards. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tile.h"

enum { K = 12, C_OUT = 5, ROWS = 9, KERNEL = (K + 1) * C_OUT, PADDED = (KERNEL + 15) / 16 * 16 };
enum { NO_TRACE = 77 };

/* What outlives a tile's process: its cells, and its rows in the arena. */
struct body {
    union {
        uint64_t words[PAGE / 8];
        char page[PAGE];
    };
    float buffers[3][2][PADDED];
    float patches[ROWS * K], errors[ROWS * C_OUT];
};

struct result {
    float kernel[KERNEL], later[KERNEL], patches[ROWS * K], errors[ROWS * C_OUT];
    uint64_t step;
};

static struct body *body;
static struct body *moments;
static size_t n_moments, room;

static void fail(const char *why, size_t moment)
{
    printf("%s, moment %zu of %zu\n", why, moment, n_moments);
    exit(1);
}

static void fill(float *floats, size_t count)
{
    for (size_t i = 0; i < count; i++)
        floats[i] = (float)rand() / (float)RAND_MAX - 0.5f;
}

/* A cycle of a process that has just come up, on some memory. */
static void ring(struct body *on, uint64_t cycle, int flags)
{
    struct tile *tile = rapa_tile_new(on, K, C_OUT, 1);
    rapa_tile_backward(tile, on->patches, on->errors, ROWS, cycle, flags, 0.1, 0.02);
    rapa_tile_free(tile);
}

static const float *kernel_of(const struct body *on)
{
    return on->buffers[on->words[COMMIT] & 3][0];
}

/* The bits that count: the kernel, that after one more part of the mini-batch, the rows, and the step. */
static void read_result(struct body *on, struct result *result)
{
    memset(result, 0, sizeof *result);
    result->step = on->words[STEP];
    memcpy(result->kernel, kernel_of(on), sizeof result->kernel);
    memcpy(result->patches, on->patches, sizeof result->patches);
    memcpy(result->errors, on->errors, sizeof result->errors);
    ring(on, 6, DO_UPDATE | DO_COMMIT);
    memcpy(result->later, kernel_of(on), sizeof result->later);
}

static void keep(void)
{
    if (n_moments == room && !(moments = realloc(moments, (room = 2 * room + 64) * sizeof *moments)))
        exit(2);
    moments[n_moments++] = *body;
}

/* Do a cycle one instruction at a time, and keep every state that the memory is in. */
static void trace(uint64_t cycle, int flags)
{
    n_moments = 0;
    keep();
    const pid_t child = fork();
    if (child == 0) {
        if (ptrace(PTRACE_TRACEME, 0, NULL, NULL))
            _exit(NO_TRACE);
        raise(SIGSTOP);
        ring(body, cycle, flags);
        _exit(0);
    }
    int status;
    for (waitpid(child, &status, 0); WIFSTOPPED(status); waitpid(child, &status, 0)) {
        if (memcmp(body, &moments[n_moments - 1], sizeof *body))
            keep();
        if (ptrace(PTRACE_SINGLESTEP, child, NULL, NULL)) {
            kill(child, SIGKILL);
            exit(NO_TRACE);
        }
    }
    if (!WIFEXITED(status) || WEXITSTATUS(status))
        exit(WIFEXITED(status) ? WEXITSTATUS(status) : 3);
}

static void check(uint64_t cycle, int flags, const struct result *undisturbed, size_t moment)
{
    struct result result;
    ring(body, cycle, flags);
    read_result(body, &result);
    if (memcmp(&result, undisturbed, sizeof result))
        fail("killed and repeated, other bits", moment);
}

/* Returns how many moments were tried. */
static size_t try_all(const struct body *start, int flags)
{
    static struct body whole;
    struct result undisturbed;
    whole = *start;
    const struct result *expected = &undisturbed;
    float before[KERNEL], after[KERNEL];
    memcpy(before, kernel_of(&whole), sizeof before);
    ring(&whole, 5, flags);
    memcpy(after, kernel_of(&whole), sizeof after);
    read_result(&whole, &undisturbed);

    *body = *start;
    trace(5, flags);
    size_t tried = n_moments;
    for (size_t i = 0; i < n_moments; i++) {
        const float *in_force = kernel_of(&moments[i]);
        if (memcmp(in_force, before, sizeof before) && memcmp(in_force, after, sizeof after))
            fail("a kernel in force that is neither the old one nor the new one", i);
        *body = moments[i];
        check(5, flags, expected, i);
    }
    /* Killed once more while it is repeated. */
    struct body *first = moments;
    const size_t n_first = n_moments;
    moments = NULL, room = 0;
    for (size_t i = 7; i < n_first; i += n_first / 5 + 1) {
        *body = first[i];
        trace(5, flags);
        for (size_t j = i % 5; j < n_moments; j += 5, tried++) {
            *body = moments[j];
            check(5, flags, expected, j);
        }
    }
    free(first);
    return tried;
}

int main(void)
{
    size_t tried = 0;
    body = mmap(NULL, sizeof *body, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (body == MAP_FAILED || !rapa_choose(NULL))
        return 2;
    static struct body start;
    fill(start.buffers[0][0], KERNEL);
    fill(start.patches, ROWS * K);
    fill(start.errors, ROWS * C_OUT);
    struct body untouched = start;
    ring(&untouched, 3, DO_UPDATE | DO_COMMIT);
    struct body after_a_part = untouched;
    ring(&after_a_part, 4, DO_UPDATE | DO_INPUT_ERROR);
    for (int input_error = 0; input_error <= DO_INPUT_ERROR; input_error += DO_INPUT_ERROR)
        for (int commit = 0; commit <= DO_COMMIT; commit += DO_COMMIT) {
            tried += try_all(&untouched, DO_UPDATE | input_error | commit);
            tried += try_all(&after_a_part, DO_UPDATE | input_error | commit);
        }
    tried += try_all(&untouched, DO_INPUT_ERROR);
    printf("%zu moments\n", tried);
    return 0;
}
