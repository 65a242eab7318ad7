// The kernels of one instruction set, as a table for the planner; compiled once for each instruction set.
//
// Every product goes through gemm.h. bf16 is multiplied as pairs where the machine can (AVX-512-BF16); everything else
// is widened to fp32 when it is packed. Online softmax: Milakov & Gimelshein 2018; tiles and recomputation from lse:
// Dao et al. 2022. Scores are powers of two: exp(x) = 2^(x log2 e).
#include "backward.h"
#include "decode.h"

namespace keyspan {
namespace KEYSPAN_NAMESPACE {
namespace {

void pack_dispatch(const Plan &plan, bool with_gradients, int64_t slot, int64_t b, int64_t g, int64_t panel) {
    if constexpr (HAS_PAIRS)
        if (plan.pairs) return pack_keys<uint32_t>(plan, with_gradients, slot, b, g, panel);
    pack_keys<float>(plan, with_gradients, slot, b, g, panel);
}

void forward_dispatch(const Plan &plan, int64_t slot, int64_t b, int64_t g, const Tile &tile, char *scratch) {
    if constexpr (HAS_PAIRS)
        if (plan.pairs) return forward<uint32_t>(plan, slot, b, g, tile, scratch);
    forward<float>(plan, slot, b, g, tile, scratch);
}

void backward_dispatch(const Plan &plan, int64_t slot, int64_t b, int64_t g, const Chunk &chunk, float *grad_keys,
                       float *grad_values, float *grad_biases, char *scratch) {
    if constexpr (HAS_PAIRS)
        if (plan.pairs) return backward<uint32_t>(plan, slot, b, g, chunk, grad_keys, grad_values, grad_biases, scratch);
    backward<float>(plan, slot, b, g, chunk, grad_keys, grad_values, grad_biases, scratch);
}

}  // namespace

const Kernels *kernels() {
    static const Kernels table{pack_dispatch,     forward_dispatch, decode,   combine,
                             backward_dispatch, write_key_grads,  HAS_PAIRS};
    return &table;
}

}  // namespace KEYSPAN_NAMESPACE
}  // namespace keyspan
