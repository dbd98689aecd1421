// A whole linear layer: activations rounded once, row blocks shared out among threads.
#pragma once

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

struct Outputs {
  void* y;  // [tokens][rows], in the type of the input
  const void* bias;
  Type bias_type;
};

void linear(const Kernels& kernels, const Weight& weight, const Inputs& in, const Outputs& out);

// The float weight [rows][columns].
void decode(const Kernels& kernels, const Weight& weight, const uint16_t* column_scale, float* out);

// Reads memory with all threads.
uint64_t read(const Kernels& kernels, const void* bytes, size_t count);

// Runs `count` dot instructions in every thread; returns the operations done.
double multiply(const Kernels& kernels, long count);

}  // namespace polybit
