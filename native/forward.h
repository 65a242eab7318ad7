// Forward over packed keys, and the softmax that decode.h and backward.h share. One call computes one RowTile.
//
// A row's result is merged from blocks, in the order of their keys and, within a block, of the ranges: see plan.h.
#pragma once
#include "gemm.h"
#include "rows.h"

namespace keyspan {
namespace KEYSPAN_NAMESPACE {
namespace {

// Hands out aligned parts of a thread's scratch memory.
struct Arena {
    char *next;
    template <class X>
    X *reserve(int64_t count) {
        X *here = (X *)next;
        const int64_t bytes = count * (int64_t)sizeof(X);
        KEYSPAN_GUARD(here, bytes);
        next += (bytes + 63) / 64 * 64 + GUARD;
        return here;
    }
};

INLINE void init_softmax(const Params &p, RowTile &tile, float *out, int64_t width) {
    for (int r = 0; r < tile.rows; r++) {
        // A sink acts as a key with this score and a value of zero, before all others.
        tile.row_max[r] = p.sinks ? sink_score(p, head_index(p, tile, r)) : -INF;
        tile.row_sum[r] = tile.weight_sum[r] = tile.row_max[r] > -INF ? 1 : 0;
    }
    memset(out, 0, (size_t)(tile.rows * width * 4));
}

// ---- the softmax of a block -------------------------------------------------------------------------------------------
//
// Weights of a block are 2^((score − maximum of the block) · multiplier), so that they depend on nothing outside of it;
// where they are rounded to bf16, the largest is 1 and not rounded. Functions that make bits of a row are compiled once
// and serve the tile kernel and decoding alike.

// Of the rows of a tile in one block: maxima, and sums of the weights, and of the weights as they are multiplied. A row
// that sees no key has a maximum of −inf.
struct BlockStats {
    float max[TILE_ROWS], sum[TILE_ROWS], weight_sum[TILE_ROWS];
    float keep[TILE_ROWS], take[TILE_ROWS];  // how the block joins the rows' sums: see Merge
};

// Scores [begin, end) of a row, within which all others are −inf, become weights, in place or as bf16. `begin` and `end`
// are multiples of SUM_KEYS. `dropout` [end − begin] or null; `scales` of the values, [end] or null. T is uint32_t where
// weights are multiplied as bf16.
template <class T>
__attribute__((noinline)) void block_softmax(float multiplier, int begin, int end, const float *score, T *weight,
                                             const float *dropout, const float *scales, BlockStats &stats, int r) {
    constexpr bool ROUNDED = PER_WORD<T> == 2;
    vf max0 = load(score + begin), max1 = load(score + begin + W);
    for (int n = begin + SUM_KEYS; n < end; n += SUM_KEYS) {
        max0 = maximum(max0, load(score + n));
        max1 = maximum(max1, load(score + n + W));
    }
    const float block_max = reduce_max(maximum(max0, max1));
    // Finite where all keys are hidden: −inf − −inf is NaN.
    const vf m = broadcast(multiplier), pivot = broadcast(block_max == -INF ? 0 : block_max);
    vf sums{}, rounded_sums{};
    constexpr int DEGREE = ROUNDED ? 4 : 5;
    for (int n = begin; n < end; n += SUM_KEYS) {
        vf x = exp2<DEGREE>((load(score + n) - pivot) * m), y = exp2<DEGREE>((load(score + n + W) - pivot) * m);
        sums += x;
        sums += y;
        if constexpr (ROUNDED) {
            if (!dropout && !scales) {
                store_bf16((uint16_t *)weight + n, x, y, rounded_sums);
                continue;
            }
            if (!scales) {
                x = round_to_bf16(x);
                y = round_to_bf16(y);
                rounded_sums += x;
                rounded_sums += y;
            }
        }
        if (dropout) {  // 0 or 1: the sums are those of all weights
            x *= load(dropout + n - begin);
            y *= load(dropout + n + W - begin);
        }
        if (scales) {
            x *= finite_scales(scales + n);
            y *= finite_scales(scales + n + W);
        }
        if constexpr (ROUNDED) {
            store((uint16_t *)weight + n, narrow_bf16(x));
            store((uint16_t *)weight + n + W, narrow_bf16(y));
        } else {
            store(weight + n, x);
            store(weight + n + W, y);
        }
    }
    stats.max[r] = block_max;
    if (ROUNDED && !scales)
        reduce_add(sums, rounded_sums, stats.sum[r], stats.weight_sum[r]);
    else
        stats.sum[r] = stats.weight_sum[r] = reduce_add(sums);
    if (!(stats.sum[r] == stats.sum[r])) stats.max[r] = stats.sum[r];  // a NaN may not be the maximum
}

// Joins a block's sums to those of its rows, and finds `keep` and `take`.
__attribute__((noinline)) void merge_block(RowTile &tile, int rows, float multiplier, BlockStats &block) {
    const vf one = broadcast(1.0f), m = broadcast(multiplier);
    for (int r = 0; r < rows; r += W) {
        const vf before = load(tile.row_max + r), here = load(block.max + r);
        const vi none = here == broadcast(-INF), lower = none | (here <= before);
        const vf factor = exp2<5>((lower ? here - before : before - here) * m);
        const vf keep = lower ? one : factor, take = none ? one : lower ? factor : one;
        store(block.keep + r, keep);
        store(block.take + r, take);
        store(tile.row_max + r, lower ? before : here);
        const auto join = [&](float *sum, const float *more) {
            const vf x = load(sum + r), y = load(more + r);
            store(sum + r, none ? x : lower ? multiply_add(x, y, take) : multiply_add(y, x, keep));
        };
        join(tile.row_sum, block.sum);
        join(tile.weight_sum, block.weight_sum);
    }
}

// Products of row r in `span` of a block become weights, zero in the rest of `all`, and its part of `stats`.
template <class T>
INLINE void row_weights(const Plan &plan, const RowTile &tile, int s, int r, int64_t first, Span span, Span all,
                        float *score, T *weight, float *dropout, BlockStats &stats, Scales scales) {
    const Params &p = *plan.params;
    const auto clear = [&](int from, int to) {  // whole vectors
        for (int n = from; n < to; n += W)
            if constexpr (PER_WORD<T> == 1)
                store(weight + n, vf{});
            else
                store((uint16_t *)weight + n, vh{});
    };
    if (span.begin >= span.end) {
        stats.max[r] = -INF;
        return clear(all.begin, all.end);
    }
    const int begin = span.begin / SUM_KEYS * SUM_KEYS, end = (span.end + SUM_KEYS - 1) / SUM_KEYS * SUM_KEYS;
    for (int n = begin; scales.keys && n < end; n += W)
        store(score + n, load(score + n) * finite_or_nan_scales(scales.keys + n));
    row_scores(plan, tile, s, r, first, span, score, nullptr);
    if (p.seed) fill_dropout(p, tile, r, first + begin, end - begin, 1, dropout);
    clear(all.begin, begin);
    clear(end, all.end);
    block_softmax<T>(score_multiplier(p), begin, end, score, weight, p.seed ? dropout : nullptr, scales.values, stats,
                     r);
}

// ---- results -----------------------------------------------------------------------------------------------------------

INLINE float natural_lse(const Params &p, const RowTile &tile, int r) {
    return (float)(tile.row_max[r] * (double)natural_multiplier(p) + __builtin_log((double)tile.row_sum[r]));
}

// `out` [V] sums weighted values, of which dropout has removed some and scaled none.
__attribute__((noinline)) void write_row(const Params &p, const RowTile &tile, int r, const float *out) {
    const bool empty = tile.row_sum[r] == 0;
    narrow(p.out_dtype, out, p.V, empty ? 0 : dropout_scale(p) / tile.weight_sum[r],
           p.out + out_row(p, tile, r) * p.V * dtype_size(p.out_dtype));
    if (p.lse) p.lse[lse_row(p, tile, r)] = empty ? -INF : natural_lse(p, tile, r);
}

// Rows of `width` words, padded with zeros to plan.key_width elements.
template <class T>
INLINE void load_queries(const Plan &plan, const RowTile &tile, T *queries, int64_t width) {
    const Params &p = *plan.params;
    for (int r = 0; r < tile.rows; r++, queries += width) {
        if (r + PREFETCH_ROWS < tile.rows)
            prefetch_row(query_row(p, tile, r + PREFETCH_ROWS), p.K * dtype_size(p.dtype));
        if constexpr (PER_WORD<T> == 1)
            pack_row(p.dtype, query_row(p, tile, r), p.q_stride[4], p.K, plan.key_width, queries);
        else
            pack_row(p.dtype, query_row(p, tile, r), p.q_stride[4], p.K, plan.key_width, (uint16_t *)queries);
    }
}

// scores[r][n] = rows[r] · key n of a block, panel by panel, so that a panel stays in cache. scores [rows][BLOCK_KEYS].
template <class T>
INLINE void block_scores(const RowTile &tile, const Span *spans, const T *rows, int64_t width, int64_t dims,
                         const T *by_dim, int64_t first, int64_t keys, float *scores) {
    for (int64_t n = 0; n < keys; n += PANEL) {
        const T *panel = by_dim + (first + n) * words<T>(dims);
        for (int r0 = 0, i = 0; r0 < tile.rows; r0 += ROWS, i++) {
            const int64_t begin = max<int64_t>(spans[i].begin, n), end = min<int64_t>(spans[i].end, n + PANEL);
            if (begin >= end) continue;
            gemm<SET>(min(ROWS, tile.rows - r0), words<T>(dims), rows + r0 * (width / PER_WORD<T>), width / PER_WORD<T>, 1,
                 panel + begin - n, PANEL, scores + r0 * BLOCK_KEYS + begin, BLOCK_KEYS, (end - begin) / W);
        }
    }
}

// NaN repair of `add_weighted_rows` with ADD.
template <class T>
__attribute__((noinline)) void add_rows_nan_repair(const Plan &plan, const RowTile &tile, int s, int r0, int rows,
                                                   Span span, const T *weights, const T *by_row, int64_t width,
                                                   int64_t dims, int64_t first, int64_t last, float *out,
                                                   const float *scales) {
    constexpr int KEYS = 16;
    constexpr int64_t row = BLOCK_KEYS / PER_WORD<T>;
    alignas(64) T clean[KEYS / PER_WORD<T> * MAX_HEAD_DIM];
    for (int n = span.begin; n < span.end; n += KEYS) {
        const int keys = min(KEYS, span.end - n);
        for (int i = 0; i < keys; i++)
            for (int64_t v = 0; v < width; v++) {
                const float x = packed_element(by_row, width, first + n + i, v);
                set_packed_element(clean, width, i, v, x - x == 0 ? x : 0);
            }
        gemm<ADD>(rows, keys / PER_WORD<T>, weights + r0 * row + n / PER_WORD<T>, row, 1, clean, width,
                  out + r0 * width, width, width / W);
    }
    for (int r = r0; r < r0 + rows; r++) {
        const Span seen = row_span(tile, s, r, first, last);
        for (int n = seen.begin; n < seen.end; n++) {
            if (!is_visible(*plan.params, tile, s, r, first + n)) continue;
            for (int64_t v = 0; v < dims; v++) {
                const float x = unless_finite(packed_element(by_row, width, first + n, v), scales ? scales + n : nullptr);
                if (!is_finite(x)) out[r * width + v] += x;
            }
        }
    }
}

// out[r] = Σ_n weights[r][n] · by_row[n] for the keys in the span of each group of ROWS rows, added or merged to what
// `out` holds. `scales`: those of the block's values, or null.
template <Into INTO, class T>
INLINE void add_weighted_rows(const Plan &plan, const RowTile &tile, int s, const Span *spans, const T *weights,
                              const T *by_row, int64_t width, int64_t dims, int64_t first, int64_t last, float *out,
                              bool nonfinite, const BlockStats *stats = nullptr, const float *scales = nullptr) {
    constexpr int64_t row = BLOCK_KEYS / PER_WORD<T>;
    for (int r0 = 0, i = 0; r0 < tile.rows; r0 += ROWS, i++) {
        const Span span = spans[i];
        const int rows = min(ROWS, tile.rows - r0);
        if (span.begin >= span.end) continue;
        if (!nonfinite) {
            gemm<INTO>(rows, (span.end - span.begin) / PER_WORD<T>, weights + r0 * row + span.begin / PER_WORD<T>, row,
                       1, by_row + (first + span.begin) / PER_WORD<T> * width, width, out + r0 * width, width,
                       width / W,
                       INTO == MERGE ? Merge{stats->keep + r0, stats->take + r0} : Merge{});
        } else if (INTO == ADD) {
            add_rows_nan_repair(plan, tile, s, r0, rows, span, weights, by_row, width, dims, first, last, out, scales);
        } else {
            alignas(64) float sums[ROWS * MAX_HEAD_DIM];
            memset(sums, 0, (size_t)(rows * width * 4));
            add_rows_nan_repair(plan, tile, s, r0, rows, span, weights, by_row, width, dims, first, last,
                                sums - r0 * width, scales);
            for (int r = 0; r < rows; r++)
                merge_row(out + (r0 + r) * width, sums + r * width, stats->keep[r0 + r], stats->take[r0 + r], width);
        }
    }
}

template <class T>
void forward(const Plan &plan, int64_t slot, int64_t b, int64_t g, const Tile &of, char *scratch) {
    const Params &p = *plan.params;
    Arena arena{scratch};
    RowTile &tile = *arena.reserve<RowTile>(1);
    load_tile(plan, b, g, of, tile);
    T *queries = arena.reserve<T>(plan.rows * plan.key_width);
    float *scores = arena.reserve<float>(plan.rows * BLOCK_KEYS);
    // bf16 weights are shorter than the scores and get memory of their own.
    T *weights = PER_WORD<T> == 1 ? (T *)scores : arena.reserve<T>(plan.rows * BLOCK_KEYS / PER_WORD<T>);
    float *out = arena.reserve<float>(plan.rows * plan.value_width);
    float *dropout = arena.reserve<float>(BLOCK_KEYS);
    BlockStats &stats = *arena.reserve<BlockStats>(1);
    Span spans[TILE_ROWS / ROWS], seen[TILE_ROWS];
    const float multiplier = score_multiplier(p);

    load_queries(plan, tile, queries, plan.key_width / PER_WORD<T>);
    init_softmax(p, tile, out, plan.value_width);
    const T *by_dim = (const T *)(plan.keys_by_dim + slot * plan.keys_by_dim_stride);
    const T *by_row = (const T *)(plan.value_rows + slot * plan.value_rows_stride);
    const bool nonfinite =
        plan.nonfinite_values[slot * plan.segment_count + of.segment].load(std::memory_order_relaxed);
    each_block(plan, tile, [&](int s, int64_t first, int64_t last) {
        const int64_t at = slot * plan.packed_keys + first;
        const Scales scales = p.stored ? Scales{plan.key_scales + at, plan.value_scales + at} : Scales{};
        row_spans(tile, s, first, last, seen, spans);
        block_scores(tile, spans, queries, plan.key_width, p.K, by_dim, first, last - first, scores);
        for (int r = 0; r < tile.rows; r++)
            row_weights(plan, tile, s, r, first, seen[r], spans[r / ROWS], scores + r * BLOCK_KEYS,
                        weights + r * BLOCK_KEYS / PER_WORD<T>, dropout, stats, scales);
        merge_block(tile, tile.rows, multiplier, stats);
        add_weighted_rows<MERGE>(plan, tile, s, spans, weights, by_row, plan.value_width, p.V, first, last, out,
                                 nonfinite, &stats, scales.values);
    });
    for (int r = 0; r < tile.rows; r++) write_row(p, tile, r, out + r * plan.value_width);
}

}  // namespace
}  // namespace KEYSPAN_NAMESPACE
}  // namespace keyspan
