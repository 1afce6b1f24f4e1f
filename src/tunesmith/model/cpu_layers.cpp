// What a decoder layer of the Llama family computes beside attention, in two calls for a layer.
// Shapes: T tokens, D hidden size, H query heads, Hkv key heads, Dh head size, I intermediate size.
#include <cmath>

#include "cpu_products.h"

// Python has the same structure (cpu_kernels.Layer). q_norm and k_norm [Dh] or none.
struct Layer {
  Matrix q, k, v, o, gate, up, down;
  const float *norm, *post_norm, *q_norm, *k_norm;
  float eps, post_eps, q_eps, k_eps;
  int32_t heads, key_heads, head_size;
};

namespace {

// Fewer numbers than these are worked on faster by one thread than shared out.
constexpr int64_t WORTH_SHARING = 1 << 15;

template <class Body>
void for_each_row(int threads, int64_t rows, int64_t width, const Body& body) {
  for_each(rows * width < WORTH_SHARING ? 1 : threads, rows, body);
}

// out = weight * x / sqrt(mean of x² + eps) (Zhang & Sennrich 2019, arXiv:1910.07467).
void norm_row(const float* x, const float* weight, float eps, int64_t size, float* out) {
  Floats squares[2] = {};
  int64_t i = 0;
  for (; i + 2 * LANES <= size; i += 2 * LANES)
    for (int n = 0; n < 2; ++n) {
      const Floats v = load(x + i + n * LANES);
      squares[n] += v * v;
    }
  float total = sum(squares[0] + squares[1]);
  for (; i < size; ++i) total += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(total / (float)size + eps);
  for (i = 0; i + LANES <= size; i += LANES) store(out + i, load(weight + i) * (load(x + i) * scale));
  for (; i < size; ++i) out[i] = weight[i] * (x[i] * scale);
}

void norm_rows(int threads, const float* x, const float* weight, float eps, int64_t rows, int64_t size,
               float* out) {
  for_each_row(threads, rows, size,
               [=](int64_t r) { norm_row(x + r * size, weight, eps, size, out + r * size); });
}

// In place: a head turned by its token's angles (Su et al. 2021, arXiv:2104.09864), halves as in Llama.
void turn(float* head, const float* cos, const float* sin, int size) {
  const int half = size / 2;
  int i = 0;
  for (; i + LANES <= half; i += LANES) {
    const Floats a = load(head + i), b = load(head + half + i);
    store(head + i, a * load(cos + i) - b * load(sin + i));
    store(head + half + i, b * load(cos + half + i) + a * load(sin + half + i));
  }
  for (; i < half; ++i) {
    const float a = head[i], b = head[half + i];
    head[i] = a * cos[i] - b * sin[i];
    head[half + i] = b * cos[half + i] + a * sin[half + i];
  }
}

void turn_rows(int threads, float* x, const float* norm, float eps, const float* cos, const float* sin, int64_t rows,
               int heads, int size) {
  for_each_row(threads, rows, heads * size, [=](int64_t r) {
    for (int h = 0; h < heads; ++h) {
      float* head = x + (r * heads + h) * size;
      if (norm) norm_row(head, norm, eps, size, head);
      turn(head, cos + r * size, sin + r * size, size);
    }
  });
}

}  // namespace

EXPORTED void rms_norm(int threads, const float* x, const float* weight, float eps, int64_t rows, int64_t size,
                       float* out) {
  norm_rows(threads, x, weight, eps, rows, size, out);
}

// In place: x [T, heads, size] through the heads' norm [size], if there is one, and turned by cos, sin [T, size].
EXPORTED void rotate(int threads, float* x, const float* norm, float eps, const float* cos, const float* sin,
                     int64_t rows, int heads, int size) {
  turn_rows(threads, x, norm, eps, cos, sin, rows, heads, size);
}

// In place: gate = silu(gate) * up (Shazeer 2020, arXiv:2002.05202).
EXPORTED void swiglu(int threads, float* gate, const float* up, int64_t rows, int64_t size) {
  for_each_row(threads, rows, size, [=](int64_t r) {
    float* g = gate + r * size;
    const float* u = up + r * size;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
      const Floats v = load(g + i);
      store(g + i, v / (1.0f + exp_of(-v)) * load(u + i));
    }
    if (i < size) {
      const int rest = (int)(size - i);
      const Floats v = load_some(g + i, rest), out = v / (1.0f + exp_of(-v)) * load_some(u + i, rest);
      for (int n = 0; n < rest; ++n) g[i + n] = out[n];
    }
  });
}

// x [T, D] -> q [T, H, Dh], k and v [T, Hkv, Dh], q and k turned. normed [T, D]: room. adapters: or none.
EXPORTED void before_attention(int threads, const Layer* layer, const Adapters* adapters, int64_t number,
                               const float* x, int64_t rows, const float* cos, const float* sin, float* normed,
                               float* q, float* k, float* v) {
  const Layer& l = *layer;
  const LayerAdapters on{adapters, number};
  norm_rows(threads, x, l.norm, l.eps, rows, l.q.inputs, normed);
  multiply_a(threads, on, TO_QKV, normed, l.q.inputs);
  const Target targets[] = {{&l.q, q, l.q.outputs, false, on, Q},
                            {&l.k, k, l.k.outputs, false, on, K},
                            {&l.v, v, l.v.outputs, false, on, V}};
  multiply(threads, normed, rows, targets, 3);
  turn_rows(threads, q, l.q_norm, l.q_eps, cos, sin, rows, l.heads, l.head_size);
  turn_rows(threads, k, l.k_norm, l.k_eps, cos, sin, rows, l.key_heads, l.head_size);
}

// x [T, D] += o(seen), then x += down(silu(gate(norm x)) * up(norm x)). normed [T, D], inner [T, I]: room.
EXPORTED void after_attention(int threads, const Layer* layer, const Adapters* adapters, int64_t number, float* x,
                              int64_t rows, const float* seen, float* normed, float* inner) {
  const Layer& l = *layer;
  const LayerAdapters on{adapters, number};
  const Target out{&l.o, x, l.o.outputs, true, on, O}, down{&l.down, x, l.down.outputs, true, on, DOWN};
  multiply_a(threads, on, TO_O, seen, l.o.inputs);
  multiply(threads, seen, rows, &out, 1);
  norm_rows(threads, x, l.post_norm, l.post_eps, rows, l.gate.inputs, normed);
  multiply_a(threads, on, TO_GATE_UP, normed, l.gate.inputs);
  multiply_swiglu(threads, normed, rows, l.gate, l.up, on, inner);
  multiply_a(threads, on, TO_DOWN, inner, l.down.inputs);
  multiply(threads, inner, rows, &down, 1);
}
