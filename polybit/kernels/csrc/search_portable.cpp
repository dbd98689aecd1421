// The search for codes with 16-byte vectors, which the compiler lowers to whatever the target has.
#include "search.h"

#define POLYBIT_VECTOR 16
#if defined(__aarch64__)
#define POLYBIT_REGISTERS 32
#else
#define POLYBIT_REGISTERS 16
#endif
#include "search_scale.h"

const polybit::SearchSet* polybit::portable_search() {
#if defined(__aarch64__)
  const char* name = "neon";  // every 64-bit Arm has it
#else
  const char* name = "portable";
#endif
  static const SearchSet set = {make_search<Single>(name), make_search<Twice>(name)};
  return &set;
}
