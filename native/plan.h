// How a problem is cut into tiles, units of work and buffers: shared by the planner and the kernels of every
// instruction set.
//
// The visible span of each document (of each batch entry, of each sequence of paged keys) is one segment. Kernels count
// keys in packed positions: a segment is packed from a multiple of PANEL on. Row `r` of a tile sees packed keys lo[r] to
// hi[r] - 1; packed key `n` is the logical key `n + logical_offset`.
//
// The bits of a row do not depend on its tile, its batch entry or the rest of a pack. Scores and weights are computed in
// blocks of `block_keys` keys, counted from the document's first key; each block has its own softmax, relative to its
// own maximum, and its own sum of values, key by key; the blocks are merged in their order (forward.h).
#pragma once
#include <atomic>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "params.h"

namespace keyspan {

// Under the address sanitizer each part of the workspace ends in poisoned bytes.
#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t GUARD = 64;
#define KEYSPAN_GUARD(start, size)                         \
    (__asan_unpoison_memory_region(start, (size_t)(size)), \
     __asan_poison_memory_region((char *)(start) + (size), (size_t)((63 - ((size) + 63) % 64) + GUARD)))
#else
constexpr int64_t GUARD = 0;
#define KEYSPAN_GUARD(start, size) ((void)0)
#endif

constexpr int PANEL = 64;                        // keys packed side by side
constexpr int TILE_ROWS = 96;                    // most rows of a RowTile; a multiple of 6 and of 2
constexpr int BLOCK_KEYS = 256;                  // most keys whose scores a tile holds; a multiple of PANEL
constexpr int64_t PACKED_CACHE_BYTES = 8 << 20;  // packed keys held at a time, so that they stay in cache
constexpr int MAX_HEAD_DIM = 256;                // of keys and values
constexpr int STATS_BYTES = 5 * TILE_ROWS * 4;      // BlockStats of forward.h
constexpr int MAX_RANGES = 4;                    // key ranges of a row
constexpr int CHUNK_TILES = 8;                    // tiles of a chunk
constexpr int SPLIT_BLOCKS = 4;                  // blocks of one unit of work in decoding, where threads share a row
constexpr int QUERY_WORDS = MAX_HEAD_DIM + 16;  // of a query row in decoding; no power of two, whose rows share cache sets
constexpr int LONG_KEYS = 1024;                  // keys of a long cache
constexpr int DECODE_ROWS = 48;   // most query rows for each key for which keys of a long cache are not packed

// ---- clamps
// ----------------------------------------------------------------------------------------------------------
//
// The tensors of a mask may hold any numbers. Bounds and indices are clamped wherever they are read, so that no access
// leaves its tensor. Functions here are static: each instruction set has its own copy.

static inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// Keys that a query can address; none where there is no memory behind them. `lo` and `hi` are int32.
static inline int64_t logical_keys(const Params &p) {
    if (!p.sequence) return clamp(p.N, 0, INT32_MAX);
    if (!p.N || !p.sequences || !p.pages) return 0;
    return p.pages > INT32_MAX / p.page_size ? INT32_MAX : p.pages * p.page_size;
}

// First key of the document of query m in row b of [RB, M].
static inline int64_t origin_of(const Params &p, int64_t keys, int64_t b, int64_t m) {
    return p.origin && !p.sequence ? clamp(p.origin[b * p.M + m], 0, keys) : 0;
}

struct KeyRange {
    int64_t lo, hi;  // logical keys; empty where lo >= hi
};

// Range s of query m in row b of [S, RB, M].
static inline KeyRange key_range(const Params &p, int64_t keys, int64_t s, int64_t b, int64_t m) {
    if (!p.lo) return {0, keys};
    const int64_t at = (s * p.RB + b) * p.M + m;
    return {clamp(p.lo[at], 0, keys), clamp(p.hi[at], 0, keys)};
}

// The row of block_table that query m reads.
static inline int64_t sequence_of(const Params &p, int64_t m) {
    return p.sequence ? clamp(p.sequence[m], 0, p.sequences > 0 ? p.sequences - 1 : 0) : 0;
}

struct Segment {
    int64_t origin;  // the document's first key: blocks are counted from it
    int64_t begin;   // first logical key that is packed, a multiple of PANEL behind the origin
    int64_t offset;  // its packed position, a multiple of PANEL
    int64_t length;  // keys
    int64_t sequence;  // of paged keys, the row of block_table
};

// Queries of one segment for some heads of a group: those of a RowTile.
struct Tile {
    int64_t first_query, last_query, first_head, last_head, segment;
    int64_t visible_pairs;  // of one head, and a tile's fixed cost
};

// Some tiles of one segment, all heads of a group: what backward sums from zero. Sums of chunks are added up in the order
// of the chunks, so that they do not depend on which thread computes which chunk.
struct Chunk {
    int64_t first_tile, last_tile, segment;
    int64_t index;              // among the chunks of this segment
    int64_t begin, end;         // packed keys that its rows see, in whole panels
    int64_t visible_pairs;
};

// Blocks first_block to last_block - 1 of a tile and all groups: a unit of work in decoding.
struct Run {
    int64_t batch, tile, first_block, last_block;
    int64_t partial;  // index of the first block's partial result; -1: the unit holds all blocks and writes results
};

struct Plan {
    const Params *params;
    int64_t logical_keys;  // keys that a query can address
    bool backward;
    bool decode;           // few query rows for each key: keys are read from where they lie, unpacked
    bool pairs;            // keys are packed as pairs of bf16
    int64_t block_keys;    // keys of a block of scores
    int64_t visible_pairs;           // of all heads and batch entries
    int64_t rows;                    // of the largest tile
    int64_t packed_keys;             // of one batch entry and group, a multiple of PANEL
    int64_t key_width, value_width;  // K and V padded to whole vectors
    const Segment *segments;
    const int64_t *segment_of_panel;  // [RB][packed_keys / PANEL], -1 behind the last
    const int64_t *first_segment;     // [RB + 1], where each batch entry's segments begin
    int64_t segment_count;
    const Tile *tiles;
    const int64_t *first_tile;  // [RB + 1], where each batch entry's tiles begin
    const Chunk *chunks;
    const int64_t *first_chunk;  // [RB + 1], where each batch entry's chunks begin
    bool shared_slots;           // backward: threads share the work on a (batch, group)
    // A slot holds the packed keys and values of one (batch, group), the last two forms for backward only. The strides
    // are those between slots, in bytes.
    int64_t slots;
    char *keys_by_dim, *value_rows, *key_rows, *values_by_dim;
    float *key_scales, *value_scales;  // of keys and values of 8 bits, [slots][packed_keys]
    int64_t keys_by_dim_stride, value_rows_stride, key_rows_stride, values_by_dim_stride;
    float *grad_keys, *grad_values;  // backward: fp32 sums, [slots][packed_keys][width]
    float *chunk_keys, *chunk_values;  // those of a chunk but for the first of a segment, [threads][packed_keys][width]
    float *chunk_biases;               // those of what all queries share, [threads][H][bias_width]
    int64_t bias_width;
    float *partial;                  // decoding: [block, range, g, rows, value_width + 3] of each run of a shared tile
    char *scratch;                   // [threads][scratch_stride]
    int64_t scratch_stride;
    std::atomic<int> *nonfinite_keys, *nonfinite_values;  // [slots][segments], 1 where an element is infinite or NaN
};

// Sums of gradients of what all queries share: for each head first slopes and sinks, then the table, then each dense bias
// without a row for each query.
struct BiasSums {
    // Calls use(to, offset, count) for each: where its sums of (b, g) and head 0 lie, which heads follow in steps of
    // `count`, and its offset in the sums of a head.
    template <class Use>
    static void each(const Params &p, int64_t b, int64_t g, const Use &use) {
        const int64_t first = (b * p.G + g) * p.H, width = 2 * p.reach + 1;
        int64_t at = 2;
        if (p.dslopes) use(p.dslopes + first, 0, 1);
        if (p.dsinks) use(p.dsinks + first, 1, 1);
        if (p.dtable) use(p.dtable + first * width, at, width);
        if (p.dtable) at += width;
        for (int64_t i = 0; i < p.bias_count; i++) {
            const Dense &d = p.biases[i];
            if (!d.grad || d.grad_stride[3]) continue;  // a row for each query
            const int64_t count = d.columns;
            use(d.grad + first * count, at, count);
            at += count;
        }
    }
};

// A row is one query of one head. A RowTile holds the rows of one Tile: head by head, and in each head query by query.
struct RowTile {
    int64_t batch, group, segment;
    int64_t logical_offset;  // packed key + this = logical key; 0 in decoding, which counts logical keys
    int64_t origin;          // packed position of the document's first key; may lie before the packed keys
    int rows;
    int32_t query[TILE_ROWS], head[TILE_ROWS];
    int64_t lo[MAX_RANGES][TILE_ROWS], hi[MAX_RANGES][TILE_ROWS];  // packed keys
    int64_t distance_offset[MAX_RANGES][TILE_ROWS];  // packed key + this = key position minus query position
    // A weight is 2^((score − row_max) · multiplier). Forward: row_max is the running maximum of the scores; row_sum
    // sums the weights for lse, and weight_sum sums them as they are multiplied, rounded to bf16 where values are.
    float row_max[TILE_ROWS], row_sum[TILE_ROWS], weight_sum[TILE_ROWS];
    // Backward: a weight is 2^((score − row_max) · multiplier − log2_sum); delta is Σ out · grad_out − grad_lse.
    float log2_sum[TILE_ROWS], delta[TILE_ROWS];
    // Backward, for the gradient of ALiBi slopes: Σ grad and Σ weight over keys, and both times distance.
    float grad_sum[TILE_ROWS], full_sum[TILE_ROWS], grad_distance[TILE_ROWS], weight_distance[TILE_ROWS];
    float grad_ends[2][TILE_ROWS], weight_ends[2][TILE_ROWS];  // keys at or beyond the table's first and last distance
};

// One table for each instruction set. `pack` fills one panel of a slot; `forward`, `decode` and `backward` compute one
// unit of work; `combine` merges the blocks of a group of a tile that several runs have decoded; `write_key_grads` writes
// dk and dv.
// `backward` adds to sums of gradients: of keys, of values, and [H][bias_width] of biases, see BiasSums.
struct Kernels {
    void (*pack)(const Plan &, bool backward, int64_t slot, int64_t batch, int64_t group, int64_t panel);
    void (*forward)(const Plan &, int64_t slot, int64_t batch, int64_t group, const Tile &, char *scratch);
    void (*decode)(const Plan &, const Run &, char *scratch);
    void (*combine)(const Plan &, const Run &, int64_t group, char *scratch);
    void (*backward)(const Plan &, int64_t slot, int64_t batch, int64_t group, const Chunk &, float *grad_keys,
                     float *grad_values, float *grad_biases, char *scratch);
    void (*write_key_grads)(const Plan &, int64_t batch, int64_t group, const float *grad_keys,
                            const float *grad_values);
    bool has_pairs;
};

namespace portable {
const Kernels *kernels();
}
namespace avx2 {
const Kernels *kernels();
}
namespace avx512 {
const Kernels *kernels();
}
namespace avx512bf16 {
const Kernels *kernels();
}

}  // namespace keyspan
