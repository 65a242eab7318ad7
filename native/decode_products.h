// Decoding: products of query rows and keys, and sums of weighted values, read from where they lie.
#pragma once
#include "decode_prefetch.h"
#include "decode_rows.h"

namespace keyspan {
namespace KEYSPAN_NAMESPACE {
namespace {

constexpr int PRODUCTS = 4;                   // most products that are summed side by side
constexpr int VALUE_ROWS = W == 16 ? 6 : 4;  // query rows that each loaded value is multiplied by
constexpr int FEW_ROWS = 4;                   // query rows up to which memory is the bound, not arithmetic

// Most query rows that each key is multiplied by. There are fewer versions for dtypes that are widened.
constexpr int key_rows(int kind) {
    return W < 16 ? W / 2 : kind == F32 || kind == PAIRS || kind == STORED_PAIRS ? 12 : 6;
}

// How many of `rows` query rows `score_rows` takes: parts as equal as can be, of 1 to 8, 10 or 12 rows.
template <int KIND>
int score_part(int rows) {
    const int parts = (rows + key_rows(KIND) - 1) / key_rows(KIND), part = (rows + parts - 1) / parts;
    if (part <= 8 || part % 2 == 0) return part;
    return part < rows ? part + 1 : (part + 1) / 2;
}

// Rows of one group of keys or values.
struct Rows {
    const char *const *at;  // addresses of the rows of the first group; null: no rows
    int64_t offset;         // bytes from the first group to this one
    INLINE const char *operator[](int64_t n) const { return at[n] + offset; }
    INLINE Rows from(int64_t bytes) const { return {at, offset + bytes}; }
};

// Query rows and W keys of one group; and W keys of a later product, or none, which are prefetched in the order in which
// it reads them.
template <class Word>
struct Products {
    Rows keys, next;
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
            if (whole) {
                const char *const from = ahead.take(LINES, of[c].keys[0] + i * Kind::BYTES);
                if (of[c].next.at) {  // a line of LINES keys: of all, or of one half of them and then the other
                    const Rows next = of[c].next.from(i * Kind::BYTES);
                    const int64_t first = i / Kind::STEP * LINES % W;
#pragma GCC unroll 16
                    for (int k = 0; k < LINES; k++) __builtin_prefetch(next[first + k], 0, 3);
                }
#pragma GCC unroll 16
                for (int k = 0; k < W; k++) {
                    // Between the loads: more requests at once would wait for one another.
                    if (k * LINES % W == 0) __builtin_prefetch(from + k * LINES / W * 64, 0, 3);
                    words[k] = (vu)Kind::read(of[c].keys[k], i);
                    if (k % 4 == 3) asm volatile("" : : : "memory");  // compilers would gather the requests
                }
                transpose_vectors(words);
            } else {
                read_last_words<KIND>(of[c].keys.at, of[c].keys.offset, i, dims - i, words);
            }
            const auto *query = of[c].queries + i / Kind::STEP * W * Kind::PARTS;
#pragma GCC unroll 16
            for (int k = 0; k < W; k++) {
                if (!whole && i + k * WORD >= dims) break;
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
// more, because each reads other lines of W keys. Pairs take longer than floats. From memory, few rows are not bound by
// latency.
constexpr int products_of(int kind, int rows, bool in_memory) {
    if (rows <= 2) return in_memory ? 1 : rows == 1 ? PRODUCTS : 2;
    return rows <= FEW_ROWS && (kind == PAIRS || is_stored(kind)) ? 2 : 1;
}

template <int R, int KIND>
INLINE void score_each(int count, const Products<typename Row<KIND>::Word> *of, int64_t dims, Ahead &ahead) {
    constexpr int SIDE = products_of(KIND, R, false);
    if (count == SIDE) return score_keys<R, SIDE, KIND>(of, dims, ahead);
    for (int c = 0; c < count; c++) score_keys<R, 1, KIND>(of + c, dims, ahead);
}

template <int KIND>
void score_rows(int rows, int count, const Products<typename Row<KIND>::Word> *of, int64_t dims, Ahead &ahead) {
#define KEYSPAN_SCORE(R) \
    case R: return score_each<min(R, key_rows(KIND)), KIND>(count, of, dims, ahead);
    switch (rows) {
        KEYSPAN_SCORE(1) KEYSPAN_SCORE(2) KEYSPAN_SCORE(3) KEYSPAN_SCORE(4) KEYSPAN_SCORE(5) KEYSPAN_SCORE(6)
        KEYSPAN_SCORE(7) KEYSPAN_SCORE(8) KEYSPAN_SCORE(10) KEYSPAN_SCORE(12)
    }
#undef KEYSPAN_SCORE
}

template <int COUNT>
INLINE void prefetch_lines(const char *from) {
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; i++) __builtin_prefetch(from + i * 64, 0, 3);
}

// out[r] += Σ weight · value over `keys` keys, one after the other, for C vectors of columns. Rows of values have `left`
// columns left, which may end within the last vector. weights [R][BLOCK_KEYS]. The same columns of `next`, [keys] or
// none, are prefetched.
template <int R, int C, int KIND>
INLINE void accumulate_columns(const float *weights, Rows values, Rows next, int keys, int64_t column, int64_t left,
                               float *out, int64_t width, Ahead &ahead) {
    constexpr int LINES = (C * W * Row<KIND>::BYTES + 63) / 64;
    const Row<KIND> kind(ahead.p.stored);
    vf acc[R][C];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) acc[r][c] = load(out + r * width + column + c * W);
    for (int n = 0; n < keys; n++) {
        const char *const at = values[n];
        vf value[C];
        if (next.at)
            prefetch_lines<LINES>(next[n] + column * Row<KIND>::BYTES);
        else
            ahead.lines(LINES);
#pragma GCC unroll 4
        for (int c = 0; c < C; c++)
            if constexpr (is_stored(KIND))
                value[c] = c < C - 1 || left >= C * W ? kind.read_value(at, column + c * W)
                                                      : kind.read_last_value(at, column + c * W, left - c * W);
            else
                value[c] = c < C - 1 || left >= C * W ? kind.read(at, column + c * W)
                                                      : kind.read_last(at, column + c * W, left - c * W);
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
INLINE void accumulate_pairs(const uint32_t *weights, Rows values, Rows next, int keys, int64_t column, int64_t left,
                             float *out, int64_t width, Ahead &ahead) {
    vf acc[R][2 * C];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 2 * C; c++) acc[r][c] = load(out + r * width + column + c * W);
    for (int n = 0; n < keys; n += 2) {
        vu pair[2 * C];
        if (!next.at) ahead.lines(2 * C);
#pragma GCC unroll 2
        for (int c = 0; c < C; c++) {
            const int64_t at = (column + c * 2 * W) * 2;
            const uint16_t *a = (const uint16_t *)(values[n] + at);
            const uint16_t *b = (const uint16_t *)(values[n + 1] + at);
            if (next.at) {
                __builtin_prefetch(next[n] + at, 0, 3);
                __builtin_prefetch(next[n + 1] + at, 0, 3);
            }
            const bool whole = c < C - 1 || left >= C * 2 * W;
            const __m512i x = (__m512i)(whole ? load_pairs(a) : load_first_pairs(a, left - c * 2 * W));
            const __m512i y = (__m512i)(whole ? load_pairs(b) : load_first_pairs(b, left - c * 2 * W));
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
INLINE void accumulate_stored_pairs(const uint32_t *weights, Rows values, Rows next, int keys, int64_t column,
                                    int64_t left, float *out, int64_t width, Ahead &ahead) {
    const Row<STORED_PAIRS> kind(ahead.p.stored);
    vf acc[R][4];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) acc[r][c] = load(out + r * width + column + c * W);
    const bool whole = left >= 4 * W;
    for (int n = 0; n < keys; n += 2) {
        if (next.at) {
            __builtin_prefetch(next[n] + column, 0, 3);
            __builtin_prefetch(next[n + 1] + column, 0, 3);
        } else {
            ahead.lines(2);
        }
        const char *a = values[n] + column, *b = values[n + 1] + column;
        const __m512i x = (__m512i)(whole ? load_bytes(a) : load_first_bytes(a, left));
        const __m512i y = (__m512i)(whole ? load_bytes(b) : load_first_bytes(b, left));
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
INLINE void accumulate_values(int64_t dims, const typename Row<KIND>::Word *weights, Rows values, Rows next, int keys,
                              float *out, int64_t width, Ahead &ahead) {
#define KEYSPAN_COLUMNS(function, ...) \
    function<R, __VA_ARGS__>(weights, values, next, keys, v, dims - v, out, width, ahead)
#if defined(KEYSPAN_AVX512BF16)
    if constexpr (KIND == PAIRS) {
        int64_t v = 0;
        for (; v + 2 * W < dims; v += 4 * W) KEYSPAN_COLUMNS(accumulate_pairs, 2);
        if (v < dims) KEYSPAN_COLUMNS(accumulate_pairs, 1);
        return;
    }
    if constexpr (KIND == STORED_PAIRS) {
        for (int64_t v = 0; v < dims; v += 4 * W)
            accumulate_stored_pairs<R>(weights, values, next, keys, v, dims - v, out, width, ahead);
        return;
    }
#endif
    if constexpr (KIND != PAIRS && KIND != STORED_PAIRS)
        for (int64_t v = 0; v < dims; v += COLUMNS * W) {
            switch ((dims - v + W - 1) / W) {
            case 1: KEYSPAN_COLUMNS(accumulate_columns, 1, KIND); break;
            case 2: KEYSPAN_COLUMNS(accumulate_columns, 2, KIND); break;
            case 3: KEYSPAN_COLUMNS(accumulate_columns, min(3, COLUMNS), KIND); break;
            default: KEYSPAN_COLUMNS(accumulate_columns, COLUMNS, KIND);
            }
        }
#undef KEYSPAN_COLUMNS
}

// Distances from one group to the next: of weights in words, of values in bytes, of sums in floats.
struct GroupSteps {
    int64_t weights, values, out;
};

// Several groups in one call: a call for each would take as long as the few values of one.
template <int KIND>
__attribute__((noinline)) void accumulate_rows(int rows, int64_t dims, const typename Row<KIND>::Word *weights,
                                               Rows values, Rows next, int keys, float *out, int64_t width,
                                               int64_t groups, const GroupSteps &steps, Ahead &ahead) {
#define KEYSPAN_ACCUMULATE(R)                                                                               \
    for (int64_t g = 0; g < groups; g++)                                                                    \
        accumulate_values<R, KIND>(dims, weights + g * steps.weights, values.from(g * steps.values), next, keys, \
                                   out + g * steps.out, width, ahead);                                      \
    return
    switch (rows) {
    case 1: KEYSPAN_ACCUMULATE(1);
    case 2: KEYSPAN_ACCUMULATE(2);
    case 3: KEYSPAN_ACCUMULATE(3);
    case 4: KEYSPAN_ACCUMULATE(4);
    case 5: KEYSPAN_ACCUMULATE((VALUE_ROWS < 5 ? VALUE_ROWS : 5));
    default: KEYSPAN_ACCUMULATE(VALUE_ROWS);
    }
#undef KEYSPAN_ACCUMULATE
}

}  // namespace
}  // namespace KEYSPAN_NAMESPACE
}  // namespace keyspan
