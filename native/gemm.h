// The matrix product that every kernel uses: C (+)= A·B with A broadcast and B loaded. Depends on simd.h only.
//
// T is float, or uint32_t for pairs of bf16 that lie side by side along the summed dimension.
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

// R rows by C vectors of `c`; the accumulators stay in registers while `count` terms are summed.
template <int R, int C, class T>
INLINE void microkernel(int64_t count, const T *a, int64_t a_row, int64_t a_step, const T *b, int64_t b_step, float *c,
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
            const V x = broadcast(a[r * a_row + i * a_step]);
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
__attribute__((noinline)) void gemm_fixed_rows(int64_t count, const T *a, int64_t a_row, int64_t a_step, const T *b,
                                               int64_t b_step, float *c, int64_t c_row, int vectors, bool add) {
    for (; vectors >= COLUMNS; vectors -= COLUMNS, b += COLUMNS * W, c += COLUMNS * W)
        microkernel<R, COLUMNS>(count, a, a_row, a_step, b, b_step, c, c_row, add);
    if (COLUMNS > 2 && vectors == 3) microkernel<R, 3>(count, a, a_row, a_step, b, b_step, c, c_row, add);
    if (COLUMNS > 2 && vectors == 2) microkernel<R, 2>(count, a, a_row, a_step, b, b_step, c, c_row, add);
    if (vectors == 1) microkernel<R, 1>(count, a, a_row, a_step, b, b_step, c, c_row, add);
}

// c[r, j] (+)= Σ_i a[r · a_row + i · a_step] · b[i · b_step + j] for 1 to ROWS rows r and `vectors` · W columns j.
template <class T>
INLINE void gemm(int rows, int64_t count, const T *a, int64_t a_row, int64_t a_step, const T *b, int64_t b_step,
                 float *c, int64_t c_row, int64_t vectors, bool add) {
    const int v = (int)vectors;
    switch (rows) {
    case 1: return gemm_fixed_rows<1>(count, a, a_row, a_step, b, b_step, c, c_row, v, add);
    case 2: return gemm_fixed_rows<2>(count, a, a_row, a_step, b, b_step, c, c_row, v, add);
    case 3: return gemm_fixed_rows<3>(count, a, a_row, a_step, b, b_step, c, c_row, v, add);
    case 4: return gemm_fixed_rows<4>(count, a, a_row, a_step, b, b_step, c, c_row, v, add);
    case 5: return gemm_fixed_rows<5>(count, a, a_row, a_step, b, b_step, c, c_row, v, add);
    default: return gemm_fixed_rows<6>(count, a, a_row, a_step, b, b_step, c, c_row, v, add);
    }
}

}  // namespace
}  // namespace KEYSPAN_NAMESPACE
}  // namespace keyspan
