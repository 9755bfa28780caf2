// Which latents are active, and their exact values, without the [batch, d_sae] pre-activations.
//
// 1. Every encoder row and every centred activation is rounded to 8 bits (a scale per row; both first divided or
//    multiplied by a scale per dimension, so that loud dimensions do not eat the range).
// 2. Their product, in exact integer arithmetic, gives approximate pre-activations tile by tile. The standard deviation
//    of what rounding changed follows from the scales and norms; MARGIN times it bounds each pre-activation from above
//    and below. A latent stays a candidate while its upper bound reaches the k-th best lower bound so far.
// 3. The survivors (a little more than k) are computed again in float32, and the k largest of those are returned.
//
// A batch starts from a guess of each token's k-th pre-activation, learned from the batch before. Where the exact k-th
// value turns out below the guess, or rounding leaves too many candidates (one loud dimension makes a token's step wide),
// the token is done again without a guess and with 16 bits, as two rows of 8. Guesses change the time, never the result.
#include "common.h"
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
#include <immintrin.h>
#define HAVE_INT8 1
#endif

extern "C" void to_slices(const float* rows, const float* centre, int64_t n, int64_t d_in, float* out, float* less);

namespace {

constexpr int TOKENS = 14, PANEL = 32;  // a tile: 14 tokens by 32 latents fill 28 of the 32 vector registers
constexpr float FINE = 254;           // steps of a 16-bit token's second row in one of its first
constexpr float MARGIN = 4;             // standard deviations of the rounding error allowed for, each side
constexpr float LOWEST = -3.0e38f;
constexpr int HALVINGS = 10;  // enough: what stays a candidate without need costs one exact value
constexpr int64_t TOGETHER = 64;  // tokens of a task where there is little to do for each
constexpr float GUESS_QUANTILE = 0.01f, CAUTION = 0.9f;  // a guess too high costs more than one too low

// The guess for the next batch: low enough for all but a small share of this batch's tokens, and lower where it falls.
void learn_guess(std::vector<float>& reached, float& guess, float& trend) {
  if (reached.empty()) {
    guess = trend = NAN;
    return;
  }
  const size_t n = (size_t)(GUESS_QUANTILE * reached.size());
  std::nth_element(reached.begin(), reached.begin() + n, reached.end());
  const float fall = std::isfinite(trend) && trend > 0 ? std::min(1.0f, reached[n] / trend) : NAN;
  trend = reached[n];
  guess = reached[n] > 0 ? CAUTION * fall * reached[n] : NAN;
}

// The k-th largest of n >= k numbers, by halving the range of their bit patterns, which are ordered as the numbers are.
// NaN counts as -infinity, -0 as 0.
float kth_largest(const float* values, int64_t n, int64_t k, std::vector<int32_t>& keys) {
  keys.resize(n);
  int32_t least = INT32_MAX, most = INT32_MIN;
#pragma omp simd reduction(min : least) reduction(max : most)
  for (int64_t i = 0; i < n; i++) {
    const float v = values[i] == values[i] ? values[i] + 0.0f : -INFINITY;
    int32_t bits;
    std::memcpy(&bits, &v, 4);
    keys[i] = bits ^ (bits >> 31 & INT32_MAX);
    least = std::min(least, keys[i]), most = std::max(most, keys[i]);
  }
  int64_t low = least, high = (int64_t)most + 1;
  while (high - low > 1) {
    const int32_t middle = (int32_t)(low + (high - low) / 2);
    int32_t count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t i = 0; i < n; i++) count += keys[i] >= middle;
    (count >= k ? low : high) = middle;
    if (count == k) {  // none between the k-th and the rest is asked about again
      least = INT32_MAX;
#pragma omp simd reduction(min : least)
      for (int64_t i = 0; i < n; i++) least = std::min(least, keys[i] >= middle ? keys[i] : INT32_MAX);
      low = least;
      break;
    }
  }
  const int32_t bits = (int32_t)low ^ ((int32_t)low >> 31 & INT32_MAX);
  float found;
  std::memcpy(&found, &bits, 4);
  return found;
}

}  // namespace

extern "C" {

struct Encoder {
  const float* W;         // slices of [d_sae]
  const float* bias;      // [d_sae] or null
  const float* floor;     // [d_sae] or null: subtracted from a pre-activation before it is compared with `above`
  int64_t d_sae, d_in;
  int64_t group;          // latents per group
  const uint8_t* packed;  // panels of 32 latents: [d_in / 4][2][16][4], 128 added
  const float* scale;     // [padded] step of each rounded row
  const float* norm;      // [padded] norm of each scaled row
  const float* dim;       // [slices * 32] scale of each dimension, padded with ones
};

struct Selection {
  int64_t k;           // wanted per group; 0: everything above `above`
  float above;         // nothing else is wanted; -infinity: everything is
  float guess, trend;  // in and out: k-th pre-activation per unit norm of the token, as first guessed; its last quantile
  int64_t keep;        // entries returned per token (k > 0)
  int64_t whole;       // tokens of the batch of which these are all or some: it decides in what order terms are added
  float* norms;        // [batch] or null. Given, other selections have more latents, and of a token that has a guess
                       // what is below it is not wanted: fewer than `keep` may be returned, and no guess is learned
  float* lower;        // [batch, keep], with `norms`: lower bounds of each token's best candidates here, in its steps
  const float* (*agree)(void);  // returns everyone's `lower` [parts, batch, keep], null where that failed
  int64_t parts;       // how many selections share the batch
  float* values;       // [batch, keep]
  int64_t* indices;    // [batch, keep]
  int64_t* counts;     // [batch]
  int64_t examined;    // out: candidates computed exactly
  int64_t exhaustive;  // out: tokens for which every latent was computed exactly
  int64_t repeated;    // out: tokens scanned again with 16 bits
};

struct Lists {  // the entries, token by token, when k is 0
  std::vector<float> values;
  std::vector<int64_t> indices;
};

int has_int8(void) {
#ifdef HAVE_INT8
  return 1;
#else
  return 0;
#endif
}

int64_t padded_latents(int64_t d_sae, int64_t group) {
  return d_sae / group * ((group + PANEL - 1) / PANEL * PANEL);
}

int64_t packed_bytes(int64_t d_sae, int64_t d_in, int64_t group) {
  return padded_latents(d_sae, group) * ((d_in + 3) / 4 * 4);
}

// Round the encoder's rows to 8 bits, a step per row so that its largest entry is 127, panel by panel.
void pack(const float* W, const float* dim, const float* largest, const float* square, int64_t d_sae, int64_t d_in,
          int64_t group, uint8_t* packed, float* scale, float* norm) {
  const int64_t per_group = (group + PANEL - 1) / PANEL * PANEL, panels = padded_latents(d_sae, group) / PANEL;
  const int64_t steps = (d_in + 3) / 4, slices = (d_in + SLICE - 1) / SLICE;
  share_out(panels, 4, [=](int64_t begin, int64_t end) { for (int64_t panel = begin; panel < end; panel++) {
    const int64_t within = panel * PANEL % per_group, first = panel * PANEL / per_group * group + within;
    const int64_t real = std::min<int64_t>(PANEL, group - within);
    float inverse[PANEL];
    for (int64_t i = 0; i < PANEL; i++) {
      const float most = i < real ? largest[first + i] : 0;
      scale[panel * PANEL + i] = most > 0 ? most / 127 : 1;
      norm[panel * PANEL + i] = i < real ? std::sqrt(square[first + i]) : 0;
      inverse[i] = 1 / scale[panel * PANEL + i];
    }
    uint8_t* out = packed + panel * PANEL * steps * 4;
    for (int64_t s = 0; s < slices; s++)
      for (int64_t i = 0; i < real; i++) {
        const float* row = W + (s * d_sae + first + i) * SLICE;
        alignas(64) uint8_t q[SLICE];
#pragma omp simd
        for (int64_t d = 0; d < SLICE; d++) {
          const float v = row[d] * dim[s * SLICE + d] * inverse[i] + 128;
          q[d] = (uint8_t)(int)(v + 0.5f);  // v is in 1 .. 255, so this rounds to nearest
        }
        for (int64_t k = 0; k < SLICE / 4 && s * (SLICE / 4) + k < steps; k++)
          std::memcpy(out + ((s * (SLICE / 4) + k) * PANEL + i) * 4, q + 4 * k, 4);
      }
  } });
}

}  // extern "C"

#ifdef HAVE_INT8
namespace {

// acc[14][32] = init + sum over n steps of 4: A [n][14][4] signed, B [n][2][16][4] unsigned.
static inline void tile(const int8_t* a, const uint8_t* b, int64_t n, const int32_t* init, int32_t* out) {
#define START(m, r0, r1) "vpbroadcastd 4*" #m "(%[init]),%%zmm" #r0 "\n" "vmovdqa64 %%zmm" #r0 ",%%zmm" #r1 "\n"
#define STEP(m, r0, r1, t) "vpbroadcastd 4*" #m "(%[a]),%%zmm" #t "\n" \
  "vpdpbusd %%zmm" #t ",%%zmm28,%%zmm" #r0 "\n" "vpdpbusd %%zmm" #t ",%%zmm29,%%zmm" #r1 "\n"
#define END(m, r0, r1) "vmovdqu64 %%zmm" #r0 ",128*" #m "(%[out])\n" "vmovdqu64 %%zmm" #r1 ",128*" #m "+64(%[out])\n"
  asm volatile(
      START(0, 0, 1) START(1, 2, 3) START(2, 4, 5) START(3, 6, 7) START(4, 8, 9) START(5, 10, 11) START(6, 12, 13)
      START(7, 14, 15) START(8, 16, 17) START(9, 18, 19) START(10, 20, 21) START(11, 22, 23) START(12, 24, 25)
      START(13, 26, 27)
      "1:\n"
      "vmovdqu64 (%[b]),%%zmm28\n"
      "vmovdqu64 64(%[b]),%%zmm29\n"
      STEP(0, 0, 1, 30) STEP(1, 2, 3, 31) STEP(2, 4, 5, 30) STEP(3, 6, 7, 31) STEP(4, 8, 9, 30) STEP(5, 10, 11, 31)
      STEP(6, 12, 13, 30) STEP(7, 14, 15, 31) STEP(8, 16, 17, 30) STEP(9, 18, 19, 31) STEP(10, 20, 21, 30)
      STEP(11, 22, 23, 31) STEP(12, 24, 25, 30) STEP(13, 26, 27, 31)
      "add $128,%[b]\n"
      "add $56,%[a]\n"
      "dec %[n]\n"
      "jnz 1b\n"
      END(0, 0, 1) END(1, 2, 3) END(2, 4, 5) END(3, 6, 7) END(4, 8, 9) END(5, 10, 11) END(6, 12, 13) END(7, 14, 15)
      END(8, 16, 17) END(9, 18, 19) END(10, 20, 21) END(11, 22, 23) END(12, 24, 25) END(13, 26, 27)
      : [a] "+r"(a), [b] "+r"(b), [n] "+r"(n)
      : [init] "r"(init), [out] "r"(out)
      : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
        "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23",
        "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31");
#undef START
#undef STEP
#undef END
}

// Candidates of one token: [0, fixed) of finished groups, [fixed, count) of the group at hand.
struct Candidates {
  float* upper;     // upper bound of the pre-activation, in steps of the token
  int32_t* index;
  int32_t count, fixed, capacity, wanted;
  float threshold;  // no latent below it is among the best
  float inverse;    // 1 / the token's step
  float reach;      // a bound's distance from the approximation, per unit spread of the latent
  bool overflow;
};

struct Token {
  float step = 1, norm = 0, guess = LOWEST;
  bool broken = false;  // holds NaN or infinity

  float kappa(int64_t d_in) const { return norm / step * (norm / step) + d_in / 12.0f; }
};

// All that a call shares: the encoder, what is asked, and how far rounding may move each latent.
struct Job {
  const Encoder& e;
  const Selection& s;
  std::vector<float> inverse_dim;  // [d_in]
  std::vector<float> spread;       // [padded]: what bounds a latent's rounding error, see make_job
  std::vector<float> offset;       // [padded]: bias less floor; what fills up a panel is out of reach
  std::vector<Token> tokens;       // as measured, not rounded yet
  int64_t steps, panels, groups, capacity;
  int lanes;  // rows of 8 bits a token takes: 1, or 2 for 16 bits

  int held() const { return TOKENS / lanes; }  // tokens of a tile
};

// Working memory of one thread.
struct Chunk {
  std::vector<int8_t> q;       // [blocks][steps][14][4]
  std::vector<int32_t> start;  // -128 * sum of a token's rounded entries: undoes the 128 added to the weights
  std::vector<Token> tokens;
  std::vector<float> scratch;
  std::unique_ptr<float[]> upper;  // not filled with zeros: most of the room is for few tokens
  std::unique_ptr<int32_t[]> index;
  std::vector<Candidates> candidates;
};

Token measure(const Encoder& e, const float* inverse_dim, const float* x) {
  float largest = 0, square = 0;
#pragma omp simd reduction(max : largest) reduction(+ : square)
  for (int64_t i = 0; i < e.d_in; i++) {
    const float v = x[i] * inverse_dim[i];
    largest = std::max(largest, std::fabs(v));
    square += v * v;
  }
  Token token;
  token.broken = !(square < 3e38f);
  if (token.broken || largest == 0) return token;
  token.step = largest / 127;
  token.norm = std::sqrt(square);
  return token;
}

// Round a token into its lanes: whole steps, then what they leave in steps FINE times as narrow.
void round_token(const Job& job, const float* x, const Token& token, int8_t* q, int32_t* start) {
  const float up = 1 / token.step;
  int32_t total = 0, rest = 0;
  for (int64_t first = 0; first < job.e.d_in; first += SLICE) {
    const int64_t n = std::min<int64_t>(SLICE, job.e.d_in - first);
    alignas(64) int8_t part[2][SLICE] = {};
#pragma omp simd reduction(+ : total, rest)
    for (int64_t i = 0; i < n; i++) {
      const float v = x[first + i] * job.inverse_dim[first + i] * up;
      const int rounded = (int)(v + 128.5f) - 128;  // v is in -127 .. 127
      const int finer = (int)((v - rounded) * FINE + 128.5f) - 128;
      part[0][i] = (int8_t)rounded, part[1][i] = (int8_t)finer;
      total += rounded, rest += finer;
    }
    for (int lane = 0; lane < job.lanes; lane++)
      for (int64_t k = 0; k < (n + 3) / 4; k++)
        std::memcpy(q + ((first / 4 + k) * TOKENS + lane) * 4, part[lane] + 4 * k, 4);
  }
  start[0] = -128 * total;
  if (job.lanes > 1) start[1] = -128 * rest;
}

// The largest number found by halving that at least `wanted` of n values reach; `values` has room for a whole vector more.
float reached_by(float* values, int n, int wanted) {
  std::fill(values + n, values + n + 16, LOWEST);
  __m512 low = _mm512_set1_ps(-LOWEST), high = _mm512_set1_ps(LOWEST);
  for (int i = 0; i < n; i += 16) {
    const __mmask16 real = n - i < 16 ? (1 << (n - i)) - 1 : 0xffff;
    low = _mm512_mask_min_ps(low, real, low, _mm512_loadu_ps(values + i));
    high = _mm512_max_ps(high, _mm512_loadu_ps(values + i));
  }
  float least = _mm512_reduce_min_ps(low), most = _mm512_reduce_max_ps(high);
  for (int step = 0; step < HALVINGS; step++) {
    const float middle = least + (most - least) / 2;
    int count = 0;
    for (int i = 0; i < n; i += 16)
      count += __builtin_popcount(_mm512_cmp_ps_mask(_mm512_loadu_ps(values + i), _mm512_set1_ps(middle), _CMP_GE_OQ));
    (count >= wanted ? least : most) = middle;
  }
  return least;
}

// Raise the threshold to the wanted-th best lower bound, and drop what cannot reach it. `shift`: from a latent of the
// group at hand to its place.
void prune(const Job& job, Candidates& c, int64_t shift, std::vector<float>& scratch) {
  const int n = c.count - c.fixed;
  if (c.wanted == 0 || n < c.wanted) return;
  scratch.resize(n + 32);
  const __m512 twice = _mm512_set1_ps(2 * c.reach);
  for (int i = 0; i < n; i += 16) {
    const __mmask16 real = n - i < 16 ? (1 << (n - i)) - 1 : 0xffff;
    const __m512i place = _mm512_maskz_loadu_epi32(real, c.index + c.fixed + i);
    const __m512 spread = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), real, place, job.spread.data() + shift, 4);
    _mm512_storeu_ps(&scratch[i], _mm512_fnmadd_ps(twice, spread, _mm512_maskz_loadu_ps(real, c.upper + c.fixed + i)));
  }
  c.threshold = std::max(c.threshold, reached_by(scratch.data(), n, c.wanted));
  int kept = c.fixed;
  for (int i = c.fixed; i < c.count; i += 16) {
    const __mmask16 real = c.count - i < 16 ? (1 << (c.count - i)) - 1 : 0xffff;
    const __m512 upper = _mm512_maskz_loadu_ps(real, c.upper + i);
    const __m512i index = _mm512_maskz_loadu_epi32(real, c.index + i);
    const __mmask16 mask = _mm512_mask_cmp_ps_mask(real, upper, _mm512_set1_ps(c.threshold), _CMP_GE_OQ);
    _mm512_storeu_ps(c.upper + kept, _mm512_maskz_compress_ps(mask, upper));
    _mm512_storeu_si512(c.index + kept, _mm512_maskz_compress_epi32(mask, index));
    kept += __builtin_popcount(mask);
  }
  c.count = kept;
}

void close_group(const Job& job, Candidates& c, int64_t shift, std::vector<float>& scratch, bool last) {
  prune(job, c, shift, scratch);
  c.fixed = c.count;
  if (!last && c.wanted > 0 && !c.overflow) c.threshold = LOWEST;
}

// Append the lanes of `mask`.
inline void push(const Job& job, Candidates& c, __m512 upper, __mmask16 mask, int32_t first, int64_t shift,
                 std::vector<float>& scratch) {
  if (c.count + 16 > c.capacity) {
    prune(job, c, shift, scratch);
    if (c.count + 16 > c.capacity) {  // too many within reach of rounding: this token is computed in full
      c.overflow = true;
      c.threshold = -LOWEST;
      return;
    }
    mask &= _mm512_cmp_ps_mask(upper, _mm512_set1_ps(c.threshold), _CMP_GE_OQ);
    if (!mask) return;
  }
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  _mm512_storeu_ps(c.upper + c.count, _mm512_maskz_compress_ps(mask, upper));
  _mm512_storeu_si512(c.index + c.count, _mm512_maskz_compress_epi32(mask, _mm512_add_epi32(_mm512_set1_epi32(first), lane)));
  c.count += __builtin_popcount(mask);
}

// Round a chunk's tokens and set up their candidates.
void prepare(const Job& job, const float* rows, int64_t first, int64_t count, bool guess, Chunk& w) {
  const float* x = rows + first * job.e.d_in;
  const int64_t held = job.held(), blocks = (count + held - 1) / held, room = job.capacity + 16;
  w.q.assign(blocks * job.steps * TOKENS * 4, 0);
  w.start.assign(blocks * TOKENS, 0);
  w.tokens.assign(blocks * held, {});
  w.candidates.resize(blocks * held);
  w.upper.reset(new float[blocks * held * room]);
  w.index.reset(new int32_t[blocks * held * room]);
  for (int64_t t = 0; t < blocks * held; t++) {
    Token& token = w.tokens[t];
    if (t < count) token = job.tokens[first + t];
    const bool idle = t >= count || token.broken;
    if (!idle) {
      const int64_t block = t / held, lane = t % held * job.lanes;
      int8_t* q = w.q.data() + (block * job.steps * TOKENS + lane) * 4;
      round_token(job, x + t * job.e.d_in, token, q, &w.start[block * TOKENS + lane]);
      if (guess) token.guess = job.s.guess * token.norm;
    }
    // above LOWEST: what fills up a panel has none
    const float start = std::max(LOWEST, std::max(guess ? token.guess : LOWEST, job.s.above) / token.step);
    const float own = job.lanes > 1 ? std::sqrt(token.kappa(job.e.d_in)) : 1;
    w.candidates[t] = {w.upper.get() + t * room, w.index.get() + t * room, 0, 0, (int32_t)job.capacity,
                       (int32_t)job.s.k, idle ? -LOWEST : start, 1 / token.step, MARGIN / std::sqrt(12.0f) * own, false};
  }
}

// Compare one tile with the tokens' thresholds.
inline void sift(const Job& job, const int32_t* acc, int64_t place, int32_t first, int64_t shift, Candidates* candidates, std::vector<float>& scratch) {
  const float *scale = job.e.scale + place, *offset = job.offset.data() + place, *spread = job.spread.data() + place;
  const __m512 s0 = _mm512_loadu_ps(scale), s1 = _mm512_loadu_ps(scale + 16);
  const __m512 o0 = _mm512_loadu_ps(offset), o1 = _mm512_loadu_ps(offset + 16);
  const __m512 r0 = _mm512_loadu_ps(spread), r1 = _mm512_loadu_ps(spread + 16);
  const int lanes = job.lanes, held = job.held();
  for (int m = 0; m < held; m++) {
    Candidates& c = candidates[m];
    const __m512 inverse = _mm512_set1_ps(c.inverse), reach = _mm512_set1_ps(c.reach);
    __m512 limit = _mm512_set1_ps(c.threshold);
    const int32_t* row = acc + m * lanes * PANEL;
    __m512 a0 = _mm512_cvtepi32_ps(_mm512_load_si512(row)), a1 = _mm512_cvtepi32_ps(_mm512_load_si512(row + 16));
    if (lanes > 1) {
      const __m512 narrow = _mm512_set1_ps(1 / FINE);
      a0 = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(row + PANEL)), narrow, a0);
      a1 = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(row + PANEL + 16)), narrow, a1);
    }
    const __m512 u0 = _mm512_fmadd_ps(r0, reach, _mm512_fmadd_ps(a0, s0, _mm512_mul_ps(o0, inverse)));
    const __m512 u1 = _mm512_fmadd_ps(r1, reach, _mm512_fmadd_ps(a1, s1, _mm512_mul_ps(o1, inverse)));
    __mmask16 m0 = _mm512_cmp_ps_mask(u0, limit, _CMP_GE_OQ), m1 = _mm512_cmp_ps_mask(u1, limit, _CMP_GE_OQ);
    if (!(m0 | m1)) continue;
    if (c.wanted == 1) {  // one winner: the best lower bound of the tile settles most of it
      const __m512 twice = _mm512_add_ps(reach, reach);
      const __m512 lower = _mm512_max_ps(_mm512_fnmadd_ps(r0, twice, u0), _mm512_fnmadd_ps(r1, twice, u1));
      c.threshold = std::max(c.threshold, _mm512_reduce_max_ps(lower));
      limit = _mm512_set1_ps(c.threshold);
      m0 = _mm512_cmp_ps_mask(u0, limit, _CMP_GE_OQ), m1 = _mm512_cmp_ps_mask(u1, limit, _CMP_GE_OQ);
    }
    if (m0) push(job, c, u0, m0, first, shift, scratch);
    if (m1) push(job, c, u1, m1, first + 16, shift, scratch);
  }
}

// Approximate pre-activations of a chunk against all panels; leaves the candidates.
void scan(const Job& job, Chunk& w) {
  const Encoder& e = job.e;
  const int64_t held = job.held(), blocks = w.tokens.size() / held;
  alignas(64) int32_t acc[TOKENS * PANEL];
  for (int64_t g = 0; g < job.groups; g++) {
    const int64_t shift = g * (job.panels * PANEL - e.group);
    for (int64_t p = 0; p < job.panels; p++) {
      const int64_t place = (g * job.panels + p) * PANEL, first = g * e.group + p * PANEL;
      for (int64_t b = 0; b < blocks; b++) {
        tile(w.q.data() + b * job.steps * TOKENS * 4, e.packed + place * job.steps * 4, job.steps, &w.start[b * TOKENS], acc);
        sift(job, acc, place, (int32_t)first, shift, &w.candidates[b * held], w.scratch);
      }
    }
    for (Candidates& c : w.candidates) close_group(job, c, shift, w.scratch, g + 1 == job.groups);
  }
}

// The product of `scan` with nothing compared: what no selection from it can be faster than. Returns a sum of some entries.
int64_t product(const Job& job, Chunk& w) {
  const int64_t blocks = w.tokens.size() / job.held();
  alignas(64) int32_t acc[TOKENS * PANEL];
  int64_t total = 0;
  for (int64_t place = 0; place < job.groups * job.panels; place++)
    for (int64_t b = 0; b < blocks; b++) {
      const uint8_t* panel = job.e.packed + place * PANEL * job.steps * 4;
      tile(w.q.data() + b * job.steps * TOKENS * 4, panel, job.steps, &w.start[b * TOKENS], acc);
      total += acc[b % TOKENS * PANEL];
    }
  return total;
}

// A token's candidates, in order of latent; what is chosen of them is moved to the front.
struct Found {
  int32_t* latent;
  float* value;
  int64_t count;

  template <class F> void keep(F kept) {
    int64_t n = 0;
    for (int64_t i = 0; i < count; i++)
      if (kept(value[i], latent[i])) latent[n] = latent[i], value[n++] = value[i];
    count = n;
  }
};

// Keep the k largest, ties to the lower index.
void keep_largest(Found& found, int64_t k, std::vector<int32_t>& scratch) {
  if (k >= found.count) return;
  const float last = kth_largest(found.value, found.count, k, scratch);
  int64_t room = k - std::count_if(found.value, found.value + found.count, [=](float v) { return v > last; });
  found.keep([&](float v, int32_t) { return v > last || (!(v < last) && room-- > 0); });
}

// Keep the largest of each group; the candidates come group by group.
void keep_winners(Found& found, int64_t group) {
  int64_t n = 0;
  for (int64_t i = 0; i < found.count;) {
    const int64_t g = found.latent[i] / group;
    int64_t best = i;
    for (; i < found.count && found.latent[i] / group == g; i++)
      if (found.value[i] > found.value[best]) best = i;
    found.latent[n] = found.latent[best], found.value[n++] = found.value[best];
  }
  found.count = n;
}

// What is known of a set of tokens after its scan: their candidates, and then what was chosen of them.
struct Round {
  std::vector<Token> tokens;
  std::vector<std::vector<int32_t>> chunk_latents;
  std::vector<std::vector<float>> chunk_upper;  // their upper bounds, while others are still to be heard
  std::vector<int64_t> offsets;  // [tokens + 1] into latents
  std::vector<int32_t> latents;
  std::vector<float> values;     // exact pre-activations of the candidates
  std::vector<int64_t> chosen;   // how many of a token's candidates were, moved to their front
  std::vector<uint8_t> failed;   // 8 bits or the guess did not settle it
  int64_t exhaustive = 0;

  Found found(int64_t t) { return {latents.data() + offsets[t], values.data() + offsets[t], offsets[t + 1] - offsets[t]}; }
};

// Note the upper bounds of a token's candidates, and the lower bounds of the best of them for the others to know.
void tell(const Job& job, const Candidates& c, float* lower, std::vector<float>& upper) {
  upper.insert(upper.end(), c.upper, c.upper + c.count);
  const float threshold = c.count > job.s.keep ? c.threshold : -INFINITY;
  for (int64_t i = 0, n = 0; i < c.count && n < job.s.keep; i++) {
    const float bound = c.upper[i] - 2 * c.reach * job.spread[c.index[i]];
    lower[n] = bound, n += bound >= threshold;
  }
}

// Drop the candidates that everyone's lower bounds leave no place for: those of a batch shared by `parts` selections.
void hear(const Job& job, int64_t count, int64_t chunk, Round& r) {
  const float* all = job.s.agree();
  if (!all) throw Unheard();
  const int64_t k = job.s.keep;
  share_out(count, chunk, [&](int64_t first, int64_t last) {
    std::vector<float> bounds(job.s.parts * k + 32);
    std::vector<int32_t>& latents = r.chunk_latents[first / chunk];
    std::vector<float>& upper = r.chunk_upper[first / chunk];
    int64_t from = 0, to = 0;
    for (int64_t t = first; t < last; t++) {
      int n = 0;
      for (int64_t part = 0; part < job.s.parts; part++)
        for (int64_t i = 0; i < k; i += 16) {
          const __mmask16 real = k - i < 16 ? (1 << (k - i)) - 1 : 0xffff;
          const __m512 bound = _mm512_maskz_loadu_ps(real, all + (part * count + t) * k + i);
          const __mmask16 told = _mm512_mask_cmp_ps_mask(real, bound, _mm512_set1_ps(LOWEST), _CMP_GT_OQ);
          _mm512_storeu_ps(&bounds[n], _mm512_maskz_compress_ps(told, bound));
          n += __builtin_popcount(told);
        }
      const bool every = r.tokens[t].broken || n < k;
      const float threshold = every ? -INFINITY : reached_by(bounds.data(), n, k);
      const int64_t begin = to;
      for (const int64_t end = from + r.offsets[t + 1]; from < end; from++) {
        latents[to] = latents[from];
        to += every || upper[from] >= threshold;
      }
      r.offsets[t + 1] = to - begin;
    }
    latents.resize(to);
    upper = {};
  });
}

// Scan all tokens, chunk by chunk.
void find_candidates(const Job& job, const float* x, int64_t count, int64_t chunk, bool guess, Round& r) {
  r.tokens.resize(count);
  r.failed.assign(count, 0);
  r.offsets.assign(count + 1, 0);
  r.chunk_latents.assign((count + chunk - 1) / chunk, {});
  const bool shared = job.s.agree && job.lanes == 1;
  if (shared) {
    r.chunk_upper.assign(r.chunk_latents.size(), {});
    std::fill(job.s.lower, job.s.lower + count * job.s.keep, -INFINITY);
  }
  std::atomic<int64_t> exhaustive{0};
  share_out(count, chunk, [&](int64_t first, int64_t last) {
    Chunk w;
    prepare(job, x, first, last - first, guess, w);
    scan(job, w);
    std::vector<int32_t>& out = r.chunk_latents[first / chunk];
    for (int64_t t = first; t < last; t++) {
      const Candidates& found = w.candidates[t - first];
      const size_t before = out.size();
      r.failed[t] = found.overflow && job.lanes == 1 && job.s.k > 0;
      r.tokens[t] = w.tokens[t - first];
      if (r.tokens[t].broken || (found.overflow && !r.failed[t])) {
        for (int64_t j = 0; j < job.e.d_sae; j++) out.push_back((int32_t)j);
        if (shared) r.chunk_upper[first / chunk].resize(out.size(), INFINITY);
        exhaustive++;
      } else if (!r.failed[t]) {
        out.insert(out.end(), found.index, found.index + found.count);
        if (shared) tell(job, found, job.s.lower + t * job.s.keep, r.chunk_upper[first / chunk]);
      }
      r.offsets[t + 1] = out.size() - before;
    }
  });
  r.exhaustive = exhaustive;
  if (shared) hear(job, count, chunk, r);
  for (int64_t t = 0; t < count; t++) r.offsets[t + 1] += r.offsets[t];
  r.latents.reserve(r.offsets[count]);
  for (std::vector<int32_t>& part : r.chunk_latents) {
    r.latents.insert(r.latents.end(), part.begin(), part.end());
    part = {};
  }
}

// Exact values of all candidates, latent by latent.
void compute_exactly(const Job& job, const float* slices_of_x, int64_t count, Round& r) {
  const Encoder& e = job.e;
  const int64_t n = r.latents.size(), slices = (e.d_in + SLICE - 1) / SLICE, parts = parts_for(team());
  std::vector<int64_t> offsets(e.d_sae + 1);
  std::vector<int32_t> order(n), tokens(n);
  std::vector<float> sorted(n);
  sort_by_latent(r.latents.data(), r.offsets.data(), count, e.d_sae, offsets.data(), order.data(), tokens.data(), every_pair);
  const Pairs pairs{offsets.data(), tokens.data()};
  const std::vector<int64_t> borders = split(offsets.data(), e.d_sae, parts, PANEL, 1);
  r.values.resize(n);
  share_out(parts, 1, [&](int64_t part, int64_t) {
    const int64_t first = borders[part], last = borders[part + 1];
    dot_range(pairs, slices_of_x, e.W, nullptr, first, last, e.d_sae, count, job.s.whole, slices, sorted.data());
    for (int64_t j = first; j < last; j++)
      for (int64_t p = offsets[j]; p < offsets[j + 1]; p++) r.values[order[p]] = sorted[p] + (e.bias ? e.bias[j] : 0);
  });
}

// Choose among a token's candidates; says whether its guess was low enough.
bool choose(const Job& job, Round& r, int64_t t, std::vector<int32_t>& scratch) {
  const Encoder& e = job.e;
  Found found = r.found(t);
  Token& token = r.tokens[t];
  if (job.s.above != -INFINITY) found.keep([&](float v, int32_t j) { return v - (e.floor ? e.floor[j] : 0) > job.s.above; });
  bool enough = true;
  if (job.groups > 1) {
    keep_winners(found, e.group);
  } else if (job.s.k > 0) {
    keep_largest(found, job.s.keep, scratch);
    if (job.s.norms) {
      found.keep([&](float v, int32_t) { return !(v < token.guess); });
    } else {
      float kth = INFINITY;
      for (int64_t i = 0; i < found.count; i++) kth = std::min(kth, found.value[i]);
      enough = (found.count >= job.s.keep && kth >= token.guess) || token.guess == LOWEST || token.broken;
      if (enough && token.norm > 0) token.guess = kth / token.norm;  // what the next batch may learn
    }
  }
  r.chosen[t] = found.count;
  return enough;
}

Round run_round(const Job& job, const float* x, const float* slices_of_x, int64_t count, int64_t chunk, bool guess) {
  Round r;
  find_candidates(job, x, count, chunk, guess, r);
  compute_exactly(job, slices_of_x, count, r);
  r.chosen.resize(count);
  share_out(count, TOGETHER, [&](int64_t first, int64_t last) {
    std::vector<int32_t> scratch;
    for (int64_t t = first; t < last; t++) r.failed[t] = r.failed[t] || !choose(job, r, t, scratch);
  });
  return r;
}

Job make_job(const Encoder& e, const Selection& s, const float* x, int64_t batch, int lanes) {
  Job job{e, s, {}, {}, {}, std::vector<Token>(batch), (e.d_in + 3) / 4, (e.group + PANEL - 1) / PANEL, e.d_sae / e.group, 0, lanes};
  job.capacity = s.k > 0 ? 2 * job.groups * s.k + s.k / 2 + 128 : std::max<int64_t>(1024, e.d_sae / 4);
  job.inverse_dim.resize(e.d_in);
  for (int64_t i = 0; i < e.d_in; i++) job.inverse_dim[i] = 1 / e.dim[i];
  // Rounding errors are uniform in one step, so of variance step^2 / 12 per entry. In units of the token's step the
  // variance of a latent's error is (own^2 + kappa step^2) / 12: own = norm, or norm / FINE with 16 bits. For all tokens
  // spread^2 = own^2 + most kappa step^2 bounds the bracket. With 16 bits own hardly counts and kappa differs, so there
  // spread^2 = own^2 / least kappa + step^2, times each token's kappa.
  share_out(batch, TOGETHER, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t++) job.tokens[t] = measure(e, job.inverse_dim.data(), x + t * e.d_in);
  });
  float least = INFINITY, most = 0;
  for (const Token& token : job.tokens) least = std::min(least, token.kappa(e.d_in)), most = std::max(most, token.kappa(e.d_in));
  const float narrow = lanes > 1 ? 1 / (FINE * FINE * least) : 1, wide = lanes > 1 ? 1 : most;
  const int64_t padded = padded_latents(e.d_sae, e.group);
  job.spread.resize(padded);
  job.offset.assign(padded, -INFINITY);
  for (int64_t j = 0; j < e.d_sae; j++)
    job.offset[j / e.group * job.panels * PANEL + j % e.group] = (e.bias ? e.bias[j] : 0) - (e.floor ? e.floor[j] : 0);
  for (int64_t j = 0; j < padded; j++)
    job.spread[j] = std::sqrt(narrow * e.norm[j] * e.norm[j] + wide * e.scale[j] * e.scale[j]);
  return job;
}

}  // namespace

extern "C" {

// Fill values, indices and counts of a batch from its centred rows, given as rows and as slices. With k = 0 the entries
// are returned through `lists` (see `collect`).
static void select_all(const Encoder* encoder, const float* x, const float* slices_of_x, int64_t batch, int64_t chunk,
                       Selection* s, Lists* lists) {
  const Job job = make_job(*encoder, *s, x, batch, 1);
  const int64_t d = encoder->d_in;
  const bool guess = s->k > 0 && job.groups == 1 && std::isfinite(s->guess);
  Round r = run_round(job, x, slices_of_x, batch, chunk, guess), second;
  std::vector<int64_t> rest;
  for (int64_t t = 0; t < batch; t++)
    if (r.failed[t]) rest.push_back(t);
  s->examined = r.latents.size(), s->exhaustive = r.exhaustive, s->repeated = rest.size();
  if (!rest.empty()) {
    const int64_t left = rest.size(), slices = (d + SLICE - 1) / SLICE;
    std::vector<float> rows(left * d), again(left * slices * SLICE);
    for (int64_t i = 0; i < left; i++) std::copy_n(x + rest[i] * d, d, rows.begin() + i * d);
    to_slices(rows.data(), nullptr, left, d, again.data(), nullptr);
    const Job finer = make_job(*encoder, *s, rows.data(), left, 2);
    second = run_round(finer, rows.data(), again.data(), left, std::min<int64_t>(chunk, 2 * TOKENS), false);
    s->examined += second.latents.size(), s->exhaustive += second.exhaustive;
  }
  std::vector<float> known;
  for (int64_t t = 0, done = 0; t < batch; t++) {
    const bool again = r.failed[t];
    Round& from = again ? second : r;
    const int64_t i = again ? done++ : t, n = from.chosen[i];
    const Found found = from.found(i);
    const Token& token = from.tokens[i];
    s->counts[t] = n;
    if (s->norms) s->norms[t] = token.norm;
    if (lists) {
      lists->values.insert(lists->values.end(), found.value, found.value + n);
      lists->indices.insert(lists->indices.end(), found.latent, found.latent + n);
    } else {
      std::copy_n(found.value, n, s->values + t * s->keep);
      std::copy_n(found.latent, n, s->indices + t * s->keep);
    }
    if (token.norm > 0 && std::isfinite(token.guess) && token.guess > LOWEST) known.push_back(token.guess);
  }
  if (s->k > 0 && job.groups == 1 && !s->norms) learn_guess(known, s->guess, s->trend);
}

int64_t select_int8(const Encoder* encoder, const float* x, const float* slices_of_x, int64_t batch, int64_t chunk,
                    Selection* s, Lists* lists) {
  return status_of([&] { select_all(encoder, x, slices_of_x, batch, chunk, s, lists); });
}

// The 8-bit product alone, of a batch with all latents; returns a sum of some entries.
int64_t product_int8(const Encoder* encoder, const float* x, int64_t batch, int64_t chunk) {
  const Selection nothing{1, -INFINITY};
  const Job job = make_job(*encoder, nothing, x, batch, 1);
  std::atomic<int64_t> total{0};
  share_out(batch, chunk, [&](int64_t first, int64_t last) {
    Chunk w;
    prepare(job, x, first, last - first, false, w);
    total += product(job, w);
  });
  return total;
}

}  // extern "C"
#else
extern "C" int64_t select_int8(const Encoder*, const float*, const float*, int64_t, int64_t, Selection*, Lists*) { return 0; }
extern "C" int64_t product_int8(const Encoder*, const float*, int64_t, int64_t) { return 0; }
#endif

extern "C" {

Lists* new_lists(void) { return new Lists; }
void free_lists(Lists* lists) { delete lists; }

// Copy the entries of `lists` to arrays of the right length.
void collect(const Lists* lists, float* values, int64_t* indices) {
  std::copy(lists->values.begin(), lists->values.end(), values);
  std::copy(lists->indices.begin(), lists->indices.end(), indices);
}

// level [batch, wide]: 0 for the k largest of a row, ties to the first, and 1 for the rest.
int64_t rank_levels(const float* values, int64_t batch, int64_t wide, int64_t k, int64_t* level) {
  return status_of([=] {
    share_out(batch, TOGETHER, [=](int64_t first, int64_t last) {
      std::vector<int32_t> scratch;
      for (int64_t t = first; t < last; t++) {
        const float *row = values + t * wide, least = kth_largest(row, wide, k, scratch);
        int64_t room = k - std::count_if(row, row + wide, [=](float v) { return v > least; });
        for (int64_t i = 0; i < wide; i++) level[t * wide + i] = !(row[i] > least || (!(row[i] < least) && room-- > 0));
      }
    });
  });
}

// Of the entries that this one of `parts` selections found [batch, k], keep those among each token's k largest of all
// [parts, batch, k], ties to the lower part, then to the earlier entry. What a part lacks is -infinity. Kept entries stand
// without gaps at the beginning of values and indices then; offsets [batch + 1] say where. The guess for the next batch
// comes from `norms` [batch].
int64_t keep_shared(const float* all, int64_t parts, int64_t own, int64_t batch, int64_t k, const float* norms, float* values,
                    int64_t* indices, int64_t* offsets, float* guess) {
  return status_of([=] {
    std::vector<float> row(parts * k + 1), reached;
    std::vector<int32_t> scratch;
    int64_t n = offsets[0] = 0;
    for (int64_t t = 0; t < batch; t++) {
      int64_t found = 0, before = 0;  // before: in the parts before this one
      for (int64_t part = 0; part < parts; part++) {
        if (part == own) before = found;
        for (int64_t i = 0; i < k; i++) {
          row[found] = all[(part * batch + t) * k + i];
          found += row[found] > -INFINITY;  // no NaN either
        }
      }
      float last = -INFINITY;
      int64_t room = k;
      if (found > k) {
        last = kth_largest(row.data(), found, k, scratch);
        room -= std::count_if(row.begin(), row.begin() + found, [=](float v) { return v > last; });
        room -= std::count(row.begin(), row.begin() + before, last);
      } else if (found == k) {
        last = *std::min_element(row.begin(), row.begin() + k);
      }
      for (int64_t i = 0; i < k; i++) {
        const float value = values[t * k + i];
        if (!(value > last || (value == last && value > -INFINITY && room-- > 0))) continue;
        values[n] = value, indices[n++] = indices[t * k + i];
      }
      offsets[t + 1] = n;
      if (norms[t] > 0 && std::isfinite(last)) reached.push_back(last / norms[t]);
    }
    learn_guess(reached, guess[0], guess[1]);
  });
}

}  // extern "C"
