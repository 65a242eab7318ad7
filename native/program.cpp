// A program: calls of the library's functions one after the other, such as those of all layers of a decoder's step or of an
// encoder, so that the caller pays for one call, and for one parallel region.
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>

#include "layers.h"
#include "linear.h"
#include "threads.h"

using namespace keyspan;

EXPORT void keyspan_linear(const Linear *);
EXPORT void keyspan_rms_norm(const RmsNorm *);
EXPORT void keyspan_layer_norm(const LayerNorm *);
EXPORT void keyspan_segment_mean(const SegmentMean *);
EXPORT void keyspan_largest(const Largest *);
EXPORT void keyspan_rotary(const Rotary *);
EXPORT void keyspan_gate(const Gate *);
EXPORT int64_t keyspan_forward(const Params *);

// Row t of from, `heads` heads of D numbers of dtype, goes to row slots[t] of `to`; from_stride is that between rows, in
// bytes. Where `stored` says so they become 8 bits, each head with its largest magnitude / 127 (INT8) or 448 (E4M3) as
// scale[slots[t]][head], see quantize.py.
#define KEYSPAN_STORE_FIELDS(POINTER, INT, FLOAT)                                                          \
    POINTER(const char *, from) POINTER(char *, to) POINTER(float *, scale) POINTER(const int64_t *, slots) \
    INT(threads, 1) INT(dtype, 1) INT(stored, 1) INT(T, 1) INT(heads, 1) INT(D, 1) INT(from_stride, 1)

struct Store {
    KEYSPAN_STORE_FIELDS(KEYSPAN_DECLARE_POINTER, KEYSPAN_DECLARE_INT, KEYSPAN_DECLARE_FLOAT)
};

EXPORT const char *keyspan_store_fields() { return KEYSPAN_DESCRIPTION(KEYSPAN_STORE_FIELDS); }

// Row t of `to` is row index[t] of `from`; rows of `size` bytes.
#define KEYSPAN_GATHER_FIELDS(POINTER, INT, FLOAT)                                          \
    POINTER(const char *, from) POINTER(char *, to) POINTER(const int32_t *, index)         \
    INT(threads, 1) INT(T, 1) INT(size, 1)

struct Gather {
    KEYSPAN_GATHER_FIELDS(KEYSPAN_DECLARE_POINTER, KEYSPAN_DECLARE_INT, KEYSPAN_DECLARE_FLOAT)
};

EXPORT const char *keyspan_gather_fields() { return KEYSPAN_DESCRIPTION(KEYSPAN_GATHER_FIELDS); }

// RMSNorm of each of `heads` heads of D numbers that begin every `stride` numbers in x, where they lie. `inverse`
// [T, heads].
#define KEYSPAN_HEAD_NORM_FIELDS(POINTER, INT, FLOAT)                                                        \
    POINTER(char *, x) POINTER(const float *, weight) POINTER(float *, inverse)                              \
    INT(isa, 1) INT(threads, 1) INT(dtype, 1) INT(T, 1) INT(D, 1) INT(heads, 1) INT(stride, 1) FLOAT(eps)

struct HeadNorm {
    KEYSPAN_HEAD_NORM_FIELDS(KEYSPAN_DECLARE_POINTER, KEYSPAN_DECLARE_INT, KEYSPAN_DECLARE_FLOAT)
};

EXPORT const char *keyspan_head_norm_fields() { return KEYSPAN_DESCRIPTION(KEYSPAN_HEAD_NORM_FIELDS); }

namespace {

enum Function : int64_t {
    LINEAR = 0, RMS_NORM = 1, ROTARY = 2, GATE = 3, STORE = 4, HEAD_NORM = 5, LAYER_NORM = 6, ATTENTION = 7,
    GATHER = 8, LARGEST = 9, SEGMENT_MEAN = 10
};

struct Call {
    int64_t function;
    const void *arguments;
};

float widened(int64_t dtype, const char *from, int64_t i) {
    if (dtype == F32) return ((const float *)from)[i];
    const uint16_t half = ((const uint16_t *)from)[i];
    uint32_t bits = (uint32_t)half << 16;
    float x;
    if (dtype == F16) {
        // Exponent and mantissa in place, rescaled by 2^112; infinity and NaN get fp32's exponent.
        bits = (uint32_t)(half & 0x7fff) << 13;
        memcpy(&x, &bits, 4);
        x *= 0x1p112f;
        memcpy(&bits, &x, 4);
        if ((half & 0x7c00) == 0x7c00) bits = 0x7f800000u | ((uint32_t)(half & 0x3ff) << 13);
        bits |= (uint32_t)(half & 0x8000) << 16;
    }
    memcpy(&x, &bits, 4);
    return x;
}

// The nearest number of E4M3, ties to even, for |x| <= 448.
uint8_t to_e4m3(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint8_t sign = (uint8_t)(bits >> 24 & 0x80);
    bits &= 0x7fffffffu;
    if (bits < 0x3c800000u) return sign | (uint8_t)std::nearbyint(std::fabs(x) * 0x1p9f);  // below 2^-6: multiples of 2^-9
    bits += 0x7ffff + (bits >> 20 & 1);
    return sign | (uint8_t)((bits >> 20) - (120 << 3));
}

void store_head(const Store &p, const char *from, char *to, float &scale) {
    float peak = 0;
    bool finite = true;
    for (int64_t i = 0; i < p.D; i++) {
        const float size = std::fabs(widened(p.dtype, from, i));
        finite &= size < INFINITY;
        peak = std::max(peak, size);
    }
    const float largest = p.stored == INT8 ? 127 : 448;
    scale = peak / largest;
    if (scale == 0) scale = 1;
    for (int64_t i = 0; i < p.D; i++) {
        const float x = finite ? std::max(-largest, std::min(largest, widened(p.dtype, from, i) / scale)) : 0;
        to[i] = p.stored == INT8 ? (char)(int8_t)std::nearbyint(x) : (char)to_e4m3(x);
    }
    if (!finite) scale = NAN;
}

void store(const Store &p) {
    const int64_t size = p.dtype == F32 ? 4 : 2, width = p.heads * p.D;
    if (p.stored == AS_DTYPE) {
        for (int64_t t = 0; t < p.T; t++)
            memcpy(p.to + p.slots[t] * width * size, p.from + t * p.from_stride, width * size);
        return;
    }
    parallel_for(p.threads, p.T, [&](int64_t t, int64_t) {
        for (int64_t h = 0; h < p.heads; h++)
            store_head(p, p.from + t * p.from_stride + h * p.D * size, p.to + p.slots[t] * width + h * p.D,
                       p.scale[p.slots[t] * p.heads + h]);
    });
}

void head_norm(const HeadNorm &p) {
    constexpr int64_t TOKENS = 16;  // of a unit of work
    const int64_t size = p.dtype == F32 ? 4 : 2;
    parallel_for(p.threads, (p.T + TOKENS - 1) / TOKENS, [&](int64_t unit, int64_t) {
        for (int64_t t = unit * TOKENS; t < std::min(p.T, (unit + 1) * TOKENS); t++) {
            RmsNorm one{};
            one.x = one.out = p.x + t * p.stride * size;
            one.weight = p.weight;
            one.inverse = p.inverse + t * p.heads;
            one.isa = p.isa;
            one.threads = 1;
            one.total_dtype = one.residual_dtype = one.out_dtype = p.dtype;
            one.T = p.heads;
            one.D = p.D;
            one.eps = p.eps;
            keyspan_rms_norm(&one);
        }
    });
}

void gather(const Gather &p) {
    constexpr int64_t ROWS = 32;  // of a unit of work
    parallel_for(p.threads, (p.T + ROWS - 1) / ROWS, [&](int64_t unit, int64_t) {
        for (int64_t t = unit * ROWS; t < std::min(p.T, (unit + 1) * ROWS); t++)
            memcpy(p.to + t * p.size, p.from + p.index[t] * p.size, p.size);
    });
}

void attend(const Params *p) {
    const int64_t bytes = keyspan_forward(p);
    if (!bytes) return;
    // Memory that the thread keeps for the next layer, which wants as much.
    thread_local std::unique_ptr<char[]> workspace;
    thread_local int64_t size = 0;
    if (size < bytes) {
        workspace.reset(new char[bytes]);
        size = bytes;
    }
    Params own = *p;
    own.workspace = workspace.get();
    keyspan_forward(&own);
}

// A number of a struct that differs from part to part: word `word` of the structs becomes base + scale · number `of` of
// the part.
struct Change {
    int64_t word, base, scale, of;
};

constexpr int64_t PART_NUMBERS = 4;  // first row, rows, first document, documents

void run(const Call &call) {
    switch (call.function) {
    case LINEAR: return keyspan_linear((const Linear *)call.arguments);
    case RMS_NORM: return keyspan_rms_norm((const RmsNorm *)call.arguments);
    case ROTARY: return keyspan_rotary((const Rotary *)call.arguments);
    case GATE: return keyspan_gate((const Gate *)call.arguments);
    case STORE: return store(*(const Store *)call.arguments);
    case GATHER: return gather(*(const Gather *)call.arguments);
    case SEGMENT_MEAN: return keyspan_segment_mean((const SegmentMean *)call.arguments);
    case LARGEST: return keyspan_largest((const Largest *)call.arguments);
    case LAYER_NORM: return keyspan_layer_norm((const LayerNorm *)call.arguments);
    case HEAD_NORM: return head_norm(*(const HeadNorm *)call.arguments);
    case ATTENTION: return attend((const Params *)call.arguments);
    }
}

}  // namespace

// Runs `count` calls on up to `threads` threads. Arguments are checked by the caller.
EXPORT void keyspan_run(const Call *calls, int64_t count, int64_t threads) {
    with_team(threads, [&] {
        for (const Call *call = calls; call < calls + count; call++) run(*call);
    });
}

// Runs a program for each of `parts` runs of rows that need nothing of each other, such as whole documents. The program is
// cut into stages, whose calls begin at stage_begins: all parts pass one stage before the next, so that its weights stay in
// the last cache, while what a part computes within a stage stays in the second. A thread does not wait for others but for
// the one that still has the part in the stage before.
//
// Each thread has structs of its own, `structs` [threads][words], to which calls [threads][count] point, and memory of its
// own for all that does not outlive a stage. Of part [parts][PART_NUMBERS] the first `stages` stages are run.
EXPORT void keyspan_run_parts(const Call *calls, int64_t count, const int64_t *stage_begins, int64_t stages,
                              int64_t *structs, int64_t words, const Change *changes, int64_t change_count,
                              const int64_t *part, int64_t parts, int64_t threads) {
    const std::unique_ptr<std::atomic<int64_t>[]> passed(new std::atomic<int64_t>[parts]());
    parallel_for(threads, stages * parts, [&](int64_t unit, int64_t thread) {
        const int64_t stage = unit / parts, i = unit % parts;
        for (Wait wait; passed[i].load(std::memory_order_acquire) < stage;) wait.once();
        for (const Change *change = changes; change < changes + change_count; change++)
            structs[thread * words + change->word] = change->base + change->scale * part[i * PART_NUMBERS + change->of];
        for (int64_t n = stage_begins[stage]; n < stage_begins[stage + 1]; n++) run(calls[thread * count + n]);
        passed[i].store(stage + 1, std::memory_order_release);
    });
}
