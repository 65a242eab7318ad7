// Decoding: few queries against many keys. Keys and values are read once, from where they lie, at the rate of memory.
//
// A unit of work is a run of blocks of keys for all heads of some queries. A block takes three passes: scores, weights,
// sums of values. Each makes the same bits as the tile kernel (forward.h): a score is a sum over dimensions in their
// order, for which keys are transposed in the cache; a sum of values goes key by key.
#pragma once
#include "decode_products.h"

namespace keyspan {
namespace KEYSPAN_NAMESPACE {
namespace {

// More bytes of keys and values than CACHE_BYTES are taken to be in memory, even if they fit in the L3 cache: a model
// reads the caches of all layers and the weights between two calls. A pass over values in memory takes PIECE_BYTES a
// step, twice as many of those that are widened, or as many bytes as there are bytes of sums, which a step loads and
// stores. Of fewer bytes few rows take SMALL_BYTES of all groups for each key of a word, which are read in the order of
// addresses.
constexpr int FEW_VALUES = 16, MANY_VALUES = 32;
constexpr int64_t PIECE_BYTES = 16 << 10, SMALL_BYTES = 16 << 10, CACHE_BYTES = 2 << 20;
// What is in memory is prefetched twice, in the order of addresses and in the order in which it is read. The second
// prefetch brings what has left the L1 cache since the first, and lines whose first one was dropped: a core drops
// prefetches while all of its miss buffers are in use. It runs KEY_LINES lines of each of W keys ahead, for few rows,
// and VALUE_BYTES. Values of all groups that take less than LARGE_BYTES are read in the order of addresses and
// prefetched once.
constexpr int64_t KEY_LINES = 8, VALUE_BYTES = 12 << 10, LARGE_BYTES = 1 << 10;
static_assert(BLOCK_KEYS % W == 0 && FEW_VALUES % 2 == 0 && MANY_VALUES % 2 == 0, "whole vectors and pairs");

// A place in the order in which a pass reads: some keys, from n on, of one group after the other, then the next keys.
struct Place {
    int n;
    int64_t group;
    void advance(int64_t steps, int keys, int64_t first, int64_t last) {
        for (group += steps; group >= last; group -= last - first) n += keys;
    }
};

template <int KIND>
struct Decoder {
    typedef typename Row<KIND>::Word Word;
    const Plan &plan;
    const Params &p;
    const Run &run;
    const int64_t size, partial_size;
    const int64_t sequence;
    const int64_t together;  // groups that lie side by side in memory are read together, others one after the other
    const bool in_memory;    // more keys and values than CACHE_BYTES
    const int rows, value_keys;
    const int64_t key_lead, value_lead;
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
          together(p.k_stride[1] > p.k_stride[2] ? p.G : 1),
          in_memory(p.B * p.N * p.G * (p.K + p.V) * size > CACHE_BYTES), rows(load_tiles(plan, run, scratch)),
          value_keys(keys_of_a_step()), key_lead(lead_of_products()), value_lead(lead_of_values()),
          tiles((RowTile *)scratch),
          ahead(plan, run, tiles[0], sequence, together, max(W, value_keys), rows > VALUE_ROWS ? value_keys : 0) {
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

    // Keys that a pass over values takes at a time.
    int keys_of_a_step() const {
        const int64_t row = together * p.V * size;
        if (!in_memory && rows > VALUE_ROWS) return MANY_VALUES;
        constexpr int64_t piece = KIND == F16 || KIND == BF16 ? 2 * PIECE_BYTES : PIECE_BYTES;
        const int64_t keys = in_memory ? max(4 * rows / size, piece / row) : SMALL_BYTES * PER_WORD<Word> / row;
        return (int)clamp(keys / 2 * 2, 2 * PER_WORD<Word>, in_memory ? MANY_VALUES : FEW_VALUES);
    }

    // Products between one that is computed and one whose keys are prefetched in the order of reading; 0: none are.
    int64_t lead_of_products() const {
        if (!in_memory || rows > FEW_ROWS) return 0;
        const int64_t lines = max<int64_t>(1, p.K * size / 64);
        return max<int64_t>(products_of(KIND, rows, in_memory), (KEY_LINES + lines - 1) / lines);
    }

    // The same of the steps of single groups in a pass over values.
    int64_t lead_of_values() const {
        if (!in_memory || together * p.V * size < LARGE_BYTES) return 0;
        const int64_t step = value_keys * p.V * size;
        return (VALUE_BYTES + step - 1) / step;
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
        const GroupSteps steps{plan.rows * BLOCK_KEYS / PER_WORD<Word>, p.v_stride[2] * size,
                               plan.rows * plan.value_width};
        // Where rows read a group's values again, or a later group's are prefetched, groups are taken one by one.
        const int64_t side = rows <= VALUE_ROWS && !value_lead ? g1 - g0 : 1;
        Place later{span.begin, g0};
        later.advance(value_lead, value_keys, g0, g1);
        for (int n = span.begin; n < span.end; n += value_keys) {
            const int count = min(value_keys, span.end - n);
            ahead.keep_distance(span.end - n - count);
            for (int64_t g = g0; g < g1; g += side) {
                const bool near = value_lead && later.n + count <= span.end;
                ahead.reading(true, count * (int)side, [&] {
                    for (int r = 0; r < rows; r += VALUE_ROWS)
                        accumulate_rows<KIND>(min(VALUE_ROWS, rows - r), p.V, weights_of(g, r, n), values_of(n, g),
                                              near && !r ? values_of(later.n, later.group) : Rows{}, count,
                                              row_of(sums, g) + r * plan.value_width, plan.value_width, side, steps,
                                              ahead);
                });
                later.advance(1, value_keys, g0, g1);
            }
        }
    }

    Rows keys_of(int n, int64_t g) const { return {keys + n, g * p.k_stride[2] * size}; }
    Rows values_of(int n, int64_t g) const { return {values + n, g * p.v_stride[2] * size}; }

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
                accumulate_rows<KIND>(min(VALUE_ROWS, rows - r), p.V, weights_of(g, r, n), Rows{at, 0}, Rows{}, count,
                                      to + r * plan.value_width, plan.value_width, 1, GroupSteps{}, ahead);
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
        const int side = products_of(KIND, rows, in_memory);
        int count = 0;
        Place later{span.begin, g0};  // where the product is whose keys are prefetched
        later.advance(key_lead, W, g0, g1);
        const auto compute_products = [&] {
            ahead.reading(false, count * W, [&] {
                for (int r = 0, part; r < rows; r += part) {
                    part = score_part<KIND>(rows - r);
                    score_rows<KIND>(part, count, products, p.K, ahead);
                    for (int c = 0; c < count; c++) {
                        products[c].next = {};
                        products[c].queries += part * QUERY_WORDS;
                        products[c].scores += part * BLOCK_KEYS;
                    }
                }
            });
            count = 0;
        };
        for (int n = span.begin; n < span.end; n += W)
            for (int64_t g = g0; g < g1; g++) {
                const bool near = key_lead && later.n < span.end;
                products[count++] = {keys_of(n, g), near ? keys_of(later.n, later.group) : Rows{},
                                     queries + g * plan.rows * QUERY_WORDS,
                                     scores + g * plan.rows * BLOCK_KEYS + n};
                later.advance(1, W, g0, g1);
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

// Merges the blocks of each row of group g in their order.
template <int KIND>
void combine_kind(const Plan &plan, const Run &run, int64_t g, char *scratch) {
    const Params &p = *plan.params;
    Arena arena{scratch};
    RowTile &tile = *arena.reserve<RowTile>(1);
    const int64_t width = plan.value_width, step = p.G * plan.rows * (width + 3);
    float *out = arena.reserve<float>(plan.rows * width);
    BlockStats &stats = *arena.reserve<BlockStats>(1);
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

void combine(const Plan &plan, const Run &run, int64_t group, char *scratch) {
#define KEYSPAN_COMBINE(KIND) combine_kind<KIND>(plan, run, group, scratch)
    KEYSPAN_DISPATCH_KIND(KEYSPAN_COMBINE)
}

}  // namespace
}  // namespace KEYSPAN_NAMESPACE
}  // namespace keyspan
