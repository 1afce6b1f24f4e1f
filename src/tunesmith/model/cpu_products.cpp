// A tile is the product of some rows with a panel or two, its sums held in registers. Every sum runs over the
// inputs in their order, whatever the tile's shape: a row's result does not depend on the rows beside it.
#include "cpu_products.h"

#include <algorithm>
#include <utility>

namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MOST_ROWS = 12;
#else
constexpr int MOST_ROWS = 6;
#endif
// So few rows take two panels at a time: the sums of one would wait for each other.
constexpr int FEW_ROWS = 3;
// Rows that one thread takes at a time: their numbers stay in its cache.
constexpr int64_t MOST_AT_ONCE = 96;
// So many bytes before they are needed, weights are asked for: the CPU's own look-ahead is too short.
constexpr int AHEAD = 4096;

// The code book of NF4 (Dettmers et al. 2023, arXiv:2305.14314, appendix E).
alignas(64) const float NF4_CODES[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
                             -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
                             0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f,
                             0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,
                             0.7229568362236023f, 1.0f};

inline Ints load_ints(const char* from) {
  Ints v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// LANES bytes as numbers. GCC 12 takes its vector conversion of bytes apart, hence the instructions' names.
inline Ints load_signed(const char* from) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  Ints v;
  for (int i = 0; i < LANES; ++i) v[i] = (signed char)from[i];
  return v;
#endif
}

struct Plain {
  static constexpr int BYTES = PANEL * 4;
  static void widen(const char* at, const Floats*, Floats* w) {
    w[0] = load((const float*)at);
    w[1] = load((const float*)at + LANES);
  }
};

// A word holds output j in its lower half and output LANES + j in its upper.
struct Brain {
  static constexpr int BYTES = PANEL * 2;
  static void widen(const char* at, const Floats*, Floats* w) {
    const Ints both = load_ints(at);
    w[0] = (Floats)(both << 16);
    w[1] = (Floats)(both & (int32_t)0xffff0000);
  }
};

struct Byte {
  static constexpr int BYTES = PANEL;
  static void widen(const char* at, const Floats*, Floats* w) {
    w[0] = __builtin_convertvector(load_signed(at), Floats);
    w[1] = __builtin_convertvector(load_signed(at + LANES), Floats);
  }
};

inline Floats nf4_values(Ints codes) {
#if defined(__AVX512F__)
  return (Floats)_mm512_permutexvar_ps((__m512i)codes, _mm512_load_ps(NF4_CODES));
#elif defined(__AVX2__)
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(NF4_CODES), (__m256i)codes);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(NF4_CODES + 8), (__m256i)codes);
  return (Floats)_mm256_blendv_ps(low, high, (__m256)(codes << 28));
#else
  Floats v;
  for (int i = 0; i < LANES; ++i) v[i] = NF4_CODES[codes[i] & 15];
  return v;
#endif
}

// A byte holds output j in its lower half and output LANES + j in its upper.
struct Nibble {
  static constexpr int BYTES = PANEL / 2;
  static void widen(const char* at, const Floats* scale, Floats* w) {
    const Ints both = load_signed(at);
    w[0] = nf4_values(both) * scale[0];
    w[1] = nf4_values(both >> 4) * scale[1];
  }
};

// out [R, P * PANEL] = R rows of x times P panels.
template <class F, int R, int P>
void tile(const float* x, const Matrix* const* m, const int64_t* panel, float* out) {
  const int64_t inputs = m[0]->inputs;
  const char* at[P];
  for (int p = 0; p < P; ++p) at[p] = m[p]->panels + panel[p] * inputs * F::BYTES;
  Floats acc[R][2 * P] = {};
  for (int64_t first = 0; first < inputs; first += BLOCK) {
    Floats scale[2 * P] = {};
    if (F::BYTES == Nibble::BYTES)
      for (int p = 0; p < P; ++p) {
        const float* s = m[p]->scales + (panel[p] * m[p]->num_blocks() + first / BLOCK) * PANEL;
        scale[2 * p] = load(s);
        scale[2 * p + 1] = load(s + LANES);
      }
    const int64_t end = std::min(first + BLOCK, inputs);
    for (int64_t k = first; k < end; ++k) {
      Floats w[2 * P];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) __builtin_prefetch(at[p] + k * F::BYTES + AHEAD);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) F::widen(at[p] + k * F::BYTES, scale + 2 * p, w + 2 * p);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Floats a = splat(x[r * inputs + k]);
#pragma GCC unroll 4
        for (int n = 0; n < 2 * P; ++n) acc[r][n] += a * w[n];
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < 2 * P; ++n) store(out + (r * 2 * P + n) * LANES, acc[r][n]);
}

typedef void (*Tile)(const float*, const Matrix* const*, const int64_t*, float*);

template <class F, int P, int... R>
Tile tile_of(int rows, std::integer_sequence<int, R...>) {
  static const Tile tiles[] = {tile<F, R + 1, P>...};
  return tiles[rows - 1];
}

template <class F>
Tile tile_of(int rows, int panels) {
  return panels == 2 ? tile_of<F, 2>(rows, std::make_integer_sequence<int, FEW_ROWS>())
                     : tile_of<F, 1>(rows, std::make_integer_sequence<int, MOST_ROWS>());
}

Tile tile_of(int32_t format, int rows, int panels) {
  switch (format) {
    case FP32: return tile_of<Plain>(rows, panels);
    case BF16: return tile_of<Brain>(rows, panels);
    case INT8: return tile_of<Byte>(rows, panels);
    default: return tile_of<Nibble>(rows, panels);
  }
}

// x's rows times the `panels` (1 or 2) given; then done(row, panel, its PANEL sums).
template <class Done>
void rows_times(const float* x, int64_t rows, const Matrix* const* m, const int64_t* panel, int panels,
                const Done& done) {
  alignas(64) float out[MOST_ROWS * 2 * PANEL];
  const int64_t groups = (rows + MOST_ROWS - 1) / MOST_ROWS;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = rows * g / groups;
    const int count = (int)(rows * (g + 1) / groups - first);
    const float* from = x + first * m[0]->inputs;
    if (count <= FEW_ROWS && panels == 2) {
      tile_of(m[0]->format, count, 2)(from, m, panel, out);
    } else {
      for (int p = 0; p < panels; ++p) {
        float* part = out + p * count * PANEL;
        tile_of(m[p]->format, count, 1)(from, m + p, panel + p, part);
      }
    }
    const bool side_by_side = count <= FEW_ROWS && panels == 2;
    for (int r = 0; r < count; ++r)
      for (int p = 0; p < panels; ++p)
        done(first + r, p, out + (side_by_side ? r * 2 + p : p * count + r) * PANEL);
  }
}

// In place: a panel's sums with the outputs' scales and biases.
void finish(const Matrix& m, int64_t panel, float* sums) {
  for (int i = 0; i < PANEL; i += LANES) {
    Floats v = load(sums + i);
    if (m.format == INT8) v *= load(m.scales + panel * PANEL + i);
    if (m.bias) v += load(m.bias + panel * PANEL + i);
    store(sums + i, v);
  }
}

void deliver(const Target& target, int64_t row, int64_t panel, float* sums) {
  finish(*target.matrix, panel, sums);
  const int64_t first = panel * PANEL, outputs = target.matrix->outputs;
  const int count = (int)std::min<int64_t>(PANEL, outputs - first);
  add_update(target.adapters, target.projection, row, first, count, outputs, sums);
  float* to = target.out + row * target.step + first;
  if (target.onto)
    for (int i = 0; i < count; ++i) to[i] += sums[i];
  else
    std::memcpy(to, sums, count * sizeof(float));
}

int64_t num_pairs(const Matrix& m) { return (m.num_panels() + 1) / 2; }

// body(first row, count of rows, item) for all items, with the rows cut where they are many.
template <class Body>
void for_rows_and(int threads, int64_t rows, int64_t items, const Body& body) {
  const int64_t cuts = (rows + MOST_AT_ONCE - 1) / MOST_AT_ONCE;
  for_each(threads, items * cuts, [&](int64_t i) {
    const int64_t cut = i % cuts, first = rows * cut / cuts;
    body(first, rows * (cut + 1) / cuts - first, i / cuts);
  });
}

}  // namespace

void multiply(int threads, const float* x, int64_t rows, const Target* targets, int count) {
  int64_t items = 0;
  for (int t = 0; t < count; ++t) items += num_pairs(*targets[t].matrix);
  for_rows_and(threads, rows, items, [&](int64_t first, int64_t some, int64_t item) {
    const Target* target = targets;
    for (; item >= num_pairs(*target->matrix); ++target) item -= num_pairs(*target->matrix);
    const Matrix* m[2] = {target->matrix, target->matrix};
    const int64_t panel[2] = {item * 2, item * 2 + 1};
    const int panels = panel[1] < m[0]->num_panels() ? 2 : 1;
    rows_times(x + first * m[0]->inputs, some, m, panel, panels, [&](int64_t row, int p, float* sums) {
      deliver(*target, first + row, panel[p], sums);
    });
  });
}

void multiply_swiglu(int threads, const float* x, int64_t rows, const Matrix& gate, const Matrix& up,
                     const LayerAdapters& adapters, float* out) {
  for_rows_and(threads, rows, gate.num_panels(), [&](int64_t first, int64_t some, int64_t item) {
    const Matrix* m[2] = {&gate, &up};
    const int64_t panel[2] = {item, item};
    const int64_t column = item * PANEL;
    const int count = (int)std::min<int64_t>(PANEL, gate.outputs - column);
    alignas(64) float open[PANEL];
    rows_times(x + first * gate.inputs, some, m, panel, 2, [&](int64_t row, int p, float* sums) {
      finish(*m[p], item, sums);
      add_update(adapters, p == 0 ? GATE : UP, first + row, column, count, gate.outputs, sums);
      if (p == 0) {
        for (int i = 0; i < PANEL; i += LANES) {
          const Floats g = load(sums + i);
          store(open + i, g / (1.0f + exp_of(-g)));
        }
        return;
      }
      for (int i = 0; i < PANEL; i += LANES) store(sums + i, load(sums + i) * load(open + i));
      std::memcpy(out + (first + row) * gate.outputs + column, sums, count * sizeof(float));
    });
  });
}

namespace {

// Outputs `count` rows of `inputs` weights each as one panel; what is missing of the panel is `nothing`.
template <class T>
void pack_panel(int32_t format, const T* rows, int64_t count, int64_t inputs, T nothing, T* panel) {
  for (int64_t k = 0; k < inputs; ++k)
    for (int64_t j = 0; j < PANEL; ++j) {
      const int64_t place = format == BF16 ? j % LANES * 2 + j / LANES : j;
      panel[k * PANEL + place] = j < count ? rows[j * inputs + k] : nothing;
    }
}

void pack_codes(const uint8_t* rows, int64_t count, int64_t inputs, uint8_t* panel) {
  const uint8_t zero = 7;  // the code of 0
  for (int64_t k = 0; k < inputs; ++k)
    for (int64_t j = 0; j < LANES; ++j) {
      const int low = j < count ? rows[j * inputs + k] : zero;
      const int high = j + LANES < count ? rows[(j + LANES) * inputs + k] : zero;
      panel[k * LANES + j] = (uint8_t)(low | high << 4);
    }
}

int64_t bytes_each(int32_t format) { return format == FP32 ? 4 : format == BF16 ? 2 : 1; }

int64_t bytes_of_panel(int32_t format) { return format == NF4 ? PANEL / 2 : PANEL * bytes_each(format); }

}  // namespace

EXPORTED int panel_width() { return PANEL; }

// rows: [outputs, inputs] float32, bfloat16, int8, or NF4's codes, one a byte.
EXPORTED void pack(int threads, int format, const char* rows, char* panels, int64_t outputs, int64_t inputs) {
  for_each(threads, (outputs + PANEL - 1) / PANEL, [=](int64_t panel) {
    const int64_t count = std::min<int64_t>(PANEL, outputs - panel * PANEL);
    const char* from = rows + panel * PANEL * inputs * bytes_each(format);
    char* to = panels + panel * inputs * bytes_of_panel(format);
    switch (format) {
      case FP32: pack_panel<int32_t>(format, (const int32_t*)from, count, inputs, 0, (int32_t*)to); break;
      case BF16: pack_panel<int16_t>(format, (const int16_t*)from, count, inputs, 0, (int16_t*)to); break;
      case INT8: pack_panel<char>(format, from, count, inputs, 0, to); break;
      default: pack_codes((const uint8_t*)from, count, inputs, (uint8_t*)to);
    }
  });
}

// out [outputs, inputs]: the weights as the products see them.
EXPORTED void unpack(int threads, const Matrix* m, float* out) {
  const int64_t step = bytes_of_panel(m->format);
  for_each(threads, m->num_panels(), [=](int64_t panel) {
    const int64_t first = panel * PANEL, count = std::min<int64_t>(PANEL, m->outputs - first);
    alignas(64) float wide[PANEL];
    for (int64_t k = 0; k < m->inputs; ++k) {
      const char* at = m->panels + (panel * m->inputs + k) * step;
      const float* s = m->scales ? m->scales + panel * PANEL : nullptr;
      if (m->format == NF4) s = m->scales + (panel * m->num_blocks() + k / BLOCK) * PANEL;
      Floats w[2], scale[2] = {};
      if (s) scale[0] = load(s), scale[1] = load(s + LANES);
      switch (m->format) {
        case FP32: Plain::widen(at, scale, w); break;
        case BF16: Brain::widen(at, scale, w); break;
        case INT8: Byte::widen(at, scale, w), w[0] *= scale[0], w[1] *= scale[1]; break;
        default: Nibble::widen(at, scale, w);
      }
      store(wide, w[0]);
      store(wide + LANES, w[1]);
      for (int64_t j = 0; j < count; ++j) out[(first + j) * m->inputs + k] = wide[j];
    }
  });
}

EXPORTED void product(int threads, const Matrix* matrix, const float* x, int64_t rows, float* out) {
  const Target target{matrix, out, matrix->outputs, false, {}, {}};
  multiply(threads, x, rows, &target, 1);
}
