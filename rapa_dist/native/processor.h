/* What vectors the processor has, and the system saves. */

#ifndef RAPA_PROCESSOR_H
#define RAPA_PROCESSOR_H

int has_avx2(void); /* and fused multiply-add */
int has_avx512(void);

#endif
