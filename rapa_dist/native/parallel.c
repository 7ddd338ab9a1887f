#include "parallel.h"

#include "tile.h"

#include <pthread.h>
#include <stdint.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER, one_at_a_time = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t begin = PTHREAD_COND_INITIALIZER, end = PTHREAD_COND_INITIALIZER;
static size_t n_threads = 1, n_started = 1; /* whoever calls is the first */
static some_work *current;
static void *of_what;
static size_t n_parts, n_left;
static uint64_t round_number;

static void *serve(void *number)
{
    const size_t me = (size_t)(uintptr_t)number;
    uint64_t seen = 0;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (round_number == seen)
            pthread_cond_wait(&begin, &lock);
        seen = round_number;
        if (me >= n_parts)
            continue;
        some_work *work = current;
        void *what = of_what;
        const size_t parts = n_parts;
        pthread_mutex_unlock(&lock);
        work(what, me, parts);
        pthread_mutex_lock(&lock);
        if (--n_left == 0)
            pthread_cond_signal(&end);
    }
    return NULL;
}

void in_parts(some_work *work, void *what, size_t most)
{
    const size_t parts = most < n_threads ? most : n_threads;
    if (parts <= 1) {
        work(what, 0, 1);
        return;
    }
    pthread_mutex_lock(&one_at_a_time);
    pthread_mutex_lock(&lock);
    current = work, of_what = what, n_parts = parts, n_left = parts - 1;
    round_number++;
    pthread_cond_broadcast(&begin);
    pthread_mutex_unlock(&lock);
    work(what, 0, parts);
    pthread_mutex_lock(&lock);
    while (n_left)
        pthread_cond_wait(&end, &lock);
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&one_at_a_time);
}

/* Use so many threads, the caller's among them, as far as they can be had; returns how many that are. Call it while no
 * work is under way. */
EXPORT size_t rapa_threads(size_t wanted)
{
    const size_t most = wanted < MOST_PARTS ? wanted : MOST_PARTS;
    for (; n_started < most; n_started++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, serve, (void *)(uintptr_t)n_started))
            break;
        pthread_detach(thread);
    }
    n_threads = most < 1 ? 1 : most < n_started ? most : n_started;
    return n_threads;
}
