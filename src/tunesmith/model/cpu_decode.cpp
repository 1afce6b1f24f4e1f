// All decoder layers in one call, for rows that bring one token each: between small calls Python takes as long as
// the kernels do. Shapes as in cpu_layers.cpp and cpu_kernels.cpp.
#include "cpu_adapters.h"

struct Layer;

extern "C" {
void before_attention(int threads, const Layer* layer, const Adapters* adapters, int64_t number, const float* x,
                      int64_t rows, const float* cos, const float* sin, float* normed, float* q, float* k, float* v);
void after_attention(int threads, const Layer* layer, const Adapters* adapters, int64_t number, float* x,
                     int64_t rows, const float* seen, float* normed, float* inner);
void write_pages(int format, int page_format, const void* k, const void* v, void* k_pages, void* v_pages,
                 const int64_t* slots, int64_t tokens, int64_t width);
void paged_attention(int threads, int q_format, int page_format, const void* q, const void* k, const void* v,
                     const int32_t* tables, const int32_t* lengths, int64_t rows, int64_t widest, int heads,
                     int key_heads, int dh, float scale, void* out);
}

// Python has the same structure (decode_pass.Decode). k_pages and v_pages: of each layer; normed, q, k, v, seen
// and inner: room.
struct Decode {
  const Layer* const* layers;
  void* const* k_pages;
  void* const* v_pages;
  const int64_t* slots;
  const int32_t* tables;
  const int32_t* lengths;
  const Adapters* adapters;
  float* x;
  const float *cos, *sin;
  float *normed, *q, *k, *v, *seen, *inner;
  int64_t num_layers, rows, widest;
  int32_t page_format, heads, key_heads, head_size;
  float scale;
};

// In place: x [rows, D] through all layers; the new keys and values go into the pages.
EXPORTED void decode_layers(int threads, const Decode* decode) {
  const Decode& d = *decode;
  for (int64_t n = 0; n < d.num_layers; ++n) {
    before_attention(threads, d.layers[n], d.adapters, n, d.x, d.rows, d.cos, d.sin, d.normed, d.q, d.k, d.v);
    write_pages(0, d.page_format, d.k, d.v, d.k_pages[n], d.v_pages[n], d.slots, d.rows,
                (int64_t)d.key_heads * d.head_size);
    paged_attention(threads, 0, d.page_format, d.q, d.k_pages[n], d.v_pages[n], d.tables, d.lengths, d.rows, d.widest,
                    d.heads, d.key_heads, d.head_size, d.scale, d.seen);
    after_attention(threads, d.layers[n], d.adapters, n, d.x, d.rows, d.seen, d.normed, d.inner);
  }
}
