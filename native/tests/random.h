// What the parts of the fuzz test share: random numbers, numbers of each dtype in memory, failures.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../params.h"

using namespace keyspan;

namespace {

constexpr double EPSILON[] = {0x1p-23, 0x1p-7, 0x1p-10};
const char *const ISA_NAMES[] = {"portable", "avx2", "avx512", "avx512bf16"};

// ---- random numbers ------------------------------------------------------------------------------------------------

struct Random {
    uint64_t state;
    uint64_t next() {  // splitmix64
        uint64_t x = state += 0x9E3779B97F4A7C15u;
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
        x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
        return x ^ (x >> 31);
    }
    int64_t from(int64_t low, int64_t high) { return low + (int64_t)(next() % (uint64_t)(high - low + 1)); }
    bool chance(double p) { return (double)(next() >> 11) * 0x1p-53 < p; }
    double value() { return ((double)(next() >> 11) * 0x1p-53 - 0.5) * 3; }
    template <size_t N>
    int64_t among(const int64_t (&list)[N]) { return list[next() % N]; }
};

// ---- arrays --------------------------------------------------------------------------------------------------------

// Numbers of 8 bits, as arrays hold them besides those of a Dtype.
constexpr int64_t BYTES_INT8 = 3, BYTES_E4M3 = 4;
int64_t element_size(int64_t dtype) { return dtype == F32 ? 4 : dtype >= BYTES_INT8 ? 1 : 2; }

double read(int64_t dtype, const char *memory, int64_t i) {
    if (dtype == BYTES_INT8) return (signed char)memory[i];
    if (dtype == BYTES_E4M3) {
        const int exponent = memory[i] >> 3 & 15, mantissa = memory[i] & 7;
        const double size = exponent == 15 && mantissa == 7 ? NAN
                            : exponent                      ? std::ldexp(8 + mantissa, exponent - 10)
                                                            : std::ldexp(mantissa, -9);
        return memory[i] & 0x80 ? -size : size;
    }
    if (dtype == F32) {
        float x;
        memcpy(&x, memory + 4 * i, 4);
        return x;
    }
    uint16_t half;
    memcpy(&half, memory + 2 * i, 2);
    if (dtype == BF16) {
        const uint32_t bits = (uint32_t)half << 16;
        float x;
        memcpy(&x, &bits, 4);
        return x;
    }
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    const double size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                        : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                       : std::ldexp(mantissa, -24);
    return half >> 15 ? -size : size;
}

// Values are truncated to the dtype. Of 8 bits, all numbers there are take the place of -1.5 to 1.5.
void write(int64_t dtype, char *memory, int64_t i, double value) {
    if (dtype >= BYTES_INT8) {
        const double share = std::max(-1.0, std::min(0.999, value / 1.5));
        if (dtype == BYTES_INT8)
            memory[i] = (char)(int)std::floor(share * 128);
        else
            memory[i] = (char)((int)std::fabs(share * 126.99) | (value < 0 ? 0x80 : 0));
        return;
    }
    const float single = (float)value;
    uint32_t bits;
    memcpy(&bits, &single, 4);
    if (dtype == F32) {
        memcpy(memory + 4 * i, &bits, 4);
        return;
    }
    uint16_t half = (uint16_t)(bits >> 16);
    if (dtype == F16) {
        const int exponent = (int)(bits >> 23 & 255) - 112;
        half = (uint16_t)((bits >> 16 & 0x8000) | (exponent > 0 ? (uint32_t)exponent << 10 | (bits >> 13 & 1023) : 0));
    }
    memcpy(memory + 2 * i, &half, 2);
}

template <class T>
T *begin_of(std::vector<T> &x) {
    return x.empty() ? nullptr : x.data();
}

// Memory for a result, filled with NaN.
std::vector<char> blank(int64_t bytes) { return std::vector<char>((size_t)bytes, (char)0xff); }

struct Failure {
    std::string text;
};

int64_t size_of(int64_t dtype) { return dtype == F32 ? 4 : 2; }

// `rows` rows of `width` random numbers, `stride` numbers apart, with NaN between them and nothing behind the last.
std::vector<char> make_rows(Random &random, int64_t dtype, int64_t rows, int64_t width, int64_t stride) {
    std::vector<char> memory = blank(rows ? ((rows - 1) * stride + width) * size_of(dtype) : 0);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < width; i++) write(dtype, memory.data(), r * stride + i, random.value());
    return memory;
}

void compare_number(const char *name, int64_t i, double got, double want, double allowed) {
    if (std::fabs(got - want) <= allowed) return;
    char text[200];
    snprintf(text, sizeof text, "%s[%ld] is %.9g, want %.9g within %.3g", name, (long)i, got, want, allowed);
    throw Failure{text};
}

}  // namespace
