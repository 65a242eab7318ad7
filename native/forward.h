// Forward over packed keys, and the online softmax that decode.h shares. One call computes one RowTile.
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

INLINE void init_softmax(const Params &p, RowTile &tile, bool with_sinks, float *out, int64_t width) {
    for (int r = 0; r < tile.rows; r++) {
        // A sink acts as a key with this score and a value of zero.
        tile.row_max[r] = p.sinks && with_sinks ? sink_score(p, head_index(p, tile, r)) : -INF;
        tile.row_sum[r] = tile.weight_sum[r] = tile.row_max[r] > -INF ? 1 : 0;
    }
    memset(out, 0, (size_t)(tile.rows * width * 4));
}

// Lazy rescaling, where weights stay in fp32: sums are rescaled only when a score exceeds the current maximum by this
// many powers of two. Weights that are rounded to bf16 are always relative to the maximum: then the largest weight, on
// which the result depends most, is 1 and not rounded.
constexpr float SLACK = 8;

// One step of online softmax for a row: scores [begin, end), whole vectors, become weights, in place or as bf16;
// row_max and the sums are updated and `out` [width] is rescaled. `dropout` [end − begin] or null. ROUNDED: the weights
// will be multiplied as bf16.
template <bool ROUNDED, class T>
INLINE void softmax_step(RowTile &tile, int r, float multiplier, int begin, int end, const float *score, T *weight,
                         float *out, int64_t width, const float *dropout) {
    vf vector_max = load(score + begin);
    for (int n = begin + W; n < end; n += W) vector_max = maximum(vector_max, load(score + n));
    const float block_max = reduce_max(vector_max), old_max = tile.row_max[r];
    const bool rescale = ROUNDED ? block_max > old_max : (block_max - old_max) * multiplier > SLACK;
    const float row_max = rescale ? block_max : old_max;
    // Finite for rows without a visible key so far: −inf − −inf is NaN.
    const float pivot = row_max == -INF ? 0 : row_max;
    if (rescale) {
        const float factor = exp2<5>(broadcast((old_max - pivot) * multiplier))[0];
        tile.row_sum[r] *= factor;
        tile.weight_sum[r] *= factor;
        for (int64_t v = 0; v < width; v += W) store(out + v, load(out + v) * factor);
        tile.row_max[r] = row_max;
    }
    vf sums{}, rounded_sums{};
    const vf m = broadcast(multiplier), p = broadcast(pivot);
    constexpr int DEGREE = ROUNDED ? 4 : 5;
    int n = begin;
    if constexpr (PER_WORD<T> == 2) {
        for (; !dropout && n + 2 * W <= end; n += 2 * W) {
            const vf x = exp2<DEGREE>((load(score + n) - p) * m), y = exp2<DEGREE>((load(score + n + W) - p) * m);
            sums += x;
            sums += y;
            store_bf16((uint16_t *)weight + n, x, y, rounded_sums);
        }
    }
    for (; n < end; n += W) {
        vf x = exp2<DEGREE>((load(score + n) - p) * m);
        sums += x;
        if constexpr (ROUNDED) x = round_to_bf16(x), rounded_sums += x;
        if (dropout) x *= load(dropout + n - begin);  // 0 or 1: the sums are those of all weights
        if constexpr (PER_WORD<T> == 1)
            store(weight + n, x);
        else
            store((uint16_t *)weight + n, narrow_bf16(x));
    }
    float sum, rounded_sum;
    if constexpr (ROUNDED)
        reduce_add(sums, rounded_sums, sum, rounded_sum);
    else
        sum = rounded_sum = reduce_add(sums);
    tile.row_sum[r] += sum;
    tile.weight_sum[r] += rounded_sum;
}

// Scores and softmax step of one row. Weights are written over the whole vectors of `group_span`, zero where the row
// does not see the key.
template <class T>
INLINE void softmax_row(const Plan &plan, RowTile &tile, int s, int r, int64_t first, Span span, Span group_span,
                        float *score, T *weight, float *out, float *dropout) {
    const Params &p = *plan.params;
    const int begin = span.begin / W * W, end = (span.end + W - 1) / W * W;
    row_scores(plan, tile, s, r, first, span, score, nullptr);
    if (p.seed) fill_dropout(p, tile, r, first + begin, end - begin, 1, dropout);
    softmax_step<PER_WORD<T> == 2>(tile, r, score_multiplier(p), begin, end, score, weight, out, plan.value_width,
                                   p.seed ? dropout : nullptr);
    for (int n = group_span.begin; n < begin; n += W)
        memset((char *)weight + n * 4 / PER_WORD<T>, 0, W * 4 / PER_WORD<T>);
    for (int n = end; n < group_span.end; n += W) memset((char *)weight + n * 4 / PER_WORD<T>, 0, W * 4 / PER_WORD<T>);
}

template <class T>
INLINE void zero_row(Span group_span, T *weight) {
    if (group_span.begin < group_span.end)
        memset((char *)weight + group_span.begin * 4 / PER_WORD<T>, 0,
               (size_t)(group_span.end - group_span.begin) * 4 / PER_WORD<T>);
}

INLINE float natural_lse(const Params &p, const RowTile &tile, int r) {
    return (float)(tile.row_max[r] * (double)natural_multiplier(p) + __builtin_log((double)tile.row_sum[r]));
}

// `out` [V] sums weighted values, of which dropout has removed some and scaled none.
INLINE void write_row(const Params &p, const RowTile &tile, int r, const float *out) {
    const bool empty = tile.row_sum[r] == 0;
    narrow(p.out_dtype, out, p.V, empty ? 0 : dropout_scale(p) / tile.weight_sum[r],
           p.out + out_row(p, tile, r) * p.V * dtype_size(p.out_dtype));
    if (p.lse) p.lse[lse_row(p, tile, r)] = empty ? -INF : natural_lse(p, tile, r);
}

template <class T>
INLINE void load_queries(const Plan &plan, const RowTile &tile, T *queries) {
    const Params &p = *plan.params;
    for (int r = 0; r < tile.rows; r++) {
        if (r + PREFETCH_ROWS < tile.rows)
            prefetch_row(query_row(p, tile, r + PREFETCH_ROWS), p.K * dtype_size(p.dtype));
        if constexpr (PER_WORD<T> == 1)
            pack_row(p.dtype, query_row(p, tile, r), p.q_stride[4], p.K, plan.key_width, queries + r * plan.key_width);
        else
            pack_row(p.dtype, query_row(p, tile, r), p.q_stride[4], p.K, plan.key_width,
                     (uint16_t *)queries + r * plan.key_width);
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
            gemm(min(ROWS, tile.rows - r0), words<T>(dims), rows + r0 * (width / PER_WORD<T>), width / PER_WORD<T>, 1,
                 panel + begin - n, PANEL, scores + r0 * BLOCK_KEYS + begin, BLOCK_KEYS, (end - begin) / W, false);
        }
    }
}

// NaN repair of `add_weighted_rows`: key by key, without hidden keys.
template <class T>
INLINE void add_weighted_rows_nan_repair(const Plan &plan, const RowTile &tile, int s, const T *weights,
                                         const T *by_row, int64_t width, int64_t dims, int64_t first, int64_t last,
                                         float *out) {
    for (int r = 0; r < tile.rows; r++) {
        const Span span = row_span(tile, s, r, first, last);
        for (int n = span.begin; n < span.end; n++) {
            if (!is_visible(*plan.params, tile, s, r, first + n)) continue;
            const float weight = weight_element(weights + r * (BLOCK_KEYS / PER_WORD<T>), n);
            for (int64_t v = 0; v < dims; v++)
                out[r * width + v] += multiply_unless_nonfinite(weight, packed_element(by_row, width, first + n, v));
        }
    }
}

// out[r] += Σ_n weights[r][n] · by_row[n] for the keys in the span of each group of ROWS rows.
template <class T>
INLINE void add_weighted_rows(const Plan &plan, const RowTile &tile, int s, const Span *spans, const T *weights,
                              const T *by_row, int64_t width, int64_t dims, int64_t first, int64_t last, float *out,
                              bool nonfinite) {
    if (nonfinite) return add_weighted_rows_nan_repair(plan, tile, s, weights, by_row, width, dims, first, last, out);
    constexpr int64_t row = BLOCK_KEYS / PER_WORD<T>;
    for (int r0 = 0, i = 0; r0 < tile.rows; r0 += ROWS, i++) {
        const Span span = spans[i];
        if (span.begin >= span.end) continue;
        gemm(min(ROWS, tile.rows - r0), (span.end - span.begin) / PER_WORD<T>,
             weights + r0 * row + span.begin / PER_WORD<T>, row, 1, by_row + (first + span.begin) / PER_WORD<T> * width,
             width, out + r0 * width, width, width / W, true);
    }
}

template <class T>
void forward(const Plan &plan, int64_t slot, int64_t b, int64_t g, int64_t head_tile, int64_t query_tile,
             char *scratch) {
    const Params &p = *plan.params;
    Arena arena{scratch};
    RowTile &tile = *arena.reserve<RowTile>(1);
    load_tile(plan, b, g, head_tile, query_tile, tile);
    T *queries = arena.reserve<T>(plan.rows * plan.key_width);
    float *scores = arena.reserve<float>(plan.rows * BLOCK_KEYS);
    // bf16 weights are shorter than the scores and get memory of their own.
    T *weights = PER_WORD<T> == 1 ? (T *)scores : arena.reserve<T>(plan.rows * BLOCK_KEYS / PER_WORD<T>);
    float *out = arena.reserve<float>(plan.rows * plan.value_width);
    float *dropout = arena.reserve<float>(BLOCK_KEYS);
    Span spans[TILE_ROWS / ROWS];

    load_queries(plan, tile, queries);
    init_softmax(p, tile, true, out, plan.value_width);
    const T *by_dim = (const T *)(plan.keys_by_dim + slot * plan.keys_by_dim_stride);
    const T *by_row = (const T *)(plan.value_rows + slot * plan.value_rows_stride);
    const bool nonfinite = plan.nonfinite_values[slot].load(std::memory_order_relaxed);
    for (int s = 0; s < p.S; s++) {
        int64_t begin, end;
        tile_span(tile, s, begin, end);
        for (int64_t first = begin / PANEL * PANEL; first < end; first += plan.block_keys) {
            const int64_t last = min(first + plan.block_keys, end);
            for (int r0 = 0, i = 0; r0 < tile.rows; r0 += ROWS, i++)
                spans[i] = rows_span(tile, s, r0, min(r0 + ROWS, tile.rows), first, last);
            block_scores(tile, spans, queries, plan.key_width, p.K, by_dim, first, last - first, scores);
            for (int r = 0; r < tile.rows; r++) {
                const Span span = row_span(tile, s, r, first, last);
                T *weight = weights + r * BLOCK_KEYS / PER_WORD<T>;
                if (span.begin < span.end)
                    softmax_row(plan, tile, s, r, first, span, spans[r / ROWS], scores + r * BLOCK_KEYS, weight,
                                out + r * plan.value_width, dropout);
                else
                    zero_row(spans[r / ROWS], weight);
            }
            add_weighted_rows(plan, tile, s, spans, weights, by_row, plan.value_width, p.V, first, last, out,
                              nonfinite);
        }
    }
    for (int r = 0; r < tile.rows; r++) write_row(p, tile, r, out + r * plan.value_width);
}

}  // namespace
}  // namespace KEYSPAN_NAMESPACE
}  // namespace keyspan
