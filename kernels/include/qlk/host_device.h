// Marks functions that run on the host and on a GPU alike. Everything in qlk/ is such a function: a formula on single
// values, without loops over memory, and compiled without fast-math, so that every device gives the same bits.
#pragma once

#ifdef __CUDACC__
#define QLK_HD __host__ __device__ __forceinline__
#else
#define QLK_HD inline __attribute__((always_inline))
#endif
