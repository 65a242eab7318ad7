// Fuzz test of products of matrices (`keyspan_product`).
//
// Each is compared with a plain double-precision loop; and bit for bit with itself: on one thread, a row alone, and with
// b rounded beforehand.
#pragma once
#include "../product.h"
#include "random.h"

extern "C" void keyspan_product(const Product *);

namespace {

struct MatrixProblem {
    Product p{};
    std::vector<char> a, b, rounded_b, bias, before;  // `before`: what `out` holds at first
};

// The nearest number of `dtype`, ties to even, of one that is 0 or normal in it.
double rounded(int64_t dtype, double x) {
    if (dtype == F32) return (float)x;
    int exponent;
    const double fraction = std::frexp(x, &exponent);
    const int bits = dtype == BF16 ? 8 : 11;
    return std::ldexp(std::nearbyint(std::ldexp(fraction, bits)), exponent - bits);
}

MatrixProblem make_product(Random &random) {
    MatrixProblem made;
    Product &p = made.p;
    p.threads = random.from(1, 3);
    p.dtype = random.from(0, 2);
    p.b_dtype = random.chance(0.3) ? F32 : p.dtype;
    p.accumulate = random.chance(0.3);
    p.out_dtype = p.accumulate || random.chance(0.3) ? F32 : random.from(0, 2);
    p.a_transposed = random.chance(0.4);
    p.b_transposed = random.chance(0.4);
    // One dimension, if any, is so large that it is cut into parts.
    const int64_t large = random.from(0, 3);
    p.M = random.chance(0.05) ? 0 : large == 1 ? random.from(180, 420) : random.from(1, 30);
    p.K = random.chance(0.05) ? 0 : large == 2 ? random.from(120, 1300) : random.from(1, 40);
    p.N = random.chance(0.05) ? 0 : large == 3 ? random.from(450, 1100) : random.from(1, 70);
    const int64_t a_rows = p.a_transposed ? p.K : p.M, a_width = p.a_transposed ? p.M : p.K;
    const int64_t b_rows = p.b_transposed ? p.N : p.K, b_width = p.b_transposed ? p.K : p.N;
    p.a_stride = a_width + (random.chance(0.4) ? random.from(1, 5) : 0);
    p.b_stride = b_width + (random.chance(0.4) ? random.from(1, 5) : 0);
    made.a = make_rows(random, p.dtype, a_rows, a_width, p.a_stride);
    made.b = make_rows(random, p.b_dtype, b_rows, b_width, p.b_stride);
    made.rounded_b = blank((int64_t)made.b.size() / size_of(p.b_dtype) * size_of(p.dtype));
    for (int64_t r = 0; r < b_rows; r++)
        for (int64_t i = 0; i < b_width; i++) {
            const int64_t at = r * p.b_stride + i;
            double x = read(p.b_dtype, made.b.data(), at);
            if (std::fabs(x) < 0x1p-10) x = 0;  // far from the subnormal numbers of fp16
            write(p.b_dtype, made.b.data(), at, x);
            write(p.dtype, made.rounded_b.data(), at, rounded(p.dtype, x));
        }
    if (random.chance(0.5)) made.bias = make_rows(random, p.dtype, 1, p.N, p.N);
    made.before = p.accumulate ? make_rows(random, F32, p.M, p.N, p.N) : blank(p.M * p.N * size_of(p.out_dtype));
    p.a = begin_of(made.a);
    p.b = begin_of(made.b);
    p.bias = begin_of(made.bias);
    return made;
}

void check_product(MatrixProblem &made, int64_t isa) {
    Product p = made.p;
    p.isa = isa;
    std::vector<char> out = made.before;
    p.out = begin_of(out);
    keyspan_product(&p);
    for (int64_t m = 0; m < p.M; m++)
        for (int64_t n = 0; n < p.N; n++) {
            const int64_t at = m * p.N + n;
            double sum = p.accumulate ? read(F32, made.before.data(), at) : 0, terms = std::fabs(sum);
            for (int64_t k = 0; k < p.K; k++) {
                const double x = read(p.dtype, p.a, p.a_transposed ? k * p.a_stride + m : m * p.a_stride + k) *
                                 read(p.dtype, made.rounded_b.data(),
                                      p.b_transposed ? n * p.b_stride + k : k * p.b_stride + n);
                sum += x;
                terms += std::fabs(x);
            }
            const double bias = p.bias ? read(p.dtype, p.bias, n) : 0, want = sum + bias;
            const double computed = EPSILON[F32] * ((16 + std::sqrt((double)p.K)) * terms + std::fabs(bias));
            compare_number("product of matrices", at, read(p.out_dtype, out.data(), at), want,
                           computed + EPSILON[p.out_dtype] * std::fabs(want) + 0x1p-24);
        }
    const auto compare_bits = [&](Product other, int64_t row, const char *text) {
        const int64_t size = p.N * size_of(p.out_dtype);
        std::vector<char> again(made.before.begin() + row * size, made.before.begin() + (row + other.M) * size);
        other.out = begin_of(again);
        keyspan_product(&other);
        if (!again.empty() && memcmp(again.data(), out.data() + row * size, again.size())) throw Failure{text};
    };
    Product other = p;
    other.threads = 1;
    compare_bits(other, 0, "a product of matrices has other bits on one thread");
    other.b = begin_of(made.rounded_b);
    other.b_dtype = p.dtype;
    compare_bits(other, 0, "a product with a rounded matrix has other bits than one that rounds it");
    other.M = 1;
    for (int64_t m : {p.M / 2, p.M - 1}) {
        if (m < 0 || m >= p.M) continue;
        other.a = p.a ? p.a + m * (p.a_transposed ? 1 : p.a_stride) * size_of(p.dtype) : nullptr;
        compare_bits(other, m, "a row of a product of matrices has other bits alone");
    }
}

}  // namespace
