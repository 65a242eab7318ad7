// Fuzz test of the C ABI: random problems against a plain double-precision loop, for builds with sanitizers. This file
// holds attention; program.h products with a weight, the layers and programs of both.
//
//     fuzz COUNT [FIRST SEED]
//
// `make sanitize` builds and runs it. A failure prints its seed; `fuzz 1 SEED` repeats that problem. Every array ends
// with its last element and holds NaN in the gaps between strides, and so does the workspace: a read of memory that holds
// no data is an error of the address sanitizer, or a NaN in a result.
#include "program.h"
#include "random.h"

extern "C" {
int64_t keyspan_supports(int64_t);
int64_t keyspan_forward(const Params *);
int64_t keyspan_backward(const Params *);
}

namespace {

// ---- arrays --------------------------------------------------------------------------------------------------------

struct Array {
    int64_t dtype = F32;
    std::vector<int64_t> shape, stride;
    std::vector<char> memory;
    int64_t offset = 0;

    int64_t index(const std::vector<int64_t> &at) const {
        int64_t i = offset;
        for (size_t d = 0; d < at.size(); d++) i += at[d] * stride[d];
        return i;
    }
    double get(const std::vector<int64_t> &at) const { return read(dtype, memory.data(), index(at)); }
    char *data() { return memory.data() + offset * element_size(dtype); }
};

// Plain arrays are contiguous; others have permuted dimensions, gaps between rows and an offset. Numbers of 8 bits lie side
// by side in each row.
Array make_array(Random &random, int64_t dtype, std::vector<int64_t> shape, bool plain, double factor = 1) {
    Array a;
    a.dtype = dtype;
    a.shape = shape;
    const int dims = (int)shape.size();
    a.stride.assign(dims, 0);
    std::vector<int> order(dims);
    for (int d = 0; d < dims; d++) order[d] = d;
    int64_t step = 1;
    if (!plain) {
        if (random.chance(0.5)) std::swap(order[1], order[2]);
        if (dtype < BYTES_INT8 && random.chance(0.2)) std::swap(order[dims - 1], order[dims - 2]);
        if (dtype < BYTES_INT8 && random.chance(0.2)) step = 2;
        a.offset = random.from(0, 3);
    }
    for (int i = dims - 1; i >= 0; i--) {
        const int d = order[i];
        a.stride[d] = !plain && i < dims - 1 && random.chance(0.1) ? 0 : step;  // expanded
        if (a.stride[d]) step *= shape[d];
        if (!plain && random.chance(0.3)) step += random.from(1, 5);
    }
    int64_t last = a.offset, count = 1;
    for (int d = 0; d < dims; d++) {
        last += (shape[d] - 1) * a.stride[d];
        count *= shape[d];
    }
    if (!count) return a;
    a.memory.assign((size_t)((last + 1) * element_size(dtype)), (char)0xff);
    std::vector<int64_t> at(dims, 0);
    for (int64_t i = 0; i < count; i++) {
        write(dtype, a.memory.data(), a.index(at), random.value() * factor);
        for (int d = dims - 1; d >= 0 && ++at[d] == shape[d]; d--) at[d] = 0;
    }
    return a;
}

// ---- problems ------------------------------------------------------------------------------------------------------

struct Bias {
    Array values;
    bool wanted;
    int64_t index(int64_t dim, int64_t at) const { return values.shape[dim] > 1 ? at : 0; }
    double get(int64_t b, int64_t g, int64_t h, int64_t m, int64_t j) const {
        return values.get({index(0, b), index(1, g), index(2, h), index(3, m), index(4, j)});
    }
};

struct Problem {
    Params p{};
    Array q, k, v, grad_out;
    std::vector<int32_t> lo, hi, diagonal, origin, sequence, block_table;
    std::vector<Bias> biases;
    std::vector<uint8_t> mask;
    std::vector<int64_t> mask_shape;
    std::vector<float> slopes, table, sinks, grad_lse, k_scale, v_scale;
    std::vector<int64_t> seed;
    int64_t keys;          // logical keys, which a query can address
    bool disjoint = true;  // no two ranges of a row overlap; where they may, results are not compared
    bool want_q, want_k, want_v, want_slopes, want_table, want_sinks;

    bool seen(int64_t b, int64_t g, int64_t h, int64_t m, int64_t j, int64_t &distance) const {
        bool found = !p.lo;
        distance = j - m;
        for (int64_t s = 0; p.lo && s < p.S; s++) {
            const int64_t at = (s * p.RB + (p.RB == 1 ? 0 : b)) * p.M + m;
            if (j < lo[at] || j >= hi[at]) continue;  // j is a key that exists: bounds outside the keys are clamped
            found = true;
            distance = j - diagonal[at];
        }
        if (!found || mask.empty()) return found;
        const int64_t at[] = {b, g, h, m, j};
        int64_t i = 0;
        for (int d = 0; d < 5; d++) i = i * mask_shape[d] + (mask_shape[d] > 1 ? at[d] : 0);
        return mask[i];
    }
    // Element i of key n, or of its value.
    double key(int64_t b, int64_t n, int64_t g, int64_t i) const {
        return k.get({b, n, g, i}) * (p.stored ? k_scale[(b * (p.N / p.k_run) + n / p.k_run) * p.G + g] : 1);
    }
    double value(int64_t b, int64_t n, int64_t g, int64_t i) const {
        return v.get({b, n, g, i}) * (p.stored ? v_scale[(b * (p.N / p.v_run) + n / p.v_run) * p.G + g] : 1);
    }
    int64_t physical(int64_t m, int64_t j) const {
        if (sequence.empty()) return j;
        const int64_t row = std::max<int64_t>(0, std::min<int64_t>(sequence[m], p.sequences - 1));
        const int64_t slot = (int64_t)block_table[row * p.pages + j / p.page_size] * p.page_size + j % p.page_size;
        return std::max<int64_t>(0, std::min(slot, p.N - 1));
    }
};

std::vector<float> some_floats(Random &random, int64_t count, double factor) {
    std::vector<float> x;
    for (int64_t i = 0; i < count; i++) x.push_back((float)(random.value() * factor));
    return x;
}

void make_ranges(Random &random, Problem &problem) {
    Params &p = problem.p;
    p.S = random.from(1, 2);
    p.RB = problem.sequence.empty() && random.chance(0.4) ? p.B : 1;
    const int64_t N = problem.keys, kind = random.from(0, 2);
    const int64_t window = random.from(0, N), first = random.from(0, 5), shift = random.from(-5, N);
    const int64_t documents = random.from(1, 6);
    for (int64_t s = 0; s < p.S; s++)
        for (int64_t b = 0; b < p.RB; b++)
            for (int64_t m = 0; m < p.M; m++) problem.lo.push_back(0), problem.hi.push_back(0), problem.diagonal.push_back(0);
    for (int64_t b = 0; b < p.RB; b++) {
        const int64_t length = random.chance(0.1) ? 0 : kind == 0 || random.chance(0.5) ? N : random.from(0, N);
        for (int64_t m = 0; m < p.M; m++) {
            int64_t a[4] = {0, 0, 0, 0};
            if (kind == 0) {  // any ranges
                for (int64_t &x : a) x = random.from(0, N);
                for (int i = 0; i < 4; i++)
                    for (int j = i + 1; j < 4; j++)
                        if (a[j] < a[i]) std::swap(a[i], a[j]);
                if (random.chance(0.2)) a[1] = a[0];
            } else {
                int64_t low = 0, high = length, at = m + shift;
                if (kind == 2) {  // documents
                    const int64_t d = m * documents / p.M;
                    low = d * length / documents;
                    high = (d + 1) * length / documents;
                    at = low + m - (d * p.M + documents - 1) / documents;
                }
                a[3] = std::min(high, std::max(low, at + 1));
                a[2] = std::min(a[3], std::max(low, at - window));
                a[0] = low;
                a[1] = std::min(low + first, a[2]);
            }
            for (int64_t s = 0; s < p.S; s++) {
                const int64_t i = (s * p.RB + b) * p.M + m;
                problem.lo[i] = (int32_t)a[p.S == 1 ? 2 : 2 * s];
                problem.hi[i] = (int32_t)a[p.S == 1 ? 3 : 2 * s + 1];
                problem.diagonal[i] = (int32_t)(m + shift + 7 * s - b);
            }
        }
    }
    p.lo = problem.lo.data();
    p.hi = problem.hi.data();
    p.diagonal = problem.diagonal.data();
    if (random.chance(0.5)) return;
    // Any first keys of documents: they move blocks of keys and hide nothing. Some runs of rows have one.
    int32_t origin = 0;
    for (int64_t i = 0; i < p.RB * p.M; i++) {
        if (random.chance(0.1)) origin = (int32_t)random.from(-3, p.N + 3);
        problem.origin.push_back(random.chance(0.3) ? origin : problem.lo[i]);
    }
    p.origin = problem.origin.data();
}

// Puts numbers into the tensors of the mask that a correct mask cannot hold: the library clamps them.
void spoil(Random &random, Problem &problem) {
    const int64_t extremes[] = {INT32_MIN, INT32_MIN + 1, -1000, -1, INT32_MAX - 1, INT32_MAX, 5000};
    for (auto *x : {&problem.lo, &problem.hi, &problem.sequence, &problem.block_table})
        for (int32_t &element : *x)
            if (random.chance(0.1)) element = (int32_t)random.among(extremes);
}

Problem make_problem(uint64_t seed) {
    Random random{seed};
    Problem problem;
    Params &p = problem.p;
    const int64_t any_dims[] = {1, 3, 8, 16, 19, 24, 40, 64, 80, 129}, whole_dims[] = {16, 32, 48, 64, 80, 128, 256};
    p.threads = random.from(1, 3);
    p.dtype = random.from(0, 2);
    p.out_dtype = random.chance(0.7) ? p.dtype : random.from(0, 2);
    p.G = random.from(1, 3);
    const bool few_queries = random.chance(0.4), paged = random.chance(0.25);
    p.B = paged ? 1 : random.from(1, 3);
    if (few_queries) {
        p.H = random.chance(0.7) ? random.from(1, 6) : random.from(7, 24);
        p.M = random.from(1, std::max<int64_t>(1, (random.chance(0.7) ? 6 : 48) / p.H));
        p.N = random.chance(0.3) ? random.from(1100, 2600) : random.from(1, 500);
        const bool whole = random.chance(0.5);
        p.K = whole ? random.among(whole_dims) : random.among(any_dims);
        p.V = random.chance(0.5) ? p.K : whole ? random.among(whole_dims) : random.among(any_dims);
    } else {
        p.H = random.from(1, 4);
        p.M = random.chance(0.3) ? random.from(90, 230) : random.from(1, 60);
        p.N = random.chance(0.05) ? 0 : random.chance(0.4) ? random.from(1, 40) : random.from(41, 330);
        p.K = random.among(any_dims);
        p.V = random.chance(0.5) ? p.K : random.among(any_dims);
    }
    problem.keys = p.N;
    if (paged) {
        p.page_size = random.from(1, 40);
        const int64_t physical = std::max<int64_t>(1, p.N / p.page_size);
        p.N = physical * p.page_size;
        p.sequences = random.from(1, 4);
        p.pages = random.from(1, std::min<int64_t>(physical + 2, few_queries ? 1500 / p.page_size + 1 : 300 / p.page_size + 1));
        problem.keys = p.pages * p.page_size;
        if (few_queries) p.M = std::max(p.M, p.sequences);
        for (int64_t i = 0; i < p.sequences * p.pages; i++)
            problem.block_table.push_back((int32_t)random.from(0, physical - 1));
        for (int64_t m = 0; m < p.M; m++) problem.sequence.push_back((int32_t)(m * p.sequences / p.M));
        p.sequence = problem.sequence.data();
        p.block_table = problem.block_table.data();
    }
    p.S = p.RB = 1;
    if (paged || random.chance(0.75)) make_ranges(random, problem);
    if (p.lo && random.chance(0.15)) {
        spoil(random, problem);
        problem.disjoint = p.S == 1;
    }
    if (paged && random.chance(0.05)) {  // no documents, or no pages, though there are queries
        (random.chance(0.5) ? p.sequences : p.pages) = 0;
        problem.block_table.clear();
        p.block_table = nullptr;
        problem.keys = 0;
    }

    if (p.N && random.chance(0.3)) {
        p.stored = random.from(INT8, E4M3);
        const auto run = [&] {  // a divisor of the number of keys
            int64_t x = random.chance(0.5) ? 1 : random.from(1, p.N);
            while (p.N % x) x--;
            return x;
        };
        p.k_run = run();
        p.v_run = run();
        const double largest = p.stored == INT8 ? 128 : 448;
        problem.k_scale = some_floats(random, p.B * (p.N / p.k_run) * p.G, 1.5 / largest);
        problem.v_scale = some_floats(random, p.B * (p.N / p.v_run) * p.G, 1.5 / largest);
        p.k_scale = problem.k_scale.data();
        p.v_scale = problem.v_scale.data();
    }
    const int64_t key_dtype = p.stored == INT8 ? BYTES_INT8 : p.stored == E4M3 ? BYTES_E4M3 : p.dtype;
    const bool plain = random.chance(0.4);
    problem.q = make_array(random, p.dtype, {p.B, p.M, p.G, p.H, p.K}, plain);
    problem.k = make_array(random, key_dtype, {p.B, p.N, p.G, p.K}, plain);
    problem.v = make_array(random, key_dtype, {p.B, p.N, p.G, p.V}, plain);
    problem.grad_out = make_array(random, p.out_dtype, {p.B, p.M, p.G, p.H, p.V}, plain);
    const auto copy = [](const std::vector<int64_t> &from, int64_t *to) { memcpy(to, from.data(), from.size() * 8); };
    p.q = problem.q.data();
    p.k = problem.k.data();
    p.v = problem.v.data();
    p.grad_out = problem.grad_out.data();
    copy(problem.q.stride, p.q_stride);
    copy(problem.k.stride, p.k_stride);
    copy(problem.v.stride, p.v_stride);
    copy(problem.grad_out.stride, p.grad_out_stride);

    const std::vector<int64_t> full = {p.B, p.G, p.H, p.M, problem.keys};
    const auto broadcast = [&] {
        std::vector<int64_t> shape = full;
        for (int64_t &x : shape)
            if (random.chance(0.4)) x = 1;
        return shape;
    };
    for (int64_t i = problem.keys && random.chance(0.5) ? random.from(1, 2) : 0; i > 0; i--) {
        Bias bias{make_array(random, random.from(0, 2), broadcast(), random.chance(0.5)), random.chance(0.8)};
        problem.biases.push_back(std::move(bias));
    }
    if (problem.keys && random.chance(0.2)) {
        problem.mask_shape = broadcast();
        int64_t count = 1;
        for (const int64_t x : problem.mask_shape) count *= x;
        for (int64_t i = 0; i < count; i++) problem.mask.push_back(random.chance(0.6));
    }
    if (random.chance(0.3)) {
        p.slopes_by_batch = random.chance(0.3) && p.B > 1;
        problem.slopes = some_floats(random, (p.slopes_by_batch ? p.B : 1) * p.G * p.H, 0.1);
    }
    if (random.chance(0.3)) {
        p.reach = random.chance(0.3) ? random.from(100, 400) : random.from(0, 20);
        problem.table = some_floats(random, p.G * p.H * (2 * p.reach + 1), 1);
    }
    if (random.chance(0.3)) problem.sinks = some_floats(random, p.G * p.H, 1);
    if (random.chance(0.25)) {
        p.dropout_p = random.chance(0.1) ? 0.999 : 0.3;
        problem.seed.push_back((int64_t)(random.next() >> 2));
    }
    if (random.chance(0.6)) problem.grad_lse = some_floats(random, p.B * p.G * p.H * p.M, 1);
    p.slopes = begin_of(problem.slopes);
    p.table = begin_of(problem.table);
    p.sinks = begin_of(problem.sinks);
    p.seed = begin_of(problem.seed);
    p.grad_lse = begin_of(problem.grad_lse);
    p.scale = random.chance(0.8) ? 1 / std::sqrt((double)p.K) : random.chance(0.3) ? 0 : -0.4;
    p.softcap = random.chance(0.2) ? 2.5 : 0;
    problem.want_q = random.chance(0.9);
    problem.want_k = random.chance(0.9);
    problem.want_v = random.chance(0.9);
    problem.want_slopes = p.slopes && random.chance(0.8);
    problem.want_table = p.table && random.chance(0.8);
    problem.want_sinks = p.sinks && random.chance(0.8);
    return problem;
}

// ---- reference -----------------------------------------------------------------------------------------------------

// A result, and for each element the sum of the absolute values of its terms, to which rounding errors are relative.
struct Result {
    std::vector<double> value, size;
    explicit Result(int64_t count = 0) : value((size_t)count, 0), size((size_t)count, 0) {}
    void add(int64_t i, double x, double terms) {
        value[i] += x;
        size[i] += terms;
    }
};

struct Answer {
    Result out, lse, dq, dk, dv, dslopes, dtable, dsinks;
    std::vector<Result> dbiases;
    double largest_score = 1;
};

uint32_t random_word(uint64_t seed, uint32_t key, uint32_t query, uint32_t head, uint32_t batch) {
    uint32_t c[4] = {key / 4, query, head, batch}, k[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    for (int round = 0; round < 10; round++) {  // Philox 4x32-10
        const uint64_t a = (uint64_t)0xD2511F53u * c[0], b = (uint64_t)0xCD9E8D57u * c[2];
        const uint32_t next[4] = {(uint32_t)(b >> 32) ^ c[1] ^ k[0], (uint32_t)b, (uint32_t)(a >> 32) ^ c[3] ^ k[1], (uint32_t)a};
        memcpy(c, next, 16);
        k[0] += 0x9E3779B9u;
        k[1] += 0xBB67AE85u;
    }
    return c[key % 4];
}

Answer solve(const Problem &problem) {
    const Params &p = problem.p;
    const int64_t B = p.B, M = p.M, G = p.G, H = p.H, K = p.K, V = p.V, N = problem.keys, width = 2 * p.reach + 1;
    Answer a;
    a.out = Result(B * M * G * H * V);
    a.lse = Result(B * G * H * M);
    a.dq = Result(B * M * G * H * K);
    a.dk = Result(B * p.N * G * K);
    a.dv = Result(B * p.N * G * V);
    a.dslopes = Result((p.slopes_by_batch ? B : 1) * G * H);
    a.dtable = Result(G * H * width);
    a.dsinks = Result(G * H);
    for (const Bias &bias : problem.biases) {
        int64_t count = 1;
        for (const int64_t x : bias.values.shape) count *= x;
        a.dbiases.emplace_back(count);
    }
    std::vector<double> score(N), softcap_grad(N), dropout(N), weight(N), query(K), grad(V);
    std::vector<int64_t> distance(N);
    std::vector<bool> seen(N);
    for (int64_t b = 0; b < B; b++)
        for (int64_t g = 0; g < G; g++) {
            // Keys and values of a group as doubles.
            std::vector<double> all_k(p.N * K), all_v(p.N * V);
            for (int64_t n = 0; n < p.N; n++) {
                for (int64_t i = 0; i < K; i++) all_k[n * K + i] = problem.key(b, n, g, i);
                for (int64_t i = 0; i < V; i++) all_v[n * V + i] = problem.value(b, n, g, i);
            }
            for (int64_t h = 0; h < H; h++)
                for (int64_t m = 0; m < M; m++) {
                    const int64_t head = g * H + h, row = ((b * M + m) * G + g) * H + h, column = (b * G * H + head) * M + m;
                    for (int64_t i = 0; i < K; i++) query[i] = problem.q.get({b, m, g, h, i});
                    for (int64_t i = 0; i < V; i++) grad[i] = problem.grad_out.get({b, m, g, h, i});
                    double peak = p.sinks ? p.sinks[head] : -INFINITY;
                    for (int64_t j = 0; j < N; j++) {
                        seen[j] = problem.seen(b, g, h, m, j, distance[j]);
                        if (!seen[j]) continue;
                        const double *key = &all_k[problem.physical(m, j) * K];
                        double x = 0, size = 0;
                        for (int64_t i = 0; i < K; i++) x += query[i] * key[i], size += std::fabs(query[i] * key[i]);
                        x *= p.scale;
                        size *= std::fabs(p.scale);
                        softcap_grad[j] = 1;
                        if (p.softcap != 0) {
                            const double unit = std::tanh(x / p.softcap);
                            softcap_grad[j] = 1 - unit * unit;
                            x = p.softcap * unit;
                        }
                        for (const Bias &bias : problem.biases) {
                            const double term = bias.get(b, g, h, m, j);
                            x += term;
                            size += std::fabs(term);
                        }
                        if (p.slopes) {
                            const double term = p.slopes[(p.slopes_by_batch ? b * G * H : 0) + head] * std::fabs((double)distance[j]);
                            x -= term;
                            size += std::fabs(term);
                        }
                        if (p.table) x += p.table[head * width + p.reach + std::max(-p.reach, std::min(p.reach, distance[j]))];
                        score[j] = x;
                        peak = std::max(peak, x);
                        a.largest_score = std::max({a.largest_score, size + 3, p.softcap});
                        dropout[j] = 1;
                        if (p.seed) {
                            const double bits = random_word((uint64_t)*p.seed, (uint32_t)j, (uint32_t)m, (uint32_t)head, (uint32_t)b);
                            dropout[j] = bits >= std::nearbyint(p.dropout_p * 4294967296.0) ? 1 / (1 - p.dropout_p) : 0;
                        }
                    }
                    double total = p.sinks ? std::exp(p.sinks[head] - peak) : 0;
                    for (int64_t j = 0; j < N; j++)
                        if (seen[j]) total += std::exp(score[j] - peak);
                    const double lse = total == 0 ? -INFINITY : peak + std::log(total);
                    a.lse.add(column, lse, std::fabs(lse) + 1);
                    if (total == 0) continue;
                    double delta = p.grad_lse ? -p.grad_lse[column] : 0, delta_size = std::fabs(delta);
                    for (int64_t j = 0; j < N; j++) {
                        if (!seen[j]) continue;
                        weight[j] = std::exp(score[j] - lse);
                        const int64_t slot = problem.physical(m, j);
                        for (int64_t i = 0; i < V; i++) {
                            const double x = weight[j] * dropout[j] * all_v[slot * V + i], y = weight[j] * dropout[j] * grad[i];
                            a.out.add(row * V + i, x, std::fabs(x));
                            a.dv.add(((b * p.N + slot) * G + g) * V + i, y, std::fabs(y));
                        }
                    }
                    for (int64_t i = 0; i < V; i++) {
                        delta += a.out.value[row * V + i] * grad[i];
                        delta_size += a.out.size[row * V + i] * std::fabs(grad[i]);
                    }
                    if (p.sinks) {
                        const double share = std::exp(p.sinks[head] - lse);
                        a.dsinks.add(head, -share * delta, share * delta_size);
                    }
                    for (int64_t j = 0; j < N; j++) {
                        if (!seen[j]) continue;
                        const int64_t slot = problem.physical(m, j);
                        double x = 0, size = 0;
                        for (int64_t i = 0; i < V; i++) {
                            x += grad[i] * all_v[slot * V + i];
                            size += std::fabs(grad[i] * all_v[slot * V + i]);
                        }
                        double ds = weight[j] * (x * dropout[j] - delta), ds_size = weight[j] * (size * dropout[j] + delta_size);
                        for (size_t n = 0; n < problem.biases.size(); n++) {
                            const Bias &bias = problem.biases[n];
                            const int64_t at[] = {b, g, h, m, j};
                            int64_t i = 0;
                            for (int d = 0; d < 5; d++) i = i * bias.values.shape[d] + bias.index(d, at[d]);
                            a.dbiases[n].add(i, ds, ds_size);
                        }
                        const double far = std::fabs((double)distance[j]);
                        if (p.slopes) a.dslopes.add((p.slopes_by_batch ? b * G * H : 0) + head, -ds * far, ds_size * far);
                        if (p.table)
                            a.dtable.add(head * width + p.reach + std::max(-p.reach, std::min(p.reach, distance[j])), ds, ds_size);
                        // The softcap's slope is 1 − tanh², which errs by a rounding of 1.
                        ds_size *= p.softcap != 0 ? softcap_grad[j] + 1e-3 : 1;
                        ds *= softcap_grad[j];
                        for (int64_t i = 0; i < K; i++) {
                            const double key = all_k[slot * K + i] * p.scale, from = query[i] * p.scale;
                            a.dq.add(row * K + i, ds * key, ds_size * std::fabs(key));
                            a.dk.add(((b * p.N + slot) * G + g) * K + i, ds * from, ds_size * std::fabs(from));
                        }
                    }
                }
        }
    return a;
}

// ---- comparison ----------------------------------------------------------------------------------------------------

struct Workspace {
    char *start;
    explicit Workspace(int64_t size) {
        const size_t bytes = (size_t)std::max<int64_t>(size, 1);
        if (posix_memalign((void **)&start, 64, bytes)) abort();
        memset(start, 0xff, bytes);
    }
    ~Workspace() { free(start); }
};

// For a small problem the library uses its own workspace, and the first call computes it.
void run(int64_t (*pass)(const Params *), Params &p) {
    const int64_t size = pass(&p);
    if (!size) return;
    Workspace workspace(size);
    p.workspace = workspace.start;
    pass(&p);
    p.workspace = nullptr;
}

// The allowed error of an element is the size of its terms times a few roundings, of storage and of the scores.
void compare_elements(const char *name, const Result &want, const std::vector<double> &got, double stored, double computed) {
    for (size_t i = 0; i < want.value.size(); i++) {
        const double error = std::fabs(got[i] - want.value[i]);
        const double allowed = want.size[i] * (4 * stored + computed) + std::fabs(want.value[i]) * stored + 0x1p-22;
        if (got[i] == want.value[i] || error <= allowed) continue;
        char text[200];
        snprintf(text, sizeof text, "%s[%zu] is %.9g, want %.9g within %.3g", name, i, got[i], want.value[i], allowed);
        throw Failure{text};
    }
}

std::vector<double> doubles(int64_t dtype, const std::vector<char> &memory) {
    std::vector<double> x(memory.size() / (dtype == F32 ? 4 : 2));
    for (size_t i = 0; i < x.size(); i++) x[i] = read(dtype, memory.data(), (int64_t)i);
    return x;
}

// `from` is [chunks, …]: the sum over the first dimension and over those of size 1 in `shape`.
std::vector<double> reduced(const std::vector<float> &from, const std::vector<int64_t> &sizes, const std::vector<int64_t> &shape) {
    int64_t count = 1;
    for (const int64_t x : shape) count *= x;
    std::vector<double> to((size_t)count, 0);
    for (size_t i = 0; i < from.size(); i++) {
        int64_t rest = (int64_t)i, at = 0, stride = 1;
        for (size_t d = shape.size(); d-- > 0;) {
            const int64_t index = rest % sizes[d + 1];
            rest /= sizes[d + 1];
            if (shape[d] > 1) at += index * stride;
            stride *= shape[d];
        }
        to[at] += from[i];
    }
    return to;
}

void check(Problem &problem, const Answer &want, int64_t isa) {
    Params p = problem.p;
    p.isa = isa;
    const int64_t size = p.dtype == F32 ? 4 : 2, out_size = p.out_dtype == F32 ? 4 : 2;
    const double stored = std::max(EPSILON[p.dtype], EPSILON[p.out_dtype]);
    const double computed = EPSILON[F32] * (16 + std::sqrt((double)problem.keys)) * want.largest_score;

    std::vector<Dense> biases;
    for (Bias &bias : problem.biases) {
        Dense d{};
        d.data = bias.values.data();
        d.dtype = bias.values.dtype;
        for (int i = 0; i < 5; i++) d.stride[i] = bias.values.shape[i] > 1 ? bias.values.stride[i] : 0;
        biases.push_back(d);
    }
    p.biases = begin_of(biases);
    p.bias_count = (int64_t)biases.size();
    Dense mask{};
    if (!problem.mask.empty()) {
        mask.data = problem.mask.data();
        int64_t stride = 1;
        for (int d = 4; d >= 0; d--) {
            mask.stride[d] = problem.mask_shape[d] > 1 ? stride : 0;
            stride *= problem.mask_shape[d];
        }
        p.mask = &mask;
    }

    const auto compare = [&](const char *name, const Result &wanted, const std::vector<double> &got, double of_storage,
                             double of_scores) {
        if (problem.disjoint) compare_elements(name, wanted, got, of_storage, of_scores);
    };
    std::vector<char> out = blank(p.B * p.M * p.G * p.H * p.V * out_size);
    std::vector<float> lse((size_t)(p.B * p.G * p.H * p.M), NAN);
    p.out = out.data();
    p.lse = lse.data();
    run(keyspan_forward, p);
    compare("out", want.out, doubles(p.out_dtype, out), stored, computed);
    compare("lse", want.lse, std::vector<double>(lse.begin(), lse.end()), EPSILON[F32], computed);
    std::vector<char> alone = blank((int64_t)out.size());
    p.out = alone.data();
    p.lse = nullptr;
    run(keyspan_forward, p);
    if (alone != out) throw Failure{"out differs where no lse is asked for"};
    // Three times as calls of one program, whose threads stay awake between them.
    std::vector<char> results[3];
    Params calls[3];
    Call program[3];
    for (int i = 0; i < 3; i++) {
        results[i] = blank((int64_t)out.size());
        calls[i] = p;
        calls[i].out = results[i].data();
        program[i] = {ATTENTION, &calls[i]};
    }
    keyspan_run(program, 3, p.threads);
    for (const std::vector<char> &result : results)
        if (result != out) throw Failure{"out differs in a program"};
    p.out = out.data();
    p.lse = lse.data();

    if (p.stored) return;  // forward only

    // As in backends/native/__init__.py: shared bias gradients.
    for (const Bias &bias : problem.biases) {
        const auto &shape = bias.values.shape;
        if (!bias.wanted || shape[3] == 1 || shape[4] == 1) continue;
        p.fold_batch |= shape[0] < p.B;
        p.fold_groups |= shape[1] < p.G;
    }
    const bool paged = p.sequence != nullptr;
    const auto keys_of = [&](int64_t dims) {
        const int64_t count = p.B * p.N * p.G * dims;
        return paged ? std::vector<char>((size_t)count * 4, 0) : blank(count * size);
    };
    std::vector<char> dq = blank(p.B * p.M * p.G * p.H * p.K * size), dk = keys_of(p.K), dv = keys_of(p.V);
    const int64_t heads = p.B * p.G * p.H, width = 2 * p.reach + 1;
    std::vector<float> dslopes((size_t)heads, 0), dtable((size_t)(heads * width), 0), dsinks((size_t)heads, 0);
    if (problem.want_q) p.dq = begin_of(dq);
    if (problem.want_k) p.dk = begin_of(dk);
    if (problem.want_v) p.dv = begin_of(dv);
    if (problem.want_slopes) p.dslopes = dslopes.data();
    if (problem.want_table) p.dtable = dtable.data();
    if (problem.want_sinks) p.dsinks = dsinks.data();
    std::vector<std::vector<float>> dbiases(biases.size());
    std::vector<std::vector<int64_t>> sizes(biases.size());
    for (size_t i = 0; i < biases.size(); i++) {
        const auto &shape = problem.biases[i].values.shape;
        if (!problem.biases[i].wanted) continue;
        if (shape[3] == 1)
            sizes[i] = {p.B, p.G, p.H, 1, shape[4]};
        else if (shape[4] == 1)
            sizes[i] = {p.B, p.G, p.H, p.M, 1};
        else
            sizes[i] = {shape[0], shape[1], shape[2], p.M, shape[4]};
        int64_t stride = 1;
        for (int d = 4; d >= 0; d--) {
            biases[i].grad_stride[d] = sizes[i][d] > 1 ? stride : 0;
            stride *= sizes[i][d];
        }
        biases[i].columns = sizes[i][4];
        dbiases[i].assign((size_t)stride, 0);
        biases[i].grad = dbiases[i].data();
    }
    run(keyspan_backward, p);
    if (p.dq) compare("dq", want.dq, doubles(p.dtype, dq), stored, computed);
    if (p.dk) compare("dk", want.dk, doubles(paged ? F32 : p.dtype, dk), stored, computed);
    if (p.dv) compare("dv", want.dv, doubles(paged ? F32 : p.dtype, dv), stored, computed);
    const int64_t slope_batches = p.slopes_by_batch ? p.B : 1;
    if (p.dslopes)
        compare("dslopes", want.dslopes, reduced(dslopes, {1, p.B, p.G, p.H}, {slope_batches, p.G, p.H}), stored, computed);
    if (p.dtable)
        compare("dtable", want.dtable, reduced(dtable, {1, p.B, p.G, p.H, width}, {1, p.G, p.H, width}), stored, computed);
    if (p.dsinks) compare("dsinks", want.dsinks, reduced(dsinks, {1, p.B, p.G, p.H}, {1, p.G, p.H}), stored, computed);
    for (size_t i = 0; i < biases.size(); i++)
        if (biases[i].grad) {
            std::vector<int64_t> prefixed = sizes[i];
            prefixed.insert(prefixed.begin(), 1);
            compare("dbias", want.dbiases[i], reduced(dbiases[i], prefixed, problem.biases[i].values.shape), stored, computed);
        }
}

}  // namespace

int main(int count, char **words) {
    const long problems = count > 1 ? atol(words[1]) : 100;
    const unsigned long first = count > 2 ? strtoul(words[2], nullptr, 10) : 0;
    long checked = 0;
    for (unsigned long seed = first; seed < first + (unsigned long)problems; seed++) {
        Problem problem = make_problem(seed);
        // Printed before the run, so that it stands above a sanitizer's report.
        const Params &p = problem.p;
        fprintf(stderr, "\rseed %lu", seed);
        if (!check_layers(seed)) return 1;
        const Answer want = solve(problem);
        for (int64_t isa = 0; isa < ISAS; isa++) {
            if (!keyspan_supports(isa)) continue;
            try {
                check(problem, want, isa);
                checked++;
            } catch (const Failure &failure) {
                fprintf(stderr, "\nseed %lu on %s: %s\n", seed, ISA_NAMES[isa], failure.text.c_str());
                fprintf(stderr,
                        "threads %ld, dtype %ld, out %ld, B %ld, M %ld, N %ld, G %ld, H %ld, K %ld, V %ld, S %ld, RB %ld, "
                        "stored %ld, paged %d, mask %d, biases %ld, slopes %d, table %d, sinks %d, dropout %g, softcap %g, scale %g\n",
                        (long)p.threads, (long)p.dtype, (long)p.out_dtype, (long)p.B, (long)p.M, (long)p.N, (long)p.G,
                        (long)p.H, (long)p.K, (long)p.V, (long)p.S, (long)p.RB, (long)p.stored, p.sequence != nullptr,
                        !problem.mask.empty(), (long)problem.biases.size(), p.slopes != nullptr, p.table != nullptr,
                        p.sinks != nullptr, p.dropout_p, p.softcap, p.scale);
                return 1;
            }
        }
    }
    fprintf(stderr, "\r%ld problems from seed %lu on, %ld runs over all instruction sets: all right\n", problems, first, checked);
    return 0;
}
