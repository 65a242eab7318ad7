// Forward over packed keys, and the online softmax that decoding shares. Knows nothing of threads or of gradients.
#pragma once
#include "product.h"
#include "rows.h"

namespace keyspan {
namespace KEYSPAN_NAMESPACE {
namespace {

// Hands out aligned parts of a thread's scratch memory.
struct Arena {
    char *next;
    template <class X>
    X *take(int64_t count) {
        X *here = (X *)next;
        const int64_t bytes = count * (int64_t)sizeof(X);
        KEYSPAN_GUARD(here, bytes);
        next += (bytes + 63) / 64 * 64 + GUARD;
        return here;
    }
};

INLINE void start_rows(const Params &p, Tile &tile, float *out, int64_t width) {
    for (int r = 0; r < tile.rows; r++) {
        tile.peak[r] = -INF;
        tile.total[r] = 0;
        if (p.sinks) {
            // A sink is a key with this score and a value of zero.
            tile.peak[r] = p.sinks[head_index(p, tile, r)] * LOG2E;
            tile.total[r] = tile.peak[r] > -INF ? 1 : 0;
        }
    }
    memset(out, 0, (size_t)(tile.rows * width * 4));
}

constexpr float SLACK = 8;  // powers of two by which a score may exceed the peak that sums are relative to

// Scores [begin, end) of a row, whole vectors, to weights, in place or as bf16; running peak and total move on, and `out`
// is scaled to the new peak. `keep`, where given, is what dropout multiplies the weights by.
template <class T>
INLINE void soften(const Plan &plan, Tile &tile, int r, float multiplier, int begin, int end, const float *score,
                   T *weight, float *out, const float *keep) {
    vf tops = load(score + begin);
    for (int n = begin + W; n < end; n += W) tops = largest(tops, load(score + n));
    const float top = highest(tops) * multiplier;
    // What has been summed is scaled anew only where weights would grow by much: all are relative to the same number.
    const float peak = top > tile.peak[r] + SLACK ? top : tile.peak[r];
    // Finite for rows that have seen nothing yet, so that no −inf − −inf arises.
    const float pivot = peak == -INF ? 0 : peak;
    if (peak != tile.peak[r]) {
        const float shrink = exp2<5>(all(tile.peak[r] - pivot))[0];
        tile.total[r] *= shrink;
        for (int64_t v = 0; v < plan.value_width; v += W) store(out + v, load(out + v) * shrink);
        tile.peak[r] = peak;
    }
    vf totals{};
    const vf m = all(multiplier), minus = all(-pivot);
    constexpr int DEGREE = PER_WORD<T> == 1 ? 5 : 4;
    for (int n = begin; n < end; n += W) {
        vf x = exp2<DEGREE>(load(score + n) * m + minus);
        totals += x;
        if (keep) x *= load(keep + n - begin);
        if constexpr (PER_WORD<T> == 1)
            store(weight + n, x);
        else
            store((uint16_t *)weight + n, narrow_bf16(x));
    }
    tile.total[r] += sum(totals);
}

// Products of a row to weights as `soften` does; they are written over the whole vectors of `group`, zero where the row
// does not see.
template <class T>
INLINE void soften_row(const Plan &plan, Tile &tile, int s, int r, int64_t first, Span span, Span group, float *score,
                       T *weight, float *out, float *keep) {
    const Params &p = *plan.params;
    const int begin = span.begin / W * W, end = (span.end + W - 1) / W * W;
    const float multiplier = row_scores(plan, tile, s, r, first, span, score, nullptr);
    if (p.seed) fill_keep(p, tile, r, first + begin, end - begin, keep);
    soften(plan, tile, r, multiplier, begin, end, score, weight, out, p.seed ? keep : nullptr);
    for (int n = group.begin; n < begin; n += W) memset((char *)weight + n * 4 / PER_WORD<T>, 0, W * 4 / PER_WORD<T>);
    for (int n = end; n < group.end; n += W) memset((char *)weight + n * 4 / PER_WORD<T>, 0, W * 4 / PER_WORD<T>);
}

template <class T>
INLINE void blank_row(Span group, T *weight) {
    if (group.begin < group.end)
        memset((char *)weight + group.begin * 4 / PER_WORD<T>, 0, (size_t)(group.end - group.begin) * 4 / PER_WORD<T>);
}

INLINE void write_row(const Params &p, const Tile &tile, int r, const float *out) {
    const bool empty = tile.total[r] == 0;
    narrow(p.out_dtype, out, p.V, empty ? 0 : 1 / tile.total[r],
           p.out + out_row(p, tile, r) * p.V * size_of(p.out_dtype));
    if (p.lse)
        p.lse[lse_row(p, tile, r)] =
            empty ? -INF : tile.peak[r] * LN2 + (float)__builtin_log((double)tile.total[r]);
}

template <class T>
INLINE void load_queries(const Plan &plan, const Tile &tile, T *queries) {
    const Params &p = *plan.params;
    for (int r = 0; r < tile.rows; r++) {
        if (r + ROWS_AHEAD < tile.rows) fetch(query_row(p, tile, r + ROWS_AHEAD), p.K * size_of(p.dtype));
        if constexpr (PER_WORD<T> == 1)
            pack_row(p.dtype, query_row(p, tile, r), p.q_stride[4], p.K, plan.key_width,
                     queries + r * plan.key_width);
        else
            pack_row(p.dtype, query_row(p, tile, r), p.q_stride[4], p.K, plan.key_width,
                     (uint16_t *)queries + r * plan.key_width);
    }
}

// scores[r, n] of a block for the rows and keys of each group of rows, by panels, so that a panel stays in cache.
template <class T>
INLINE void block_scores(const Tile &tile, const Span *spans, const T *rows, int64_t width,
                         int64_t dims, const T *by_dim, int64_t first, int64_t keys, float *scores) {
    for (int64_t n = 0; n < keys; n += PANEL) {
        const T *panel = by_dim + (first + n) * words<T>(dims);
        for (int r0 = 0, i = 0; r0 < tile.rows; r0 += ROWS, i++) {
            const int64_t begin = most<int64_t>(spans[i].begin, n), end = least<int64_t>(spans[i].end, n + PANEL);
            if (begin >= end) continue;
            product(least(ROWS, tile.rows - r0), words<T>(dims), rows + r0 * (width / PER_WORD<T>),
                    width / PER_WORD<T>, 1, panel + begin - n, PANEL, scores + r0 * BLOCK_KEYS + begin, BLOCK_KEYS,
                    (end - begin) / W, false);
        }
    }
}

// out[r] += Σ weight[r, n] · row[n], n over the keys of each group of rows.
template <class T>
INLINE void add_weighted_rows(const Plan &plan, const Tile &tile, int s, const Span *spans, const T *weights,
                              const T *by_row, int64_t width, int64_t dims, int64_t first, int64_t last, float *out,
                              bool odd) {
    constexpr int64_t row = BLOCK_KEYS / PER_WORD<T>;
    if (odd) {
        for (int r = 0; r < tile.rows; r++) {
            const Span span = row_span(tile, s, r, first, last);
            for (int n = span.begin; n < span.end; n++) {
                if (!sees(*plan.params, tile, s, r, first + n)) continue;
                const float weight = weight_element(weights + r * row, n);
                for (int64_t v = 0; v < dims; v++)
                    out[r * width + v] += careful(weight, packed_element(by_row, width, first + n, v));
            }
        }
        return;
    }
    for (int r0 = 0, i = 0; r0 < tile.rows; r0 += ROWS, i++) {
        const Span span = spans[i];
        if (span.begin >= span.end) continue;
        product(least(ROWS, tile.rows - r0), (span.end - span.begin) / PER_WORD<T>,
                weights + r0 * row + span.begin / PER_WORD<T>, row, 1, by_row + (first + span.begin) / PER_WORD<T> * width,
                width, out + r0 * width, width, width / W, true);
    }
}

template <class T>
void forward(const Plan &plan, int64_t slot, int64_t b, int64_t g, int64_t head_tile, int64_t query_tile,
             char *scratch) {
    const Params &p = *plan.params;
    Arena arena{scratch};
    Tile &tile = *arena.take<Tile>(1);
    load_tile(plan, b, g, head_tile, query_tile, tile);
    T *queries = arena.take<T>(plan.rows * plan.key_width);
    float *scores = arena.take<float>(plan.rows * BLOCK_KEYS);
    // As pairs the weights are shorter than the scores and get a place of their own.
    T *weights = PER_WORD<T> == 1 ? (T *)scores : arena.take<T>(plan.rows * BLOCK_KEYS / PER_WORD<T>);
    float *out = arena.take<float>(plan.rows * plan.value_width);
    float *keep = arena.take<float>(BLOCK_KEYS);
    Span spans[TILE_ROWS / ROWS];

    load_queries(plan, tile, queries);
    start_rows(p, tile, out, plan.value_width);
    const T *by_dim = (const T *)(plan.keys_by_dim + slot * plan.keys_by_dim_stride);
    const T *by_row = (const T *)(plan.value_rows + slot * plan.value_rows_stride);
    const bool odd = plan.odd_values[slot].load(std::memory_order_relaxed);
    for (int s = 0; s < p.S; s++) {
        int64_t begin, end;
        tile_span(tile, s, begin, end);
        for (int64_t first = begin / PANEL * PANEL; first < end; first += plan.block_keys) {
            const int64_t last = least(first + plan.block_keys, end);
            for (int r0 = 0, i = 0; r0 < tile.rows; r0 += ROWS, i++)
                spans[i] = rows_span(tile, s, r0, least(r0 + ROWS, tile.rows), first, last);
            block_scores(tile, spans, queries, plan.key_width, p.K, by_dim, first, last - first, scores);
            for (int r = 0; r < tile.rows; r++) {
                const Span span = row_span(tile, s, r, first, last);
                T *weight = weights + r * BLOCK_KEYS / PER_WORD<T>;
                if (span.begin < span.end)
                    soften_row(plan, tile, s, r, first, span, spans[r / ROWS], scores + r * BLOCK_KEYS, weight,
                               out + r * plan.value_width, keep);
                else
                    blank_row(spans[r / ROWS], weight);
            }
            add_weighted_rows(plan, tile, s, spans, weights, by_row, plan.value_width, p.V, first, last, out, odd);
        }
    }
    for (int r = 0; r < tile.rows; r++) write_row(p, tile, r, out + r * plan.value_width);
}

}  // namespace
}  // namespace KEYSPAN_NAMESPACE
}  // namespace keyspan
