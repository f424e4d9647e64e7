/* OpenMP where the compiler has it. Without it, the kernels run on one thread. */
#ifndef KNN_SSD_PARALLEL_H
#define KNN_SSD_PARALLEL_H

#ifdef _OPENMP
#include <omp.h>
#define PRAGMA(...) _Pragma(#__VA_ARGS__)
#define OMP(...) PRAGMA(omp __VA_ARGS__)
#else
#define OMP(...)
static inline int omp_get_max_threads(void) { return 1; }
static inline int omp_get_thread_num(void) { return 0; }
#endif

#endif
