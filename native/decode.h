// Decoding: few queries against many keys. Keys and values are read once, from where they lie, at the rate of memory.
//
// A unit of work is a run of blocks of keys for all heads of some queries. A block takes three passes: scores, weights,
// sums of values. Each makes the same bits as the tile kernel (forward.h): a score is a sum over dimensions in their
// order, for which keys are transposed in the cache; a sum of values goes key by key.
#pragma once
#include "forward.h"

namespace keyspan {
namespace KEYSPAN_NAMESPACE {
namespace {

constexpr int VALUE_ROWS = W == 16 ? 6 : 4;  // query rows that each loaded value is multiplied by
constexpr int VALUE_KEYS = 16;  // most values that are added before sums go back to memory
// Keys of several groups that lie side by side and have so many bytes are read few at a time, each a stream of its own
// that is prefetched by itself; of others the next keys are prefetched.
constexpr int64_t WIDE_BYTES = 2048, PREFETCH_BYTES = 512;
constexpr int WIDE_VALUE_KEYS = 4;
static_assert(2 * VALUE_KEYS <= DECODE_PANEL, "addresses of values are known so far ahead");
static_assert(DECODE_PANEL % W == 0 && BLOCK_KEYS % DECODE_PANEL == 0 && BLOCK_KEYS % VALUE_KEYS == 0, "whole panels");

// How a row of keys or values is loaded: fp32, fp16, bf16 element by element, or bf16 in pairs.
template <int KIND>
struct Row {
    static constexpr int STEP = W, BYTES = KIND == F32 ? 4 : 2;
    typedef float Word;
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
constexpr int PAIRS = 3;
template <>
struct Row<PAIRS> {
    static constexpr int STEP = 2 * W, BYTES = 2;
    typedef uint32_t Word;
    static INLINE vu read(const char *p, int64_t i) { return load_pairs((const uint16_t *)p + i); }
    static INLINE vu read_last(const char *p, int64_t i, int64_t count) {
        return load_first_pairs((const uint16_t *)p + i, count);
    }
};

// Into the second level of cache: the first has too few miss buffers.
INLINE void prefetch(const char *p) { __builtin_prefetch(p, 0, 2); }

// Rows of keys from `offset` on, and what is prefetched meanwhile: other rows, or the same ones farther on.
struct KeyRows {
    const char *const *rows, *const *next;
    int64_t offset, next_offset;
};

// panel[word][key] for the words of KEYS keys.
template <int KIND, int KEYS>
INLINE void transpose_keys(const KeyRows &from, int64_t dims, uint32_t *panel) {
    typedef Row<KIND> Kind;
    for (int n = 0; n < KEYS; n += W) {
        int64_t i = 0;
        for (; i + Kind::STEP <= dims; i += Kind::STEP) {
            vu words[W];
#pragma GCC unroll 16
            for (int k = 0; k < W; k++) {
                words[k] = (vu)Kind::read(from.rows[n + k] + from.offset, i);
                prefetch(from.next[n + k] + from.next_offset + i * Kind::BYTES);
            }
            store_transposed(words, panel + i / Kind::STEP * W * KEYS + n, KEYS);
        }
        if (i < dims) {
            vu words[W];
#pragma GCC unroll 16
            for (int k = 0; k < W; k++) words[k] = (vu)Kind::read_last(from.rows[n + k] + from.offset, i, dims - i);
            store_transposed(words, panel + i / Kind::STEP * W * KEYS + n, KEYS);
        }
    }
}

// out[r] += Σ weight · value over `keys` keys, one after the other, for C vectors of columns. weights [R][BLOCK_KEYS],
// values [3 · keys], of which the last third is prefetched.
template <int R, int C, int KIND>
INLINE void accumulate_columns(const float *weights, const char *const *values, int keys, int64_t offset,
                               int64_t column, int64_t count, float *out, int64_t width) {
    vf acc[R][C];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) acc[r][c] = load(out + r * width + column + c * W);
    for (int n = 0; n < keys; n++) {
        const char *at = values[n] + offset;
        vf value[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) {
            value[c] = C > 1 || count >= W ? Row<KIND>::read(at, column + c * W) : Row<KIND>::read_last(at, column, count);
            prefetch(values[n + 2 * keys] + offset + (column + c * W) * Row<KIND>::BYTES);
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            const vf weight = broadcast(weights[r * BLOCK_KEYS + n]);
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) acc[r][c] = multiply_add(acc[r][c], weight, value[c]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) store(out + r * width + column + c * W, acc[r][c]);
}

#if defined(KEYSPAN_AVX512BF16)
// The same for C · 2 W columns of bf16 values. Two keys' rows are interleaved, which leaves the columns of `out` in
// another order until `unpermute_columns`. weights [R][BLOCK_KEYS / 2] bf16 pairs.
template <int R, int C>
INLINE void accumulate_pairs(const uint32_t *weights, const char *const *values, int keys, int64_t offset,
                             int64_t column, int64_t count, float *out, int64_t width) {
    vf acc[R][2 * C];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 2 * C; c++) acc[r][c] = load(out + r * width + column + c * W);
    for (int n = 0; n < keys; n += 2) {
        vu pair[2 * C];
#pragma GCC unroll 2
        for (int c = 0; c < C; c++) {
            const int64_t at = offset + (column + c * 2 * W) * 2;
            const uint16_t *a = (const uint16_t *)(values[n] + at), *b = (const uint16_t *)(values[n + 1] + at);
            const bool whole = C > 1 || count >= 2 * W;
            const __m512i x = (__m512i)(whole ? load_pairs(a) : load_first_pairs(a, count));
            const __m512i y = (__m512i)(whole ? load_pairs(b) : load_first_pairs(b, count));
            prefetch(values[n + 2 * keys] + at);
            prefetch(values[n + 1 + 2 * keys] + at);
            pair[2 * c] = (vu)_mm512_unpacklo_epi16(x, y);
            pair[2 * c + 1] = (vu)_mm512_unpackhi_epi16(x, y);
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            const vu both = broadcast(weights[r * (BLOCK_KEYS / 2) + n / 2]);
#pragma GCC unroll 4
            for (int c = 0; c < 2 * C; c++) acc[r][c] = multiply_add(acc[r][c], both, pair[c]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 2 * C; c++) store(out + r * width + column + c * W, acc[r][c]);
}
#endif

// Restores the order of the columns of a row that `accumulate_pairs` has summed.
INLINE void unpermute_columns(float *out, int64_t width) {
#if KEYSPAN_VECTOR == 64
    const __m512i front = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i back = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int64_t v = 0; v < width; v += 2 * W) {
        const __m512 low = (__m512)load(out + v), high = (__m512)load(out + v + W);
        store(out + v, (vf)_mm512_permutex2var_ps(low, front, high));
        store(out + v + W, (vf)_mm512_permutex2var_ps(low, back, high));
    }
#endif
}

template <int R, int KIND>
INLINE void accumulate_values(int64_t dims, const typename Row<KIND>::Word *weights, const char *const *values, int keys,
                              int64_t offset, float *out, int64_t width) {
    int64_t v = 0;
#if defined(KEYSPAN_AVX512BF16)
    if constexpr (KIND == PAIRS) {
        for (; v + 4 * W <= dims; v += 4 * W)
            accumulate_pairs<R, 2>(weights, values, keys, offset, v, 4 * W, out, width);
        for (; v < dims; v += 2 * W)
            accumulate_pairs<R, 1>(weights, values, keys, offset, v, dims - v, out, width);
        return;
    }
#endif
    if constexpr (KIND != PAIRS) {
        for (; v + COLUMNS * W <= dims; v += COLUMNS * W)
            accumulate_columns<R, COLUMNS, KIND>(weights, values, keys, offset, v, COLUMNS * W, out, width);
        for (; v < dims; v += W)
            accumulate_columns<R, 1, KIND>(weights, values, keys, offset, v, dims - v, out, width);
    }
}

template <int KIND>
__attribute__((noinline)) void accumulate_rows(int rows, int64_t dims, const typename Row<KIND>::Word *weights,
                                               const char *const *values, int keys, int64_t offset,
                                               float *out, int64_t width) {
#define KEYSPAN_ACCUMULATE(R) accumulate_values<R, KIND>(dims, weights, values, keys, offset, out, width)
    switch (rows) {
    case 1: return KEYSPAN_ACCUMULATE(1);
    case 2: return KEYSPAN_ACCUMULATE(2);
    case 3: return KEYSPAN_ACCUMULATE(3);
    case 4: return KEYSPAN_ACCUMULATE(4);
    case 5: return KEYSPAN_ACCUMULATE((VALUE_ROWS < 5 ? VALUE_ROWS : 5));
    default: return KEYSPAN_ACCUMULATE(VALUE_ROWS);
    }
#undef KEYSPAN_ACCUMULATE
}

template <int KIND>
struct Decoder {
    typedef typename Row<KIND>::Word Word;
    const Plan &plan;
    const Params &p;
    const Run &run;
    const int64_t size, partial_size;
    int64_t sequence, query_width;
    int64_t together;  // groups that lie side by side in memory are read together, others one after the other
    int rows, panel_keys, value_keys;
    RowTile *tiles;  // [G]
    Word *queries, *weights;
    uint32_t *panel;
    float *out, *sums, *scores, *dropout;
    const char **keys, **values;  // [BLOCK_KEYS + DECODE_PANEL], of the first group
    BlockStats *stats;  // [G]
    char *restored = nullptr;  // keys and values of a block that are stored in 8 bits, [BLOCK_KEYS][G][K], [BLOCK_KEYS][G][V]

    Decoder(const Plan &plan, const Run &run, char *scratch)
        : plan(plan), p(*plan.params), run(run), size(dtype_size(p.dtype)),
          partial_size(p.G * plan.rows * (plan.value_width + 3)) {
        const Tile &of = plan.tiles[run.tile];
        query_width = plan.key_width / PER_WORD<Word>;
        Arena arena{scratch};
        tiles = arena.reserve<RowTile>(p.G);
        queries = arena.reserve<Word>(p.G * plan.rows * query_width);
        out = arena.reserve<float>(p.G * plan.rows * plan.value_width);
        sums = arena.reserve<float>(p.G * plan.rows * plan.value_width);
        scores = arena.reserve<float>(p.G * plan.rows * BLOCK_KEYS);
        // bf16 weights are shorter than the scores and get memory of their own.
        weights = PER_WORD<Word> == 1 ? (Word *)scores : arena.reserve<Word>(p.G * plan.rows * BLOCK_KEYS / 2);
        panel = arena.reserve<uint32_t>(DECODE_PANEL * round_to_words(p.K));
        dropout = arena.reserve<float>(BLOCK_KEYS);
        keys = arena.reserve<const char *>(BLOCK_KEYS + DECODE_PANEL);
        values = arena.reserve<const char *>(BLOCK_KEYS + DECODE_PANEL);
        stats = arena.reserve<BlockStats>(p.G);
        if (p.stored) restored = arena.reserve<char>(BLOCK_KEYS * p.G * (p.K + p.V) * size);
        for (int64_t g = 0; g < p.G; g++) {
            load_tile(plan, run.batch, g, of, tiles[g]);
            load_queries(plan, tiles[g], queries + g * plan.rows * query_width);
            init_softmax(p, tiles[g], row_of(out, g), plan.value_width);
        }
        rows = tiles[0].rows;
        sequence = plan.segments[of.segment].sequence;
        together = p.k_stride[1] > p.k_stride[2] ? p.G : 1;
        const bool wide = together > 1 && together * p.K * size >= WIDE_BYTES;
        panel_keys = wide ? DECODE_PANEL / 2 : DECODE_PANEL;
        value_keys = wide ? WIDE_VALUE_KEYS : VALUE_KEYS;
    }

    static int64_t round_to_words(int64_t dims) {
        return (dims + Row<KIND>::STEP - 1) / Row<KIND>::STEP * W;
    }

    float *row_of(float *x, int64_t g) const { return x + g * plan.rows * plan.value_width; }

    // Addresses of keys begin to end - 1 of the block at `first`; those behind, to prefetch and for the rest of a panel,
    // as far as there are keys.
    void find(int64_t first, int begin, int end) const {
        const int behind = p.stored ? 0 : DECODE_PANEL;
        const int most = (int)min<int64_t>((end + DECODE_PANEL - 1) / DECODE_PANEL * DECODE_PANEL + behind,
                                           plan.logical_keys - first);
        const char *const k = p.k + run.batch * p.k_stride[0] * size, *const v = p.v + run.batch * p.v_stride[0] * size;
        const int64_t k_step = p.k_stride[1] * size, v_step = p.v_stride[1] * size;
        for (int n = begin; n < most;) {
            const int64_t row = physical_key(p, sequence, first + n);  // one by one behind it, as far as the page goes
            const int64_t left = p.sequence ? p.page_size - (first + n) % p.page_size : most;
            for (int64_t i = row; n < most && i < row + left; i++, n++) {
                const int64_t there = clamp(i, 0, p.N - 1);
                keys[n] = k + there * k_step;
                values[n] = v + there * v_step;
                if (p.stored) restore(n, there);
            }
        }
        for (int n = most; n < (end + DECODE_PANEL - 1) / DECODE_PANEL * DECODE_PANEL + DECODE_PANEL; n++) {
            keys[n] = keys[most - 1];
            values[n] = values[most - 1];
        }
    }

    // Key `row` in memory, stored in 8 bits, is the block's key n.
    void restore(int n, int64_t row) const {
        char *const key = restored + n * p.G * p.K * size;
        char *const value = restored + (BLOCK_KEYS * p.K + n * p.V) * p.G * size;
        for (int64_t g = 0; g < p.G; g++) {
            restore_key(p, run.batch, row, g, key + g * p.K * size);
            restore_value(p, run.batch, row, g, value + g * p.V * size);
        }
        keys[n] = key;
        values[n] = value;
    }

    // Sums over the keys of `span`, an even number of them, of groups g0 to g1 - 1.
    void add_values(Span span, int64_t g0, int64_t g1) const {
        for (int64_t g = g0; g < g1; g++) memset(row_of(sums, g), 0, (size_t)(rows * plan.value_width * 4));
        for (int n = span.begin; n < span.end; n += value_keys)
            for (int64_t g = g0; g < g1; g++) {
                for (int r = 0; r < rows; r += VALUE_ROWS)
                    accumulate_rows<KIND>(min(VALUE_ROWS, rows - r), p.V, weights_of(g, r, n), values + n,
                                          min(value_keys, span.end - n), g * p.v_stride[2] * size,
                                          row_of(sums, g) + r * plan.value_width, plan.value_width);
            }
    }

    Word *weights_of(int64_t g, int r, int n) const {
        return weights + ((g * plan.rows + r) * BLOCK_KEYS + n) / PER_WORD<Word>;
    }

    // The sums of group g once more, where a value is infinite or NaN: without it, and then with what a row sees of it.
    __attribute__((noinline)) void repair(int s, int64_t g, int64_t first, int64_t last, Span span) const {
        alignas(64) char clean[VALUE_KEYS][MAX_HEAD_DIM * 4];
        const char *at[3 * VALUE_KEYS];
        float *const to = row_of(sums, g);
        memset(to, 0, (size_t)(rows * plan.value_width * 4));
        const int64_t offset = g * p.v_stride[2] * size;
        for (int i = 0; i < 3 * VALUE_KEYS; i++) at[i] = clean[i % VALUE_KEYS];
        for (int n = span.begin; n < span.end; n += VALUE_KEYS) {
            const int count = min(VALUE_KEYS, span.end - n);
            for (int i = 0; i < count; i++)
                for (int64_t v = 0; v < p.V; v++) {
                    const char *from = values[n + i] + offset + v * size;
                    const float x = load_element(p.dtype, from, 0);
                    memset(clean[i] + v * size, 0, (size_t)size);
                    if (x - x == 0) memcpy(clean[i] + v * size, from, (size_t)size);
                }
            for (int r = 0; r < rows; r += VALUE_ROWS)
                accumulate_rows<KIND>(min(VALUE_ROWS, rows - r), p.V, weights_of(g, r, n), at, count, 0,
                                      to + r * plan.value_width, plan.value_width);
        }
        for (int r = 0; r < rows; r++) {
            const Span seen = row_span(tiles[g], s, r, first, last);
            for (int n = seen.begin; n < seen.end; n++) {
                if (!is_visible(p, tiles[g], s, r, first + n)) continue;
                for (int64_t v = 0; v < p.V; v++) {
                    const float x = load_element(p.dtype, values[n] + offset, v);
                    if (!(x - x == 0)) to[r * plan.value_width + permuted(v)] += x;
                }
            }
        }
    }

    // Where `accumulate_pairs` sums column v.
    static int64_t permuted(int64_t v) {
        if (KIND != PAIRS) return v;
        const int64_t i = v % (2 * W);
        return v - i + i / 8 * 4 + i % 4 + (i % 8 / 4) * W;
    }

    // Whether a sum of group g is infinite or NaN.
    bool has_nonfinite_sums(int64_t g) const {
        const float *const x = row_of(sums, g);
        vf differences{};
        for (int64_t i = 0; i < rows * plan.value_width; i += W) differences += load(x + i) - load(x + i);
        const float total = reduce_add(differences);
        return !(total == 0);
    }

    // One block of groups g0 to g1 - 1 and range s: `stats` and `sums`. Whether a row sees one of its keys.
    bool block(int s, int64_t first, int64_t last, int64_t g0, int64_t g1) {
        Span seen{BLOCK_KEYS, 0};
        for (int r = 0; r < rows; r++) {
            const Span one = row_span(tiles[g0], s, r, first, last);
            if (one.begin < one.end) seen = Span{min(seen.begin, one.begin), max(seen.end, one.end)};
        }
        if (seen.begin >= seen.end) return false;
        const Span span{seen.begin / DECODE_PANEL * DECODE_PANEL, (seen.end + 1) / 2 * 2};
        find(first, span.begin, seen.end);
        const int64_t step = p.k_stride[2] * size, bytes = together * step;
        for (int n = span.begin; n < span.end; n += panel_keys)
            for (int64_t g = g0; g < g1; g++) {
                KeyRows from{keys + n, keys + n, g * step, g * step + PREFETCH_BYTES};
                if (panel_keys == DECODE_PANEL || (g - g0) * step + PREFETCH_BYTES >= bytes) {
                    from.next += panel_keys;
                    from.next_offset = panel_keys == DECODE_PANEL ? from.offset : from.next_offset - bytes;
                }
                if (panel_keys < DECODE_PANEL)
                    transpose_keys<KIND, DECODE_PANEL / 2>(from, p.K, panel);
                else
                    transpose_keys<KIND, DECODE_PANEL>(from, p.K, panel);
                for (int r = 0; r < rows; r += ROWS)
                    gemm<SET>(min(ROWS, rows - r), words<Word>(p.K), queries + (g * plan.rows + r) * query_width,
                              query_width, 1, (const Word *)panel, panel_keys,
                              scores + (g * plan.rows + r) * BLOCK_KEYS + n, BLOCK_KEYS, panel_keys / W);
            }
        for (int64_t g = g0; g < g1; g++)
            for (int r = 0; r < rows; r++)
                row_weights(plan, tiles[g], s, r, first, row_span(tiles[g], s, r, first, last), span,
                            scores + (g * plan.rows + r) * BLOCK_KEYS, weights_of(g, r, 0), dropout, stats[g]);
        const Span added{seen.begin / 2 * 2, span.end};
        add_values(added, g0, g1);
        for (int64_t g = g0; g < g1; g++)
            if (has_nonfinite_sums(g)) repair(s, g, first, last, added);
        return true;
    }

    // The block's result joins the rows' sums, or is kept for `combine`; `any`: whether a row sees one of its keys.
    void finish_block(bool any, float *part, int64_t g0, int64_t g1) {
        const int64_t width = plan.value_width;
        for (int64_t g = g0; g < g1; g++) {
            if (any && !part) merge_block(tiles[g], rows, score_multiplier(p), stats[g]);
            for (int r = 0; r < rows; r++) {
                const float *from = row_of(sums, g) + r * width;
                if (part) {
                    float *to = part + (g * plan.rows + r) * (width + 3);
                    to[0] = any ? stats[g].max[r] : -INF;
                    if (!any) continue;
                    to[1] = stats[g].sum[r];
                    to[2] = stats[g].weight_sum[r];
                    memcpy(to + 3, from, (size_t)width * 4);
                } else if (any) {
                    merge_row(row_of(out, g) + r * width, from, stats[g].keep[r], stats[g].take[r], width);
                }
            }
        }
    }

    void compute() {
        for (int64_t g = 0; g < p.G; g += together) {
            float *part = run.partial < 0 ? nullptr : plan.partial + run.partial * partial_size;
            for (int64_t i = run.first_block; i < run.last_block; i++)
                for (int s = 0; s < p.S; s++) {
                    const int64_t first = tiles[0].origin + i * plan.block_keys;
                    const bool any = block(s, first, first + plan.block_keys, g, g + together);
                    finish_block(any, part, g, g + together);
                    if (part) part += partial_size;
                }
        }
        if (run.partial >= 0) return;
        for (int64_t g = 0; g < p.G; g++)
            for (int r = 0; r < rows; r++) write(plan, tiles[g], r, row_of(out, g) + r * plan.value_width);
    }

    static void write(const Plan &plan, const RowTile &tile, int r, float *row) {
        if (KIND == PAIRS) unpermute_columns(row, plan.params->V);
        write_row(*plan.params, tile, r, row);
    }
};

// Merges the blocks of each row in their order.
template <int KIND>
void combine_kind(const Plan &plan, const Run &run, char *scratch) {
    const Params &p = *plan.params;
    Arena arena{scratch};
    RowTile &tile = *arena.reserve<RowTile>(1);
    const int64_t width = plan.value_width, step = p.G * plan.rows * (width + 3);
    float *out = arena.reserve<float>(plan.rows * width);
    BlockStats &stats = *arena.reserve<BlockStats>(1);
    for (int64_t g = 0; g < p.G; g++) {
        load_tile(plan, run.batch, g, plan.tiles[run.tile], tile);
        init_softmax(p, tile, out, width);
        const float *part = plan.partial + run.partial * step + g * plan.rows * (width + 3);
        for (int64_t i = 0; i < (run.last_block - run.first_block) * p.S; i++, part += step) {
            for (int r = 0; r < tile.rows; r++) {
                const float *from = part + r * (width + 3);
                stats.max[r] = from[0];
                stats.sum[r] = from[1];
                stats.weight_sum[r] = from[2];
            }
            merge_block(tile, tile.rows, score_multiplier(p), stats);
            for (int r = 0; r < tile.rows; r++)
                if (stats.max[r] != -INF)
                    merge_row(out + r * width, part + r * (width + 3) + 3, stats.keep[r], stats.take[r], width);
        }
        for (int r = 0; r < tile.rows; r++) Decoder<KIND>::write(plan, tile, r, out + r * width);
    }
}

#define KEYSPAN_DISPATCH_KIND(call)                             \
    const int64_t dtype = plan.params->dtype;                   \
    if (dtype == F32) return call(F32);                         \
    if (dtype == F16) return call(F16);                         \
    if constexpr (HAS_PAIRS) return call(PAIRS);                \
    return call(BF16);

void decode(const Plan &plan, const Run &run, char *scratch) {
#define KEYSPAN_DECODE(KIND) Decoder<KIND>(plan, run, scratch).compute()
    KEYSPAN_DISPATCH_KIND(KEYSPAN_DECODE)
}

void combine(const Plan &plan, const Run &run, char *scratch) {
#define KEYSPAN_COMBINE(KIND) combine_kind<KIND>(plan, run, scratch)
    KEYSPAN_DISPATCH_KIND(KEYSPAN_COMBINE)
}

}  // namespace
}  // namespace KEYSPAN_NAMESPACE
}  // namespace keyspan
