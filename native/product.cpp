// Cuts a product of matrices into parts and runs them on threads; see product.h.
#include "product.h"

#include "scratch.h"
#include "threads.h"

namespace keyspan {
namespace {

const ProductKernels *kernels_of(int64_t isa) {
#if defined(__x86_64__)
    if (isa == AVX512BF16) return avx512bf16::product_kernels();
    if (isa == AVX512) return avx512::product_kernels();
    if (isa == AVX2) return avx2::product_kernels();
#endif
    return portable::product_kernels();
}

constexpr int64_t SMALL_WORK = 1 << 17;  // multiply-adds that are not worth waking a thread
constexpr int64_t ROW_STEP = 6;          // rows that are multiplied together: `ROWS` of simd.h
constexpr int64_t FEWEST_ROWS = 48;      // of a part
constexpr int64_t PARTS_PER_THREAD = 4;
constexpr int64_t WORDS_AT_A_TIME = 512;    // of a panel
constexpr int64_t MOST_KEPT = 8 << 20;  // bytes of packed columns, but for one part; a thread keeps them for its next product

int64_t quotient(int64_t a, int64_t b) { return (a + b - 1) / b; }

void run(const Product &p) {
    const ProductKernels &kernels = *kernels_of(p.isa);
    const int64_t threads = p.M * p.K * p.N < SMALL_WORK ? 1 : p.threads;
    // Parts of rows differ by a step at most, and every thread gets as many.
    const int64_t steps = quotient(p.M, ROW_STEP), fewest = quotient(steps, PRODUCT_ROWS / ROW_STEP);
    const int64_t wanted = std::max(fewest, std::min(threads * PARTS_PER_THREAD, quotient(p.M, FEWEST_ROWS)));
    const int64_t parts = threads == 1 ? fewest : std::min(steps, quotient(wanted, threads) * threads);
    const int64_t words = kernels.words(p), panel_bytes = 4 * words * PRODUCT_PANEL;
    const int64_t panels = quotient(p.N, PRODUCT_PANEL), groups = quotient(p.N, PRODUCT_COLUMNS);
    const int64_t group = quotient(panels, groups);  // panels of a part of `out`
    const int64_t packed_panels = std::min(panels, std::max<int64_t>(1, MOST_KEPT / std::max<int64_t>(1, group * panel_bytes)) * group);

    static thread_local Scratch kept;
    Scratch own;
    const int64_t bytes = packed_panels * panel_bytes;
    char *const packed = (bytes > MOST_KEPT ? own : kept).get(bytes);
    for (int64_t first = 0; first < panels; first += packed_panels) {
        const int64_t last = std::min(panels, first + packed_panels), runs = quotient(words, WORDS_AT_A_TIME);
        parallel_for(threads, (last - first) * runs, [&](int64_t unit, int64_t) {
            const int64_t panel = unit / runs, word = unit % runs * WORDS_AT_A_TIME;
            kernels.pack(p, (first + panel) * PRODUCT_PANEL, word, std::min(words, word + WORDS_AT_A_TIME),
                         packed + panel * panel_bytes);
        });
        parallel_for(threads, quotient(last - first, group) * parts, [&](int64_t unit, int64_t) {
            static thread_local Scratch scratch;
            const int64_t part = unit % parts, panel = unit / parts * group;
            const int64_t row = part * steps / parts * ROW_STEP, end = (part + 1) * steps / parts * ROW_STEP;
            kernels.multiply(p,
                             {row, std::min(p.M, end), (first + panel) * PRODUCT_PANEL,
                              std::min(p.N, (first + std::min(last - first, panel + group)) * PRODUCT_PANEL)},
                             packed + panel * panel_bytes, scratch.get(PRODUCT_SCRATCH));
        });
    }
}

}  // namespace
}  // namespace keyspan

EXPORT const char *keyspan_product_fields() { return KEYSPAN_DESCRIPTION(KEYSPAN_PRODUCT_FIELDS); }

EXPORT void keyspan_product(const keyspan::Product *p) {
    if (p->M > 0 && p->N > 0) keyspan::run(*p);
}
