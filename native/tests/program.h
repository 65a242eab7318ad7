// Fuzz test of products with a weight (`keyspan_linear`), of the layers' functions and of programs of them; product.h
// holds products of matrices.
//
// Each is compared with a plain double-precision loop; and bit for bit with itself: a row of a product alone, other
// storages of the weight, and the same calls as one program on a team of threads.
#pragma once
#include "../layers.h"
#include "../linear.h"
#include "product.h"
#include "random.h"

extern "C" {
int64_t keyspan_supports(int64_t);
void keyspan_linear(const Linear *);
void keyspan_rms_norm(const RmsNorm *);
void keyspan_rotary(const Rotary *);
void keyspan_gate(const Gate *);
void keyspan_run(const void *calls, int64_t count, int64_t threads);
}

namespace {

// `Function` and the structs of native/program.cpp.
enum Function : int64_t {
    LINEAR = 0, RMS_NORM = 1, ROTARY = 2, GATE = 3, STORE = 4, HEAD_NORM = 5, LAYER_NORM = 6, ATTENTION = 7,
    GATHER = 8, LARGEST = 9, SEGMENT_MEAN = 10
};

struct Call {
    int64_t function;
    const void *arguments;
};

struct Store {
    const char *from;
    char *to;
    float *scale;
    const int64_t *slots;
    int64_t threads, dtype, stored, T, heads, D, from_stride;
};

struct HeadNorm {
    char *x;
    const float *weight;
    float *inverse;
    int64_t isa, threads, dtype, T, D, heads, stride;
    double eps;
};

// ---- products with a weight ----------------------------------------------------------------------------------------

struct LinearProblem {
    Linear p{};
    std::vector<char> x, plain, panels, bias;  // `plain` and `panels` hold one weight
    std::vector<int8_t> bytes;                 // of an int8 weight, [outputs, inputs]
    std::vector<float> scale;
};

// [outputs][words] to [panel][word][column], padded with zeros.
std::vector<char> pack_panels(const char *weight, int64_t outputs, int64_t words, int64_t stride) {
    const int64_t count = (outputs + LINEAR_PANEL - 1) / LINEAR_PANEL;
    std::vector<char> to((size_t)(count * LINEAR_PANEL * words * 4), 0);
    for (int64_t c = 0; c < outputs; c++)
        for (int64_t k = 0; k < words; k++)
            memcpy(&to[((c / LINEAR_PANEL * words + k) * LINEAR_PANEL + c % LINEAR_PANEL) * 4],
                   weight + (c * stride + k) * 4, 4);
    return to;
}

LinearProblem make_linear(Random &random) {
    LinearProblem made;
    Linear &p = made.p;
    p.threads = random.from(1, 3);
    p.dtype = random.from(0, 2);
    p.storage = random.chance(0.3) ? PANELS_OF_INT8 : ROWS_OF_DTYPE;
    p.applied = random.chance(0.3) ? ERF_GELU : NOTHING;
    p.rows = random.chance(0.1) ? 0 : random.chance(0.2) ? random.from(180, 400) : random.from(1, 40);
    p.outputs = random.chance(0.05) ? 0 : random.from(1, 200);
    const int64_t numbers = numbers_per_word(p);
    p.inputs = numbers * (random.chance(0.3) ? random.from(120, 300) : random.from(1, 70));
    p.x_stride = p.inputs + (random.chance(0.3) ? numbers * random.from(1, 5) : 0);
    p.weight_stride = p.inputs + (random.chance(0.3) ? numbers * random.from(1, 5) : 0);
    made.x = make_rows(random, p.dtype, p.rows, p.inputs, p.x_stride);
    if (p.storage == PANELS_OF_INT8) {
        p.weight_stride = p.inputs;
        for (int64_t i = 0; i < p.outputs * p.inputs; i++) made.bytes.push_back((int8_t)random.from(-127, 127));
        made.panels = pack_panels((const char *)made.bytes.data(), p.outputs, p.inputs / 4, p.inputs / 4);
    } else {
        made.plain = make_rows(random, p.dtype, p.outputs, p.inputs, p.weight_stride);
        made.panels =
            pack_panels(made.plain.data(), p.outputs, p.inputs / numbers, p.weight_stride / numbers);
    }
    if (p.storage == PANELS_OF_INT8 || random.chance(0.3))
        for (int64_t c = 0; c < p.outputs; c++) made.scale.push_back((float)(random.value() * 0.01));
    if (random.chance(0.5)) made.bias = make_rows(random, p.dtype, 1, p.outputs, p.outputs);
    p.x = begin_of(made.x);
    p.weight = begin_of(p.storage == PANELS_OF_INT8 ? made.panels : made.plain);
    p.scale = begin_of(made.scale);
    p.bias = begin_of(made.bias);
    return made;
}

void check_linear(LinearProblem &made, int64_t isa) {
    Linear p = made.p;
    p.isa = isa;
    const int64_t row = p.outputs * size_of(p.dtype);
    std::vector<char> out = blank(p.rows * row);
    p.out = begin_of(out);
    keyspan_linear(&p);
    for (int64_t r = 0; r < p.rows; r++)
        for (int64_t c = 0; c < p.outputs; c++) {
            double sum = 0, terms = 0;
            for (int64_t i = 0; i < p.inputs; i++) {
                const double weight = p.storage == PANELS_OF_INT8 ? made.bytes[c * p.inputs + i]
                                                                  : read(p.dtype, p.weight, c * p.weight_stride + i);
                const double x = read(p.dtype, p.x, r * p.x_stride + i) * weight;
                sum += x;
                terms += std::fabs(x);
            }
            const double scale = p.scale ? p.scale[c] : 1, bias = p.bias ? read(p.dtype, p.bias, c) : 0;
            const double plain = sum * scale + bias;
            const double want = p.applied == ERF_GELU ? plain * std::erfc(-plain / std::sqrt(2.0)) / 2 : plain;
            // gelu changes by at most 1.13 times what it is given changes; its own error is 2e-7 of that.
            const double computed = 1.13 * EPSILON[F32] * (16 + std::sqrt((double)p.inputs)) * terms * std::fabs(scale) +
                                    (p.applied == ERF_GELU ? 2e-7 * std::fabs(plain) : 0);
            compare_number("product", r * p.outputs + c, read(p.dtype, out.data(), r * p.outputs + c), want,
                           computed + EPSILON[p.dtype] * (std::fabs(want) + std::fabs(bias)) + 0x1p-24);
        }
    const auto compare_bits = [&](Linear other, int64_t first, const char *text) {
        std::vector<char> again = blank(other.rows * row);
        other.out = begin_of(again);
        keyspan_linear(&other);
        if (!again.empty() && memcmp(again.data(), out.data() + first * row, again.size())) throw Failure{text};
    };
    if (p.storage == ROWS_OF_DTYPE) {
        Linear packed = p;
        packed.storage = PANELS_OF_DTYPE;
        packed.weight = begin_of(made.panels);
        compare_bits(packed, 0, "a product with a packed weight has other bits");
    }
    for (int64_t r : {(int64_t)0, p.rows / 2, p.rows - 1}) {
        if (r < 0 || r >= p.rows) continue;
        Linear one = p;
        one.x += r * p.x_stride * size_of(p.dtype);
        one.rows = one.threads = 1;
        compare_bits(one, r, "a row of a product has other bits alone");
    }
}

// ---- programs ------------------------------------------------------------------------------------------------------

// Norms, a product, norms of heads, a rotation, a gate, and rows stored at slots, such as a decoder's step is made of.
// `step` computes call i on memory of its own.
struct Step {
    int64_t dtype, threads, T, D, heads, K, bits;  // `bits`: how the last call stores, as INT8 or E4M3
    std::vector<char> x, weight, bias;
    std::vector<float> norm, head_norm, cosine, sine;
    std::vector<int64_t> slots;

    explicit Step(Random &random) {
        dtype = random.from(0, 2);
        threads = random.from(1, 3);
        T = random.chance(0.2) ? random.from(30, 120) : random.from(1, 9);
        D = 2 * random.from(1, 90);
        heads = random.from(1, 4);
        K = 2 * random.from(1, 40);
        x = make_rows(random, dtype, T, D, D);
        weight = make_rows(random, dtype, 2 * heads * K, D, D);
        bias = make_rows(random, dtype, 1, 2 * heads * K, 2 * heads * K);
        const auto numbers = [&](int64_t count) {
            std::vector<float> made;
            for (int64_t i = 0; i < count; i++) made.push_back((float)random.value());
            return made;
        };
        norm = numbers(D);
        head_norm = numbers(K);
        cosine = numbers(T * K / 2);
        sine = numbers(T * K / 2);
        // A permutation: units of 8-bit rows are stored in any order.
        for (int64_t t = 0; t < T; t++) slots.push_back((t + T / 2) % T);
        bits = random.from(INT8, E4M3);
    }

    struct Memory {
        std::vector<char> normed, centred, product, rotated, gated, stored, bytes;
        std::vector<float> inverse, head_inverse, scale;
    };

    // All that a step leaves in memory, computed call by call or as one program.
    Memory compute(int64_t isa, bool program) const {
        const int64_t size = size_of(dtype), width = 2 * heads * K;
        Memory to{blank(T * D * size), blank(T * D * size), blank(T * width * size), blank(T * width * size), blank(T * width / 2 * size),
                  blank(T * width * size), blank(T * width), std::vector<float>((size_t)T),
                  std::vector<float>((size_t)(T * heads)), std::vector<float>((size_t)(2 * T * heads))};
        RmsNorm norms{};
        norms.x = x.data();
        norms.weight = norm.data();
        norms.out = to.normed.data();
        norms.inverse = to.inverse.data();
        norms.isa = isa;
        norms.threads = threads;
        norms.total_dtype = norms.residual_dtype = norms.out_dtype = dtype;
        norms.T = T;
        norms.D = D;
        norms.eps = 1e-5;
        const LayerNorm centred{x.data(), to.normed.data(), norm.data(), norm.data(), to.centred.data(), isa, threads,
                                dtype, T, D, 1e-5};
        Linear linear{};
        linear.x = to.normed.data();
        linear.weight = weight.data();
        linear.bias = bias.data();
        linear.out = to.product.data();
        linear.isa = isa;
        linear.threads = threads;
        linear.dtype = dtype;
        linear.rows = T;
        linear.inputs = linear.x_stride = linear.weight_stride = D;
        linear.outputs = width;
        HeadNorm of_heads{to.product.data(), head_norm.data(), to.head_inverse.data(), isa, threads, dtype, T, K, heads,
                          width, 1e-5};
        Rotary rotary{};
        rotary.q = to.product.data();
        rotary.k = to.product.data() + heads * K * size;
        rotary.v = to.product.data();
        rotary.cosine = cosine.data();
        rotary.sine = sine.data();
        rotary.out = to.rotated.data();
        rotary.isa = isa;
        rotary.threads = threads;
        rotary.dtype = dtype;
        rotary.T = T;
        rotary.K = K;
        rotary.heads[0] = rotary.heads[1] = heads;
        for (int64_t &stride : rotary.stride) stride = width;
        rotary.out_stride = width;
        Gate gate{};
        gate.x12 = to.rotated.data();
        gate.out = to.gated.data();
        gate.isa = isa;
        gate.threads = threads;
        gate.dtype = dtype;
        gate.T = T;
        gate.D = width / 2;
        Store store{to.rotated.data(), to.stored.data(), nullptr, slots.data(), threads, dtype, AS_DTYPE, T, 2 * heads, K,
                    width * size};
        Store store_bytes = store;
        store_bytes.to = to.bytes.data();
        store_bytes.scale = to.scale.data();
        store_bytes.stored = bits;
        const Call calls[] = {{RMS_NORM, &norms}, {LINEAR, &linear}, {HEAD_NORM, &of_heads}, {ROTARY, &rotary},
                              {GATE, &gate},      {STORE, &store},   {STORE, &store_bytes},  {LAYER_NORM, &centred}};
        if (program)
            keyspan_run(calls, 8, threads);
        else
            for (const Call &call : calls) keyspan_run(&call, 1, 1);
        return to;
    }
};

void check_step(const Step &step, int64_t isa) {
    const int64_t width = 2 * step.heads * step.K, dtype = step.dtype;
    const Step::Memory alone = step.compute(isa, false), together = step.compute(isa, true);
    if (alone.normed != together.normed || alone.product != together.product || alone.rotated != together.rotated ||
        alone.gated != together.gated || alone.centred != together.centred || alone.stored != together.stored || alone.bytes != together.bytes ||
        alone.scale != together.scale)
        throw Failure{"a step's results differ in a program"};
    const double error = 4 * EPSILON[dtype] + 64 * EPSILON[F32];
    for (int64_t t = 0; t < step.T; t++) {
        double squares = 0;
        for (int64_t i = 0; i < step.D; i++) squares += std::pow(read(dtype, step.x.data(), t * step.D + i), 2);
        const double inverse = 1 / std::sqrt(squares / (double)step.D + 1e-5);
        for (int64_t i = 0; i < step.D; i++) {
            const double want = read(dtype, step.x.data(), t * step.D + i) * inverse * step.norm[i];
            compare_number("norm", t * step.D + i, read(dtype, alone.normed.data(), t * step.D + i), want,
                           error * std::fabs(want) + 0x1p-22);
        }
        double mean = 0, variance = 0, largest = 0;
        const auto sum_at = [&](int64_t i) {
            return read(dtype, step.x.data(), t * step.D + i) + read(dtype, alone.normed.data(), t * step.D + i);
        };
        for (int64_t i = 0; i < step.D; i++) mean += sum_at(i) / (double)step.D;
        for (int64_t i = 0; i < step.D; i++) {
            variance += std::pow(sum_at(i) - mean, 2) / (double)step.D;
            largest = std::max(largest, std::fabs(sum_at(i)));
        }
        const double deviation = std::sqrt(variance + 1e-5);
        for (int64_t i = 0; i < step.D; i++) {
            const double want = (sum_at(i) - mean) / deviation * step.norm[i] + step.norm[i];
            compare_number("layer norm", t * step.D + i, read(dtype, alone.centred.data(), t * step.D + i), want,
                           EPSILON[dtype] * std::fabs(want) + 0x1p-22 +
                               16 * EPSILON[F32] * (largest / deviation + 1) * std::fabs(step.norm[i]));
        }
        for (int64_t h = 0; h < 2 * step.heads; h++)
            for (int64_t i = 0; i < step.K / 2; i++) {
                const int64_t at = t * width + h * step.K + i;
                const double a = read(dtype, alone.product.data(), at),
                             b = read(dtype, alone.product.data(), at + step.K / 2),
                             cosine = step.cosine[t * step.K / 2 + i], sine = step.sine[t * step.K / 2 + i];
                const double allowed = error * (std::fabs(a) + std::fabs(b)) * 3 + 0x1p-22;
                compare_number("rotary", at, read(dtype, alone.rotated.data(), at), a * cosine - b * sine, allowed);
                compare_number("rotary", at, read(dtype, alone.rotated.data(), at + step.K / 2), b * cosine + a * sine,
                               allowed);
            }
        for (int64_t i = 0; i < width / 2; i++) {
            const double a = read(dtype, alone.rotated.data(), t * width + i),
                         b = read(dtype, alone.rotated.data(), t * width + width / 2 + i);
            const double want = a / (1 + std::exp(-a)) * b;
            compare_number("gate", i, read(dtype, alone.gated.data(), t * width / 2 + i), want,
                           error * std::fabs(want) + 0x1p-22);
        }
    }
    for (int64_t t = 0; t < step.T; t++) {
        const int64_t slot = step.slots[t], bytes = width * size_of(dtype);
        if (memcmp(&alone.stored[slot * bytes], &alone.rotated[t * bytes], bytes)) throw Failure{"a row is stored elsewhere"};
        for (int64_t i = 0; i < width; i++) {
            const uint8_t byte = (uint8_t)alone.bytes[slot * width + i];
            const double scale = alone.scale[slot * 2 * step.heads + i / step.K];
            const int exponent = byte >> 3 & 15, mantissa = byte & 7;
            const double magnitude = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
            const double number = step.bits == INT8 ? (int8_t)byte : byte >> 7 ? -magnitude : magnitude;
            const double want = read(dtype, alone.rotated.data(), t * width + i);
            const double step_size = step.bits == INT8 ? 1 : std::max(0x1p-9, magnitude / 8);
            compare_number("8 bits", i, number * scale, want, 0.502 * step_size * scale + 0x1p-22);
        }
    }
}

// Whether the product and the program of this seed are right on all instruction sets; says what is not.
bool check_layers(uint64_t seed) {
    Random random{~seed};
    LinearProblem linear = make_linear(random);
    MatrixProblem product = make_product(random);
    const Step step(random);
    for (int64_t isa = 0; isa < ISAS; isa++) {
        if (!keyspan_supports(isa)) continue;
        try {
            check_linear(linear, isa);
            check_product(product, isa);
            check_step(step, isa);
        } catch (const Failure &failure) {
            const Linear &p = linear.p;
            const Product &of = product.p;
            fprintf(stderr, "\nseed %lu on %s: %s\n", (unsigned long)seed, ISA_NAMES[isa], failure.text.c_str());
            fprintf(stderr, "linear: threads %ld, dtype %ld, storage %ld, rows %ld, inputs %ld, outputs %ld; ",
                    (long)p.threads, (long)p.dtype, (long)p.storage, (long)p.rows, (long)p.inputs, (long)p.outputs);
            fprintf(stderr,
                    "product: threads %ld, dtype %ld, of b %ld, out %ld, transposed %ld %ld, accumulate %ld, M %ld, K %ld, "
                    "N %ld, strides %ld %ld, bias %d; ",
                    (long)of.threads, (long)of.dtype, (long)of.b_dtype, (long)of.out_dtype, (long)of.a_transposed,
                    (long)of.b_transposed, (long)of.accumulate, (long)of.M, (long)of.K, (long)of.N, (long)of.a_stride,
                    (long)of.b_stride, of.bias != nullptr);
            fprintf(stderr, "step: threads %ld, dtype %ld, T %ld, D %ld, heads %ld, K %ld\n", (long)step.threads,
                    (long)step.dtype, (long)step.T, (long)step.D, (long)step.heads, (long)step.K);
            return false;
        }
    }
    return true;
}

}  // namespace
