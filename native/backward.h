// Backward: recomputes the weights of each RowTile from lse; five products; no atomics.
//
// A unit of work is a Chunk of one or more (batch, group); it has sums of its own, see run_backward.
#pragma once
#include "forward.h"

namespace keyspan {
namespace KEYSPAN_NAMESPACE {
namespace {

// Query rows or output gradients of a tile: as rows to be broadcast, and as rows to be loaded (the same for floats).
template <class T>
struct PackedRows {
    T *row;     // [rows][width] of float or bf16
    T *by_row;  // [rows / 2][width] of bf16 pairs, or `row`
    int64_t width;
    bool nonfinite;
};

template <class T>
INLINE PackedRows<T> reserve_rows(Arena &arena, int64_t rows, int64_t width) {
    T *row = arena.reserve<T>((rows + 1) * width / PER_WORD<T>);
    return {row, PER_WORD<T> == 1 ? row : arena.reserve<T>((rows + 1) / 2 * width), width, false};
}

INLINE const char *grad_row(const Params &p, const RowTile &tile, int r) {
    return p.grad_out + (tile.batch * p.grad_out_stride[0] + tile.query[r] * p.grad_out_stride[1] +
                         tile.group * p.grad_out_stride[2] + tile.head[r] * p.grad_out_stride[3]) *
                            dtype_size(p.out_dtype);
}

template <class T>
INLINE void load_rows(PackedRows<T> &to, const RowTile &tile, int64_t dtype, const char *const *from, int64_t stride,
                      int64_t dims) {
    to.nonfinite = false;
    if constexpr (PER_WORD<T> == 1) {
        for (int r = 0; r < tile.rows; r++)
            to.nonfinite |= pack_row(dtype, from[r], stride, dims, to.width, to.row + r * to.width);
    } else {
        uint16_t *row = (uint16_t *)to.row;
        alignas(64) float wide[MAX_HEAD_DIM];
        for (int r = 0; r < tile.rows; r++) {
            if (dtype == BF16) {
                to.nonfinite |= pack_row(dtype, from[r], stride, dims, to.width, row + r * to.width);
            } else {  // the output has another dtype than the inputs
                to.nonfinite |= pack_row(dtype, from[r], stride, dims, to.width, wide);
                for (int64_t i = 0; i < to.width; i += W) store(row + r * to.width + i, narrow_bf16(load(wide + i)));
            }
        }
        if (tile.rows % 2) memset(row + tile.rows * to.width, 0, (size_t)to.width * 2);
        for (int r = 0; r < tile.rows; r += 2)
            interleave_rows(row + r * to.width, row + (r + 1) * to.width, to.width, to.by_row + r / 2 * to.width);
    }
}

// Weights and score gradients of a block of keys: as rows to be broadcast, and as pairs of rows to be loaded.
template <class T>
struct Scores {
    float *weight, *grad;          // [rows][BLOCK_KEYS]; at first the products they are computed from
    T *weight_pairs, *grad_pairs;  // [rows / 2][BLOCK_KEYS] of bf16 pairs, or `weight` and `grad`
    T *grad_row;                   // [rows][BLOCK_KEYS] of bf16, or `grad`
};

INLINE void accumulate_bias_grads(const Plan &plan, const RowTile &tile, int s, int r, int64_t first, Span span,
                                  float *grad_biases, const float *grad) {
    const Params &p = *plan.params;
    float *shared = grad_biases + tile.head[r] * plan.bias_width + 2;  // behind slopes and sinks
    if (p.dtable) {  // its first and last entry: accumulate_position_grads
        const int64_t distance = first + tile.distance_offset[s][r];
        float *table = shared + p.reach;
        const int n = (int)max<int64_t>(span.begin, min<int64_t>(span.end, 1 - p.reach - distance));
        const int end = (int)max<int64_t>(n, min<int64_t>(span.end, p.reach - distance));
        for (int i = n; i < end; i++) table[distance + i] += grad[i];
        shared += 2 * p.reach + 1;
    }
    for (int64_t i = 0; i < p.bias_count; i++) {
        const Dense &d = p.biases[i];
        if (!d.grad) continue;
        const int64_t *stride = d.grad_stride;
        float *to = shared;
        if (stride[3])
            to = d.grad + tile.batch * stride[0] + tile.group * stride[1] + tile.head[r] * stride[2] +
                 tile.query[r] * stride[3];
        else
            shared += d.columns;
        if (stride[4] == 0) {
            float total = 0;
            for (int n = span.begin; n < span.end; n++) total += grad[n];
            *to += total;
        } else {  // stride 1
            to += first + tile.logical_offset;
            for (int n = span.begin; n < span.end; n++) to[n] += grad[n];
        }
    }
}

// Products of a row to weights and score gradients, zero outside its span as far as `block_span`.
template <int DEGREE>
INLINE void softmax_backward_row(const Plan &plan, RowTile &tile, int s, int r, int64_t first, Span span,
                                 Span block_span, float *grad_biases, float *weight, float *grad,
                                 float *softcap_grad, float *dropout) {
    const Params &p = *plan.params;
    const int begin = span.begin / W * W, end = (span.end + W - 1) / W * W;
    row_scores(plan, tile, s, r, first, span, weight, softcap_grad);
    for (int n = begin; n < span.begin; n++) grad[n] = 0;
    for (int n = span.end; n < end; n++) grad[n] = 0;
    if (p.seed) fill_dropout(p, tile, r, first + begin, end - begin, dropout_scale(p), dropout);
    const vf m = broadcast(score_multiplier(p)), row_max = broadcast(tile.row_max[r]);
    const vf log2_sum = broadcast(tile.log2_sum[r]), delta = broadcast(tile.delta[r]);
    const bool by_distance = p.dslopes || p.dtable;
    // Both ends are the middle entry where reach is 0: each key counts in one of them.
    const vf lowest = broadcast((float)-p.reach), highest = broadcast((float)max<int64_t>(p.reach, 1));
    vf grad_sum{}, full_sum{}, grad_distance{}, weight_distance{}, grad_ends[2]{}, weight_ends[2]{};
    for (int n = begin; n < end; n += W) {
        const vf score = load(weight + n);
        const vi hidden = score == broadcast(-INF);
        // Hidden entries are zero even where the row's lse is NaN.
        const vf x = hidden ? vf{} : exp2<DEGREE>((score - row_max) * m - log2_sum);
        vf dx = load(grad + n);
        vf dropped = x;
        if (p.seed) {
            const vf k = load(dropout + n - begin);
            dropped = x * k;
            dx *= k;
        }
        dx = (dx - delta) * x;
        dx = hidden ? vf{} : dx;
        store(weight + n, dropped);
        store(grad + n, dx);
        if (by_distance) {
            const vf distance = distances(first + n + tile.distance_offset[s][r]);
            grad_sum += dx;
            full_sum += x;
            grad_distance += dx * abs(distance);
            weight_distance += x * abs(distance);
            if (p.dtable) {
                const vi low = distance <= lowest, high = distance >= highest;
                grad_ends[0] += low ? dx : vf{};
                grad_ends[1] += high ? dx : vf{};
                weight_ends[0] += low ? x : vf{};
                weight_ends[1] += high ? x : vf{};
            }
        }
    }
    if (by_distance) {
        tile.grad_sum[r] += reduce_add(grad_sum);
        tile.full_sum[r] += reduce_add(full_sum);
        tile.grad_distance[r] += reduce_add(grad_distance);
        tile.weight_distance[r] += reduce_add(weight_distance);
        for (int e = 0; p.dtable && e < 2; e++) {
            tile.grad_ends[e][r] += reduce_add(grad_ends[e]);
            tile.weight_ends[e][r] += reduce_add(weight_ends[e]);
        }
    }
    accumulate_bias_grads(plan, tile, s, r, first, span, grad_biases, grad);
    if (p.softcap != 0)
        for (int n = begin; n < end; n += W) {
            const vf dx = load(grad + n);
            store(grad + n, dx == vf{} ? vf{} : dx * load(softcap_grad + n));
        }
    for (int n = block_span.begin; n < begin; n += W) store(weight + n, vf{}), store(grad + n, vf{});
    for (int n = end; n < block_span.end; n += W) store(weight + n, vf{}), store(grad + n, vf{});
}

// Rows r and r + 1 as pairs of bf16.
INLINE void interleave_scores(int r, Span block_span, Scores<uint32_t> &to) {
    for (int n = block_span.begin; n < block_span.end; n += W) {
        const int64_t at = r * BLOCK_KEYS + n, below = at + BLOCK_KEYS;
        store(to.weight_pairs + r / 2 * BLOCK_KEYS + n, pairs_bf16(load(to.weight + at), load(to.weight + below)));
        store(to.grad_pairs + r / 2 * BLOCK_KEYS + n,
              pairs_bf16(load(to.grad + at), load(to.grad + below), (uint16_t *)to.grad_row + at,
                         (uint16_t *)to.grad_row + below));
    }
}

// NaN repair of `add_weighted_keys`: key by key, without the rows that do not see the key.
template <class T>
INLINE void add_weighted_keys_nan_repair(const Plan &plan, const RowTile &tile, int s, Span block_span,
                                         const T *weights, const PackedRows<T> &rows, int64_t dims, int64_t first,
                                         float *out) {
    for (int r = 0; r < tile.rows; r++)
        for (int n = block_span.begin; n < block_span.end; n++) {
            if (!is_visible(*plan.params, tile, s, r, first + n)) continue;
            const float weight = packed_element(weights, BLOCK_KEYS, r, n);
            for (int64_t v = 0; v < dims; v++)
                out[(first + n) * rows.width + v] +=
                    multiply_unless_nonfinite(weight, packed_element(rows.by_row, rows.width, r, v));
        }
}

// out[n] += Σ_r weights[r][n] · rows[r] for the keys of a block, r over the rows that see them.
template <class T>
INLINE void add_weighted_keys(const Plan &plan, const RowTile &tile, int s, Span block_span, const Span *rows_seeing,
                              const T *weights, const PackedRows<T> &rows, int64_t dims, int64_t first, float *out) {
    if (rows.nonfinite) return add_weighted_keys_nan_repair(plan, tile, s, block_span, weights, rows, dims, first, out);
    for (int n = block_span.begin; n < block_span.end; n += ROWS) {
        const int count = min(ROWS, block_span.end - n);
        const Span a = rows_seeing[n / W], b = rows_seeing[(n + count - 1) / W];
        const int begin = min(a.begin, b.begin) / PER_WORD<T>;
        const int end = (max(a.end, b.end) + PER_WORD<T> - 1) / PER_WORD<T>;
        if (begin >= end) continue;
        gemm<ADD>(count, end - begin, weights + begin * BLOCK_KEYS + n, 1, BLOCK_KEYS, rows.by_row + begin * rows.width,
             rows.width, out + (first + n) * rows.width, rows.width, rows.width / W);
    }
}

INLINE float sink_weight(const Params &p, const RowTile &tile, int r) {
    const float score = sink_score(p, head_index(p, tile, r)) - tile.row_max[r];
    return exp2<5>(broadcast(score * score_multiplier(p) - tile.log2_sum[r]))[0];
}

INLINE void accumulate_sink_grads(const Plan &plan, const RowTile &tile, float *grad_biases) {
    const Params &p = *plan.params;
    for (int r = 0; r < tile.rows; r++) {
        const float weight = sink_weight(p, tile, r);
        if (weight > 0) grad_biases[tile.head[r] * plan.bias_width + 1] -= weight * tile.delta[r];
    }
}

// The gradients of a row's scores sum to grad_lse, a sink's included, but for the rounding of `out` (and of the weights
// that it was computed with), which delta carries to every score in proportion to its weight. Times the distances, or
// summed over the many keys of a table's first or last entry, this can exceed the gradient, so it is taken out. Not in
// fp32, whose rounding is that of the sum; and not where weights do not sum to 1: there `out` and lse are those of more
// keys than these.
INLINE void accumulate_position_grads(const Plan &plan, const RowTile &tile, float *grad_biases) {
    const Params &p = *plan.params;
    const bool rounded = p.dtype != F32 || p.out_dtype != F32;
    for (int r = 0; r < tile.rows; r++) {
        float grad_sum = tile.grad_sum[r], full_sum = tile.full_sum[r];
        if (p.sinks) {
            const float weight = sink_weight(p, tile, r);
            grad_sum -= weight * tile.delta[r];
            full_sum += weight;
        }
        float excess = grad_sum - (p.grad_lse ? p.grad_lse[lse_row(p, tile, r)] : 0);
        if (!rounded || !(__builtin_fabsf(full_sum - 1) < 2e-5f)) excess = 0;
        float *sums = grad_biases + tile.head[r] * plan.bias_width;
        if (p.dslopes) sums[0] -= tile.grad_distance[r] - excess * tile.weight_distance[r];
        for (int64_t e = 0; p.dtable && e < 2; e++)
            sums[2 + e * 2 * p.reach] += tile.grad_ends[e][r] - excess * tile.weight_ends[e][r];
    }
}

// An lse of a larger size has lost digits of log Σ, so that the weights computed from it would not sum to 1 (e.g. a row
// that a bias of −1e9 hides wholly): row_max and log2_sum of such rows are computed once more from their scores.
constexpr float LARGE_LSE = 64;

template <class T>
__attribute__((noinline)) void refine_large_lse(const Plan &plan, RowTile &tile, const T *queries, const T *keys_by_dim,
                                                float *scores) {
    const Params &p = *plan.params;
    const float multiplier = score_multiplier(p);
    bool large[TILE_ROWS], any = false;
    for (int r = 0; r < tile.rows; r++) {
        large[r] = __builtin_fabsf(p.lse[lse_row(p, tile, r)]) > LARGE_LSE && tile.log2_sum[r] < INF;
        any |= large[r];
        if (!large[r]) continue;
        tile.row_max[r] = p.sinks ? sink_score(p, head_index(p, tile, r)) : -INF;
        tile.row_sum[r] = tile.weight_sum[r] = tile.row_max[r] > -INF ? 1 : 0;
    }
    if (!any) return;
    Span spans[TILE_ROWS / ROWS], seen[TILE_ROWS];
    BlockStats stats;
    each_block(plan, tile, [&](int s, int64_t first, int64_t last) {
        row_spans(tile, s, first, last, seen, spans);
        block_scores(tile, spans, queries, plan.key_width, p.K, keys_by_dim, first, last - first, scores);
        for (int r = 0; r < tile.rows; r++) {
            const Span span = seen[r];
            stats.max[r] = -INF;
            if (!large[r] || span.begin >= span.end) continue;
            float *score = scores + r * BLOCK_KEYS;
            row_scores(plan, tile, s, r, first, span, score, nullptr);
            const int begin = span.begin / SUM_KEYS * SUM_KEYS;
            const int end = (span.end + SUM_KEYS - 1) / SUM_KEYS * SUM_KEYS;
            block_softmax<float>(multiplier, begin, end, score, score, nullptr, nullptr, stats, r);
        }
        merge_block(tile, tile.rows, multiplier, stats);
    });
    for (int r = 0; r < tile.rows; r++) {
        if (!large[r]) continue;
        tile.log2_sum[r] = (float)__builtin_log2((double)tile.row_sum[r]);
        // The caller's lse may be that of more keys than these (a merged result): more than a rounding counts.
        const float lse = p.lse[lse_row(p, tile, r)], difference = lse - natural_lse(p, tile, r);
        if (__builtin_fabsf(difference) > 0x1p-22f * __builtin_fabsf(lse)) tile.log2_sum[r] += difference * LOG2E;
    }
}

template <class T>
INLINE void backward_tile(const Plan &plan, int64_t slot, RowTile &tile, float *grad_keys, float *grad_values,
                          float *grad_biases, Arena arena) {
    const Params &p = *plan.params;
    PackedRows<T> queries = reserve_rows<T>(arena, plan.rows, plan.key_width);
    PackedRows<T> grads = reserve_rows<T>(arena, plan.rows, plan.value_width);
    const int64_t score_count = (plan.rows + 1) * BLOCK_KEYS;
    Scores<T> scores;
    scores.weight = arena.reserve<float>(score_count);
    scores.grad = arena.reserve<float>(score_count);
    scores.weight_pairs = PER_WORD<T> == 1 ? (T *)scores.weight : arena.reserve<T>(score_count / 2 + BLOCK_KEYS);
    scores.grad_pairs = PER_WORD<T> == 1 ? (T *)scores.grad : arena.reserve<T>(score_count / 2 + BLOCK_KEYS);
    scores.grad_row = PER_WORD<T> == 1 ? (T *)scores.grad : arena.reserve<T>(score_count / 2 + BLOCK_KEYS);
    float *dq = arena.reserve<float>(plan.rows * plan.key_width);
    float *softcap_grad = arena.reserve<float>(BLOCK_KEYS), *dropout = arena.reserve<float>(BLOCK_KEYS);
    Span spans[TILE_ROWS / ROWS], seen[TILE_ROWS], rows_seeing[BLOCK_KEYS / W];

    const char *query_rows[TILE_ROWS], *grad_rows[TILE_ROWS];
    for (int r = 0; r < tile.rows; r++) {
        query_rows[r] = query_row(p, tile, r);
        grad_rows[r] = grad_row(p, tile, r);
        if (r + PREFETCH_ROWS < tile.rows) {
            prefetch_row(query_row(p, tile, r + PREFETCH_ROWS), p.K * dtype_size(p.dtype));
            prefetch_row(grad_row(p, tile, r + PREFETCH_ROWS), p.V * dtype_size(p.out_dtype));
            prefetch_row(p.out + out_row(p, tile, r + PREFETCH_ROWS) * p.V * dtype_size(p.out_dtype),
                         p.V * dtype_size(p.out_dtype));
        }
        const int64_t at = lse_row(p, tile, r);
        // lse as a score, and what its rounding leaves over.
        const float lse = p.lse[at], natural = natural_multiplier(p);
        tile.row_max[r] = lse == -INF ? 0 : lse / natural;
        tile.log2_sum[r] = lse == -INF ? INF : (float)((lse - (double)tile.row_max[r] * natural) * LOG2E);
        alignas(64) float out[MAX_HEAD_DIM], grad[MAX_HEAD_DIM];
        widen(p.out_dtype, p.out + out_row(p, tile, r) * p.V * dtype_size(p.out_dtype), 1, p.V, out);
        widen(p.out_dtype, grad_rows[r], p.grad_out_stride[4], p.V, grad);
        vf products{};
        int64_t v = 0;
        for (; v + W <= p.V; v += W) products = multiply_add(products, load(out + v), load(grad + v));
        float delta = reduce_add(products) - (p.grad_lse ? p.grad_lse[at] : 0);
        for (; v < p.V; v++) delta += out[v] * grad[v];
        tile.delta[r] = delta;
        tile.grad_sum[r] = tile.full_sum[r] = tile.grad_distance[r] = tile.weight_distance[r] = 0;
        for (int e = 0; e < 2; e++) tile.grad_ends[e][r] = tile.weight_ends[e][r] = 0;
    }
    load_rows(queries, tile, p.dtype, query_rows, p.q_stride[4], p.K);
    load_rows(grads, tile, p.out_dtype, grad_rows, p.grad_out_stride[4], p.V);
    memset(dq, 0, (size_t)(tile.rows * plan.key_width * 4));

    const T *keys_by_dim = (const T *)(plan.keys_by_dim + slot * plan.keys_by_dim_stride);
    const T *values_by_dim = (const T *)(plan.values_by_dim + slot * plan.values_by_dim_stride);
    const T *key_rows = (const T *)(plan.key_rows + slot * plan.key_rows_stride);
    const bool nonfinite = plan.nonfinite_keys[slot * plan.segment_count + tile.segment].load(std::memory_order_relaxed);
    refine_large_lse(plan, tile, queries.row, keys_by_dim, scores.weight);
    if (p.dsinks) accumulate_sink_grads(plan, tile, grad_biases);
    each_block(plan, tile, [&](int s, int64_t first, int64_t last) {
        Span block_span{BLOCK_KEYS, 0};
        row_spans(tile, s, first, last, seen, spans);
        for (int r0 = 0, i = 0; r0 < tile.rows; r0 += ROWS, i++) {
            if (spans[i].begin >= spans[i].end) continue;
            block_span = Span{min(block_span.begin, spans[i].begin), max(block_span.end, spans[i].end)};
        }
        if (block_span.begin >= block_span.end) return;
        block_scores(tile, spans, queries.row, plan.key_width, p.K, keys_by_dim, first, last - first,
                     scores.weight);
        block_scores(tile, spans, grads.row, plan.value_width, p.V, values_by_dim, first, last - first,
                     scores.grad);
        for (int n = block_span.begin / W; n < block_span.end / W; n++) rows_seeing[n] = Span{TILE_ROWS, 0};
        for (int r = 0; r < tile.rows; r++) {
            const Span span = seen[r];
            float *weight = scores.weight + r * BLOCK_KEYS, *grad = scores.grad + r * BLOCK_KEYS;
            if (span.begin < span.end) {
                softmax_backward_row<PER_WORD<T> == 1 ? 5 : 4>(plan, tile, s, r, first, span, block_span,
                                                               grad_biases, weight, grad, softcap_grad, dropout);
                for (int n = span.begin / W; n < (span.end + W - 1) / W; n++)
                    rows_seeing[n] = Span{min(rows_seeing[n].begin, r), r + 1};
            } else {
                for (int n = block_span.begin; n < block_span.end; n += W)
                    store(weight + n, vf{}), store(grad + n, vf{});
            }
            if constexpr (PER_WORD<T> == 2) {
                const bool lone = r + 1 == tile.rows && r % 2 == 0;
                if (lone)  // an odd number of rows: the last pair has one
                    for (int n = block_span.begin; n < block_span.end; n += W)
                        store(weight + BLOCK_KEYS + n, vf{}), store(grad + BLOCK_KEYS + n, vf{});
                if (r % 2 || lone) interleave_scores(r / 2 * 2, block_span, scores);
            }
        }
        if (p.dq)
            add_weighted_rows<ADD>(plan, tile, s, spans, scores.grad_row, key_rows, plan.key_width, p.K, first, last, dq,
                              nonfinite);
        if (p.dk)
            add_weighted_keys(plan, tile, s, block_span, rows_seeing, scores.grad_pairs, queries, p.K, first,
                              grad_keys);
        if (p.dv)
            add_weighted_keys(plan, tile, s, block_span, rows_seeing, scores.weight_pairs, grads, p.V, first,
                              grad_values);
    });
    if (p.dslopes || p.dtable) accumulate_position_grads(plan, tile, grad_biases);
    if (p.dq)
        for (int r = 0; r < tile.rows; r++)
            narrow(p.dtype, dq + r * plan.key_width, p.K, (float)p.scale,
                   p.dq + out_row(p, tile, r) * p.K * dtype_size(p.dtype));
}

// Writes the sums of key or value gradients to dk or dv.
INLINE void write_grad_rows(const Plan &plan, int64_t b, int64_t g, const float *from, int64_t width,
                            int64_t dims, float scale, char *to) {
    const Params &p = *plan.params;
    const int64_t row_stride = p.G * dims;
    const int64_t *segments = plan.first_segment + (p.RB == 1 ? 0 : b);
    const auto offset = [&](int64_t row) { return ((b * p.N + row) * row_stride) + g * dims; };
    int64_t unseen = p.sequence ? 0 : p.N;
    for (int64_t s = segments[0]; s < segments[1]; s++) unseen -= plan.segments[s].length;
    for (int64_t row = 0; unseen > 0 && row < p.N; row++)
        memset(to + offset(row) * dtype_size(p.dtype), 0, (size_t)(dims * dtype_size(p.dtype)));
    for (int64_t s = segments[0]; s < segments[1]; s++) {
        const Segment &segment = plan.segments[s];
        for (int64_t n = 0; n < segment.length; n++) {
            const float *total = from + (segment.offset + n) * width;
            const int64_t row = clamped_key(p, segment.sequence, segment.begin + n);
            if (p.sequence) {  // pages may be shared: add to fp32 sums, which start as zeros
                float *shared = (float *)to + offset(row);
                for (int64_t v = 0; v < dims; v++) shared[v] += total[v] * scale;
            } else {
                narrow(p.dtype, total, dims, scale, to + offset(row) * dtype_size(p.dtype));
            }
        }
    }
}

void write_key_grads(const Plan &plan, int64_t b, int64_t g, const float *grad_keys, const float *grad_values) {
    const Params &p = *plan.params;
    if (p.dk) write_grad_rows(plan, b, g, grad_keys, plan.key_width, p.K, (float)p.scale, p.dk);
    if (p.dv) write_grad_rows(plan, b, g, grad_values, plan.value_width, p.V, 1, p.dv);
}

template <class T>
void backward(const Plan &plan, int64_t slot, int64_t b, int64_t g, const Chunk &chunk, float *grad_keys,
              float *grad_values, float *grad_biases, char *scratch) {
    Arena arena{scratch};
    RowTile &tile = *arena.reserve<RowTile>(1);
    for (int64_t t = chunk.first_tile; t < chunk.last_tile; t++) {
        load_tile(plan, b, g, plan.tiles[t], tile);
        backward_tile<T>(plan, slot, tile, grad_keys, grad_values, grad_biases, arena);
    }
}

}  // namespace
}  // namespace KEYSPAN_NAMESPACE
}  // namespace keyspan
