// What a kernel is given: a segment of a weight in nested bit planes, a tile of rounded tokens, and the table of one
// instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace polybit {

constexpr int kRows = 16;          // rows of a block
constexpr int kColumns = 32;       // columns of a block
constexpr int kBlockBytes = 64;    // bytes of a block in one plane
constexpr int kTileSizes[] = {1, 2, 4, 8};  // tokens that pass a block together
constexpr int kTiles = 4;
constexpr int kPanel = 2;  // row blocks that meet a tile together once their codes are expanded

// Neighbouring columns of one weight, as stored, that are read alike: what a kernel is given. The value at width b of B
// stored bits is
//   s * (2^(B-b) * r * (p - (2^b-1)/2) + (2^B-1)/2 - z),  p = the b most significant bits of the code.
// Columns are cut into chunks that share one activation scale; a group of columns (one s, z, r) is whole chunks.
struct Segment {
  const uint8_t* planes;  // first block; [B][row_blocks][stored blocks][64], most significant plane first
  size_t plane_stride;    // bytes from one plane to the next
  size_t row_stride;      // bytes from one row block to the next
  const uint16_t* scale;  // binary16 [row_blocks][slots][16], from the segment's first group on
  const uint8_t* zero;    // [row_blocks][slots][16], or null: `fixed_zero` everywhere
  const uint8_t* ratio;   // [row_blocks][slots][8], nibbles of rows r and r+8, or null: `ratios[0]` everywhere
  const int32_t* columns;  // block of the weight's columns at which each chunk begins
  alignas(64) float ratios[16];
  alignas(64) float factors[16];   // 2^(B-b) * r
  alignas(64) float inverses[16];  // of the factors
  float fixed_zero;
  float offset;  // (c_B - fixed_zero) * inverses[0]
  int bits;      // B
  int width;     // b
  int slots;
  int blocks;
  int chunk_blocks;  // blocks in a chunk: 1, 2 or 4
  int last_blocks;   // blocks in the last chunk
  int group_shift;   // slot of a chunk = chunk >> group_shift
  int chunks;
  int first_block;  // where the segment's activations begin among those of the weight, in blocks and in chunks
  int first_chunk;
};

// Where the activations of a chunk of columns go: first block, and number of the chunk.
struct Place {
  int32_t block;
  int32_t chunk;
};

// One weight matrix as it is read now: its columns in segments, their activations one after another.
struct Weight {
  const Segment* segments;
  int segment_count;
  const Place* places;  // of every chunk in the order of the columns; null: they stay where they are
  float gain;          // a power of two that multiplies every scale
  int rows;
  int columns;
  int row_blocks;
  int column_blocks;
  int chunk_blocks;
  int chunks;
};

// Rounded activations of M tokens (for 16-bit activations: digits of tokens), M being the tile's size.
struct Tokens {
  const int32_t* codes;  // [blocks * 8][M], four int8 codes of neighbouring columns in each word
  const float* scale;    // [chunks][M]
  const float* sum;      // [chunks][M], sum of the codes of a chunk
};

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  int largest;  // index in kTileSizes of the largest tile there is
  // out[M][16] += one row block of a segment times M tokens, without gain; [has several segments][width][index of M
  // in kTileSizes]
  void (*tile[2][9][kTiles])(const Segment&, const Tokens&, int row_block, float* out);
  // For many tokens: a row block's codes written out once as bytes [blocks][8][64], then `kPanel` such row blocks (the
  // first of them `row_block`, `codes_stride` bytes apart) times a tile of the largest size, out[kPanel][M][16] += that.
  // Null where `tile` is as good.
  void (*expand[9])(const Segment&, int row_block, uint8_t* codes);
  void (*panel[9])(const Segment&, const uint8_t* codes, size_t codes_stride, const Tokens&, int row_block, float* out);
  // rounds `columns` activations (a multiple of 32) chunk by chunk; `low` is null for 8-bit activations
  void (*round)(const float* x, int columns, int chunk, int8_t* high, int8_t* low, float* scale, float* sum_high,
                float* sum_low);
  // the float weight [16][columns] of one row block of a segment, bit for bit as the reference computes it; [width]
  void (*decode[9])(const Weight&, const Segment&, int row_block, const float* column_scale, float* out);
  // low-rank parts in binary16: out[rank] = down[rank][count] x, and out[16] += up[rank][16]^T t
  void (*project)(const uint16_t* down, int rank, int count, const float* x, float* out);
  void (*lift)(const uint16_t* up, int rank, const float* t, float* out);
  uint64_t (*read)(const void* bytes, size_t count);  // reads memory as fast as it can
  uint64_t (*multiply)(long count);                   // `count` independent 8-bit dot instructions of one register
  int multiply_operations;                            // additions and multiplications in each of them
};

// Null where the compiler could not build the set or this processor cannot run it.
const Kernels* avx512_kernels();
const Kernels* avxvnni_kernels();
const Kernels* avx2_kernels();
const Kernels* neon_kernels();
const Kernels* portable_kernels();

}  // namespace polybit
