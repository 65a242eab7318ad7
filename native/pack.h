// Brings rows of any dtype and stride into the two forms that products load. Knows nothing of masks or softmax.
//
// By dimension: [dim][PANEL keys] (scores are vectors over keys). By row: [key][dim], padded to whole vectors. As pairs
// of bf16 the dimension that is summed over is halved: [dim / 2][PANEL keys][2], [key / 2][dim][2]. Padding is zero.
#pragma once
#include "plan.h"
#include "simd.h"

namespace keyspan {
namespace KEYSPAN_NAMESPACE {
namespace {

constexpr int WIDEST = 256;  // head dim

// Elements in a word that a product multiplies, and the words of a sum over `dims` elements.
template <class T>
constexpr int PER_WORD = 1;
template <>
constexpr int PER_WORD<uint32_t> = 2;
template <class T>
INLINE int64_t words(int64_t dims) {
    return (dims + PER_WORD<T> - 1) / PER_WORD<T>;
}

INLINE float element(int64_t dtype, const char *p, int64_t i) {
    if (dtype == F32) return ((const float *)p)[i];
    const uint16_t x = ((const uint16_t *)p)[i];
    return dtype == BF16 ? from_bf16(x) : from_f16(x);
}

INLINE int64_t size_of(int64_t dtype) { return dtype == F32 ? 4 : 2; }

INLINE void widen(int64_t dtype, const char *from, int64_t stride, int64_t count, float *to) {
    int64_t i = 0;
    if (stride == 1) {
        if (dtype == F32) {
            memcpy(to, from, (size_t)count * 4);
            return;
        }
        const uint16_t *half = (const uint16_t *)from;
        for (; i + W <= count; i += W) store(to + i, dtype == BF16 ? widen_bf16(half + i) : widen_f16(half + i));
    }
    for (; i < count; i++) to[i] = element(dtype, from, i * stride);
}

INLINE void narrow(int64_t dtype, const float *from, int64_t count, float scale, char *to) {
    int64_t i = 0;
    if (dtype == F32) {
        float *single = (float *)to;
        for (; i + W <= count; i += W) store(single + i, load(from + i) * scale);
        for (; i < count; i++) single[i] = from[i] * scale;
        return;
    }
    uint16_t *half = (uint16_t *)to;
    for (; i + W <= count; i += W) {
        const vf x = load(from + i) * scale;
        store(half + i, dtype == BF16 ? narrow_bf16(x) : narrow_f16(x));
    }
    for (; i < count; i++) half[i] = dtype == BF16 ? to_bf16(from[i] * scale) : to_f16(from[i] * scale);
}

INLINE bool odd(const float *x, int64_t count) {
    uint32_t largest_exponent = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        largest_exponent = most(largest_exponent, bits & 0x7f800000u);
    }
    return largest_exponent == 0x7f800000u;
}

INLINE bool odd(const uint16_t *x, int64_t count) {
    uint16_t largest_exponent = 0;
    for (int64_t i = 0; i < count; i++) largest_exponent = most(largest_exponent, (uint16_t)(x[i] & 0x7f80));
    return largest_exponent == 0x7f80;
}

// Rows of several heads lie far apart, which the hardware does not foresee.
constexpr int ROWS_AHEAD = 8;
INLINE void fetch(const char *row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 3);
}

// One row, padded with zeros to `width`; whether it holds an infinity or NaN.
INLINE bool pack_row(int64_t dtype, const char *from, int64_t stride, int64_t count, int64_t width, float *to) {
    widen(dtype, from, stride, count, to);
    for (int64_t i = count; i < width; i++) to[i] = 0;
    return odd(to, count);
}

INLINE bool pack_row(int64_t, const char *from, int64_t stride, int64_t count, int64_t width, uint16_t *to) {
    const uint16_t *x = (const uint16_t *)from;
    if (stride == 1)
        memcpy(to, x, (size_t)count * 2);
    else
        for (int64_t i = 0; i < count; i++) to[i] = x[i * stride];
    for (int64_t i = count; i < width; i++) to[i] = 0;
    return odd(to, count);
}

INLINE void pair_rows(const uint16_t *a, const uint16_t *b, int64_t width, uint32_t *to) {
    for (int64_t i = 0; i < width; i++) to[i] = (uint32_t)a[i] | (uint32_t)b[i] << 16;
}

constexpr int SIDE = 16;

// [SIDE][from_width] words to [SIDE][to_width].
INLINE void transpose_square(const uint32_t *from, int64_t from_width, uint32_t *to, int64_t to_width) {
#if KEYSPAN_VECTOR == 64
    // Four rounds of exchanges between rows 1, 2, 4 and 8 apart.
    __m512i x[SIDE], y[SIDE];
    for (int i = 0; i < SIDE; i++) x[i] = _mm512_loadu_si512(from + i * from_width);
    for (int i = 0; i < SIDE; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < SIDE; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
        y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
        y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
        y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(to + i * to_width, _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88));
        _mm512_storeu_si512(to + (i + 8) * to_width, _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd));
        _mm512_storeu_si512(to + (i + 4) * to_width, _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88));
        _mm512_storeu_si512(to + (i + 12) * to_width, _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xdd));
    }
#else
    for (int k = 0; k < SIDE; k++)
        for (int i = 0; i < SIDE; i++) to[k * to_width + i] = from[i * from_width + k];
#endif
}

// [PANEL][width] words to [count][PANEL].
INLINE void transpose(const uint32_t *from, int64_t width, int64_t count, uint32_t *to) {
    for (int64_t n = 0; n < PANEL; n += SIDE) {
        int64_t k = 0;
        for (; k + SIDE <= count; k += SIDE) transpose_square(from + n * width + k, width, to + k * PANEL + n, PANEL);
        for (; k < count; k++)
            for (int i = 0; i < SIDE; i++) to[k * PANEL + n + i] = from[(n + i) * width + k];
    }
}

// `count` keys or values of a panel in the forms asked for; whether one is infinite or NaN.
INLINE bool pack_panel(int64_t dtype, const char *const *rows, int count, int64_t dims, int64_t stride, int64_t width,
                       float *by_dim, float *by_row) {
    alignas(64) float buffer[PANEL * WIDEST];
    float *all_rows = by_row ? by_row : buffer;
    bool found = false;
    for (int n = 0; n < count; n++) {
        if (n + ROWS_AHEAD < count) fetch(rows[n + ROWS_AHEAD], dims * size_of(dtype));
        found |= pack_row(dtype, rows[n], stride, dims, width, all_rows + n * width);
    }
    memset(all_rows + count * width, 0, (size_t)((PANEL - count) * width * 4));
    if (by_dim) transpose((const uint32_t *)all_rows, width, dims, (uint32_t *)by_dim);
    return found;
}

INLINE bool pack_panel(int64_t dtype, const char *const *rows, int count, int64_t dims, int64_t stride, int64_t width,
                       uint32_t *by_dim, uint32_t *by_row) {
    alignas(64) uint16_t buffer[PANEL * WIDEST];
    bool found = false;
    for (int n = 0; n < count; n++) {
        if (n + ROWS_AHEAD < count) fetch(rows[n + ROWS_AHEAD], dims * size_of(dtype));
        found |= pack_row(dtype, rows[n], stride, dims, width, buffer + n * width);
    }
    memset(buffer + count * width, 0, (size_t)((PANEL - count) * width * 2));
    if (by_dim) transpose((const uint32_t *)buffer, width / 2, (dims + 1) / 2, by_dim);
    if (by_row)
        for (int n = 0; n < PANEL; n += 2)
            pair_rows(buffer + n * width, buffer + (n + 1) * width, width, by_row + n / 2 * width);
    return found;
}

// Where logical key `j` of sequence `s` lies.
INLINE int64_t physical_key(const Params &p, int64_t s, int64_t j) {
    if (!p.sequence) return j;
    const int64_t slot = (int64_t)p.block_table[s * p.pages + j / p.page_size] * p.page_size + j % p.page_size;
    return most<int64_t>(0, least(slot, p.N - 1));
}

template <class T>
void pack_keys(const Plan &plan, bool backward, int64_t slot, int64_t b, int64_t g, int64_t panel) {
    const Params &p = *plan.params;
    const int64_t first = panel * PANEL;
    int64_t s = p.sequence || p.RB == 1 ? 0 : b;
    while (p.sequence && s + 1 < plan.segment_count && plan.segments[s + 1].offset <= first) s++;
    const Segment &segment = plan.segments[s];
    const int count = (int)least<int64_t>(PANEL, segment.offset + segment.length - first);
    if (count <= 0) return;

    const char *k_rows[PANEL], *v_rows[PANEL];
    for (int n = 0; n < count; n++) {
        const int64_t row = physical_key(p, s, segment.begin + first - segment.offset + n);
        k_rows[n] = p.k + (b * p.k_stride[0] + row * p.k_stride[1] + g * p.k_stride[2]) * size_of(p.dtype);
        v_rows[n] = p.v + (b * p.v_stride[0] + row * p.v_stride[1] + g * p.v_stride[2]) * size_of(p.dtype);
    }
    // In words of T: a panel has PANEL · dims of them, or half as many where they are pairs.
    constexpr int64_t per_word = PER_WORD<T>;
    T *k_by_dim = (T *)(plan.keys_by_dim + slot * plan.keys_by_dim_stride);
    T *v_by_row = (T *)(plan.value_rows + slot * plan.value_rows_stride);
    T *k_by_row = nullptr, *v_by_dim = nullptr;
    if (backward) {
        k_by_row = (T *)(plan.key_rows + slot * plan.key_rows_stride) + first / per_word * plan.key_width;
        v_by_dim = (T *)(plan.values_by_dim + slot * plan.values_by_dim_stride) + first * words<T>(p.V);
    }
    if (pack_panel(p.dtype, k_rows, count, p.K, p.k_stride[3], plan.key_width, k_by_dim + first * words<T>(p.K),
                   k_by_row))
        plan.odd_keys[slot].store(1, std::memory_order_relaxed);
    if (pack_panel(p.dtype, v_rows, count, p.V, p.v_stride[3], plan.value_width, v_by_dim,
                   v_by_row + first / per_word * plan.value_width))
        plan.odd_values[slot].store(1, std::memory_order_relaxed);
}

}  // namespace
}  // namespace KEYSPAN_NAMESPACE
}  // namespace keyspan
