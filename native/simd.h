// The vector type of one instruction set and its operations; the macros below choose it at compile time.
//
// A vector holds W floats. Most operations use the compilers' vector extensions, so that one source serves every
// machine; intrinsics appear only where those have no operator. Everything is in the namespace of its instruction set,
// so that the linker cannot merge functions that were compiled for different machines.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(KEYSPAN_AVX512BF16)
#define KEYSPAN_NAMESPACE avx512bf16
#define KEYSPAN_VECTOR 64
#elif defined(KEYSPAN_AVX512)
#define KEYSPAN_NAMESPACE avx512
#define KEYSPAN_VECTOR 64
#elif defined(KEYSPAN_AVX2)
#define KEYSPAN_NAMESPACE avx2
#define KEYSPAN_VECTOR 32
#else
#define KEYSPAN_NAMESPACE portable
#define KEYSPAN_VECTOR 16
#endif

#define INLINE inline __attribute__((always_inline))

namespace keyspan {
namespace KEYSPAN_NAMESPACE {
namespace {

constexpr int W = KEYSPAN_VECTOR / 4;
// Accumulators of a gemm: ROWS rows of up to COLUMNS vectors take 24 of 32 registers, or 12 of 16.
constexpr int ROWS = 6;
constexpr int COLUMNS = W == 16 ? 4 : 2;

typedef float vf __attribute__((vector_size(KEYSPAN_VECTOR)));
typedef int32_t vi __attribute__((vector_size(KEYSPAN_VECTOR)));
typedef uint32_t vu __attribute__((vector_size(KEYSPAN_VECTOR)));
typedef uint16_t vh __attribute__((vector_size(KEYSPAN_VECTOR / 2)));
typedef float vf_any __attribute__((vector_size(KEYSPAN_VECTOR), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(KEYSPAN_VECTOR), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(KEYSPAN_VECTOR / 2), aligned(2), may_alias));
typedef uint8_t vb_any __attribute__((vector_size(KEYSPAN_VECTOR / 4), aligned(1), may_alias));
typedef uint32_t vu_halves __attribute__((vector_size(KEYSPAN_VECTOR), aligned(2), may_alias));
typedef uint32_t vu_bytes __attribute__((vector_size(KEYSPAN_VECTOR), aligned(1), may_alias));

template <class T>
INLINE constexpr T min(T a, T b) {
    return a < b ? a : b;
}
template <class T>
INLINE constexpr T max(T a, T b) {
    return a > b ? a : b;
}

INLINE vf load(const float *p) { return *(const vf_any *)p; }
INLINE void store(float *p, vf x) { *(vf_any *)p = x; }
INLINE vu load(const uint32_t *p) { return *(const vu_any *)p; }
INLINE vu load_pairs(const uint16_t *p) { return *(const vu_halves *)p; }
INLINE vu load_bytes(const char *p) { return *(const vu_bytes *)p; }
INLINE void store(uint32_t *p, vu x) { *(vu_any *)p = x; }
INLINE void store(uint16_t *p, vh x) { *(vh_any *)p = x; }
INLINE vf broadcast(float x) { return x - vf{}; }
INLINE vi broadcast(int32_t x) { return x - vi{}; }
INLINE vu broadcast(uint32_t x) { return x - vu{}; }

INLINE vi iota() {
    vi x;
    for (int i = 0; i < W; i++) x[i] = i;
    return x;
}

// a > b ? a : b in each lane: a NaN in `b` is returned, a NaN in `a` is not.
INLINE vf maximum(vf a, vf b) {
#if KEYSPAN_VECTOR == 64
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif KEYSPAN_VECTOR == 32
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

INLINE vf abs(vf x) { return (vf)((vu)x & 0x7fffffffu); }

INLINE float reduce_add(vf x) {
#if KEYSPAN_VECTOR == 64
    return _mm512_reduce_add_ps((__m512)x);
#else
    float total = 0;
    for (int i = 0; i < W; i++) total += x[i];
    return total;
#endif
}

// Both sums at the cost of little more than one.
INLINE void reduce_add(vf x, vf y, float &sum_x, float &sum_y) {
#if KEYSPAN_VECTOR == 64
    const __m512 a = (__m512)x, b = (__m512)y;
    __m512 both = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    both = _mm512_add_ps(both, _mm512_shuffle_f32x4(both, both, 0xb1));
    both = _mm512_add_ps(both, _mm512_permute_ps(both, 0x4e));
    both = _mm512_add_ps(both, _mm512_permute_ps(both, 0xb1));
    sum_x = ((vf)both)[0];
    sum_y = ((vf)both)[8];
#else
    sum_x = reduce_add(x);
    sum_y = reduce_add(y);
#endif
}

INLINE float reduce_max(vf x) {
#if KEYSPAN_VECTOR == 64
    return _mm512_reduce_max_ps((__m512)x);
#else
    float top = x[0];
    for (int i = 1; i < W; i++) top = x[i] > top ? x[i] : top;
    return top;
#endif
}

// 2^x for x <= 127; 0 from -127 on, NaN for NaN. Relative error 2e-7 for DEGREE 5, 3e-6 for DEGREE 4: polynomials of
// minimal relative error on [-0.5, 0.5] whose value at 0 is 1.
template <int DEGREE>
INLINE vf exp2(vf x) {
    x = maximum(broadcast(-127.0f), x);
    const vf magic = broadcast(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer, in the low bits
    const vf shifted = x + magic;
    const vf f = x - (shifted - magic);
    vf p;
    if (DEGREE == 5) {
        p = broadcast(1.326472731e-3f);
        p = p * f + 9.671512991e-3f;
        p = p * f + 5.550733581e-2f;
        p = p * f + 2.402224243e-1f;
        p = p * f + 6.931470037e-1f;
    } else {
        p = broadcast(9.582852945e-3f);
        p = p * f + 5.590642616e-2f;
        p = p * f + 2.402409911e-1f;
        p = p * f + 6.931241751e-1f;
    }
    p = p * f + 1.0f;
    return (vf)((vu)p + ((vu)shifted << 23));
}

INLINE vf tanh(vf x) {
    // 1 − 2 / (e^2x + 1) has an absolute error of 1e-7, which a softcap far above the scores would magnify; so the
    // series is used near 0.
    const vf bounded = maximum(broadcast(-15.0f), x);
    const vf low = -maximum(broadcast(-15.0f), -bounded);
    const vf far = 1.0f - 2.0f / (exp2<5>(low * 2.8853900817779268f) + 1.0f);
    const vf square = x * x;
    const vf series = -1 / 3.0f + square * (2 / 15.0f + square * (-17 / 315.0f + square * (62 / 2835.0f)));
    const vf near = x + x * square * series;
    return square < broadcast(0.09f) ? near : far;
}

// ---- storage types -------------------------------------------------------------------------------------------------

INLINE float from_bf16(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE uint16_t to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE float from_f16(uint16_t x) {
    // Shift exponent and mantissa into place and rescale by 2^112; inf and NaN get fp32's exponent.
    const uint32_t magnitude = (uint32_t)(x & 0x7fff) << 13;
    float f;
    memcpy(&f, &magnitude, 4);
    f *= 5.192296858534828e33f;
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((x & 0x7c00) == 0x7c00) bits = 0x7f800000u | ((uint32_t)(x & 0x3ff) << 13);
    bits |= (uint32_t)(x & 0x8000) << 16;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE uint16_t to_f16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7e00;
    if (bits >= 0x477ff000u) return sign | 0x7c00;  // values from 65520 on round to infinity
    if (bits < 0x38800000u) {
        // Subnormal: adding 0.5 moves the last bit of the fp16 number to where fp32 rounds.
        float x;
        memcpy(&x, &bits, 4);
        x += 0.5f;
        memcpy(&bits, &x, 4);
        return sign | (uint16_t)(bits - 0x3f000000u);
    }
    bits += 0xfff + ((bits >> 13) & 1);
    return sign | (uint16_t)((bits - 0x38000000u) >> 13);
}

INLINE vf widen_bf16(const uint16_t *p) { return (vf)(__builtin_convertvector(*(const vh_any *)p, vu) << 16); }

INLINE vf widen_f16(const uint16_t *p) {
#if KEYSPAN_VECTOR == 64
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif KEYSPAN_VECTOR == 32
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    vf x;
    for (int i = 0; i < W; i++) x[i] = from_f16(p[i]);
    return x;
#endif
}

// The first `count` < W elements and zeros: nothing behind them is read.
INLINE vf load_first(const float *p, int64_t count) {
#if KEYSPAN_VECTOR == 64
    return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
#else
    float x[W] = {};
    for (int64_t i = 0; i < count; i++) x[i] = p[i];
    return load(x);
#endif
}

INLINE vh load_first(const uint16_t *p, int64_t count) {
#if KEYSPAN_VECTOR == 64
    return (vh)_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), p);
#else
    vh x{};
    for (int64_t i = 0; i < count; i++) x[i] = p[i];
    return x;
#endif
}

// The same for `count` < 2 W elements, as pairs.
INLINE vu load_first_pairs(const uint16_t *p, int64_t count) {
#if KEYSPAN_VECTOR == 64
    return (vu)_mm512_maskz_loadu_epi16((__mmask32)((1ull << count) - 1), p);
#else
    uint16_t x[2 * W] = {};
    for (int64_t i = 0; i < count; i++) x[i] = p[i];
    return load_pairs(x);
#endif
}

// The same for `count` < 4 W bytes.
INLINE vu load_first_bytes(const char *p, int64_t count) {
#if KEYSPAN_VECTOR == 64
    return (vu)_mm512_maskz_loadu_epi8((__mmask64)((1ull << count) - 1), p);
#else
    char x[4 * W] = {};
    memcpy(x, p, (size_t)count);
    return load_bytes(x);
#endif
}

// The upper half of each word is the nearest bf16, ties to even; the lower half is undefined.
INLINE vu rounded_bf16(vf x) {
    const vu bits = (vu)x;
    const vu up = bits + 0x7fffu + ((bits >> 16) & 1u);
    return (vu)((bits & 0x7fffffffu) > 0x7f800000u ? (vi)(bits | 0x400000u) : (vi)up);
}

INLINE vh narrow_bf16(vf x) {
#if defined(KEYSPAN_AVX512BF16)
    return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    return __builtin_convertvector(rounded_bf16(x) >> 16, vh);
#endif
}

// The nearest bf16 of each lane, as floats.
INLINE vf round_to_bf16(vf x) {
#if defined(KEYSPAN_AVX512BF16)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)), 16);
#else
    return (vf)(rounded_bf16(x) & 0xffff0000u);
#endif
}

// Pairs of numbers that are bf16 already: `a` in the lower half of each word, `b` in the upper half.
INLINE vu join_bf16(vf a, vf b) { return (vu)a >> 16 | (vu)b; }

// Stores 2 W floats as bf16 and adds the stored numbers to `sums`.
INLINE void store_bf16(uint16_t *p, vf a, vf b, vf &sums) {
#if defined(KEYSPAN_AVX512BF16)
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    _mm512_storeu_si512(p, (__m512i)both);
    sums = (vf)_mm512_dpbf16_ps((__m512)sums, both, (__m512bh)_mm512_set1_epi32(0x3f803f80));  // times 1
#else
    store(p, narrow_bf16(a));
    store(p + W, narrow_bf16(b));
    sums += round_to_bf16(a) + round_to_bf16(b);
#endif
}

INLINE vh narrow_f16(vf x) {
#if KEYSPAN_VECTOR == 64
    return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif KEYSPAN_VECTOR == 32
    return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    vh y;
    for (int i = 0; i < W; i++) y[i] = to_f16(x[i]);
    return y;
#endif
}

// Two rows of bf16 as pairs: `a` in the lower half of each word, `b` in the upper half. Where `row_a` is given both are
// stored too, as rows.
INLINE vu pairs_bf16(vf a, vf b, uint16_t *row_a = nullptr, uint16_t *row_b = nullptr) {
#if defined(KEYSPAN_AVX512BF16)
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    if (row_a) {
        store(row_a, (vh)_mm512_castsi512_si256(both));
        store(row_b, (vh)_mm512_extracti64x4_epi64(both, 1));
    }
    return (vu)_mm512_permutexvar_epi16((__m512i)(iota() | (iota() + W) << 16), both);
#else
    if (row_a) {
        store(row_a, narrow_bf16(a));
        store(row_b, narrow_bf16(b));
    }
    return (rounded_bf16(a) >> 16) | (rounded_bf16(b) & 0xffff0000u);
#endif
}

// ---- multiply and add, of floats or of pairs of bf16 ---------------------------------------------------------------

INLINE vf multiply_add(vf acc, vf a, vf b) { return a * b + acc; }

#if defined(KEYSPAN_AVX512BF16)
constexpr bool HAS_PAIRS = true;
INLINE vf multiply_add(vf acc, vu a, vu b) { return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
#else
constexpr bool HAS_PAIRS = false;
INLINE vf multiply_add(vf acc, vu a, vu b) {  // compiled but never called: bf16 is widened when it is packed
    return (vf)(a << 16) * (vf)(b << 16) + (vf)(a & 0xffff0000u) * (vf)(b & 0xffff0000u) + acc;
}
#endif

}  // namespace
}  // namespace KEYSPAN_NAMESPACE
}  // namespace keyspan
