// The rows of a RowTile: their key spans, score terms (scale, softcap, biases, mask) and dropout. Depends on pack.h.
#pragma once
#include "pack.h"

namespace keyspan {
namespace KEYSPAN_NAMESPACE {
namespace {

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
constexpr float INF = __builtin_inff();

constexpr int SUM_KEYS = 2 * W;  // weights are summed by steps of so many keys, counted from the block's first

struct Span {
    int begin, end;  // keys of a block; empty where begin >= end
};

// Fills `tile` with the rows of a Tile. Decoding counts logical keys.
INLINE void load_tile(const Plan &plan, int64_t b, int64_t g, const Tile &from, RowTile &tile) {
    const Params &p = *plan.params;
    const Segment &segment = plan.segments[from.segment];
    const int64_t row = p.RB == 1 ? 0 : b;  // of lo, hi and diagonal
    tile.batch = b;
    tile.group = g;
    tile.segment = from.segment;
    tile.logical_offset = plan.decode ? 0 : segment.begin - segment.offset;
    tile.origin = segment.origin - tile.logical_offset;
    tile.rows = 0;
    for (int64_t h = from.first_head; h < from.last_head; h++) {
        for (int64_t m = from.first_query; m < from.last_query; m++) {
            const int r = tile.rows++;
            tile.query[r] = (int32_t)m;
            tile.head[r] = (int32_t)h;
            for (int64_t s = 0; s < p.S; s++) {
                const KeyRange range = key_range(p, plan.logical_keys, s, row, m);
                tile.lo[s][r] = range.lo - tile.logical_offset;
                tile.hi[s][r] = range.hi - tile.logical_offset;
                tile.distance_offset[s][r] =
                    tile.logical_offset - (p.lo ? p.diagonal[(s * p.RB + row) * p.M + m] : m);
            }
        }
    }
}

// The last block boundary at or before packed key n.
INLINE int64_t block_begin(const Plan &plan, const RowTile &tile, int64_t n) {
    return tile.origin + (n - tile.origin) / plan.block_keys * plan.block_keys;
}

// The smallest packed interval that holds the keys of range s of every row.
INLINE void tile_span(const RowTile &tile, int s, int64_t &begin, int64_t &end) {
    begin = INT64_MAX;
    end = 0;
    for (int r = 0; r < tile.rows; r++) {
        if (tile.lo[s][r] >= tile.hi[s][r]) continue;
        begin = min<int64_t>(begin, tile.lo[s][r]);
        end = max<int64_t>(end, tile.hi[s][r]);
    }
}

// The keys of block [first, last) that row r sees in range s.
INLINE Span row_span(const RowTile &tile, int s, int r, int64_t first, int64_t last) {
    const int64_t begin = max<int64_t>(tile.lo[s][r], first), end = min<int64_t>(tile.hi[s][r], last);
    return begin < end ? Span{(int)(begin - first), (int)(end - first)} : Span{0, 0};
}

// The keys of block [first, last) that any row sees in range s.
INLINE Span rows_span(const RowTile &tile, int s, int64_t first, int64_t last) {
    Span all{BLOCK_KEYS, 0};
    for (int r = 0; r < tile.rows; r++) {
        const Span one = row_span(tile, s, r, first, last);
        if (one.begin < one.end) all = Span{min(all.begin, one.begin), max(all.end, one.end)};
    }
    return all;
}

// The spans of all rows, and their union for each group of ROWS rows, widened to whole vectors.
INLINE void row_spans(const RowTile &tile, int s, int64_t first, int64_t last, Span *seen, Span *groups) {
    for (int r0 = 0; r0 < tile.rows; r0 += ROWS, groups++) {
        int begin = BLOCK_KEYS, end = 0;
        for (int r = r0; r < min(r0 + ROWS, tile.rows); r++) {
            seen[r] = row_span(tile, s, r, first, last);
            if (seen[r].begin >= seen[r].end) continue;
            begin = min(begin, seen[r].begin);
            end = max(end, seen[r].end);
        }
        *groups = Span{begin / W * W, (end + W - 1) / W * W};
    }
}

// Calls work(s, first, last) for keys first to last - 1 of every block and range that some row of the tile may see, block
// by block. `first` is the block's first key, which may lie before those that are packed.
template <class Work>
INLINE void each_block(const Plan &plan, const RowTile &tile, const Work &work) {
    const int ranges = (int)plan.params->S;
    int64_t begin[MAX_RANGES], end[MAX_RANGES], first = INT64_MAX, last = 0;
    for (int s = 0; s < ranges; s++) {
        tile_span(tile, s, begin[s], end[s]);
        if (begin[s] >= end[s]) continue;
        first = min(first, begin[s]);
        last = max(last, end[s]);
    }
    if (first >= last) return;
    for (first = block_begin(plan, tile, first); first < last; first += plan.block_keys)
        for (int s = 0; s < ranges; s++)
            if (begin[s] < first + plan.block_keys && end[s] > first && begin[s] < end[s])
                work(s, first, min(first + plan.block_keys, end[s]));
}

INLINE const char *query_row(const Params &p, const RowTile &tile, int r) {
    return p.q + (tile.batch * p.q_stride[0] + tile.query[r] * p.q_stride[1] + tile.group * p.q_stride[2] +
                  tile.head[r] * p.q_stride[3]) *
                     dtype_size(p.dtype);
}

// Index of a row in [B, M, G, H] (out, dq) and in [B, G, H, M] (lse).
INLINE int64_t out_row(const Params &p, const RowTile &tile, int r) {
    return ((tile.batch * p.M + tile.query[r]) * p.G + tile.group) * p.H + tile.head[r];
}

INLINE int64_t lse_row(const Params &p, const RowTile &tile, int r) {
    return ((tile.batch * p.G + tile.group) * p.H + tile.head[r]) * p.M + tile.query[r];
}

INLINE int64_t head_index(const Params &p, const RowTile &tile, int r) { return tile.group * p.H + tile.head[r]; }

// ---- terms of the score --------------------------------------------------------------------------------------------

// Whether scores are more than products times a positive number. Without terms the products themselves serve as scores.
INLINE bool has_score_terms(const Params &p) {
    return p.softcap != 0 || p.bias_count || p.slopes || p.table || p.mask || !((float)p.scale > 1e-30f);
}

// A weight is 2^(score · multiplier), where a score is a product (no terms) or the natural logarithm of a weight.
// Maxima are subtracted before the multiplication, so that every finite score stays finite.
INLINE float score_multiplier(const Params &p) { return has_score_terms(p) ? LOG2E : (float)p.scale * LOG2E; }

// Takes scores to natural logarithms.
INLINE float natural_multiplier(const Params &p) { return has_score_terms(p) ? 1 : (float)p.scale; }

// A learned sink as a score.
INLINE float sink_score(const Params &p, int64_t head) {
    const float largest = 3.4028234663852886e38f;
    return has_score_terms(p) ? p.sinks[head] : max(-largest, min(largest, p.sinks[head] / (float)p.scale));
}

INLINE int64_t dense_row(const Dense &d, const RowTile &tile, int r) {
    return tile.batch * d.stride[0] + tile.group * d.stride[1] + tile.head[r] * d.stride[2] +
           tile.query[r] * d.stride[3];
}

// Lanes [begin, end) of the vector at logical key j. Other lanes are not read: they may lie outside the tensor.
INLINE vf load_bias(const Dense &d, int64_t row, int64_t j, int begin, int end) {
    if (d.stride[4] == 0) return broadcast(load_element(d.dtype, (const char *)d.data, row));
    if (d.stride[4] == 1 && begin == 0 && end == W) {
        if (d.dtype == F32) return load((const float *)d.data + row + j);
        const uint16_t *half = (const uint16_t *)d.data + row + j;
        return d.dtype == BF16 ? widen_bf16(half) : widen_f16(half);
    }
    vf x{};
    for (int i = begin; i < end; i++) x[i] = load_element(d.dtype, (const char *)d.data, row + (j + i) * d.stride[4]);
    return x;
}

INLINE vi load_mask(const Dense &d, int64_t row, int64_t j, int begin, int end) {
    const uint8_t *const at = (const uint8_t *)d.data + row + j * d.stride[4];
    if (d.stride[4] == 1 && begin == 0 && end == W) return -__builtin_convertvector(*(const vb_any *)at, vi);
    vi x{};
    for (int i = begin; i < end; i++) x[i] = -at[i * d.stride[4]];
    return x;
}

// distance, distance + 1, … as floats.
INLINE vf distances(int64_t distance) {
    if (distance < INT32_MIN || distance > INT32_MAX - W) return broadcast((float)distance);
    return __builtin_convertvector(broadcast((int32_t)distance) + iota(), vf);
}

INLINE bool mask_bit(const Dense &d, const RowTile &tile, int r, int64_t j) {
    return ((const uint8_t *)d.data)[dense_row(d, tile, r) + j * d.stride[4]];
}

INLINE vf load_table(const float *table, int64_t reach, int64_t distance) {
    if (distance >= -reach && distance + W - 1 <= reach) return load(table + reach + distance);
    vf x;
    for (int i = 0; i < W; i++) x[i] = table[reach + max(-reach, min(reach, distance + i))];
    return x;
}

// Products to scores, hidden ones −inf, for the whole vectors around `span`; `score` [BLOCK_KEYS].
// `softcap_grad`, where given, gets the derivative of the softcap.
void apply_score_terms(const Plan &plan, const RowTile &tile, int s, int r, int64_t first, Span span, float *score,
                       float *softcap_grad) {
    const Params &p = *plan.params;
    const vf scale = broadcast((float)p.scale), cap = broadcast((float)p.softcap),
             per_cap = broadcast((float)(1 / p.softcap));
    const int64_t head = head_index(p, tile, r);
    const float alibi = p.slopes ? p.slopes[(p.slopes_by_batch ? tile.batch * p.G * p.H : 0) + head] : 0;
    const float *table = p.table ? p.table + head * (2 * p.reach + 1) : nullptr;
    for (int n = span.begin / W * W; n < span.end; n += W) {
        const int begin = max(0, span.begin - n), end = min(W, span.end - n);
        const int64_t packed = first + n, j = packed + tile.logical_offset;
        const int64_t distance = packed + tile.distance_offset[s][r];
        vf x = load(score + n) * scale;
        if (p.softcap != 0) {
            const vf unit = tanh(x * per_cap);
            if (softcap_grad) store(softcap_grad + n, 1.0f - unit * unit);
            x = unit * cap;
        }
        for (int64_t i = 0; i < p.bias_count; i++)
            x += load_bias(p.biases[i], dense_row(p.biases[i], tile, r), j, begin, end);
        if (p.slopes) x -= alibi * abs(distances(distance));
        if (table) x += load_table(table, p.reach, distance);
        if (p.mask) x = load_mask(*p.mask, dense_row(*p.mask, tile, r), j, begin, end) ? x : broadcast(-INF);
        store(score + n, x);
    }
}

// Products to scores, hidden ones −inf, in the whole steps of SUM_KEYS around `span`.
__attribute__((noinline)) void row_scores(const Plan &plan, const RowTile &tile, int s, int r, int64_t first, Span span,
                                          float *score, float *softcap_grad) {
    if (has_score_terms(*plan.params)) apply_score_terms(plan, tile, s, r, first, span, score, softcap_grad);
    const vf hidden = broadcast(-INF);
    const vi lane = iota();
    for (int n = span.begin / SUM_KEYS * SUM_KEYS; n < span.begin; n += W)
        store(score + n, lane >= broadcast(span.begin - n) ? load(score + n) : hidden);
    for (int n = span.end / W * W; n % SUM_KEYS || n < span.end; n += W)
        store(score + n, lane < broadcast(span.end - n) ? load(score + n) : hidden);
}

// ---- dropout -------------------------------------------------------------------------------------------------------

// Dropout factors of packed keys first … first + count − 1: 0 or `kept`. Word `key % 4` of Philox 4x32-10 (Salmon
// et al. 2011) at counter (logical key / 4, query, head, batch) decides.
// What dropout multiplies the weights by that it keeps.
INLINE float dropout_scale(const Params &p) { return p.seed ? (float)(1 / (1 - p.dropout_p)) : 1; }

void fill_dropout(const Params &p, const RowTile &tile, int r, int64_t first, int count, float kept, float *dropout) {
    const uint64_t seed = (uint64_t)*p.seed;
    const double threshold = __builtin_nearbyint(p.dropout_p * 4294967296.0);
    const bool drop_all = threshold >= 4294967296.0;  // p rounds to 1: drop every weight
    const uint32_t first_kept = drop_all ? 0 : (uint32_t)threshold;
    const float scale = drop_all ? 0 : kept;
    constexpr int COUNTERS = BLOCK_KEYS / 4 + 1;
    uint32_t c0[COUNTERS], c1[COUNTERS], c2[COUNTERS], c3[COUNTERS];
    const int64_t key = first + tile.logical_offset;
    const uint32_t block = (uint32_t)(key / 4);
    const int skipped = (int)(key % 4), counters = (skipped + count + 3) / 4;
    for (int i = 0; i < counters; i++) {
        c0[i] = block + (uint32_t)i;
        c1[i] = (uint32_t)tile.query[r];
        c2[i] = (uint32_t)head_index(p, tile, r);
        c3[i] = (uint32_t)tile.batch;
    }
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        for (int i = 0; i < counters; i++) {
            const uint64_t p0 = (uint64_t)c0[i] * 0xD2511F53u, p1 = (uint64_t)c2[i] * 0xCD9E8D57u;
            c0[i] = (uint32_t)(p1 >> 32) ^ c1[i] ^ k0;
            c1[i] = (uint32_t)p1;
            c2[i] = (uint32_t)(p0 >> 32) ^ c3[i] ^ k1;
            c3[i] = (uint32_t)p0;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    const uint32_t *const words[4] = {c0, c1, c2, c3};
    for (int n = 0; n < count; n++) dropout[n] = words[(skipped + n) % 4][(skipped + n) / 4] >= first_kept ? scale : 0;
}

// ---- NaN repair ----------------------------------------------------------------------------------------------------
//
// A gemm adds weight · value for whole blocks, hidden keys with weight 0. Where a hidden key or value holds NaN or inf,
// 0 · NaN = NaN would reach rows that do not see it: such a product reads a copy with zeros in their place, which gives
// all other rows the same bits, and what a row sees of them is added afterwards.

// Whether row r sees packed key n in range s.
INLINE bool is_visible(const Params &p, const RowTile &tile, int s, int r, int64_t n) {
    if (n < tile.lo[s][r] || n >= tile.hi[s][r]) return false;
    return !p.mask || mask_bit(*p.mask, tile, r, n + tile.logical_offset);
}

// weight · x, or x itself where it is infinite or NaN: a visible non-finite element is not hidden by a weight of 0.
INLINE float multiply_unless_nonfinite(float weight, float x) { return x - x == 0 ? weight * x : x; }

// A value, or what is infinite or NaN where its scale is: any number times the scale. `scale` may be null.
INLINE float unless_finite(float x, const float *scale) { return !scale || is_finite(*scale) ? x : x * *scale; }

// Element (row, i) of rows packed as floats, or as pairs of bf16 rows.
INLINE float packed_element(const float *rows, int64_t width, int64_t row, int64_t i) { return rows[row * width + i]; }
INLINE float packed_element(const uint32_t *rows, int64_t width, int64_t row, int64_t i) {
    const uint32_t pair = rows[row / 2 * width + i];
    return from_bf16((uint16_t)(row % 2 ? pair >> 16 : pair));
}

INLINE void set_packed_element(float *rows, int64_t width, int64_t row, int64_t i, float x) { rows[row * width + i] = x; }
INLINE void set_packed_element(uint32_t *rows, int64_t width, int64_t row, int64_t i, float x) {
    ((uint16_t *)(rows + row / 2 * width + i))[row % 2] = to_bf16(x);  // x is a bf16 number
}

}  // namespace
}  // namespace KEYSPAN_NAMESPACE
}  // namespace keyspan
