// The rows of a tile: which keys they see, what is added to their scores, what dropout keeps. Knows no products.
#pragma once
#include "pack.h"

namespace keyspan {
namespace KEYSPAN_NAMESPACE {
namespace {

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
constexpr float INF = __builtin_inff();

struct Span {
    int begin, end;  // of a block, in keys; empty where begin >= end
};

// Rows of queries `query_tile` of heads `head_tile`.
INLINE void load_tile(const Plan &plan, int64_t b, int64_t g, int64_t head_tile, int64_t query_tile, Tile &tile) {
    const Params &p = *plan.params;
    const int64_t m0 = query_tile * plan.tile_queries, m1 = least(m0 + plan.tile_queries, p.M);
    const int64_t h0 = head_tile * plan.tile_heads, h1 = least(h0 + plan.tile_heads, p.H);
    tile.batch = b;
    tile.group = g;
    tile.rows = 0;
    for (int64_t h = h0; h < h1; h++) {
        for (int64_t m = m0; m < m1; m++) {
            const int r = tile.rows++;
            tile.query[r] = (int32_t)m;
            tile.head[r] = (int32_t)h;
            int64_t shift = 0;
            if (!plan.decode) {
                const Segment &segment = plan.segments[p.sequence ? p.sequence[m] : p.RB == 1 ? 0 : b];
                shift = segment.begin - segment.offset;
            }
            tile.shift[r] = shift;
            for (int64_t s = 0; s < p.S; s++) {
                const int64_t at = (s * p.RB + (p.RB == 1 ? 0 : b)) * p.M + m;
                tile.lo[s][r] = p.lo ? (int32_t)(p.lo[at] - shift) : 0;
                tile.hi[s][r] = p.lo ? (int32_t)(p.hi[at] - shift) : (int32_t)plan.logical_keys;
                tile.distance[s][r] = (int32_t)(shift - (p.lo ? p.diagonal[at] : (int32_t)m));
            }
        }
    }
}

// Packed keys that some row sees in range s.
INLINE void tile_span(const Tile &tile, int s, int64_t &begin, int64_t &end) {
    begin = INT32_MAX;
    end = 0;
    for (int r = 0; r < tile.rows; r++) {
        if (tile.lo[s][r] >= tile.hi[s][r]) continue;
        begin = least<int64_t>(begin, tile.lo[s][r]);
        end = most<int64_t>(end, tile.hi[s][r]);
    }
}

// The keys of a block that row r sees in range s.
INLINE Span row_span(const Tile &tile, int s, int r, int64_t first, int64_t last) {
    const int64_t begin = most<int64_t>(tile.lo[s][r], first), end = least<int64_t>(tile.hi[s][r], last);
    return begin < end ? Span{(int)(begin - first), (int)(end - first)} : Span{0, 0};
}

// Whole vectors of keys that rows r0 to r1 - 1 see between them.
INLINE Span rows_span(const Tile &tile, int s, int r0, int r1, int64_t first, int64_t last) {
    Span all{BLOCK_KEYS, 0};
    for (int r = r0; r < r1; r++) {
        const Span one = row_span(tile, s, r, first, last);
        if (one.begin >= one.end) continue;
        all.begin = least(all.begin, one.begin / W * W);
        all.end = most(all.end, (one.end + W - 1) / W * W);
    }
    return all;
}

INLINE const char *query_row(const Params &p, const Tile &tile, int r) {
    return p.q + (tile.batch * p.q_stride[0] + tile.query[r] * p.q_stride[1] + tile.group * p.q_stride[2] +
                  tile.head[r] * p.q_stride[3]) *
                     size_of(p.dtype);
}

// Index of a row in [B, M, G, H] (out, dq) and in [B, G, H, M] (lse).
INLINE int64_t out_row(const Params &p, const Tile &tile, int r) {
    return ((tile.batch * p.M + tile.query[r]) * p.G + tile.group) * p.H + tile.head[r];
}

INLINE int64_t lse_row(const Params &p, const Tile &tile, int r) {
    return ((tile.batch * p.G + tile.group) * p.H + tile.head[r]) * p.M + tile.query[r];
}

INLINE int64_t head_index(const Params &p, const Tile &tile, int r) { return tile.group * p.H + tile.head[r]; }

// ---- terms of the score -----------------------------------------------------------------------------------------------

// Whether a score is more than a product times a positive number, which leaves the largest the largest.
INLINE bool has_terms(const Params &p) {
    return p.softcap != 0 || p.bias_count || p.slopes || p.table || p.mask || !((float)p.scale > 0);
}

INLINE int64_t dense_row(const Dense &d, const Tile &tile, int r) {
    return tile.batch * d.stride[0] + tile.group * d.stride[1] + tile.head[r] * d.stride[2] +
           tile.query[r] * d.stride[3];
}

// Lanes [begin, end) of the vector at logical key j; the others are not read, for nothing need be there.
INLINE vf load_bias(const Dense &d, int64_t row, int64_t j, int begin, int end) {
    if (d.stride[4] == 0) return all(element(d.dtype, (const char *)d.data, row));
    if (d.stride[4] == 1 && begin == 0 && end == W) {
        if (d.dtype == F32) return load((const float *)d.data + row + j);
        const uint16_t *half = (const uint16_t *)d.data + row + j;
        return d.dtype == BF16 ? widen_bf16(half) : widen_f16(half);
    }
    vf x{};
    for (int i = begin; i < end; i++) x[i] = element(d.dtype, (const char *)d.data, row + (j + i) * d.stride[4]);
    return x;
}

INLINE vi load_mask(const Dense &d, int64_t row, int64_t j, int begin, int end) {
    vi x{};
    for (int i = begin; i < end; i++) x[i] = -((const uint8_t *)d.data)[row + (j + i) * d.stride[4]];
    return x;
}

INLINE vf load_table(const float *table, int64_t reach, int64_t distance) {
    if (distance >= -reach && distance + W - 1 <= reach) return load(table + reach + distance);
    vf x;
    for (int i = 0; i < W; i++) x[i] = table[reach + most(-reach, least(reach, distance + i))];
    return x;
}

// Products of a row to scores in powers of two, hidden ones −inf; `slopes`, where given, gets the softcap's derivative.
// Covers the whole vectors around `span`.
void finish_scores(const Plan &plan, const Tile &tile, int s, int r, int64_t first, Span span, float *score,
                   float *slopes) {
    const Params &p = *plan.params;
    const vf scale = all((float)p.scale), cap = all((float)p.softcap), per_cap = all((float)(1 / p.softcap));
    const int64_t head = head_index(p, tile, r);
    const float alibi = p.slopes ? p.slopes[(p.slopes_by_batch ? tile.batch * p.G * p.H : 0) + head] : 0;
    const float *table = p.table ? p.table + head * (2 * p.reach + 1) : nullptr;
    for (int n = span.begin / W * W; n < span.end; n += W) {
        const int begin = most(0, span.begin - n), end = least(W, span.end - n);
        const int64_t packed = first + n, j = packed + tile.shift[r];
        const int32_t distance = (int32_t)packed + tile.distance[s][r];
        vf x = load(score + n) * scale;
        if (p.softcap != 0) {
            const vf unit = tanh(x * per_cap);
            if (slopes) store(slopes + n, 1.0f - unit * unit);
            x = unit * cap;
        }
        for (int64_t i = 0; i < p.bias_count; i++)
            x += load_bias(p.biases[i], dense_row(p.biases[i], tile, r), j, begin, end);
        if (p.slopes) x -= alibi * absolute(__builtin_convertvector(all(distance) + counting(), vf));
        if (table) x += load_table(table, p.reach, distance);
        x *= LOG2E;
        if (p.mask) x = load_mask(*p.mask, dense_row(*p.mask, tile, r), j, begin, end) ? x : all(-INF);
        store(score + n, x);
    }
}

// Products of a row to scores, hidden ones −inf; what these are to be multiplied by to be in powers of two.
INLINE float row_scores(const Plan &plan, const Tile &tile, int s, int r, int64_t first, Span span, float *score,
                        float *slopes) {
    const bool terms = has_terms(*plan.params);
    if (terms) finish_scores(plan, tile, s, r, first, span, score, slopes);
    // The lanes around `span` that a whole vector takes along.
    for (int n = span.begin / W * W; n < span.begin; n++) score[n] = -INF;
    for (int n = span.end; n % W; n++) score[n] = -INF;
    return terms ? 1 : (float)plan.params->scale * LOG2E;
}

// ---- dropout ----------------------------------------------------------------------------------------------------------

// What weights of packed keys first … first + count − 1 are multiplied by: 0 or 1 / (1 − p). Philox 4x32-10 (Salmon et
// al. 2011) of (logical key / 4, query, head, batch); word key % 4 decides. Segments begin at multiples of PANEL, so
// four neighbouring keys share a counter.
void fill_keep(const Params &p, const Tile &tile, int r, int64_t first, int count, float *keep) {
    const uint64_t seed = (uint64_t)*p.seed;
    const double threshold = __builtin_nearbyint(p.dropout_p * 4294967296.0);
    const bool none = threshold >= 4294967296.0;  // p rounds to 1
    const uint32_t least_kept = none ? 0 : (uint32_t)threshold;
    const float scale = none ? 0 : (float)(1 / (1 - p.dropout_p));
    constexpr int COUNTERS = BLOCK_KEYS / 4;
    uint32_t c0[COUNTERS], c1[COUNTERS], c2[COUNTERS], c3[COUNTERS];
    const uint32_t block = (uint32_t)((first + tile.shift[r]) / 4);
    const int counters = (count + 3) / 4;
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
    for (int i = 0; i < counters; i++) {
        keep[4 * i] = c0[i] >= least_kept ? scale : 0;
        keep[4 * i + 1] = c1[i] >= least_kept ? scale : 0;
        keep[4 * i + 2] = c2[i] >= least_kept ? scale : 0;
        keep[4 * i + 3] = c3[i] >= least_kept ? scale : 0;
    }
}

// ---- what is infinite or NaN ------------------------------------------------------------------------------------------

// Whether row r sees packed key n in range s.
INLINE bool sees(const Params &p, const Tile &tile, int s, int r, int64_t n) {
    if (n < tile.lo[s][r] || n >= tile.hi[s][r]) return false;
    if (!p.mask) return true;
    return ((const uint8_t *)p.mask->data)[dense_row(*p.mask, tile, r) + (n + tile.shift[r]) * p.mask->stride[4]];
}

// A weight times an element that may be infinite or NaN, which come through as they are whatever the weight.
INLINE float careful(float weight, float x) { return x - x == 0 ? weight * x : x; }

// Element (row, i) of rows packed in words of T.
INLINE float packed_element(const float *rows, int64_t width, int64_t row, int64_t i) { return rows[row * width + i]; }
INLINE float packed_element(const uint32_t *rows, int64_t width, int64_t row, int64_t i) {
    const uint32_t pair = rows[row / 2 * width + i];
    return from_bf16((uint16_t)(row % 2 ? pair >> 16 : pair));
}

// Element `i` of a row of weights that a product broadcasts.
INLINE float weight_element(const float *row, int64_t i) { return row[i]; }
INLINE float weight_element(const uint32_t *row, int64_t i) { return from_bf16(((const uint16_t *)row)[i]); }

}  // namespace
}  // namespace KEYSPAN_NAMESPACE
}  // namespace keyspan
