// The C ABI: what Python hands over in one flat block of 8-byte fields. Knows nothing of how attention is computed.
//
// Letters: B batch, M queries, N keys in memory, G key/value heads, H query heads per group, K key dim, V value dim.
// Strides count elements. The same order of fields is packed by saccade/backends/native/library.py.
#pragma once
#include <cstdint>

namespace saccade {

enum Dtype : int64_t { F32 = 0, BF16 = 1, F16 = 2 };

enum Isa : int64_t { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512BF16 = 3, ISAS = 4 };

// A mask (bytes, 1 = visible) or a bias [B|1, G|1, H|1, M|1, N|1]; strides are 0 where it broadcasts.
struct Dense {
    const void *data;
    int64_t dtype;
    int64_t stride[5];
    // Sums of gradients, fp32, of shape [C|1, B|1, G|1, H|1, M|1, N|1] with C row chunks; null where none is wanted.
    float *grad;
    int64_t grad_stride[6];
};

struct Params {
    int64_t isa, threads, dtype, out_dtype;
    int64_t B, M, N, G, H, K, V;
    const char *q;
    int64_t q_stride[5];
    const char *k;
    int64_t k_stride[4];
    const char *v;
    int64_t v_stride[4];
    // [S, RB, M], RB = 1 or B; all null: every key is visible and row i stands at key i.
    const int32_t *lo, *hi, *diagonal;
    int64_t S, RB;
    // Paged keys: row `sequence[i]` of block_table [sequences, pages]; null where keys are not paged.
    const int32_t *sequence, *block_table;
    int64_t sequences, pages, page_size;
    const Dense *mask;
    const Dense *biases;
    int64_t bias_count;
    const float *slopes;  // [B or 1, G, H]
    int64_t slopes_by_batch;
    const float *table;  // [G, H, 2 reach + 1]
    int64_t reach;
    const float *sinks;  // [G, H]
    const int64_t *seed;
    double scale, softcap, dropout_p;
    char *out;   // [B, M, G, H, V] of out_dtype, contiguous
    float *lse;  // [B, G, H, M], contiguous
    // Backward only. Results are contiguous; null where not wanted.
    const char *grad_out;  // of out_dtype
    int64_t grad_out_stride[5];
    const float *grad_lse;
    char *dq, *dk, *dv;                // of dtype
    float *dslopes, *dtable, *dsinks;  // [chunks, B, G, H(, 2 reach + 1)]
    int64_t chunks;                    // runs of rows, as `saccade_backward_chunks` said
    int64_t fold_batch, fold_groups;   // a bias gradient is shared by all batches, or all groups
    char *workspace;
};

}  // namespace saccade
