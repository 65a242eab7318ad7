// The one product that everything is made of: C (+)= A·B with A broadcast and B loaded. Knows nothing of attention.
//
// T is float, or uint32_t for pairs of bf16 that lie side by side along the dimension summed over.
#pragma once
#include "simd.h"

namespace keyspan {
namespace KEYSPAN_NAMESPACE {
namespace {

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
    typedef vf type;
};
template <>
struct VectorOf<uint32_t> {
    typedef vu type;
};

// R rows of C whole vectors; all of C stays in registers while `count` terms are summed.
template <int R, int C, class T>
INLINE void product_tile(int64_t count, const T *a, int64_t a_row, int64_t a_step, const T *b, int64_t b_step, float *c,
                         int64_t c_row, bool add) {
    typedef typename VectorOf<T>::type V;
    vf acc[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < C; j++) acc[r][j] = add ? load(c + r * c_row + j * W) : vf{};
    for (int64_t i = 0; i < count; i++) {
        V column[C];
#pragma GCC unroll 4
        for (int j = 0; j < C; j++) column[j] = load(b + i * b_step + j * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const V x = all(a[r * a_row + i * a_step]);
#pragma GCC unroll 4
            for (int j = 0; j < C; j++) acc[r][j] = multiply_add(acc[r][j], x, column[j]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < C; j++) store(c + r * c_row + j * W, acc[r][j]);
}

template <int R, class T>
__attribute__((noinline)) void product_rows(int64_t count, const T *a, int64_t a_row, int64_t a_step, const T *b,
                                            int64_t b_step, float *c, int64_t c_row, int vectors, bool add) {
    for (; vectors >= COLUMNS; vectors -= COLUMNS, b += COLUMNS * W, c += COLUMNS * W)
        product_tile<R, COLUMNS>(count, a, a_row, a_step, b, b_step, c, c_row, add);
    if (COLUMNS > 2 && vectors == 3) product_tile<R, 3>(count, a, a_row, a_step, b, b_step, c, c_row, add);
    if (COLUMNS > 2 && vectors == 2) product_tile<R, 2>(count, a, a_row, a_step, b, b_step, c, c_row, add);
    if (vectors == 1) product_tile<R, 1>(count, a, a_row, a_step, b, b_step, c, c_row, add);
}

// c[r, j] (+)= Σ_i a[r · a_row + i · a_step] · b[i · b_step + j] for 1 to ROWS rows and `vectors` vectors of columns.
template <class T>
INLINE void product(int rows, int64_t count, const T *a, int64_t a_row, int64_t a_step, const T *b, int64_t b_step,
                    float *c, int64_t c_row, int64_t vectors, bool add) {
    const int v = (int)vectors;
    switch (rows) {
    case 1: return product_rows<1>(count, a, a_row, a_step, b, b_step, c, c_row, v, add);
    case 2: return product_rows<2>(count, a, a_row, a_step, b, b_step, c, c_row, v, add);
    case 3: return product_rows<3>(count, a, a_row, a_step, b, b_step, c, c_row, v, add);
    case 4: return product_rows<4>(count, a, a_row, a_step, b, b_step, c, c_row, v, add);
    case 5: return product_rows<5>(count, a, a_row, a_step, b, b_step, c, c_row, v, add);
    default: return product_rows<6>(count, a, a_row, a_step, b, b_step, c, c_row, v, add);
    }
}

}  // namespace
}  // namespace KEYSPAN_NAMESPACE
}  // namespace keyspan
