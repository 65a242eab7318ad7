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

constexpr int PRODUCTS = 4;                   // most products that are summed side by side
constexpr int VALUE_ROWS = W == 16 ? 6 : 4;  // query rows that each loaded value is multiplied by
// Values that are added up in registers. Of a cache in memory (more than CACHE_BYTES) few rows take VALUE_BYTES of all
// groups at a time, which are read in the order of addresses.
constexpr int FEW_VALUES = 16, MANY_VALUES = 32;
constexpr int64_t VALUE_BYTES = 8 << 10, CACHE_BYTES = 12 << 20;
static_assert(BLOCK_KEYS % W == 0 && FEW_VALUES % 2 == 0 && MANY_VALUES % 2 == 0, "whole vectors and pairs");

// How a row of keys or values is loaded. A vector of STEP elements is transposed as W words; a word has PARTS that are
// multiplied, which `split` finds. Kinds: fp32, fp16, bf16 element by element, bf16 in pairs, and 8 bits as floats or as
// pairs of bf16.
template <int KIND>
struct Row {
    static constexpr int STEP = W, BYTES = KIND == F32 ? 4 : 2, PARTS = 1;
    typedef float Word;
    explicit INLINE Row(int64_t) {}
    static INLINE void split(vu word, vf (&parts)[PARTS]) { parts[0] = (vf)word; }
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
constexpr int PAIRS = 3, STORED_FLOATS = 4, STORED_PAIRS = 5;
constexpr bool is_stored(int kind) { return kind >= STORED_FLOATS; }
template <>
struct Row<PAIRS> {
    static constexpr int STEP = 2 * W, BYTES = 2, PARTS = 1;
    typedef uint32_t Word;
    explicit INLINE Row(int64_t) {}
    static INLINE void split(vu word, vu (&parts)[PARTS]) { parts[0] = word; }
    static INLINE vu read(const char *p, int64_t i) { return load_pairs((const uint16_t *)p + i); }
    static INLINE vu read_last(const char *p, int64_t i, int64_t count) {
        return load_first_pairs((const uint16_t *)p + i, count);
    }
};
template <>
struct Row<STORED_FLOATS> {
    static constexpr int STEP = 4 * W, BYTES = 1, PARTS = 4;
    typedef float Word;
    int64_t stored;
    explicit INLINE Row(int64_t stored) : stored(stored) {}
    INLINE void split(vu word, vf (&parts)[PARTS]) const {
        for (int i = 0; i < PARTS; i++) parts[i] = widen_stored(stored, (vi)(word << (24 - 8 * i)) >> 24);
    }
    static INLINE vu read(const char *p, int64_t i) { return load_bytes(p + i); }
    static INLINE vu read_last(const char *p, int64_t i, int64_t count) { return load_first_bytes(p + i, count); }
    INLINE vf read_value(const char *p, int64_t i) const { return load_stored(stored, p + i); }
    INLINE vf read_last_value(const char *p, int64_t i, int64_t count) const {
        return load_first_stored(stored, p + i, count);
    }
};

#if defined(KEYSPAN_AVX512BF16)
// The bf16 numbers of all magnitudes that 8 bits store, as bytes. A sign is added to what is looked up.
struct ByteTable {
    alignas(64) uint8_t low[128], high[128];
    uint64_t negated;  // all ones where a negative number is the two's complement of its magnitude
    uint8_t lowest;    // the upper byte of the number that is stored as 128
    explicit ByteTable(int64_t stored) : negated(stored == INT8 ? ~0ull : 0), lowest(stored == INT8 ? 0xc3 : 0x80) {
        for (int i = 0; i < 128; i++) {
            const char byte = (char)i;
            const uint16_t x = to_bf16(load_first_stored(stored, &byte, 1)[0]);
            low[i] = (uint8_t)x;
            high[i] = (uint8_t)(x >> 8);
        }
    }
};

inline const ByteTable &byte_table(int64_t stored) {
    static const ByteTable int8(INT8), e4m3(E4M3);
    return stored == INT8 ? int8 : e4m3;
}

template <>
struct Row<STORED_PAIRS> {
    static constexpr int STEP = 4 * W, BYTES = 1, PARTS = 2;
    typedef uint32_t Word;
    __m512i low[2], high[2], lowest;
    __mmask64 negated;
    explicit INLINE Row(int64_t stored) {
        const ByteTable &table = byte_table(stored);
        for (int i = 0; i < 2; i++) {
            low[i] = _mm512_load_si512(table.low + 64 * i);
            high[i] = _mm512_load_si512(table.high + 64 * i);
        }
        lowest = _mm512_set1_epi8((char)table.lowest);
        negated = table.negated;
    }
    // The lower and the upper bytes of the bf16 numbers of 64 stored ones.
    INLINE void look_up(__m512i x, __m512i &lower, __m512i &upper) const {
        const __m512i minus = _mm512_set1_epi8((char)0x80), index = _mm512_mask_abs_epi8(x, negated, x);
        lower = _mm512_permutex2var_epi8(low[0], index, low[1]);
        upper = _mm512_permutex2var_epi8(high[0], index, high[1]);
        upper = _mm512_ternarylogic_epi32(upper, x, minus, 0xf8);  // upper | (x & minus)
        upper = _mm512_mask_mov_epi8(upper, _mm512_cmpeq_epi8_mask(x, minus), lowest);
    }
    INLINE void split(vu word, vu (&parts)[PARTS]) const {
        // Bytes 0, 2, 1, 3 of each word, so that those of a part are two apart.
        const __m512i order = _mm512_set4_epi32(0x0f0d0e0c, 0x0b090a08, 0x07050604, 0x03010200);
        const __m512i even = _mm512_set1_epi16(0xff);
        __m512i lower, upper;
        look_up(_mm512_shuffle_epi8((__m512i)word, order), lower, upper);
        // even ? first : second
        parts[0] = (vu)_mm512_ternarylogic_epi32(even, lower, _mm512_slli_epi16(upper, 8), 0xca);
        parts[1] = (vu)_mm512_ternarylogic_epi32(even, _mm512_srli_epi16(lower, 8), upper, 0xca);
    }
    static INLINE vu read(const char *p, int64_t i) { return load_bytes(p + i); }
    static INLINE vu read_last(const char *p, int64_t i, int64_t count) { return load_first_bytes(p + i, count); }
};
#endif

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

    // `count` lines for the caller to prefetch: the next ones, if any are due and they lie in one piece; else those from
    // `loaded` on, which are in cache or will soon be read.
    INLINE const char *take(int count, const char *loaded) {
        const char *const from = at;
        if (due < LINE || end - from < count * LINE) {
            lines(count);
            return loaded;
        }
        due -= count * LINE;
        at = from + count * LINE;
        return from;
    }

private:
    static constexpr int64_t LINE = 64, LEAST_BYTES = 8 << 10;

    // Bytes of one key or value of the groups that are read together.
    int64_t row_bytes(bool of_values) const {
        const int64_t *stride = of_values ? p.v_stride : p.k_stride;
        return ((together - 1) * stride[2] + (of_values ? p.V : p.K)) * key_size(p);
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
        const int64_t size = key_size(p), row = physical_key(p, sequence, first + key);
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
constexpr int key_rows(int kind) {
    return W < 16 ? W / 2 : kind == F32 || kind == PAIRS || kind == STORED_PAIRS ? 12 : 6;
}

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
    constexpr int WORD = Kind::STEP / W;  // elements
    const Kind kind(ahead.p.stored);
    vf acc[C][R];
#pragma GCC unroll 4
    for (int c = 0; c < C; c++)
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) acc[c][r] = vf{};
    const auto add = [&](int64_t i, bool whole) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) {
            vu words[W];
            constexpr int LINES = W * Kind::STEP * Kind::BYTES / 64;
            const char *const from = whole ? ahead.take(LINES, of[c].keys[0] + of[c].offset + i * Kind::BYTES) : nullptr;
#pragma GCC unroll 16
            for (int k = 0; k < W; k++) {
                // Between the loads: more requests at once would wait for one another.
                if (whole && k * LINES % W == 0) __builtin_prefetch(from + k * LINES / W * 64, 0, 3);
                const char *const key = of[c].keys[k] + of[c].offset;
                words[k] = whole ? (vu)Kind::read(key, i) : (vu)Kind::read_last(key, i, dims - i);
                if (k % 4 == 3) asm volatile("" : : : "memory");  // compilers would gather the requests
            }
            transpose_vectors(words);
            const auto *query = of[c].queries + i / Kind::STEP * W * Kind::PARTS;
#pragma GCC unroll 16
            for (int k = 0; k < W; k++) {
                if (is_stored(KIND) && !whole && i + k * WORD >= dims) break;  // queries end there
                Vector parts[Kind::PARTS];
                kind.split(words[k], parts);
#pragma GCC unroll 4
                for (int j = 0; j < Kind::PARTS; j++)
#pragma GCC unroll 12
                    for (int r = 0; r < R; r++)
                        acc[c][r] = multiply_add(acc[c][r], parts[j],
                                                 broadcast(query[r * QUERY_WORDS + k * Kind::PARTS + j]));
            }
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

// How many products of so many query rows are computed side by side: as many as hide the latency of their sums, and no
// more, because each reads other lines of W keys. Pairs take longer than floats.
constexpr int products_of(int kind, int rows) {
    if (rows <= 2) return rows == 1 ? PRODUCTS : 2;
    return rows <= 4 && (kind == PAIRS || is_stored(kind)) ? 2 : 1;
}

template <int R, int KIND>
INLINE void score_each(int count, const Products<typename Row<KIND>::Word> *of, int64_t dims, Ahead &ahead) {
    constexpr int SIDE = products_of(KIND, R);
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
    const Row<KIND> kind(ahead.p.stored);
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
            if constexpr (is_stored(KIND))
                value[c] = C > 1 || count >= W ? kind.read_value(at, column + c * W) : kind.read_last_value(at, column, count);
            else
                value[c] = C > 1 || count >= W ? kind.read(at, column + c * W) : kind.read_last(at, column, count);
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

// The same for 4 W columns of values of 8 bits, in yet another order.
template <int R>
INLINE void accumulate_stored_pairs(const uint32_t *weights, const char *const *values, int keys, int64_t offset,
                                    int64_t column, int64_t count, float *out, int64_t width, Ahead &ahead) {
    const Row<STORED_PAIRS> kind(ahead.p.stored);
    vf acc[R][4];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) acc[r][c] = load(out + r * width + column + c * W);
    const bool whole = count >= 4 * W;
    for (int n = 0; n < keys; n += 2) {
        ahead.lines(2);
        const char *a = values[n] + offset + column, *b = values[n + 1] + offset + column;
        const __m512i x = (__m512i)(whole ? load_bytes(a) : load_first_bytes(a, count));
        const __m512i y = (__m512i)(whole ? load_bytes(b) : load_first_bytes(b, count));
        const __m512i both[2] = {_mm512_unpacklo_epi8(x, y), _mm512_unpackhi_epi8(x, y)};
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m512i lower, upper;
            kind.look_up(both[half], lower, upper);
            const vu pair[2] = {(vu)_mm512_unpacklo_epi8(lower, upper), (vu)_mm512_unpackhi_epi8(lower, upper)};
#pragma GCC unroll 6
            for (int r = 0; r < R; r++) {
                const vu weight = broadcast(weights[r * (BLOCK_KEYS / 2) + n / 2]);
                acc[r][2 * half] = multiply_add(acc[r][2 * half], weight, pair[0]);
                acc[r][2 * half + 1] = multiply_add(acc[r][2 * half + 1], weight, pair[1]);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) store(out + r * width + column + c * W, acc[r][c]);
}
#endif

// Restores the order of the columns of a row that `accumulate_stored_pairs` has summed: of each vector the quarter q
// belongs to vector q.
INLINE void unpermute_stored_columns(float *out, int64_t width) {
#if KEYSPAN_VECTOR == 64
    for (int64_t v = 0; v < width; v += 4 * W) {
        __m512 x[4];
        for (int i = 0; i < 4; i++) x[i] = (__m512)load(out + v + i * W);
        const __m512 a = _mm512_shuffle_f32x4(x[0], x[1], 0x44), b = _mm512_shuffle_f32x4(x[0], x[1], 0xee);
        const __m512 c = _mm512_shuffle_f32x4(x[2], x[3], 0x44), d = _mm512_shuffle_f32x4(x[2], x[3], 0xee);
        store(out + v, (vf)_mm512_shuffle_f32x4(a, c, 0x88));
        store(out + v + W, (vf)_mm512_shuffle_f32x4(a, c, 0xdd));
        store(out + v + 2 * W, (vf)_mm512_shuffle_f32x4(b, d, 0x88));
        store(out + v + 3 * W, (vf)_mm512_shuffle_f32x4(b, d, 0xdd));
    }
#endif
}

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
    if constexpr (KIND == STORED_PAIRS) {
        for (; v < dims; v += 4 * W)
            accumulate_stored_pairs<R>(weights, values, keys, offset, v, dims - v, out, width, ahead);
        return;
    }
#endif
    if constexpr (KIND != PAIRS && KIND != STORED_PAIRS) {
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
    float *key_scales = nullptr, *value_scales = nullptr;  // of keys of 8 bits, [G][BLOCK_KEYS]
    Ahead ahead;

    Decoder(const Plan &plan, const Run &run, char *scratch)
        : plan(plan), p(*plan.params), run(run), size(key_size(p)),
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
        if (is_stored(KIND)) {
            key_scales = arena.reserve<float>(p.G * BLOCK_KEYS);
            value_scales = arena.reserve<float>(p.G * BLOCK_KEYS);
        }
        for (int64_t g = 0; g < p.G; g++) {
            load_queries(plan, tiles[g], queries + g * plan.rows * QUERY_WORDS, QUERY_WORDS);
            init_softmax(p, tiles[g], row_of(out, g), plan.value_width);
        }
    }

    int few_values() const {
        const int64_t row = together * p.V * size;
        if (2 * p.B * p.N * row <= CACHE_BYTES) return FEW_VALUES;
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
    // are keys; and the keys' scales.
    void find(int64_t first, int begin, int end) {
        const int last = (end + W - 1) / W * W;
        const int most = (int)min<int64_t>(last, plan.logical_keys - first);
        const char *const k = p.k + run.batch * p.k_stride[0] * size, *const v = p.v + run.batch * p.v_stride[0] * size;
        const int64_t k_step = p.k_stride[1] * size, v_step = p.v_stride[1] * size, N = p.N;
        const char **const k_at = keys, **const v_at = values;
        for (int n = begin; n < most;) {
            const int64_t row = physical_key(p, sequence, first + n);  // one by one behind it, as far as the page goes
            const int64_t left = p.sequence ? p.page_size - (first + n) % p.page_size : most;
            const int from = n, until = (int)min<int64_t>(most, n + left);
            for (int64_t i = row; n < until; i++, n++) {
                const int64_t there = clamp(i, 0, N - 1);
                k_at[n] = k + there * k_step;
                v_at[n] = v + there * v_step;
            }
            if (!is_stored(KIND)) continue;
            if (row >= 0 && row + until - from <= N) {
                find_scales(from, until, row);
                continue;
            }
            for (int i = from; i < until; i++) find_scales(i, i + 1, clamp(row + i - from, 0, N - 1));
        }
        for (int n = most; n < last; n++) {
            keys[n] = keys[most - 1];
            values[n] = values[most - 1];
            for (int64_t g = 0; is_stored(KIND) && g < p.G; g++)
                key_scales[g * BLOCK_KEYS + n] = value_scales[g * BLOCK_KEYS + n] = 0;
        }
    }

    // The keys from `row` on in memory are the block's keys begin to end - 1.
    void find_scales(int begin, int end, int64_t row) {
        copy_scales(p.k_scale, p.k_run, begin, end, row, key_scales);
        copy_scales(p.v_scale, p.v_run, begin, end, row, value_scales);
    }
    void copy_scales(const float *scale, int64_t keys_a_scale, int begin, int end, int64_t row, float *to) const {
        const int64_t G = p.G;
        for (int n = begin, next; n < end; n = next) {
            const int64_t at = row + n - begin, step = keys_a_scale == 1 ? G : 0;
            const float *const from = scales_of(p, scale, keys_a_scale, run.batch, at);
            next = step ? end : (int)min<int64_t>(end, n + keys_a_scale - at % keys_a_scale);
            for (int64_t g = 0; g < G; g++)
                for (int i = n; i < next; i++) to[g * BLOCK_KEYS + i] = from[(i - n) * step + g];
        }
    }

    // Whether all scales of values of group g in `span` are finite.
    bool has_finite_scales(int64_t g, Span span) const {
        vf differences{};
        for (int n = span.begin / W * W; n < span.end; n += W) {
            const vf x = load(value_scales + g * BLOCK_KEYS + n);
            differences += x - x;
        }
        const float total = reduce_add(differences);
        return total == 0;
    }

    Scales scales(int64_t g) const {
        return is_stored(KIND) ? Scales{key_scales + g * BLOCK_KEYS, value_scales + g * BLOCK_KEYS} : Scales{};
    }

    float element(const char *from, int64_t i) const {
        return is_stored(KIND) ? load_first_stored(p.stored, from + i, 1)[0] : load_element(p.dtype, from, i);
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
                    memset(clean[i] + v * size, 0, (size_t)size);
                    if (is_finite(element(from, 0))) memcpy(clean[i] + v * size, from, (size_t)size);
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
                    const float x = unless_finite(element(values[n] + offset, v),
                                                  is_stored(KIND) ? scales(g).values + n : nullptr);
                    if (!is_finite(x)) to[r * plan.value_width + permuted(v)] += x;
                }
            }
        }
    }

    // Where `accumulate_pairs` and `accumulate_stored_pairs` sum column v.
    static int64_t permuted(int64_t v) {
        if (KIND == STORED_PAIRS) return v / 64 * 64 + v % 16 / 4 * 16 + v % 64 / 16 * 4 + v % 4;
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
        Products<Word> products[PRODUCTS];
        const int side = products_of(KIND, rows);
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
                            scores + (g * plan.rows + r) * BLOCK_KEYS, weights_of(g, r, 0), dropout, stats[g],
                            scales(g));
        const Span added{seen.begin / 2 * 2, span.end};
        add_values(added, g0, g1);
        for (int64_t g = g0; g < g1; g++)
            if (has_nonfinite_sums(g) || (is_stored(KIND) && !has_finite_scales(g, added))) repair(s, g, first, last, added);
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
        if (KIND == STORED_PAIRS) unpermute_stored_columns(row, plan.params->V);
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
    if (plan.params->stored) {                \
        if constexpr (HAS_PAIRS)              \
            if (plan.pairs) return call(STORED_PAIRS); \
        return call(STORED_FLOATS);           \
    }                                         \
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
