// What a kernel is given: a weight in nested bit planes, a tile of rounded tokens, and the table of one instruction set.
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

// One weight matrix at one width. Its value at width b of B stored bits is
//   s * (2^(B-b) * r * (p - (2^b-1)/2) + (2^B-1)/2 - z),  p = the b most significant bits of the code.
// Columns are cut into chunks that share one activation scale; a group of columns (one s, z, r) is whole chunks.
struct Weight {
  const uint8_t* planes;  // [b][row_blocks][column_blocks][64], most significant plane first
  size_t plane_stride;    // bytes from one plane to the next
  const uint16_t* scale;  // binary16 [row_blocks][groups][16]
  const uint8_t* zero;    // [row_blocks][groups][16], or null: `fixed_zero` everywhere
  const uint8_t* ratio;   // [row_blocks][groups][8], nibbles of rows r and r+8, or null: `ratios[0]` everywhere
  float gain;             // a power of two that multiplies every scale
  float fixed_zero;
  float ratios[16];
  int bits;   // B
  int width;  // b
  int rows;
  int columns;
  int row_blocks;
  int column_blocks;
  int groups;
  int chunk_blocks;  // blocks in a chunk: 1, 2 or 4
  int group_shift;   // group of a chunk = chunk >> group_shift
  int chunks;
};

// Rounded activations of M tokens (for 16-bit activations: digits of tokens), M being the tile's size.
struct Tokens {
  const int32_t* codes;  // [column_blocks * 8][M], four int8 codes of neighbouring columns in each word
  const float* scale;    // [chunks][M]
  const float* shift;    // [chunks][M], sum of the codes of a chunk, times Kernels::shift where the weight is uniform
};

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  int largest;  // index in kTileSizes of the largest tile there is
  // out[M][16] = one row block times M tokens, without gain; [width][index of M in kTileSizes]
  void (*tile[9][kTiles])(const Weight&, const Tokens&, int row_block, float* out);
  // For many tokens: a row block's codes written out once as bytes [column_blocks][8][64], then `kPanel` such row blocks
  // (the first of them `row_block`) times a tile of the largest size, out[kPanel][M][16]. Null where `tile` is as good.
  void (*expand[9])(const Weight&, int row_block, uint8_t* codes);
  void (*panel[9])(const Weight&, const uint8_t* codes, const Tokens&, int row_block, float* out);
  // what multiplies Tokens::shift of a uniform weight (no `zero`, no `ratio`)
  float (*shift[9][kTiles])(const Weight&);
  // rounds `columns` activations (a multiple of 32) chunk by chunk; `low` is null for 8-bit activations
  void (*round)(const float* x, int columns, int chunk, int8_t* high, int8_t* low, float* scale, float* sum_high,
                float* sum_low);
  // the float weight of one row block, bit for bit as the reference computes it; [width]
  void (*decode[9])(const Weight&, int row_block, const float* column_scale, float* out);
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
