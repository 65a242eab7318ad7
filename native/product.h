// Products of matrices, out = a · b + bias or out += a · b, such as those with a weight for many rows, and the gradients
// of these. What Python passes, and the kernels of each instruction set.
//
// Each element of `out` is one chain of multiply-adds over the summed dimension in ascending order, from zero or from
// what `out` holds: that of linear.h. The threads do not change its bits.
#pragma once
#include "params.h"

namespace keyspan {

// Fields as in params.h.
//   a        [M, K] of dtype; where `a_transposed`, it lies as [K, M]. Elements of a row are adjacent, rows a_stride
//            apart
//   b        [K, N] of b_dtype; where `b_transposed`, it lies as [N, K]; likewise with b_stride. b_dtype is dtype, or F32:
//            its numbers are rounded to dtype when they are packed
//   bias     of dtype [N], or null
//   out      [M, N] of out_dtype, contiguous; `accumulate` (for F32): sums begin with what it holds
#define KEYSPAN_PRODUCT_FIELDS(POINTER, INT, FLOAT)                                                         \
    POINTER(const char *, a) POINTER(const char *, b) POINTER(const char *, bias) POINTER(char *, out)      \
    INT(isa, 1) INT(threads, 1) INT(dtype, 1) INT(b_dtype, 1) INT(out_dtype, 1)                             \
    INT(a_transposed, 1) INT(b_transposed, 1) INT(accumulate, 1)                                            \
    INT(M, 1) INT(K, 1) INT(N, 1) INT(a_stride, 1) INT(b_stride, 1)

struct Product {
    KEYSPAN_PRODUCT_FIELDS(KEYSPAN_DECLARE_POINTER, KEYSPAN_DECLARE_INT, KEYSPAN_DECLARE_FLOAT)
};

// A kernel multiplies words: fp32 numbers, or pairs of bf16 numbers along the summed dimension. Some columns of b are
// packed at a time, in panels of 64: [panel][word][column], padded with zeros.
constexpr int64_t PRODUCT_ROWS = 192;     // most rows of a part of `out`, of which the second cache holds the sums
constexpr int64_t PRODUCT_COLUMNS = 512;  // columns of b that are packed at a time
constexpr int64_t PRODUCT_PANEL = 64;
// Most words of the summed dimension at a time. What b has of them in a panel lies in the second cache; in the first one
// where the rows of a are copied, which takes the second.
constexpr int64_t PRODUCT_BLOCK = 512, PRODUCT_COPIED_BLOCK = 128;

struct ProductPart {
    int64_t first_row, last_row, first_column, last_column;
};

// Sums and a copied block of a.
constexpr int64_t PRODUCT_SCRATCH = 4 * PRODUCT_ROWS * (PRODUCT_COLUMNS + PRODUCT_COPIED_BLOCK);

struct ProductKernels {
    int64_t (*words)(const Product &);  // of the summed dimension
    // Words first_word … last_word − 1 of the columns from `column` on, of one panel, to `packed`: the panel's word 0.
    void (*pack)(const Product &, int64_t column, int64_t first_word, int64_t last_word, char *packed);
    void (*multiply)(const Product &, const ProductPart &, const char *packed, char *scratch);
};

namespace portable {
const ProductKernels *product_kernels();
}
namespace avx2 {
const ProductKernels *product_kernels();
}
namespace avx512 {
const ProductKernels *product_kernels();
}
namespace avx512bf16 {
const ProductKernels *product_kernels();
}

}  // namespace keyspan
