// The planner: cuts a problem into units of work, lays out the workspace and runs the units on threads.
//
// The exported functions at the end are all that Python calls. Compiled for the baseline instruction set, because it
// runs before the instruction set is chosen.
#include "plan.h"

#include <algorithm>
#include <memory>
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
    std::vector<int64_t> chunk_list;
    std::vector<std::atomic<int>> nonfinite_list;
    std::vector<int64_t> visible_pairs;  // [RB, query_tiles], of one head
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

// Finds the visible span of every segment and its packed position. Returns the number of visible pairs.
int64_t find_segments(const Params &p, PlanStorage &plan) {
    const int64_t count = p.sequence ? std::max<int64_t>(p.sequences, 1) : p.RB;
    std::vector<int64_t> begin(count, INT64_MAX), end(count, 0);
    int64_t pairs = 0;
    if (!p.lo) {
        begin[0] = 0;
        end[0] = plan.logical_keys;
        pairs = p.M * plan.logical_keys;
    } else {
        for (int64_t s = 0; s < p.S; s++)
            for (int64_t b = 0; b < p.RB; b++)
                for (int64_t m = 0; m < p.M; m++) {
                    const KeyRange range = key_range(p, plan.logical_keys, s, b, m);
                    if (range.lo >= range.hi) continue;
                    const int64_t segment = p.sequence ? sequence_of(p, m) : b;
                    begin[segment] = std::min(begin[segment], range.lo);
                    end[segment] = std::max(end[segment], range.hi);
                    pairs += range.hi - range.lo;
                }
    }
    int64_t offset = 0, widest = 0;
    for (int64_t i = 0; i < count; i++) {
        const int64_t from = end[i] ? begin[i] / PANEL * PANEL : 0, length = std::max<int64_t>(end[i] - from, 0);
        plan.segment_list.push_back({from, p.sequence ? offset : 0, length});
        offset += round_up(length, PANEL);
        widest = std::max(widest, round_up(length, PANEL));
    }
    plan.segments = plan.segment_list.data();
    plan.segment_count = count;
    plan.packed_keys = p.sequence ? offset : widest;
    return pairs;
}

void count_visible_pairs(const Params &p, PlanStorage &plan) {
    plan.visible_pairs.assign(p.RB * plan.query_tiles, 0);
    for (int64_t b = 0; b < p.RB; b++)
        for (int64_t tile = 0; tile < plan.query_tiles; tile++) {
            const int64_t m0 = tile * plan.tile_queries, m1 = std::min(m0 + plan.tile_queries, p.M);
            int64_t pairs = (m1 - m0) * PANEL;  // a tile's fixed cost
            for (int64_t s = 0; s < (p.lo ? p.S : 1); s++)
                for (int64_t m = m0; m < m1; m++) {
                    const KeyRange range = key_range(p, plan.logical_keys, s, b, m);
                    pairs += std::max<int64_t>(range.hi - range.lo, 0);
                }
            plan.visible_pairs[b * plan.query_tiles + tile] = pairs;
        }
}

// Splits the query tiles into chunks of about the same number of visible pairs.
void split_chunks(const Params &p, PlanStorage &plan, int64_t chunks) {
    std::vector<int64_t> sums(plan.query_tiles + 1, 0);
    for (int64_t tile = 0; tile < plan.query_tiles; tile++) {
        sums[tile + 1] = sums[tile];
        for (int64_t b = 0; b < p.RB; b++) sums[tile + 1] += plan.visible_pairs[b * plan.query_tiles + tile];
    }
    plan.chunk_list.assign(1, 0);
    for (int64_t chunk = 1; chunk <= chunks; chunk++) {
        const int64_t upto = sums.back() * chunk / chunks;
        const auto tile = std::lower_bound(sums.begin(), sums.end(), upto) - sums.begin();
        plan.chunk_list.push_back(std::max<int64_t>(tile, plan.chunk_list.back()));
    }
    plan.chunk_list.back() = plan.query_tiles;
    plan.chunk_tiles = plan.chunk_list.data();
}

int64_t backward_units(const Params &p) { return (p.fold_batch ? 1 : p.B) * (p.fold_groups ? 1 : p.G); }

int64_t backward_chunks(const Params &p, const PlanStorage &plan) {
    const int64_t units = backward_units(p);
    if (p.threads <= 1 || units % p.threads == 0 || units >= 4 * p.threads) return 1;
    return std::max<int64_t>(1, std::min((2 * p.threads + units - 1) / units, plan.query_tiles));
}

// Whether keys are read from where they lie, by few rows, instead of being packed for many: where rows are few, or
// where packing a long cache would cost more than all products with it.
bool decodes(const Params &p, double queries_a_key, double keys_a_query) {
    const double rows = queries_a_key * (double)p.H;
    if (p.k_stride[3] != 1 || p.v_stride[3] != 1 || p.H > TILE_ROWS) return false;
    const double most = keys_a_query >= SPLIT_KEYS ? DECODE_ROWS : DECODE_ROWS / 3;  // short caches pack fast
    return rows <= 6 || (rows <= most && keys_a_query >= 4 * queries_a_key);
}

// Whether the queries of each tile read the same sequence of paged keys.
bool tiles_keep_to_sequences(const Params &p, int64_t tile_queries) {
    for (int64_t m = 1; p.sequence && m < p.M; m++)
        if (m % tile_queries && sequence_of(p, m) != sequence_of(p, m - 1)) return false;
    return true;
}

void make_plan(const Params &p, bool backward, PlanStorage &plan) {
    plan.params = &p;
    plan.logical_keys = logical_keys(p);
    plan.key_width = round_up(p.K, 16);
    plan.value_width = round_up(p.V, 16);
    plan.block_keys = std::max(p.K, p.V) > 128 ? BLOCK_KEYS / 2 : BLOCK_KEYS;
    plan.pairs = p.dtype == BF16 && kernels_of(p.isa)->has_pairs;
    const int64_t pairs = find_segments(p, plan);
    int64_t keys = 0, span_begin = INT64_MAX, span_end = 0;
    for (const Segment &segment : plan.segment_list) {
        keys += segment.length;
        if (!segment.length) continue;
        span_begin = std::min(span_begin, segment.begin);
        span_end = std::max(span_end, segment.begin + segment.length);
    }
    const double queries_a_key = keys ? (double)pairs / (double)keys : 0;
    plan.decode = !backward && decodes(p, queries_a_key, (double)pairs / (double)std::max<int64_t>(p.M * p.RB, 1));
    if (plan.decode) {
        if (plan.pairs) plan.key_width = round_up(p.K, 32), plan.value_width = round_up(p.V, 32);
        plan.tile_heads = p.H;
        plan.tile_queries = std::max<int64_t>(1, std::min((int64_t)(queries_a_key + 0.5), TILE_ROWS / p.H));
        if (!tiles_keep_to_sequences(p, plan.tile_queries)) plan.tile_queries = 1;
        plan.first_key = span_end ? span_begin : 0;
        plan.splits = std::max<int64_t>(1, (span_end - plan.first_key + SPLIT_KEYS - 1) / SPLIT_KEYS);
    } else {
        plan.tile_queries = std::min<int64_t>(p.M, TILE_ROWS);
        plan.tile_heads = std::min<int64_t>(p.H, TILE_ROWS / plan.tile_queries);
        plan.splits = 1;
    }
    // Smaller tiles where the threads would have too few of them.
    const auto tiles = [&] {
        return p.B * p.G * ((p.H + plan.tile_heads - 1) / plan.tile_heads) *
               ((p.M + plan.tile_queries - 1) / plan.tile_queries);
    };
    while (!plan.decode && !backward && tiles() < 2 * p.threads && plan.tile_queries * plan.tile_heads > 12) {
        if (plan.tile_heads > 1)
            plan.tile_heads = (plan.tile_heads + 1) / 2;
        else
            plan.tile_queries = round_up((plan.tile_queries + 1) / 2, 6);
    }
    plan.rows = plan.tile_queries * plan.tile_heads;
    plan.query_tiles = (p.M + plan.tile_queries - 1) / plan.tile_queries;
    plan.head_tiles = (p.H + plan.tile_heads - 1) / plan.tile_heads;
    count_visible_pairs(p, plan);

    const int64_t word = plan.pairs ? 2 : 4, rows = plan.rows + 1;
    if (!plan.decode) {
        // Forward packs as many (batch, group) at a time as stay in cache and keep the threads busy; backward packs one
        // for each thread, or all where threads share one.
        const int64_t widths = (round_up(p.K, 2) + plan.value_width) * (backward ? 2 : 1);
        const int64_t fit = PACKED_CACHE_BYTES / std::max<int64_t>(plan.packed_keys * widths * word, 1);
        const int64_t busy = 4 * p.threads / (plan.query_tiles * plan.head_tiles) + 1;
        plan.slots = std::min(p.B * p.G, std::max({fit, busy, (int64_t)1}));
        if (backward) plan.slots = p.chunks == 1 ? p.threads : p.B * p.G;
        plan.nonfinite_list = std::vector<std::atomic<int>>((size_t)(2 * plan.slots));
        plan.nonfinite_keys = plan.nonfinite_list.data();
        plan.nonfinite_values = plan.nonfinite_keys + plan.slots;
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
        scratch += p.G * (sizeof(RowTile) + 64 + rows * (plan.key_width + plan.value_width) * 4 +
                          rows * 2 * STREAM_KEYS * STREAM_KEYS * 4);
    else
        scratch += sizeof(RowTile) + rows * (plan.key_width + plan.value_width) * (backward ? 16 : 4) +
                   rows * BLOCK_KEYS * (backward ? 16 : 6);
    plan.scratch_stride = round_up(scratch, GUARD ? 64 : 4096) + GUARD;
    plan.scratch = plan.reserve<char>(p.threads * plan.scratch_stride);
    for (int64_t thread = 1; p.workspace && thread <= p.threads; thread++)
        KEYSPAN_GUARD(plan.scratch + thread * plan.scratch_stride - GUARD, 0);
    if (plan.decode && plan.splits > 1)
        plan.partial =
            plan.reserve<float>(p.B * plan.query_tiles * plan.splits * p.G * plan.rows * (plan.value_width + 3) * 4);
    if (backward) {
        const int64_t sums = p.chunks == 1 ? p.threads : p.chunks * p.B * p.G;
        split_chunks(p, plan, p.chunks);
        plan.grad_keys = plan.reserve<float>(sums * plan.packed_keys * plan.key_width * 4);
        plan.grad_values = plan.reserve<float>(sums * plan.packed_keys * plan.value_width * 4);
    }
}

// A parallel region costs some microseconds: small problems use one thread.
int64_t useful_threads(const Params &p, const PlanStorage &plan) {
    int64_t pairs = 0;
    for (const int64_t visible_pairs : plan.visible_pairs) pairs += visible_pairs;
    const double work = (double)pairs * (double)(p.RB == 1 ? p.B : 1) * (double)(p.G * p.H * (p.K + p.V));
    return work < 2e6 ? 1 : p.threads;
}

void run_decode(const Params &p, const PlanStorage &plan, const Kernels &kernels, int64_t threads) {
    const int64_t tiles = p.B * plan.query_tiles;
    parallel_for(threads, tiles * plan.splits, [&](int64_t unit, int64_t thread) {
        const int64_t tile = unit / plan.splits;
        kernels.decode(plan, tile / plan.query_tiles, tile % plan.query_tiles, unit % plan.splits,
                       plan.scratch + thread * plan.scratch_stride);
    });
    if (plan.splits == 1) return;
    parallel_for(tiles > 16 ? threads : 1, tiles, [&](int64_t tile, int64_t thread) {
        kernels.combine(plan, tile / plan.query_tiles, tile % plan.query_tiles,
                        plan.scratch + thread * plan.scratch_stride);
    });
}

void run_forward(const Params &p, const PlanStorage &plan, const Kernels &kernels, int64_t threads) {
    struct Unit {
        int64_t slot, batch, group, tile, visible_pairs;
    };
    const int64_t panels = plan.packed_keys / PANEL, heads = plan.head_tiles;
    std::vector<Unit> units;
    for (int64_t first = 0; first < p.B * p.G; first += plan.slots) {
        const int64_t slots = std::min(plan.slots, p.B * p.G - first);
        for (int64_t slot = 0; slot < slots; slot++) plan.nonfinite_keys[slot] = plan.nonfinite_values[slot] = 0;
        parallel_for(threads, slots * panels, [&](int64_t unit, int64_t) {
            const int64_t slot = unit / panels, index = first + slot;
            kernels.pack(plan, false, slot, index / p.G, index % p.G, unit % panels);
        });
        units.clear();
        for (int64_t slot = 0; slot < slots; slot++) {
            const int64_t batch = (first + slot) / p.G, group = (first + slot) % p.G;
            for (int64_t tile = 0; tile < plan.query_tiles; tile++)
                units.push_back(
                    {slot, batch, group, tile, plan.visible_pairs[(p.RB == 1 ? 0 : batch) * plan.query_tiles + tile]});
        }
        // Largest first, so that threads finish at about the same time.
        std::stable_sort(units.begin(), units.end(),
                         [](const Unit &a, const Unit &b) { return a.visible_pairs > b.visible_pairs; });
        parallel_for(threads, (int64_t)units.size() * heads, [&](int64_t i, int64_t thread) {
            const Unit &unit = units[i / heads];
            kernels.forward(plan, unit.slot, unit.batch, unit.group, i % heads, unit.tile,
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
            for (int64_t tile = 0; tile < plan.query_tiles; tile++)
                cost[b] += plan.visible_pairs[b * plan.query_tiles + tile];
    }
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cost[a] > cost[b]; });
    parallel_for(threads, batches * groups * p.chunks, [&](int64_t unit, int64_t thread) {
        const int64_t chunk = unit % p.chunks, b0 = order[unit / p.chunks / groups], g0 = unit / p.chunks % groups;
        for (int64_t b = p.fold_batch ? 0 : b0; b < (p.fold_batch ? p.B : b0 + 1); b++)
            for (int64_t g = p.fold_groups ? 0 : g0; g < (p.fold_groups ? p.G : g0 + 1); g++) {
                const int64_t slot = single_chunk ? thread : b * p.G + g,
                              sums = single_chunk ? thread : slot * p.chunks + chunk;
                if (single_chunk) {
                    plan.nonfinite_keys[slot] = plan.nonfinite_values[slot] = 0;
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
