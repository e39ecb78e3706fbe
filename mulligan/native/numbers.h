// Numbers of either precision, sixteen at a time, and what is computed of them in float32.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct bfloat16 {
    uint16_t bits;
};

inline float wide(float x) { return x; }
inline float wide(bfloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline void put(float &to, float x) { to = x; }
inline void put(bfloat16 &to, float x) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to.bits = static_cast<uint16_t>(x == x ? rounded : 0x7fc0);
}

// e^x to 2e-7, for x <= 0: 2^n by its bits, times a polynomial on [-ln 2 / 2, ln 2 / 2]. Loops of it become vectors.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;  // NaN stays
    const float n = std::nearbyint(x * 1.44269504f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}

// Sixteen numbers at a time, whatever the processor makes of them.
constexpr int64_t W = 16;
typedef float floats __attribute__((vector_size(4 * W)));
typedef uint32_t words __attribute__((vector_size(4 * W)));

template <typename V, typename T>
inline V load(const T *x) {
    V out;
    std::memcpy(&out, x, sizeof out);
    return out;
}

// Of two vectors those numbers change places whose place in the first has the bit S and in the second has not.
#define FOUR(AT, I) AT(I), AT((I) + 1), AT((I) + 2), AT((I) + 3)
#define PLACES(AT) FOUR(AT, 0), FOUR(AT, 4), FOUR(AT, 8), FOUR(AT, 12)
#define LOW(I) (((I) & S) ? (I) - S + W : (I))
#define HIGH(I) (((I) & S) ? (I) + W : (I) + S)
template <int S>
inline void change(floats &a, floats &b) {
    const floats low = __builtin_shufflevector(a, b, PLACES(LOW)), high = __builtin_shufflevector(a, b, PLACES(HIGH));
    a = low, b = high;
}
#undef FOUR
#undef PLACES
#undef LOW
#undef HIGH

}  // namespace
