// The planner: cuts a problem into units of work, lays out the workspace and runs the units on threads.
//
// The exported functions at the end are all that Python calls. Compiled for the baseline instruction set, because it
// runs before the instruction set is chosen.
#include "plan.h"

#include <algorithm>
#include <memory>
#include <thread>
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
    if (isa == AVX512BF16) return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
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
    std::vector<Chunk> chunk_list;
    std::vector<int64_t> tile_begins, chunk_begins;
    std::vector<Run> runs, shared;  // decoding: units of work, and tiles that several of them compute
    std::unique_ptr<std::atomic<int>[]> flags;
    int64_t flag_count = 0;
    int64_t bytes = 0;

    // Forgets a problem but for the memory of the lists, which the next problem uses.
    void reset() {
        static_cast<Plan &>(*this) = Plan{};
        segment_list.clear();
        tile_list.clear();
        chunk_list.clear();
        runs.clear();
        shared.clear();
        bytes = 0;
    }

    void clear_flags(int64_t count) {
        if (count > flag_count) {
            flags.reset(new std::atomic<int>[(size_t)count]);
            flag_count = count;
        }
        for (int64_t i = 0; i < count; i++) flags[i].store(0, std::memory_order_relaxed);
    }

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
                const int64_t next = (int64_t)plan.segment_list.size();
                if (segment < 0)
                    segment = next;
                else {
                    known.emplace(last_key, segment);
                    segment = known.emplace(key, next).first->second;
                }
                if (segment == next)  // `length` is the end for now
                    plan.segment_list.push_back({origin, INT64_MAX, 0, 0, sequence_of(p, m)});
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
    if (p.sequence || (int64_t)plan.segment_list.size() == first + 1) return;
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

// Cuts the rows of each segment into tiles of at most `limit` rows; for backward also into chunks of tiles. Both depend
// on how many rows follow one another in the segment, and on nothing else in the problem.
void cut_tiles(const Params &p, PlanStorage &plan, int64_t limit) {
    plan.tile_list.clear();
    plan.tile_begins.assign(1, 0);
    plan.chunk_list.clear();
    plan.chunk_begins.assign(1, 0);
    std::vector<int64_t> chunks_of(plan.backward ? plan.segment_count : 0, 0);
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
            const auto push_tiles = [&](int64_t from, int64_t to) {
                for (int64_t h = 0; h < p.H; h += heads)
                    for (int64_t q = from; q < to; q += queries)
                        plan.tile_list.push_back(
                            {q, std::min(q + queries, to), h, std::min(h + heads, p.H), segment, 0});
            };
            plan.rows = std::max(plan.rows, queries * heads);
            if (!plan.backward) {
                push_tiles(m, end);
                continue;
            }
            // All heads of some queries, because they may share a row of a bias gradient. The last queries come first:
            // they see most keys where the mask is causal.
            const int64_t of_chunk =
                queries * std::max<int64_t>(1, CHUNK_TILES / std::max<int64_t>(1, (p.H + heads - 1) / heads));
            for (int64_t from = m + (end - m - 1) / of_chunk * of_chunk; from >= m; from -= of_chunk) {
                const int64_t first = (int64_t)plan.tile_list.size(), to = std::min(from + of_chunk, end);
                push_tiles(from, to);
                KeyRange hull{INT64_MAX, 0};
                for (int64_t q = from; q < to; q++) {
                    const KeyRange one = row_hull(p, plan, b, q);
                    hull = {std::min(hull.lo, one.lo), std::max(hull.hi, one.hi)};
                }
                const Segment &of = plan.segment_list[segment];
                const int64_t shift = of.offset - of.begin;
                Chunk chunk{first, (int64_t)plan.tile_list.size(), segment, chunks_of[segment]++, 0, 0, 0};
                if (hull.lo < hull.hi) {
                    chunk.begin = (hull.lo + shift) / PANEL * PANEL;
                    chunk.end = round_up(hull.hi + shift, PANEL);
                }
                plan.chunk_list.push_back(chunk);
            }
        }
        plan.tile_begins.push_back((int64_t)plan.tile_list.size());
        plan.chunk_begins.push_back((int64_t)plan.chunk_list.size());
    }
    plan.chunks = plan.chunk_list.data();
    plan.first_chunk = plan.chunk_begins.data();
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

// Whether threads share the chunks of a (batch, group); else each unit is computed by one.
bool shares_chunks(const Params &p) {
    const int64_t units = backward_units(p);
    if (p.fold_batch && p.RB > 1) return false;  // entries have chunks of their own, which share rows of a bias gradient
    return p.threads > 1 && units % p.threads != 0 && units < 4 * p.threads;
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
    plan.reset();
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
    if (plan.decode && plan.pairs) plan.key_width = round_up(p.K, 32), plan.value_width = round_up(p.V, p.stored ? 64 : 32);
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
        plan.shared_slots = backward && shares_chunks(p);
        if (backward) plan.slots = plan.shared_slots ? p.B * p.G : p.threads;
        const int64_t flags = plan.slots * plan.segment_count;
        plan.clear_flags(2 * flags);
        plan.nonfinite_keys = plan.flags.get();
        plan.nonfinite_values = plan.nonfinite_keys + flags;
        const auto take = [&](char *&at, int64_t &stride, int64_t width) {
            stride = round_up(plan.packed_keys * width * word, 64);
            at = plan.reserve<char>(plan.slots * stride);
        };
        take(plan.keys_by_dim, plan.keys_by_dim_stride, round_up(p.K, 2));
        take(plan.value_rows, plan.value_rows_stride, plan.value_width);
        if (p.stored) {
            plan.key_scales = plan.reserve<float>(plan.slots * plan.packed_keys * 4);
            plan.value_scales = plan.reserve<float>(plan.slots * plan.packed_keys * 4);
        }
        if (backward) {
            take(plan.key_rows, plan.key_rows_stride, plan.key_width);
            take(plan.values_by_dim, plan.values_by_dim_stride, round_up(p.V, 2));
        }
    }
    int64_t scratch = 64 * 32 + 8 * BLOCK_KEYS * 4;
    if (plan.decode)
        scratch += 3 * BLOCK_KEYS * 8 +
                   p.G * (sizeof(RowTile) + STATS_BYTES + 64 * 8 +
                          rows * (QUERY_WORDS + 2 * plan.value_width + 2 * BLOCK_KEYS + 4) * 4);
    else
        scratch += sizeof(RowTile) + STATS_BYTES + rows * (plan.key_width + plan.value_width) * (backward ? 16 : 4) +
                   rows * BLOCK_KEYS * (backward ? 16 : 6) + rows * 8;
    if (plan.decode && p.stored) scratch += 2 * p.G * BLOCK_KEYS * 4 + 2 * 64;
    plan.scratch_stride = round_up(scratch, GUARD ? 64 : 4096) + GUARD;
    plan.scratch = plan.reserve<char>(p.threads * plan.scratch_stride);
    for (int64_t thread = 1; p.workspace && thread <= p.threads; thread++)
        KEYSPAN_GUARD(plan.scratch + thread * plan.scratch_stride - GUARD, 0);
    if (plan.decode) cut_runs(p, plan);
    if (backward) {
        bool several = false;
        for (const Chunk &chunk : plan.chunk_list) several |= chunk.index > 0;
        const auto sums = [&](int64_t count, int64_t width) {
            return plan.reserve<float>(count * plan.packed_keys * width * 4);
        };
        plan.grad_keys = sums(plan.slots, plan.key_width);
        plan.grad_values = sums(plan.slots, plan.value_width);
        plan.chunk_keys = sums(several ? p.threads : 0, plan.key_width);
        plan.chunk_values = sums(several ? p.threads : 0, plan.value_width);
        plan.bias_width = 2;
        BiasSums::each(p, 0, 0, [&](float *, int64_t at, int64_t count) {
            plan.bias_width = std::max(plan.bias_width, at + count);
        });
        plan.chunk_biases = plan.reserve<float>(p.threads * p.H * plan.bias_width * 4);
    }
}

// A parallel region costs some microseconds, and a team's less than one: small problems use one thread.
int64_t useful_threads(const Params &p, const PlanStorage &plan) {
    return (double)plan.visible_pairs * (double)(p.K + p.V) < (in_team() ? 1e5 : 2e6) ? 1 : p.threads;
}

void run_decode(const Params &p, const PlanStorage &plan, const Kernels &kernels, int64_t threads) {
    // Results are combined in the same parallel region: whoever waits knows that another thread computes the last runs.
    const int64_t runs = (int64_t)plan.runs.size(), combined = (int64_t)plan.shared.size() * p.G;
    std::atomic<int64_t> left{runs};
    parallel_for(threads, runs + combined, [&](int64_t unit, int64_t thread) {
        char *const scratch = plan.scratch + thread * plan.scratch_stride;
        if (unit < runs) {
            kernels.decode(plan, plan.runs[unit], scratch);
            left.fetch_sub(1, std::memory_order_release);
            return;
        }
        for (Wait wait; left.load(std::memory_order_acquire) > 0;) wait.once();
        kernels.combine(plan, plan.shared[(unit - runs) / p.G], (unit - runs) % p.G, scratch);
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

// Waits until `turn` is `mine`: the thread that will make it so has taken its unit before.
void wait_for(const std::atomic<int64_t> &turn, int64_t mine) {
    while (turn.load(std::memory_order_acquire) != mine) std::this_thread::yield();
}

// The sums of a (batch, group), to which chunks are added in their order.
struct Turns {
    std::atomic<int64_t> biases{0};
    std::unique_ptr<std::atomic<int64_t>[]> segments;
};

// Computes one chunk of (b, g): the first one of a segment in the slot's sums, others in the thread's, which are added
// when it is their turn.
void backward_chunk(const Params &p, const PlanStorage &plan, const Kernels &kernels, int64_t slot, int64_t b,
                    int64_t g, int64_t number, int64_t thread, Turns &turns) {
    const Chunk &chunk = plan.chunks[number];
    const int64_t widths[] = {plan.key_width, plan.value_width};
    float *const sums[] = {plan.grad_keys + slot * plan.packed_keys * plan.key_width,
                           plan.grad_values + slot * plan.packed_keys * plan.value_width};
    float *into[] = {sums[0], sums[1]};
    const Segment &segment = plan.segments[chunk.segment];
    int64_t begin = segment.offset, end = segment.offset + round_up(segment.length, PANEL);
    if (chunk.index) {
        into[0] = plan.chunk_keys + thread * plan.packed_keys * plan.key_width;
        into[1] = plan.chunk_values + thread * plan.packed_keys * plan.value_width;
        begin = chunk.begin, end = chunk.end;
    }
    for (int i = 0; i < 2; i++) std::fill(into[i] + begin * widths[i], into[i] + end * widths[i], 0.0f);
    float *biases = plan.chunk_biases + thread * p.H * plan.bias_width;
    std::fill_n(biases, p.H * plan.bias_width, 0.0f);
    kernels.backward(plan, slot, b, g, chunk, into[0], into[1], biases, plan.scratch + thread * plan.scratch_stride);

    std::atomic<int64_t> &turn = turns.segments[chunk.segment];
    wait_for(turn, chunk.index);
    for (int i = 0; chunk.index && i < 2; i++)
        for (int64_t n = begin * widths[i]; n < end * widths[i]; n++) sums[i][n] += into[i][n];
    turn.store(chunk.index + 1, std::memory_order_release);
    bool waited = false;
    const int64_t mine = number - plan.first_chunk[p.RB == 1 ? 0 : b];
    BiasSums::each(p, b, g, [&](float *to, int64_t at, int64_t count) {
        if (!waited) wait_for(turns.biases, mine);
        waited = true;
        for (int64_t h = 0; h < p.H; h++)
            for (int64_t n = 0; n < count; n++) to[h * count + n] += biases[h * plan.bias_width + at + n];
    });
    if (waited) turns.biases.store(mine + 1, std::memory_order_release);
}

void run_backward(const Params &p, const PlanStorage &plan, const Kernels &kernels, int64_t threads) {
    const int64_t batches = p.fold_batch ? 1 : p.B, groups = p.fold_groups ? 1 : p.G;
    const int64_t panels = plan.packed_keys / PANEL;
    const int64_t key_size = plan.packed_keys * plan.key_width, value_size = plan.packed_keys * plan.value_width;
    std::vector<Turns> turns(plan.slots);
    for (Turns &of : turns) of.segments.reset(new std::atomic<int64_t>[(size_t)plan.segment_count]);
    const auto reset = [&](int64_t slot) {
        turns[slot].biases = 0;
        for (int64_t i = 0; i < plan.segment_count; i++) {
            turns[slot].segments[i] = 0;
            plan.nonfinite_keys[slot * plan.segment_count + i] = 0;
            plan.nonfinite_values[slot * plan.segment_count + i] = 0;
        }
    };
    const auto write = [&](int64_t slot, int64_t b, int64_t g) {
        kernels.write_key_grads(plan, b, g, plan.grad_keys + slot * key_size, plan.grad_values + slot * value_size);
    };
    // Calls work(b, g) for what unit (b0, g0) computes.
    const auto each = [&](int64_t b0, int64_t g0, const auto &work) {
        for (int64_t b = p.fold_batch ? 0 : b0; b < (p.fold_batch ? p.B : b0 + 1); b++)
            for (int64_t g = p.fold_groups ? 0 : g0; g < (p.fold_groups ? p.G : g0 + 1); g++) work(b, g);
    };
    const auto chunk_count = [&](int64_t b) {
        const int64_t row = p.RB == 1 ? 0 : b;
        return plan.first_chunk[row + 1] - plan.first_chunk[row];
    };
    if (!plan.shared_slots) {
        std::vector<int64_t> order(batches), cost(batches, 0);
        for (int64_t b = 0; b < batches; b++) {
            order[b] = b;
            if (p.RB > 1 && !p.fold_batch)
                for (int64_t tile = plan.first_tile[b]; tile < plan.first_tile[b + 1]; tile++)
                    cost[b] += plan.tiles[tile].visible_pairs;
        }
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cost[a] > cost[b]; });
        parallel_for(threads, batches * groups, [&](int64_t unit, int64_t thread) {
            each(order[unit / groups], unit % groups, [&](int64_t b, int64_t g) {
                reset(thread);
                for (int64_t panel = 0; panel < panels; panel++) kernels.pack(plan, true, thread, b, g, panel);
                for (int64_t i = 0; i < chunk_count(b); i++)
                    backward_chunk(p, plan, kernels, thread, b, g, plan.first_chunk[p.RB == 1 ? 0 : b] + i, thread,
                                   turns[thread]);
                write(thread, b, g);
            });
        });
        return;
    }
    for (int64_t slot = 0; slot < plan.slots; slot++) reset(slot);
    parallel_for(threads, p.B * p.G * panels, [&](int64_t unit, int64_t) {
        const int64_t slot = unit / panels;
        kernels.pack(plan, true, slot, slot / p.G, slot % p.G, unit % panels);
    });
    // Chunk by chunk, of each all (batch, group): a chunk then seldom waits for the one before.
    int64_t most = 0;
    for (int64_t b = 0; b < p.B; b++) most = std::max(most, chunk_count(b));
    parallel_for(threads, most * batches * groups, [&](int64_t unit, int64_t thread) {
        const int64_t i = unit / (batches * groups), rest = unit % (batches * groups);
        each(rest / groups, rest % groups, [&](int64_t b, int64_t g) {
            if (i < chunk_count(b))
                backward_chunk(p, plan, kernels, b * p.G + g, b, g, plan.first_chunk[p.RB == 1 ? 0 : b] + i, thread,
                               turns[b * p.G + g]);
        });
    });
    parallel_for(threads, p.B * p.G, [&](int64_t unit, int64_t) { write(unit, unit / p.G, unit % p.G); });
}

}  // namespace
}  // namespace keyspan

using namespace keyspan;

// The fields of Params and Dense in their order, e.g. "q:pointer … B:int1 … q_stride:int5 … scale:float ".
EXPORT const char *keyspan_params_fields() { return KEYSPAN_DESCRIPTION(KEYSPAN_PARAMS_FIELDS); }
EXPORT const char *keyspan_dense_fields() { return KEYSPAN_DESCRIPTION(KEYSPAN_DENSE_FIELDS); }

EXPORT int64_t keyspan_supports(int64_t isa) { return supported(isa); }

// See native/build.py.
EXPORT const char *keyspan_stamp() { return KEYSPAN_STAMP; }

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
    // Allocation would cost a small problem more than its work, and decoding the faults of some hundred fresh pages: each
    // Python thread caches a workspace, which takes no memory before it is used. Under the address sanitizer every
    // problem gets memory of its own.
    constexpr int64_t ALIGNMENT = 64, CACHED_BYTES = GUARD ? 0 : 4 << 20, SMALL_BYTES = GUARD ? 0 : 1 << 18;
    thread_local std::unique_ptr<char[]> cached;
    if (CACHED_BYTES && !cached) cached.reset(new char[CACHED_BYTES + ALIGNMENT]);
    Params own = *p;
    // Neither the cap nor its reciprocal may be a subnormal number or overflow in fp32.
    if (own.softcap > 1e37) own.softcap = 0;
    if (own.softcap != 0) own.softcap = std::max(own.softcap, 1e-37);
    if (!own.workspace) own.workspace = cached.get();
    own.workspace = (char *)(((uintptr_t)own.workspace + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    thread_local PlanStorage plan;
    make_plan(own, backward, plan);
    if (!p->workspace && plan.bytes > (plan.decode ? CACHED_BYTES : SMALL_BYTES)) return plan.bytes + ALIGNMENT;
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
