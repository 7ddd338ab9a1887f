/* Work on a few threads: whoever calls does a part of it, and waits for the others. */

#ifndef RAPA_PARALLEL_H
#define RAPA_PARALLEL_H

#include <stddef.h>

enum { MOST_PARTS = 16 };

/* Does part number `part` of `parts`. */
typedef void some_work(void *what, size_t part, size_t parts);

/* Have work done in parts, as many as there are threads (rapa_threads) and at most `most`. */
void in_parts(some_work *work, void *what, size_t most);

/* Where part number `part` of `count` things begins. */
static inline size_t begin_of(size_t count, size_t part, size_t parts)
{
    return count * part / parts;
}

#endif
