// The C ABI: the structs that Python passes to the library. Depends on nothing else.
//
// Letters: B batch, M queries, N keys in memory, G key/value heads, H query heads per group, K key dim, V value dim.
// Strides count elements. Every field is a run of 8-byte values. Each struct and its description, which
// `keyspan_params_fields` and `keyspan_dense_fields` return, are generated from one list of fields; binding.py compares
// the descriptions with its own lists when it loads the library.
#pragma once
#include <cstdint>

// A function that Python calls.
#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace keyspan {

enum Dtype : int64_t { F32 = 0, BF16 = 1, F16 = 2 };

enum Stored : int64_t { AS_DTYPE = 0, INT8 = 1, E4M3 = 2 };

enum Isa : int64_t { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512BF16 = 3, ISAS = 4 };

// POINTER(type, name), INT(name, count) or FLOAT(name); a field of count 1 is a scalar, of others an array.
// A mask (bytes, 1 = visible) or a dense bias, [B|1, G|1, H|1, M|1, N|1]; a stride is 0 where the tensor broadcasts.
// `grad`: fp32 sums of gradients [B|1, G|1, H|1, M|1, columns], columns = N|1; of a dense bias without a row for each
// query [B, G, H, 1, columns]. Contiguous, zero at first; null where no gradient is wanted.
#define KEYSPAN_DENSE_FIELDS(POINTER, INT, FLOAT) \
    POINTER(const void *, data)                   \
    INT(dtype, 1)                                 \
    INT(stride, 5)                                \
    POINTER(float *, grad)                        \
    INT(grad_stride, 5)                           \
    INT(columns, 1)

// Fields that change from call to call come first: for a repeated call Python packs those up to `threads` and reuses
// the bytes of all that follow.
//   lo, hi, diagonal    [S, RB, M], RB = 1 or B; all null: row i sees every key and stands at key i
//   origin              [RB, M], first key of the row's document; null: 0
//   sequence            [M], row of block_table that a query reads; block_table [sequences, pages]; null: not paged
//   mask, biases        one Dense, bias_count of them; null for none
//   slopes              [B or 1, G, H]; table [G, H, 2 reach + 1]; sinks [G, H]
//   k_scale, v_scale    [B, N / k_run, G] and [B, N / v_run, G], contiguous: a key is its stored number times the scale;
//                       null where `stored` is 0
//   seed                one int64; null: no dropout
//   out                 [B, M, G, H, V] of out_dtype, contiguous
//   lse                 [B, G, H, M], contiguous; forward: null where it is not wanted
//   grad_out … dsinks   backward only; grad_out is of out_dtype. Results are contiguous, and null where not wanted:
//                       dq, dk, dv of dtype (dk, dv of paged keys: fp32), dslopes, dtable, dsinks
//                       [B, G, H(, 2 reach + 1)]
//   workspace           null: the library uses its own memory where that is large enough
//   stored              how keys and values are stored: as dtype, or in 8 bits, the numbers of a row side by side; forward
//                       only
//   fold_batch, fold_groups   one unit of work computes all batch entries, or all groups: they share a bias gradient
#define KEYSPAN_PARAMS_FIELDS(POINTER, INT, FLOAT)                                                                  \
    POINTER(const char *, q) POINTER(const char *, k) POINTER(const char *, v)                                     \
    POINTER(const int32_t *, lo) POINTER(const int32_t *, hi) POINTER(const int32_t *, diagonal) POINTER(const int32_t *, origin) \
    POINTER(const int32_t *, sequence) POINTER(const int32_t *, block_table)                                       \
    POINTER(const Dense *, mask) POINTER(const Dense *, biases)                                                    \
    POINTER(const float *, slopes) POINTER(const float *, table) POINTER(const float *, sinks)                     \
    POINTER(const float *, k_scale) POINTER(const float *, v_scale)                                                \
    POINTER(const int64_t *, seed)                                                                                 \
    POINTER(char *, out) POINTER(float *, lse)                                                                     \
    POINTER(const char *, grad_out) POINTER(const float *, grad_lse)                                               \
    POINTER(char *, dq) POINTER(char *, dk) POINTER(char *, dv)                                                    \
    POINTER(float *, dslopes) POINTER(float *, dtable) POINTER(float *, dsinks)                                    \
    POINTER(char *, workspace)                                                                                     \
    INT(isa, 1) INT(threads, 1)                                                                                    \
    INT(dtype, 1) INT(out_dtype, 1) INT(stored, 1) INT(k_run, 1) INT(v_run, 1)                                      \
    INT(B, 1) INT(M, 1) INT(N, 1) INT(G, 1) INT(H, 1) INT(K, 1) INT(V, 1)                                          \
    INT(q_stride, 5) INT(k_stride, 4) INT(v_stride, 4) INT(grad_out_stride, 5)                                     \
    INT(S, 1) INT(RB, 1)                                                                                           \
    INT(sequences, 1) INT(pages, 1) INT(page_size, 1)                                                              \
    INT(bias_count, 1) INT(slopes_by_batch, 1) INT(reach, 1)                                                       \
    INT(fold_batch, 1) INT(fold_groups, 1)                                                                         \
    FLOAT(scale) FLOAT(softcap) FLOAT(dropout_p)

// A scalar, or an array of `count`.
template <int count>
struct IntField {
    typedef int64_t type[count];
};
template <>
struct IntField<1> {
    typedef int64_t type;
};

#define KEYSPAN_DECLARE_POINTER(type, name) type name;
#define KEYSPAN_DECLARE_INT(name, count) IntField<count>::type name;
#define KEYSPAN_DECLARE_FLOAT(name) double name;

struct Dense {
    KEYSPAN_DENSE_FIELDS(KEYSPAN_DECLARE_POINTER, KEYSPAN_DECLARE_INT, KEYSPAN_DECLARE_FLOAT)
};

struct Params {
    KEYSPAN_PARAMS_FIELDS(KEYSPAN_DECLARE_POINTER, KEYSPAN_DECLARE_INT, KEYSPAN_DECLARE_FLOAT)
};

// "name:pointer", "name:int" with a count, or "name:float" for each field, in the order of the struct.
#define KEYSPAN_DESCRIBE_POINTER(type, name) #name ":pointer "
#define KEYSPAN_DESCRIBE_INT(name, count) #name ":int" #count " "
#define KEYSPAN_DESCRIBE_FLOAT(name) #name ":float "
#define KEYSPAN_DESCRIPTION(FIELDS) FIELDS(KEYSPAN_DESCRIBE_POINTER, KEYSPAN_DESCRIBE_INT, KEYSPAN_DESCRIBE_FLOAT)

}  // namespace keyspan
