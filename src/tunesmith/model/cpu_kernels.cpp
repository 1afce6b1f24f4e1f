// Attention over pages of keys and values.
// Shapes: R rows, H query heads, Hkv key heads, G = H / Hkv, Dh head size, L tokens seen by a row.
#include "cpu_kernels.h"

Parallel parallel = nullptr;

namespace {

constexpr int PAGE = 16;

// A row's keys or values of one head. step: from one token to the next, in numbers.
template <class T>
struct Pages {
  const T* base;
  const int32_t* table;
  int64_t step;
  const T* page(int64_t number) const { return base + table[number] * PAGE * step; }
};

// What of the next page stands where `at` does in this one is asked for: pages lie anywhere in memory.
template <class T>
inline void ask_for(const T* at, int numbers) {
  for (int i = 0; i < numbers; i += 64 / (int)sizeof(T)) __builtin_prefetch(at + i);
}

// The sums of the lanes of PAGE vectors, taken four at a time: p, 4 + p, 8 + p and 12 + p.
#if defined(__AVX512F__)
inline __m512 quarters(const Floats* v) {
  const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
  const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
  return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
}

inline __m512 pairs(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}

struct Sums {
  __m512 parts[4];
  void take(int p, const Floats* v) { parts[p] = quarters(v); }
  void give(float scale, float* to) const {
    const __m512 all = pairs(pairs(parts[0], parts[1]), pairs(parts[2], parts[3]));
    _mm512_storeu_ps(to, _mm512_mul_ps(all, _mm512_set1_ps(scale)));
  }
};
#else
struct Sums {
  float all[PAGE];
  void take(int p, const Floats* v) {
    for (int i = 0; i < 4; ++i) all[4 * i + p] = sum(v[i]);
  }
  void give(float scale, float* to) const {
    for (int i = 0; i < PAGE; ++i) to[i] = all[i] * scale;
  }
};
#endif

// scores[g][t] = scale * q[g] . key[t] for the PAGE tokens of a page, of which `count` are the row's.
template <int G, class T>
void score_page(const float* q, const T* keys, const T* next, int64_t step, int count, int dh, float scale,
                float* scores, int64_t stride) {
  const int whole = dh / LANES * LANES;
  Sums sums[G];
  for (int p = 0; p < 4; ++p) {
    const T* key[4];
    for (int i = 0; i < 4; ++i) {
      const int token = 4 * i + p;
      key[i] = keys + (token < count ? token : 0) * step;
      ask_for(next + token * step, dh);
    }
    Floats acc[G][4] = {};
    for (int d = 0; d < whole; d += LANES)
      for (int i = 0; i < 4; ++i) {
        const Floats k = load(key[i] + d);
        for (int g = 0; g < G; ++g) acc[g][i] += load(q + g * dh + d) * k;
      }
    if (whole < dh)
      for (int i = 0; i < 4; ++i) {
        const Floats k = load_some(key[i] + whole, dh - whole);
        for (int g = 0; g < G; ++g) acc[g][i] += load_some(q + g * dh + whole, dh - whole) * k;
      }
    for (int g = 0; g < G; ++g) sums[g].take(p, acc[g]);
  }
  for (int g = 0; g < G; ++g) sums[g].give(scale, scores + g * stride);
}

// `stride` scores for each of G query heads that share a key head: `length` and some that mean nothing.
template <int G, class T>
void score(const float* q, const Pages<T>& keys, int64_t length, int dh, float scale, float* scores,
           int64_t stride) {
  for (int64_t first = 0; first < length; first += PAGE) {
    const bool is_last = first + PAGE >= length;
    const T* page = keys.page(first / PAGE);
    const T* next = is_last ? page : keys.page(first / PAGE + 1);
    const int count = is_last ? (int)(length - first) : PAGE;
    score_page<G>(q, page, next, keys.step, count, dh, scale, scores + first, stride);
  }
}

// In place: e^(score - largest); returns 1 / their sum.
float soften(float* scores, int64_t length) {
  float largest = scores[0];
  for (int64_t t = 1; t < length; ++t) largest = scores[t] > largest ? scores[t] : largest;
  Floats total{};
  int64_t t = 0;
  for (; t + LANES <= length; t += LANES) {
    const Floats e = exp_of(load(scores + t) - largest);
    store(scores + t, e);
    total += e;
  }
  float rest = sum(total);
  if (t < length) {
    const Floats e = exp_of(load_some(scores + t, (int)(length - t)) - largest);
    for (int64_t i = t; i < length; ++i) rest += scores[i] = e[i - t];
  }
  return 1.0f / rest;
}

// body(value of token t at `d`, t) for all tokens of the row.
template <class T, class Body>
inline void for_values(const Pages<T>& values, int64_t length, int d, int width, const Body& body) {
  for (int64_t first = 0; first < length; first += PAGE) {
    const bool is_last = first + PAGE >= length;
    const T* page = values.page(first / PAGE) + d;
    const T* next = is_last ? page : values.page(first / PAGE + 1) + d;
    const int count = is_last ? (int)(length - first) : PAGE;
    for (int i = 0; i < count; ++i) {
      ask_for(next + i * values.step, width);
      body(page + i * values.step, first + i);
    }
  }
}

// out[g] = inverse[g] * sum over t of weights[g][t] * value[t], for N vectors of the head from `d` on.
template <int G, int N, class T, class Out>
void mix(const float* weights, int64_t stride, const float* inverse, const Pages<T>& values, int64_t length,
         int dh, int d, Out* out) {
  Floats acc[G][N] = {};
  for_values(values, length, d, N * LANES, [&](const T* value, int64_t t) {
    for (int n = 0; n < N; ++n) {
      const Floats v = load(value + n * LANES);
      for (int g = 0; g < G; ++g) acc[g][n] += weights[g * stride + t] * v;
    }
  });
  for (int g = 0; g < G; ++g)
    for (int n = 0; n < N; ++n) store(out + g * dh + d + n * LANES, acc[g][n] * inverse[g]);
}

template <int G, class T, class Out>
void mix_all(const float* weights, int64_t stride, const float* inverse, const Pages<T>& values, int64_t length,
             int dh, Out* out) {
  constexpr int MOST = 4;
  int d = 0;
  for (; d + MOST * LANES <= dh; d += MOST * LANES)
    mix<G, MOST>(weights, stride, inverse, values, length, dh, d, out);
  for (; d + LANES <= dh; d += LANES) mix<G, 1>(weights, stride, inverse, values, length, dh, d, out);
  for (; d < dh; ++d) {
    float acc[G] = {};
    for_values(values, length, d, 1, [&](const T* value, int64_t t) {
      for (int g = 0; g < G; ++g) acc[g] += weights[g * stride + t] * one(value);
    });
    for (int g = 0; g < G; ++g) put(out + g * dh + d, acc[g] * inverse[g]);
  }
}

template <int G, class T, class Out>
void heads(const Out* q, const Pages<T>& keys, const Pages<T>& values, int64_t length, int dh, float scale,
           Out* out, std::vector<float>& room) {
  const int64_t stride = (length + PAGE - 1) / PAGE * PAGE;
  room.resize((size_t)G * (stride + dh));
  float *scores = room.data(), *wide = scores + G * stride, inverse[G];
  for (int i = 0; i < G * dh; ++i) wide[i] = one(q + i);
  score<G>(wide, keys, length, dh, scale, scores, stride);
  for (int g = 0; g < G; ++g) inverse[g] = soften(scores + g * stride, length);
  mix_all<G>(scores, stride, inverse, values, length, dh, out);
}

template <class T, class Out>
void attend(int threads, const Out* q, const T* k, const T* v, const int32_t* tables, const int32_t* lengths,
            int64_t rows, int64_t widest, int num_heads, int key_heads, int dh, float scale, Out* out) {
  const int group = num_heads / key_heads;
  for_each(threads, rows * key_heads, [=](int64_t item) {
    const int64_t row = item / key_heads, head = item % key_heads, length = lengths[row];
    const int32_t* table = tables + row * widest;
    const int64_t step = (int64_t)key_heads * dh;
    const Pages<T> keys{k + head * dh, table, step}, values{v + head * dh, table, step};
    static thread_local std::vector<float> room;
    const int64_t first = (row * num_heads + head * group) * dh;
    for (int g = 0; g < group;) {
      const Out* from = q + first + g * dh;
      Out* to = out + first + g * dh;
      switch (group - g) {
        case 1: heads<1>(from, keys, values, length, dh, scale, to, room); g += 1; break;
        case 2: heads<2>(from, keys, values, length, dh, scale, to, room); g += 2; break;
        case 3: heads<3>(from, keys, values, length, dh, scale, to, room); g += 3; break;
        default: heads<4>(from, keys, values, length, dh, scale, to, room); g += 4; break;
      }
    }
  });
}

template <class From, class To>
void copy(const From* from, To* to, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
  for (; i < count; ++i) put(to + i, one(from + i));
}

template <class From, class To>
void write(const From* k, const From* v, To* k_pages, To* v_pages, const int64_t* slots, int64_t tokens,
           int64_t width) {
  for (int64_t t = 0; t < tokens; ++t) {
    copy(k + t * width, k_pages + slots[t] * width, width);
    copy(v + t * width, v_pages + slots[t] * width, width);
  }
}

}  // namespace

EXPORTED void use_threads_of(void* gomp_parallel) { parallel = (Parallel)gomp_parallel; }

// Formats of `q` and `out`, and of the pages: 0 float32, 1 bfloat16.
EXPORTED void paged_attention(int threads, int q_format, int page_format, const void* q, const void* k,
                              const void* v,
                              const int32_t* tables, const int32_t* lengths, int64_t rows, int64_t widest,
                              int heads, int key_heads, int dh, float scale, void* out) {
  auto with = [&](auto* q, auto* k, auto* v, auto* out) {
    attend(threads, q, k, v, tables, lengths, rows, widest, heads, key_heads, dh, scale, out);
  };
  const float *qf = (const float*)q, *kf = (const float*)k, *vf = (const float*)v;
  const bf16 *qb = (const bf16*)q, *kb = (const bf16*)k, *vb = (const bf16*)v;
  if (q_format == 0 && page_format == 0) with(qf, kf, vf, (float*)out);
  if (q_format == 0 && page_format == 1) with(qf, kb, vb, (float*)out);
  if (q_format == 1 && page_format == 0) with(qb, kf, vf, (bf16*)out);
  if (q_format == 1 && page_format == 1) with(qb, kb, vb, (bf16*)out);
}

EXPORTED void write_pages(int format, int page_format, const void* k, const void* v, void* k_pages, void* v_pages,
                 const int64_t* slots, int64_t tokens, int64_t width) {
  auto with = [&](auto* k, auto* v, auto* k_pages, auto* v_pages) {
    write(k, v, k_pages, v_pages, slots, tokens, width);
  };
  const float *kf = (const float*)k, *vf = (const float*)v;
  const bf16 *kb = (const bf16*)k, *vb = (const bf16*)v;
  if (format == 0 && page_format == 0) with(kf, vf, (float*)k_pages, (float*)v_pages);
  if (format == 0 && page_format == 1) with(kf, vf, (bf16*)k_pages, (bf16*)v_pages);
  if (format == 1 && page_format == 0) with(kb, vb, (float*)k_pages, (float*)v_pages);
  if (format == 1 && page_format == 1) with(kb, vb, (bf16*)k_pages, (bf16*)v_pages);
}