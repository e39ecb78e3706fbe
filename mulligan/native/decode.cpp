// One decoding step of a decoder layer between its matrix products, for the CPU.
//
// A step of a small model is some forty operations on a few numbers a row; here it is three calls. Everything is computed
// in float32, whatever the rows are kept in. A row's numbers depend on nothing but the row: neither on the rows beside
// it nor on the number of threads.
#include "numbers.h"

#include <algorithm>
#include <vector>

namespace {

template <typename T>
inline float scale_of(const T *x, int64_t size, float eps) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) sum += wide(x[i]) * wide(x[i]);
    return 1.0f / std::sqrt(sum / size + eps);
}

// A head of queries or keys: its RMS norm, where there is one, and its rotation (RoPE).
template <typename T>
inline void turn(const T *x, const T *weight, const T *cos, const T *sin, float eps, int64_t size, float *out) {
    const float scale = weight ? scale_of(x, size, eps) : 1.0f;
    const int64_t half = size / 2;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
        float a = wide(x[i]) * scale, b = wide(x[half + i]) * scale;
        if (weight) a *= wide(weight[i]), b *= wide(weight[half + i]);
        out[i] = a * wide(cos[i]) - b * wide(sin[i]);
        out[half + i] = b * wide(cos[half + i]) + a * wide(sin[half + i]);
    }
}

constexpr int64_t ALONE = 1 << 15;  // numbers that a second thread is not worth waking for

// 32 numbers of a head: in float32 its halves, in bfloat16 (two of which lie in a word) those at even and at odd places.
struct Pair {
    floats a, b;
};
inline Pair both(const float *x) { return {load<floats>(x), load<floats>(x + W)}; }
inline Pair both(const bfloat16 *x) {
    const words bits = load<words>(x), even = bits << 16, odd = bits & 0xffff0000u;
    return {load<floats>(&even), load<floats>(&odd)};
}
// The same places of float32 numbers, and back.
inline Pair split(const float *x, const float *) { return both(x); }
inline Pair split(const float *x, const bfloat16 *) {
    const auto [a, b] = both(x);
    return {__builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
            __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)};
}
inline Pair join(Pair x, const float *) { return x; }
inline Pair join(Pair x, const bfloat16 *) {
    return {__builtin_shufflevector(x.a, x.b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
            __builtin_shufflevector(x.a, x.b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)};
}

// Sums of neighbours, then of neighbours' sums: of sixteen vectors one, whose i-th number is the sum of the i-th vector.
template <int S>
inline floats sums(floats a, floats b) {
    change<S>(a, b);
    return a + b;
}

template <typename T>
struct Columns {  // one head's keys or values, one column after the other
    const T *first;
    int64_t count;
};

// N: pairs of vectors of a head; 0: a head that is no whole number of them.
template <int N, typename T>
inline void score(const float *q, Columns<T> keys, int64_t d, float *out) {
    if constexpr (N > 0) {
        Pair query[N];
        for (int n = 0; n < N; ++n) query[n] = split(q + 2 * n * W, keys.first);
        const auto one = [&](int64_t t) __attribute__((always_inline)) {
            // Behind the last column comes the last one again, of which nothing is kept.
            const T *key = keys.first + std::min(t, keys.count - 1) * 2 * N * W;
            floats sum{};
            for (int n = 0; n < N; ++n) {
                const auto [a, b] = both(key + 2 * n * W);
                sum += query[n].a * a + query[n].b * b;
            }
            return sum;
        };
        const auto four = [&](int64_t t) __attribute__((always_inline)) {
            return sums<2>(sums<1>(one(t), one(t + 1)), sums<1>(one(t + 2), one(t + 3)));
        };
        for (int64_t t = 0; t < keys.count; t += W) {
            const floats all = sums<8>(sums<4>(four(t), four(t + 4)), sums<4>(four(t + 8), four(t + 12)));
            std::memcpy(out + t, &all, sizeof all);
        }
        return;
    }
    for (int64_t t = 0; t < keys.count; ++t) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < d; ++i) sum += q[i] * wide(keys.first[t * d + i]);
        out[t] = sum;
    }
}

template <int N, typename T>
inline void gather(const float *weight, Columns<T> values, int64_t d, float *out) {
    int64_t t = 0;
    if constexpr (N > 0) {
        constexpr int U = N <= 2 ? 2 : 1;  // sums side by side, since one waits for itself
        Pair sum[U][N] = {};
        for (; t + U <= values.count; t += U)
            for (int u = 0; u < U; ++u)
                for (int n = 0; n < N; ++n) {
                    const auto [a, b] = both(values.first + ((t + u) * N + n) * 2 * W);
                    sum[u][n].a += weight[t + u] * a;
                    sum[u][n].b += weight[t + u] * b;
                }
        for (int u = 0; u < U; ++u)
            for (int n = 0; n < N; ++n) {
                const auto [a, b] = join(sum[u][n], values.first);
                for (int i = 0; i < W; ++i) out[2 * n * W + i] += a[i], out[(2 * n + 1) * W + i] += b[i];
            }
    }
    for (; t < values.count; ++t) {
        const float w = weight[t];
#pragma omp simd
        for (int64_t i = 0; i < d; ++i) out[i] += w * wide(values.first[t * d + i]);
    }
}

struct Step {  // what attend() is given beside its arrays; as in decode.py
    int64_t threads;
    int64_t rows, heads, shared, size;  // shared: key and value heads
    int64_t q_stride, k_stride, v_stride;  // between rows
    int64_t table_stride;
    int64_t row_stride, head_stride;  // of the cache
    int64_t prompt_row_stride, prompt_head_stride;
    int64_t prompt_first, prompt_end;  // columns
    int64_t first, column;  // of the cache: the first in use, and where the new token goes
    float eps, scale;
};

template <int N, typename T>
void attend(const Step &s, const T *q, const T *k, const T *v, const T *q_norm, const T *k_norm, const T *cos,
            const T *sin, T *keys, T *values, const T *prompt_keys, const T *prompt_values, const int64_t *order,
            const int64_t *prompt, const int64_t *prompt_pads, const int64_t *pads, T *out) {
    const int64_t d = N ? 2 * N * W : s.size, groups = s.heads / s.shared;
#pragma omp parallel num_threads(s.threads)
    {
        std::vector<float> weights(s.prompt_end - s.prompt_first + s.column - s.first + 1 + W + 3 * d);
        float *query = weights.data(), *sum = query + d, *fresh = sum + d, *w = fresh + d;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < s.rows * s.shared; ++task) {
            // Rows of one prompt one after the other, so that its keys stay in the cache of the processor.
            const int64_t head = task % s.shared, row = order[task / s.shared], above = prompt[row];
            const int64_t at = row * s.row_stride + head * s.head_stride;
            const T *c = cos + row * s.table_stride, *z = sin + row * s.table_stride;
            turn(k + row * s.k_stride + head * d, k_norm, c, z, s.eps, d, fresh);
            for (int64_t i = 0; i < d; ++i) put(keys[at + s.column * d + i], fresh[i]);
            std::memcpy(values + at + s.column * d, v + row * s.v_stride + head * d, d * sizeof(T));
            const int64_t from = above * s.prompt_row_stride + head * s.prompt_head_stride;
            const int64_t begin = s.prompt_first + prompt_pads[above], own = s.first + pads[row];
            if (task + 1 < s.rows * s.shared) {
                // The next task's columns come from memory while this one computes.
                const int64_t next = order[(task + 1) / s.shared];
                const int64_t there = next * s.row_stride + (task + 1) % s.shared * s.head_stride;
                for (int64_t i = (s.first + pads[next]) * d; i < s.column * d; i += 64 / sizeof(T)) {
                    __builtin_prefetch(keys + there + i, 0, 2);
                    __builtin_prefetch(values + there + i, 0, 2);
                }
            }
            const Columns<T> their{prompt_keys + from + begin * d, s.prompt_end - begin};
            const Columns<T> mine{keys + at + own * d, s.column + 1 - own};
            const int64_t count = their.count + mine.count;
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t h = head * groups + g;
                turn(q + row * s.q_stride + h * d, q_norm, c, z, s.eps, d, query);
                for (int64_t i = 0; i < d; ++i) query[i] *= s.scale;
                score<N>(query, their, d, w);
                score<N>(query, mine, d, w + their.count);
                float top = w[0];
#pragma omp simd reduction(max : top)
                for (int64_t t = 0; t < count; ++t) top = w[t] > top ? w[t] : top;
                float total = 0;
#pragma omp simd reduction(+ : total)
                for (int64_t t = 0; t < count; ++t) {
                    w[t] = exponential(w[t] - top);
                    total += w[t];
                }
                std::fill(sum, sum + d, 0.0f);
                gather<N>(w, Columns<T>{prompt_values + from + begin * d, their.count}, d, sum);
                gather<N>(w + their.count, Columns<T>{values + at + own * d, mine.count}, d, sum);
                T *to = out + (row * s.heads + h) * d;
                for (int64_t i = 0; i < d; ++i) put(to[i], sum[i] / total);
            }
        }
    }
}

// x + h, or x + norm(h), where there is an h; and the norm of that, where there is a weight.
template <typename T>
void add_norm(int64_t threads, int64_t rows, int64_t size, float eps, const T *x, const T *h, const T *h_weight,
              const T *weight, T *sum, T *out) {
#pragma omp parallel for schedule(static) num_threads(rows * size < ALONE ? 1 : threads)
    for (int64_t row = 0; row < rows; ++row) {
        const T *a = x + row * size;
        if (h) {
            const T *b = h + row * size;
            T *to = sum + row * size;
            const float scale = h_weight ? scale_of(b, size, eps) : 1.0f;
#pragma omp simd
            for (int64_t i = 0; i < size; ++i)
                put(to[i], wide(a[i]) + wide(b[i]) * (h_weight ? scale * wide(h_weight[i]) : 1.0f));
            a = to;
        }
        if (weight) {
            const float scale = scale_of(a, size, eps);
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) put(out[row * size + i], wide(a[i]) * scale * wide(weight[i]));
        }
    }
}

template <typename T>
void gated(int64_t threads, int64_t count, const T *gate, const T *up, T *out) {  // silu(gate) * up
#pragma omp parallel for simd schedule(static) num_threads(count < ALONE ? 1 : threads)
    for (int64_t i = 0; i < count; ++i) {
        const float g = wide(gate[i]), e = exponential(-std::fabs(g));
        put(out[i], g * (g < 0 ? e : 1.0f) / (1.0f + e) * wide(up[i]));
    }
}

}  // namespace

#define KERNELS(NAME, T)                                                                                              \
    extern "C" void attend_##NAME(const Step *s, const T *q, const T *k, const T *v, const T *q_norm,                  \
                                  const T *k_norm, const T *cos, const T *sin, T *keys, T *values,                     \
                                  const T *prompt_keys, const T *prompt_values, const int64_t *order,                  \
                                  const int64_t *prompt, const int64_t *prompt_pads, const int64_t *pads, T *out) {    \
        auto run = s->size == 32    ? attend<1, T>                                                                     \
                   : s->size == 64  ? attend<2, T>                                                                     \
                   : s->size == 96  ? attend<3, T>                                                                     \
                   : s->size == 128 ? attend<4, T>                                                                     \
                                    : attend<0, T>;                                                                    \
        run(*s, q, k, v, q_norm, k_norm, cos, sin, keys, values, prompt_keys, prompt_values, order, prompt,            \
            prompt_pads, pads, out);                                                                                   \
    }                                                                                                                  \
    extern "C" void add_norm_##NAME(int64_t threads, int64_t rows, int64_t size, float eps, const T *x, const T *h,    \
                                    const T *h_weight, const T *weight, T *sum, T *out) {                              \
        add_norm(threads, rows, size, eps, x, h, h_weight, weight, sum, out);                                          \
    }                                                                                                                  \
    extern "C" void gated_##NAME(int64_t threads, int64_t count, const T *gate, const T *up, T *out) {                 \
        gated(threads, count, gate, up, out);                                                                          \
    }

KERNELS(float32, float)
KERNELS(bfloat16, bfloat16)
