// The layers' exported functions: runs of rows shared among threads. Compiled for the baseline instruction set.
#include "layers.h"

#include <memory>

#include "threads.h"

namespace keyspan {
namespace {

const LayerKernels *kernels_of(int64_t isa) {
#if defined(__x86_64__)
    if (isa == AVX512BF16) return avx512bf16::layer_kernels();
    if (isa == AVX512) return avx512::layer_kernels();
    if (isa == AVX2) return avx2::layer_kernels();
#endif
    return portable::layer_kernels();
}

// About so many numbers of a matrix are one unit of work, and twice as many are worth another thread; of a team, whose
// threads are awake, fewer.
int64_t numbers_per_unit() { return in_team() ? 1 << 11 : 1 << 14; }

int64_t useful_threads(int64_t threads, int64_t numbers) {
    return std::max<int64_t>(1, std::min(threads, numbers / (2 * numbers_per_unit())));
}

// Calls run(first, last, thread) for runs of rows of `width` numbers.
template <class Run>
void for_rows(int64_t threads, int64_t rows, int64_t width, const Run &run) {
    const int64_t many = std::max<int64_t>(1, numbers_per_unit() / std::max<int64_t>(1, width));
    parallel_for(useful_threads(threads, rows * width), (rows + many - 1) / many, [&](int64_t unit, int64_t thread) {
        run(unit * many, std::min(rows, (unit + 1) * many), thread);
    });
}

// Two rows of `width` floats for each thread.
struct Scratch {
    Scratch(int64_t threads, int64_t width)
        : stride(2 * ((width + ROW_ALIGNMENT - 1) / ROW_ALIGNMENT * ROW_ALIGNMENT)),
          memory(new float[std::max<int64_t>(1, threads) * stride]) {}
    float *of(int64_t thread) const { return memory.get() + thread * stride; }
    int64_t stride;
    std::unique_ptr<float[]> memory;
};

}  // namespace
}  // namespace keyspan

using namespace keyspan;

EXPORT const char *keyspan_rms_norm_fields() { return KEYSPAN_DESCRIPTION(KEYSPAN_RMS_NORM_FIELDS); }
EXPORT const char *keyspan_layer_norm_fields() { return KEYSPAN_DESCRIPTION(KEYSPAN_LAYER_NORM_FIELDS); }
EXPORT const char *keyspan_segment_mean_fields() { return KEYSPAN_DESCRIPTION(KEYSPAN_SEGMENT_MEAN_FIELDS); }
EXPORT const char *keyspan_largest_fields() { return KEYSPAN_DESCRIPTION(KEYSPAN_LARGEST_FIELDS); }
EXPORT const char *keyspan_rotary_fields() { return KEYSPAN_DESCRIPTION(KEYSPAN_ROTARY_FIELDS); }
EXPORT const char *keyspan_gate_fields() { return KEYSPAN_DESCRIPTION(KEYSPAN_GATE_FIELDS); }
EXPORT const char *keyspan_cross_entropy_fields() { return KEYSPAN_DESCRIPTION(KEYSPAN_CROSS_ENTROPY_FIELDS); }

EXPORT void keyspan_rms_norm(const RmsNorm *p) {
    const Scratch scratch(p->threads, p->D);
    for_rows(p->threads, p->T, p->D, [&](int64_t first, int64_t last, int64_t thread) {
        kernels_of(p->isa)->rms_norm(*p, first, last, scratch.of(thread));
    });
}

EXPORT void keyspan_rms_norm_backward(const RmsNorm *p) {
    const Scratch scratch(p->threads, p->D);
    // Each part sums the gradient of the weight over its own rows, so that the sum does not depend on the threads.
    parallel_for(useful_threads(p->threads, p->T * p->D), p->parts, [&](int64_t part, int64_t thread) {
        float *sums = p->dweight ? p->dweight + part * p->D : nullptr;
        if (sums) std::fill(sums, sums + p->D, 0.0f);
        kernels_of(p->isa)->rms_norm_backward(*p, part * p->T / p->parts, (part + 1) * p->T / p->parts, sums,
                                              scratch.of(thread));
    });
    if (!p->dweight) return;
    for (int64_t part = 1; part < p->parts; part++)
        for (int64_t i = 0; i < p->D; i++) p->dweight[i] += p->dweight[part * p->D + i];
}

EXPORT void keyspan_layer_norm(const LayerNorm *p) {
    const Scratch scratch(p->threads, p->D);
    for_rows(p->threads, p->T, p->D, [&](int64_t first, int64_t last, int64_t thread) {
        kernels_of(p->isa)->layer_norm(*p, first, last, scratch.of(thread));
    });
}

EXPORT void keyspan_segment_mean(const SegmentMean *p) {
    const Scratch scratch(p->threads, p->D);
    const int64_t numbers = p->count ? p->ends[p->count - 1] * p->D : 0;
    parallel_for(useful_threads(p->threads, numbers), p->count, [&](int64_t segment, int64_t thread) {
        kernels_of(p->isa)->segment_mean(*p, segment, scratch.of(thread));
    });
}

EXPORT void keyspan_largest(const Largest *p) {
    for_rows(p->threads, p->T, p->C,
             [&](int64_t first, int64_t last, int64_t) { kernels_of(p->isa)->largest(*p, first, last); });
}

EXPORT void keyspan_rotary(const Rotary *p) {
    for_rows(p->threads, p->T, p->K * (p->heads[0] + p->heads[1] + p->heads[2]),
             [&](int64_t first, int64_t last, int64_t) { kernels_of(p->isa)->rotary(*p, first, last); });
}

EXPORT void keyspan_gate(const Gate *p) {
    for_rows(p->threads, p->T, 2 * p->D,
             [&](int64_t first, int64_t last, int64_t) { kernels_of(p->isa)->gate(*p, first, last); });
}

EXPORT void keyspan_gate_backward(const Gate *p) {
    for_rows(p->threads, p->T, 2 * p->D,
             [&](int64_t first, int64_t last, int64_t) { kernels_of(p->isa)->gate_backward(*p, first, last); });
}

EXPORT void keyspan_cross_entropy(const CrossEntropy *p) {
    const Scratch scratch(p->threads, p->C);
    for_rows(p->threads, p->T, p->C, [&](int64_t first, int64_t last, int64_t thread) {
        kernels_of(p->isa)->cross_entropy(*p, first, last, scratch.of(thread));
    });
}
