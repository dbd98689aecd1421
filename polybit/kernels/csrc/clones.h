// A function compiled for several processors, of which the loader takes the best.
#pragma once

#include <cstdint>  // says which C library this is

// GCC chooses by level from 12 on; by instruction set GCC 10 and its linker made a jump into nothing
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define POLYBIT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define POLYBIT_CLONES
#endif
