// Few queries against many keys: keys and values are read once, where they lie, so that memory sets the pace.
//
// A unit is a run of keys for all heads of some queries; units are combined in a fixed order. Knows no threads.
#pragma once
#include "forward.h"

namespace saccade {
namespace SACCADE_NAMESPACE {
namespace {

constexpr int DECODE_KEYS = PANEL;  // keys of a block; the next block is fetched meanwhile

// Rows of keys and values of a block for one group, and what to fetch for the next block.
struct Block {
    const char *keys[DECODE_KEYS], *values[DECODE_KEYS];
    const char *next_keys[DECODE_KEYS], *next_values[DECODE_KEYS];
};

// How a row of keys or values is read: float, fp16, bf16 one by one, or bf16 in pairs.
template <int KIND>
struct Row {
    static constexpr int STEP = W;
    typedef float Query;
    static INLINE vf read(const char *p, int64_t i) {
        if constexpr (KIND == F32) return load((const float *)p + i);
        if constexpr (KIND == F16) return widen_f16((const uint16_t *)p + i);
        return widen_bf16((const uint16_t *)p + i);
    }
    static INLINE vf query(const float *q, int64_t i) { return load(q + i); }
};
constexpr int PAIRS = 3;
template <>
struct Row<PAIRS> {
    static constexpr int STEP = 2 * W;
    typedef uint32_t Query;
    static INLINE vu read(const char *p, int64_t i) { return load_pairs((const uint16_t *)p + i); }
    static INLINE vu query(const uint32_t *q, int64_t i) { return load(q + i / 2); }
};

// Sums of each of R vectors.
template <int R>
INLINE void sums(const vf *x, float *to) {
    int r = 0;
#if SACCADE_VECTOR == 64
    for (; r + 4 <= R; r += 4) {
        // Four at once: rows become lanes while they are added up.
        const __m512 a = (__m512)x[r], b = (__m512)x[r + 1], c = (__m512)x[r + 2], d = (__m512)x[r + 3];
        const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
        const __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
        const __m512 lanes = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                                           _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
        _mm_storeu_ps(to + r, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
    }
#endif
    for (; r < R; r++) to[r] = sum(x[r]);
}

template <int R, int KIND>
void dots(int64_t dims, const typename Row<KIND>::Query *queries, int64_t width, const Block &block,
          int64_t value_bytes, bool fetch_next, int begin, int end, float *scores) {
    typedef Row<KIND> Kind;
    const int64_t key_bytes = dims * (KIND == F32 ? 4 : 2);
    for (int n = begin; n < end; n++) {
        // Into the second level of cache: the first cannot have so much under way.
        if (fetch_next) {
            for (int64_t i = 0; i < key_bytes; i += 64) __builtin_prefetch(block.next_keys[n] + i, 0, 2);
            for (int64_t i = 0; i < value_bytes; i += 64) __builtin_prefetch(block.next_values[n] + i, 0, 2);
        }
        vf acc[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) acc[r] = vf{};
        for (int64_t i = 0; i < dims; i += Kind::STEP) {
            const auto key = Kind::read(block.keys[n], i);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
                acc[r] = multiply_add(acc[r], Kind::query(queries + r * width, i), key);
        }
        float total[R];
        sums<R>(acc, total);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) scores[r * BLOCK_KEYS + n] = total[r];
    }
}

template <int R, int C, int KIND>
INLINE void weigh_columns(const float *weights, const char *const *values, int64_t column, int begin, int end,
                          float *out, int64_t width) {
    vf acc[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) acc[r][c] = load(out + r * width + column + c * W);
    for (int n = begin; n < end; n++) {
        vf value[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) value[c] = Row<KIND>::read(values[n], column + c * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const vf weight = all(weights[r * BLOCK_KEYS + n]);
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) acc[r][c] += weight * value[c];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) store(out + r * width + column + c * W, acc[r][c]);
}

#if defined(SACCADE_AVX512BF16)
// 128 columns of bf16 values, two keys at a time: the rows of a pair are interleaved, which leaves each accumulator with
// every other run of four columns until the end.
template <int R>
INLINE void weigh_pairs(const float *weights, const char *const *values, int64_t column, int begin, int end, float *out,
                        int64_t width) {
    const __m512i front = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i back = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    const uint32_t nothing[4 * W] = {};
    uint16_t narrow[R][DECODE_KEYS + W];
    for (int r = 0; r < R; r++)
        for (int n = begin; n < end; n += W) store(narrow[r] + n - begin, narrow_bf16(load(weights + r * BLOCK_KEYS + n)));
    vf acc[R][8];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int c = 0; c < 8; c++) acc[r][c] = vf{};
    for (int n = begin; n < end; n += 2) {
        const bool lone = n + 1 == end;
        const char *first = values[n] + column * 2, *second = lone ? (const char *)nothing : values[n + 1] + column * 2;
        vu pair[8];
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
            const __m512i x = _mm512_loadu_si512(first + c * 64), y = _mm512_loadu_si512(second + c * 64);
            pair[2 * c] = (vu)_mm512_unpacklo_epi16(x, y);
            pair[2 * c + 1] = (vu)_mm512_unpackhi_epi16(x, y);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            uint32_t both_weights;
            memcpy(&both_weights, narrow[r] + n - begin, 4);
            const vu both = all(lone ? both_weights & 0xffff : both_weights);
#pragma GCC unroll 8
            for (int c = 0; c < 8; c++) acc[r][c] = multiply_add(acc[r][c], both, pair[c]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < 4; c++) {
            float *to = out + r * width + column + c * 2 * W;
            const __m512 low = (__m512)acc[r][2 * c], high = (__m512)acc[r][2 * c + 1];
            store(to, load(to) + (vf)_mm512_permutex2var_ps(low, front, high));
            store(to + W, load(to + W) + (vf)_mm512_permutex2var_ps(low, back, high));
        }
}
#endif

// Whole rows of values at a time, as they lie in memory; accumulators: two rows of eight vectors.
template <int R, int KIND>
void weigh(int64_t dims, const float *weights, const char *const *values, int begin, int end, float *out,
           int64_t width) {
    constexpr int WIDE = 2 * COLUMNS, PAIR = R > 1 ? 2 : 1;
    for (int r = 0; r < R; r += PAIR) {
        int64_t v = 0;
        const float *weight = weights + r * BLOCK_KEYS;
        float *to = out + r * width;
#if defined(SACCADE_AVX512BF16)
        if constexpr (KIND == BF16)
            for (; v + 8 * W <= dims; v += 8 * W)
                r + PAIR <= R ? weigh_pairs<PAIR>(weight, values, v, begin, end, to, width)
                              : weigh_pairs<1>(weight, values, v, begin, end, to, width);
#endif
        if (r + PAIR <= R) {
            for (; v + WIDE * W <= dims; v += WIDE * W)
                weigh_columns<PAIR, WIDE, KIND>(weight, values, v, begin, end, to, width);
            for (; v < dims; v += W) weigh_columns<PAIR, 1, KIND>(weight, values, v, begin, end, to, width);
        } else {
            for (; v + WIDE * W <= dims; v += WIDE * W)
                weigh_columns<1, WIDE, KIND>(weight, values, v, begin, end, to, width);
            for (; v < dims; v += W) weigh_columns<1, 1, KIND>(weight, values, v, begin, end, to, width);
        }
    }
}

#define SACCADE_BY_ROWS(rows, call)  \
    switch (rows) {                  \
    case 1: call(1); break;          \
    case 2: call(2); break;          \
    case 3: call(3); break;          \
    case 4: call(4); break;          \
    case 5: call(5); break;          \
    default: call(6); break;         \
    }

template <int KIND, int VALUES>
void decode_kind(const Plan &plan, int64_t b, int64_t query_tile, int64_t split, char *scratch) {
    typedef typename Row<KIND>::Query T;
    const Params &p = *plan.params;
    Arena arena{scratch};
    Tile *tiles = arena.take<Tile>(p.G);
    T *queries = arena.take<T>(p.G * plan.rows * plan.key_width);
    float *out = arena.take<float>(p.G * plan.rows * plan.value_width);
    float *scores = arena.take<float>(plan.rows * BLOCK_KEYS);
    float *keep = arena.take<float>(BLOCK_KEYS);
    Block block;
    const int64_t first_key = plan.first_key + split * SPLIT_KEYS, last_key = first_key + SPLIT_KEYS;
    const int64_t size = size_of(p.dtype), query_width = plan.key_width / PER_WORD<T>;
    for (int64_t g = 0; g < p.G; g++) {
        load_tile(plan, b, g, 0, query_tile, tiles[g]);
        load_queries(plan, tiles[g], queries + g * plan.rows * query_width);
        start_rows(p, tiles[g], out + g * plan.rows * plan.value_width, plan.value_width);
        if (split)  // a sink counts once
            for (int r = 0; r < tiles[g].rows; r++) tiles[g].peak[r] = -INF, tiles[g].total[r] = 0;
    }
    for (int s = 0; s < p.S; s++) {
        int64_t begin, end;
        tile_span(tiles[0], s, begin, end);
        begin = most(begin / PANEL * PANEL, first_key);
        end = least(end, last_key);
        // Blocks are fetched in the order in which they lie in memory, whichever of keys and groups is the outer one.
        const bool keys_outer = p.k_stride[1] > p.k_stride[2];
        for (int64_t first = begin; first < end; first += DECODE_KEYS) {
            const int64_t last = least(first + DECODE_KEYS, end);
            for (int64_t g = 0; g < p.G; g++) {
                Tile &tile = tiles[g];
                float *out_g = out + g * plan.rows * plan.value_width;
                const int64_t sequence = p.sequence ? p.sequence[tile.query[0]] : 0;
                const auto key = [&](int64_t row, int64_t group) {
                    return p.k + (b * p.k_stride[0] + row * p.k_stride[1] + group * p.k_stride[2]) * size;
                };
                const auto value = [&](int64_t row, int64_t group) {
                    return p.v + (b * p.v_stride[0] + row * p.v_stride[1] + group * p.v_stride[2]) * size;
                };
                for (int64_t n = 0; n < last - first; n++) {
                    const int64_t row = physical_key(p, sequence, first + n);
                    block.keys[n] = key(row, g);
                    block.values[n] = value(row, g);
                    const int64_t at = g * DECODE_KEYS + n;
                    const int64_t ahead = first + DECODE_KEYS + (keys_outer ? at / p.G : n);
                    const int64_t next = physical_key(p, sequence, least(ahead, end - 1));
                    block.next_keys[n] = key(next, keys_outer ? at % p.G : g);
                    block.next_values[n] = value(next, keys_outer ? at % p.G : g);
                }
                const bool fetch_next = first + DECODE_KEYS < end;
                for (int r0 = 0; r0 < tile.rows; r0 += ROWS) {
                    const int rows = least(ROWS, tile.rows - r0);
                    Span all{BLOCK_KEYS, 0}, span;
                    bool alike = true;
                    for (int r = r0; r < r0 + rows; r++) {
                        span = row_span(tile, s, r, first, last);
                        alike = alike && tile.lo[s][r] == tile.lo[s][r0] && tile.hi[s][r] == tile.hi[s][r0];
                        if (span.begin >= span.end) continue;
                        all = Span{least(all.begin, span.begin), most(all.end, span.end)};
                    }
                    if (all.begin >= all.end) continue;
#define SACCADE_DOTS(R)                                                                                              \
    dots<R, KIND>(p.K, queries + (g * plan.rows + r0) * query_width, query_width, block, p.V *size,          \
                  fetch_next && r0 == 0, all.begin, all.end, scores + r0 * BLOCK_KEYS)
                    SACCADE_BY_ROWS(rows, SACCADE_DOTS)
                    for (int r = r0; r < r0 + rows; r++) {
                        span = row_span(tile, s, r, first, last);
                        if (span.begin >= span.end) continue;
                        float *score = scores + r * BLOCK_KEYS, *out_r = out_g + r * plan.value_width;
                        soften_row(plan, tile, s, r, first, span, span, score, score, out_r, keep);
                        // What one row may not see must not reach it, not even times zero.
                        if (!alike) weigh<1, VALUES>(p.V, score, block.values, span.begin, span.end, out_r, plan.value_width);
                    }
                    if (!alike) continue;
#define SACCADE_WEIGH(R)                                                                             \
    weigh<R, VALUES>(p.V, scores + r0 * BLOCK_KEYS, block.values, all.begin, all.end, out_g + r0 * plan.value_width, \
                     plan.value_width)
                    SACCADE_BY_ROWS(rows, SACCADE_WEIGH)
                }
            }
        }
    }
    for (int64_t g = 0; g < p.G; g++) {
        float *out_g = out + g * plan.rows * plan.value_width;
        for (int r = 0; r < tiles[g].rows; r++) {
            if (plan.splits == 1) {
                write_row(p, tiles[g], r, out_g + r * plan.value_width);
                continue;
            }
            const int64_t unit = ((b * plan.query_tiles + query_tile) * plan.splits + split) * p.G + g;
            float *to = plan.partial + (unit * plan.rows + r) * (plan.value_width + 2);
            to[0] = tiles[g].peak[r];
            to[1] = tiles[g].total[r];
            memcpy(to + 2, out_g + r * plan.value_width, (size_t)plan.value_width * 4);
        }
    }
}

void decode(const Plan &plan, int64_t b, int64_t query_tile, int64_t split, char *scratch) {
    const int64_t dtype = plan.params->dtype;
    if (dtype == F32) return decode_kind<F32, F32>(plan, b, query_tile, split, scratch);
    if (dtype == F16) return decode_kind<F16, F16>(plan, b, query_tile, split, scratch);
    if constexpr (HAS_PAIRS)
        if (plan.params->K % (2 * W) == 0) return decode_kind<PAIRS, BF16>(plan, b, query_tile, split, scratch);
    return decode_kind<BF16, BF16>(plan, b, query_tile, split, scratch);
}

// The parts of a query's keys put together, in their order.
void combine(const Plan &plan, int64_t b, int64_t query_tile, char *scratch) {
    const Params &p = *plan.params;
    Arena arena{scratch};
    Tile &tile = *arena.take<Tile>(1);
    float *out = arena.take<float>(plan.value_width);
    for (int64_t g = 0; g < p.G; g++) {
        load_tile(plan, b, g, 0, query_tile, tile);
        for (int r = 0; r < tile.rows; r++) {
            const int64_t stride = p.G * plan.rows * (plan.value_width + 2);
            const float *part = plan.partial + (b * plan.query_tiles + query_tile) * plan.splits * stride +
                                (g * plan.rows + r) * (plan.value_width + 2);
            float peak = -INF, total = 0;
            for (int64_t i = 0; i < plan.splits; i++) peak = most(peak, part[i * stride]);
            const float pivot = peak == -INF ? 0 : peak;
            memset(out, 0, (size_t)plan.value_width * 4);
            for (int64_t i = 0; i < plan.splits; i++) {
                const float *one = part + i * stride;
                if (one[1] == 0) continue;
                const float share = exp2<5>(all(one[0] - pivot))[0];
                total += share * one[1];
                for (int64_t v = 0; v < plan.value_width; v += W) store(out + v, load(out + v) + share * load(one + 2 + v));
            }
            tile.peak[r] = peak;
            tile.total[r] = total;
            write_row(p, tile, r, out);
        }
    }
}

}  // namespace
}  // namespace SACCADE_NAMESPACE
}  // namespace saccade
