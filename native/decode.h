// Decoding: few queries against many keys. Keys and values are read once, from where they lie, at the rate of memory.
//
// A unit of work is a run of keys (a split) for all heads of some queries; `combine` merges the splits in a fixed
// order. A unit reads its keys as STREAMS runs side by side, because the hardware prefetcher follows several address
// streams at once and takes none of the core's own miss buffers.
#pragma once
#include "forward.h"

namespace keyspan {
namespace KEYSPAN_NAMESPACE {
namespace {

constexpr int BLOCK = STREAMS * STREAM_KEYS;    // keys whose scores are held at a time
constexpr int ROWS_PER_LOAD = W == 16 ? 4 : 2;  // query rows multiplied by each loaded key
constexpr int KEYS_PER_PASS = 2;                // values of a stream that are added before sums go back to memory
static_assert(STREAM_KEYS == SQUARE && ROWS_PER_LOAD * STREAMS <= SQUARE && STREAM_KEYS % KEYS_PER_PASS == 0,
              "scores of a block are one square");

// Addresses of the keys and values of the first group, null where a stream has ended, and the span of each query row.
struct Block {
    int64_t first[STREAMS];
    int count[STREAMS];
    const char *keys[STREAM_KEYS][STREAMS], *values[STREAM_KEYS][STREAMS];
    Span visible[TILE_ROWS][STREAMS];
};

alignas(64) const float ZERO_ROW[MAX_HEAD_DIM] = {};

// Iterates over the groups of COUNT keys or values; an ended stream reads zeros.
template <int COUNT>
struct GroupRows {
    const char *at[COUNT];
    int64_t next[COUNT];
    INLINE GroupRows(const char *const *rows, int64_t offset, int64_t stride) {
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; i++) {
            at[i] = rows[i] ? rows[i] + offset : (const char *)ZERO_ROW;
            next[i] = rows[i] ? stride : 0;
        }
    }
    INLINE void step() {
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; i++) at[i] += next[i];
    }
};

// How a row of keys or values is loaded: fp32, fp16, bf16 element by element, or bf16 in pairs.
template <int KIND>
struct Row {
    static constexpr int STEP = W, BYTES = KIND == F32 ? 4 : 2;
    typedef float Query;
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
    static INLINE vf query(const float *q, int64_t i) { return load(q + i); }
};
constexpr int PAIRS = 3;
template <>
struct Row<PAIRS> {
    static constexpr int STEP = 2 * W, BYTES = 2;
    typedef uint32_t Query;
    static INLINE vu read(const char *p, int64_t i) { return load_pairs((const uint16_t *)p + i); }
    static INLINE vu read_last(const char *p, int64_t i, int64_t count) {
        return load_first_pairs((const uint16_t *)p + i, count);
    }
    static INLINE vu query(const uint32_t *q, int64_t i) { return load(q + i / 2); }
};

// Into the second level of cache: the first has too few miss buffers.
INLINE void prefetch(const char *p) { __builtin_prefetch(p, 0, 2); }

// to[i] = sum over the lanes of x[i]; COUNT is a multiple of four.
template <int COUNT>
INLINE void sums(const vf *x, float *to) {
#if KEYSPAN_VECTOR == 64
    // Four vectors are merged into one whose groups of four lanes hold their partial sums; then the lanes are added.
    __m512 four[COUNT / 4];
    for (int i = 0; i < COUNT; i += 4) {
        const __m512 a = (__m512)x[i], b = (__m512)x[i + 1], c = (__m512)x[i + 2], d = (__m512)x[i + 3];
        const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
        const __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
        four[i / 4] =
            _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    }
    if constexpr (COUNT == 16) {
        const auto join = [](__m512 a, __m512 b) {
            return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
        };
        _mm512_storeu_ps(to, join(join(four[0], four[1]), join(four[2], four[3])));
        return;
    }
    for (int i = 0; i < COUNT; i += 4) {
        const __m512 lanes = four[i / 4];
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
        _mm_storeu_ps(to + i, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
    }
#else
    for (int i = 0; i < COUNT; i++) to[i] = reduce_add(x[i]);
#endif
}

// to[r][stream] = query r · key of the stream; prefetches `prefetch_bytes` ahead. to [R][STREAMS].
template <int R, int KIND>
INLINE void dot_products(int64_t dims, const typename Row<KIND>::Query *queries, int64_t width, const char *const *keys,
                         int64_t prefetch_bytes, float *to) {
    typedef Row<KIND> Kind;
    vf acc[R * STREAMS];
#pragma GCC unroll 16
    for (int i = 0; i < R * STREAMS; i++) acc[i] = vf{};
    int64_t i = 0;
    for (; i + Kind::STEP <= dims; i += Kind::STEP) {
        decltype(Kind::query(queries, i)) query[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) query[r] = Kind::query(queries + r * width, i);
#pragma GCC unroll 4
        for (int stream = 0; stream < STREAMS; stream++) {
            const auto key = Kind::read(keys[stream], i);
            prefetch(keys[stream] + prefetch_bytes + i * Kind::BYTES);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
                acc[r * STREAMS + stream] = multiply_add(acc[r * STREAMS + stream], query[r], key);
        }
    }
    if (i < dims)
#pragma GCC unroll 4
        for (int stream = 0; stream < STREAMS; stream++) {
            const auto key = Kind::read_last(keys[stream], i, dims - i);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
                acc[r * STREAMS + stream] =
                    multiply_add(acc[r * STREAMS + stream], Kind::query(queries + r * width, i), key);
        }
    sums<R * STREAMS>(acc, to);
}

// out[r] += Σ weight · value over KEYS_PER_PASS keys of each stream, for C vectors of columns; weights [R][BLOCK] from
// the first of these keys on. Prefetches `prefetch_bytes` ahead.
template <int R, int C, int KIND>
INLINE void accumulate_columns(const float *weights, const char *const *values, int64_t prefetch_bytes, int64_t column,
                               int64_t count, float *out, int64_t width) {
    vf acc[R][C];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) acc[r][c] = load(out + r * width + column + c * W);
#pragma GCC unroll 2
    for (int n = 0; n < KEYS_PER_PASS; n++)
#pragma GCC unroll 4
        for (int stream = 0; stream < STREAMS; stream++) {
            vf value[C];
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) {
                value[c] = C > 1 || count >= W ? Row<KIND>::read(values[n * STREAMS + stream], column + c * W)
                                               : Row<KIND>::read_last(values[n * STREAMS + stream], column, count);
                prefetch(values[n * STREAMS + stream] + prefetch_bytes + (column + c * W) * Row<KIND>::BYTES);
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                const vf weight = broadcast(weights[r * BLOCK + stream * STREAM_KEYS + n]);
#pragma GCC unroll 4
                for (int c = 0; c < C; c++) acc[r][c] += weight * value[c];
            }
        }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) store(out + r * width + column + c * W, acc[r][c]);
}

#if defined(KEYSPAN_AVX512BF16)
// The same for C · 2 W columns of bf16 values. Rows of two streams are interleaved, which leaves the columns of `out`
// in another order until `unpermute_columns`. weights [R][BLOCK], of which [STREAMS / 2][STREAM_KEYS] hold bf16 pairs.
template <int R, int C>
INLINE void accumulate_pairs(const uint32_t *weights, const char *const *values, int64_t prefetch_bytes, int64_t column,
                             int64_t count, float *out, int64_t width) {
    vf acc[R][2 * C];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 2 * C; c++) acc[r][c] = load(out + r * width + column + c * W);
#pragma GCC unroll 2
    for (int n = 0; n < KEYS_PER_PASS; n++)
#pragma GCC unroll 2
        for (int two = 0; two < STREAMS / 2; two++) {
            vu pair[2 * C];
#pragma GCC unroll 2
            for (int c = 0; c < C; c++) {
                const int64_t at = (column + c * 2 * W) * 2;
                const uint16_t *a = (const uint16_t *)(values[n * STREAMS + 2 * two] + at);
                const uint16_t *b = (const uint16_t *)(values[n * STREAMS + 2 * two + 1] + at);
                const bool whole = C > 1 || count >= 2 * W;
                const __m512i x = (__m512i)(whole ? load_pairs(a) : load_first_pairs(a, count));
                const __m512i y = (__m512i)(whole ? load_pairs(b) : load_first_pairs(b, count));
                prefetch(values[n * STREAMS + 2 * two] + prefetch_bytes + at);
                prefetch(values[n * STREAMS + 2 * two + 1] + prefetch_bytes + at);
                pair[2 * c] = (vu)_mm512_unpacklo_epi16(x, y);
                pair[2 * c + 1] = (vu)_mm512_unpackhi_epi16(x, y);
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                const vu both = broadcast(weights[r * BLOCK + two * STREAM_KEYS + n]);
#pragma GCC unroll 4
                for (int c = 0; c < 2 * C; c++) acc[r][c] = multiply_add(acc[r][c], both, pair[c]);
            }
        }
#pragma GCC unroll 4
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
INLINE void accumulate_values(int64_t dims, const float *weights, const char *const *values, int64_t prefetch_bytes,
                              float *out, int64_t width) {
    int64_t v = 0;
#if defined(KEYSPAN_AVX512BF16)
    if constexpr (KIND == PAIRS) {
        const uint32_t *pairs = (const uint32_t *)weights;
        for (; v + 4 * W <= dims; v += 4 * W)
            accumulate_pairs<R, 2>(pairs, values, prefetch_bytes, v, 4 * W, out, width);
        for (; v < dims; v += 2 * W) accumulate_pairs<R, 1>(pairs, values, prefetch_bytes, v, dims - v, out, width);
        return;
    }
#endif
    if constexpr (KIND != PAIRS) {
        for (; v + 4 * W <= dims; v += 4 * W)
            accumulate_columns<R, 4, KIND>(weights, values, prefetch_bytes, v, 4 * W, out, width);
        for (; v < dims; v += W)
            accumulate_columns<R, 1, KIND>(weights, values, prefetch_bytes, v, dims - v, out, width);
    }
}

// With two rows a load, the case of three rows is never reached, but it must compile.
#define KEYSPAN_DISPATCH_ROWS(rows, call)   \
    switch (min(ROWS_PER_LOAD, rows)) {     \
    case 1: call(1); break;                 \
    case 2: call(2); break;                 \
    case 3: call(ROWS_PER_LOAD - 1); break; \
    default: call(ROWS_PER_LOAD); break;    \
    }

// One unit of work: a split of the keys, a tile of queries, every group. Each block of keys takes three passes: scores,
// softmax, sums of values.
template <int KIND, int VALUES>
struct DecodeUnit {
    typedef typename Row<KIND>::Query T;
    const Plan &plan;
    const Params &p;
    const int64_t b, size;
    RowTile *tiles;  // [G]
    T *queries;
    float *out, *products, *scores, *dropout;
    int rows, row_groups;
    int64_t sequence, query_width, key_prefetch, value_prefetch;

    DecodeUnit(const Plan &plan, int64_t b, int64_t query_tile, bool with_sinks, char *scratch)
        : plan(plan), p(*plan.params), b(b), size(dtype_size(p.dtype)) {
        const int max_row_groups = (int)((plan.rows + ROWS_PER_LOAD - 1) / ROWS_PER_LOAD);
        query_width = plan.key_width / PER_WORD<T>;
        Arena arena{scratch};
        tiles = arena.reserve<RowTile>(p.G);
        queries = arena.reserve<T>(p.G * plan.rows * query_width);
        out = arena.reserve<float>(p.G * plan.rows * plan.value_width);
        products = arena.reserve<float>(p.G * max_row_groups * SQUARE * SQUARE);
        scores = arena.reserve<float>(p.G * max_row_groups * SQUARE * SQUARE);
        dropout = arena.reserve<float>(BLOCK);
        for (int64_t g = 0; g < p.G; g++) {
            load_tile(plan, b, g, 0, query_tile, tiles[g]);
            load_queries(plan, tiles[g], queries + g * plan.rows * query_width);
            init_softmax(p, tiles[g], with_sinks, out_row(g, 0), plan.value_width);
        }
        rows = tiles[0].rows;
        row_groups = (rows + ROWS_PER_LOAD - 1) / ROWS_PER_LOAD;
        sequence = sequence_of(p, tiles[0].query[0]);
        key_prefetch = prefetch_distance(p.k_stride[1], 1, 2048);
        value_prefetch = prefetch_distance(p.v_stride[1], KEYS_PER_PASS, 4096);
    }

    // Prefetch distance in bytes: whole keys, so that the address is one that will be read.
    int64_t prefetch_distance(int64_t stride, int64_t keys, int64_t bytes) const {
        return max<int64_t>(keys, bytes / max<int64_t>(1, stride * size)) * stride * size;
    }

    float *out_row(int64_t g, int r) const { return out + (g * plan.rows + r) * plan.value_width; }

    // Offset of STREAM_KEYS rows of SQUARE products, which are transposed to ROWS_PER_LOAD rows of BLOCK scores.
    int64_t score_offset(int64_t g, int share) const { return (g * row_groups + share) * SQUARE * SQUARE; }

    // Fills `block`: stream i begins at key `first + i · length`; no key is at or beyond `end`.
    void find(int64_t first, int64_t length, int64_t end, Block &block) const {
        for (int i = 0; i < STREAMS; i++, first += length) {
            block.first[i] = first;
            block.count[i] = (int)max<int64_t>(0, min<int64_t>(STREAM_KEYS, end - first));
            for (int n = 0; n < STREAM_KEYS; n++) {
                const bool there = n < block.count[i];
                const int64_t row = there ? physical_key(p, sequence, first + n) : 0;
                block.keys[n][i] = there ? p.k + (b * p.k_stride[0] + row * p.k_stride[1]) * size : nullptr;
                block.values[n][i] = there ? p.v + (b * p.v_stride[0] + row * p.v_stride[1]) * size : nullptr;
            }
        }
    }

    // Products of all queries of groups g0 to g1 - 1 with the n-th key of each stream.
    INLINE void compute_scores(const Block &block, int n, int64_t g0, int64_t g1) {
        const int64_t stride = p.k_stride[2] * size;
        GroupRows<STREAMS> keys(block.keys[n], g0 * stride, stride);
        for (int64_t g = g0; g < g1; g++, keys.step())
            for (int share = 0; share < row_groups; share++) {
                const T *first = queries + (g * plan.rows + share * ROWS_PER_LOAD) * query_width;
                float *to = products + score_offset(g, share) + n * SQUARE;
#define KEYSPAN_DOT_PRODUCTS(R) dot_products<R, KIND>(p.K, first, query_width, keys.at, key_prefetch, to)
                KEYSPAN_DISPATCH_ROWS(rows - share * ROWS_PER_LOAD, KEYSPAN_DOT_PRODUCTS)
            }
    }

    // Products to weights; as bf16 pairs of two streams where values are read as pairs.
    void weights(Block &block, int s, int64_t g0, int64_t g1) {
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < STREAMS; i++)
                block.visible[r][i] = row_span(tiles[0], s, r, block.first[i], block.first[i] + block.count[i]);
        for (int64_t g = g0; g < g1; g++)
            for (int share = 0; share < row_groups; share++) {
                const int64_t at = score_offset(g, share);
                transpose_square((const uint32_t *)products + at, SQUARE, (uint32_t *)scores + at, SQUARE);
                for (int r = share * ROWS_PER_LOAD; r < min(rows, (share + 1) * ROWS_PER_LOAD); r++)
                    weights_of(block, s, g, r, scores + at + r % ROWS_PER_LOAD * BLOCK);
            }
    }

    INLINE void weights_of(const Block &block, int s, int64_t g, int r, float *row) {
        RowTile &tile = tiles[g];
        bool any = false;
        for (int i = 0; i < STREAMS; i++) {
            float *score = row + i * STREAM_KEYS;
            const Span span = block.visible[r][i];
            int begin = STREAM_KEYS, end = STREAM_KEYS;  // whole vectors with a visible key
            if (span.begin < span.end) {
                any = true;
                begin = span.begin / W * W;
                end = (span.end + W - 1) / W * W;
                row_scores(plan, tile, s, r, block.first[i], span, score, nullptr);
            }
            for (int n = 0; n < begin; n++) score[n] = -INF;
            for (int n = end; n < STREAM_KEYS; n++) score[n] = -INF;
            if (p.seed) fill_dropout(p, tile, r, block.first[i], STREAM_KEYS, 1, dropout + i * STREAM_KEYS);
        }
        if (any)
            softmax_step<VALUES == PAIRS>(tile, r, score_multiplier(p), 0, BLOCK, row, row, out_row(g, r),
                                          plan.value_width, p.seed ? dropout : nullptr);
        else
            memset(row, 0, BLOCK * 4);
        if constexpr (VALUES == PAIRS)
            for (int i = 0; i < STREAMS; i += 2)
                for (int n = 0; n < STREAM_KEYS; n += W)
                    store((uint32_t *)row + i / 2 * STREAM_KEYS + n,
                          join_bf16(load(row + i * STREAM_KEYS + n), load(row + (i + 1) * STREAM_KEYS + n)));
    }

    // Whether rows r and other see the same keys of the block, and their values may be added together.
    INLINE bool see_alike(const Block &block, const RowTile &tile, int r, int other) const {
        if (memcmp(block.visible[r], block.visible[other], sizeof block.visible[r])) return false;
        return !p.mask || dense_row(*p.mask, tile, r) == dense_row(*p.mask, tile, other);
    }

    // Adds the values of keys n to n + KEYS_PER_PASS - 1 of each stream, times their weights.
    INLINE void add(const Block &block, int n, int64_t g0, int64_t g1) {
        const int64_t stride = p.v_stride[2] * size;
        const bool by_group = p.mask && p.mask->stride[1] != 0;  // ranges are the same for every group
        for (int64_t first_group = g0, last_group; first_group < g1; first_group = last_group) {
            last_group = by_group ? first_group + 1 : g1;
            const RowTile &tile = tiles[first_group];
            for (int r = 0, alike; r < rows; r += alike) {
                alike = 1;
                while (r + alike < rows && (r + alike) % ROWS_PER_LOAD != 0 && see_alike(block, tile, r, r + alike))
                    alike++;
                // A hidden value may be NaN, so it is not read even with weight 0.
                const char *seen[KEYS_PER_PASS * STREAMS];
                for (int i = 0; i < KEYS_PER_PASS * STREAMS; i++) {
                    const int stream = i % STREAMS, key = n + i / STREAMS;
                    const Span span = block.visible[r][stream];
                    bool visible = key >= span.begin && key < span.end;
                    if (visible && p.mask) visible = mask_bit(*p.mask, tile, r, block.first[stream] + key);
                    seen[i] = visible ? block.values[key][stream] : nullptr;
                }
                GroupRows<KEYS_PER_PASS * STREAMS> values(seen, first_group * stride, stride);
                for (int64_t g = first_group; g < last_group; g++, values.step()) {
                    const float *first = scores + score_offset(g, r / ROWS_PER_LOAD) + r % ROWS_PER_LOAD * BLOCK + n;
#define KEYSPAN_ACCUMULATE(R) \
    accumulate_values<R, VALUES>(p.V, first, values.at, value_prefetch, out_row(g, r), plan.value_width)
                    KEYSPAN_DISPATCH_ROWS(alike, KEYSPAN_ACCUMULATE)
                }
            }
        }
    }

    // Keys [first, last) within range s of the rows.
    void run(int s, int64_t first, int64_t last) {
        int64_t begin, end;
        tile_span(tiles[0], s, begin, end);
        begin = max(begin / PANEL * PANEL, first);
        end = min(end, last);
        if (begin >= end) return;
        const int64_t length = (end - begin + BLOCK - 1) / BLOCK * STREAM_KEYS;  // keys of a stream
        // Groups that lie side by side in memory are read together, others one after the other.
        const int64_t together = p.k_stride[1] > p.k_stride[2] ? p.G : 1;
        Block block;
        for (int64_t g = 0; g < p.G; g += together)
            for (int64_t at = 0; at < length; at += STREAM_KEYS) {
                find(begin + at, length, end, block);
                const int longest = block.count[0];
                for (int n = 0; n < longest; n++) compute_scores(block, n, g, g + together);
                weights(block, s, g, g + together);
                for (int n = 0; n < longest; n += KEYS_PER_PASS) add(block, n, g, g + together);
            }
    }
};

template <int KIND, int VALUES>
void decode_kind(const Plan &plan, int64_t b, int64_t query_tile, int64_t split, char *scratch) {
    const Params &p = *plan.params;
    DecodeUnit<KIND, VALUES> unit(plan, b, query_tile, split == 0, scratch);  // a sink counts in one split only
    const int64_t first = plan.first_key + split * SPLIT_KEYS;
    for (int s = 0; s < p.S; s++) unit.run(s, first, first + SPLIT_KEYS);
    for (int64_t g = 0; g < p.G; g++) {
        const RowTile &tile = unit.tiles[g];
        for (int r = 0; r < tile.rows; r++) {
            float *sums = unit.out_row(g, r);
            if constexpr (VALUES == PAIRS) unpermute_columns(sums, p.V);
            if (plan.splits == 1) {
                write_row(p, tile, r, sums);
                continue;
            }
            const int64_t part = ((b * plan.query_tiles + query_tile) * plan.splits + split) * p.G + g;
            float *to = plan.partial + (part * plan.rows + r) * (plan.value_width + 3);
            to[0] = tile.row_max[r];
            to[1] = tile.row_sum[r];
            to[2] = tile.weight_sum[r];
            memcpy(to + 3, sums, (size_t)plan.value_width * 4);
        }
    }
}

void decode(const Plan &plan, int64_t b, int64_t query_tile, int64_t split, char *scratch) {
    const Params &p = *plan.params;
    if (p.dtype == F32) return decode_kind<F32, F32>(plan, b, query_tile, split, scratch);
    if (p.dtype == F16) return decode_kind<F16, F16>(plan, b, query_tile, split, scratch);
    if constexpr (HAS_PAIRS) return decode_kind<PAIRS, PAIRS>(plan, b, query_tile, split, scratch);
    return decode_kind<BF16, BF16>(plan, b, query_tile, split, scratch);
}

// Merges the splits of each row in their order.
void combine(const Plan &plan, int64_t b, int64_t query_tile, char *scratch) {
    const Params &p = *plan.params;
    Arena arena{scratch};
    RowTile &tile = *arena.reserve<RowTile>(1);
    float *out = arena.reserve<float>(plan.value_width);
    for (int64_t g = 0; g < p.G; g++) {
        load_tile(plan, b, g, 0, query_tile, tile);
        for (int r = 0; r < tile.rows; r++) {
            const int64_t stride = p.G * plan.rows * (plan.value_width + 3);
            const float *part = plan.partial + (b * plan.query_tiles + query_tile) * plan.splits * stride +
                                (g * plan.rows + r) * (plan.value_width + 3);
            float row_max = -INF, row_sum = 0, weight_sum = 0;
            for (int64_t i = 0; i < plan.splits; i++) row_max = max(row_max, part[i * stride]);
            const float pivot = row_max == -INF ? 0 : row_max;
            memset(out, 0, (size_t)plan.value_width * 4);
            for (int64_t i = 0; i < plan.splits; i++) {
                const float *split = part + i * stride;
                if (split[1] == 0) continue;
                const float factor = exp2<5>(broadcast((split[0] - pivot) * score_multiplier(p)))[0];
                row_sum += factor * split[1];
                weight_sum += factor * split[2];
                for (int64_t v = 0; v < plan.value_width; v += W)
                    store(out + v, load(out + v) + factor * load(split + 3 + v));
            }
            tile.row_max[r] = row_max;
            tile.row_sum[r] = row_sum;
            tile.weight_sum[r] = weight_sum;
            write_row(p, tile, r, out);
        }
    }
}

}  // namespace
}  // namespace KEYSPAN_NAMESPACE
}  // namespace keyspan
