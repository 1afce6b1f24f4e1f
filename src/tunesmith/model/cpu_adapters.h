// Low-rank updates of a layer's projections, every row of a pass with its own adapter's or none.
#pragma once
#include "cpu_kernels.h"

// Projections that share their input share the first product: q, k, v; gate, up.
enum Input { TO_QKV, TO_O, TO_GATE_UP, TO_DOWN, INPUTS };
enum Projection { Q, K, V, O, GATE, UP, DOWN, PROJECTIONS };

// b [rank, outputs], scaled; rows column … column + rank - 1 of its input's `a` belong to it. rank 0: nothing.
struct Update {
  const float* b;
  int32_t column, rank;
};

// One adapter on one layer; Python has the same structures (fused_adapters). a[i] [ranks[i], inputs].
struct LayerUpdates {
  const float* a[INPUTS];
  Update to[PROJECTIONS];
  int32_t ranks[INPUTS];
};

// Rows first … first + count - 1 of `order` have the adapter `which`.
struct Group {
  int32_t which, first, count;
};

// The adapters of a pass. adapters[which][layer]; owner [T]: each row's adapter or -1; order: the rows that have
// one. z [T, step]: room for the first products.
struct Adapters {
  const LayerUpdates* const* adapters;
  const int32_t* owner;
  const int32_t* order;
  const Group* groups;
  float* z;
  int64_t num_groups, step;
};

// The adapters, if any, on one layer.
struct LayerAdapters {
  const Adapters* pass;
  int64_t layer;
};

// z = a x for every row that has an adapter there; x [T, inputs].
void multiply_a(int threads, const LayerAdapters& on, Input input, const float* x, int64_t inputs);

// y += the row's own update of a projection's outputs first … first + count - 1, from z.
inline void add_update(const LayerAdapters& on, Projection projection, int64_t row, int64_t first, int count,
                       int64_t outputs, float* y) {
  if (!on.pass || on.pass->owner[row] < 0) return;
  const Update& update = on.pass->adapters[on.pass->owner[row]][on.layer].to[projection];
  if (!update.rank) return;
  const float* z = on.pass->z + row * on.pass->step + update.column;
  const float* b = update.b + first;
  int i = 0;
  for (; i + 2 * LANES <= count; i += 2 * LANES) {
    Floats one = load(y + i), other = load(y + i + LANES);
    for (int32_t r = 0; r < update.rank; ++r) {
      const Floats by = splat(z[r]);
      one += by * load(b + r * outputs + i);
      other += by * load(b + r * outputs + i + LANES);
    }
    store(y + i, one);
    store(y + i + LANES, other);
  }
  for (; i < count; ++i)
    for (int32_t r = 0; r < update.rank; ++r) y[i] += z[r] * b[r * outputs + i];
}
