// The kernels of products of matrices for one instruction set; compiled once for each instruction set.
//
// bf16 is multiplied as pairs along the summed dimension where the machine can (AVX-512-BF16); else 2-byte numbers are
// widened to fp32.
#include "product.h"

#include "gemm.h"
#include "pack.h"

namespace keyspan {
namespace KEYSPAN_NAMESPACE {
namespace {

static_assert(PRODUCT_PANEL % SQUARE == 0, "panels are packed in squares");

constexpr int64_t PACK_BLOCK = 128;  // words of rows that are transposed at a time

// `count` fp32 numbers rounded to `dtype`, as floats again, or as words.
INLINE void round_numbers(const float *from, int64_t dtype, int64_t count, float *to) {
    uint16_t rounded[2 * PACK_BLOCK];
    narrow(dtype, from, count, 1.0f, (char *)rounded);
    widen(dtype, (const char *)rounded, 1, count, to);
}
INLINE void round_numbers(const float *from, int64_t, int64_t count, uint32_t *to) {
    to[(count - 1) / 2] = 0;  // its second half, where count is odd
    narrow(BF16, from, count, 1.0f, (char *)to);
}

// `width` columns of row `k` of a matrix [K, ...] as words: of two rows, 2 k and 2 k + 1, for pairs. A row behind the
// last one counts as zeros.
INLINE void pack_words(const char *matrix, int64_t stride, int64_t, int64_t dtype, int64_t k, int64_t width,
                       float *to) {
    widen(dtype, matrix + k * stride * dtype_size(dtype), 1, width, to);
}
INLINE void pack_words(const char *matrix, int64_t stride, int64_t K, int64_t, int64_t k, int64_t width,
                       uint32_t *to) {
    const uint16_t *row = (const uint16_t *)matrix + 2 * k * stride;
    if (2 * k + 1 == K)
        for (int64_t i = 0; i < width; i++) to[i] = row[i];
    else if (width == PRODUCT_PANEL)
        interleave_rows(row, row + stride, PRODUCT_PANEL, to);  // unrolled
    else
        interleave_rows(row, row + stride, width, to);
}

// Of fp32 numbers rounded to `dtype`.
INLINE void pack_rounded_words(const float *matrix, int64_t stride, int64_t, int64_t dtype, int64_t k, int64_t width,
                               float *to) {
    round_numbers(matrix + k * stride, dtype, width, to);
}
INLINE void pack_rounded_words(const float *matrix, int64_t stride, int64_t K, int64_t, int64_t k, int64_t width,
                               uint32_t *to) {
    const float *row = matrix + 2 * k * stride, *below = 2 * k + 1 < K ? row + stride : nullptr;
    int64_t i = 0;
    for (; i + W <= width; i += W) store(to + i, pairs_bf16(load(row + i), below ? load(below + i) : vf{}));
    for (; i < width; i++) to[i] = to_bf16(row[i]) | (below ? (uint32_t)to_bf16(below[i]) << 16 : 0);
}

// `count` numbers of a row as words.
INLINE void pack_numbers(const char *from, int64_t dtype, int64_t count, float *to) { widen(dtype, from, 1, count, to); }
INLINE void pack_numbers(const char *from, int64_t, int64_t count, uint32_t *to) {
    to[(count - 1) / 2] = 0;  // its second half, where count is odd
    memcpy(to, from, (size_t)count * 2);
}

template <class T>
void pack(const Product &p, int64_t column, int64_t first_word, int64_t last_word, char *packed) {
    const int64_t size = dtype_size(p.b_dtype), columns = min(PRODUCT_PANEL, p.N - column);
    const bool rounded = p.b_dtype != p.dtype;
    T *to = (T *)packed + first_word * PRODUCT_PANEL;
    if (!p.b_transposed) {
        const char *from = p.b + column * size;
        for (int64_t word = first_word; word < last_word; word++, to += PRODUCT_PANEL) {
            if (rounded)
                pack_rounded_words((const float *)from, p.b_stride, p.K, p.dtype, word, columns, to);
            else
                pack_words(from, p.b_stride, p.K, p.dtype, word, columns, to);
            for (int64_t n = columns; n < PRODUCT_PANEL; n++) to[n] = 0;
        }
        return;
    }
    T rows[SQUARE * PACK_BLOCK];
    for (int64_t word = first_word; word < last_word; word += PACK_BLOCK, to += PACK_BLOCK * PRODUCT_PANEL) {
        const int64_t count = min(PACK_BLOCK, last_word - word), k = word * PER_WORD<T>;
        const int64_t numbers = min(p.K - k, count * PER_WORD<T>);
        for (int64_t n = 0; n < PRODUCT_PANEL; n += SQUARE) {
            for (int64_t i = 0; i < SQUARE; i++) {
                const char *from = p.b + ((column + n + i) * p.b_stride + k) * size;
                if (n + i >= columns)
                    memset(rows + i * PACK_BLOCK, 0, (size_t)count * 4);
                else if (rounded)
                    round_numbers((const float *)from, p.dtype, numbers, rows + i * PACK_BLOCK);
                else
                    pack_numbers(from, p.dtype, numbers, rows + i * PACK_BLOCK);
            }
            int64_t j = 0;
            for (; j + SQUARE <= count; j += SQUARE)
                transpose_square((const uint32_t *)rows + j, PACK_BLOCK, (uint32_t *)to + j * PRODUCT_PANEL + n,
                                 PRODUCT_PANEL);
            for (; j < count; j++)
                for (int64_t i = 0; i < SQUARE; i++) to[j * PRODUCT_PANEL + n + i] = rows[i * PACK_BLOCK + j];
        }
    }
}

// Where gemm finds rows of a block of a.
template <class T>
struct Block {
    const T *data;
    int64_t row, step;
};

// Whether rows of a are words where they lie, so that they need not be copied.
template <class T>
INLINE bool are_words(const Product &p) {
    constexpr int64_t numbers = PER_WORD<T>;
    return !p.a_transposed && dtype_size(p.dtype) * numbers == 4 && p.K % numbers == 0 && p.a_stride % numbers == 0 &&
           (uintptr_t)p.a % 4 == 0;
}

// Words `word` to `word + count` − 1 of the part's rows of a, as they lie, or copied to `to`.
template <class T>
INLINE Block<T> block_of(const Product &p, const ProductPart &part, int64_t word, int64_t count, T *to) {
    const int64_t rows = part.last_row - part.first_row, size = dtype_size(p.dtype);
    if (p.a_transposed) {
        for (int64_t i = 0; i < count; i++)
            pack_words(p.a + part.first_row * size, p.a_stride, p.K, p.dtype, word + i, rows, to + i * rows);
        return {to, 1, rows};
    }
    const int64_t k = word * PER_WORD<T>, numbers = min(p.K - k, count * PER_WORD<T>);
    const char *first = p.a + (part.first_row * p.a_stride + k) * size;
    if (are_words<T>(p)) return {(const T *)first, p.a_stride / PER_WORD<T>, 1};
    for (int64_t r = 0; r < rows; r++)
        pack_numbers(first + r * p.a_stride * size, p.dtype, numbers, to + r * PRODUCT_COPIED_BLOCK);
    return {to, PRODUCT_COPIED_BLOCK, 1};
}

// T: float, or uint32_t for pairs of bf16.
template <class T>
void multiply(const Product &p, const ProductPart &part, const char *packed, char *scratch) {
    const int64_t rows = part.last_row - part.first_row, columns = part.last_column - part.first_column;
    const int64_t all = words<T>(p.K), out_size = dtype_size(p.out_dtype), out_row = p.N * out_size;
    char *out = p.out + (part.first_row * p.N + part.first_column) * out_size;
    T *copied = (T *)((float *)scratch + PRODUCT_ROWS * PRODUCT_COLUMNS);
    float bias[PRODUCT_COLUMNS];
    if (p.bias) widen(p.dtype, p.bias + part.first_column * dtype_size(p.dtype), 1, columns, bias);

    const int64_t most = are_words<T>(p) ? PRODUCT_BLOCK : PRODUCT_COPIED_BLOCK;
    const int64_t blocks = max<int64_t>(1, (all + most - 1) / most);  // of about one size
    const int64_t block = max<int64_t>(1, (all + blocks - 1) / blocks);
    // Sums of whole vectors in fp32 need no memory but `out`. Of one block, those of a few rows are done at a time.
    const bool in_place = p.out_dtype == F32 && columns % W == 0, one_block = all <= most && !p.accumulate;
    float *sums = in_place ? (float *)out : (float *)scratch;
    const int64_t width = in_place ? p.N : one_block ? PRODUCT_PANEL : (columns + W - 1) / W * W;
    if (p.accumulate && !in_place)
        for (int64_t r = 0; r < rows; r++) memcpy(sums + r * width, out + r * out_row, (size_t)columns * 4);
    for (int64_t word = 0; word == 0 || word < all; word += block) {
        const int64_t count = min(block, all - word);
        const Block<T> a = block_of(p, part, word, count, copied);
        const auto product = word || p.accumulate ? gemm<ADD, T> : gemm<SET, T>;
        const bool last = word + count == all;
        for (int64_t c = 0; c < columns; c += PRODUCT_PANEL) {
            const T *b = (const T *)packed + c * all + word * PRODUCT_PANEL;
            const int64_t some = min(PRODUCT_PANEL, columns - c), vectors = (some + W - 1) / W;
            for (int64_t r = 0; r < rows; r += ROWS) {
                const int64_t few = min((int64_t)ROWS, rows - r);
                float *y = in_place || !one_block ? sums + r * width + c : sums;
                product((int)few, count, a.data + r * a.row, a.row, a.step, b, PRODUCT_PANEL, y, width, vectors, {});
                if (!last) continue;
                for (int64_t i = 0; i < few; i++) {
                    if (p.bias)
                        for (int64_t j = 0; j < some; j++) y[i * width + j] += bias[c + j];
                    if (!in_place) narrow(p.out_dtype, y + i * width, some, 1.0f, out + (r + i) * out_row + c * out_size);
                }
            }
        }
    }
}

bool in_pairs(const Product &p) { return HAS_PAIRS && p.dtype == BF16; }

int64_t words_of(const Product &p) { return in_pairs(p) ? words<uint32_t>(p.K) : p.K; }

void pack_panel_of(const Product &p, int64_t column, int64_t first_word, int64_t last_word, char *packed) {
    if constexpr (HAS_PAIRS)
        if (in_pairs(p)) return pack<uint32_t>(p, column, first_word, last_word, packed);
    pack<float>(p, column, first_word, last_word, packed);
}

void multiply_part(const Product &p, const ProductPart &part, const char *packed, char *scratch) {
    if constexpr (HAS_PAIRS)
        if (in_pairs(p)) return multiply<uint32_t>(p, part, packed, scratch);
    multiply<float>(p, part, packed, scratch);
}

}  // namespace

const ProductKernels *product_kernels() {
    static const ProductKernels table{words_of, pack_panel_of, multiply_part};
    return &table;
}

}  // namespace KEYSPAN_NAMESPACE
}  // namespace keyspan
