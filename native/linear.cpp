// Cuts a product with a weight into units of rows and columns and runs them on threads; see linear.h.
#include "linear.h"

#include "product.h"
#include "scratch.h"
#include "threads.h"

EXPORT void keyspan_product(const keyspan::Product *);

namespace keyspan {
namespace {

LinearKernel kernel_of(int64_t isa) {
#if defined(__x86_64__)
    if (isa == AVX512BF16) return avx512bf16::linear_kernel();
    if (isa == AVX512) return avx512::linear_kernel();
    if (isa == AVX2) return avx2::linear_kernel();
#endif
    return portable::linear_kernel();
}

constexpr int64_t COLUMN_STEP = 16;   // a cache line of a packed weight
constexpr int64_t FEW_ROWS = 24;      // of which the time is that of reading the weight, once
constexpr int64_t MANY_ROWS = 96;     // for which a weight is worth packing first
constexpr int64_t ROW_STEP = 6;       // rows that are multiplied together: `ROWS` of simd.h
constexpr int64_t LAST_CACHE_WORDS = 2 << 20;
constexpr int64_t SMALL_WORK = 1 << 17;  // multiply-adds that are not worth waking a thread
constexpr int64_t SMALL_WORK_OF_TEAM = 1 << 14;  // nor one that is awake

int64_t quotient(int64_t a, int64_t b) { return (a + b - 1) / b; }

void run(const Linear &p) {
    if (p.storage == ROWS_OF_DTYPE && !p.scale && !p.applied && p.rows >= MANY_ROWS) {
        const Product product{p.x,     p.weight, p.bias, p.out,  p.isa,    p.threads, p.dtype,    p.dtype,        p.dtype,
                              0,       1,        0,      p.rows, p.inputs, p.outputs, p.x_stride, p.weight_stride};
        return keyspan_product(&product);
    }
    const LinearKernel kernel = kernel_of(p.isa);
    const int64_t scratch = linear_scratch(p);
    const int64_t threads = p.rows * p.inputs * p.outputs < (in_team() ? SMALL_WORK_OF_TEAM : SMALL_WORK) ? 1 : p.threads;
    // A thread reads one run of columns where rows are few; else it takes a panel's columns of some rows at a time.
    const bool few = p.rows <= FEW_ROWS;
    const int64_t steps = quotient(p.outputs, COLUMN_STEP);
    const int64_t column_units = few ? std::min(threads, steps) : quotient(p.outputs, LINEAR_PANEL);
    // Runs of rows differ by a step at most.
    const int64_t row_steps = quotient(p.rows, ROW_STEP), row_units = quotient(row_steps, linear_rows(p) / ROW_STEP);
    // One run of rows, which the second cache holds, meets all panels of a weight that the last cache holds; a larger
    // weight is read once, and each panel meets all rows.
    const bool rows_outside = p.inputs * p.outputs / numbers_per_word(p) <= LAST_CACHE_WORDS;
    parallel_for(threads, column_units * row_units, [&](int64_t unit, int64_t) {
        static thread_local Scratch kept;
        const int64_t c = rows_outside ? unit % column_units : unit / row_units;
        const int64_t r = rows_outside ? unit / column_units : unit % row_units;
        const int64_t first = few ? c * steps / column_units * COLUMN_STEP : c * LINEAR_PANEL;
        const int64_t last = few ? (c + 1) * steps / column_units * COLUMN_STEP : first + LINEAR_PANEL;
        kernel(p, r * row_steps / row_units * ROW_STEP,
               std::min(p.rows, (r + 1) * row_steps / row_units * ROW_STEP), first, std::min(p.outputs, last),
               kept.get(scratch));
    });
}

}  // namespace
}  // namespace keyspan

EXPORT const char *keyspan_linear_fields() { return KEYSPAN_DESCRIPTION(KEYSPAN_LINEAR_FIELDS); }

EXPORT void keyspan_linear(const keyspan::Linear *p) {
    if (p->rows > 0 && p->outputs > 0) keyspan::run(*p);
}
