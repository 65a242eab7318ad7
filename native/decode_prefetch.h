// Decoding: prefetching what a unit of work reads.
#pragma once
#include "rows.h"

namespace keyspan {
namespace KEYSPAN_NAMESPACE {
namespace {

// Prefetches what a unit of work reads, in the order of addresses, in the next pass or block too: without it memory
// would idle while a core computes. Requests are spread evenly over the work, because a burst of them fills the
// core's miss buffers and stops it.
//
// A pass over keys reads W keys of all groups by columns: it is prefetched that many bytes ahead. A pass over values
// reads nearly in the order of addresses, and VALUES_AHEAD bytes suffice, or a step where rows read it twice. That is
// less where the keys' distance is more than the L1 cache holds: a line that is still there is fetched once.
//
// Caches of all sizes are prefetched. Where keys lie in the L3 cache already, this costs 3 to 8 % of the time; but a
// model reads the caches of all layers and the weights between two calls, and from memory a short cache takes 1.3 to
// 2.5 times as long without.
struct Ahead {
    const Plan &plan;
    const Params &p;
    const Run &run;
    const RowTile &tile;
    const int64_t sequence, together;
    const char *at = nullptr, *end = nullptr;  // bytes in one piece
    int64_t due = 0;                           // bytes to prefetch
    int64_t keys_ahead, values_ahead, distance;
    int64_t block, group = 0, first = 0;
    int range = -1, key = 0;
    bool values = true;
    Span span{0, 0};

    // `keys`: most of which a pass reads all groups at a time. `values`: least that are prefetched ahead.
    Ahead(const Plan &plan, const Run &run, const RowTile &tile, int64_t sequence, int64_t together, int keys,
          int values)
        : plan(plan), p(*plan.params), run(run), tile(tile), sequence(sequence), together(together),
          block(run.first_block) {
        keys_ahead = max<int64_t>(LEAST_BYTES, keys * row_bytes(false));
        values_ahead = keys_ahead;
        if (keys_ahead > L1_BYTES) values_ahead = min(keys_ahead, max(VALUES_AHEAD, values * row_bytes(true)));
        due = distance = keys_ahead;
        while (due >= LINE) lines(4);
    }

    // Before a step of a pass over values that leaves `values` of them: sets how far ahead prefetching runs. At the end
    // of the pass that is as far as the next keys need.
    INLINE void keep_distance(int values) {
        const int64_t wanted = clamp(keys_ahead - values * row_bytes(true), values_ahead, keys_ahead);
        due += wanted - distance;
        distance = wanted;
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
    static constexpr int64_t LINE = 64, LEAST_BYTES = 8 << 10, VALUES_AHEAD = 16 << 10, L1_BYTES = 32 << 10;

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

}  // namespace
}  // namespace KEYSPAN_NAMESPACE
}  // namespace keyspan
