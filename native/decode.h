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

constexpr int PRODUCT_CHAINS = 4;             // products that are summed side by side, where rows are fewer
constexpr int VALUE_ROWS = W == 16 ? 6 : 4;  // query rows that each loaded value is multiplied by
// Values that are added up in registers. Of a cache in memory (more than CACHE_BYTES) few rows take VALUE_BYTES of all
// groups at a time, which are read in the order of addresses.
constexpr int FEW_VALUES = 16, MANY_VALUES = 32;
constexpr int64_t VALUE_BYTES = 8 << 10, CACHE_BYTES = 12 << 20;
static_assert(BLOCK_KEYS % W == 0 && FEW_VALUES % 2 == 0 && MANY_VALUES % 2 == 0, "whole vectors and pairs");

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

// Prefetches what a unit of work reads, in the order of addresses and a fixed number of bytes ahead, in the next pass or
// block too: without it memory would idle while a core computes. Requests are spread evenly over the work, because a
// burst of them fills the core's miss buffers and stops it.
struct Ahead {
    const Plan &plan;
    const Params &p;
    const Run &run;
    const RowTile &tile;
    const int64_t sequence, together;
    const char *at = nullptr, *end = nullptr;  // bytes in one piece
    int64_t due = 0;                           // bytes to prefetch
    int64_t block, group = 0, first = 0;
    int range = -1, key = 0;
    bool values = true;
    Span span{0, 0};

    // `keys`: most keys of which a pass reads all groups at a time.
    Ahead(const Plan &plan, const Run &run, const RowTile &tile, int64_t sequence, int64_t together, int keys)
        : plan(plan), p(*plan.params), run(run), tile(tile), sequence(sequence), together(together),
          block(run.first_block) {
        if (p.stored) {  // read row by row when a block begins
            due = INT64_MIN / 2;
            return;
        }
        due = max<int64_t>(LEAST_BYTES, keys * row_bytes(false));
        while (due >= LINE) lines(4);
    }

    // Calls `read` after another `count` keys or values of a group have become due, and prefetches what it has left.
    template <class Read>
    INLINE void reading(bool of_values, int count, const Read &read) {
        due += count * row_bytes(of_values) / together;
        read();
        while (due >= LINE) lines(4);
    }

    // Prefetches `count` lines if any are due.
    INLINE void lines(int count) {
        if (due < LINE) return;
        due -= count * LINE;
        const char *const from = at;
        if (end - from < count * LINE) return lines_of_pieces(count);
        at = from + count * LINE;
#pragma GCC unroll 16
        for (int i = 0; i < count; i++) __builtin_prefetch(from + i * LINE, 0, 3);
    }

private:
    static constexpr int64_t LINE = 64, LEAST_BYTES = 8 << 10;

    // Bytes of one key or value of the groups that are read together.
    int64_t row_bytes(bool of_values) const {
        const int64_t *stride = of_values ? p.v_stride : p.k_stride;
        return ((together - 1) * stride[2] + (of_values ? p.V : p.K)) * dtype_size(p.dtype);
    }

    __attribute__((noinline)) void lines_of_pieces(int count) {
        for (int i = 0; i < count; i++, at += LINE) {
            while (at >= end)
                if (!next_piece()) return;
            __builtin_prefetch(at, 0, 3);
        }
    }

    // Goes to the next bytes in one piece: a key, or as many as follow one another in memory. False at the end.
    bool next_piece() {
        due += at - end;  // not counted: what lies behind the last piece
        while (key >= span.end)
            if (!next_pass()) {
                due = INT64_MIN / 2;  // for good
                return false;
            }
        const int64_t *const stride = values ? p.v_stride : p.k_stride;
        const int64_t size = dtype_size(p.dtype), row = physical_key(p, sequence, first + key);
        const int64_t bytes = row_bytes(values);
        int64_t count = span.end - key;
        if (p.sequence) count = min(count, p.page_size - (first + key) % p.page_size);
        if (stride[1] * size != bytes || row < 0 || row + count > p.N) count = 1;
        const char *const from =
            (values ? p.v : p.k) +
            (run.batch * stride[0] + clamp(row, 0, p.N - 1) * stride[1] + group * stride[2]) * size;
        key += (int)count;
        at = (const char *)((uintptr_t)from / LINE * LINE);
        end = from + count * bytes;
        due += from - at;
        return true;
    }

    bool next_pass() {
        values = !values;
        if (!values) {
            if (++range == p.S) {
                range = 0;
                if (++block >= run.last_block) {
                    block = run.first_block;
                    group += together;
                }
            }
            if (group >= p.G || block >= run.last_block) return false;
            first = tile.origin + block * plan.block_keys;
            span = rows_span(tile, range, first, first + plan.block_keys);
        }
        key = span.begin;
        return true;
    }
};

// Most query rows that each key is multiplied by. There are fewer versions for dtypes that are widened.
constexpr int key_rows(int kind) { return W < 16 ? W / 2 : kind == F32 || kind == PAIRS ? 12 : 6; }

// How many of `rows` query rows `score_rows` takes: parts as equal as can be, of 1 to 6, 8, 10 or 12 rows.
template <int KIND>
int score_part(int rows) {
    const int parts = (rows + key_rows(KIND) - 1) / key_rows(KIND), part = (rows + parts - 1) / parts;
    if (part <= 6 || part % 2 == 0) return part;
    return part < rows ? part + 1 : (part + 1) / 2;
}

// Query rows and W keys of one group.
template <class Word>
struct Products {
    const char *const *keys;
    int64_t offset;
    const Word *queries;
    float *scores;
};

// scores[r][n] = query row r · key n of C products. Keys are transposed in registers, and a product is summed one
// dimension after the other, as in `gemm`: few such sums are as slow as a chain of additions, so that several products
// are computed side by side. queries [R][QUERY_WORDS], scores [R][BLOCK_KEYS].
template <int R, int C, int KIND>
__attribute__((noinline)) void score_keys(const Products<typename Row<KIND>::Word> *of, int64_t dims,
                                          Ahead &ahead) {
    typedef Row<KIND> Kind;
    typedef typename VectorOf<typename Kind::Word>::type Vector;
    vf acc[C][R];
#pragma GCC unroll 4
    for (int c = 0; c < C; c++)
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) acc[c][r] = vf{};
    const auto add = [&](int64_t i, bool whole) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) {
            vu words[W];
            if (whole) ahead.lines(W * Kind::STEP * Kind::BYTES / 64);
#pragma GCC unroll 16
            for (int k = 0; k < W; k++) {
                const char *const key = of[c].keys[k] + of[c].offset;
                words[k] = whole ? (vu)Kind::read(key, i) : (vu)Kind::read_last(key, i, dims - i);
            }
            transpose_vectors(words);
            const auto *query = of[c].queries + i / Kind::STEP * W;
#pragma GCC unroll 16
            for (int k = 0; k < W; k++)
#pragma GCC unroll 12
                for (int r = 0; r < R; r++)
                    acc[c][r] = multiply_add(acc[c][r], (Vector)words[k], broadcast(query[r * QUERY_WORDS + k]));
        }
    };
    int64_t i = 0;
    for (; i + Kind::STEP <= dims; i += Kind::STEP) add(i, true);
    if (i < dims) add(i, false);
#pragma GCC unroll 4
    for (int c = 0; c < C; c++)
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) store(of[c].scores + r * BLOCK_KEYS, acc[c][r]);
}

template <int R, int KIND>
INLINE void score_each(int count, const Products<typename Row<KIND>::Word> *of, int64_t dims, Ahead &ahead) {
    constexpr int SIDE = max(1, PRODUCT_CHAINS / R);
    if (count == SIDE) return score_keys<R, SIDE, KIND>(of, dims, ahead);
    for (int c = 0; c < count; c++) score_keys<R, 1, KIND>(of + c, dims, ahead);
}

template <int KIND>
void score_rows(int rows, int count, const Products<typename Row<KIND>::Word> *of, int64_t dims, Ahead &ahead) {
#define KEYSPAN_SCORE(R) \
    case R: return score_each<min(R, key_rows(KIND)), KIND>(count, of, dims, ahead);
    switch (rows) {
        KEYSPAN_SCORE(1) KEYSPAN_SCORE(2) KEYSPAN_SCORE(3) KEYSPAN_SCORE(4) KEYSPAN_SCORE(5) KEYSPAN_SCORE(6)
        KEYSPAN_SCORE(8) KEYSPAN_SCORE(10) KEYSPAN_SCORE(12)
    }
#undef KEYSPAN_SCORE
}

// out[r] += Σ weight · value over `keys` keys, one after the other, for C vectors of columns. weights [R][BLOCK_KEYS].
template <int R, int C, int KIND>
INLINE void accumulate_columns(const float *weights, const char *const *values, int keys, int64_t offset,
                               int64_t column, int64_t count, float *out, int64_t width, Ahead &ahead) {
    vf acc[R][C];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) acc[r][c] = load(out + r * width + column + c * W);
    for (int n = 0; n < keys; n++) {
        const char *at = values[n] + offset;
        vf value[C];
        if (C > 1) ahead.lines(C * W * Row<KIND>::BYTES / 64);
#pragma GCC unroll 4
        for (int c = 0; c < C; c++)
            value[c] = C > 1 || count >= W ? Row<KIND>::read(at, column + c * W) : Row<KIND>::read_last(at, column, count);
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
                             int64_t column, int64_t count, float *out, int64_t width, Ahead &ahead) {
    vf acc[R][2 * C];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 2 * C; c++) acc[r][c] = load(out + r * width + column + c * W);
    for (int n = 0; n < keys; n += 2) {
        vu pair[2 * C];
        ahead.lines(2 * C);
#pragma GCC unroll 2
        for (int c = 0; c < C; c++) {
            const int64_t at = offset + (column + c * 2 * W) * 2;
            const uint16_t *a = (const uint16_t *)(values[n] + at), *b = (const uint16_t *)(values[n + 1] + at);
            const bool whole = C > 1 || count >= 2 * W;
            const __m512i x = (__m512i)(whole ? load_pairs(a) : load_first_pairs(a, count));
            const __m512i y = (__m512i)(whole ? load_pairs(b) : load_first_pairs(b, count));
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
                              int64_t offset, float *out, int64_t width, Ahead &ahead) {
    int64_t v = 0;
#if defined(KEYSPAN_AVX512BF16)
    if constexpr (KIND == PAIRS) {
        for (; v + 4 * W <= dims; v += 4 * W)
            accumulate_pairs<R, 2>(weights, values, keys, offset, v, 4 * W, out, width, ahead);
        for (; v < dims; v += 2 * W)
            accumulate_pairs<R, 1>(weights, values, keys, offset, v, dims - v, out, width, ahead);
        return;
    }
#endif
    if constexpr (KIND != PAIRS) {
        for (; v + COLUMNS * W <= dims; v += COLUMNS * W)
            accumulate_columns<R, COLUMNS, KIND>(weights, values, keys, offset, v, COLUMNS * W, out, width, ahead);
        for (; v < dims; v += W)
            accumulate_columns<R, 1, KIND>(weights, values, keys, offset, v, dims - v, out, width, ahead);
    }
}

template <int KIND>
__attribute__((noinline)) void accumulate_rows(int rows, int64_t dims, const typename Row<KIND>::Word *weights,
                                               const char *const *values, int keys, int64_t offset,
                                               float *out, int64_t width, Ahead &ahead) {
#define KEYSPAN_ACCUMULATE(R) accumulate_values<R, KIND>(dims, weights, values, keys, offset, out, width, ahead)
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
    const int64_t sequence;
    const int64_t together;  // groups that lie side by side in memory are read together, others one after the other
    const int rows, value_keys;
    RowTile *tiles;  // [G]
    Word *queries, *weights;
    float *out, *sums, *scores, *dropout;
    const char **keys, **values;  // [BLOCK_KEYS], of the first group
    BlockStats *stats;  // [G]
    char *restored = nullptr;  // keys and values of a block that are stored in 8 bits, [BLOCK_KEYS][G][K], [BLOCK_KEYS][G][V]
    Ahead ahead;

    Decoder(const Plan &plan, const Run &run, char *scratch)
        : plan(plan), p(*plan.params), run(run), size(dtype_size(p.dtype)),
          partial_size(p.G * plan.rows * (plan.value_width + 3)),
          sequence(plan.segments[plan.tiles[run.tile].segment].sequence),
          together(p.k_stride[1] > p.k_stride[2] ? p.G : 1), rows(load_tiles(plan, run, scratch)),
          value_keys(rows > VALUE_ROWS ? MANY_VALUES : few_values()), tiles((RowTile *)scratch),
          ahead(plan, run, tiles[0], sequence, together, max(W, value_keys)) {
        Arena arena{scratch};
        arena.reserve<RowTile>(p.G);
        queries = arena.reserve<Word>(p.G * plan.rows * QUERY_WORDS);
        out = arena.reserve<float>(p.G * plan.rows * plan.value_width);
        sums = arena.reserve<float>(p.G * plan.rows * plan.value_width);
        scores = arena.reserve<float>(p.G * plan.rows * BLOCK_KEYS);
        // bf16 weights are shorter than the scores and get memory of their own.
        weights = PER_WORD<Word> == 1 ? (Word *)scores : arena.reserve<Word>(p.G * plan.rows * BLOCK_KEYS / 2);
        dropout = arena.reserve<float>(BLOCK_KEYS);
        keys = arena.reserve<const char *>(BLOCK_KEYS);
        values = arena.reserve<const char *>(BLOCK_KEYS);
        stats = arena.reserve<BlockStats>(p.G);
        if (p.stored) restored = arena.reserve<char>(BLOCK_KEYS * p.G * (p.K + p.V) * size);
        for (int64_t g = 0; g < p.G; g++) {
            load_queries(plan, tiles[g], queries + g * plan.rows * QUERY_WORDS, QUERY_WORDS);
            init_softmax(p, tiles[g], row_of(out, g), plan.value_width);
        }
    }

    int few_values() const {
        const int64_t row = together * p.V * size;
        if (p.stored || 2 * p.B * p.N * row <= CACHE_BYTES) return FEW_VALUES;
        return (int)clamp(VALUE_BYTES / row / 2 * 2, 4, FEW_VALUES);
    }

    // Tiles lie first in scratch memory; returns the number of their rows.
    static int load_tiles(const Plan &plan, const Run &run, char *scratch) {
        RowTile *tiles = Arena{scratch}.reserve<RowTile>(plan.params->G);
        for (int64_t g = 0; g < plan.params->G; g++) load_tile(plan, run.batch, g, plan.tiles[run.tile], tiles[g]);
        return tiles[0].rows;
    }

    float *row_of(float *x, int64_t g) const { return x + g * plan.rows * plan.value_width; }

    // Addresses of keys begin to end - 1 of the block at `first`, and of those behind up to a multiple of W, as far as there
    // are keys.
    void find(int64_t first, int begin, int end) const {
        const int last = (end + W - 1) / W * W;
        const int most = (int)min<int64_t>(last, plan.logical_keys - first);
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
        for (int n = most; n < last; n++) {
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
    void add_values(Span span, int64_t g0, int64_t g1) {
        for (int64_t g = g0; g < g1; g++) memset(row_of(sums, g), 0, (size_t)(rows * plan.value_width * 4));
        for (int n = span.begin; n < span.end; n += value_keys)
            for (int64_t g = g0; g < g1; g++) {
                const int count = min(value_keys, span.end - n);
                ahead.reading(true, count, [&] {
                    for (int r = 0; r < rows; r += VALUE_ROWS)
                        accumulate_rows<KIND>(min(VALUE_ROWS, rows - r), p.V, weights_of(g, r, n), values + n, count,
                                              g * p.v_stride[2] * size, row_of(sums, g) + r * plan.value_width,
                                              plan.value_width, ahead);
                });
            }
    }

    Word *weights_of(int64_t g, int r, int n) const {
        return weights + ((g * plan.rows + r) * BLOCK_KEYS + n) / PER_WORD<Word>;
    }

    // The sums of group g once more, where a value is infinite or NaN: without it, and then with what a row sees of it.
    __attribute__((noinline)) void repair(int s, int64_t g, int64_t first, int64_t last, Span span) {
        alignas(64) char clean[FEW_VALUES][MAX_HEAD_DIM * 4];
        const char *at[FEW_VALUES];
        float *const to = row_of(sums, g);
        memset(to, 0, (size_t)(rows * plan.value_width * 4));
        const int64_t offset = g * p.v_stride[2] * size;
        for (int i = 0; i < FEW_VALUES; i++) at[i] = clean[i];
        for (int n = span.begin; n < span.end; n += FEW_VALUES) {
            const int count = min(FEW_VALUES, span.end - n);
            for (int i = 0; i < count; i++)
                for (int64_t v = 0; v < p.V; v++) {
                    const char *from = values[n + i] + offset + v * size;
                    const float x = load_element(p.dtype, from, 0);
                    memset(clean[i] + v * size, 0, (size_t)size);
                    if (x - x == 0) memcpy(clean[i] + v * size, from, (size_t)size);
                }
            for (int r = 0; r < rows; r += VALUE_ROWS)
                accumulate_rows<KIND>(min(VALUE_ROWS, rows - r), p.V, weights_of(g, r, n), at, count, 0,
                                      to + r * plan.value_width, plan.value_width, ahead);
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
        const Span seen = rows_span(tiles[g0], s, first, last);
        if (seen.begin >= seen.end) return false;
        const Span span{seen.begin / SUM_KEYS * SUM_KEYS, (seen.end + 1) / 2 * 2};
        find(first, span.begin, seen.end);
        Products<Word> products[PRODUCT_CHAINS];
        const int side = max(1, PRODUCT_CHAINS / rows);
        int count = 0;
        const auto compute_products = [&] {
            ahead.reading(false, count * W, [&] {
                for (int r = 0, part; r < rows; r += part) {
                    part = score_part<KIND>(rows - r);
                    score_rows<KIND>(part, count, products, p.K, ahead);
                    for (int c = 0; c < count; c++) {
                        products[c].queries += part * QUERY_WORDS;
                        products[c].scores += part * BLOCK_KEYS;
                    }
                }
            });
            count = 0;
        };
        for (int n = span.begin; n < span.end; n += W)
            for (int64_t g = g0; g < g1; g++) {
                products[count++] = {keys + n, g * p.k_stride[2] * size, queries + g * plan.rows * QUERY_WORDS,
                                     scores + g * plan.rows * BLOCK_KEYS + n};
                if (count == side) compute_products();
            }
        if (count) compute_products();
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

#define KEYSPAN_DISPATCH_KIND(call)         \
    const int64_t dtype = plan.params->dtype; \
    if (dtype == F32) return call(F32);       \
    if (dtype == F16) return call(F16);       \
    if constexpr (HAS_PAIRS)                  \
        return call(PAIRS);                   \
    else                                      \
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
