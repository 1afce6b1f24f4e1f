// Products of few or many rows with a matrix whose weights are read once, widened in registers.
#pragma once
#include "cpu_adapters.h"

// A panel holds the weights of this many neighbouring outputs, input after input.
constexpr int PANEL = 2 * LANES;
// So many inputs of an output share a scale in the format NF4.
constexpr int BLOCK = 64;

enum Format : int32_t { FP32 = 0, BF16 = 1, INT8 = 2, NF4 = 3 };

// A packed matrix [outputs, inputs]; Python has the same structure (served_weights.Matrix).
// scales: INT8 [panels, PANEL], one an output; NF4 [panels, blocks of inputs, PANEL]; else none.
// bias: [panels, PANEL] or none.
struct Matrix {
  const char* panels;
  const float* scales;
  const float* bias;
  int64_t outputs, inputs;
  int32_t format;
  int64_t num_panels() const { return (outputs + PANEL - 1) / PANEL; }
  int64_t num_blocks() const { return (inputs + BLOCK - 1) / BLOCK; }
};

// out [rows, step] = matrix times x with the rows' own updates, or that added to what is there.
struct Target {
  const Matrix* matrix;
  float* out;
  int64_t step;
  bool onto;
  LayerAdapters adapters;
  Projection projection;
};

void multiply(int threads, const float* x, int64_t rows, const Target* targets, int count);

// out [rows, outputs] = silu(gate x) * up x.
void multiply_swiglu(int threads, const float* x, int64_t rows, const Matrix& gate, const Matrix& up,
                     const LayerAdapters& adapters, float* out);
