// The compiler's own vectors (GCC, Clang), as wide as the target's.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
// GCC has _Float16 for ARM in C++ from 13 on
#if defined(__AVX512FP16__) || \
    (defined(__ARM_FEATURE_FP16_VECTOR_ARITHMETIC) && (defined(__clang__) || __GNUC__ >= 13))
#define HALF 1
#else
#define HALF 0
#endif
#define FORCED __attribute__((always_inline))

namespace {

// A tile of outputs and what it is made from stay in registers: 32 of them, or 16
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int TILE_H = 4, TILE_W = 4, PAIR = 2;
#else
constexpr int TILE_H = 2, TILE_W = 4, PAIR = 1;
#endif

template <class T>
struct Types {
    static constexpr int lanes = VECTOR_BYTES / sizeof(T);
    typedef T V __attribute__((vector_size(VECTOR_BYTES), may_alias));
    typedef T Loose __attribute__((vector_size(VECTOR_BYTES), may_alias, aligned(sizeof(T))));
    typedef int32_t Words __attribute__((vector_size(VECTOR_BYTES), may_alias));
};
#define USE_TYPES                                    \
    using V [[maybe_unused]] = typename Types<T>::V; \
    constexpr int LANES [[maybe_unused]] = Types<T>::lanes

template <int N, class Body>
FORCED inline void repeat(Body&& body) {
    [&]<int... I>(std::integer_sequence<int, I...>) FORCED {
        (body(std::integral_constant<int, I>{}), ...);
    }(std::make_integer_sequence<int, N>{});
}

// A weight is a 32-bit word (a float, or the same half twice): what every target broadcasts fastest
template <class T>
FORCED inline typename Types<T>::V broadcast(const int32_t* word) {
    return (typename Types<T>::V)(typename Types<T>::Words{} + *word);
}

template <class T>
FORCED inline typename Types<T>::V splat(T value) {
    int32_t word;
    if constexpr (sizeof(T) == 4) {
        std::memcpy(&word, &value, 4);
    } else {
        uint16_t half;
        std::memcpy(&half, &value, 2);
        word = int32_t(half * 0x10001u);
    }
    return broadcast<T>(&word);
}

template <class V>
FORCED inline V rectified(V x) {
    return x < V{} ? V{} : x;  // NaN stays
}

template <class V>
FORCED inline V larger(V a, V b) {
    return a < b ? b : a;
}

}  // namespace
