// Packing: copies keys, values and query rows of any dtype and stride into the two forms that gemm reads.
//
// By dimension: [dim][PANEL keys], for scores, which are vectors over keys. By row: [key][dim], padded to whole
// vectors. As pairs of bf16 the summed dimension is halved: [dim / 2][PANEL keys][2] and [key / 2][dim][2]. Padding is
// zero.
#pragma once
#include "plan.h"
#include "simd.h"

namespace keyspan {
namespace KEYSPAN_NAMESPACE {
namespace {

// Elements in a word that gemm multiplies, and the words of a sum over `dims` elements.
template <class T>
constexpr int PER_WORD = 1;
template <>
constexpr int PER_WORD<uint32_t> = 2;
template <class T>
INLINE int64_t words(int64_t dims) {
    return (dims + PER_WORD<T> - 1) / PER_WORD<T>;
}

INLINE float load_element(int64_t dtype, const char *p, int64_t i) {
    if (dtype == F32) return ((const float *)p)[i];
    const uint16_t x = ((const uint16_t *)p)[i];
    return dtype == BF16 ? from_bf16(x) : from_f16(x);
}

INLINE int64_t dtype_size(int64_t dtype) { return dtype == F32 ? 4 : 2; }
// Bytes of an element of keys and values.
INLINE int64_t key_size(const Params &p) { return p.stored ? 1 : dtype_size(p.dtype); }

INLINE void widen(int64_t dtype, const char *from, int64_t stride, int64_t count, float *to) {
    int64_t i = 0;
    if (stride == 1) {
        if (dtype == F32) {
            const float *single = (const float *)from;
            for (; i + W <= count; i += W) store(to + i, load(single + i));
            for (; i < count; i++) to[i] = single[i];
            return;
        }
        const uint16_t *half = (const uint16_t *)from;
        for (; i + W <= count; i += W) store(to + i, dtype == BF16 ? widen_bf16(half + i) : widen_f16(half + i));
    }
    for (; i < count; i++) to[i] = load_element(dtype, from, i * stride);
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

// The first `count` ≤ W numbers of a vector.
INLINE void narrow(int64_t dtype, vf x, int64_t count, char *to) {
    if (count < W) {
        alignas(64) float wide[W];
        store(wide, x);
        return narrow(dtype, wide, count, 1.0f, to);
    }
    if (dtype == F32)
        store((float *)to, x);
    else
        store((uint16_t *)to, dtype == BF16 ? narrow_bf16(x) : narrow_f16(x));
}

INLINE bool has_nonfinite(const float *x, int64_t count) {
    uint32_t largest_exponent = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        largest_exponent = max(largest_exponent, bits & 0x7f800000u);
    }
    return largest_exponent == 0x7f800000u;
}

INLINE bool has_nonfinite(const uint16_t *x, int64_t count) {
    uint16_t largest_exponent = 0;
    for (int64_t i = 0; i < count; i++) largest_exponent = max(largest_exponent, (uint16_t)(x[i] & 0x7f80));
    return largest_exponent == 0x7f80;
}

// ---- keys and values of 8 bits -------------------------------------------------------------------------------------
//
// A key is a stored number times its scale. Kernels multiply the stored numbers, which fp32, fp16 and bf16 hold exactly;
// the product of a query and a key is multiplied by the key's scale, and the weight of a value by the value's.

// W bytes, extended by their signs.
INLINE vi load_signed_bytes(const char *p) {
#if KEYSPAN_VECTOR == 64
    return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif KEYSPAN_VECTOR == 32
    return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    vi x;
    for (int i = 0; i < W; i++) x[i] = (signed char)p[i];
    return x;
#endif
}

// Numbers of which `x` holds the stored bytes, extended by their signs.
INLINE vf widen_stored(int64_t stored, vi x) {
    if (stored == INT8) return __builtin_convertvector(x, vf);
    // E4M3: four bits of exponent and three of mantissa. Exponent 0 counts multiples of 2^-9; 127 is NaN.
    const vi size = x & 127;
    const vf normal = (vf)((size << 20) + (120 << 23)), small = __builtin_convertvector(size, vf) * 0x1p-9f;
    const vu bits = (vu)(size < 8 ? small : normal) | ((vu)x & 0x80000000u);
    return size == 127 ? broadcast(__builtin_nanf("")) : (vf)bits;
}

// W stored numbers, or the first `count` < W and zeros.
INLINE vf load_stored(int64_t stored, const char *p) {
    return widen_stored(stored, load_signed_bytes(p));
}
INLINE vf load_first_stored(int64_t stored, const char *p, int64_t count) {
    char x[W] = {};
    memcpy(x, p, (size_t)count);
    return load_stored(stored, x);
}

// `count` stored numbers in `dtype`.
INLINE void widen_row(int64_t stored, const char *from, int64_t count, int64_t dtype, char *to) {
    int64_t i = 0;
    for (; i + W <= count; i += W) {
        const vf x = load_stored(stored, from + i);
        if (dtype == F32)
            store((float *)to + i, x);
        else
            store((uint16_t *)to + i, dtype == BF16 ? narrow_bf16(x) : narrow_f16(x));
    }
    if (i == count) return;
    alignas(64) float wide[W];
    store(wide, load_first_stored(stored, from + i, count - i));
    narrow(dtype, wide, count - i, 1, to + i * dtype_size(dtype));
}

// The scales of `row`, one for each group, of scales [B, N / run, G]; a division takes longer than a row.
INLINE const float *scales_of(const Params &p, const float *scale, int64_t run, int64_t b, int64_t row) {
    return scale + ((b ? b * (p.N / run) : 0) + (run == 1 ? row : row / run)) * p.G;
}

// The scales of the keys of a block and of their values: any numbers. Null where keys are not of 8 bits.
struct Scales {
    const float *keys = nullptr, *values = nullptr;
};

INLINE bool is_finite(float x) { return x - x == 0; }

// What weights are multiplied by: a value whose scale is infinite or NaN is added by the NaN repair.
INLINE vf finite_scales(const float *p) {
    const vf x = load(p);
    return x - x == vf{} ? x : vf{};
}
// What products are multiplied by: a scale that is infinite would hide keys.
INLINE vf finite_or_nan_scales(const float *p) {
    const vf x = load(p);
    return x + (x - x);
}

// The hardware prefetcher does not follow rows of several heads, which lie far apart.
constexpr int PREFETCH_ROWS = 8;
INLINE void prefetch_row(const char *row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 3);
}

// Packs one row, padded with zeros to `width`; whether it holds an infinity or NaN.
INLINE bool pack_row(int64_t dtype, const char *from, int64_t stride, int64_t count, int64_t width, float *to) {
    widen(dtype, from, stride, count, to);
    for (int64_t i = count; i < width; i++) to[i] = 0;
    return has_nonfinite(to, count);
}

INLINE bool pack_row(int64_t, const char *from, int64_t stride, int64_t count, int64_t width, uint16_t *to) {
    const uint16_t *x = (const uint16_t *)from;
    if (stride == 1)
        memcpy(to, x, (size_t)count * 2);
    else
        for (int64_t i = 0; i < count; i++) to[i] = x[i * stride];
    for (int64_t i = count; i < width; i++) to[i] = 0;
    return has_nonfinite(to, count);
}

INLINE void interleave_rows(const uint16_t *a, const uint16_t *b, int64_t width, uint32_t *to) {
    for (int64_t i = 0; i < width; i++) to[i] = (uint32_t)a[i] | (uint32_t)b[i] << 16;
}

constexpr int SQUARE = W;

// Transposes W vectors of words.
INLINE void transpose_vectors(vu (&rows)[W]) {
#if KEYSPAN_VECTOR == 64
    // Four rounds of exchanges between rows 1, 2, 4 and 8 apart.
    __m512i x[W], y[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) x[i] = (__m512i)rows[i];
#pragma GCC unroll 8
    for (int i = 0; i < W; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < W; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
        y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
        y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
        y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        rows[i] = (vu)_mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
        rows[i + 8] = (vu)_mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
        rows[i + 4] = (vu)_mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88);
        rows[i + 12] = (vu)_mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xdd);
    }
#elif KEYSPAN_VECTOR == 32
    __m256 x[W], y[W];
#pragma GCC unroll 8
    for (int i = 0; i < W; i++) x[i] = (__m256)rows[i];
#pragma GCC unroll 4
    for (int i = 0; i < W; i += 2) {
        y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < W; i += 4) {
        x[i] = _mm256_shuffle_ps(y[i], y[i + 2], 0x44);
        x[i + 1] = _mm256_shuffle_ps(y[i], y[i + 2], 0xee);
        x[i + 2] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0x44);
        x[i + 3] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        rows[i] = (vu)_mm256_permute2f128_ps(x[i], x[i + 4], 0x20);
        rows[i + 4] = (vu)_mm256_permute2f128_ps(x[i], x[i + 4], 0x31);
    }
#else
    vu x[W];
    for (int k = 0; k < W; k++)
        for (int i = 0; i < W; i++) x[k][i] = rows[i][k];
    for (int k = 0; k < W; k++) rows[k] = x[k];
#endif
}

// Transposes a square of words: [SQUARE][from_width] to [SQUARE][to_width].
INLINE void transpose_square(const uint32_t *from, int64_t from_width, uint32_t *to, int64_t to_width) {
    vu rows[SQUARE];
#pragma GCC unroll 16
    for (int i = 0; i < SQUARE; i++) rows[i] = load(from + i * from_width);
    transpose_vectors(rows);
#pragma GCC unroll 16
    for (int i = 0; i < SQUARE; i++) store(to + i * to_width, rows[i]);
}

// [rows][width] words to [count][PANEL]; `rows` is a multiple of SQUARE.
INLINE void transpose(const uint32_t *from, int64_t width, int64_t count, int64_t rows, uint32_t *to) {
    for (int64_t n = 0; n < rows; n += SQUARE) {
        int64_t k = 0;
        for (; k + SQUARE <= count; k += SQUARE)
            transpose_square(from + n * width + k, width, to + k * PANEL + n, PANEL);
        for (; k < count; k++)
            for (int i = 0; i < SQUARE; i++) to[k * PANEL + n + i] = from[(n + i) * width + k];
    }
}

// Packs `count` keys or values of a panel, and zeros up to `padded`, a multiple of SQUARE, in the forms that are not null;
// whether one is infinite or NaN.
INLINE bool pack_panel(int64_t dtype, const char *const *rows, int count, int padded, int64_t dims, int64_t stride,
                       int64_t width, float *by_dim, float *by_row) {
    alignas(64) float buffer[PANEL * MAX_HEAD_DIM];
    float *all_rows = by_row ? by_row : buffer;
    bool found = false;
    for (int n = 0; n < count; n++) {
        if (n + PREFETCH_ROWS < count) prefetch_row(rows[n + PREFETCH_ROWS], dims * dtype_size(dtype));
        found |= pack_row(dtype, rows[n], stride, dims, width, all_rows + n * width);
    }
    memset(all_rows + count * width, 0, (size_t)((padded - count) * width * 4));
    if (by_dim) transpose((const uint32_t *)all_rows, width, dims, padded, (uint32_t *)by_dim);
    return found;
}

INLINE bool pack_panel(int64_t dtype, const char *const *rows, int count, int padded, int64_t dims, int64_t stride,
                       int64_t width, uint32_t *by_dim, uint32_t *by_row) {
    alignas(64) uint16_t buffer[PANEL * MAX_HEAD_DIM];
    bool found = false;
    for (int n = 0; n < count; n++) {
        if (n + PREFETCH_ROWS < count) prefetch_row(rows[n + PREFETCH_ROWS], dims * dtype_size(dtype));
        found |= pack_row(dtype, rows[n], stride, dims, width, buffer + n * width);
    }
    memset(buffer + count * width, 0, (size_t)((padded - count) * width * 2));
    if (by_dim) transpose((const uint32_t *)buffer, width / 2, (dims + 1) / 2, padded, by_dim);
    if (by_row)
        for (int n = 0; n < padded; n += 2)
            interleave_rows(buffer + n * width, buffer + (n + 1) * width, width, by_row + n / 2 * width);
    return found;
}

// Row of logical key `j` of sequence `s`, before it is clamped to the keys there are: the block table may hold any
// numbers.
INLINE int64_t physical_key(const Params &p, int64_t s, int64_t j) {
    if (!p.sequence) return j;
    return (int64_t)p.block_table[s * p.pages + j / p.page_size] * p.page_size + j % p.page_size;
}

INLINE int64_t clamped_key(const Params &p, int64_t s, int64_t j) { return clamp(physical_key(p, s, j), 0, p.N - 1); }

template <class T>
void pack_keys(const Plan &plan, bool backward, int64_t slot, int64_t b, int64_t g, int64_t panel) {
    const Params &p = *plan.params;
    const int64_t first = panel * PANEL;
    const int64_t s = plan.segment_of_panel[(p.RB == 1 ? 0 : b * (plan.packed_keys / PANEL)) + panel];
    if (s < 0) return;
    const Segment &segment = plan.segments[s];
    const int count = (int)min<int64_t>(PANEL, segment.offset + segment.length - first);

    const char *k_rows[PANEL], *v_rows[PANEL];
    int64_t k_step = p.k_stride[3], v_step = p.v_stride[3];
    alignas(64) char widened[2][PANEL * MAX_HEAD_DIM * 4];  // keys and values that are stored in 8 bits
    const int64_t size = key_size(p), wide_size = dtype_size(p.dtype);
    for (int n = 0; n < count; n++) {
        const int64_t row = clamped_key(p, segment.sequence, segment.begin + first - segment.offset + n);
        k_rows[n] = p.k + (b * p.k_stride[0] + row * p.k_stride[1] + g * p.k_stride[2]) * size;
        v_rows[n] = p.v + (b * p.v_stride[0] + row * p.v_stride[1] + g * p.v_stride[2]) * size;
        if (p.stored == AS_DTYPE) continue;
        widen_row(p.stored, k_rows[n], p.K, p.dtype, widened[0] + n * p.K * wide_size);
        widen_row(p.stored, v_rows[n], p.V, p.dtype, widened[1] + n * p.V * wide_size);
        k_rows[n] = widened[0] + n * p.K * wide_size;
        v_rows[n] = widened[1] + n * p.V * wide_size;
        k_step = v_step = 1;
        const float scale = scales_of(p, p.v_scale, p.v_run, b, row)[g];
        plan.key_scales[slot * plan.packed_keys + first + n] = scales_of(p, p.k_scale, p.k_run, b, row)[g];
        plan.value_scales[slot * plan.packed_keys + first + n] = scale;
        if (!is_finite(scale))
            plan.nonfinite_values[slot * plan.segment_count + s].store(1, std::memory_order_relaxed);
    }
    for (int n = count; p.stored && n < PANEL; n++)
        plan.key_scales[slot * plan.packed_keys + first + n] = plan.value_scales[slot * plan.packed_keys + first + n] = 0;
    // Offsets in words of T: a panel has PANEL · dims of them, or half as many as pairs.
    constexpr int64_t per_word = PER_WORD<T>;
    T *k_by_dim = (T *)(plan.keys_by_dim + slot * plan.keys_by_dim_stride);
    T *v_by_row = (T *)(plan.value_rows + slot * plan.value_rows_stride);
    T *k_by_row = nullptr, *v_by_dim = nullptr;
    if (backward) {
        k_by_row = (T *)(plan.key_rows + slot * plan.key_rows_stride) + first / per_word * plan.key_width;
        v_by_dim = (T *)(plan.values_by_dim + slot * plan.values_by_dim_stride) + first * words<T>(p.V);
    }
    // Forward reads whole vectors of the keys that rows see, backward sums whole panels.
    const int padded = backward ? PANEL : (count + SQUARE - 1) / SQUARE * SQUARE;
    if (pack_panel(p.dtype, k_rows, count, padded, p.K, k_step, plan.key_width, k_by_dim + first * words<T>(p.K),
                   k_by_row))
        plan.nonfinite_keys[slot * plan.segment_count + s].store(1, std::memory_order_relaxed);
    if (pack_panel(p.dtype, v_rows, count, padded, p.V, v_step, plan.value_width, v_by_dim,
                   v_by_row + first / per_word * plan.value_width))
        plan.nonfinite_values[slot * plan.segment_count + s].store(1, std::memory_order_relaxed);
}

}  // namespace
}  // namespace KEYSPAN_NAMESPACE
}  // namespace keyspan
