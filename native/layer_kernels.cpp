// The layers' kernels of one instruction set; compiled once for each.
#include <cmath>

#include "layers.h"
#include "simd.h"

namespace keyspan {
namespace KEYSPAN_NAMESPACE {
namespace {

constexpr float LOG2_E = 1.4426950408889634f;

// ---- storage -------------------------------------------------------------------------------------------------------

// How numbers of one dtype are read as fp32 and written, rounded once; `rounded` is what would be read again.
struct Single {
    typedef float Storage;
    static INLINE vf read(const float *p) { return load(p); }
    static INLINE vf rounded(vf x) { return x; }
    static INLINE void write(float *p, vf x) { store(p, x); }
};

struct Bfloat16 {
    typedef uint16_t Storage;
    static INLINE vf read(const uint16_t *p) { return widen_bf16(p); }
    static INLINE vf rounded(vf x) { return round_to_bf16(x); }
    static INLINE void write(uint16_t *p, vf x) { store(p, narrow_bf16(x)); }
};

struct Half {
    typedef uint16_t Storage;
    static INLINE vf read(const uint16_t *p) { return widen_f16(p); }
    static INLINE vf rounded(vf x) {
        uint16_t all[W];
        write(all, x);
        return read(all);
    }
    static INLINE void write(uint16_t *p, vf x) { store(p, narrow_f16(x)); }
};

// Calls run(Single{}), run(Bfloat16{}) or run(Half{}).
template <class Run>
INLINE void with_dtype(int64_t dtype, const Run &run) {
    if (dtype == BF16)
        run(Bfloat16{});
    else if (dtype == F16)
        run(Half{});
    else
        run(Single{});
}

// Up to W numbers, and zeros behind them.
template <class D>
INLINE vf read_some(const typename D::Storage *p, int64_t count) {
    if (count >= W) return D::read(p);
    typename D::Storage all[W] = {};
    memcpy(all, p, count * sizeof(*p));
    return D::read(all);
}

template <class D>
INLINE void write_some(typename D::Storage *p, vf x, int64_t count) {
    if (count >= W) return D::write(p, x);
    typename D::Storage all[W];
    D::write(all, x);
    memcpy(p, all, count * sizeof(*p));
}

// Row `row` of a matrix of `stride` numbers a row.
template <class D, class Pointer>
INLINE auto *row_of(D, Pointer *base, int64_t row, int64_t stride) {
    return (typename D::Storage *)base + row * stride;
}

// A row of `n` numbers as floats, with zeros up to a whole vector.
INLINE void read_row(float *to, const void *base, int64_t dtype, int64_t row, int64_t stride, int64_t n) {
    with_dtype(dtype, [&](auto d) {
        const auto *from = row_of(d, base, row, stride);
        for (int64_t i = 0; i < n; i += W) store(to + i, read_some<decltype(d)>(from + i, n - i));
    });
}

INLINE void add_row(float *to, const void *base, int64_t dtype, int64_t row, int64_t stride, int64_t n) {
    with_dtype(dtype, [&](auto d) {
        const auto *from = row_of(d, base, row, stride);
        for (int64_t i = 0; i < n; i += W) store(to + i, load(to + i) + read_some<decltype(d)>(from + i, n - i));
    });
}

INLINE void write_row(const float *from, void *base, int64_t dtype, int64_t row, int64_t stride, int64_t n) {
    with_dtype(dtype, [&](auto d) {
        auto *to = row_of(d, base, row, stride);
        for (int64_t i = 0; i < n; i += W) write_some<decltype(d)>(to + i, load(from + i), n - i);
    });
}

INLINE int64_t padded(int64_t n) { return (n + ROW_ALIGNMENT - 1) / ROW_ALIGNMENT * ROW_ALIGNMENT; }

// ---- RMSNorm -------------------------------------------------------------------------------------------------------

void rms_norm(const RmsNorm &p, int64_t first, int64_t last, float *scratch) {
    const int64_t D = p.D;
    for (int64_t t = first; t < last; t++) {
        read_row(scratch, p.x, p.total_dtype, t, D, D);
        if (p.residual) {
            add_row(scratch, p.residual, p.residual_dtype, t, D, D);
            write_row(scratch, p.total, p.total_dtype, t, D, D);
            if (p.total_dtype != F32) read_row(scratch, p.total, p.total_dtype, t, D, D);  // as others read it
        }
        vf squares{};
        for (int64_t i = 0; i < D; i += W) squares += load(scratch + i) * load(scratch + i);
        const float r = 1 / std::sqrt(reduce_add(squares) / (float)D + (float)p.eps);
        p.inverse[t] = r;
        for (int64_t i = 0; i < D; i += W)
            store(scratch + i, load(scratch + i) * r * read_some<Single>(p.weight + i, D - i));
        write_row(scratch, p.out, p.out_dtype, t, D, D);
    }
}

void rms_norm_backward(const RmsNorm &p, int64_t first, int64_t last, float *dweight, float *scratch) {
    const int64_t D = p.D;
    float *normed = scratch, *grad = scratch + padded(D);
    for (int64_t t = first; t < last; t++) {
        read_row(normed, p.total, p.total_dtype, t, D, D);
        if (p.residual) {
            add_row(normed, p.residual, p.residual_dtype, t, D, D);
            if (p.total_dtype != F32) {  // rounded as forward did
                write_row(normed, p.dx, p.total_dtype, t, D, D);
                read_row(normed, p.dx, p.total_dtype, t, D, D);
            }
        }
        read_row(grad, p.grad, p.out_dtype, t, D, D);
        const float r = p.inverse[t];
        vf products{};
        for (int64_t i = 0; i < D; i += W) {
            const vf n = load(normed + i) * r, g = load(grad + i);
            if (dweight) write_some<Single>(dweight + i, read_some<Single>(dweight + i, D - i) + g * n, D - i);
            const vf weighted = g * read_some<Single>(p.weight + i, D - i);
            products += weighted * n;
            store(normed + i, n);
            store(grad + i, weighted);
        }
        const float mean = reduce_add(products) / (float)D;
        for (int64_t i = 0; i < D; i += W) store(grad + i, r * (load(grad + i) - load(normed + i) * mean));
        if (p.grad_total) add_row(grad, p.grad_total, p.total_dtype, t, D, D);
        write_row(grad, p.dx, p.total_dtype, t, D, D);
        if (p.dresidual) write_row(grad, p.dresidual, p.residual_dtype, t, D, D);
        if (!p.out) continue;
        for (int64_t i = 0; i < D; i += W) store(normed + i, load(normed + i) * read_some<Single>(p.weight + i, D - i));
        write_row(normed, p.out, p.out_dtype, t, D, D);
    }
}

// ---- LayerNorm -----------------------------------------------------------------------------------------------------

void layer_norm(const LayerNorm &p, int64_t first, int64_t last, float *scratch) {
    const int64_t D = p.D, whole = D / W * W;
    for (int64_t t = first; t < last; t++) {
        read_row(scratch, p.x, p.dtype, t, D, D);
        if (p.residual) add_row(scratch, p.residual, p.dtype, t, D, D);
        vf sums{};
        for (int64_t i = 0; i < D; i += W) sums += load(scratch + i);
        const float mean = reduce_add(sums) / (float)D;
        vf squares{};
        for (int64_t i = 0; i < D; i += W) {
            vf x = load(scratch + i) - mean;
            if (i == whole)
                for (int64_t n = D - whole; n < W; n++) x[n] = 0;  // what counts for nothing
            store(scratch + i, x);
            squares += x * x;
        }
        const float r = 1 / std::sqrt(reduce_add(squares) / (float)D + (float)p.eps);
        for (int64_t i = 0; i < D; i += W) {
            const vf weight = read_some<Single>(p.weight + i, D - i), bias = read_some<Single>(p.bias + i, D - i);
            store(scratch + i, load(scratch + i) * r * weight + bias);
        }
        write_row(scratch, p.out, p.dtype, t, D, D);
    }
}

// ---- means of runs of rows -----------------------------------------------------------------------------------------

void segment_mean(const SegmentMean &p, int64_t segment, float *scratch) {
    const int64_t D = p.D, first = segment ? p.ends[segment - 1] : 0, last = p.ends[segment];
    read_row(scratch, p.x, p.dtype, first, D, D);
    for (int64_t t = first + 1; t < last; t++) add_row(scratch, p.x, p.dtype, t, D, D);
    const float share = 1 / (float)(last - first);
    for (int64_t i = 0; i < D; i += W) store(scratch + i, load(scratch + i) * share);
    write_row(scratch, p.out, F32, segment, D, D);
}

// ---- the largest number of a row -----------------------------------------------------------------------------------

template <class D>
int64_t largest_of(const typename D::Storage *z, int64_t C) {
    vf top = broadcast(-INFINITY);
    bool unordered = false;
    const int64_t whole = C / W * W;
    vi unequal{};
    for (int64_t i = 0; i < whole; i += W) {
        const vf x = D::read(z + i);
        unequal |= x != x;
        top = maximum(x, top);
    }
    for (int64_t n = 0; n < W; n++) unordered |= unequal[n] != 0;
    float best = reduce_max(top);
    for (int64_t i = whole; i < C; i++) {
        const float x = read_some<D>(z + i, 1)[0];
        unordered |= x != x;
        best = x > best ? x : best;
    }
    for (int64_t i = 0; i < C; i += W) {
        const vf x = read_some<D>(z + i, C - i);
        const vi here = unordered ? x != x : x == broadcast(best);
        for (int64_t n = 0; n < min<int64_t>(W, C - i); n++)
            if (here[n]) return unordered || best - best != 0 ? ~(i + n) : i + n;
    }
    return 0;
}

void largest(const Largest &p, int64_t first, int64_t last) {
    with_dtype(p.dtype, [&](auto d) {
        for (int64_t t = first; t < last; t++)
            p.best[t] = (int32_t)largest_of<decltype(d)>(row_of(d, p.z, t, p.C), p.C);
    });
}

// ---- rotary embedding ----------------------------------------------------------------------------------------------

template <class D>
INLINE void rotate_head(const typename D::Storage *from, typename D::Storage *to, const float *cosine,
                        const float *sine, int64_t half, float sign) {
    for (int64_t i = 0; i < half; i += W) {
        const int64_t count = half - i;
        const vf c = read_some<Single>(cosine + i, count), s = read_some<Single>(sine + i, count) * sign;
        const vf a = read_some<D>(from + i, count), b = read_some<D>(from + half + i, count);
        write_some<D>(to + i, a * c - b * s, count);
        write_some<D>(to + half + i, a * s + b * c, count);
    }
}

template <class D>
INLINE void rotate_head_interleaved(const typename D::Storage *from, typename D::Storage *to, const float *cosine,
                                    const float *sine, int64_t half, float sign) {
    constexpr int PAIRS = W / 2;
    for (int64_t i = 0; i < half; i += PAIRS) {
        const int64_t count = min<int64_t>(PAIRS, half - i);
        const vf x = read_some<D>(from + 2 * i, 2 * count);
        vf partner, c{}, s{};
        for (int64_t j = 0; j < count; j++) {
            partner[2 * j] = x[2 * j + 1];
            partner[2 * j + 1] = x[2 * j];
            c[2 * j] = c[2 * j + 1] = cosine[i + j];
            s[2 * j + 1] = sine[i + j] * sign;
            s[2 * j] = -s[2 * j + 1];
        }
        write_some<D>(to + 2 * i, x * c + partner * s, 2 * count);
    }
}

void rotary(const Rotary &p, int64_t first, int64_t last) {
    const int64_t half = p.K / 2;
    const float sign = p.back ? -1.0f : 1.0f;
    const void *sources[] = {p.q, p.k, p.v};
    with_dtype(p.dtype, [&](auto d) {
        typedef decltype(d) D;
        for (int64_t t = first; t < last; t++) {
            const float *cosine = p.cosine + t * half, *sine = p.sine + t * half;
            auto *to = row_of(d, p.out, t, p.out_stride);
            for (int part = 0; part < 3; part++) {
                const auto *from = row_of(d, sources[part], t, p.stride[part]);
                if (part == 2) {
                    if (p.heads[part]) memcpy(to, from, p.heads[part] * p.K * sizeof(*to));
                    continue;
                }
                for (int64_t h = 0; h < p.heads[part]; h++, from += p.K, to += p.K) {
                    if (p.interleaved)
                        rotate_head_interleaved<D>(from, to, cosine, sine, half, sign);
                    else
                        rotate_head<D>(from, to, cosine, sine, half, sign);
                }
            }
        }
    });
}

// ---- the gate of SwiGLU and GeGLU ----------------------------------------------------------------------------------

INLINE vf sigmoid(vf x) {
    const vf exponent = x * LOG2_E;
    const vf inverse = 1.0f / (1.0f + exp2<5>(-maximum(broadcast(-126.0f), exponent)));
    return exponent < broadcast(-126.0f) ? broadcast(0.0f) : inverse;
}

// value = x · sigmoid(x), slope = its derivative. A NaN comes back with the factor x.
struct Silu {
    static INLINE void of(vf x, vf &value, vf &slope) {
        const vf s = sigmoid(x);
        value = x * s;
        slope = s * (1.0f + x * (1.0f - s));
    }
};

// value = x · (1 + tanh(u)) / 2 = x · sigmoid(2 u) with u = √(2/π) · (x + 0.044715 x³), slope = its derivative.
struct Gelu {
    static INLINE void of(vf x, vf &value, vf &slope) {
        constexpr float TWICE_ROOT = 1.5957691216057308f;
        vf bounded = maximum(broadcast(-100.0f), x);  // beyond, sigmoid is 0 or 1 and the powers may overflow
        bounded = -maximum(broadcast(-100.0f), -bounded);
        const vf square = bounded * bounded;
        const vf s = sigmoid(TWICE_ROOT * bounded * (1.0f + 0.044715f * square));
        value = x * s;
        slope = s * (1.0f + bounded * (1.0f - s) * (TWICE_ROOT * (1.0f + 3 * 0.044715f * square)));
    }
};

// Calls run(dtype, activation), see `with_dtype`.
template <class Run>
INLINE void with_activation(const Gate &p, const Run &run) {
    with_dtype(p.dtype, [&](auto d) {
        if (p.activation == GELU)
            run(d, Gelu{});
        else
            run(d, Silu{});
    });
}

void gate(const Gate &p, int64_t first, int64_t last) {
    const int64_t n = p.D;
    with_activation(p, [&](auto d, auto f) {
        typedef decltype(d) D;
        for (int64_t t = first; t < last; t++) {
            const auto *x1 = row_of(d, p.x12, t, 2 * n), *x2 = x1 + n;
            auto *out = row_of(d, p.out, t, n);
            for (int64_t i = 0; i < n; i += W) {
                const int64_t count = n - i;
                vf value, slope;
                f.of(read_some<D>(x1 + i, count), value, slope);
                // As the unfused formula rounds: the activation in the tensors' dtype, then the product.
                write_some<D>(out + i, D::rounded(value) * read_some<D>(x2 + i, count), count);
            }
        }
    });
}

void gate_backward(const Gate &p, int64_t first, int64_t last) {
    const int64_t n = p.D;
    with_activation(p, [&](auto d, auto f) {
        typedef decltype(d) D;
        for (int64_t t = first; t < last; t++) {
            const auto *x1 = row_of(d, p.x12, t, 2 * n), *x2 = x1 + n, *grad = row_of(d, p.grad, t, n);
            auto *out = row_of(d, p.out, t, n), *dx1 = row_of(d, p.dx12, t, 2 * n), *dx2 = dx1 + n;
            for (int64_t i = 0; i < n; i += W) {
                const int64_t count = n - i;
                const vf b = read_some<D>(x2 + i, count), g = read_some<D>(grad + i, count);
                vf value, slope;
                f.of(read_some<D>(x1 + i, count), value, slope);
                value = D::rounded(value);
                write_some<D>(out + i, value * b, count);
                write_some<D>(dx1 + i, g * b * slope, count);
                write_some<D>(dx2 + i, g * value, count);
            }
        }
    });
}

// ---- cross-entropy -------------------------------------------------------------------------------------------------

void cross_entropy(const CrossEntropy &p, int64_t first, int64_t last, float *scratch) {
    const int64_t C = p.C, whole = C / W * W;
    const float softcap = (float)p.softcap;
    for (int64_t t = first; t < last; t++) {
        const int64_t target = p.targets[t];
        const bool counted = target != p.ignore_index, known = target >= 0 && target < C;
        if (!counted && !p.losses) {
            if (p.gradient)
                with_dtype(p.dtype, [&](auto d) {
                    auto *to = row_of(d, p.z, t, p.stride);
                    memset(to, 0, C * sizeof(*to));
                });
            continue;
        }
        // The logits as floats, with what counts for nothing up to a whole vector.
        read_row(scratch, p.z, p.dtype, t, p.stride, C);
        if (p.bias) add_row(scratch, p.bias, F32, 0, 0, C);
        if (softcap != 0)
            for (int64_t i = 0; i < C; i += W) store(scratch + i, softcap * tanh(load(scratch + i) / softcap));
        for (int64_t i = C; i < padded(C); i++) scratch[i] = -INFINITY;
        vf highest = broadcast(-INFINITY);
        for (int64_t i = 0; i < C; i += W) highest = maximum(load(scratch + i), highest);
        const float top = reduce_max(highest);
        vf sums{};
        for (int64_t i = 0; i < whole; i += W) sums += exp2<5>((load(scratch + i) - top) * LOG2_E);
        if (whole < C) {
            vf tail = exp2<5>((load(scratch + whole) - top) * LOG2_E);
            for (int64_t i = C - whole; i < W; i++) tail[i] = 0;
            sums += tail;
        }
        const float sum = reduce_add(sums), own = known ? scratch[target] : NAN;
        const float lse = top + std::log(sum);
        if (p.losses) {
            p.lse[t] = lse;
            p.losses[t] = counted ? lse - own + (float)p.z_loss * lse * lse : 0;
        }
        if (!p.gradient) continue;
        const float factor = !counted ? 0 : p.grads ? p.grads[t] : 1;
        const float spread = (1 + 2 * (float)p.z_loss * lse) / sum * factor;
        // d loss / d capped = softmax(capped) · (1 + 2 z_loss · lse) − onehot(target);
        // d capped / d logit = 1 − (capped / softcap)²
        const float cap_squared = softcap * softcap;
        with_dtype(p.dtype, [&](auto d) {
            typedef decltype(d) D;
            auto *to = row_of(d, p.z, t, p.stride);
            for (int64_t i = 0; i < C; i += W) {
                const vf x = load(scratch + i);
                vf g = exp2<5>((x - top) * LOG2_E) * spread;
                if (softcap != 0) g *= 1.0f - x * x / cap_squared;
                write_some<D>(to + i, counted ? g : vf{}, C - i);
            }
            if (counted && known) {
                float g = std::exp(own - top) * spread - factor;
                if (softcap != 0) g *= 1 - own * own / cap_squared;
                write_some<D>(to + target, broadcast(g), 1);
            }
        });
    }
}

}  // namespace

const LayerKernels *layer_kernels() {
    static const LayerKernels table{rms_norm, rms_norm_backward, layer_norm, segment_mean, largest, rotary, gate,
                                    gate_backward, cross_entropy};
    return &table;
}

}  // namespace KEYSPAN_NAMESPACE
}  // namespace keyspan
