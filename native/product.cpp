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
constexpr int64_t FEWEST_ROWS = 48;      // of a part
constexpr int64_t PARTS_PER_THREAD = 4;
constexpr int64_t WORDS_AT_A_TIME = 512;    // of a panel
constexpr int64_t MOST_KEPT = 16 << 20;  // bytes of packed columns that a thread keeps for its next product

int64_t quotient(int64_t a, int64_t b) { return (a + b - 1) / b; }

void run(const Product &p) {
    const ProductKernels &kernels = *kernels_of(p.isa);
    const int64_t threads = p.M * p.K * p.N < SMALL_WORK ? 1 : p.threads;
    const int64_t even = quotient(quotient(p.M, threads * PARTS_PER_THREAD), FEWEST_ROWS) * FEWEST_ROWS;
    const int64_t rows = threads == 1 ? PRODUCT_ROWS : std::min(PRODUCT_ROWS, even);
    const int64_t groups = quotient(p.N, PRODUCT_COLUMNS);
    const int64_t columns = quotient(quotient(p.N, groups), PRODUCT_PANEL) * PRODUCT_PANEL;
    const int64_t words = kernels.words(p), panel_bytes = 4 * words * PRODUCT_PANEL;

    static thread_local Scratch kept;
    Scratch own;
    const int64_t bytes = std::min(columns, quotient(p.N, PRODUCT_PANEL) * PRODUCT_PANEL) / PRODUCT_PANEL * panel_bytes;
    char *const packed = (bytes > MOST_KEPT ? own : kept).get(bytes);
    for (int64_t first = 0; first < p.N; first += columns) {
        const int64_t last = std::min(p.N, first + columns);
        const int64_t runs = quotient(words, WORDS_AT_A_TIME);
        parallel_for(threads, quotient(last - first, PRODUCT_PANEL) * runs, [&](int64_t unit, int64_t) {
            const int64_t panel = unit / runs, word = unit % runs * WORDS_AT_A_TIME;
            kernels.pack(p, first + panel * PRODUCT_PANEL, word, std::min(words, word + WORDS_AT_A_TIME),
                         packed + panel * panel_bytes);
        });
        parallel_for(threads, quotient(p.M, rows), [&](int64_t part, int64_t) {
            static thread_local Scratch scratch;
            kernels.multiply(p, {part * rows, std::min(p.M, (part + 1) * rows), first, last}, packed,
                             scratch.get(PRODUCT_SCRATCH));
        });
    }
}

}  // namespace
}  // namespace keyspan

EXPORT const char *keyspan_product_fields() { return KEYSPAN_DESCRIPTION(KEYSPAN_PRODUCT_FIELDS); }

EXPORT void keyspan_product(const keyspan::Product *p) {
    if (p->M > 0 && p->N > 0) keyspan::run(*p);
}
