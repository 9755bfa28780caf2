// Everything after the selection. One pattern throughout: weights and activations are kept in slices of 32 dimensions,
// [slices][rows][32], and pairs (token, latent) are sorted by latent; a pass streams one slice of the weights while the
// tokens' slice (batch * 128 bytes) stays in the second-level cache. Sums have a fixed order whatever the number of threads.
#include "common.h"

#ifdef __GLIBC__
#include <malloc.h>
// What a step frees stays at hand for the next, as it does anyhow in a process that happens to have freed something as
// large: pages given back to the system come back cleared, one fault each, a tenth of a step.
static const int kept = mallopt(M_MMAP_THRESHOLD, 32 << 20) + mallopt(M_TRIM_THRESHOLD, 64 << 20);
#endif

namespace {
constexpr int64_t BLOCK = 64;         // latents or tokens whose sums form one partial sum
constexpr int64_t WORK_PER_LATENT = 4;  // what updating a latent costs beside its pairs, in pairs

template <class F>
void over_latents(const Pairs& pairs, int64_t d_sae, F work) {
  const int64_t parts = parts_for(team());
  const std::vector<int64_t> borders = split(pairs.offsets, d_sae, parts, BLOCK, WORK_PER_LATENT);
  share_out(parts, 1, [&](int64_t part, int64_t) { work(borders[part], borders[part + 1]); });
}
}  // namespace

thread_local int own_threads = 0;
thread_local Cores own_cores;

extern "C" {

int64_t set_threads(int64_t n) {
  own_threads = (int)n;
  own_cores.take((int)n);
  return 0;
}

int64_t meet_ranks(int32_t* const* seats, int64_t ranks, int64_t own, int64_t turn, int64_t patience) {
  return meet(seats, ranks, own, (int32_t)turn, patience);
}

// [rows][d_in] less `centre` to [slices][rows][32], padded with zeros; to `less` [rows][d_in] too, where that is asked for.
void to_slices(const float* rows, const float* centre, int64_t n, int64_t d_in, float* out, float* less) {
  const int64_t slices = (d_in + SLICE - 1) / SLICE;
  share_out(n, BLOCK, [=](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++)
      for (int64_t s = 0; s < slices; s++) {
        float* to = out + (s * n + r) * SLICE;
        const int64_t width = std::min(SLICE, d_in - s * SLICE);
        for (int64_t i = 0; i < width; i++) to[i] = rows[r * d_in + s * SLICE + i] - (centre ? centre[s * SLICE + i] : 0);
        for (int64_t i = width; i < SLICE; i++) to[i] = 0;
        if (less) std::copy_n(to, width, less + r * d_in + s * SLICE);
      }
  });
}

// Back to [rows][d_in], each row times its scale.
void from_slices(const float* in, const float* scale, int64_t n, int64_t d_in, float* rows) {
  const int64_t slices = (d_in + SLICE - 1) / SLICE;
  share_out(n, BLOCK, [=](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++)
      for (int64_t s = 0; s < slices; s++)
        for (int64_t i = 0; i < std::min(SLICE, d_in - s * SLICE); i++)
          rows[r * d_in + s * SLICE + i] = in[(s * n + r) * SLICE + i] * (scale ? scale[r] : 1);
  });
}

// With `level` [pairs] those of one level alone. 2 when a latent or an offset is out of its range.
int64_t sort_pairs(const int64_t* latents, const int64_t* token_offsets, int64_t tokens, int64_t pairs, int64_t d_sae,
                   const int64_t* level, int64_t number, int64_t* offsets, int32_t* order, int32_t* sorted_tokens) {
  bool fits = tokens >= 0 && token_offsets[0] == 0 && token_offsets[tokens] == pairs;
  for (int64_t t = 0; t < tokens; t++) fits &= token_offsets[t] <= token_offsets[t + 1];
  for (int64_t p = 0; p < pairs; p++) fits &= (uint64_t)latents[p] < (uint64_t)d_sae;
  if (!fits) return 2;
  return status_of([&] {
    if (level)
      sort_by_latent(latents, token_offsets, tokens, d_sae, offsets, order, sorted_tokens, [=](int64_t p) { return level[p] == number; });
    else
      sort_by_latent(latents, token_offsets, tokens, d_sae, offsets, order, sorted_tokens, every_pair);
  });
}

// out[token] = start + sum of values * row_scale * W[latent].
void decode(const Pairs* pairs, const float* values, const float* W, const float* row_scale, const float* start,
            int64_t d_sae, int64_t tokens, int64_t d_in, float* out) {
  const int64_t slices = (d_in + SLICE - 1) / SLICE;
  share_out(slices, 1, [=](int64_t s, int64_t) {
    float first[SLICE] = {};
    if (start) std::copy_n(start + s * SLICE, std::min(SLICE, d_in - s * SLICE), first);
    float* y = out + s * tokens * SLICE;
    for (int64_t t = 0; t < tokens; t++) std::memcpy(y + t * SLICE, first, sizeof first);
    for (int64_t j = 0; j < d_sae; j++) {
      const int64_t begin = pairs->offsets[j], end = pairs->offsets[j + 1];
      if (begin == end) continue;
      const vf scale = splat(row_scale ? row_scale[j] : 1);
      const vf w0 = load(W + (s * d_sae + j) * SLICE) * scale, w1 = load(W + (s * d_sae + j) * SLICE + 16) * scale;
      for (int64_t p = begin; p < end; p++) {
        float* row = y + (int64_t)pairs->tokens[p] * SLICE;
        const vf z = splat(values[p]);
        store(row, load(row) + z * w0);
        store(row + 16, load(row + 16) + z * w1);
      }
    }
  });
}

// values[p] = row_scale * <W[latent], left[token]>.
int64_t dots(const Pairs* pairs, const float* left, const float* W, const float* row_scale, int64_t d_sae,
             int64_t tokens, int64_t d_in, float* values) {
  const int64_t slices = (d_in + SLICE - 1) / SLICE;
  const auto some = [&](int64_t first, int64_t last) {
    dot_range(*pairs, left, W, row_scale, first, last, d_sae, tokens, tokens, slices, values);
  };
  return status_of([&] { over_latents(*pairs, d_sae, some); });
}

// In place: x_hat -> G = (2 / batch) gamma^2 (x_hat - target). errors [batch][2]: |e|^2 and |gamma e|^2.
// partial [blocks of 64 tokens][d_in]: sums of G.
void residual(float* slab, const float* target, const float* gamma, int64_t batch, int64_t d_in, double* errors, float* partial) {
  const int64_t slices = (d_in + SLICE - 1) / SLICE;
  const float two = 2.0f / batch;
  share_out(batch, BLOCK, [=](int64_t begin, int64_t end) {
    const int64_t block = begin / BLOCK;
    std::memset(partial + block * d_in, 0, d_in * sizeof(float));
    for (int64_t t = begin; t < end; t++) {
      double plain = 0, weighted = 0;
      for (int64_t s = 0; s < slices; s++) {
        float* g = slab + (s * batch + t) * SLICE;
        const float *x = target + t * d_in + s * SLICE, *weight = gamma + s * SLICE;
        float* sums = partial + block * d_in + s * SLICE;
        float a = 0, b = 0;
        const int64_t width = std::min(SLICE, d_in - s * SLICE);
#pragma omp simd reduction(+ : a, b)
        for (int64_t i = 0; i < width; i++) {
          const float e = g[i] - x[i], w = weight[i] * e;
          a += e * e;
          b += w * w;
          g[i] = two * weight[i] * w;
          sums[i] += g[i];
        }
        plain += a;
        weighted += b;
      }
      errors[2 * t] = plain;
      errors[2 * t + 1] = weighted;
    }
  });
}

struct Terms {  // one set of pairs and what they weigh: decoder gradient sum z G, encoder gradient sum v c
  Pairs pairs;
  const float *z, *v;  // [pairs]; v = dL / d pre-activation
  const float* along;  // [pairs]: <W_dec[latent], G[token]>, for the radial part of the decoder's gradient
  const float* G;      // slices of [batch]
};

struct Matrix {  // weights and Adam moments, in slices
  float *W, *m, *v;
};

struct Update {
  int64_t d_sae, d_in, d_out, tokens, terms;  // d_out: width of the decoder's rows, d_in that of the encoder's
  const Terms* term;
  const float* centred;                  // slices of [tokens]
  Matrix decoder, encoder;               // encoder.W is null when tied
  float *b_enc, *b_enc_m, *b_enc_v;      // null when tied
  float lr, beta1, beta2, eps, correction1, correction2;  // corrections: 1 - beta^step
  int64_t unit;                          // decoder rows are of norm 1: row_scale holds 1 / norm of what is stored
  float* row_scale;                      // [d_sae]
  float* norm;                           // [d_sae] out: norm of the decoder's rows before scaling
  const float* pull;                     // [d_sae] or null: added to the decoder's gradient, times the row
  float* partial;                        // [blocks of 64 latents][slices * 32]: sums of encoder rows times bias gradients
  const float* dim;                      // [slices * 32] scale of each dimension for rounding, or null
  float *largest, *square;               // [d_sae] out: of the scaled encoder row
  float factor;                          // what gradients are multiplied by
  float* slope;                          // [blocks of 64 latents] out: sums of squares of the gradients before that
};

}  // extern "C"

namespace {

struct Rates {
  vf rise1, rise2, beta2, step, root, eps, factor;
  explicit Rates(const Update& u)
      : rise1(splat(1 - u.beta1)), rise2(splat(1 - u.beta2)), beta2(splat(u.beta2)), step(splat(u.lr / u.correction1)),
        root(splat(1 / std::sqrt(u.correction2))), eps(splat(u.eps)), factor(splat(u.factor)) {}
};

inline vf root_of(vf x) {
  float a[16];
  std::memcpy(a, &x, 64);
#pragma omp simd
  for (int i = 0; i < 16; i++) a[i] = std::sqrt(a[i]);
  return load(a);
}

inline vf adam(vf W, float* m, float* v, vf g, const Rates& r) {
  g *= r.factor;
  const vf first = load(m) + r.rise1 * (g - load(m)), second = r.beta2 * load(v) + r.rise2 * g * g;
  store(m, first);
  store(v, second);
  return W - r.step * first / (root_of(second) * r.root + r.eps);
}

// g += sum of weight * rows[token] over a latent's pairs.
inline void gather(const Pairs& pairs, const float* weight, const float* rows, int64_t j, vf& g0, vf& g1) {
  int64_t p = pairs.offsets[j];
  const int64_t end = pairs.offsets[j + 1];
  vf h0{}, h1{};
  for (; p + 2 <= end; p += 2) {
    const float *a = rows + (int64_t)pairs.tokens[p] * SLICE, *b = rows + (int64_t)pairs.tokens[p + 1] * SLICE;
    const vf wa = splat(weight[p]), wb = splat(weight[p + 1]);
    g0 += wa * load(a), g1 += wa * load(a + 16);
    h0 += wb * load(b), h1 += wb * load(b + 16);
  }
  if (p < end) {
    const float* a = rows + (int64_t)pairs.tokens[p] * SLICE;
    const vf w = splat(weight[p]);
    g0 += w * load(a), g1 += w * load(a + 16);
  }
  g0 += h0, g1 += h1;
}

// What the slices leave of an update, to be summed in their order: a slice is one thread's, whoever computes it.
struct Shares {
  int64_t d_sae, given, taken, blocks;                 // slices of the decoder's rows, of the encoder's; blocks of latents
  std::vector<float> along, bias_grad;                 // [d_sae]: sums over a latent's pairs
  std::unique_ptr<float[]> decoder, encoder, largest;  // [slices][d_sae]: squares of the new rows; their largest entries
  std::vector<float> slope;                            // [slices of the decoder, then of the encoder][blocks]

  explicit Shares(const Update& u)
      : d_sae(u.d_sae), given((u.d_out + SLICE - 1) / SLICE), taken((u.d_in + SLICE - 1) / SLICE),
        blocks((u.d_sae + BLOCK - 1) / BLOCK), along(d_sae, 0), bias_grad(d_sae, 0), decoder(new float[given * d_sae]),
        encoder(new float[taken * d_sae]), largest(new float[taken * d_sae]), slope((given + taken) * blocks, 0) {}
};

// Add a gradient's squares to those of its block of latents.
inline void add_square(float* slope, vf& block, vf g0, vf g1, int64_t j, int64_t last) {
  block += g0 * g0 + g1 * g1;
  if ((j + 1) % BLOCK && j + 1 != last) return;
  slope[j / BLOCK] = sum(block);
  block = vf{};
}

void update_decoder(const Update& u, int64_t s, int64_t first, int64_t last, Shares& shares) {
  const Rates rates(u);
  float *square = &shares.decoder[s * u.d_sae], *slope = &shares.slope[s * shares.blocks];
  vf block{};
  for (int64_t j = first; j < last; j++) {
    const int64_t at = (s * u.d_sae + j) * SLICE;
    const vf scale = splat(u.unit ? u.row_scale[j] : 1);
    const vf w0 = load(u.decoder.W + at) * scale, w1 = load(u.decoder.W + at + 16) * scale;
    vf g0{}, g1{};
    for (int64_t k = 0; k < u.terms; k++) {
      gather(u.term[k].pairs, u.term[k].z, u.term[k].G + s * u.tokens * SLICE, j, g0, g1);
      if (!u.encoder.W) gather(u.term[k].pairs, u.term[k].v, u.centred + s * u.tokens * SLICE, j, g0, g1);
    }
    const vf pull = splat((u.pull ? u.pull[j] : 0) - (u.unit ? shares.along[j] : 0));
    g0 += pull * w0, g1 += pull * w1;
    add_square(slope, block, g0, g1, j, last);
    const vf a = adam(w0, u.decoder.m + at, u.decoder.v + at, g0, rates);
    const vf b = adam(w1, u.decoder.m + at + 16, u.decoder.v + at + 16, g1, rates);
    store(u.decoder.W + at, a);
    store(u.decoder.W + at + 16, b);
    square[j] = sum(a * a + b * b);
  }
}

void update_encoder(const Update& u, int64_t s, int64_t first, int64_t last, Shares& shares) {
  const Rates rates(u);
  const int64_t slices = (u.d_in + SLICE - 1) / SLICE;
  const bool tied = !u.encoder.W;
  float *square = &shares.encoder[s * u.d_sae], *largest = &shares.largest[s * u.d_sae];
  float* slope = &shares.slope[(shares.given + s) * shares.blocks];
  vf b0{}, b1{}, block{};
  const vf d0 = u.dim ? load(u.dim + s * SLICE) : vf{}, d1 = u.dim ? load(u.dim + s * SLICE + 16) : vf{};
  for (int64_t j = first; j < last; j++) {
    const int64_t at = (s * u.d_sae + j) * SLICE;
    float* W = (tied ? u.decoder.W : u.encoder.W) + at;
    vf w0 = load(W), w1 = load(W + 16);
    if (u.partial) {
      b0 += splat(shares.bias_grad[j]) * w0, b1 += splat(shares.bias_grad[j]) * w1;
      if ((j + 1) % BLOCK == 0 || j + 1 == last) {
        float* partial = u.partial + (j / BLOCK * slices + s) * SLICE;
        store(partial, b0), store(partial + 16, b1);
        b0 = b1 = vf{};
      }
    }
    if (!tied) {
      vf g0{}, g1{};
      for (int64_t k = 0; k < u.terms; k++) gather(u.term[k].pairs, u.term[k].v, u.centred + s * u.tokens * SLICE, j, g0, g1);
      add_square(slope, block, g0, g1, j, last);
      w0 = adam(w0, u.encoder.m + at, u.encoder.v + at, g0, rates);
      w1 = adam(w1, u.encoder.m + at + 16, u.encoder.v + at + 16, g1, rates);
      store(W, w0);
      store(W + 16, w1);
    }
    const vf q0 = u.dim ? w0 * d0 : vf{}, q1 = u.dim ? w1 * d1 : vf{};
    square[j] = sum(q0 * q0 + q1 * q1);
    float a[SLICE], most = 0;
    store(a, q0), store(a + 16, q1);
#pragma omp simd reduction(max : most)
    for (int i = 0; i < SLICE; i++) most = std::max(most, std::fabs(a[i]));
    largest[j] = most;
  }
}

// What a latent has of its own, once all slices are done.
void update_rest(const Update& u, int64_t first, int64_t last, const Shares& shares) {
  for (int64_t j = first; j < last; j++) {
    float square = 0;
    for (int64_t s = 0; s < shares.given; s++) square += shares.decoder[s * u.d_sae + j];
    u.norm[j] = std::sqrt(square);
    if (u.unit) u.row_scale[j] = 1 / std::max(u.norm[j], 1e-12f);
    u.largest[j] = u.square[j] = 0;
    for (int64_t s = 0; s < shares.taken; s++) {
      u.square[j] += shares.encoder[s * u.d_sae + j];
      u.largest[j] = std::max(u.largest[j], shares.largest[s * u.d_sae + j]);
    }
  }
  float& slope = u.slope[first / BLOCK] = 0;
  for (int64_t s = 0; s < shares.given + shares.taken; s++) slope += shares.slope[s * shares.blocks + first / BLOCK];
  if (!u.b_enc) return;
  for (int64_t j = first; j < last; j++) {
    slope += shares.bias_grad[j] * shares.bias_grad[j];
    const float g = u.factor * shares.bias_grad[j];
    u.b_enc_m[j] += (1 - u.beta1) * (g - u.b_enc_m[j]);
    u.b_enc_v[j] = u.beta2 * u.b_enc_v[j] + (1 - u.beta2) * g * g;
    u.b_enc[j] -= u.lr / u.correction1 * u.b_enc_m[j] / (std::sqrt(u.b_enc_v[j]) / std::sqrt(u.correction2) + u.eps);
  }
}

}  // namespace

extern "C" {

// Gradients of both matrices, Adam and unit norm, slice by slice: a thread that has one keeps the tokens' part of it in its
// second-level cache, and others need it only where there are more threads than slices. No gradient matrix exists.
int64_t update_latents(const Update* update) {
  const Update& u = *update;
  return status_of([&] {
    Shares shares(u);
    over_latents(u.term[0].pairs, u.d_sae, [&](int64_t first, int64_t last) {
      std::vector<float> products;  // rounded before they are added, by whatever compiler
      for (int64_t k = 0; k < u.terms; k++) {
        const Terms& t = u.term[k];
        const int64_t begin = t.pairs.offsets[first], end = t.pairs.offsets[last];
        products.resize(end - begin);
        for (int64_t p = begin; p < end; p++) products[p - begin] = t.z[p] * t.along[p];
        for (int64_t j = first; j < last; j++)
          for (int64_t p = t.pairs.offsets[j]; p < t.pairs.offsets[j + 1]; p++)
            shares.along[j] += products[p - begin], shares.bias_grad[j] += t.v[p];
      }
    });
    const int64_t slices = u.encoder.W ? shares.given + shares.taken : shares.given;
    const int64_t parts = (parts_for(team()) + slices - 1) / slices;
    const std::vector<int64_t> borders = split(u.term[0].pairs.offsets, u.d_sae, parts, BLOCK, WORK_PER_LATENT);
    share_out(slices * parts, 1, [&](int64_t task, int64_t) {
      const int64_t s = task / parts, first = borders[task % parts], last = borders[task % parts + 1];
      if (s < shares.given) update_decoder(u, s, first, last, shares);
      if (!u.encoder.W) update_encoder(u, s, first, last, shares);  // the same rows
      if (s >= shares.given) update_encoder(u, s - shares.given, first, last, shares);
    });
    share_out(u.d_sae, BLOCK, [&](int64_t first, int64_t last) { update_rest(u, first, last, shares); });
  });
}

// largest[j], square[j] of the rows of W times dim.
void measure_rows(const float* W, const float* dim, int64_t d_sae, int64_t d_in, float* largest, float* square) {
  const int64_t slices = (d_in + SLICE - 1) / SLICE;
  share_out(d_sae, BLOCK, [=](int64_t first, int64_t last) {
    for (int64_t j = first; j < last; j++) {
      float most = 0, total = 0;
      for (int64_t s = 0; s < slices; s++)
        for (int64_t i = 0; i < SLICE; i++) {
          const float w = W[(s * d_sae + j) * SLICE + i] * dim[s * SLICE + i];
          most = std::max(most, std::fabs(w));
          total += w * w;
        }
      largest[j] = most, square[j] = total;
    }
  });
}

}  // extern "C"
