// The C ABI: what Python hands over in one flat block of 8-byte fields. Knows nothing of how attention is computed.
//
// Letters: B batch, M queries, N keys in memory, G key/value heads, H query heads per group, K key dim, V value dim.
// Strides count elements. The same order of fields is packed by keyspan/backends/native/binding.py.
#pragma once
#include <cstdint>

namespace keyspan {

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
    // What lies elsewhere from call to call comes first, so that Python can keep all that follows `threads`.
    const char *q, *k, *v;
    const int32_t *lo, *hi, *diagonal;        // [S, RB, M], RB = 1 or B; all null: row i sees every key, stands at key i
    const int32_t *sequence, *block_table;    // paged keys: row `sequence[i]` of [sequences, pages]; null for others
    const Dense *mask;                        // null for none
    const Dense *biases;                      // bias_count of them
    const float *slopes;                      // [B or 1, G, H]
    const float *table;                       // [G, H, 2 reach + 1]
    const float *sinks;                       // [G, H]
    const int64_t *seed;
    char *out;                                // [B, M, G, H, V] of out_dtype, contiguous
    float *lse;                               // [B, G, H, M], contiguous; forward: null where nobody asks for it
    // Backward only. Results are contiguous; null where not wanted.
    const char *grad_out;                     // of out_dtype
    const float *grad_lse;
    char *dq, *dk, *dv;                       // of dtype
    float *dslopes, *dtable, *dsinks;         // [chunks, B, G, H(, 2 reach + 1)]
    char *workspace;
    int64_t isa, threads;
    int64_t dtype, out_dtype;
    int64_t B, M, N, G, H, K, V;
    int64_t q_stride[5], k_stride[4], v_stride[4], grad_out_stride[5];
    int64_t S, RB;
    int64_t sequences, pages, page_size;
    int64_t bias_count, slopes_by_batch, reach;
    int64_t chunks;                           // runs of rows, as `keyspan_backward_chunks` said
    int64_t fold_batch, fold_groups;          // a bias gradient is shared by all batches, or all groups
    double scale, softcap, dropout_p;
};

}  // namespace keyspan
