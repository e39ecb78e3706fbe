// Attention over trees of tokens, forward and backward, for the CPU (mulligan/models/attention.py says what it is of).
//
// A node's queries lie side by side in the vectors, sixteen to each, so that a softmax runs down the keys without a sum
// across a vector, and every product is one kind of small matrix product. Everything is computed in float32.
#include "numbers.h"

#include <algorithm>
#include <vector>

namespace {

constexpr int64_t Q = 64;  // queries of a block
constexpr float NEVER = -1e30f;

// C (+)= A B for M x K numbers A[i * a_i + k * a_k], taken one by one, and rows of V vectors of B and C.
template <int V, int R, bool ADD>
inline void tile(int64_t K, const float *A, int64_t a_i, int64_t a_k, const float *B, int64_t ldb, float *C,
                 int64_t ldc) {
    floats sum[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sum[r][v] = ADD ? load<floats>(C + r * ldc + v * W) : floats{};
    for (int64_t k = 0; k < K; ++k) {
        floats b[V];
        for (int v = 0; v < V; ++v) b[v] = load<floats>(B + k * ldb + v * W);
        for (int r = 0; r < R; ++r) {
            const float a = A[r * a_i + k * a_k];
            for (int v = 0; v < V; ++v) sum[r][v] += a * b[v];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) std::memcpy(C + r * ldc + v * W, &sum[r][v], sizeof(floats));
}

template <int V, bool ADD>
void strip(int64_t M, int64_t K, const float *A, int64_t a_i, int64_t a_k, const float *B, int64_t ldb, float *C,
           int64_t ldc) {
    constexpr int R = V >= 3 ? 4 : 8;  // sums that fit the registers, and enough of them not to wait for one another
    int64_t i = 0;
    for (; i + R <= M; i += R) tile<V, R, ADD>(K, A + i * a_i, a_i, a_k, B, ldb, C + i * ldc, ldc);
    for (; i < M; ++i) tile<V, 1, ADD>(K, A + i * a_i, a_i, a_k, B, ldb, C + i * ldc, ldc);
}

template <bool ADD>
void product(int64_t M, int64_t K, int64_t vectors, const float *A, int64_t a_i, int64_t a_k, const float *B,
             int64_t ldb, float *C, int64_t ldc) {
    for (int64_t v = 0; v < vectors; v += 4) {
        auto run = vectors - v >= 4   ? strip<4, ADD>
                   : vectors - v == 3 ? strip<3, ADD>
                   : vectors - v == 2 ? strip<2, ADD>
                                      : strip<1, ADD>;
        run(M, K, A, a_i, a_k, B + v * W, ldb, C + v * W, ldc);
    }
}

template <int S>
inline void change_places(floats *r) {
    for (int i = 0; i < W; ++i)
        if (!(i & S)) change<S>(r[i], r[i + S]);
}
inline void transpose(const float *from, int64_t ld_from, float *to, int64_t ld_to) {  // 16 x 16
    floats r[W];
    for (int i = 0; i < W; ++i) r[i] = load<floats>(from + i * ld_from);
    change_places<8>(r), change_places<4>(r), change_places<2>(r), change_places<1>(r);
    for (int i = 0; i < W; ++i) std::memcpy(to + i * ld_to, &r[i], sizeof(floats));
}

template <typename T>
struct Heads {  // [heads, tokens, head_dim], with the numbers of a head side by side; as in trees.py
    T *first;
    int64_t head, token;  // strides
    T *at(int64_t h, int64_t t) const { return first + h * head + t * token; }
};

struct Trees {  // as in trees.py
    int64_t threads, heads, shared, size, nodes, trees, longest;
    float scale;
};

struct Layout {
    const int64_t *node;  // [nodes, 2]: its tokens, start and end
    const int64_t *above;  // [nodes + 1]: which of the ancestors are its own
    const int64_t *ancestors;  // [.., 2]: their tokens, start and end
    const int64_t *tree;  // [trees + 1]: which of the nodes are its own
    int64_t path(int64_t i) const {
        int64_t sum = 0;
        for (int64_t a = above[i]; a < above[i + 1]; ++a) sum += ancestors[2 * a + 1] - ancestors[2 * a];
        return sum;
    }
    // For each token of a node's path and of the node itself: its place there and in the sequence.
    template <typename F>
    void each(int64_t i, F call) const {
        int64_t at = 0;
        for (int64_t a = above[i]; a < above[i + 1]; ++a)
            for (int64_t t = ancestors[2 * a]; t < ancestors[2 * a + 1]; ++t) call(at++, t);
        for (int64_t t = node[2 * i]; t < node[2 * i + 1]; ++t) call(at++, t);
    }
};

// Memory of one thread.
struct Room {
    int64_t d, wide;  // of a head, and rounded up to whole vectors
    std::vector<float> numbers;
    float *keys, *values, *by_keys, *by_values;  // [longest, wide]
    float *scores, *slopes;  // [longest, Q]
    float *q, *grad, *sum;  // transposed: [wide, Q]
    float *q_rows, *grad_rows;  // [Q, wide]
    float top[Q], total[Q], delta[Q];
    Room(const Trees &s, bool backward) : d(s.size), wide((s.size + W - 1) / W * W) {
        const int64_t rows = s.longest * wide, block = s.longest * Q, turned = wide * Q;
        numbers.assign((backward ? 4 * rows + 2 * block + 5 * turned : 2 * rows + block + 3 * turned) + W, 0.0f);
        float *next = numbers.data();
        const auto take = [&](int64_t count) {
            float *out = next;
            next += count;
            return out;
        };
        keys = take(rows), values = take(rows), scores = take(block), q = take(turned), sum = take(turned);
        q_rows = take(turned);
        if (backward) {
            by_keys = take(rows), by_values = take(rows), slopes = take(block);
            grad = take(turned), grad_rows = take(turned);
        }
    }
    template <typename T>
    void copy(const T *from, float scale, float *to) const {
#pragma omp simd
        for (int64_t j = 0; j < d; ++j) to[j] = ::wide(from[j]) * scale;
    }
    // Rows [n, wide] to columns [wide, Q], zeros where there is no row; and back.
    void to_columns(float *rows, int64_t n, float *columns) const {
        const int64_t full = (n + W - 1) / W * W;
        std::fill(rows + n * wide, rows + full * wide, 0.0f);
        for (int64_t c = 0; c < full; c += W)
            for (int64_t j = 0; j < wide; j += W) transpose(rows + c * wide + j, wide, columns + j * Q + c, Q);
    }
    void to_rows(const float *columns, int64_t n, float *rows) const {
        for (int64_t c = 0; c < n; c += W)
            for (int64_t j = 0; j < wide; j += W) transpose(columns + j * Q + c, Q, rows + c * wide + j, wide);
    }
};

// A block of a node's queries: its n queries from the q0-th on, and the keys that they see: all of the path, and of the
// node those up to themselves.
struct Block {
    int64_t path, q0, n, vectors;
    Block(int64_t path, int64_t q0, int64_t length)
        : path(path), q0(q0), n(std::min(Q, length - q0)), vectors((n + W - 1) / W) {}
    // Stretches of keys, the number of them and the first vector in which a query sees one.
    template <typename F>
    void each(F call) const {
        const int64_t seen = path + q0;  // by every query
        if (seen) call(0, seen, 0);
        for (int64_t b = 0; b < vectors; ++b) call(seen + b * W, std::min(W, n - b * W), b);
    }
    // Queries of the vectors from v on that do not see the key, which are the first of these.
    int64_t hidden(int64_t key, int64_t v) const { return std::max<int64_t>(key - path - q0 - v * W, 0); }

    // [keys, Q] = A [keys, D] B [D, Q]
    void score(const float *A, const float *B, int64_t D, float *out) const {
        each([&](int64_t t, int64_t rows, int64_t v) {
            product<false>(rows, D, vectors - v, A + t * D, D, 1, B + v * W, Q, out + t * Q + v * W, Q);
        });
    }
    // [D, Q] = A^T [D, keys] B [keys, Q]
    void gather(const float *A, const float *B, int64_t D, float *out) const {
        std::fill(out, out + D * Q, 0.0f);
        each([&](int64_t t, int64_t rows, int64_t v) {
            product<true>(D, rows, vectors - v, A + t * D, 1, D, B + t * Q + v * W, Q, out + v * W, Q);
        });
    }
    // [keys, D] += A [keys, Q] B [Q, D]
    void scatter(const float *A, const float *B, int64_t D, float *out) const {
        each([&](int64_t t, int64_t rows, int64_t v) {
            product<true>(rows, n - v * W, D / W, A + t * Q + v * W, Q, 1, B + v * W * D, D, out + t * D, D);
        });
    }
    // scores = e^(scores - top), and 0 where a query does not see the key
    void soften(float *scores, const float *top) const {
        each([&](int64_t first, int64_t rows, int64_t v) {
            for (int64_t t = first; t < first + rows; ++t) {
                float *row = scores + t * Q;
#pragma omp simd
                for (int64_t c = v * W; c < vectors * W; ++c) row[c] = exponential(row[c] - top[c]);
                std::fill(row + v * W, row + v * W + hidden(t, v), 0.0f);
            }
        });
    }
};

template <typename T>
void forward(const Trees &s, const Layout &layout, Heads<const T> q, Heads<const T> k, Heads<const T> v, Heads<T> out,
             float *norm, int64_t tokens) {
    const int64_t groups = s.heads / s.shared;
#pragma omp parallel num_threads(s.threads)
    {
        Room room(s, false);
        const int64_t D = room.wide;
#pragma omp for schedule(dynamic, 4)
        for (int64_t task = 0; task < s.nodes * s.shared; ++task) {
            const int64_t i = task / s.shared, head = task % s.shared, path = layout.path(i);
            const int64_t start = layout.node[2 * i], length = layout.node[2 * i + 1] - start;
            layout.each(i, [&](int64_t at, int64_t t) {
                room.copy(k.at(head, t), 1.0f, room.keys + at * D);
                room.copy(v.at(head, t), 1.0f, room.values + at * D);
            });
            for (int64_t h = head * groups; h < (head + 1) * groups; ++h)
                for (int64_t q0 = 0; q0 < length; q0 += Q) {
                    const Block block(path, q0, length);
                    const int64_t lanes = block.vectors * W;
                    for (int64_t c = 0; c < block.n; ++c)
                        room.copy(q.at(h, start + q0 + c), s.scale, room.q_rows + c * D);
                    room.to_columns(room.q_rows, block.n, room.q);
                    block.score(room.keys, room.q, D, room.scores);
                    std::fill(room.top, room.top + lanes, NEVER);
                    block.each([&](int64_t first, int64_t rows, int64_t v) {
                        for (int64_t t = first; t < first + rows; ++t) {
                            float *row = room.scores + t * Q;
                            std::fill(row + v * W, row + v * W + block.hidden(t, v), NEVER);
#pragma omp simd
                            for (int64_t c = v * W; c < lanes; ++c)
                                room.top[c] = row[c] > room.top[c] ? row[c] : room.top[c];
                        }
                    });
                    block.soften(room.scores, room.top);
                    std::fill(room.total, room.total + lanes, 0.0f);
                    block.each([&](int64_t first, int64_t rows, int64_t v) {
                        for (int64_t t = first; t < first + rows; ++t) {
#pragma omp simd
                            for (int64_t c = v * W; c < lanes; ++c) room.total[c] += room.scores[t * Q + c];
                        }
                    });
                    block.gather(room.values, room.scores, D, room.sum);
                    room.to_rows(room.sum, block.n, room.q_rows);
                    for (int64_t c = 0; c < block.n; ++c) {
                        T *to = out.at(h, start + q0 + c);
                        const float share = 1.0f / room.total[c];
#pragma omp simd
                        for (int64_t j = 0; j < room.d; ++j) put(to[j], room.q_rows[c * D + j] * share);
                        norm[h * tokens + start + q0 + c] = room.top[c] + std::log(room.total[c]);
                    }
                }
        }
    }
}

template <typename T>
void backward(const Trees &s, const Layout &layout, Heads<const T> q, Heads<const T> k, Heads<const T> v,
              Heads<const T> out, Heads<const T> grad, const float *norm, Heads<T> by_q, Heads<float> by_k,
              Heads<float> by_v, int64_t tokens) {
    const int64_t groups = s.heads / s.shared;
#pragma omp parallel num_threads(s.threads)
    {
        Room room(s, true);
        const int64_t D = room.wide;
        // The keys of one tree and one head are nobody else's.
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < s.trees * s.shared; ++task) {
            const int64_t head = task % s.shared, tree = task / s.shared;
            for (int64_t i = layout.tree[tree]; i < layout.tree[tree + 1]; ++i) {
                const int64_t start = layout.node[2 * i], length = layout.node[2 * i + 1] - start;
                const int64_t path = layout.path(i);
                layout.each(i, [&](int64_t at, int64_t t) {
                    room.copy(k.at(head, t), 1.0f, room.keys + at * D);
                    room.copy(v.at(head, t), 1.0f, room.values + at * D);
                });
                std::fill(room.by_keys, room.by_keys + (path + length) * D, 0.0f);
                std::fill(room.by_values, room.by_values + (path + length) * D, 0.0f);
                for (int64_t h = head * groups; h < (head + 1) * groups; ++h)
                    for (int64_t q0 = 0; q0 < length; q0 += Q) {
                        const Block block(path, q0, length);
                        const int64_t lanes = block.vectors * W;
                        std::fill(room.delta, room.delta + lanes, 0.0f);
                        std::fill(room.top, room.top + lanes, 0.0f);
                        for (int64_t c = 0; c < block.n; ++c) {
                            const int64_t t = start + q0 + c;
                            const T *a = grad.at(h, t), *b = out.at(h, t);
                            room.copy(q.at(h, t), s.scale, room.q_rows + c * D);
                            room.copy(a, 1.0f, room.grad_rows + c * D);
                            float sum = 0;
#pragma omp simd reduction(+ : sum)
                            for (int64_t j = 0; j < room.d; ++j) sum += wide(a[j]) * wide(b[j]);
                            room.delta[c] = sum;
                            room.top[c] = norm[h * tokens + t];
                        }
                        room.to_columns(room.q_rows, block.n, room.q);
                        room.to_columns(room.grad_rows, block.n, room.grad);
                        block.score(room.keys, room.q, D, room.scores);
                        block.soften(room.scores, room.top);
                        block.scatter(room.scores, room.grad_rows, D, room.by_values);
                        block.score(room.values, room.grad, D, room.slopes);
                        block.each([&](int64_t first, int64_t rows, int64_t v) {
                            for (int64_t t = first; t < first + rows; ++t) {
                                float *to = room.slopes + t * Q;
                                const float *weight = room.scores + t * Q;
#pragma omp simd
                                for (int64_t c = v * W; c < lanes; ++c) to[c] = (to[c] - room.delta[c]) * weight[c];
                            }
                        });
                        block.scatter(room.slopes, room.q_rows, D, room.by_keys);
                        block.gather(room.keys, room.slopes, D, room.sum);
                        room.to_rows(room.sum, block.n, room.q_rows);
                        for (int64_t c = 0; c < block.n; ++c) {
                            T *to = by_q.at(h, start + q0 + c);
#pragma omp simd
                            for (int64_t j = 0; j < room.d; ++j) put(to[j], room.q_rows[c * D + j] * s.scale);
                        }
                    }
                layout.each(i, [&](int64_t at, int64_t t) {
                    float *a = by_k.at(head, t), *b = by_v.at(head, t);
#pragma omp simd
                    for (int64_t j = 0; j < room.d; ++j) {
                        a[j] += room.by_keys[at * D + j];
                        b[j] += room.by_values[at * D + j];
                    }
                });
            }
        }
    }
}

}  // namespace

#define KERNELS(NAME, T)                                                                                              \
    extern "C" void tree_forward_##NAME(const Trees *s, const Layout *layout, const Heads<const T> *q,                 \
                                        const Heads<const T> *k, const Heads<const T> *v, const Heads<T> *out,         \
                                        float *norm, int64_t tokens) {                                                 \
        forward<T>(*s, *layout, *q, *k, *v, *out, norm, tokens);                                                       \
    }                                                                                                                  \
    extern "C" void tree_backward_##NAME(const Trees *s, const Layout *layout, const Heads<const T> *q,                \
                                         const Heads<const T> *k, const Heads<const T> *v, const Heads<const T> *out,  \
                                         const Heads<const T> *grad, const float *norm, const Heads<T> *by_q,          \
                                         const Heads<float> *by_k, const Heads<float> *by_v, int64_t tokens) {         \
        backward<T>(*s, *layout, *q, *k, *v, *out, *grad, norm, *by_q, *by_k, *by_v, tokens);                          \
    }

KERNELS(float32, float)
KERNELS(bfloat16, bfloat16)
