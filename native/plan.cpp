// The planner: cuts a problem into units of work, lays out the workspace and runs the units on threads.
//
// The exported functions at the end are all that Python calls. Compiled for the baseline instruction set, because it
// runs before the instruction set is chosen.
#include "plan.h"

#include <algorithm>
#include <memory>
#include <unordered_map>
#include <vector>

#include "threads.h"

namespace keyspan {
namespace {

// ---- instruction sets ----------------------------------------------------------------------------------------------

bool supported(int64_t isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (isa == AVX512BF16) return avx512 && __builtin_cpu_supports("avx512bf16");
    if (isa == AVX512) return avx512;
    if (isa == AVX2) return avx2;
#endif
    return isa == PORTABLE;
}

const Kernels *kernels_of(int64_t isa) {
#if defined(__x86_64__)
    if (isa == AVX512BF16) return avx512bf16::kernels();
    if (isa == AVX512) return avx512::kernels();
    if (isa == AVX2) return avx2::kernels();
#endif
    return portable::kernels();
}

// ---- the plan ------------------------------------------------------------------------------------------------------

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

struct PlanStorage : Plan {
    std::vector<Segment> segment_list;
    std::vector<int64_t> segment_begins, panel_list, segment_of_row;
    std::vector<Tile> tile_list;
    std::vector<int64_t> tile_begins, chunk_list;
    std::vector<Run> runs, shared;  // decoding: units of work, and tiles that several of them compute
    std::vector<std::atomic<int>> nonfinite_list;
    int64_t bytes = 0;

    // Reserves a part of the workspace. In the first pass there is no workspace and only sizes are added up.
    template <class X>
    X *reserve(int64_t size) {
        char *here = params->workspace ? params->workspace + bytes : nullptr;
        bytes += round_up(size, 64) + GUARD;
        if (here) KEYSPAN_GUARD(here, size);
        return (X *)here;
    }
};

// The keys that query m of batch row b sees in any range; empty where it sees none.
KeyRange row_hull(const Params &p, const Plan &plan, int64_t b, int64_t m) {
    KeyRange hull{INT64_MAX, 0};
    for (int64_t s = 0; s < (p.lo ? p.S : 1); s++) {
        const KeyRange range = key_range(p, plan.logical_keys, s, b, m);
        if (range.lo >= range.hi) continue;
        hull.lo = std::min(hull.lo, range.lo);
        hull.hi = std::max(hull.hi, range.hi);
    }
    return hull;
}

// Gathers the rows of batch row b into segments, by the sequence or the document's first key. A row without a key goes
// with the row before it.
void gather_segments(const Params &p, PlanStorage &plan, int64_t b) {
    const int64_t first = (int64_t)plan.segment_list.size();
    std::unordered_map<int64_t, int64_t> known;  // index of the segment of a sequence or an origin
    int64_t last_key = -1, segment = -1;
    for (int64_t m = 0; m < p.M; m++) {
        const KeyRange hull = row_hull(p, plan, b, m);
        if (hull.lo < hull.hi || segment < 0) {
            const int64_t origin = origin_of(p, plan.logical_keys, b, m), key = p.sequence ? sequence_of(p, m) : origin;
            if (segment < 0 || key != last_key) {
                segment = known.emplace(key, (int64_t)plan.segment_list.size()).first->second;
                if (segment == (int64_t)plan.segment_list.size())
                    plan.segment_list.push_back({origin, INT64_MAX, 0, 0, sequence_of(p, m)});  // `length` is the end for now
                last_key = key;
            }
            Segment &to = plan.segment_list[segment];
            to.begin = std::min(to.begin, hull.lo);
            to.length = std::max(to.length, hull.hi);
        }
        plan.segment_of_row[b * p.M + m] = segment;
    }
    for (auto to = plan.segment_list.begin() + first; to != plan.segment_list.end(); to++) {
        to->begin = std::min(to->begin, to->length);
        to->origin = std::min(to->origin, to->begin);  // any number in a malformed mask
        to->begin = to->origin + (to->begin - to->origin) / PANEL * PANEL;
        if (!to->length) to->begin = 0;
    }
    if (p.sequence) return;
    // Segments that share keys are made one where keys must have one place, or where they would take much memory (the
    // origins may be any numbers).
    std::vector<Segment> sorted(plan.segment_list.begin() + first, plan.segment_list.end());
    std::stable_sort(sorted.begin(), sorted.end(),
                     [](const Segment &x, const Segment &y) { return x.begin < y.begin; });
    int64_t reach = 0, keys = 0;
    bool shared = false;
    for (const Segment &x : sorted) {
        if (x.begin >= x.length) continue;
        shared |= x.begin < reach;
        reach = std::max(reach, x.length);
        keys += x.length - x.begin;
    }
    if (!shared || (!plan.backward && keys <= 4 * plan.logical_keys)) return;
    plan.segment_list.resize(first);
    const auto lowest = std::find_if(sorted.begin(), sorted.end(), [](const Segment &x) { return x.length > 0; });
    plan.segment_list.push_back({0, lowest->begin / PANEL * PANEL, 0, reach, 0});
    std::fill_n(plan.segment_of_row.begin() + b * p.M, p.M, first);
}

// Finds the visible span of every segment and its packed position.
void find_segments(const Params &p, PlanStorage &plan) {
    plan.segment_begins.assign(1, 0);
    plan.segment_of_row.assign(p.RB * p.M, 0);
    plan.packed_keys = 0;
    for (int64_t b = 0; b < p.RB; b++) {
        if (p.lo)
            gather_segments(p, plan, b);
        else
            plan.segment_list.push_back({0, 0, 0, plan.logical_keys, 0});
        int64_t offset = 0;
        for (int64_t i = plan.segment_begins.back(); i < (int64_t)plan.segment_list.size(); i++) {
            Segment &segment = plan.segment_list[i];
            segment.length -= segment.begin;
            segment.offset = offset;
            offset += round_up(segment.length, PANEL);
        }
        plan.packed_keys = std::max(plan.packed_keys, offset);
        plan.segment_begins.push_back((int64_t)plan.segment_list.size());
    }
    const int64_t panels = plan.packed_keys / PANEL;
    plan.panel_list.assign(p.RB * panels, -1);
    for (int64_t b = 0; b < p.RB; b++)
        for (int64_t i = plan.segment_begins[b]; i < plan.segment_begins[b + 1]; i++) {
            const Segment &segment = plan.segment_list[i];
            std::fill_n(plan.panel_list.begin() + b * panels + segment.offset / PANEL,
                        round_up(segment.length, PANEL) / PANEL, i);
        }
    plan.segments = plan.segment_list.data();
    plan.first_segment = plan.segment_begins.data();
    plan.segment_of_panel = plan.panel_list.data();
    plan.segment_count = (int64_t)plan.segment_list.size();
}

// Cuts the rows of each segment into tiles of at most `limit` rows.
void cut_tiles(const Params &p, PlanStorage &plan, int64_t limit) {
    plan.tile_list.clear();
    plan.tile_begins.assign(1, 0);
    plan.rows = 1;
    for (int64_t b = 0; b < p.RB; b++) {
        for (int64_t m = 0, end; m < p.M; m = end) {
            const int64_t segment = plan.segment_of_row[b * p.M + m];
            for (end = m + 1; end < p.M && plan.segment_of_row[b * p.M + end] == segment;) end++;
            const int64_t fit = plan.decode ? std::max<int64_t>(1, limit / p.H) : limit;
            const int64_t pieces = (end - m + fit - 1) / fit;
            int64_t queries = (end - m + pieces - 1) / pieces;
            if (pieces > 1 && !plan.decode) queries = std::min(round_up(queries, 6), limit);
            const int64_t heads = plan.decode ? p.H : std::min<int64_t>(p.H, std::max<int64_t>(1, limit / queries));
            for (int64_t h = 0; h < p.H; h += heads)
                for (int64_t q = m; q < end; q += queries)
                    plan.tile_list.push_back(
                        {q, std::min(q + queries, end), h, std::min(h + heads, p.H), segment, 0});
            plan.rows = std::max(plan.rows, queries * heads);
        }
        plan.tile_begins.push_back((int64_t)plan.tile_list.size());
    }
    plan.tiles = plan.tile_list.data();
    plan.first_tile = plan.tile_begins.data();
}

// Returns the number of visible pairs of all heads of a group.
int64_t count_visible_pairs(const Params &p, PlanStorage &plan) {
    int64_t all = 0;
    for (int64_t b = 0; b < p.RB; b++)
        for (int64_t t = plan.first_tile[b]; t < plan.first_tile[b + 1]; t++) {
            Tile &tile = plan.tile_list[t];
            int64_t pairs = 0;
            for (int64_t s = 0; s < (p.lo ? p.S : 1); s++)
                for (int64_t m = tile.first_query; m < tile.last_query; m++) {
                    const KeyRange range = key_range(p, plan.logical_keys, s, b, m);
                    pairs += std::max<int64_t>(range.hi - range.lo, 0);
                }
            all += pairs * (tile.last_head - tile.first_head);
            tile.visible_pairs = pairs + (tile.last_query - tile.first_query) * PANEL;
        }
    return all;
}

// Splits each batch entry's tiles into chunks of about the same number of visible pairs.
void split_chunks(const Params &p, PlanStorage &plan, int64_t chunks) {
    plan.chunk_list.clear();
    for (int64_t b = 0; b < p.RB; b++) {
        const int64_t first = plan.first_tile[b], count = plan.first_tile[b + 1] - first;
        std::vector<int64_t> sums(count + 1, 0);
        for (int64_t i = 0; i < count; i++) sums[i + 1] = sums[i] + plan.tiles[first + i].visible_pairs;
        int64_t last = 0;
        plan.chunk_list.push_back(first);
        for (int64_t chunk = 1; chunk <= chunks; chunk++) {
            const int64_t upto = sums.back() * chunk / chunks;
            last = std::max<int64_t>(last, std::lower_bound(sums.begin(), sums.end(), upto) - sums.begin());
            plan.chunk_list.push_back(first + (chunk == chunks ? count : last));
        }
    }
    plan.chunk_tiles = plan.chunk_list.data();
}

// Cuts the tiles' keys into runs of blocks: one for each tile, or of SPLIT_BLOCKS where threads have too few tiles.
void cut_runs(const Params &p, PlanStorage &plan) {
    const int64_t tiles = (int64_t)plan.tile_list.size() * (p.RB == 1 ? p.B : 1);
    const bool split = p.threads > 1 && tiles < 4 * p.threads;
    int64_t partial = 0;
    for (int64_t b = 0; b < p.B; b++) {
        const int64_t row = p.RB == 1 ? 0 : b;
        for (int64_t t = plan.first_tile[row]; t < plan.first_tile[row + 1]; t++) {
            const Tile &tile = plan.tiles[t];
            KeyRange hull{INT64_MAX, 0};
            for (int64_t m = tile.first_query; m < tile.last_query; m++) {
                const KeyRange one = row_hull(p, plan, row, m);
                hull = {std::min(hull.lo, one.lo), std::max(hull.hi, one.hi)};
            }
            int64_t first = 0, last = 0;
            if (hull.lo < hull.hi) {
                const int64_t origin = plan.segments[tile.segment].origin;
                first = (hull.lo - origin) / plan.block_keys;
                last = (hull.hi - origin + plan.block_keys - 1) / plan.block_keys;
            }
            if (!split || last - first <= SPLIT_BLOCKS) {
                plan.runs.push_back({b, t, first, last, -1});
                continue;
            }
            plan.shared.push_back({b, t, first, last, partial});
            for (int64_t block = first; block < last; block += SPLIT_BLOCKS) {
                const int64_t end = std::min(block + SPLIT_BLOCKS, last);
                plan.runs.push_back({b, t, block, end, partial});
                partial += (end - block) * p.S;
            }
        }
    }
    // Longest first, so that threads finish at about the same time.
    std::stable_sort(plan.runs.begin(), plan.runs.end(), [](const Run &x, const Run &y) {
        return x.last_block - x.first_block > y.last_block - y.first_block;
    });
    if (partial) plan.partial = plan.reserve<float>(partial * p.G * plan.rows * (plan.value_width + 3) * 4);
}

int64_t backward_units(const Params &p) { return (p.fold_batch ? 1 : p.B) * (p.fold_groups ? 1 : p.G); }

int64_t backward_chunks(const Params &p, const PlanStorage &plan) {
    const int64_t units = backward_units(p);
    if (p.threads <= 1 || units % p.threads == 0 || units >= 4 * p.threads) return 1;
    return std::max<int64_t>(1, std::min((2 * p.threads + units - 1) / units, (int64_t)plan.tile_list.size() / p.RB));
}

// Whether keys are read from where they lie, by few rows, instead of being packed for many: where rows are few, or
// where packing a long cache would cost more than all products with it.
bool decodes(const Params &p, double queries_a_key, double keys_a_query) {
    const double rows = queries_a_key * (double)p.H;
    if (p.k_stride[3] != 1 || p.v_stride[3] != 1 || p.H > TILE_ROWS) return false;
    const double most = keys_a_query >= LONG_KEYS ? DECODE_ROWS : DECODE_ROWS / 3;  // short caches pack fast
    return rows <= 6 || (rows <= most && keys_a_query >= 4 * queries_a_key);
}

void make_plan(const Params &p, bool backward, PlanStorage &plan) {
    plan.params = &p;
    plan.backward = backward;
    plan.logical_keys = logical_keys(p);
    plan.key_width = round_up(p.K, 16);
    plan.value_width = round_up(p.V, 16);
    plan.block_keys = std::max(p.K, p.V) > 128 ? BLOCK_KEYS / 2 : BLOCK_KEYS;
    plan.pairs = p.dtype == BF16 && kernels_of(p.isa)->has_pairs;
    find_segments(p, plan);
    int64_t keys = 0, pairs = 0;
    for (const Segment &segment : plan.segment_list) keys += segment.length;
    for (int64_t b = 0; !backward && b < p.RB; b++)
        for (int64_t m = 0; m < p.M; m++)
            for (int64_t s = 0; s < (p.lo ? p.S : 1); s++) {
                const KeyRange range = key_range(p, plan.logical_keys, s, b, m);
                pairs += std::max<int64_t>(range.hi - range.lo, 0);
            }
    const double queries_a_key = keys ? (double)pairs / (double)keys : 0;
    plan.decode = !backward && decodes(p, queries_a_key, (double)pairs / (double)std::max<int64_t>(p.M * p.RB, 1));
    if (plan.decode && plan.pairs) plan.key_width = round_up(p.K, 32), plan.value_width = round_up(p.V, 32);
    int64_t limit = TILE_ROWS;
    cut_tiles(p, plan, limit);
    // Smaller tiles where the threads would have too few of them.
    while (!plan.decode && !backward && limit > 12 &&
           (int64_t)plan.tile_list.size() * (p.RB == 1 ? p.B : 1) * p.G < 2 * p.threads)
        cut_tiles(p, plan, limit = round_up((limit + 1) / 2, 6));
    plan.visible_pairs = count_visible_pairs(p, plan) * (p.RB == 1 ? p.B : 1) * p.G;

    const int64_t word = plan.pairs ? 2 : 4, rows = plan.rows + 1;
    if (!plan.decode) {
        // Forward packs as many (batch, group) at a time as stay in cache and keep the threads busy; backward packs one
        // for each thread, or all where threads share one.
        const int64_t widths = (round_up(p.K, 2) + plan.value_width) * (backward ? 2 : 1);
        const int64_t fit = PACKED_CACHE_BYTES / std::max<int64_t>(plan.packed_keys * widths * word, 1);
        const int64_t tiles = (int64_t)plan.tile_list.size() / std::max<int64_t>(p.RB, 1);
        const int64_t busy = 4 * p.threads / std::max<int64_t>(tiles, 1) + 1;
        plan.slots = std::min(p.B * p.G, std::max({fit, busy, (int64_t)1}));
        if (backward) plan.slots = p.chunks == 1 ? p.threads : p.B * p.G;
        const int64_t flags = plan.slots * plan.segment_count;
        plan.nonfinite_list = std::vector<std::atomic<int>>((size_t)(2 * flags));
        plan.nonfinite_keys = plan.nonfinite_list.data();
        plan.nonfinite_values = plan.nonfinite_keys + flags;
        for (auto &nonfinite : plan.nonfinite_list) nonfinite = 0;
        const auto take = [&](char *&at, int64_t &stride, int64_t width) {
            stride = round_up(plan.packed_keys * width * word, 64);
            at = plan.reserve<char>(plan.slots * stride);
        };
        take(plan.keys_by_dim, plan.keys_by_dim_stride, round_up(p.K, 2));
        take(plan.value_rows, plan.value_rows_stride, plan.value_width);
        if (backward) {
            take(plan.key_rows, plan.key_rows_stride, plan.key_width);
            take(plan.values_by_dim, plan.values_by_dim_stride, round_up(p.V, 2));
        }
    }
    int64_t scratch = 64 * 32 + 8 * BLOCK_KEYS * 4;
    if (plan.decode)
        scratch += (DECODE_PANEL * MAX_HEAD_DIM + 3 * BLOCK_KEYS) * 8 +
                   p.G * (sizeof(RowTile) + 64 * 8 + rows * (plan.key_width + 2 * plan.value_width + 2 * BLOCK_KEYS + 4) * 4);
    else
        scratch += sizeof(RowTile) + rows * (plan.key_width + plan.value_width) * (backward ? 16 : 4) +
                   rows * BLOCK_KEYS * (backward ? 16 : 6) + rows * 8;
    plan.scratch_stride = round_up(scratch, GUARD ? 64 : 4096) + GUARD;
    plan.scratch = plan.reserve<char>(p.threads * plan.scratch_stride);
    for (int64_t thread = 1; p.workspace && thread <= p.threads; thread++)
        KEYSPAN_GUARD(plan.scratch + thread * plan.scratch_stride - GUARD, 0);
    if (plan.decode) cut_runs(p, plan);
    if (backward) {
        const int64_t sums = p.chunks == 1 ? p.threads : p.chunks * p.B * p.G;
        split_chunks(p, plan, p.chunks);
        plan.grad_keys = plan.reserve<float>(sums * plan.packed_keys * plan.key_width * 4);
        plan.grad_values = plan.reserve<float>(sums * plan.packed_keys * plan.value_width * 4);
    }
}

// A parallel region costs some microseconds: small problems use one thread.
int64_t useful_threads(const Params &p, const PlanStorage &plan) {
    return (double)plan.visible_pairs * (double)(p.K + p.V) < 2e6 ? 1 : p.threads;
}

void run_decode(const Params &, const PlanStorage &plan, const Kernels &kernels, int64_t threads) {
    parallel_for(threads, (int64_t)plan.runs.size(), [&](int64_t unit, int64_t thread) {
        kernels.decode(plan, plan.runs[unit], plan.scratch + thread * plan.scratch_stride);
    });
    parallel_for(threads, (int64_t)plan.shared.size(), [&](int64_t unit, int64_t thread) {
        kernels.combine(plan, plan.shared[unit], plan.scratch + thread * plan.scratch_stride);
    });
}

void run_forward(const Params &p, const PlanStorage &plan, const Kernels &kernels, int64_t threads) {
    struct Unit {
        int64_t slot, batch, group;
        const Tile *tile;
    };
    const int64_t panels = plan.packed_keys / PANEL;
    std::vector<Unit> units;
    for (int64_t first = 0; first < p.B * p.G; first += plan.slots) {
        const int64_t slots = std::min(plan.slots, p.B * p.G - first);
        for (int64_t i = 0; first && i < slots * plan.segment_count; i++)
            plan.nonfinite_keys[i] = plan.nonfinite_values[i] = 0;
        parallel_for(threads, slots * panels, [&](int64_t unit, int64_t) {
            const int64_t slot = unit / panels, index = first + slot;
            kernels.pack(plan, false, slot, index / p.G, index % p.G, unit % panels);
        });
        units.clear();
        for (int64_t slot = 0; slot < slots; slot++) {
            const int64_t batch = (first + slot) / p.G, group = (first + slot) % p.G, row = p.RB == 1 ? 0 : batch;
            for (int64_t tile = plan.first_tile[row]; tile < plan.first_tile[row + 1]; tile++)
                units.push_back({slot, batch, group, plan.tiles + tile});
        }
        // Largest first, so that threads finish at about the same time.
        if (threads > 1)
            std::stable_sort(units.begin(), units.end(), [](const Unit &a, const Unit &b) {
                return a.tile->visible_pairs > b.tile->visible_pairs;
            });
        parallel_for(threads, (int64_t)units.size(), [&](int64_t i, int64_t thread) {
            const Unit &unit = units[i];
            kernels.forward(plan, unit.slot, unit.batch, unit.group, *unit.tile,
                            plan.scratch + thread * plan.scratch_stride);
        });
    }
}

void run_backward(const Params &p, const PlanStorage &plan, const Kernels &kernels, int64_t threads) {
    const int64_t batches = p.fold_batch ? 1 : p.B, groups = p.fold_groups ? 1 : p.G;
    const int64_t panels = plan.packed_keys / PANEL;
    const int64_t key_size = plan.packed_keys * plan.key_width, value_size = plan.packed_keys * plan.value_width;
    const bool single_chunk = p.chunks == 1;  // one thread computes a whole (batch, group)
    if (!single_chunk)
        parallel_for(threads, p.B * p.G * panels, [&](int64_t unit, int64_t) {
            const int64_t slot = unit / panels;
            kernels.pack(plan, true, slot, slot / p.G, slot % p.G, unit % panels);
        });
    std::vector<int64_t> order(batches), cost(batches, 0);
    for (int64_t b = 0; b < batches; b++) {
        order[b] = b;
        if (p.RB > 1 && !p.fold_batch)
            for (int64_t tile = plan.first_tile[b]; tile < plan.first_tile[b + 1]; tile++)
                cost[b] += plan.tiles[tile].visible_pairs;
    }
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cost[a] > cost[b]; });
    parallel_for(threads, batches * groups * p.chunks, [&](int64_t unit, int64_t thread) {
        const int64_t chunk = unit % p.chunks, b0 = order[unit / p.chunks / groups], g0 = unit / p.chunks % groups;
        for (int64_t b = p.fold_batch ? 0 : b0; b < (p.fold_batch ? p.B : b0 + 1); b++)
            for (int64_t g = p.fold_groups ? 0 : g0; g < (p.fold_groups ? p.G : g0 + 1); g++) {
                const int64_t slot = single_chunk ? thread : b * p.G + g,
                              sums = single_chunk ? thread : slot * p.chunks + chunk;
                if (single_chunk) {
                    for (int64_t i = slot * plan.segment_count; i < (slot + 1) * plan.segment_count; i++)
                        plan.nonfinite_keys[i] = plan.nonfinite_values[i] = 0;
                    for (int64_t panel = 0; panel < panels; panel++) kernels.pack(plan, true, slot, b, g, panel);
                }
                float *grad_keys = plan.grad_keys + sums * key_size,
                      *grad_values = plan.grad_values + sums * value_size;
                kernels.backward(plan, slot, b, g, chunk, grad_keys, grad_values,
                                 plan.scratch + thread * plan.scratch_stride);
                if (single_chunk) kernels.write_key_grads(plan, b, g, grad_keys, grad_values, 1, 0, 0);
            }
    });
    if (single_chunk) return;
    parallel_for(threads, p.B * p.G, [&](int64_t unit, int64_t) {
        const int64_t first = unit * p.chunks;
        kernels.write_key_grads(plan, unit / p.G, unit % p.G, plan.grad_keys + first * key_size,
                                plan.grad_values + first * value_size, p.chunks, key_size, value_size);
    });
}

}  // namespace
}  // namespace keyspan

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

using namespace keyspan;

// The fields of Params and Dense in their order, e.g. "q:pointer … B:int1 … q_stride:int5 … scale:float ".
EXPORT const char *keyspan_params_fields() { return KEYSPAN_DESCRIPTION(KEYSPAN_PARAMS_FIELDS); }
EXPORT const char *keyspan_dense_fields() { return KEYSPAN_DESCRIPTION(KEYSPAN_DENSE_FIELDS); }

EXPORT int64_t keyspan_supports(int64_t isa) { return supported(isa); }

EXPORT const char *keyspan_threading() {
#if defined(KEYSPAN_STD_THREADS) || !defined(_OPENMP)
    return "std::thread";
#else
    return "OpenMP";
#endif
}

// Runs the problem and returns 0; or, where it needs a workspace and none is given, returns its size in bytes.
template <class Run>
int64_t with_workspace(const Params *p, bool backward, const Run &run) {
    // Allocation would cost a small problem more than its work: each Python thread caches a small workspace. Under the
    // address sanitizer every problem gets memory of its own.
    constexpr int64_t ALIGNMENT = 64, CACHED_BYTES = GUARD ? 0 : 1 << 18;
    thread_local std::unique_ptr<char[]> cached;
    if (CACHED_BYTES && !cached) cached.reset(new char[CACHED_BYTES + ALIGNMENT]);
    Params own = *p;
    // Neither the cap nor its reciprocal may be a subnormal number or overflow in fp32.
    if (own.softcap > 1e37) own.softcap = 0;
    if (own.softcap != 0) own.softcap = std::max(own.softcap, 1e-37);
    if (!own.workspace) own.workspace = cached.get();
    own.workspace = (char *)(((uintptr_t)own.workspace + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    PlanStorage plan{};
    make_plan(own, backward, plan);
    if (!p->workspace && plan.bytes > CACHED_BYTES) return plan.bytes + ALIGNMENT;
    run(own, plan, *kernels_of(own.isa), useful_threads(own, plan));
    return 0;
}

EXPORT int64_t keyspan_forward(const Params *p) {
    return with_workspace(p, false,
                          [](const Params &own, const PlanStorage &plan, const Kernels &kernels, int64_t threads) {
                              (plan.decode ? run_decode : run_forward)(own, plan, kernels, threads);
                          });
}

EXPORT int64_t keyspan_backward(const Params *p) { return with_workspace(p, true, run_backward); }

// Chunks that backward is split into: the caller allocates sums for each.
EXPORT int64_t keyspan_backward_chunks(const Params *p) {
    Params one = *p;
    one.chunks = 1;
    PlanStorage plan{};
    make_plan(one, true, plan);
    return useful_threads(one, plan) == 1 ? 1 : backward_chunks(one, plan);
}
