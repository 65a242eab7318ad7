// Products with a weight, out = f(x · weightᵀ · scale + bias): what Python passes, and the kernels of each instruction set.
//
// A column of `out` is one row of the weight. Weights are read as words of 4 bytes along the summed dimension: one fp32
// number, two bf16 or fp16 numbers, or four int8 numbers. They lie row by row as PyTorch has them, or packed in panels
// of 64 columns, [panel][word][column], padded with zeros, so that a thread reads consecutive memory.
//
// Each element of `out` is one chain of multiply-adds over the summed dimension in ascending order, from zero. Neither
// the number of rows, nor their position, nor the threads, nor the storage of the weight changes its bits.
#pragma once
#include "params.h"

namespace keyspan {

enum Applied : int64_t { NOTHING = 0, ERF_GELU = 1 };  // f(y) = y, or y · Φ(y) with the normal distribution's Φ

enum Storage : int64_t { ROWS_OF_DTYPE = 0, PANELS_OF_DTYPE = 1, PANELS_OF_INT8 = 2 };

// Fields as in params.h.
//   x        [rows, inputs] of dtype, elements of a row adjacent; out [rows, outputs] of dtype, contiguous. `inputs` and
//            both strides are multiples of the numbers in a word
//   weight   ROWS_OF_DTYPE: [outputs, inputs] with rows weight_stride elements apart; else packed panels
//   scale    fp32 [outputs], or null
//   bias     of dtype [outputs], or null
#define KEYSPAN_LINEAR_FIELDS(POINTER, INT, FLOAT)                                                                  \
    POINTER(const char *, x) POINTER(const char *, weight) POINTER(const float *, scale) POINTER(const char *, bias) \
    POINTER(char *, out)                                                                                           \
    INT(isa, 1) INT(threads, 1) INT(dtype, 1) INT(storage, 1) INT(applied, 1)                                      \
    INT(rows, 1) INT(inputs, 1) INT(outputs, 1) INT(x_stride, 1) INT(weight_stride, 1)

struct Linear {
    KEYSPAN_LINEAR_FIELDS(KEYSPAN_DECLARE_POINTER, KEYSPAN_DECLARE_INT, KEYSPAN_DECLARE_FLOAT)
};

constexpr int LINEAR_PANEL = 64;  // columns of a panel

static inline int64_t numbers_per_word(const Linear &p) {
    return p.storage == PANELS_OF_INT8 ? 4 : p.dtype == F32 ? 1 : 2;
}

// Columns first_column … last_column − 1 of rows first_row … last_row − 1; first_column is a multiple of 16.
typedef void (*LinearKernel)(const Linear &, int64_t first_row, int64_t last_row, int64_t first_column,
                             int64_t last_column, char *scratch);

constexpr int64_t LINEAR_BLOCK = 128;  // words of a weight that are unpacked at a time
constexpr int64_t LINEAR_WHOLE = 2048;  // words of a panel that are multiplied in one go: the second cache holds them

// Most rows of a unit: the second cache holds them; more, where unpacking a weight is shared by them.
static inline int64_t linear_rows(const Linear &p) { return p.storage == PANELS_OF_DTYPE ? 96 : 192; }

// What a unit needs as `scratch`, in bytes.
static inline int64_t linear_scratch(const Linear &p) {
    const int64_t most = linear_rows(p), rows = p.rows < most ? p.rows : most;
    return 4 * (5 * LINEAR_BLOCK * LINEAR_PANEL + rows * (LINEAR_PANEL + p.inputs));
}

namespace portable {
LinearKernel linear_kernel();
}
namespace avx2 {
LinearKernel linear_kernel();
}
namespace avx512 {
LinearKernel linear_kernel();
}
namespace avx512bf16 {
LinearKernel linear_kernel();
}

}  // namespace keyspan
