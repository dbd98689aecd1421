// The search for codes with 64-byte vectors.
#include "search.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define POLYBIT_VECTOR 64
#define POLYBIT_REGISTERS 32
#include "search_scale.h"

const polybit::SearchSet* polybit::avx512_search() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) return nullptr;
  static const SearchSet set = {make_search<Single>("avx512"), make_search<Twice>("avx512")};
  return &set;
}
#else
const polybit::SearchSet* polybit::avx512_search() { return nullptr; }
#endif
