// The first of an adapter's two products: narrow, so its sums run along the inputs, LANES at a time. A sum is the
// same whatever rows and ranks are computed beside it.
#include "cpu_adapters.h"

#include <algorithm>

namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MOST_ROWS = 4;
#else
constexpr int MOST_ROWS = 2;
#endif
constexpr int RANKS = 4;
// So many rows of `a` at a time: they stay in the cache while the rows pass.
constexpr int RANKS_AT_ONCE = 8;
// Fewer multiplications than these are done faster by one thread than shared out.
constexpr int64_t WORTH_SHARING = 1 << 16;

// z[r][n] = a's row n times x[r], R rows and N ranks.
template <int R, int N>
void tile(const float* const* x, const float* a, int64_t inputs, float* const* z) {
  Floats acc[R][N] = {};
  int64_t k = 0;
  for (; k + LANES <= inputs; k += LANES) {
    Floats w[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) w[n] = load(a + n * inputs + k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Floats v = load(x[r] + k);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] += v * w[n];
    }
  }
  const int rest = (int)(inputs - k);
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) {
      if (rest) acc[r][n] += load_some(x[r] + k, rest) * load_some(a + n * inputs + k, rest);
      z[r][n] = sum(acc[r][n]);
    }
}

template <int R>
void rows_times(const float* const* x, const float* a, int ranks, int64_t inputs, float* const* z) {
  float* to[R];
  int n = 0;
  for (; n + RANKS <= ranks; n += RANKS) {
    for (int r = 0; r < R; ++r) to[r] = z[r] + n;
    tile<R, RANKS>(x, a + n * inputs, inputs, to);
  }
  for (; n < ranks; ++n) {
    for (int r = 0; r < R; ++r) to[r] = z[r] + n;
    tile<R, 1>(x, a + n * inputs, inputs, to);
  }
}

}  // namespace

void multiply_a(int threads, const LayerAdapters& on, Input input, const float* x, int64_t inputs) {
  if (!on.pass) return;
  const Adapters& pass = *on.pass;
  int64_t most = 0, work = 0;
  for (int64_t g = 0; g < pass.num_groups; ++g) {
    const int64_t ranks = pass.adapters[pass.groups[g].which][on.layer].ranks[input];
    most = std::max(most, ranks);
    work += ranks * inputs * pass.groups[g].count;
  }
  const int64_t blocks = (most + RANKS_AT_ONCE - 1) / RANKS_AT_ONCE;
  for_each(work < WORTH_SHARING ? 1 : threads, pass.num_groups * blocks, [&](int64_t item) {
    const Group& group = pass.groups[item / blocks];
    const LayerUpdates& updates = pass.adapters[group.which][on.layer];
    const int first = (int)(item % blocks) * RANKS_AT_ONCE;
    const int ranks = std::min(RANKS_AT_ONCE, updates.ranks[input] - first);
    if (ranks <= 0) return;
    const float* a = updates.a[input] + first * inputs;
    for (int at = 0; at < group.count;) {
      const float* from[MOST_ROWS];
      float* to[MOST_ROWS];
      const int rows = std::min(MOST_ROWS, group.count - at) == MOST_ROWS ? MOST_ROWS : 1;
      for (int r = 0; r < rows; ++r) {
        const int64_t row = pass.order[group.first + at + r];
        from[r] = x + row * inputs;
        to[r] = pass.z + row * pass.step + first;
      }
      if (rows == MOST_ROWS) rows_times<MOST_ROWS>(from, a, ranks, inputs, to);
      else rows_times<1>(from, a, ranks, inputs, to);
      at += rows;
    }
  });
}
