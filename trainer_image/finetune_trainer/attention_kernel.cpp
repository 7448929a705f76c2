// Softmax attention over a laid-out row in bfloat16, forward and backward, for CPUs with AVX512-BF16.
//
// Scores are kept in float32 and never exist together: queries come 64 at a time, keys 64 at a time, with a running
// maximum and sum (FlashAttention-2, Dao 2023). Products of bfloat16 add up in float32 (VDPBF16PS takes two at once, so
// whatever is summed over lies in pairs of 16 bits, here one int32). Each task owns what it writes and adds in a fixed
// order, so the result doesn't depend on which thread does it.
//
// Built and called by attention_native.py, which describes the arguments.

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

struct Heads {  // one of q, k, v and their gradients; strides in elements
  const uint16_t* data;
  int64_t by_token, by_head;
  const uint16_t* at(int64_t token, int64_t head) const { return data + token * by_token + head * by_head; }
};

// Tokens of pieces[i] = [begin, end) see what comes before them in the piece, and every token of the ranges
// seen[first_seen[i]] … seen[first_seen[i + 1] - 1].
struct Row {
  const int32_t *pieces, *first_seen, *seen;
  int32_t begin(int piece) const { return pieces[2 * piece]; }
  int32_t end(int piece) const { return pieces[2 * piece + 1]; }
};

inline __m512 exp2_of(__m512 x) {  // 2^x, to 2 units in the last place; 0 for kMasked
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 part = _mm512_sub_ps(x, whole);
  __m512 y = _mm512_set1_ps(1.5403530e-4f);
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1.3333558e-3f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(9.6181291e-3f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(5.5504109e-2f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(2.4022651e-1f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(6.9314718e-1f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, whole);
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

// C (+)= A B. A[m][k] and B[k][n] are pairs; A may lie in any order.
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

// Keys or values of every head, for sums over the head's size ([size / 2][token]) or over tokens ([token / 2][size]).
class Packed {
 public:
  Packed(Heads from, int tokens, int heads, int size, bool over_size, int threads) : over_size_(over_size) {
    // Not a multiple of a page, so that rows don't meet in the cache; room for a tile after the last token.
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
      for (int at = 0; at < size; at += 16) {
        const __m256i none = _mm256_setzero_si256();
        auto half = [&](int t) {
          return t < tokens ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from.at(t, head) + at)) : none;
        };
        _mm512_storeu_si512(to + at, paired(half(token), half(token + 1)));
      }
    }
  }
  struct Raw {  // not cleared: every entry is written
    int32_t* p = nullptr;
    ~Raw() { _mm_free(p); }
    void resize(size_t n) { p = static_cast<int32_t*>(_mm_malloc(n * sizeof(int32_t), 64)); }
    int32_t* data() const { return p; }
  } data_;
  int64_t stride_, by_head_;
  bool over_size_;
};

// Keys [begin, end) of a tile that starts at the even token `first`; a query sees those before `limit` (and its own).
struct Tile {
  int first, begin, end;
  bool causal;
  int columns() const { return (end - first + 15) / 16 * 16; }
  __mmask16 seen(int vector, int query) const {
    const int last = (causal && query + 1 < end ? query + 1 : end) - first - 16 * vector;
    const int from = begin - first - 16 * vector;
    const uint32_t below = last >= 16 ? 0xffffu : last <= 0 ? 0u : (1u << last) - 1;
    const uint32_t before = from <= 0 ? 0u : from >= 16 ? 0xffffu : (1u << from) - 1;
    return static_cast<__mmask16>(below & ~before);
  }
};

// All tiles that queries before `last` of a piece see.
template <typename Do>
void each_tile(const Row& row, int piece, int last, Do&& done) {
  auto range = [&](int begin, int end, bool causal) {
    for (int first = begin & ~1; first < end; first += kTile)
      done(Tile{first, first > begin ? first : begin, first + kTile < end ? first + kTile : end, causal});
  };
  for (int at = row.first_seen[piece]; at < row.first_seen[piece + 1]; ++at)
    range(row.seen[2 * at], row.seen[2 * at + 1], false);
  range(row.begin(piece), last, true);
}

struct Some {  // queries [first, last) of a piece
  int piece, first, last;
};

std::vector<Some> blocks_of(const Row& row, int first_piece, int last_piece) {
  std::vector<Some> some;
  for (int piece = first_piece; piece < last_piece; ++piece)
    for (int at = row.begin(piece) & ~1; at < row.end(piece); at += kTile)
      some.push_back({piece, at > row.begin(piece) ? at : row.begin(piece),
                      at + kTile < row.end(piece) ? at + kTile : row.end(piece)});
  return some;
}

void attend(const Some& q, const Row& row, Heads query, const Packed& keys, const Packed& values, int head, int kv,
            int heads, int size, float scale, uint16_t* out, float* sums) {
  alignas(64) float scores[kTile * kTile], result[kTile * 256];
  alignas(64) uint16_t share[kTile * kTile];
  float largest[kTile], sum[kTile];
  const int rows = q.last - q.first;
  for (int m = 0; m < rows; ++m) largest[m] = kMasked, sum[m] = 0;
  memset(result, 0, sizeof(float) * rows * size);
  const __m512 by = _mm512_set1_ps(scale * kLog2E);
  each_tile(row, q.piece, q.last, [&](const Tile& tile) {
    const int columns = tile.columns(), vectors = columns / 16;
    product(rows, columns, size / 2, pairs_of(query.at(q.first, head)), query.by_token / 2, 1,
            keys.at(kv, tile.first), keys.stride(), scores, kTile, false);
    for (int m = 0; m < rows; ++m) {
      __m512 score[4], most = _mm512_set1_ps(kMasked);
      for (int v = 0; v < vectors; ++v) {
        score[v] = _mm512_mask_mul_ps(_mm512_set1_ps(kMasked), tile.seen(v, q.first + m),
                                      _mm512_load_ps(scores + m * kTile + 16 * v), by);
        most = _mm512_max_ps(most, score[v]);
      }
      const float before = largest[m], now = fmaxf(before, _mm512_reduce_max_ps(most));
      __m512 total = _mm512_setzero_ps();
      for (int v = 0; v < vectors; ++v) {
        const __m512 p = exp2_of(_mm512_sub_ps(score[v], _mm512_set1_ps(now)));
        total = _mm512_add_ps(total, p);
        store_narrowed(share + m * kTile + 16 * v, p);
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
    product(rows, size, columns / 2, pairs_of(share), kTile / 2, 1, values.at(kv, tile.first), values.stride(), result,
            size, true);
  });
  for (int m = 0; m < rows; ++m) {
    uint16_t* to = out + (static_cast<int64_t>(q.first + m) * heads + head) * size;
    for (int d = 0; d < size; d += 16)
      store_narrowed(to + d, _mm512_mul_ps(_mm512_load_ps(result + m * size + d), _mm512_set1_ps(1 / sum[m])));
    sums[static_cast<int64_t>(q.first + m) * heads + head] = (largest[m] + log2f(sum[m])) / kLog2E;
  }
}

struct Given {  // to the backward pass
  Heads gradient, query, out;
  const float* sums;
  int heads, size;
  float scale;
};

// Gradient of a few queries; adds to those of the keys and values that they see ([token][size], from token 0).
void descend(const Some& q, const Row& row, const Given& given, const Packed& keys, const Packed& keys_by_token,
             const Packed& values, int head, int kv, float* by_key, float* by_value, Heads to) {
  alignas(64) float scores[kTile * kTile], slopes[kTile * kTile], by_query[kTile * 256];
  alignas(64) uint16_t slope[kTile * kTile];
  alignas(64) int32_t share_pairs[kTile / 2 * kTile], slope_pairs[kTile / 2 * kTile];
  alignas(64) int32_t gradients[kTile / 2 * 256], queries[kTile / 2 * 256];
  float inner[kTile], sums[kTile];
  const int rows = q.last - q.first, size = given.size;
  const __m256i none = _mm256_setzero_si256();
  for (int m = 0; m < rows; m += 2)
    for (int d = 0; d < size; d += 16) {
      auto both = [&](const Heads& x) {
        auto half = [&](int t) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.at(t, head) + d)); };
        return paired(half(q.first + m), m + 1 < rows ? half(q.first + m + 1) : none);
      };
      _mm512_store_si512(gradients + m / 2 * size + d, both(given.gradient));
      _mm512_store_si512(queries + m / 2 * size + d, both(given.query));
    }
  for (int m = 0; m < rows; ++m) {
    __m512 total = _mm512_setzero_ps();
    for (int d = 0; d < size; d += 16)
      total = _mm512_fmadd_ps(widened(given.gradient.at(q.first + m, head) + d),
                              widened(given.out.at(q.first + m, head) + d), total);
    inner[m] = _mm512_reduce_add_ps(total);
    sums[m] = given.sums[static_cast<int64_t>(q.first + m) * given.heads + head] * kLog2E;
  }
  memset(by_query, 0, sizeof(float) * rows * size);
  const __m512 by = _mm512_set1_ps(given.scale * kLog2E);
  each_tile(row, q.piece, q.last, [&](const Tile& tile) {
    const int columns = tile.columns();
    product(rows, columns, size / 2, pairs_of(given.query.at(q.first, head)), given.query.by_token / 2, 1,
            keys.at(kv, tile.first), keys.stride(), scores, kTile, false);
    product(rows, columns, size / 2, pairs_of(given.gradient.at(q.first, head)), given.gradient.by_token / 2, 1,
            values.at(kv, tile.first), values.stride(), slopes, kTile, false);
    for (int m = 0; m < rows; m += 2)
      for (int v = 0; v < columns / 16; ++v) {
        __m256i shares[2] = {none, none}, slopes_of[2] = {none, none};
        for (int i = 0; i < 2 && m + i < rows; ++i) {
          const __mmask16 seen = tile.seen(v, q.first + m + i);
          const int place = (m + i) * kTile + 16 * v;
          const __m512 p = _mm512_maskz_mov_ps(
              seen, exp2_of(_mm512_fmsub_ps(_mm512_load_ps(scores + place), by, _mm512_set1_ps(sums[m + i]))));
          const __m512 ds =
              _mm512_maskz_mul_ps(seen, p, _mm512_sub_ps(_mm512_load_ps(slopes + place), _mm512_set1_ps(inner[m + i])));
          shares[i] = narrowed(p), slopes_of[i] = narrowed(ds);
          _mm256_store_si256(reinterpret_cast<__m256i*>(slope + place), slopes_of[i]);
        }
        _mm512_store_si512(share_pairs + m / 2 * kTile + 16 * v, paired(shares[0], shares[1]));
        _mm512_store_si512(slope_pairs + m / 2 * kTile + 16 * v, paired(slopes_of[0], slopes_of[1]));
      }
    const int skip = tile.begin - tile.first, seen = tile.end - tile.begin;
    product(seen, size, (rows + 1) / 2, share_pairs + skip, 1, kTile, gradients, size,
            by_value + static_cast<int64_t>(tile.begin) * size, size, true);
    product(seen, size, (rows + 1) / 2, slope_pairs + skip, 1, kTile, queries, size,
            by_key + static_cast<int64_t>(tile.begin) * size, size, true);
    product(rows, size, columns / 2, pairs_of(slope), kTile / 2, 1, keys_by_token.at(kv, tile.first),
            keys_by_token.stride(), by_query, size, true);
  });
  for (int m = 0; m < rows; ++m)
    for (int d = 0; d < size; d += 16)
      store_narrowed(const_cast<uint16_t*>(to.at(q.first + m, head)) + d,
                     _mm512_mul_ps(_mm512_load_ps(by_query + m * size + d), _mm512_set1_ps(given.scale)));
}

}  // namespace

extern "C" {

struct Tensor {
  const uint16_t* data;
  int64_t by_token, by_head;
};

struct Problem {
  int32_t tokens, heads, kv, size, pieces, groups, threads;
  float scale;
  const int32_t *piece, *first_seen, *seen, *group;  // a group: pieces [group[i], group[i + 1]) that see no others
};

void finetune_attend(const Problem* p, Tensor query, Tensor key, Tensor value, uint16_t* out, float* sums) {
  const Row row{p->piece, p->first_seen, p->seen};
  const Heads q{query.data, query.by_token, query.by_head}, k{key.data, key.by_token, key.by_head},
      v{value.data, value.by_token, value.by_head};
  const Packed keys(k, p->tokens, p->kv, p->size, true, p->threads),
      values(v, p->tokens, p->kv, p->size, false, p->threads);
  const std::vector<Some> some = blocks_of(row, 0, p->pieces);
  const int tasks = static_cast<int>(some.size()) * p->heads, each = p->heads / p->kv;
#pragma omp parallel for num_threads(p->threads) schedule(dynamic, 1)
  for (int task = tasks - 1; task >= 0; --task) {
    const int head = task % p->heads;
    attend(some[task / p->heads], row, q, keys, values, head, head / each, p->heads, p->size, p->scale, out, sums);
  }
}

// Gradients are written at the strides of `by_query`, `by_key` and `by_value`. `room`: float32, twice
// [parts][kv][tokens][size]; parts = finetune_attend_parts(p).
int finetune_attend_parts(const Problem* p) {
  return p->groups * p->kv >= 4 * p->threads ? 1 : p->heads / p->kv;
}

void finetune_attend_backward(const Problem* p, Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor out,
                              const float* sums, float* room, Tensor by_query, Tensor by_key, Tensor by_value) {
  const Row row{p->piece, p->first_seen, p->seen};
  auto heads = [](const Tensor& t) { return Heads{t.data, t.by_token, t.by_head}; };
  const Given given{heads(gradient), heads(query), heads(out), sums, p->heads, p->size, p->scale};
  const Packed keys(heads(key), p->tokens, p->kv, p->size, true, p->threads),
      keys_by_token(heads(key), p->tokens, p->kv, p->size, false, p->threads),
      values(heads(value), p->tokens, p->kv, p->size, true, p->threads);
  const int parts = finetune_attend_parts(p), each = p->heads / p->kv, of_a_part = each / parts;
  const int64_t whole = static_cast<int64_t>(p->tokens) * p->size;
  float *room_keys = room, *room_values = room + whole * p->kv * parts;
  const int tasks = p->groups * p->kv * parts;
#pragma omp parallel for num_threads(p->threads) schedule(dynamic, 1)
  for (int task = 0; task < tasks; ++task) {
    const int group = task / (p->kv * parts), kv = task / parts % p->kv, part = task % parts;
    const int first = p->group[group], last = p->group[group + 1];
    const int64_t begin = static_cast<int64_t>(row.begin(first)) * p->size,
                  length = static_cast<int64_t>(row.end(last - 1)) * p->size - begin;
    float *k = room_keys + whole * (part * p->kv + kv), *v = room_values + whole * (part * p->kv + kv);
    memset(k + begin, 0, length * sizeof(float));
    memset(v + begin, 0, length * sizeof(float));
    const std::vector<Some> some = blocks_of(row, first, last);
    for (int head = kv * each + part * of_a_part; head < kv * each + (part + 1) * of_a_part; ++head)
      for (const Some& q : some)
        descend(q, row, given, keys, keys_by_token, values, head, kv, k, v, heads(by_query));
  }
#pragma omp parallel for num_threads(p->threads) schedule(static)
  for (int token = 0; token < p->tokens; ++token)
    for (int kv = 0; kv < p->kv; ++kv)
      for (int d = 0; d < p->size; d += 16) {
        __m512 k = _mm512_setzero_ps(), v = _mm512_setzero_ps();
        for (int part = 0; part < parts; ++part) {
          const int64_t at = whole * (part * p->kv + kv) + static_cast<int64_t>(token) * p->size + d;
          k = _mm512_add_ps(k, _mm512_loadu_ps(room_keys + at));
          v = _mm512_add_ps(v, _mm512_loadu_ps(room_values + at));
        }
        store_narrowed(const_cast<uint16_t*>(heads(by_key).at(token, kv)) + d,
                       _mm512_mul_ps(k, _mm512_set1_ps(p->scale)));
        store_narrowed(const_cast<uint16_t*>(heads(by_value).at(token, kv)) + d, v);
      }
}

}  // extern "C"
