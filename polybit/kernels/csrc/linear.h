// Whole linear layers: activations rounded once, row blocks shared out among threads.
#pragma once

#include <vector>

#include "problem.h"

namespace polybit {

enum class Type { float32 = 0, bfloat16 = 1, float16 = 2 };

struct Inputs {
  const void* x;  // [tokens][columns]
  Type type;
  int tokens;
  const uint16_t* column_scale;  // binary16 [columns] that multiplies the input, or null
  int digits;                    // int8 digits of an activation code: 1 or 2
};

// A low-rank part beside the stored weight: y += scale * up (down x), of the input as it came.
struct Adapter {
  const uint16_t* down;  // binary16 [rank][columns padded to whole blocks]
  const uint16_t* up;    // binary16 [row_blocks][rank][16]
  int rank;
  float scale;
};

// One of the weights that are multiplied by the same input.
struct Member {
  const Weight* weight;
  void* y;  // [tokens][rows], in the type of the input
  const void* bias;
  Type bias_type;
  const Adapter* adapter;  // or null
};

// All members in one pass: the input is rounded once. They share columns, chunks and the column scale.
void linear(const Kernels& kernels, const Inputs& in, const Member* members, int count);

// The float weight [rows][columns].
void decode(const Kernels& kernels, const Weight& weight, const uint16_t* column_scale, float* out);

// Some rows of it, [rows.size()][columns].
void decode_rows(const Kernels& kernels, const Weight& weight, const uint16_t* column_scale, const std::vector<int>& rows,
                 float* out);

// Reads memory with all threads.
uint64_t read(const Kernels& kernels, const void* bytes, size_t count);

// Runs `count` dot instructions in every thread; returns the operations done.
double multiply(const Kernels& kernels, long count);

}  // namespace polybit
