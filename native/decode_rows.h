// Decoding: how a row of keys or values is loaded from a cache of any dtype.
#pragma once
#include "forward.h"

namespace keyspan {
namespace KEYSPAN_NAMESPACE {
namespace {

// How a row of keys or values is loaded. A vector of STEP elements is transposed as W words; a word has PARTS that are
// multiplied, which `split` finds. Kinds: fp32, fp16, bf16 element by element, bf16 in pairs, and 8 bits as floats or as
// pairs of bf16.
template <int KIND>
struct Row {
    static constexpr int STEP = W, BYTES = KIND == F32 ? 4 : 2, PARTS = 1;
    typedef float Word;
    explicit INLINE Row(int64_t) {}
    static INLINE void split(vu word, vf (&parts)[PARTS]) { parts[0] = (vf)word; }
    static INLINE vf read(const char *p, int64_t i) {
        if constexpr (KIND == F32) return load((const float *)p + i);
        if constexpr (KIND == F16) return widen_f16((const uint16_t *)p + i);
        return widen_bf16((const uint16_t *)p + i);
    }
    // The last elements, fewer than STEP.
    static INLINE vf read_last(const char *p, int64_t i, int64_t count) {
        if constexpr (KIND == F32) return load_first((const float *)p + i, count);
        const vh half = load_first((const uint16_t *)p + i, count);
        if constexpr (KIND == F16) return widen_f16((const uint16_t *)&half);
        return widen_bf16((const uint16_t *)&half);
    }
};
constexpr int PAIRS = 3, STORED_FLOATS = 4, STORED_PAIRS = 5;
constexpr bool is_stored(int kind) { return kind >= STORED_FLOATS; }
template <>
struct Row<PAIRS> {
    static constexpr int STEP = 2 * W, BYTES = 2, PARTS = 1;
    typedef uint32_t Word;
    explicit INLINE Row(int64_t) {}
    static INLINE void split(vu word, vu (&parts)[PARTS]) { parts[0] = word; }
    static INLINE vu read(const char *p, int64_t i) { return load_pairs((const uint16_t *)p + i); }
    static INLINE vu read_last(const char *p, int64_t i, int64_t count) {
        return load_first_pairs((const uint16_t *)p + i, count);
    }
};
template <>
struct Row<STORED_FLOATS> {
    static constexpr int STEP = 4 * W, BYTES = 1, PARTS = 4;
    typedef float Word;
    int64_t stored;
    explicit INLINE Row(int64_t stored) : stored(stored) {}
    INLINE void split(vu word, vf (&parts)[PARTS]) const {
        for (int i = 0; i < PARTS; i++) parts[i] = widen_stored(stored, (vi)(word << (24 - 8 * i)) >> 24);
    }
    static INLINE vu read(const char *p, int64_t i) { return load_bytes(p + i); }
    static INLINE vu read_last(const char *p, int64_t i, int64_t count) { return load_first_bytes(p + i, count); }
    INLINE vf read_value(const char *p, int64_t i) const { return load_stored(stored, p + i); }
    INLINE vf read_last_value(const char *p, int64_t i, int64_t count) const {
        return load_first_stored(stored, p + i, count);
    }
};

#if defined(KEYSPAN_AVX512BF16)
// The bf16 numbers of all magnitudes that 8 bits store, as bytes. A sign is added to what is looked up.
struct ByteTable {
    alignas(64) uint8_t low[128], high[128];
    uint64_t negated;  // all ones where a negative number is the two's complement of its magnitude
    uint8_t lowest;    // the upper byte of the number that is stored as 128
    explicit ByteTable(int64_t stored) : negated(stored == INT8 ? ~0ull : 0), lowest(stored == INT8 ? 0xc3 : 0x80) {
        for (int i = 0; i < 128; i++) {
            const char byte = (char)i;
            const uint16_t x = to_bf16(load_first_stored(stored, &byte, 1)[0]);
            low[i] = (uint8_t)x;
            high[i] = (uint8_t)(x >> 8);
        }
    }
};

inline const ByteTable &byte_table(int64_t stored) {
    static const ByteTable int8(INT8), e4m3(E4M3);
    return stored == INT8 ? int8 : e4m3;
}

template <>
struct Row<STORED_PAIRS> {
    static constexpr int STEP = 4 * W, BYTES = 1, PARTS = 2;
    typedef uint32_t Word;
    __m512i low[2], high[2], lowest;
    __mmask64 negated;
    explicit INLINE Row(int64_t stored) {
        const ByteTable &table = byte_table(stored);
        for (int i = 0; i < 2; i++) {
            low[i] = _mm512_load_si512(table.low + 64 * i);
            high[i] = _mm512_load_si512(table.high + 64 * i);
        }
        lowest = _mm512_set1_epi8((char)table.lowest);
        negated = table.negated;
    }
    // The lower and the upper bytes of the bf16 numbers of 64 stored ones.
    INLINE void look_up(__m512i x, __m512i &lower, __m512i &upper) const {
        const __m512i minus = _mm512_set1_epi8((char)0x80), index = _mm512_mask_abs_epi8(x, negated, x);
        lower = _mm512_permutex2var_epi8(low[0], index, low[1]);
        upper = _mm512_permutex2var_epi8(high[0], index, high[1]);
        upper = _mm512_ternarylogic_epi32(upper, x, minus, 0xf8);  // upper | (x & minus)
        upper = _mm512_mask_mov_epi8(upper, _mm512_cmpeq_epi8_mask(x, minus), lowest);
    }
    INLINE void split(vu word, vu (&parts)[PARTS]) const {
        // Bytes 0, 2, 1, 3 of each word, so that those of a part are two apart.
        const __m512i order = _mm512_set4_epi32(0x0f0d0e0c, 0x0b090a08, 0x07050604, 0x03010200);
        const __m512i even = _mm512_set1_epi16(0xff);
        __m512i lower, upper;
        look_up(_mm512_shuffle_epi8((__m512i)word, order), lower, upper);
        // even ? first : second
        parts[0] = (vu)_mm512_ternarylogic_epi32(even, lower, _mm512_slli_epi16(upper, 8), 0xca);
        parts[1] = (vu)_mm512_ternarylogic_epi32(even, _mm512_srli_epi16(lower, 8), upper, 0xca);
    }
    static INLINE vu read(const char *p, int64_t i) { return load_bytes(p + i); }
    static INLINE vu read_last(const char *p, int64_t i, int64_t count) { return load_first_bytes(p + i, count); }
};
#endif

#if KEYSPAN_VECTOR == 64
// Four words of a row from element i on, of which the row has `count` elements left.
template <int KIND>
INLINE __m128i read_four_words(const char *p, int64_t i, int64_t count) {
    constexpr int ELEMENTS = Row<KIND>::STEP / 4;
    const uint32_t present = count < ELEMENTS ? (1u << count) - 1 : (1u << ELEMENTS) - 1;
    p += i * Row<KIND>::BYTES;
    if constexpr (KIND == F32) return _mm_maskz_loadu_epi32((__mmask8)present, p);
    if constexpr (is_stored(KIND)) return _mm_maskz_loadu_epi8((__mmask16)present, p);
    const __m128i halves = _mm_maskz_loadu_epi16((__mmask8)present, p);
    if constexpr (KIND == F16) return _mm_castps_si128(_mm_cvtph_ps(halves));
    if constexpr (KIND == BF16) return _mm_slli_epi32(_mm_cvtepu16_epi32(halves), 16);
    return halves;
}
#endif

// Words of W keys from element i on, transposed, of which the rows have `count` elements left, fewer than STEP. A few
// words take a part of the exchanges; words behind them are undefined then.
template <int KIND>
INLINE void read_last_words(const char *const *keys, int64_t offset, int64_t i, int64_t count, vu (&words)[W]) {
#if KEYSPAN_VECTOR == 64
    constexpr int ELEMENTS = Row<KIND>::STEP / 4;  // of four words
    if (count <= 2 * ELEMENTS) {
        for (int half = 0; half < 2; half++, i += ELEMENTS, count -= ELEMENTS) {
            if (count <= 0) return;
            __m512i x[4], y[4];
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) {  // keys k, k + 4, k + 8 and k + 12
                const auto four = [&](int n) { return read_four_words<KIND>(keys[k + n] + offset, i, count); };
                x[k] = _mm512_inserti32x4(_mm512_castsi128_si512(four(0)), four(4), 1);
                x[k] = _mm512_inserti32x4(_mm512_inserti32x4(x[k], four(8), 2), four(12), 3);
            }
#pragma GCC unroll 2
            for (int k = 0; k < 4; k += 2) {
                y[k] = _mm512_unpacklo_epi32(x[k], x[k + 1]);
                y[k + 1] = _mm512_unpackhi_epi32(x[k], x[k + 1]);
            }
            vu *const to = words + 4 * half;
            to[0] = (vu)_mm512_unpacklo_epi64(y[0], y[2]);
            to[1] = (vu)_mm512_unpackhi_epi64(y[0], y[2]);
            to[2] = (vu)_mm512_unpacklo_epi64(y[1], y[3]);
            to[3] = (vu)_mm512_unpackhi_epi64(y[1], y[3]);
        }
        return;
    }
#endif
#pragma GCC unroll 16
    for (int k = 0; k < W; k++) words[k] = (vu)Row<KIND>::read_last(keys[k] + offset, i, count);
    transpose_vectors(words);
}

}  // namespace
}  // namespace KEYSPAN_NAMESPACE
}  // namespace keyspan
