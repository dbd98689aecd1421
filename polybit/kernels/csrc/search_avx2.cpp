// The search for codes with 32-byte vectors.
#include "search.h"

#if defined(__AVX2__) && defined(__FMA__)
#define POLYBIT_VECTOR 32
#define POLYBIT_REGISTERS 16
#include "search_scale.h"

const polybit::SearchSet* polybit::avx2_search() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return nullptr;
  static const SearchSet set = {make_search<Single>("avx2"), make_search<Twice>("avx2")};
  return &set;
}
#else
const polybit::SearchSet* polybit::avx2_search() { return nullptr; }
#endif
