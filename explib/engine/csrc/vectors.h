// The compiler's own vectors (GCC, Clang), as wide as the target's. Only for the product of pairs of
// bfloat16, which it has no word for, each target's intrinsics.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)
#define REGISTER_BYTES 64
#elif defined(__AVX__)
#define REGISTER_BYTES 32
#else
#define REGISTER_BYTES 16
#endif
// Given as a flag beside -msse4.2: what wider vectors compute, where no processor has them
#if !defined(VECTOR_BYTES)
#define VECTOR_BYTES REGISTER_BYTES
#endif
// GCC has _Float16 for ARM in C++ from 13 on
#if defined(__AVX512FP16__) || \
    (defined(__ARM_FEATURE_FP16_VECTOR_ARITHMETIC) && (defined(__clang__) || __GNUC__ >= 13))
#define HALF 1
#else
#define HALF 0
#endif
#if defined(__AVX512BF16__)
#include <immintrin.h>
#define BRAIN 1
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define BRAIN 1
#else
#define BRAIN 0
#endif
#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif
#define FORCED __attribute__((always_inline))
#define SHUFFLES 0
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#undef SHUFFLES
#define SHUFFLES 1
#endif
#endif

namespace {

// A tile of outputs, or BESIDE vectors of them with nine neighbours each, stay in registers: 32 of
// them, or 16
#if VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int TILE_H = 4, TILE_W = 4, BESIDE = 3;
#else
constexpr int TILE_H = 2, TILE_W = 4, BESIDE = 1;
#endif

constexpr int PREFETCH = 1024;  // bytes of weights ahead, which are used once and in order

template <class T>
struct Types {
    using Scalar = T;  // of sums, and of what is computed outside of convs
    static constexpr int lanes = VECTOR_BYTES / sizeof(T);
    typedef T V __attribute__((vector_size(VECTOR_BYTES), may_alias));
    typedef T Loose __attribute__((vector_size(VECTOR_BYTES), may_alias, aligned(sizeof(T))));
    typedef int32_t Words __attribute__((vector_size(VECTOR_BYTES), may_alias));
};
// a bfloat16 in memory: the upper half of a float
struct Brain {
    uint16_t bits;
    Brain() = default;
    explicit Brain(float value) {  // to the nearest, ties to even; NaN stays NaN
        uint32_t wide;
        std::memcpy(&wide, &value, 4);
        const uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
        bits = uint16_t(value == value ? rounded : 0x7fc0);
    }
    explicit operator float() const {
        const uint32_t wide = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &wide, 4);
        return value;
    }
};
template <>
struct Types<Brain> : Types<float> {};

// a code of int8 in memory
struct Byte {
    uint8_t bits;
    Byte() = default;
    explicit Byte(float value) {  // to the nearest, ties to even; NaN is 255
        value = value < 255 ? (value > 0 ? value : 0.f) : 255.f;
        constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: the unit of such floats is 1
        const float rounded = value + ROUND;
        uint32_t word;
        std::memcpy(&word, &rounded, 4);
        bits = uint8_t(word);
    }
    explicit operator float() const { return bits; }
};
template <>
struct Types<Byte> : Types<float> {};

template <int N>
using Int = std::integral_constant<int, N>;

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

// What was loaded is kept in a register: the compiler neither loads it again for each product nor
// computes with it elsewhere
template <class V>
FORCED inline void keep([[maybe_unused]] V& value) {
#if defined(__aarch64__)
    asm("" : "+w"(value));
#elif defined(__SSE2__)
    if constexpr (sizeof(V) <= REGISTER_BYTES) asm("" : "+v"(value));
#endif
}

template <class T>
FORCED inline typename Types<T>::V load(const T* at) {
    return *(const typename Types<T>::V*)at;
}

template <class T>
FORCED inline void store(T* at, typename Types<T>::V value) {
    *(typename Types<T>::V*)at = value;
}

// `count` of a vector's numbers, from lane `from` on, to where the whole vector would begin at `to`
template <class T>
FORCED inline void store_lanes(T* to, typename Types<T>::V value, int from, int count) {
    USE_TYPES;
    if (count >= LANES) {
        *(typename Types<T>::Loose*)to = value;
        return;
    }
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
        return _mm512_mask_storeu_ps(to, ((1 << count) - 1) << from, (__m512)value);
#endif
#if defined(__AVX512BW__)
    if constexpr (sizeof(T) == 2)
        return _mm512_mask_storeu_epi16(to, ((1u << count) - 1) << from, (__m512i)value);
    if constexpr (sizeof(T) == 1)
        return _mm512_mask_storeu_epi8(to, ((1ull << count) - 1) << from, (__m512i)value);
#endif
    const T* numbers = (const T*)&value + from;
    for (to += from; count >= 4; count -= 4, numbers += 4, to += 4)
        std::memcpy(to, numbers, 4 * sizeof(T));
    for (int i = 0; i < count; ++i) to[i] = numbers[i];
}

template <>
FORCED inline Types<float>::V load(const Byte* at) {
    using V = Types<float>::V;
#if defined(__AVX512F__)
    return (V)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)at)));
#elif defined(__AVX2__)
    return (V)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)at)));
#else
    typedef uint8_t Bytes __attribute__((vector_size(Types<float>::lanes), may_alias, aligned(1)));
    return __builtin_convertvector(*(const Bytes*)at, V);
#endif
}
template <>
FORCED inline void store(Byte* at, Types<float>::V value) {
    // of what is no number the minimum is its second operand, and what is below becomes the least
#if defined(__AVX512F__)
    const __m512 most = _mm512_min_ps((__m512)value, _mm512_set1_ps(255));
    const __m512i words = _mm512_max_epi32(_mm512_cvtps_epi32(most), _mm512_setzero_si512());
    _mm_storeu_si128((__m128i*)at, _mm512_cvtepi32_epi8(words));
#elif defined(__AVX2__)
    const __m256 most = _mm256_min_ps((__m256)value, _mm256_set1_ps(255));
    const __m256i words = _mm256_cvtps_epi32(most);
    const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(words),
                                           _mm256_extracti128_si256(words, 1));
    _mm_storel_epi64((__m128i*)at, _mm_packus_epi16(halves, halves));
#else
    using V = Types<float>::V;
    typedef uint8_t Bytes __attribute__((vector_size(Types<float>::lanes), may_alias, aligned(1)));
    value = value < 255 ? (value > 0 ? value : V{}) : V{} + 255.f;
    const auto words = (Types<float>::Words)(value + 12582912.0f) & 255;  // as Byte(float)
    *(Bytes*)at = __builtin_convertvector(words, Bytes);
#endif
}

// From and to where no vector has to begin; codes lie so anyway
template <class T>
FORCED inline typename Types<T>::V load_loose(const T* at) {
    if constexpr (std::is_same_v<T, Byte>)
        return load(at);
    else
        return *(const typename Types<T>::Loose*)at;
}
template <class T>
FORCED inline void store_loose(T* at, typename Types<T>::V value) {
    if constexpr (std::is_same_v<T, Byte>)
        store(at, value);
    else
        *(typename Types<T>::Loose*)at = value;
}

// What a kernel multiplies: a pixel of the channel at[0]. `plane` is a channel's size in scalars.
template <class T>
struct Source {
    static constexpr int channels = 1;
    const T* first;
    template <class Index>
    Source(const T* in, const Index* at, int64_t plane) : first(in + at[0] * plane) {}
    explicit Source(const T* first) : first(first) {}
    FORCED Source from(int64_t at) const { return Source(first + at); }
    FORCED typename Types<T>::V operator[](int64_t at) const { return load(first + at); }
};

template <class T>
FORCED inline typename Types<T>::V add_product(typename Types<T>::V sum, typename Types<T>::V pixel,
                                               const int32_t* word) {
    return sum + pixel * broadcast<T>(word);
}

#if BRAIN
// Two kernels of a filter at once: the pixels of two channels side by side, a word of two weights
#if defined(__AVX512BF16__)
using Pixels = __m512i;
FORCED inline Pixels side_by_side(const Brain* a, const Brain* b) {
    const __m512i order = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
        39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    return _mm512_permutex2var_epi16(
        _mm512_castsi256_si512(_mm256_load_si256((const __m256i*)a)), order,
        _mm512_castsi256_si512(_mm256_load_si256((const __m256i*)b)));
}
FORCED inline Types<float>::V add_products(Types<float>::V sum, Pixels x, const int32_t* word) {
    return (Types<float>::V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x,
                                             (__m512bh)_mm512_set1_epi32(*word));
}
template <>
FORCED inline Types<float>::V load(const Brain* at) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_load_si256((const __m256i*)at));
    return (Types<float>::V)_mm512_slli_epi32(wide, 16);
}
template <>
FORCED inline void store(Brain* at, Types<float>::V value) {
    _mm256_store_si256((__m256i*)at, (__m256i)_mm512_cvtneps_pbh((__m512)value));
}
#else
using Pixels = bfloat16x8_t;
FORCED inline Pixels side_by_side(const Brain* a, const Brain* b) {
    const uint16x4_t x = vld1_u16(&a->bits), y = vld1_u16(&b->bits);
    return vreinterpretq_bf16_u16(vcombine_u16(vzip1_u16(x, y), vzip2_u16(x, y)));
}
FORCED inline Types<float>::V add_products(Types<float>::V sum, Pixels x, const int32_t* word) {
    const bfloat16x8_t weights = vreinterpretq_bf16_s32(vdupq_n_s32(*word));
    return (Types<float>::V)vbfdotq_f32((float32x4_t)sum, x, weights);
}
template <>
FORCED inline Types<float>::V load(const Brain* at) {
    return (Types<float>::V)vshll_n_u16(vld1_u16(&at->bits), 16);
}
template <>
FORCED inline void store(Brain* at, Types<float>::V value) {
    vst1_bf16((bfloat16_t*)at, vcvt_bf16_f32((float32x4_t)value));
}
#endif

template <>
struct Source<Brain> {
    static constexpr int channels = 2;
    const Brain *first, *second;
    template <class Index>
    Source(const Brain* in, const Index* at, int64_t plane)
        : first(in + at[0] * plane), second(in + at[1] * plane) {}
    Source(const Brain* first, const Brain* second) : first(first), second(second) {}
    FORCED Source from(int64_t at) const { return Source(first + at, second + at); }
    FORCED Pixels operator[](int64_t at) const { return side_by_side(first + at, second + at); }
};

template <class T>
FORCED inline Types<float>::V add_product(Types<float>::V sum, Pixels pixels, const int32_t* word) {
    return add_products(sum, pixels, word);
}
#endif

// The larger or the smaller one, x where that is no number: what processors have an instruction for,
// which compilers do not make of the condition
template <class V>
FORCED inline V at_least(V x, V least) {
#if defined(__AVX__)
    if constexpr (requires { x[0]; } && sizeof(V) == VECTOR_BYTES)
        if constexpr (std::is_same_v<std::remove_cvref_t<decltype(x[0])>, float>)
#if defined(__AVX512F__)
            return (V)_mm512_max_ps((__m512)least, (__m512)x);
#else
            return (V)_mm256_max_ps((__m256)least, (__m256)x);
#endif
#endif
    return x < least ? least : x;
}
template <class V>
FORCED inline V at_most(V x, V most) {
#if defined(__AVX__)
    if constexpr (requires { x[0]; } && sizeof(V) == VECTOR_BYTES)
        if constexpr (std::is_same_v<std::remove_cvref_t<decltype(x[0])>, float>)
#if defined(__AVX512F__)
            return (V)_mm512_min_ps((__m512)most, (__m512)x);
#else
            return (V)_mm256_min_ps((__m256)most, (__m256)x);
#endif
#endif
    return x > most ? most : x;
}

template <class V>
FORCED inline V rectified(V x) {
    return at_least(x, V{});  // NaN stays
}

template <class V>
FORCED inline V larger(V a, V b) {  // NaN stays
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<V, Types<float>::V>) {
        const __mmask16 numbers = _mm512_cmp_ps_mask((__m512)a, (__m512)a, _CMP_ORD_Q);
        return (V)_mm512_mask_max_ps((__m512)a, numbers, (__m512)a, (__m512)b);
    }
#elif defined(__AVX__)
    if constexpr (std::is_same_v<V, Types<float>::V>) {
        const __m256 none = _mm256_cmp_ps((__m256)a, (__m256)a, _CMP_UNORD_Q);
        return (V)_mm256_or_ps(none, _mm256_max_ps((__m256)a, (__m256)b));
    }
#endif
    return (a < b) | (b != b) ? b : a;
}

}  // namespace
