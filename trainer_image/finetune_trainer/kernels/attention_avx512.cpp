// Softmax attention over a packed row in bfloat16, forward and backward, for CPUs with AVX512-BF16.
//
// Scores are float32, and never all in memory: 64 queries meet 64 keys at a time, with a running
// maximum and sum (FlashAttention-2, Dao 2023). Products of bfloat16 are accumulated in float32.
// VDPBF16PS multiplies two pairs at a time, so the dimension that is summed over is stored in pairs
// of 16 bits, here one int32. Each task owns what it writes and adds in a fixed order, so the
// result doesn't depend on which thread computes it.
//
// attention_avx512.py describes the arguments, and kernel_build.py compiles this file.

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <vector>

namespace {

constexpr int kTile = 64;
constexpr float kMasked = -1e30f;
constexpr float kLog2E = 1.44269504088896341f;

struct Heads {  // one of query, key, value, output and their gradients; strides in elements
  const uint16_t* data;
  int64_t by_token, by_head;
  const uint16_t* at(int64_t token, int64_t head) const { return data + token * by_token + head * by_head; }
};

// `segments` and `ranges` list a begin and an end per entry. A token of segment i sees itself, what
// precedes it in the segment, and all of the ranges first_range[i] … first_range[i + 1] - 1.
struct Row {
  const int32_t *segments, *first_range, *ranges;
  int32_t begin(int segment) const { return segments[2 * segment]; }
  int32_t end(int segment) const { return segments[2 * segment + 1]; }
};

inline __m512 exp2_of(__m512 x) {  // 2^x to 2 units in the last place; 0 for kMasked
  const __m512 integer = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 fraction = _mm512_sub_ps(x, integer);
  __m512 y = _mm512_set1_ps(1.5403530e-4f);
  y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(1.3333558e-3f));
  y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(9.6181291e-3f));
  y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(5.5504109e-2f));
  y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(2.4022651e-1f));
  y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(6.9314718e-1f));
  y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, integer);
}

inline __m512 widened(const uint16_t* from) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline __m256i narrowed(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

inline void store_narrowed(uint16_t* to, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrowed(x));
}

inline __m512i paired(__m256i first, __m256i second) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

// C = A B, or C += A B if `add`. A[m][k] and B[k][n] are pairs; A may have any strides.
template <int kRows, int kVectors>
inline void small_product(int pairs, const int32_t* a, int64_t a_row, int64_t a_pair, const int32_t* b, int64_t b_pair,
                          float* c, int64_t c_row, bool add) {
  __m512 sum[kRows][kVectors];
  for (int m = 0; m < kRows; ++m)
    for (int n = 0; n < kVectors; ++n) sum[m][n] = add ? _mm512_loadu_ps(c + m * c_row + 16 * n) : _mm512_setzero_ps();
  for (int k = 0; k < pairs; ++k) {
    __m512i right[kVectors];
    for (int n = 0; n < kVectors; ++n) right[n] = _mm512_loadu_si512(b + k * b_pair + 16 * n);
    for (int m = 0; m < kRows; ++m) {
      const __m512i left = _mm512_set1_epi32(a[m * a_row + k * a_pair]);
      for (int n = 0; n < kVectors; ++n) sum[m][n] = _mm512_dpbf16_ps(sum[m][n], (__m512bh)left, (__m512bh)right[n]);
    }
  }
  for (int m = 0; m < kRows; ++m)
    for (int n = 0; n < kVectors; ++n) _mm512_storeu_ps(c + m * c_row + 16 * n, sum[m][n]);
}

template <int kVectors>
inline void rows_product(int rows, int pairs, const int32_t* a, int64_t a_row, int64_t a_pair, const int32_t* b,
                         int64_t b_pair, float* c, int64_t c_row, bool add) {
  for (; rows >= 6; rows -= 6, a += 6 * a_row, c += 6 * c_row)
    small_product<6, kVectors>(pairs, a, a_row, a_pair, b, b_pair, c, c_row, add);
  switch (rows) {
    case 5: return small_product<5, kVectors>(pairs, a, a_row, a_pair, b, b_pair, c, c_row, add);
    case 4: return small_product<4, kVectors>(pairs, a, a_row, a_pair, b, b_pair, c, c_row, add);
    case 3: return small_product<3, kVectors>(pairs, a, a_row, a_pair, b, b_pair, c, c_row, add);
    case 2: return small_product<2, kVectors>(pairs, a, a_row, a_pair, b, b_pair, c, c_row, add);
    case 1: return small_product<1, kVectors>(pairs, a, a_row, a_pair, b, b_pair, c, c_row, add);
  }
}

void product(int rows, int columns, int pairs, const int32_t* a, int64_t a_row, int64_t a_pair, const int32_t* b,
             int64_t b_pair, float* c, int64_t c_row, bool add) {
  for (; columns >= 64; columns -= 64, b += 64, c += 64)
    rows_product<4>(rows, pairs, a, a_row, a_pair, b, b_pair, c, c_row, add);
  switch (columns) {
    case 48: return rows_product<3>(rows, pairs, a, a_row, a_pair, b, b_pair, c, c_row, add);
    case 32: return rows_product<2>(rows, pairs, a, a_row, a_pair, b, b_pair, c, c_row, add);
    case 16: return rows_product<1>(rows, pairs, a, a_row, a_pair, b, b_pair, c, c_row, add);
  }
}

const int32_t* pairs_of(const uint16_t* x) { return reinterpret_cast<const int32_t*>(x); }

// Keys or values of every head, paired for sums over the head's size ([size / 2][token]) or over
// tokens ([token / 2][size]).
class Packed {
 public:
  Packed(Heads from, int tokens, int heads, int size, bool over_size, int threads) : over_size_(over_size) {
    // The stride isn't a multiple of a page, so that rows don't evict each other from the cache.
    // There is space for a tile after the last token.
    stride_ = over_size ? (tokens + kTile + 31) / 16 * 16 + 16 : size;
    by_head_ = over_size ? stride_ * (size / 2) : stride_ * ((tokens + 1) / 2 + kTile / 2);
    data_.resize(by_head_ * heads);
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (int head = 0; head < heads; ++head)
      for (int first = 0; first < tokens + kTile; first += kTile)
        over_size ? transpose(from, tokens, head, size, first) : interleave(from, tokens, head, size, first);
  }
  const int32_t* at(int head, int token) const {
    return data_.data() + head * by_head_ + (over_size_ ? token : token / 2 * stride_);
  }
  int64_t stride() const { return stride_; }

 private:
  void transpose(Heads from, int tokens, int head, int size, int first) {
    int32_t* to = data_.data() + head * by_head_;
    const int last = first + kTile < stride_ ? first + kTile : stride_;
    for (int token = first; token < last; ++token)
      for (int pair = 0; pair < size / 2; ++pair)
        to[pair * stride_ + token] = token < tokens ? pairs_of(from.at(token, head))[pair] : 0;
  }
  void interleave(Heads from, int tokens, int head, int size, int first) {
    for (int token = first; token < first + kTile && token / 2 * stride_ < by_head_; token += 2) {
      int32_t* to = data_.data() + head * by_head_ + token / 2 * stride_;
      for (int d = 0; d < size; d += 16) {
        const __m256i zero = _mm256_setzero_si256();
        auto half = [&](int t) {
          return t < tokens ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from.at(t, head) + d)) : zero;
        };
        _mm512_storeu_si512(to + d, paired(half(token), half(token + 1)));
      }
    }
  }
  struct Uninitialized {  // every entry is written before it is read
    int32_t* p = nullptr;
    ~Uninitialized() { _mm_free(p); }
    void resize(size_t n) { p = static_cast<int32_t*>(_mm_malloc(n * sizeof(int32_t), 64)); }
    int32_t* data() const { return p; }
  } data_;
  int64_t stride_, by_head_;
  bool over_size_;
};

// Keys [begin, end) of a tile that starts at the even token `first`. If causal, a query sees those
// up to itself.
struct Tile {
  int first, begin, end;
  bool causal;
  int columns() const { return (end - first + 15) / 16 * 16; }
  __mmask16 visible(int vector, int query) const {  // of 16 keys
    const int last = (causal && query + 1 < end ? query + 1 : end) - first - 16 * vector;
    const int from = begin - first - 16 * vector;
    const uint32_t below = last >= 16 ? 0xffffu : last <= 0 ? 0u : (1u << last) - 1;
    const uint32_t before = from <= 0 ? 0u : from >= 16 ? 0xffffu : (1u << from) - 1;
    return static_cast<__mmask16>(below & ~before);
  }
};

// A tile's pairs of tokens ([columns / 2][size]) with zeros for every token outside of the tile.
// Those have a probability of zero, but zero times infinity is NaN: neighbors, such as padding,
// must never be multiplied.
const int32_t* zero_outside(const Tile& tile, const int32_t* pairs, int size, int32_t* scratch) {
  const int tokens = tile.end - tile.first, columns = tile.columns();
  if (tile.first == tile.begin && tokens == columns) return pairs;
  memcpy(scratch, pairs, sizeof(int32_t) * size * ((tokens + 1) / 2));
  memset(scratch + (tokens + 1) / 2 * size, 0, sizeof(int32_t) * size * (columns / 2 - (tokens + 1) / 2));
  auto mask = [&](int pair, uint32_t half) {
    for (int d = 0; d < size; ++d) scratch[pair * size + d] &= static_cast<int32_t>(half);
  };
  if (tile.first < tile.begin) mask(0, 0xffff0000u);
  if (tokens % 2) mask(tokens / 2, 0x0000ffffu);
  return scratch;
}

// Calls `visit` with every tile that queries of a segment before `last` see.
template <typename Visit>
void for_each_tile(const Row& row, int segment, int last, Visit&& visit) {
  auto range = [&](int begin, int end, bool causal) {
    for (int first = begin & ~1; first < end; first += kTile)
      visit(Tile{first, first > begin ? first : begin, first + kTile < end ? first + kTile : end, causal});
  };
  for (int i = row.first_range[segment]; i < row.first_range[segment + 1]; ++i)
    range(row.ranges[2 * i], row.ranges[2 * i + 1], false);
  range(row.begin(segment), last, true);
}

struct QueryTile {  // queries [first, last) of a segment
  int segment, first, last;
};

std::vector<QueryTile> query_tiles(const Row& row, int first_segment, int last_segment) {
  std::vector<QueryTile> tiles;
  for (int segment = first_segment; segment < last_segment; ++segment)
    for (int at = row.begin(segment) & ~1; at < row.end(segment); at += kTile)
      tiles.push_back({segment, at > row.begin(segment) ? at : row.begin(segment),
                       at + kTile < row.end(segment) ? at + kTile : row.end(segment)});
  return tiles;
}

// Attention of a tile of queries by one head, and the logarithms of its denominators.
void attend(const QueryTile& q, const Row& row, Heads query, const Packed& keys, const Packed& values, int head,
            int kv_head, int heads, int size, float scale, uint16_t* out, float* sums) {
  alignas(64) float scores[kTile * kTile], result[kTile * 256];
  alignas(64) uint16_t probability[kTile * kTile];
  alignas(64) int32_t scratch[kTile / 2 * 256];
  float largest[kTile], sum[kTile];
  const int rows = q.last - q.first;
  for (int m = 0; m < rows; ++m) largest[m] = kMasked, sum[m] = 0;
  memset(result, 0, sizeof(float) * rows * size);
  const __m512 by = _mm512_set1_ps(scale * kLog2E);
  for_each_tile(row, q.segment, q.last, [&](const Tile& tile) {
    const int columns = tile.columns(), vectors = columns / 16;
    product(rows, columns, size / 2, pairs_of(query.at(q.first, head)), query.by_token / 2, 1,
            keys.at(kv_head, tile.first), keys.stride(), scores, kTile, false);
    for (int m = 0; m < rows; ++m) {
      __m512 score[4], most = _mm512_set1_ps(kMasked);
      for (int v = 0; v < vectors; ++v) {
        score[v] = _mm512_mask_mul_ps(_mm512_set1_ps(kMasked), tile.visible(v, q.first + m),
                                      _mm512_load_ps(scores + m * kTile + 16 * v), by);
        most = _mm512_max_ps(most, score[v]);
      }
      const float before = largest[m], now = fmaxf(before, _mm512_reduce_max_ps(most));
      __m512 total = _mm512_setzero_ps();
      for (int v = 0; v < vectors; ++v) {
        const __m512 p = exp2_of(_mm512_sub_ps(score[v], _mm512_set1_ps(now)));
        total = _mm512_add_ps(total, p);
        store_narrowed(probability + m * kTile + 16 * v, p);
      }
      if (now > before) {
        const float shrink = before == kMasked ? 0.0f : exp2f(before - now);
        for (int d = 0; d < size; d += 16)
          _mm512_store_ps(result + m * size + d,
                          _mm512_mul_ps(_mm512_load_ps(result + m * size + d), _mm512_set1_ps(shrink)));
        sum[m] *= shrink;
      }
      sum[m] += _mm512_reduce_add_ps(total);
      largest[m] = now;
    }
    product(rows, size, columns / 2, pairs_of(probability), kTile / 2, 1,
            zero_outside(tile, values.at(kv_head, tile.first), size, scratch), size, result, size, true);
  });
  for (int m = 0; m < rows; ++m) {
    uint16_t* to = out + (static_cast<int64_t>(q.first + m) * heads + head) * size;
    for (int d = 0; d < size; d += 16)
      store_narrowed(to + d, _mm512_mul_ps(_mm512_load_ps(result + m * size + d), _mm512_set1_ps(1 / sum[m])));
    sums[static_cast<int64_t>(q.first + m) * heads + head] = (largest[m] + log2f(sum[m])) / kLog2E;
  }
}

struct Forward {  // what the backward pass needs of the forward pass, and the output's gradient
  Heads gradient, query, out;
  const float* sums;
  int heads, size;
  float scale;
};

// Gradient of a tile of queries by one head. Adds to the gradients of the keys and values that they
// see ([token][size], from token 0).
void attend_backward(const QueryTile& q, const Row& row, const Forward& forward, const Packed& keys,
                     const Packed& keys_by_token, const Packed& values, int head, int kv_head, float* by_key,
                     float* by_value, Heads to) {
  alignas(64) float scores[kTile * kTile], slopes[kTile * kTile], by_query[kTile * 256];
  alignas(64) uint16_t slope[kTile * kTile];
  alignas(64) int32_t probability_pairs[kTile / 2 * kTile], slope_pairs[kTile / 2 * kTile];
  alignas(64) int32_t gradients[kTile / 2 * 256], queries[kTile / 2 * 256], scratch[kTile / 2 * 256];
  float inner[kTile], sums[kTile];
  const int rows = q.last - q.first, size = forward.size;
  const __m256i zero = _mm256_setzero_si256();
  for (int m = 0; m < rows; m += 2)
    for (int d = 0; d < size; d += 16) {
      auto both = [&](const Heads& x) {
        auto half = [&](int t) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.at(t, head) + d)); };
        return paired(half(q.first + m), m + 1 < rows ? half(q.first + m + 1) : zero);
      };
      _mm512_store_si512(gradients + m / 2 * size + d, both(forward.gradient));
      _mm512_store_si512(queries + m / 2 * size + d, both(forward.query));
    }
  for (int m = 0; m < rows; ++m) {
    __m512 total = _mm512_setzero_ps();
    for (int d = 0; d < size; d += 16)
      total = _mm512_fmadd_ps(widened(forward.gradient.at(q.first + m, head) + d),
                              widened(forward.out.at(q.first + m, head) + d), total);
    inner[m] = _mm512_reduce_add_ps(total);
    sums[m] = forward.sums[static_cast<int64_t>(q.first + m) * forward.heads + head] * kLog2E;
  }
  memset(by_query, 0, sizeof(float) * rows * size);
  const __m512 by = _mm512_set1_ps(forward.scale * kLog2E);
  for_each_tile(row, q.segment, q.last, [&](const Tile& tile) {
    const int columns = tile.columns();
    product(rows, columns, size / 2, pairs_of(forward.query.at(q.first, head)), forward.query.by_token / 2, 1,
            keys.at(kv_head, tile.first), keys.stride(), scores, kTile, false);
    product(rows, columns, size / 2, pairs_of(forward.gradient.at(q.first, head)), forward.gradient.by_token / 2, 1,
            values.at(kv_head, tile.first), values.stride(), slopes, kTile, false);
    for (int m = 0; m < rows; m += 2)
      for (int v = 0; v < columns / 16; ++v) {
        __m256i probabilities[2] = {zero, zero}, slopes_of[2] = {zero, zero};
        for (int i = 0; i < 2 && m + i < rows; ++i) {
          const __mmask16 visible = tile.visible(v, q.first + m + i);
          const int offset = (m + i) * kTile + 16 * v;
          const __m512 p = _mm512_maskz_mov_ps(
              visible, exp2_of(_mm512_fmsub_ps(_mm512_load_ps(scores + offset), by, _mm512_set1_ps(sums[m + i]))));
          const __m512 ds =
              _mm512_maskz_mul_ps(visible, p,
                                  _mm512_sub_ps(_mm512_load_ps(slopes + offset), _mm512_set1_ps(inner[m + i])));
          probabilities[i] = narrowed(p), slopes_of[i] = narrowed(ds);
          _mm256_store_si256(reinterpret_cast<__m256i*>(slope + offset), slopes_of[i]);
        }
        _mm512_store_si512(probability_pairs + m / 2 * kTile + 16 * v, paired(probabilities[0], probabilities[1]));
        _mm512_store_si512(slope_pairs + m / 2 * kTile + 16 * v, paired(slopes_of[0], slopes_of[1]));
      }
    const int skip = tile.begin - tile.first, count = tile.end - tile.begin;
    product(count, size, (rows + 1) / 2, probability_pairs + skip, 1, kTile, gradients, size,
            by_value + static_cast<int64_t>(tile.begin) * size, size, true);
    product(count, size, (rows + 1) / 2, slope_pairs + skip, 1, kTile, queries, size,
            by_key + static_cast<int64_t>(tile.begin) * size, size, true);
    product(rows, size, columns / 2, pairs_of(slope), kTile / 2, 1,
            zero_outside(tile, keys_by_token.at(kv_head, tile.first), size, scratch), size, by_query, size, true);
  });
  for (int m = 0; m < rows; ++m)
    for (int d = 0; d < size; d += 16)
      store_narrowed(const_cast<uint16_t*>(to.at(q.first + m, head)) + d,
                     _mm512_mul_ps(_mm512_load_ps(by_query + m * size + d), _mm512_set1_ps(forward.scale)));
}

}  // namespace

extern "C" {

struct Tensor {
  const uint16_t* data;
  int64_t by_token, by_head;
};

// Segments [groups[i], groups[i + 1]) form a group: they see no segment of another one.
struct Problem {
  int32_t tokens, heads, kv_heads, size, segment_count, group_count, threads;
  float scale;
  const int32_t *segments, *first_range, *ranges, *groups;
};

// Writes the attention, [token][head][size], and the logarithms of its denominators, [token][head].

void finetune_attend(const Problem* p, Tensor query, Tensor key, Tensor value, uint16_t* out, float* sums) {
  const Row row{p->segments, p->first_range, p->ranges};
  const Heads q{query.data, query.by_token, query.by_head}, k{key.data, key.by_token, key.by_head},
      v{value.data, value.by_token, value.by_head};
  const Packed keys(k, p->tokens, p->kv_heads, p->size, true, p->threads),
      values(v, p->tokens, p->kv_heads, p->size, false, p->threads);
  const std::vector<QueryTile> tiles = query_tiles(row, 0, p->segment_count);
  const int tasks = static_cast<int>(tiles.size()) * p->heads, group_size = p->heads / p->kv_heads;
#pragma omp parallel for num_threads(p->threads) schedule(dynamic, 1)
  for (int task = tasks - 1; task >= 0; --task) {
    const int head = task % p->heads;
    attend(tiles[task / p->heads], row, q, keys, values, head, head / group_size, p->heads, p->size, p->scale, out,
           sums);
  }
}

// In how many parts the queries of a key are computed, so that there are enough tasks for all
// threads.
int finetune_attend_parts(const Problem* p) {
  return p->group_count * p->kv_heads >= 4 * p->threads ? 1 : p->heads / p->kv_heads;
}

// Gradients are written at the strides of `by_query`, `by_key` and `by_value`. `workspace` has
// float32 [2][parts][kv_heads][tokens][size], where parts = finetune_attend_parts(p).

void finetune_attend_backward(const Problem* p, Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor out,
                              const float* sums, float* workspace, Tensor by_query, Tensor by_key, Tensor by_value) {
  const Row row{p->segments, p->first_range, p->ranges};
  auto heads = [](const Tensor& t) { return Heads{t.data, t.by_token, t.by_head}; };
  const Forward forward{heads(gradient), heads(query), heads(out), sums, p->heads, p->size, p->scale};
  const Packed keys(heads(key), p->tokens, p->kv_heads, p->size, true, p->threads),
      keys_by_token(heads(key), p->tokens, p->kv_heads, p->size, false, p->threads),
      values(heads(value), p->tokens, p->kv_heads, p->size, true, p->threads);
  const int parts = finetune_attend_parts(p), group_size = p->heads / p->kv_heads, part_size = group_size / parts;
  const int64_t head_elements = static_cast<int64_t>(p->tokens) * p->size;
  float *key_sums = workspace, *value_sums = workspace + head_elements * p->kv_heads * parts;
  const int tasks = p->group_count * p->kv_heads * parts;
#pragma omp parallel for num_threads(p->threads) schedule(dynamic, 1)
  for (int task = 0; task < tasks; ++task) {
    const int group = task / (p->kv_heads * parts), kv_head = task / parts % p->kv_heads, part = task % parts;
    const int first = p->groups[group], last = p->groups[group + 1];
    const int64_t begin = static_cast<int64_t>(row.begin(first)) * p->size,
                  length = static_cast<int64_t>(row.end(last - 1)) * p->size - begin;
    const int64_t offset = head_elements * (part * p->kv_heads + kv_head);
    float *k = key_sums + offset, *v = value_sums + offset;
    memset(k + begin, 0, length * sizeof(float));
    memset(v + begin, 0, length * sizeof(float));
    const std::vector<QueryTile> tiles = query_tiles(row, first, last);
    const int first_head = kv_head * group_size + part * part_size;
    for (int head = first_head; head < first_head + part_size; ++head)
      for (const QueryTile& q : tiles)
        attend_backward(q, row, forward, keys, keys_by_token, values, head, kv_head, k, v, heads(by_query));
  }
#pragma omp parallel for num_threads(p->threads) schedule(static)
  for (int token = 0; token < p->tokens; ++token)
    for (int kv_head = 0; kv_head < p->kv_heads; ++kv_head)
      for (int d = 0; d < p->size; d += 16) {
        __m512 k = _mm512_setzero_ps(), v = _mm512_setzero_ps();
        for (int part = 0; part < parts; ++part) {
          const int64_t at =
              head_elements * (part * p->kv_heads + kv_head) + static_cast<int64_t>(token) * p->size + d;
          k = _mm512_add_ps(k, _mm512_loadu_ps(key_sums + at));
          v = _mm512_add_ps(v, _mm512_loadu_ps(value_sums + at));
        }
        store_narrowed(const_cast<uint16_t*>(heads(by_key).at(token, kv_head)) + d,
                       _mm512_mul_ps(k, _mm512_set1_ps(p->scale)));
        store_narrowed(const_cast<uint16_t*>(heads(by_value).at(token, kv_head)) + d, v);
      }
}

}  // extern "C"
