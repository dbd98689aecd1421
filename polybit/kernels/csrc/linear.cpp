// Whole linear layers: activations rounded once, row blocks shared out among threads.
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

// One token as float32, padded with zeros to whole blocks.
void load_token(const Inputs& in, const Weight& w, int token, float* out) {
  const size_t first = static_cast<size_t>(token) * w.columns;
  if (in.type == Type::float32) {
    std::memcpy(out, static_cast<const float*>(in.x) + first, w.columns * sizeof(float));
  } else {
    for (int j = 0; j < w.columns; ++j) out[j] = to_float(in.x, in.type, first + j);
  }
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

// The rounded input in the order in which one or several members read it, laid out tile after tile.
struct Pack {
  const Place* places;
  int32_t* codes;  // a tile begins at first * column_blocks * 8
  float* scale;    // a tile begins at first * chunks
  float* sum;

  Tokens of(const Tile& tile, const Weight& w, const Segment& s) const {
    const size_t first = tile.first, size = tile.size, chunk = first * w.chunks + s.first_chunk * size;
    return {codes + (first * w.column_blocks + s.first_block * size) * 8, scale + chunk, sum + chunk};
  }
};

constexpr int kBatch = 16;  // row blocks whose sums are held at the same time

size_t round_up(size_t bytes) { return (bytes + 63) / 64 * 64; }

bool same_places(const Place* a, const Place* b, int chunks) {
  return a == b || (a && b && std::memcmp(a, b, chunks * sizeof(Place)) == 0);
}

// One call: its members, their input as it is rounded once, and how the work is cut.
class Call {
 public:
  Call(Scratch& scratch, const Kernels& kernels, const Inputs& in, const Member* members, int count)
      : kernels_(kernels), in_(in), members_(members), count_(count), w_(*members->weight), pack_of_(count) {
    double work = 0;
    int row_blocks = 0;
    for (int i = 0; i < count; ++i) {
      work += static_cast<double>(members[i].weight->rows) * w_.columns * in.tokens * in.digits;
      row_blocks += members[i].weight->row_blocks;
    }
    threads = work < 1 << 17 ? 1 : std::min(available_threads(), row_blocks);
    tiles_ = cut_tiles(in.tokens * in.digits, kernels.largest);
    lay_out(scratch);
    // Many tokens pass a few row blocks while those are in the second-level cache; one tile reads long runs of memory.
    run_ = tiles_.size() > 1 ? kPanel : std::max(1, row_blocks / (threads * 8));
    runs = 0;
    for (int i = 0; i < count; ++i) runs += runs_of(i);
  }

  int threads;
  int runs;

  void pack_token(int token, int thread) const;
  void do_run(int index, int thread) const;

 private:
  int runs_of(int member) const { return (members_[member].weight->row_blocks + run_ - 1) / run_; }
  void lay_out(Scratch& scratch);
  void place(const Pack& pack, int row, const int8_t* digit, const float* scale, float weight, const float* sum) const;
  void write(int member, const Tile& tile, int row_block, const float* sums) const;

  const Kernels& kernels_;
  const Inputs& in_;
  const Member* members_;
  int count_;
  const Weight& w_;  // the first member's: what all members share
  std::vector<int> pack_of_;
  std::vector<Pack> packs_;
  std::vector<Tile> tiles_;
  int run_;
  char* row_;  // per thread: one token as floats, then its digits, scales and sums
  size_t row_bytes_;
  uint8_t* expanded_;  // per thread: the codes of `kPanel` row blocks as bytes; null when no panels are made
  size_t expanded_bytes_;
  float* lowered_;  // per member and token what the adapter's first half gives, times its scale
};

void Call::lay_out(Scratch& scratch) {
  const size_t rows = tiles_.back().first + tiles_.back().size;
  const size_t words = static_cast<size_t>(w_.column_blocks) * 8;
  const size_t code_bytes = round_up(rows * words * 4), chunk_bytes = round_up(rows * w_.chunks * 4);
  row_bytes_ = round_up(words * 16) + 2 * round_up(words * 4) + 3 * round_up(w_.chunks * 4);
  // expanding pays when at least two full tiles use what was expanded
  const bool panels = kernels_.panel[1] && in_.tokens * in_.digits >= 2 * kTileSizes[kernels_.largest];
  expanded_bytes_ = panels ? kPanel * words * kBlockBytes : 0;
  size_t ranks = 0;
  for (int i = 0; i < count_; ++i) {
    const Place* places = members_[i].weight->places;
    size_t pack = 0;
    while (pack < packs_.size() && !same_places(packs_[pack].places, places, w_.chunks)) ++pack;
    if (pack == packs_.size()) packs_.push_back({places, nullptr, nullptr, nullptr});
    pack_of_[i] = static_cast<int>(pack);
    if (members_[i].adapter) ranks += members_[i].adapter->rank;
  }
  const size_t pack_bytes = code_bytes + 2 * chunk_bytes;
  char* memory = static_cast<char*>(scratch.reserve(threads * (row_bytes_ + expanded_bytes_) +
                                                    packs_.size() * pack_bytes + ranks * in_.tokens * sizeof(float)));
  expanded_ = panels ? reinterpret_cast<uint8_t*>(memory) : nullptr;
  memory += threads * expanded_bytes_;
  for (Pack& pack : packs_) {
    pack.codes = reinterpret_cast<int32_t*>(memory);
    pack.scale = reinterpret_cast<float*>(memory + code_bytes);
    pack.sum = reinterpret_cast<float*>(memory + code_bytes + chunk_bytes);
    memory += pack_bytes;
  }
  row_ = memory;
  lowered_ = reinterpret_cast<float*>(memory + threads * row_bytes_);
}

// Rounds one token and puts its digits where their tiles want them: digit rows token*digits and the next.
void Call::pack_token(int token, int thread) const {
  const size_t words = static_cast<size_t>(w_.column_blocks) * 8;
  char* memory = row_ + thread * row_bytes_;
  float* values = reinterpret_cast<float*>(memory);
  int8_t* digit[2] = {reinterpret_cast<int8_t*>(memory + round_up(words * 16)),
                      reinterpret_cast<int8_t*>(memory + round_up(words * 16) + round_up(words * 4))};
  float* scale = reinterpret_cast<float*>(memory + round_up(words * 16) + 2 * round_up(words * 4));
  float* sum[2] = {scale + round_up(w_.chunks * 4) / 4, scale + 2 * round_up(w_.chunks * 4) / 4};

  load_token(in_, w_, token, values);
  float* lowered = lowered_;
  for (int i = 0; i < count_; ++i) {
    const Adapter* adapter = members_[i].adapter;
    if (!adapter) continue;
    float* out = lowered + static_cast<size_t>(token) * adapter->rank;
    kernels_.project(adapter->down, adapter->rank, w_.column_blocks * kColumns, values, out);
    for (int j = 0; j < adapter->rank; ++j) out[j] *= adapter->scale;
    lowered += static_cast<size_t>(in_.tokens) * adapter->rank;
  }
  if (in_.column_scale)
    for (int j = 0; j < w_.columns; ++j) values[j] *= half_to_float(in_.column_scale[j]);
  const bool two = in_.digits == 2;
  kernels_.round(values, w_.column_blocks * kColumns, w_.chunk_blocks * kColumns, digit[0], two ? digit[1] : nullptr,
                 scale, sum[0], sum[1]);
  for (int d = 0; d < in_.digits; ++d)
    for (const Pack& pack : packs_) place(pack, token * in_.digits + d, digit[d], scale, two && !d ? 256.0f : 1.0f, sum[d]);
}

// One row of digits into its tile, chunk by chunk.
void Call::place(const Pack& pack, int row, const int8_t* digit, const float* scale, float weight, const float* sum) const {
  // all tiles but the last few have the largest size
  size_t t = std::min(static_cast<size_t>(row / kTileSizes[kernels_.largest]), tiles_.size() - 1);
  while (row >= tiles_[t].first + tiles_[t].size) ++t;
  const Tile& tile = tiles_[t];
  const size_t lane = row - tile.first, size = tile.size;
  int32_t* codes = pack.codes + static_cast<size_t>(tile.first) * w_.column_blocks * 8 + lane;
  const size_t at = static_cast<size_t>(tile.first) * w_.chunks + lane;
  const size_t words = static_cast<size_t>(w_.column_blocks) * 8, chunk_words = w_.chunk_blocks * 8;
  if (size == 1 && !pack.places) {
    std::memcpy(codes, digit, 4 * words);
    std::memcpy(pack.scale + at, scale, w_.chunks * sizeof(float));
    std::memcpy(pack.sum + at, sum, w_.chunks * sizeof(float));
    for (int c = 0; weight != 1.0f && c < w_.chunks; ++c) pack.scale[at + c] *= weight;
    return;
  }
  for (int c = 0; c < w_.chunks; ++c) {
    const size_t first = c * chunk_words, count = std::min(chunk_words, words - first);
    const size_t to = pack.places ? static_cast<size_t>(pack.places[c].block) * 8 : first;
    const size_t slot = pack.places ? pack.places[c].chunk : c;
    if (size == 1) {
      std::memcpy(codes + to, digit + 4 * first, 4 * count);
    } else {
      for (size_t k = 0; k < count; ++k) std::memcpy(codes + (to + k) * size, digit + 4 * (first + k), 4);
    }
    pack.scale[at + slot * size] = scale[c] * weight;
    pack.sum[at + slot * size] = sum[c];
  }
}

// Writes the finished products of one row block: digits added, gain, bias and adapter applied, converted.
void Call::write(int member, const Tile& tile, int row_block, const float* sums) const {
  const Member& to = members_[member];
  const Weight& w = *to.weight;
  const int first_row = row_block * kRows;
  const int rows = std::min(kRows, w.rows - first_row);
  const float* lowered = lowered_;
  for (int i = 0; i < member; ++i)
    if (members_[i].adapter) lowered += static_cast<size_t>(in_.tokens) * members_[i].adapter->rank;
  float bias[kRows] = {};
  if (to.bias)
    for (int r = 0; r < rows; ++r) bias[r] = to_float(to.bias, to.bias_type, first_row + r);
  for (int m = 0; m < tile.size; m += in_.digits) {
    const int token = (tile.first + m) / in_.digits;
    if (token >= in_.tokens) return;
    alignas(64) float y[kRows];
    const float* one = sums + m * kRows;
    for (int r = 0; r < kRows; ++r) {
      const float total = in_.digits == 2 ? one[r] + one[kRows + r] : one[r];
      y[r] = total * w.gain + bias[r];
    }
    if (to.adapter) {
      const size_t rank = to.adapter->rank;
      kernels_.lift(to.adapter->up + row_block * rank * kRows, to.adapter->rank, lowered + token * rank, y);
    }
    const size_t at = static_cast<size_t>(token) * w.rows + first_row;
    if (in_.type == Type::float32) {
      std::memcpy(static_cast<float*>(to.y) + at, y, rows * sizeof(float));
    } else {
      uint16_t* half = static_cast<uint16_t*>(to.y) + at;
      for (int r = 0; r < rows; ++r) half[r] = in_.type == Type::bfloat16 ? float_to_bfloat(y[r]) : float_to_half(y[r]);
    }
  }
}

// Runs ahead of the kernels over a weight whose neighbouring columns are read at several widths and fetches, where a
// wider segment begins, the planes that not all segments read; the others are one stream, which the kernels and the
// processor see to.
class Scout {
 public:
  Scout(const Weight& w, int row_block) : w_(w), row_block_(row_block) {
    for (int i = 0; i < w.segment_count; ++i) base_ = std::min(base_, w.segments[i].width);
  }

  // The kernels go on to read `blocks` blocks.
  void pass(int blocks) {
    while (lead_ < kLead && row_block_ < w_.row_blocks) {
      const Segment& s = w_.segments[at_];
      for (int p = base_; p < s.width; ++p) {
        const uint8_t* line = s.planes + p * s.plane_stride + row_block_ * s.row_stride;
        for (int k = 0; k < std::min(s.blocks, kBeginning); ++k) __builtin_prefetch(line + k * kBlockBytes, 0, 2);
      }
      lead_ += s.blocks;
      if (++at_ == w_.segment_count) at_ = 0, ++row_block_;
    }
    lead_ -= blocks;
  }

 private:
  static constexpr int kLead = 40, kBeginning = 16;  // blocks
  const Weight& w_;
  int row_block_;
  int at_ = 0;
  int lead_ = 0;
  int base_ = 8;
};

// Some row blocks of one member, for all tokens.
void Call::do_run(int index, int thread) const {
  int member = 0;
  for (; index >= runs_of(member); ++member) index -= runs_of(member);
  const Weight& w = *members_[member].weight;
  const Pack& pack = packs_[pack_of_[member]];
  alignas(64) float sums[kBatch * 8 * kRows];
  const int begin = index * run_, end = std::min(w.row_blocks, begin + run_);
  uint8_t* expanded = expanded_ && end - begin == kPanel ? expanded_ + thread * expanded_bytes_ : nullptr;
  const size_t stride = expanded_bytes_ / kPanel;
  const Segment* const segments_end = w.segments + w.segment_count;
  if (expanded) {
    for (const Segment* s = w.segments; s < segments_end; ++s)
      for (int r = 0; r < kPanel; ++r)
        kernels_.expand[s->width](*s, begin + r, expanded + r * stride + static_cast<size_t>(s->first_block) * 8 * kBlockBytes);
  }
  for (const Tile& tile : tiles_) {
    if (expanded && tile.kernel == kernels_.largest) {
      std::memset(sums, 0, kPanel * tile.size * kRows * sizeof(float));
      for (const Segment* s = w.segments; s < segments_end; ++s)
        kernels_.panel[s->width](*s, expanded + static_cast<size_t>(s->first_block) * 8 * kBlockBytes, stride,
                                 pack.of(tile, w, *s), begin, sums);
      for (int r = 0; r < kPanel; ++r) write(member, tile, begin + r, sums + r * tile.size * kRows);
      continue;
    }
    // Parts that lie apart are read for several row blocks in turn, so that each is a long run of memory.
    const int batch = w.places ? kBatch : 1;
    Scout scout(w, begin);
    for (int first = begin; first < end; first += batch) {
      const int rows = std::min(batch, end - first);
      const size_t size = static_cast<size_t>(tile.size) * kRows;
      std::memset(sums, 0, rows * size * sizeof(float));
      for (const Segment* s = w.segments; s < segments_end; ++s) {
        const Tokens tokens = pack.of(tile, w, *s);
        const auto kernel = kernels_.tile[w.segment_count > 1][s->width][tile.kernel];
        if (batch == 1 && w.segment_count > 1) scout.pass(s->blocks);
        for (int r = 0; r < rows; ++r) kernel(*s, tokens, first + r, sums + r * size);
      }
      for (int r = 0; r < rows; ++r) write(member, tile, first + r, sums + r * size);
    }
  }
}

}  // namespace

void linear(const Kernels& kernels, const Inputs& in, const Member* members, int count) {
  static thread_local Scratch scratch;
  if (!in.tokens || !count) return;
  const Call call(scratch, kernels, in, members, count);
  const bool rounds_alone = in.tokens == 1;
  if (rounds_alone) call.pack_token(0, 0);
  if (call.threads == 1) {
    if (!rounds_alone)
      for (int token = 0; token < in.tokens; ++token) call.pack_token(token, 0);
    for (int index = 0; index < call.runs; ++index) call.do_run(index, 0);
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel num_threads(call.threads)
  {
    if (!rounds_alone) {
#pragma omp for schedule(static)
      for (int token = 0; token < in.tokens; ++token) call.pack_token(token, omp_get_thread_num());
    }
#pragma omp for schedule(dynamic, 1) nowait
    for (int index = 0; index < call.runs; ++index) call.do_run(index, omp_get_thread_num());
  }
#endif
}

namespace {

std::vector<float> floats_of(const uint16_t* column_scale, int columns) {
  std::vector<float> found(column_scale ? columns : 0);
  for (size_t j = 0; j < found.size(); ++j) found[j] = half_to_float(column_scale[j]);
  return found;
}

}  // namespace

void decode(const Kernels& kernels, const Weight& w, const uint16_t* column_scale, float* out) {
  const std::vector<float> columns = floats_of(column_scale, w.columns);
  const float* scale = column_scale ? columns.data() : nullptr;
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, 4) num_threads(available_threads())
#endif
  for (int row_block = 0; row_block < w.row_blocks; ++row_block)
    for (const Segment* s = w.segments; s < w.segments + w.segment_count; ++s)
      kernels.decode[s->width](w, *s, row_block, scale, out + static_cast<size_t>(row_block) * kRows * w.columns);
}

void decode_rows(const Kernels& kernels, const Weight& w, const uint16_t* column_scale, const std::vector<int>& rows,
                 float* out) {
  const std::vector<float> columns = floats_of(column_scale, w.columns);
  const float* scale = column_scale ? columns.data() : nullptr;
  std::vector<float> block(static_cast<size_t>(kRows) * w.columns);
  for (size_t i = 0; i < rows.size(); ++i) {
    for (const Segment* s = w.segments; s < w.segments + w.segment_count; ++s)
      kernels.decode[s->width](w, *s, rows[i] / kRows, scale, block.data());
    std::copy_n(block.data() + static_cast<size_t>(rows[i] % kRows) * w.columns, w.columns, out + i * w.columns);
  }
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
