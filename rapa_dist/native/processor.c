/* Asked of the processor itself: what compilers offer for it does not work in a library with each of them. */

#include "processor.h"

#if defined(__x86_64__)

#include <cpuid.h>

enum { FMA = 1 << 12, OSXSAVE = 1 << 27, AVX = 1 << 28 }; /* leaf 1, ecx */
enum { AVX2 = 1 << 5, AVX512F = 1 << 16 };                 /* leaf 7, ebx */
enum { SAVES_AVX = 0x06, SAVES_AVX512 = 0xe6 };            /* of the registers that the system saves */

/* Slow under a hypervisor, which has to answer. */
static int look_for(unsigned wanted, unsigned saved)
{
    unsigned eax, ebx, ecx, edx;
    const unsigned first = FMA | OSXSAVE | AVX;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (ecx & first) != first)
        return 0;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & saved) != saved)
        return 0;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (ebx & wanted) == wanted;
}

int has_avx2(void)
{
    static int found = -1;
    int known = __atomic_load_n(&found, __ATOMIC_RELAXED);
    if (known < 0)
        __atomic_store_n(&found, known = look_for(AVX2, SAVES_AVX), __ATOMIC_RELAXED);
    return known;
}

int has_avx512(void)
{
    return has_avx2() && look_for(AVX2 | AVX512F, SAVES_AVX512);
}

#else

int has_avx2(void)
{
    return 0;
}

int has_avx512(void)
{
    return 0;
}

#endif
