/* What the library says of itself. */

#include "tile.h"

/* A digest of the files and flags that this was made from: see build.py. */
EXPORT const char *rapa_sources(void)
{
    return RAPA_SOURCES;
}

EXPORT const char *rapa_compiler(void)
{
#ifdef __clang__
    return __VERSION__;
#else
    return "GCC " __VERSION__;
#endif
}
