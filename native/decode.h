// Few queries against many keys: keys and values are read once, where they lie, so that memory sets the pace.
//
// A unit is a run of keys for all heads of some queries; units are combined in a fixed order. The hardware fetches ahead
// along several streams of addresses at once, and that holds none of the buffers in which a core waits for its own
// misses; so a unit's keys are read as STREAMS runs side by side. Knows no threads.
#pragma once
#include "forward.h"

namespace keyspan {
namespace KEYSPAN_NAMESPACE {
namespace {

constexpr int BLOCK = STREAMS * RUN;          // keys whose scores are held at a time
constexpr int SHARING = W == 16 ? 4 : 2;      // rows that share the load of a key
constexpr int DEPTH = 2;                      // keys of a stream that are added up before sums go back to memory
static_assert(RUN == SIDE && SHARING * STREAMS <= SIDE && RUN % DEPTH == 0, "scores of a block are one square");

// Rows of keys and values of the first group, null where a stream has ended, and what each row of queries sees of them.
struct Block {
    int64_t first[STREAMS];
    int count[STREAMS];
    const char *keys[RUN][STREAMS], *values[RUN][STREAMS];
    Span seen[TILE_ROWS][STREAMS];
};

alignas(64) const float NOTHING[WIDEST] = {};

// Rows of one group after the other; where a stream has none, zeros.
template <int COUNT>
struct GroupRows {
    const char *at[COUNT];
    int64_t next[COUNT];
    INLINE GroupRows(const char *const *rows, int64_t offset, int64_t stride) {
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; i++) {
            at[i] = rows[i] ? rows[i] + offset : (const char *)NOTHING;
            next[i] = rows[i] ? stride : 0;
        }
    }
    INLINE void step() {
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; i++) at[i] += next[i];
    }
};

// How a row of keys or values is read: float, fp16, bf16 one by one, or bf16 in pairs.
template <int KIND>
struct Row {
    static constexpr int STEP = W, BYTES = KIND == F32 ? 4 : 2;
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
    static constexpr int STEP = 2 * W, BYTES = 2;
    typedef uint32_t Query;
    static INLINE vu read(const char *p, int64_t i) { return load_pairs((const uint16_t *)p + i); }
    static INLINE vu query(const uint32_t *q, int64_t i) { return load(q + i / 2); }
};

// One vector of a row that is read soon: into the second level of cache, for the first cannot have so much under way.
INLINE void fetch_step(const char *p) { __builtin_prefetch(p, 0, 2); }

// Sums of each of COUNT vectors, a multiple of four.
template <int COUNT>
INLINE void sums(const vf *x, float *to) {
#if KEYSPAN_VECTOR == 64
    // Four vectors at a time become one, whose lanes of four hold their partial sums; then lanes are added up.
    __m512 four[COUNT / 4];
    for (int i = 0; i < COUNT; i += 4) {
        const __m512 a = (__m512)x[i], b = (__m512)x[i + 1], c = (__m512)x[i + 2], d = (__m512)x[i + 3];
        const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
        const __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
        four[i / 4] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                                    _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
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
    for (int i = 0; i < COUNT; i++) to[i] = sum(x[i]);
#endif
}

// to[r · STREAMS + stream] = query r · key of the stream; what lies `ahead` bytes on is fetched.
template <int R, int KIND>
INLINE void dots(int64_t dims, const typename Row<KIND>::Query *queries, int64_t width, const char *const *keys,
                 int64_t ahead, float *to) {
    typedef Row<KIND> Kind;
    vf acc[R * STREAMS];
#pragma GCC unroll 16
    for (int i = 0; i < R * STREAMS; i++) acc[i] = vf{};
    for (int64_t i = 0; i < dims; i += Kind::STEP) {
        decltype(Kind::query(queries, i)) query[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) query[r] = Kind::query(queries + r * width, i);
#pragma GCC unroll 4
        for (int stream = 0; stream < STREAMS; stream++) {
            const auto key = Kind::read(keys[stream], i);
            fetch_step(keys[stream] + ahead + i * Kind::BYTES);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
                acc[r * STREAMS + stream] = multiply_add(acc[r * STREAMS + stream], query[r], key);
        }
    }
    sums<R * STREAMS>(acc, to);
}

// out[r] += Σ weight · value over DEPTH keys of each stream; weights [R][BLOCK], of the first of these keys. What
// lies `ahead` bytes on is fetched.
template <int R, int C, int KIND>
INLINE void weigh_columns(const float *weights, const char *const *values, int64_t ahead, int64_t column,
                          float *out, int64_t width) {
    vf acc[R][C];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) acc[r][c] = load(out + r * width + column + c * W);
#pragma GCC unroll 2
    for (int n = 0; n < DEPTH; n++)
#pragma GCC unroll 4
        for (int stream = 0; stream < STREAMS; stream++) {
            vf value[C];
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) {
                value[c] = Row<KIND>::read(values[n * STREAMS + stream], column + c * W);
                fetch_step(values[n * STREAMS + stream] + ahead + (column + c * W) * Row<KIND>::BYTES);
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                const vf weight = all(weights[r * BLOCK + stream * RUN + n]);
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
// The same for C · 32 columns of bf16 values: rows of two streams are interleaved, which leaves the columns of `out` in
// another order until `straighten`; weights [R][STREAMS / 2][RUN] in pairs, in rows of BLOCK words.
template <int R, int C>
INLINE void weigh_pairs(const uint32_t *weights, const char *const *values, int64_t ahead, int64_t column,
                        float *out, int64_t width) {
    vf acc[R][2 * C];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 2 * C; c++) acc[r][c] = load(out + r * width + column + c * W);
#pragma GCC unroll 2
    for (int n = 0; n < DEPTH; n++)
#pragma GCC unroll 2
        for (int two = 0; two < STREAMS / 2; two++) {
            vu pair[2 * C];
#pragma GCC unroll 2
            for (int c = 0; c < C; c++) {
                const int64_t at = (column + c * 2 * W) * 2;
                const __m512i x = _mm512_loadu_si512(values[n * STREAMS + 2 * two] + at);
                const __m512i y = _mm512_loadu_si512(values[n * STREAMS + 2 * two + 1] + at);
                fetch_step(values[n * STREAMS + 2 * two] + ahead + at);
                fetch_step(values[n * STREAMS + 2 * two + 1] + ahead + at);
                pair[2 * c] = (vu)_mm512_unpacklo_epi16(x, y);
                pair[2 * c + 1] = (vu)_mm512_unpackhi_epi16(x, y);
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                const vu both = all(weights[r * BLOCK + two * RUN + n]);
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

// The columns of a row that `weigh_pairs` has summed, in their order.
INLINE void straighten(float *out, int64_t width) {
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
INLINE void weigh(int64_t dims, const float *weights, const char *const *values, int64_t ahead,
                  float *out, int64_t width) {
    int64_t v = 0;
#if defined(KEYSPAN_AVX512BF16)
    if constexpr (KIND == PAIRS) {
        const uint32_t *pairs = (const uint32_t *)weights;
        for (; v + 4 * W <= dims; v += 4 * W) weigh_pairs<R, 2>(pairs, values, ahead, v, out, width);
        if (v < dims) weigh_pairs<R, 1>(pairs, values, ahead, v, out, width);
        return;
    }
#endif
    if constexpr (KIND != PAIRS) {
        for (; v + 4 * W <= dims; v += 4 * W) weigh_columns<R, 4, KIND>(weights, values, ahead, v, out, width);
        for (; v < dims; v += W) weigh_columns<R, 1, KIND>(weights, values, ahead, v, out, width);
    }
}

// Three rows occur only where four share a load; where two do, that case must still compile.
#define KEYSPAN_BY_ROWS(rows, call)      \
    switch (least(SHARING, rows)) {      \
    case 1: call(1); break;              \
    case 2: call(2); break;              \
    case 3: call(SHARING - 1); break;    \
    default: call(SHARING); break;       \
    }

// One unit of work: a run of keys, a tile of queries, every group. A block of keys is gone through three times: products
// with the keys, weights, sums of the values.
template <int KIND, int VALUES>
struct Unit {
    typedef typename Row<KIND>::Query T;
    const Plan &plan;
    const Params &p;
    const int64_t b, size;
    Tile *tiles;  // of each group
    T *queries;
    float *out, *products, *scores, *keep;
    int rows, shares;
    int64_t sequence, query_width, keys_ahead, values_ahead;

    Unit(const Plan &plan, int64_t b, int64_t query_tile, bool with_sinks, char *scratch)
        : plan(plan), p(*plan.params), b(b), size(size_of(p.dtype)) {
        const int most_shares = (int)((plan.rows + SHARING - 1) / SHARING);
        query_width = plan.key_width / PER_WORD<T>;
        Arena arena{scratch};
        tiles = arena.take<Tile>(p.G);
        queries = arena.take<T>(p.G * plan.rows * query_width);
        out = arena.take<float>(p.G * plan.rows * plan.value_width);
        products = arena.take<float>(p.G * most_shares * SIDE * SIDE);
        scores = arena.take<float>(p.G * most_shares * SIDE * SIDE);
        keep = arena.take<float>(BLOCK);
        for (int64_t g = 0; g < p.G; g++) {
            load_tile(plan, b, g, 0, query_tile, tiles[g]);
            load_queries(plan, tiles[g], queries + g * plan.rows * query_width);
            start_rows(p, tiles[g], out_row(g, 0), plan.value_width);
            if (!with_sinks)
                for (int r = 0; r < tiles[g].rows; r++) tiles[g].peak[r] = -INF, tiles[g].total[r] = 0;
        }
        rows = tiles[0].rows;
        shares = (rows + SHARING - 1) / SHARING;
        sequence = p.sequence ? p.sequence[tiles[0].query[0]] : 0;
        keys_ahead = ahead(p.k_stride[1], 1, 2048);
        values_ahead = ahead(p.v_stride[1], DEPTH, 4096);
    }

    // How far on to fetch: whole keys, so that it is something that will be read.
    int64_t ahead(int64_t stride, int64_t keys, int64_t bytes) const {
        return most<int64_t>(keys, bytes / most<int64_t>(1, stride * size)) * stride * size;
    }

    float *out_row(int64_t g, int r) const { return out + (g * plan.rows + r) * plan.value_width; }

    // Of RUN rows of SIDE products, which become up to SHARING rows of BLOCK scores.
    int64_t square(int64_t g, int share) const { return (g * shares + share) * SIDE * SIDE; }

    // The block whose first stream begins at key `first`, streams `length` keys apart, none beyond `end`.
    void find(int64_t first, int64_t length, int64_t end, Block &block) const {
        for (int i = 0; i < STREAMS; i++, first += length) {
            block.first[i] = first;
            block.count[i] = (int)most<int64_t>(0, least<int64_t>(RUN, end - first));
            for (int n = 0; n < RUN; n++) {
                const bool there = n < block.count[i];
                const int64_t row = there ? physical_key(p, sequence, first + n) : 0;
                block.keys[n][i] = there ? p.k + (b * p.k_stride[0] + row * p.k_stride[1]) * size : nullptr;
                block.values[n][i] = there ? p.v + (b * p.v_stride[0] + row * p.v_stride[1]) * size : nullptr;
            }
        }
    }

    // Products of all queries of groups g0 to g1 - 1 with the n-th keys.
    INLINE void multiply(const Block &block, int n, int64_t g0, int64_t g1) {
        const int64_t stride = p.k_stride[2] * size;
        GroupRows<STREAMS> keys(block.keys[n], g0 * stride, stride);
        for (int64_t g = g0; g < g1; g++, keys.step())
            for (int share = 0; share < shares; share++) {
                const T *first = queries + (g * plan.rows + share * SHARING) * query_width;
                float *to = products + square(g, share) + n * SIDE;
#define KEYSPAN_DOTS(R) dots<R, KIND>(p.K, first, query_width, keys.at, keys_ahead, to)
                KEYSPAN_BY_ROWS(rows - share * SHARING, KEYSPAN_DOTS)
            }
    }

    // Products to weights, in pairs of two streams' where values are read so.
    void weights(Block &block, int s, int64_t g0, int64_t g1) {
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < STREAMS; i++)
                block.seen[r][i] = row_span(tiles[0], s, r, block.first[i], block.first[i] + block.count[i]);
        for (int64_t g = g0; g < g1; g++)
            for (int share = 0; share < shares; share++) {
                const int64_t at = square(g, share);
                transpose_square((const uint32_t *)products + at, SIDE, (uint32_t *)scores + at, SIDE);
                for (int r = share * SHARING; r < least(rows, (share + 1) * SHARING); r++)
                    weights_of(block, s, g, r, scores + at + r % SHARING * BLOCK);
            }
    }

    INLINE void weights_of(const Block &block, int s, int64_t g, int r, float *row) {
        Tile &tile = tiles[g];
        float multiplier = 0;
        bool any = false;
        for (int i = 0; i < STREAMS; i++) {
            float *score = row + i * RUN;
            const Span span = block.seen[r][i];
            int begin = RUN, end = RUN;  // whole vectors with a key that is seen
            if (span.begin < span.end) {
                any = true;
                begin = span.begin / W * W;
                end = (span.end + W - 1) / W * W;
                multiplier = row_scores(plan, tile, s, r, block.first[i], span, score, nullptr);
            }
            for (int n = 0; n < begin; n++) score[n] = -INF;
            for (int n = end; n < RUN; n++) score[n] = -INF;
            if (p.seed) fill_keep(p, tile, r, block.first[i], RUN, keep + i * RUN);
        }
        if (any)
            soften(plan, tile, r, multiplier, 0, BLOCK, row, row, out_row(g, r), p.seed ? keep : nullptr);
        else
            memset(row, 0, BLOCK * 4);
        if constexpr (VALUES == PAIRS)
            for (int i = 0; i < STREAMS; i += 2)
                for (int n = 0; n < RUN; n += W)
                    store((uint32_t *)row + i / 2 * RUN + n,
                          pairs_bf16(load(row + i * RUN + n), load(row + (i + 1) * RUN + n)));
    }

    // Values of the n-th and the next keys, DEPTH in all, added up by their weights.
    INLINE void add(const Block &block, int s, int n, int64_t g0, int64_t g1) {
        const Tile &tile = tiles[0];  // in what its rows see, every group's
        const int64_t stride = p.v_stride[2] * size;
        for (int r = 0, alike; r < rows; r += alike) {
            // What one row may not see must not reach it, not even times zero: rows that see alike go together.
            for (alike = 1; r + alike < rows && (r + alike) % SHARING != 0; alike++)
                if (tile.lo[s][r + alike] != tile.lo[s][r] || tile.hi[s][r + alike] != tile.hi[s][r]) break;
            const char *seen[DEPTH * STREAMS];
            for (int i = 0; i < DEPTH * STREAMS; i++) {
                const int stream = i % STREAMS, key = n + i / STREAMS;
                const Span span = block.seen[r][stream];
                seen[i] = key >= span.begin && key < span.end ? block.values[key][stream] : nullptr;
            }
            GroupRows<DEPTH * STREAMS> values(seen, g0 * stride, stride);
            for (int64_t g = g0; g < g1; g++, values.step()) {
                const float *first = scores + square(g, r / SHARING) + r % SHARING * BLOCK + n;
#define KEYSPAN_WEIGH(R) \
    weigh<R, VALUES>(p.V, first, values.at, values_ahead, out_row(g, r), plan.value_width)
                KEYSPAN_BY_ROWS(alike, KEYSPAN_WEIGH)
            }
        }
    }

    // Keys first to last - 1, as far as range s of a row reaches.
    void run(int s, int64_t first, int64_t last) {
        int64_t begin, end;
        tile_span(tiles[0], s, begin, end);
        begin = most(begin / PANEL * PANEL, first);
        end = least(end, last);
        if (begin >= end) return;
        const int64_t length = (end - begin + BLOCK - 1) / BLOCK * RUN;  // of a stream
        // Groups that lie side by side are read together, others one after the other.
        const int64_t together = p.k_stride[1] > p.k_stride[2] ? p.G : 1;
        Block block;
        for (int64_t g = 0; g < p.G; g += together)
            for (int64_t at = 0; at < length; at += RUN) {
                find(begin + at, length, end, block);
                const int longest = block.count[0];
                for (int n = 0; n < longest; n++) multiply(block, n, g, g + together);
                weights(block, s, g, g + together);
                for (int n = 0; n < longest; n += DEPTH) add(block, s, n, g, g + together);
            }
    }
};

template <int KIND, int VALUES>
void decode_kind(const Plan &plan, int64_t b, int64_t query_tile, int64_t split, char *scratch) {
    const Params &p = *plan.params;
    Unit<KIND, VALUES> unit(plan, b, query_tile, split == 0, scratch);  // a sink counts once
    const int64_t first = plan.first_key + split * SPLIT_KEYS;
    for (int s = 0; s < p.S; s++) unit.run(s, first, first + SPLIT_KEYS);
    for (int64_t g = 0; g < p.G; g++) {
        const Tile &tile = unit.tiles[g];
        for (int r = 0; r < tile.rows; r++) {
            float *sums = unit.out_row(g, r);
            if constexpr (VALUES == PAIRS) straighten(sums, p.V);
            if (plan.splits == 1) {
                write_row(p, tile, r, sums);
                continue;
            }
            const int64_t part = ((b * plan.query_tiles + query_tile) * plan.splits + split) * p.G + g;
            float *to = plan.partial + (part * plan.rows + r) * (plan.value_width + 2);
            to[0] = tile.peak[r];
            to[1] = tile.total[r];
            memcpy(to + 2, sums, (size_t)plan.value_width * 4);
        }
    }
}

void decode(const Plan &plan, int64_t b, int64_t query_tile, int64_t split, char *scratch) {
    const Params &p = *plan.params;
    if (p.dtype == F32) return decode_kind<F32, F32>(plan, b, query_tile, split, scratch);
    if (p.dtype == F16) return decode_kind<F16, F16>(plan, b, query_tile, split, scratch);
    if constexpr (HAS_PAIRS) {
        const bool keys = p.K % (2 * W) == 0, values = p.V % (2 * W) == 0;
        if (keys && values) return decode_kind<PAIRS, PAIRS>(plan, b, query_tile, split, scratch);
        if (keys) return decode_kind<PAIRS, BF16>(plan, b, query_tile, split, scratch);
    }
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
}  // namespace KEYSPAN_NAMESPACE
}  // namespace keyspan
