// What the kernels share: vectors of floats, storage formats, work shared out among torch's threads.
// GCC's and clang's vector types, so that one source serves AVX-512, AVX2 and NEON.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define EXPORTED extern "C" __attribute__((visibility("default")))

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

struct bf16 {
  uint16_t bits;
};

inline Floats splat(float x) { return x - Floats{}; }

inline Floats load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline Floats load(const bf16* from) {
  Halves h;
  std::memcpy(&h, from, sizeof h);
  return (Floats)(__builtin_convertvector(h, Ints) << 16);
}

inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

// Rounds to the nearest, ties to even; a NaN stays one.
inline uint16_t rounded(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if (x != x) return 0x7fc0;
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

inline void store(bf16* to, Floats v) {
  for (int i = 0; i < LANES; ++i) to[i].bits = rounded(v[i]);
}

inline float one(const float* from) { return *from; }
inline float one(const bf16* from) {
  uint32_t u = (uint32_t)from->bits << 16;
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline void put(float* to, float x) { *to = x; }
inline void put(bf16* to, float x) { to->bits = rounded(x); }

// The first `count` lanes; the others are 0.
template <class T>
inline Floats load_some(const T* from, int count) {
  Floats v{};
  for (int i = 0; i < count; ++i) v[i] = one(from + i);
  return v;
}

inline float sum(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s = 0;
  for (int i = 0; i < LANES; ++i) s += v[i];
  return s;
#endif
}

// e^x, relative error below 2e-7 (Cephes' expf). Below -87 it is e^-87, which no sum here can feel.
inline Floats exp_of(Floats x) {
  const Floats lowest = splat(-87.0f), highest = splat(88.0f);
  x = x < lowest ? lowest : x;
  x = x > highest ? highest : x;
  const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  Floats n = (x * 1.44269504f + magic) - magic;
  Floats r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  return p * (Floats)power;
}

// GOMP_parallel of the OpenMP library that torch computes with: no second pool of threads appears.
typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);
extern Parallel parallel;

// body(0) … body(count - 1), each once, by up to `threads` threads; who is free takes the next.
template <class Body>
void for_each(int threads, int64_t count, const Body& body) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  struct Job {
    const Body& body;
    int64_t count;
    std::atomic<int64_t> next;
  } job{body, count, {0}};
  auto work = [](void* given) {
    Job& job = *static_cast<Job*>(given);
    for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.count;) job.body(i);
  };
  parallel(work, &job, (unsigned)(threads < count ? threads : count), 0);
}
