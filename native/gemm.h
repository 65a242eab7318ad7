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

// How the sums of rows over one more block join the sums before: sum · keep + more, or, where keep is 1,
// sum + more · take. Each array has an entry for each row.
struct Merge {
    const float *keep, *take;
};

INLINE void merge_row(float *sum, const float *more, float keep, float take, int64_t width) {
    if (keep == 1)
        for (int64_t v = 0; v < width; v += W)
            store(sum + v, multiply_add(load(sum + v), load(more + v), broadcast(take)));
    else
        for (int64_t v = 0; v < width; v += W)
            store(sum + v, multiply_add(load(more + v), load(sum + v), broadcast(keep)));
}

// What becomes of `c`: it is overwritten, it is where sums begin, or the sums are merged into it. GIVE calls
// how(row, vector, sums) instead, while the sums are in registers, and prefetches `ahead_step` bytes of `ahead` a step.
enum Into { SET, ADD, MERGE, GIVE };

// R rows by C vectors of `c`; the accumulators stay in registers while `count` terms are summed, one after the other.
template <int R, int C, Into INTO, class T, class How>
INLINE void microkernel(int64_t count, const T *a, int64_t a_row, int64_t a_step, const T *b, int64_t b_step, float *c,
                        int64_t c_row, const How &how, const char *ahead = nullptr, int64_t ahead_step = 0) {
    typedef typename VectorOf<T>::type V;
    vf acc[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < C; j++) acc[r][j] = INTO == ADD ? load(c + r * c_row + j * W) : vf{};
    for (int64_t i = 0; i < count; i++) {
        V column[C];
        if constexpr (INTO == GIVE) __builtin_prefetch(ahead + i * ahead_step, 0, 2);
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
    for (int r = 0; r < R; r++) {
        float *to = c + r * c_row;
        if constexpr (INTO == GIVE) {
#pragma GCC unroll 4
            for (int j = 0; j < C; j++) how(r, j, acc[r][j]);
        } else if constexpr (INTO != MERGE) {
#pragma GCC unroll 4
            for (int j = 0; j < C; j++) store(to + j * W, acc[r][j]);
        } else if (how.keep[r] == 1) {
            const vf take = broadcast(how.take[r]);
#pragma GCC unroll 4
            for (int j = 0; j < C; j++) store(to + j * W, multiply_add(load(to + j * W), acc[r][j], take));
        } else {
            const vf keep = broadcast(how.keep[r]);
#pragma GCC unroll 4
            for (int j = 0; j < C; j++) store(to + j * W, multiply_add(acc[r][j], load(to + j * W), keep));
        }
    }
}

template <int R, Into INTO, class T>
__attribute__((noinline)) void gemm_fixed_rows(int64_t count, const T *a, int64_t a_row, int64_t a_step, const T *b,
                                               int64_t b_step, float *c, int64_t c_row, int vectors,
                                               Merge how) {
    for (; vectors >= COLUMNS; vectors -= COLUMNS, b += COLUMNS * W, c += COLUMNS * W)
        microkernel<R, COLUMNS, INTO>(count, a, a_row, a_step, b, b_step, c, c_row, how);
    if (COLUMNS > 2 && vectors == 3) microkernel<R, 3, INTO>(count, a, a_row, a_step, b, b_step, c, c_row, how);
    if (COLUMNS > 2 && vectors == 2) microkernel<R, 2, INTO>(count, a, a_row, a_step, b, b_step, c, c_row, how);
    if (vectors == 1) microkernel<R, 1, INTO>(count, a, a_row, a_step, b, b_step, c, c_row, how);
}

// c[r, j] (+)= Σ_i a[r · a_row + i · a_step] · b[i · b_step + j] for 1 to ROWS rows r and `vectors` · W columns j. How
// many rows there are does not change the bits of one. `how` is for MERGE.
template <Into INTO, class T>
INLINE void gemm(int rows, int64_t count, const T *a, int64_t a_row, int64_t a_step, const T *b, int64_t b_step,
                 float *c, int64_t c_row, int64_t vectors, Merge how = {}) {
    const int v = (int)vectors;
    switch (rows) {
    case 1: return gemm_fixed_rows<1, INTO>(count, a, a_row, a_step, b, b_step, c, c_row, v, how);
    case 2: return gemm_fixed_rows<2, INTO>(count, a, a_row, a_step, b, b_step, c, c_row, v, how);
    case 3: return gemm_fixed_rows<3, INTO>(count, a, a_row, a_step, b, b_step, c, c_row, v, how);
    case 4: return gemm_fixed_rows<4, INTO>(count, a, a_row, a_step, b, b_step, c, c_row, v, how);
    case 5: return gemm_fixed_rows<5, INTO>(count, a, a_row, a_step, b, b_step, c, c_row, v, how);
    default: return gemm_fixed_rows<6, INTO>(count, a, a_row, a_step, b, b_step, c, c_row, v, how);
    }
}

}  // namespace
}  // namespace KEYSPAN_NAMESPACE
}  // namespace keyspan
