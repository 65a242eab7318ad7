// The C ABI of the layers' kernels (RMSNorm, LayerNorm, rotary embedding, the gate of SwiGLU and GeGLU, cross-entropy), and
// the table of their kernels for one instruction set. Everything here works on contiguous rows: T rows (tokens) of D or C numbers.
// Storage is fp32, bf16 or fp16, arithmetic fp32. A row's result depends on that row alone.
#pragma once
#include "params.h"

namespace keyspan {

// Structs as in params.h. Forward of `rms_norm` reads x, residual (or null) and weight, and writes total (where there
// is a residual), out and inverse [T] = 1 / rms. Backward reads grad (as out), grad_total (as total; or null), weight,
// inverse and what was normed: total, or its sum with residual where that is not null. It writes dx (as total), the same
// once more as dresidual (as residual; or null), out again (or null), and the sums dweight [parts, D] over runs of rows
// (or null), the first of which becomes their total.
#define KEYSPAN_RMS_NORM_FIELDS(POINTER, INT, FLOAT)                                                             \
    POINTER(const void *, x) POINTER(const void *, residual) POINTER(const float *, weight)                      \
    POINTER(void *, total) POINTER(void *, out) POINTER(float *, inverse)                                        \
    POINTER(const void *, grad) POINTER(const void *, grad_total) POINTER(void *, dx) POINTER(void *, dresidual) \
    POINTER(float *, dweight)                                                                                    \
    INT(isa, 1) INT(threads, 1) INT(total_dtype, 1) INT(residual_dtype, 1) INT(out_dtype, 1)                     \
    INT(T, 1) INT(D, 1) INT(parts, 1)                                                                            \
    FLOAT(eps)

// LayerNorm of a sum, forward only: out [T, D] = (z - mean) / sqrt(variance + eps) * weight + bias with z = x + residual
// (or x where that is null). `out` may be x.
#define KEYSPAN_LAYER_NORM_FIELDS(POINTER, INT, FLOAT)                                        \
    POINTER(const void *, x) POINTER(const void *, residual) POINTER(const float *, weight)   \
    POINTER(const float *, bias) POINTER(void *, out)                                         \
    INT(isa, 1) INT(threads, 1) INT(dtype, 1) INT(T, 1) INT(D, 1)                             \
    FLOAT(eps)

// Heads of K numbers: `heads` of query and of key are rotated, those of value are copied, and written to `out` one
// behind the other. Strides are those between tokens. Cosine and sine are [T, K / 2]. Where a source is `out` itself
// it is rotated in place.
#define KEYSPAN_ROTARY_FIELDS(POINTER, INT, FLOAT)                                                \
    POINTER(const void *, q) POINTER(const void *, k) POINTER(const void *, v)                    \
    POINTER(const float *, cosine) POINTER(const float *, sine) POINTER(void *, out)              \
    INT(isa, 1) INT(threads, 1) INT(dtype, 1) INT(T, 1) INT(K, 1) INT(heads, 3) INT(stride, 3)    \
    INT(out_stride, 1) INT(back, 1) INT(interleaved, 1)

// out [T, D] = f(x1) · x2 of x12 [T, 2 D]. Backward also reads grad [T, D] and writes dx12 [T, 2 D].
enum Activation : int64_t { SILU = 0, GELU = 1 };  // gelu in its tanh form
#define KEYSPAN_GATE_FIELDS(POINTER, INT, FLOAT)                                                              \
    POINTER(const void *, x12) POINTER(const void *, grad) POINTER(void *, out) POINTER(void *, dx12)         \
    INT(isa, 1) INT(threads, 1) INT(dtype, 1) INT(activation, 1) INT(T, 1) INT(D, 1)

// Logits z [T, C]; bias [C], or null. Writes losses [T] and lse [T] where they are not null, and over z, where `gradient`
// is set, its gradient for losses of gradient grads [T] (null: 1).
#define KEYSPAN_CROSS_ENTROPY_FIELDS(POINTER, INT, FLOAT)                                                           \
    POINTER(void *, z) POINTER(const float *, bias) POINTER(const int64_t *, targets)                               \
    POINTER(float *, lse) POINTER(float *, losses) POINTER(const float *, grads)                                    \
    INT(isa, 1) INT(threads, 1) INT(dtype, 1) INT(stride, 1) INT(T, 1) INT(C, 1)                                    \
    INT(ignore_index, 1) INT(gradient, 1)                                                                           \
    FLOAT(softcap) FLOAT(z_loss)

struct RmsNorm {
    KEYSPAN_RMS_NORM_FIELDS(KEYSPAN_DECLARE_POINTER, KEYSPAN_DECLARE_INT, KEYSPAN_DECLARE_FLOAT)
};

// best[t] is where the first of the largest numbers of row t of z [T, C] is, or the first NaN; −1 − that, where it is
// infinite or NaN.
#define KEYSPAN_LARGEST_FIELDS(POINTER, INT, FLOAT)          \
    POINTER(const void *, z) POINTER(int32_t *, best)        \
    INT(isa, 1) INT(threads, 1) INT(dtype, 1) INT(T, 1) INT(C, 1)

struct Largest {
    KEYSPAN_LARGEST_FIELDS(KEYSPAN_DECLARE_POINTER, KEYSPAN_DECLARE_INT, KEYSPAN_DECLARE_FLOAT)
};

struct LayerNorm {
    KEYSPAN_LAYER_NORM_FIELDS(KEYSPAN_DECLARE_POINTER, KEYSPAN_DECLARE_INT, KEYSPAN_DECLARE_FLOAT)
};

// out [count, D] in fp32: means of runs of rows of x, of which the first begins at row 0 and number i ends before row ends[i].
#define KEYSPAN_SEGMENT_MEAN_FIELDS(POINTER, INT, FLOAT)                                           \
    POINTER(const void *, x) POINTER(const int32_t *, ends) POINTER(float *, out)                  \
    INT(isa, 1) INT(threads, 1) INT(dtype, 1) INT(count, 1) INT(D, 1)

struct SegmentMean {
    KEYSPAN_SEGMENT_MEAN_FIELDS(KEYSPAN_DECLARE_POINTER, KEYSPAN_DECLARE_INT, KEYSPAN_DECLARE_FLOAT)
};

struct Rotary {
    KEYSPAN_ROTARY_FIELDS(KEYSPAN_DECLARE_POINTER, KEYSPAN_DECLARE_INT, KEYSPAN_DECLARE_FLOAT)
};

struct Gate {
    KEYSPAN_GATE_FIELDS(KEYSPAN_DECLARE_POINTER, KEYSPAN_DECLARE_INT, KEYSPAN_DECLARE_FLOAT)
};

struct CrossEntropy {
    KEYSPAN_CROSS_ENTROPY_FIELDS(KEYSPAN_DECLARE_POINTER, KEYSPAN_DECLARE_INT, KEYSPAN_DECLARE_FLOAT)
};

// Rows padded to whole vectors of any instruction set.
constexpr int64_t ROW_ALIGNMENT = 16;

// Each computes rows `first` to `last` − 1, or one segment. `scratch` holds two rows of D or C floats, padded to ROW_ALIGNMENT.
struct LayerKernels {
    void (*rms_norm)(const RmsNorm &, int64_t first, int64_t last, float *scratch);
    void (*rms_norm_backward)(const RmsNorm &, int64_t first, int64_t last, float *dweight, float *scratch);
    void (*layer_norm)(const LayerNorm &, int64_t first, int64_t last, float *scratch);
    void (*segment_mean)(const SegmentMean &, int64_t segment, float *scratch);
    void (*largest)(const Largest &, int64_t first, int64_t last);
    void (*rotary)(const Rotary &, int64_t first, int64_t last);
    void (*gate)(const Gate &, int64_t first, int64_t last);
    void (*gate_backward)(const Gate &, int64_t first, int64_t last);
    void (*cross_entropy)(const CrossEntropy &, int64_t first, int64_t last, float *scratch);
};

namespace portable {
const LayerKernels *layer_kernels();
}
namespace avx2 {
const LayerKernels *layer_kernels();
}
namespace avx512 {
const LayerKernels *layer_kernels();
}
namespace avx512bf16 {
const LayerKernels *layer_kernels();
}

}  // namespace keyspan
