// Numbers moved between the lanes of vectors.
#pragma once
#include "vectors.h"

namespace {

// Lane i of the result is number `by * i + from` of a and then b
template <int by, int from, class V>
FORCED inline V picked(V a, V b) {
    constexpr int LANES = sizeof(V) / sizeof(V{}[0]);
#if defined(__AVX512F__)  // another port than the compiler's own
    if constexpr (by == 1 && LANES == 16)
        return (V)_mm512_alignr_epi32((__m512i)b, (__m512i)a, from);
#endif
    V made;
#if SHUFFLES
    [&]<int... I>(std::integer_sequence<int, I...>) FORCED {
        made = __builtin_shufflevector(a, b, (by * I + from)...);
    }(std::make_integer_sequence<int, LANES>{});
#else
    for (int i = 0, at = from; i < LANES; ++i, at += by) made[i] = at < LANES ? a[at] : b[at - LANES];
#endif
    return made;
}

// The same of every second one, in an order that halves of 32 bytes need not cross for, and that order
// undone
template <int from, class V>
FORCED inline V every_second(V a, V b) {
#if SHUFFLES
    if constexpr (sizeof(V) == 32 && sizeof(V{}[0]) == 4)
        return __builtin_shufflevector(a, b, from, from + 2, from + 8, from + 10, from + 4, from + 6,
                                       from + 12, from + 14);
#endif
    return picked<2, from>(a, b);
}
template <class V>
FORCED inline V in_order(V a) {
#if SHUFFLES
    if constexpr (sizeof(V) == 32 && sizeof(V{}[0]) == 4)
        return __builtin_shufflevector(a, a, 0, 1, 4, 5, 2, 3, 6, 7);
#endif
    return a;
}

// Even and odd ones of `count` numbers, each a vector further than they are
template <class T>
FORCED inline void deinterleave(const T* in, int count, T* even, T* odd) {
    USE_TYPES;
    int q = 0;
#if SHUFFLES
    using Loose = typename Types<T>::Loose;
    for (; 2 * q < count; q += LANES) {
        const V a = *(const Loose*)(in + 2 * q), b = *(const Loose*)(in + 2 * q + LANES);
        *(Loose*)(even + q) = picked<2, 0>(a, b);
        *(Loose*)(odd + q) = picked<2, 1>(a, b);
    }
#endif
    for (; 2 * q < count; ++q) even[q] = in[2 * q], odd[q] = in[2 * q + 1];
}

}  // namespace
