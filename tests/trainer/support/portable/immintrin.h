// Stands before the compiler's own header: what attention_avx512.cpp uses of AVX-512, in plain C++ for any CPU, so that
// the kernel's tests run where its instructions don't. Roundings are AVX512-BF16's, but for products of two pairs,
// which add up one after the other here.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float __m512 __attribute__((vector_size(64), may_alias));
typedef int32_t __m512i __attribute__((vector_size(64), may_alias));
typedef uint16_t __m256i __attribute__((vector_size(32), may_alias));
typedef __m256i __m256bh;
typedef __m512i __m512bh;
typedef uint16_t __mmask16;

#define _MM_FROUND_TO_NEAREST_INT 0
#define _MM_FROUND_NO_EXC 8

template <typename To, typename From>
inline To bits_of(const From& from) {
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
template <typename To>
inline To read_from(const void* from) {
  To to;
  memcpy(&to, from, sizeof(to));
  return to;
}
template <typename Each>
inline __m512 each_float(Each&& each) {
  __m512 to;
  for (int i = 0; i < 16; ++i) to[i] = each(i);
  return to;
}

inline float float_of(uint16_t half) { return bits_of<float>(static_cast<uint32_t>(half) << 16); }
inline uint16_t half_of(float x) {  // to the nearest, ties to even
  const uint32_t bits = bits_of<uint32_t>(x);
  if (isnan(x)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline __m256i _mm256_setzero_si256() { return __m256i{}; }
inline __m256i _mm256_loadu_si256(const void* from) { return read_from<__m256i>(from); }
inline void _mm256_storeu_si256(void* to, __m256i x) { memcpy(to, &x, sizeof(x)); }
inline void _mm256_store_si256(void* to, __m256i x) { memcpy(to, &x, sizeof(x)); }

inline __m512i _mm512_loadu_si512(const void* from) { return read_from<__m512i>(from); }
inline void _mm512_storeu_si512(void* to, __m512i x) { memcpy(to, &x, sizeof(x)); }
inline void _mm512_store_si512(void* to, __m512i x) { memcpy(to, &x, sizeof(x)); }
inline __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
inline __m512i _mm512_slli_epi32(__m512i a, int by) {
  for (int i = 0; i < 16; ++i) a[i] = static_cast<int32_t>(static_cast<uint32_t>(a[i]) << by);
  return a;
}
inline __m512i _mm512_set1_epi32(int32_t x) { return __m512i{} + x; }
inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
  __m512i to;
  for (int i = 0; i < 16; ++i) to[i] = a[i];
  return to;
}
inline __m512 _mm512_castsi512_ps(__m512i a) { return bits_of<__m512>(a); }

inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512 _mm512_set1_ps(float x) { return __m512{} + x; }
inline __m512 _mm512_load_ps(const float* from) { return read_from<__m512>(from); }
inline __m512 _mm512_loadu_ps(const float* from) { return read_from<__m512>(from); }
inline void _mm512_store_ps(float* to, __m512 x) { memcpy(to, &x, sizeof(x)); }
inline void _mm512_storeu_ps(float* to, __m512 x) { memcpy(to, &x, sizeof(x)); }
inline __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
inline __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
inline __m512 _mm512_max_ps(__m512 a, __m512 b) {
  return each_float([&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
}
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return each_float([&](int i) { return fmaf(a[i], b[i], c[i]); });
}
inline __m512 _mm512_fmsub_ps(__m512 a, __m512 b, __m512 c) {
  return each_float([&](int i) { return fmaf(a[i], b[i], -c[i]); });
}
inline __m512 _mm512_roundscale_ps(__m512 a, int) {
  return each_float([&](int i) { return nearbyintf(a[i]); });
}
inline __m512 _mm512_scalef_ps(__m512 a, __m512 b) {
  return each_float([&](int i) { return a[i] * exp2f(floorf(b[i])); });
}
inline __m512 _mm512_mask_mul_ps(__m512 from, __mmask16 mask, __m512 a, __m512 b) {
  return each_float([&](int i) { return mask >> i & 1 ? a[i] * b[i] : from[i]; });
}
inline __m512 _mm512_maskz_mul_ps(__mmask16 mask, __m512 a, __m512 b) {
  return _mm512_mask_mul_ps(__m512{}, mask, a, b);
}
inline __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 a) {
  return each_float([&](int i) { return mask >> i & 1 ? a[i] : 0.0f; });
}
inline float _mm512_reduce_add_ps(__m512 a) {
  for (int step = 8; step; step /= 2)
    for (int i = 0; i < step; ++i) a[i] += a[i + step];
  return a[0];
}
inline float _mm512_reduce_max_ps(__m512 a) {
  float most = a[0];
  for (int i = 1; i < 16; ++i) most = a[i] > most ? a[i] : most;
  return most;
}
inline __m256bh _mm512_cvtneps_pbh(__m512 a) {
  __m256bh to;
  for (int i = 0; i < 16; ++i) to[i] = half_of(a[i]);
  return to;
}
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  return each_float([&](int i) {
    const uint32_t left = a[i], right = b[i];
    const float high = float_of(left >> 16) * float_of(right >> 16);
    return sum[i] + high + float_of(left & 0xffff) * float_of(right & 0xffff);
  });
}

inline void* _mm_malloc(size_t size, size_t) {
  void* p = nullptr;
  return posix_memalign(&p, 64, size) ? nullptr : p;
}
inline void _mm_free(void* p) { free(p); }
