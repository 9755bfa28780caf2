// Small vector helpers in the compiler's own vector types: lowered to whatever the machine has.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "tasks.h"

typedef float vf __attribute__((vector_size(64)));  // 16 floats
constexpr int64_t SLICE = 32;                        // dimensions of a slice: two vectors

static inline vf load(const float* p) { vf v; std::memcpy(&v, p, 64); return v; }
static inline void store(float* p, vf v) { std::memcpy(p, &v, 64); }
static inline vf splat(float x) { return vf{} + x; }

// In halves: 8 + 8, 4 + 4, then (0 + 1) + (2 + 3).
static inline float sum(vf v) {
#ifdef __AVX512F__  // the compiler would go by way of memory
  const __m512d all = (__m512d)v;
  const __m256 a = (__m256)_mm512_castpd512_pd256(all) + (__m256)_mm512_extractf64x4_pd(all, 1);
  const __m128 c = _mm256_castps256_ps128(a) + _mm256_extractf128_ps(a, 1), d = c + _mm_movehdup_ps(c);
  return d[0] + d[2];
#else
  typedef float v8 __attribute__((vector_size(32)));
  typedef float v4 __attribute__((vector_size(16)));
  v8 a, b;
  std::memcpy(&a, &v, 32), std::memcpy(&b, (char*)&v + 32, 32);
  a += b;
  v4 c, d;
  std::memcpy(&c, &a, 16), std::memcpy(&d, (char*)&a + 16, 16);
  c += d;
  return (c[0] + c[1]) + (c[2] + c[3]);
#endif
}

// A function of Python's that was called here failed.
struct Unheard {};

// What a function called from Python returns: 0, 1 when memory ran out, 3 when what it called there failed.
template <class F> static inline int64_t status_of(F work) noexcept {
  try {
    work();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  } catch (const Unheard&) {
    return 3;
  }
}

// Pairs (token, latent) sorted by latent, tokens in order within one.
struct Pairs {
  const int64_t* offsets;  // [d_sae + 1]
  const int32_t* tokens;   // [pairs]
};

// Counting sort of token-major pairs by latent, of those for which `wanted(p)`. `order` [pairs]: where each stood.
template <class Index, class Wanted>
static inline void sort_by_latent(const Index* latents, const int64_t* token_offsets, int64_t tokens, int64_t d_sae,
                                  int64_t* offsets, int32_t* order, int32_t* sorted_tokens, Wanted wanted) {
  std::fill(offsets, offsets + d_sae + 1, 0);
  const int64_t pairs = token_offsets[tokens];
  for (int64_t p = 0; p < pairs; p++) offsets[latents[p] + 1] += wanted(p);
  for (int64_t j = 0; j < d_sae; j++) offsets[j + 1] += offsets[j];
  std::vector<int64_t> next(offsets, offsets + d_sae);
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t p = token_offsets[t]; p < token_offsets[t + 1]; p++) {
      if (!wanted(p)) continue;
      const int64_t place = next[latents[p]]++;
      order[place] = (int32_t)p;
      sorted_tokens[place] = (int32_t)t;
    }
}

static inline bool every_pair(int64_t) { return true; }

// Into how many tasks a pass over the latents is cut: a thread that is held up keeps the others for one of them at most.
static inline int64_t parts_for(int64_t threads) { return threads > 1 ? 4 * threads : 1; }

// Split the latents into `parts` runs of about the same work; borders are multiples of `block`.
static inline std::vector<int64_t> split(const int64_t* offsets, int64_t d_sae, int64_t parts, int64_t block, int64_t per_latent) {
  std::vector<int64_t> borders(parts + 1, d_sae);
  borders[0] = 0;
  const int64_t total = offsets[d_sae] + per_latent * d_sae;
  int64_t part = 1;
  for (int64_t j = block; j < d_sae && part < parts; j += block)
    while (part < parts && (offsets[j] + per_latent * j) * parts >= total * part) borders[part++] = j;
  return borders;
}

// values[p] = or, from the second pass on, += row_scale * <W[latent], left[token]> in the n slices from s on.
template <int n>
static inline void dot_slices(const Pairs& pairs, const float* left, const float* W, const float* row_scale, int64_t first,
                              int64_t last, int64_t d_sae, int64_t tokens, int64_t s, float* values) {
  for (int64_t j = first; j < last; j++) {
    const vf scale = splat(row_scale ? row_scale[j] : 1);
    vf w[2 * n];  // scaled, as rows are when saved
    for (int i = 0; i < 2 * n; i++) w[i] = load(W + ((s + i / 2) * d_sae + j) * SLICE + i % 2 * 16) * scale;
    for (int64_t p = pairs.offsets[j]; p < pairs.offsets[j + 1]; p++) {
      const float* row = left + (s * tokens + pairs.tokens[p]) * SLICE;
      vf total{};
      for (int i = 0; i < n; i++) {
        const float* b = row + i * tokens * SLICE;
        total += w[2 * i] * load(b) + w[2 * i + 1] * load(b + 16);
      }
      values[p] = s ? values[p] + sum(total) : sum(total);
    }
  }
}

// values[p] = row_scale * <W[latent], left[token]> over the latents first .. last. The tokens' part of the slices of one
// pass stays in the second-level cache while the weights stream by. Of a batch of `whole` tokens these are all or some: the
// bits of a value must not depend on which others are computed beside it, so the passes are those of the batch.
constexpr int64_t CACHED = 512 << 10;

static inline void dot_range(const Pairs& pairs, const float* left, const float* W, const float* row_scale, int64_t first,
                             int64_t last, int64_t d_sae, int64_t tokens, int64_t whole, int64_t slices, float* values) {
  const int64_t fit = CACHED / (whole * SLICE * (int64_t)sizeof(float));
  for (int64_t s = 0, n; s < slices; s += n) {
    const int64_t room = std::min(fit, slices - s);
    n = room >= 4 ? 4 : room >= 2 ? 2 : 1;
    const auto some = n == 4 ? dot_slices<4> : n == 2 ? dot_slices<2> : dot_slices<1>;
    some(pairs, left, W, row_scale, first, last, d_sae, tokens, s, values);
  }
}
