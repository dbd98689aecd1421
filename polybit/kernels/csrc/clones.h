// A function compiled for several processors, of which the loader takes the best.
#pragma once

#include <cstdint>  // says which C library this is

#if !defined(__x86_64__) || !defined(__GLIBC__) || !defined(__GNUC__) || defined(__clang__)
#define POLYBIT_CLONES
#elif __GNUC__ < 12  // does not choose by level
#define POLYBIT_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define POLYBIT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
