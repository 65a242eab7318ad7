// The kernel of products with a weight for one instruction set; compiled once for each instruction set.
//
// Blocks of the weight that do not lie in panels of the right form are brought into one that stays in cache. bf16 is
// multiplied as pairs where the machine can (AVX-512-BF16); else 2-byte numbers are widened to fp32.
#include "linear.h"

#include <type_traits>

#include "gemm.h"
#include "pack.h"

namespace keyspan {
namespace KEYSPAN_NAMESPACE {
namespace {

typedef int8_t vb __attribute__((vector_size(KEYSPAN_VECTOR)));

// `count` words of `columns` rows of a weight to [count][LINEAR_PANEL]; columns behind are zero.
INLINE void gather(const uint32_t *from, int64_t stride, int64_t columns, int64_t count, uint32_t *to) {
    for (int64_t n = 0; n < LINEAR_PANEL; n += SQUARE) {
        int64_t k = 0;
        if (n + SQUARE <= columns)
            for (; k + SQUARE <= count; k += SQUARE)
                transpose_square(from + n * stride + k, stride, to + k * LINEAR_PANEL + n, LINEAR_PANEL);
        for (; k < count; k++)
            for (int64_t i = n; i < n + SQUARE; i++)
                to[k * LINEAR_PANEL + i] = i < columns ? from[i * stride + k] : 0;
    }
}

INLINE vf widen_low(int64_t dtype, vu words) {
    if (dtype == BF16) return (vf)(words << 16);
    uint16_t halves[W];
    store(halves, __builtin_convertvector(words & 0xffffu, vh));
    return widen_f16(halves);
}
INLINE vf widen_high(int64_t dtype, vu words) {
    return dtype == BF16 ? (vf)(words & 0xffff0000u) : widen_low(dtype, words >> 16);
}
// Byte `i` of each word as a number.
INLINE vf widen_byte(vi words, int i) { return __builtin_convertvector((words << (24 - 8 * i)) >> 24, vf); }

// `count` words of 2-byte numbers of `vectors` vectors of columns, to two rows of floats each.
INLINE void widen_words(int64_t dtype, const uint32_t *from, int64_t count, int64_t vectors, float *to) {
    for (int64_t k = 0; k < count; k++)
        for (int64_t j = 0; j < vectors * W; j += W) {
            const vu words = load(from + k * LINEAR_PANEL + j);
            store(to + 2 * k * LINEAR_PANEL + j, widen_low(dtype, words));
            store(to + (2 * k + 1) * LINEAR_PANEL + j, widen_high(dtype, words));
        }
}

// Words of int8 to four rows of floats, or to two rows of pairs of bf16, which hold int8 exactly.
INLINE void widen_bytes(const uint32_t *from, int64_t count, int64_t vectors, float *to) {
    for (int64_t k = 0; k < count; k++)
        for (int64_t j = 0; j < vectors * W; j += W) {
            const vi words = (vi)load(from + k * LINEAR_PANEL + j);
            for (int i = 0; i < 4; i++) store(to + (4 * k + i) * LINEAR_PANEL + j, widen_byte(words, i));
        }
}
#if defined(KEYSPAN_AVX512BF16)
// By tables of the upper and the lower bytes of 0 … 127 as bf16: a third of the time of conversions.
__attribute__((target("avx512vbmi"), noinline)) void look_up_bytes(const uint32_t *from, int64_t count,
                                                                   int64_t vectors, uint32_t *to) {
    struct Tables {
        alignas(64) uint8_t upper[128], lower[128];
        Tables() {
            for (int n = 0; n < 128; n++) {
                const float number = (float)n;
                uint32_t bits;
                memcpy(&bits, &number, 4);
                upper[n] = (uint8_t)(bits >> 24);
                lower[n] = (uint8_t)(bits >> 16);
            }
        }
    };
    static const Tables tables;
    const __m512i upper0 = _mm512_load_si512(tables.upper), upper1 = _mm512_load_si512(tables.upper + 64);
    const __m512i lower0 = _mm512_load_si512(tables.lower), lower1 = _mm512_load_si512(tables.lower + 64);
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    for (int64_t k = 0; k < count; k++)
        for (int64_t j = 0; j < vectors * W; j += W) {
            const uint32_t *words = from + k * LINEAR_PANEL + j;
            __builtin_prefetch(words + 16 * LINEAR_PANEL);
            const __m512i x = _mm512_loadu_si512(words), size = _mm512_abs_epi8(x);
            const __m512i low = _mm512_permutex2var_epi8(lower0, size, lower1);
            const __m512i high = _mm512_ternarylogic_epi64(_mm512_permutex2var_epi8(upper0, size, upper1), x, sign, 0xf8);
            // Each lane of 4 columns: the pairs of columns 0 and 1, then those of columns 2 and 3.
            const __m512 first = _mm512_castsi512_ps(_mm512_unpacklo_epi8(low, high));
            const __m512 second = _mm512_castsi512_ps(_mm512_unpackhi_epi8(low, high));
            _mm512_storeu_ps(to + 2 * k * LINEAR_PANEL + j, _mm512_shuffle_ps(first, second, 0x88));
            _mm512_storeu_ps(to + (2 * k + 1) * LINEAR_PANEL + j, _mm512_shuffle_ps(first, second, 0xdd));
        }
}
#endif

INLINE void widen_bytes(const uint32_t *from, int64_t count, int64_t vectors, uint32_t *to) {
#if defined(KEYSPAN_AVX512BF16)
    static const bool has_tables = __builtin_cpu_supports("avx512vbmi");
    if (has_tables) return look_up_bytes(from, count, vectors, to);
#endif
    for (int64_t k = 0; k < count; k++)
        for (int64_t j = 0; j < vectors * W; j += W) {
            const vi words = (vi)load(from + k * LINEAR_PANEL + j);
            for (int i = 0; i < 2; i++)
                store(to + (2 * k + i) * LINEAR_PANEL + j,
                      join_bf16(widen_byte(words, 2 * i), widen_byte(words, 2 * i + 1)));
        }
}

// x · Φ(x). The tail 1 − Φ(|x|) = erfc(|x| / √2) / 2 by Abramowitz & Stegun 7.1.26, absolute error 1e-7.
INLINE vf erf_gelu(vf x) {
    const vf size = maximum(x, -x), t = 1.0f / (1.0f + 0.2316418883f * size);
    vf p = broadcast(0.5307027145f);
    p = p * t - 0.7265760135f;
    p = p * t + 0.7107068705f;
    p = p * t - 0.142248368f;
    p = p * t + 0.127414796f;
    const vf tail = p * t * exp2<5>(size * size * -0.7213475204f);
    return x * (x < broadcast(0.0f) ? tail : 1.0f - tail);
}

// `columns` sums of a row become results. `scale` and `bias` [LINEAR_PANEL] or null.
INLINE void finish(const Linear &p, const float *sums, const float *scale, const float *bias, int64_t columns,
                   char *out) {
    for (int64_t j = 0; j < columns; j += W) {
        vf y = load(sums + j);
        if (scale) y *= load(scale + j);
        if (bias) y += load(bias + j);
        if (p.applied == ERF_GELU) y = erf_gelu(y);
        narrow(p.dtype, y, min<int64_t>(W, columns - j), out + j * dtype_size(p.dtype));
    }
}

// Results of one panel's columns of ROWS rows, straight from registers: a way through memory takes some 2 % of a product.
// T: float, or uint32_t for pairs of bf16, which is the dtype of `out` too. `bias` [LINEAR_PANEL]. `ahead`: memory that is
// wanted next, of which each step of the sum brings `ahead_step` bytes closer.
template <int64_t APPLIED, class T>
__attribute__((noinline)) void multiply_and_finish(int64_t count, const T *x, int64_t x_step, const T *panel,
                                                   const float *bias, char *out, int64_t outputs, const char *ahead,
                                                   int64_t ahead_step) {
    typedef std::conditional_t<PER_WORD<T> == 1, float, uint16_t> Out;
    for (int64_t column = 0; column < LINEAR_PANEL; column += COLUMNS * W) {
        const auto finish = [&](int r, int j, vf sums) __attribute__((always_inline)) {
            const vf y = sums + load(bias + column + j * W), z = APPLIED == ERF_GELU ? erf_gelu(y) : y;
            Out *to = (Out *)out + r * outputs + column + j * W;
            if constexpr (PER_WORD<T> == 1)
                store(to, z);
            else
                store(to, narrow_bf16(z));
        };
        microkernel<ROWS, COLUMNS, GIVE>(count, x, x_step, 1, panel + column, LINEAR_PANEL, (float *)nullptr, 0, finish,
                                         ahead, ahead_step);
    }
}

// T as above.
template <class T>
void multiply(const Linear &p, int64_t first_row, int64_t last_row, int64_t first_column, int64_t last_column,
              char *scratch) {
    constexpr bool PAIRS = PER_WORD<T> == 2;
    const int64_t rows = last_row - first_row, size = dtype_size(p.dtype), per_word = numbers_per_word(p);
    const int64_t words = p.inputs / per_word;  // of a column of the weight
    const int64_t steps = per_word / PER_WORD<T>;  // that a word becomes, each a row of a block
    float *sums = (float *)scratch;
    uint32_t *gathered = (uint32_t *)(sums + rows * LINEAR_PANEL);
    float scale[LINEAR_PANEL], bias[LINEAR_PANEL];
    T *block = (T *)(gathered + LINEAR_BLOCK * LINEAR_PANEL);
    const char *x_rows = p.x + first_row * p.x_stride * size;

    const T *x = (const T *)x_rows;
    int64_t x_step = PAIRS ? p.x_stride / 2 : p.x_stride;
    if (!PAIRS && p.dtype != F32) {
        float *wide = (float *)(block + 4 * LINEAR_BLOCK * LINEAR_PANEL);
        for (int64_t r = 0; r < rows; r++)
            widen(p.dtype, x_rows + r * p.x_stride * size, 1, p.inputs, wide + r * p.inputs);
        x = (const T *)wide;
        x_step = p.inputs;
    }

    // Panels of the form that is multiplied are read from where they lie. Sums of few rows at a time stay in the first
    // cache where all words of a panel are multiplied in one go.
    const bool as_they_lie = p.storage == PANELS_OF_DTYPE && (PAIRS || p.dtype == F32);
    const int64_t most = as_they_lie                    ? LINEAR_WHOLE
                         : p.storage == PANELS_OF_INT8 ? LINEAR_BLOCK / 4  // the first cache holds it, widened
                                                       : LINEAR_BLOCK;
    const bool one_block = words <= most;
    const auto finished = p.applied == ERF_GELU ? multiply_and_finish<ERF_GELU, T> : multiply_and_finish<NOTHING, T>;
    // While a panel meets many rows, each of their groups brings a part of the next panel into the second cache.
    const int64_t groups = rows / ROWS, part_of_word = groups < 4 ? 0 : LINEAR_PANEL * 4 / groups;
    while (first_column < last_column) {
        const int64_t panel = first_column / LINEAR_PANEL, inside = first_column % LINEAR_PANEL;
        const int64_t end = min(last_column, (panel + 1) * LINEAR_PANEL);
        const int64_t columns = end - first_column, vectors = (columns + W - 1) / W;
        const uint32_t *packed = (const uint32_t *)p.weight + panel * words * LINEAR_PANEL + inside;
        if (p.scale) memcpy(scale, p.scale + first_column, (size_t)columns * 4);
        if (p.bias)
            widen(p.dtype, p.bias + first_column * size, 1, columns, bias);
        else
            for (float &number : bias) number = -0.0f;  // which changes no sum
        for (int64_t word = 0; word == 0 || word < words; word += most) {
            const int64_t count = min(most, words - word);
            const uint32_t *source = packed + word * LINEAR_PANEL;
            if (p.storage == ROWS_OF_DTYPE) {
                const char *row = p.weight + (first_column * p.weight_stride + word * per_word) * size;
                gather((const uint32_t *)row, p.weight_stride / per_word, columns, count, gathered);
                source = gathered;
            }
            const T *b = (const T *)source;
            if (p.storage == PANELS_OF_INT8)
                widen_bytes(source, count, vectors, block), b = block;
            else if (!PAIRS && p.dtype != F32)
                widen_words(p.dtype, source, count, vectors, (float *)block), b = block;
            const auto product = word ? gemm<ADD, T> : gemm<SET, T>;
            const bool last = word + count == words;
            for (int64_t r = 0; r < rows; r += ROWS) {
                const int64_t few = min((int64_t)ROWS, rows - r);
                if (as_they_lie && one_block && few == ROWS && columns == LINEAR_PANEL && !p.scale) {
                    const uint32_t *next = part_of_word ? source + words * LINEAR_PANEL : source;
                    finished(count * steps, x + r * x_step, x_step, b, bias,
                             p.out + ((first_row + r) * p.outputs + first_column) * size, p.outputs,
                             (const char *)next + r / ROWS * words * part_of_word, part_of_word);
                    continue;
                }
                float *y = one_block ? sums : sums + r * LINEAR_PANEL;
                product((int)few, count * steps, x + r * x_step + word * steps, x_step, 1, b, LINEAR_PANEL, y,
                        LINEAR_PANEL, vectors, {});
                if (!last) continue;
                for (int64_t i = 0; i < few; i++, y += LINEAR_PANEL)
                    finish(p, y, p.scale ? scale : nullptr, p.bias ? bias : nullptr, columns,
                           p.out + ((first_row + r + i) * p.outputs + first_column) * size);
            }
        }
        first_column = end;
    }
}

void linear(const Linear &p, int64_t first_row, int64_t last_row, int64_t first_column, int64_t last_column,
            char *scratch) {
    if constexpr (HAS_PAIRS)
        if (p.dtype == BF16)
            return multiply<uint32_t>(p, first_row, last_row, first_column, last_column, scratch);
    multiply<float>(p, first_row, last_row, first_column, last_column, scratch);
}

}  // namespace

LinearKernel linear_kernel() { return linear; }

}  // namespace KEYSPAN_NAMESPACE
}  // namespace keyspan
