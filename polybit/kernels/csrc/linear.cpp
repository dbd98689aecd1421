// A whole linear layer: activations rounded once, row blocks shared out among threads.
#include "linear.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "half.h"

namespace polybit {
namespace {

int available_threads() {
#if defined(_OPENMP)
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

// A buffer that grows and stays with its thread: allocating and touching fresh pages costs more than a small layer.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  void* reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = (bytes + 4095) / 4096 * 4096;
      memory_ = std::aligned_alloc(4096, size_);
      if (!memory_) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

float to_float(const void* values, Type type, size_t i) {
  if (type == Type::float32) return static_cast<const float*>(values)[i];
  const uint16_t raw = static_cast<const uint16_t*>(values)[i];
  if (type == Type::float16) return half_to_float(raw);
  const uint32_t bits = static_cast<uint32_t>(raw) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// One token as float32, multiplied by the column scale, padded with zeros to whole blocks.
void load_token(const Inputs& in, const Weight& w, int token, float* out) {
  const size_t first = static_cast<size_t>(token) * w.columns;
  if (in.type == Type::float32) {
    std::memcpy(out, static_cast<const float*>(in.x) + first, w.columns * sizeof(float));
  } else {
    for (int j = 0; j < w.columns; ++j) out[j] = to_float(in.x, in.type, first + j);
  }
  if (in.column_scale)
    for (int j = 0; j < w.columns; ++j) out[j] *= half_to_float(in.column_scale[j]);
  std::fill(out + w.columns, out + w.column_blocks * kColumns, 0.0f);
}

// `size` rows of digits from `first` on; a tile may be wider than what is left, its surplus is computed and dropped.
struct Tile {
  int first;
  int size;
  int kernel;  // index in kTileSizes
};

std::vector<Tile> cut_tiles(int count, int largest) {
  std::vector<Tile> tiles;
  int first = 0;
  while (first < count) {
    const int left = count - first;
    const int kernel = std::min(largest, left > 4 ? 3 : left > 2 ? 2 : left - 1);
    tiles.push_back({first, kTileSizes[kernel], kernel});
    first += kTileSizes[kernel];
  }
  return tiles;
}

// Everything about the rounded input, laid out tile after tile.
struct Packed {
  std::vector<Tile> tiles;
  int32_t* codes;  // a tile begins at first * column_blocks * 8
  float* scale;    // a tile begins at first * chunks
  float* shift;
  float* sum;
  float* row;      // per thread: one token as floats, then its digits
  size_t row_bytes;
  uint8_t* expanded;  // per thread: the codes of `kPanel` row blocks as bytes; null when no panels are made
  size_t expanded_bytes;
};

size_t round_up(size_t bytes) { return (bytes + 63) / 64 * 64; }

Packed lay_out(Scratch& scratch, const Kernels& kernels, const Weight& w, int digit_rows, int threads) {
  Packed p;
  p.tiles = cut_tiles(digit_rows, kernels.largest);
  const size_t rows = p.tiles.back().first + p.tiles.back().size;
  const size_t words = static_cast<size_t>(w.column_blocks) * 8;
  const size_t code_bytes = round_up(rows * words * 4), chunk_bytes = round_up(rows * w.chunks * 4);
  p.row_bytes = round_up(words * 16) + 2 * round_up(words * 4) + 3 * round_up(w.chunks * 4);
  // expanding pays when at least two full tiles use what was expanded
  const bool panels = kernels.panel[w.width] && digit_rows >= 2 * kTileSizes[kernels.largest];
  p.expanded_bytes = panels ? kPanel * words * kBlockBytes : 0;
  char* memory = static_cast<char*>(
      scratch.reserve(code_bytes + 2 * chunk_bytes + threads * (p.row_bytes + p.expanded_bytes)));
  p.expanded = panels ? reinterpret_cast<uint8_t*>(memory) : nullptr;
  memory += threads * p.expanded_bytes;
  p.codes = reinterpret_cast<int32_t*>(memory);
  p.scale = reinterpret_cast<float*>(memory + code_bytes);
  p.shift = reinterpret_cast<float*>(memory + code_bytes + chunk_bytes);
  p.row = reinterpret_cast<float*>(memory + code_bytes + 2 * chunk_bytes);
  return p;
}

// Rounds one token and puts its digits where their tiles want them: digit rows token*digits and the next.
void pack_token(const Kernels& kernels, const Weight& w, const Inputs& in, const Packed& p, int token, int thread) {
  const size_t words = static_cast<size_t>(w.column_blocks) * 8;
  char* memory = reinterpret_cast<char*>(p.row) + thread * p.row_bytes;
  float* values = reinterpret_cast<float*>(memory);
  int8_t* digit[2] = {reinterpret_cast<int8_t*>(memory + round_up(words * 16)),
                      reinterpret_cast<int8_t*>(memory + round_up(words * 16) + round_up(words * 4))};
  float* scale = reinterpret_cast<float*>(memory + round_up(words * 16) + 2 * round_up(words * 4));
  float* sum[2] = {scale + round_up(w.chunks * 4) / 4, scale + 2 * round_up(w.chunks * 4) / 4};

  load_token(in, w, token, values);
  const bool two = in.digits == 2;
  kernels.round(values, w.column_blocks * kColumns, w.chunk_blocks * kColumns, digit[0], two ? digit[1] : nullptr,
                scale, sum[0], sum[1]);
  for (int d = 0; d < in.digits; ++d) {
    const int row = token * in.digits + d;
    // all tiles but the last few have the largest size
    size_t t = std::min(static_cast<size_t>(row / kTileSizes[kernels.largest]), p.tiles.size() - 1);
    while (row >= p.tiles[t].first + p.tiles[t].size) ++t;
    const Tile& tile = p.tiles[t];
    const int lane = row - tile.first;
    int32_t* codes = p.codes + tile.first * words + lane;
    if (tile.size == 1) {
      std::memcpy(codes, digit[d], words * 4);
    } else {
      for (size_t k = 0; k < words; ++k) std::memcpy(codes + k * tile.size, digit[d] + 4 * k, 4);
    }
    const float shift = !w.zero && !w.ratio ? kernels.shift[w.width][tile.kernel](w) : 1.0f;
    const float weight = two && d == 0 ? 256.0f : 1.0f;
    const size_t at = static_cast<size_t>(tile.first) * w.chunks + lane;
    for (int c = 0; c < w.chunks; ++c) {
      p.scale[at + static_cast<size_t>(c) * tile.size] = scale[c] * weight;
      p.shift[at + static_cast<size_t>(c) * tile.size] = sum[d][c] * shift;
    }
  }
}

// Writes the finished products of one row block: digits added, gain and bias applied, converted.
void write(const Weight& w, const Inputs& in, const Outputs& out, const Tile& tile, int row_block, const float* sums) {
  const int first_row = row_block * kRows;
  const int rows = std::min(kRows, w.rows - first_row);
  float bias[kRows] = {};
  if (out.bias)
    for (int r = 0; r < rows; ++r) bias[r] = to_float(out.bias, out.bias_type, first_row + r);
  for (int m = 0; m < tile.size; m += in.digits) {
    const int token = (tile.first + m) / in.digits;
    if (token >= in.tokens) return;
    float y[kRows];
    const float* one = sums + m * kRows;
    for (int r = 0; r < kRows; ++r) {
      const float total = in.digits == 2 ? one[r] + one[kRows + r] : one[r];
      y[r] = total * w.gain + bias[r];
    }
    const size_t at = static_cast<size_t>(token) * w.rows + first_row;
    if (in.type == Type::float32) {
      std::memcpy(static_cast<float*>(out.y) + at, y, rows * sizeof(float));
    } else {
      uint16_t* half = static_cast<uint16_t*>(out.y) + at;
      for (int r = 0; r < rows; ++r) half[r] = in.type == Type::bfloat16 ? float_to_bfloat(y[r]) : float_to_half(y[r]);
    }
  }
}

}  // namespace

void linear(const Kernels& kernels, const Weight& w, const Inputs& in, const Outputs& out) {
  static thread_local Scratch scratch;
  if (!in.tokens || !w.rows) return;
  const int digit_rows = in.tokens * in.digits;
  const double work = static_cast<double>(w.rows) * w.columns * digit_rows;
  const int threads = work < 1 << 17 ? 1 : std::min(available_threads(), w.row_blocks);
  const Packed p = lay_out(scratch, kernels, w, digit_rows, threads);
  const bool rounds_alone = in.tokens == 1;
  if (rounds_alone) pack_token(kernels, w, in, p, 0, 0);

  // Many tokens pass a few row blocks while those are in the second-level cache; one tile reads long runs of memory.
  const bool many = p.tiles.size() > 1;
  const int run = many ? kPanel : std::max(1, w.row_blocks / (threads * 8));
  const int runs = (w.row_blocks + run - 1) / run;
  const auto tokens_of = [&](const Tile& tile) {
    const size_t first = static_cast<size_t>(tile.first);
    return Tokens{p.codes + first * w.column_blocks * 8, p.scale + first * w.chunks, p.shift + first * w.chunks};
  };
  const auto do_run = [&](int index, int thread) {
    alignas(64) float sums[kPanel * 8 * kRows];
    const int begin = index * run, end = std::min(w.row_blocks, begin + run);
    uint8_t* expanded = p.expanded && end - begin == kPanel ? p.expanded + thread * p.expanded_bytes : nullptr;
    if (expanded) {
      for (int r = 0; r < kPanel; ++r)
        kernels.expand[w.width](w, begin + r, expanded + r * (p.expanded_bytes / kPanel));
    }
    for (const Tile& tile : p.tiles) {
      const Tokens tokens = tokens_of(tile);
      if (expanded && tile.kernel == kernels.largest) {
        kernels.panel[w.width](w, expanded, tokens, begin, sums);
        for (int r = 0; r < kPanel; ++r) write(w, in, out, tile, begin + r, sums + r * tile.size * kRows);
        continue;
      }
      for (int row_block = begin; row_block < end; ++row_block) {
        kernels.tile[w.width][tile.kernel](w, tokens, row_block, sums);
        write(w, in, out, tile, row_block, sums);
      }
    }
  };
  if (threads == 1) {
    if (!rounds_alone)
      for (int token = 0; token < in.tokens; ++token) pack_token(kernels, w, in, p, token, 0);
    for (int index = 0; index < runs; ++index) do_run(index, 0);
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  {
    if (!rounds_alone) {
#pragma omp for schedule(static)
      for (int token = 0; token < in.tokens; ++token) pack_token(kernels, w, in, p, token, omp_get_thread_num());
    }
#pragma omp for schedule(dynamic, 1) nowait
    for (int index = 0; index < runs; ++index) do_run(index, omp_get_thread_num());
  }
#endif
}

void decode(const Kernels& kernels, const Weight& w, const uint16_t* column_scale, float* out) {
  std::vector<float> columns(column_scale ? w.columns : 0);
  for (size_t j = 0; j < columns.size(); ++j) columns[j] = half_to_float(column_scale[j]);
  const float* scale = column_scale ? columns.data() : nullptr;
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, 4) num_threads(available_threads())
#endif
  for (int row_block = 0; row_block < w.row_blocks; ++row_block)
    kernels.decode[w.width](w, row_block, scale, out);
}

uint64_t read(const Kernels& kernels, const void* bytes, size_t count) {
  const char* memory = static_cast<const char*>(bytes);
  uint64_t result = 0;
  const int pieces = available_threads() * 8;
  const size_t piece = count / pieces / 256 * 256;
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, 1) reduction(^ : result) num_threads(available_threads())
#endif
  for (int i = 0; i < pieces; ++i) result ^= kernels.read(memory + i * piece, piece);
  return result;
}

double multiply(const Kernels& kernels, long count) {
  const int threads = available_threads();
  uint64_t result = 0;
#if defined(_OPENMP)
#pragma omp parallel for schedule(static) reduction(^ : result) num_threads(threads)
#endif
  for (int i = 0; i < threads; ++i) result ^= kernels.multiply(count + static_cast<long>(result));
  return static_cast<double>(count) * threads * kernels.multiply_operations;
}

}  // namespace polybit
