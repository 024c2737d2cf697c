// Activations of whole vectors, computed in float; exp to 2e-7 of its value.
#pragma once
#include "plan.h"
#include "vectors.h"

namespace {

template <class T>
FORCED inline auto widened(T x) {  // a scalar or a vector, as float
    if constexpr (std::is_floating_point_v<T> || sizeof(T) <= 4) {
        return float(x);
    } else if constexpr (std::is_same_v<std::remove_cvref_t<decltype(x[0])>, float>) {
        return x;
    } else {
        typedef float Wide __attribute__((vector_size(2 * sizeof(T))));
        return __builtin_convertvector(x, Wide);
    }
}

template <class T, class Wide>
FORCED inline T narrowed(Wide x) {
    if constexpr (std::is_same_v<T, Wide>)
        return x;
    else if constexpr (sizeof(T) <= 4)
        return T(x);
    else
        return __builtin_convertvector(x, T);
}

// Of int8 the value of a code, and the code of a value, not rounded; of any other type, itself
template <class T, class V>
FORCED inline V decoded(V x, const Code& code) {
    if constexpr (std::is_same_v<T, Byte>)
        return (x - code.zero) * code.scale;
    else
        return x;
}
template <class T, class V>
FORCED inline V coded(V x, const Code& code) {
    if constexpr (std::is_same_v<T, Byte>)
        return x * (1 / code.scale) + code.zero;
    else
        return x;
}

template <class F, class Scalar>
FORCED inline F bounded(F x, Scalar least, Scalar most) {  // NaN stays
    return at_most(at_least(x, F{} + least), F{} + most);
}

// exp(x) = scale * scale * (1 + rest): the rest by Taylor's series on [-ln 2 / 2, ln 2 / 2], the
// scale, a power of 2, twice, so that results reach from the smallest floats to infinity
template <class F>
struct Power {
    F scale, rest;
    explicit FORCED Power(F x) {
        using Words = decltype(x < x);
        constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: the unit of such floats is 1
        x = bounded(x, -104.0f, 89.0f);
        const F rounded = x * 1.44269504f + ROUND, n = rounded - ROUND;
        const F r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
        F tail = F{} + 1.0f / 5040;
        for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f})
            tail = tail * r + term;
        rest = tail * r * r + r;
        const Words whole = (Words)rounded - 0x4b400000, half = whole >> 1;
        scale = (F)((half + 127) << 23);
        second = (F)((whole - half + 127) << 23);
    }
    FORCED F exp() const { return (1 + rest) * scale * second; }
    FORCED F expm1() const {
        const F both = scale * second;
        return both * rest + (both - 1);
    }

  private:
    F second;
};

template <class F>
FORCED inline F logistic(F x) {
    return 1 / (1 + Power<F>(-x).exp());
}

template <class F>
FORCED inline F tanh_of(F x) {
    const F e = Power<F>(2 * bounded(x, -10.0f, 10.0f)).expm1();
    return e / (e + 2);
}

// By two polynomials, each fitted to the least largest relative error: x + x * p(x^2) near 0, else
// 1 - exp(-q(|x|)); within 2e-7
template <class F>
FORCED inline F erf_of(F x) {
    const F t = bounded(x < 0 ? -x : x, 0.0f, 4.0f), s = t * t;
    F near = F{} - 5.99099352e-4f;
    for (const float c : {4.99321311e-3f, -2.67666444e-2f, 0.112818172f, -0.376124938f, 0.12837915f})
        near = near * s + c;
    near = near * t + t;
    F far = F{} + 1.1303821e-5f;
    for (const float c : {-3.23529295e-4f, 3.64540701e-3f, -2.37682942e-2f, 0.106244107f,
                          0.635146948f, 1.12864957f})
        far = far * t + c;
    far = 1 - Power<F>(-far * t).exp();
    const F value = t < 0.921875f ? near : far;
    return x < 0 ? -value : value;
}

template <class F>
FORCED inline F gelu(F x) {
    return 0.5f * x * (1 + erf_of(x * 0.707106781f));
}

template <class F>
FORCED inline F gelu_tanh(F x) {
    return x * logistic(1.59576912f * (x + 0.044715f * x * x * x));
}

// All but the cheap ones, on values of one channel
template <class V>
[[gnu::noinline]] void activate_any(V* values, int count, int act, float alpha) {
    const auto each = [&](auto f) FORCED {
        for (int i = 0; i < count; ++i) values[i] = narrowed<V>(f(widened(values[i])));
    };
    switch (act) {
        case SILU: return each([](auto x) FORCED { return x / (1 + Power(-x).exp()); });
        case HARDSWISH:
            return each([](auto x) FORCED { return x * bounded(x + 3, 0.0f, 6.0f) * (1 / 6.0f); });
        case HARDSIGMOID:
            return each([](auto x) FORCED { return bounded(x + 3, 0.0f, 6.0f) * (1 / 6.0f); });
        case SIGMOID: return each([](auto x) FORCED { return logistic(x); });
        case GELU: return each([](auto x) FORCED { return gelu(x); });
        case GELU_TANH: return each([](auto x) FORCED { return gelu_tanh(x); });
        case LEAKY:
        case PRELU: return each([=](auto x) FORCED { return x < 0 ? x * alpha : x; });
        case ELU:
            return each([=](auto x) FORCED { return x < 0 ? alpha * Power(x).expm1() : x; });
        case TANH: return each([](auto x) FORCED { return tanh_of(x); });
        case MISH:  // tanh(log(1 + e)) without the logarithm; from 30 on it is 1
            return each([](auto x) FORCED {
                const auto e = Power(bounded(x, -104.0f, 30.0f)).exp(), n = e * (e + 2);
                return x * (n / (n + 2));
            });
    }
}

// The op's activation of N vectors of channel `c`, in place: the cheap ones in the registers that
// they are in, the others by way of memory
template <int N, class V>
FORCED inline void activate(const Op& op, int c, V* values) {
    using Scalar = std::remove_cvref_t<decltype(values[0][0])>;
    if (op.act == RELU) {
        repeat<N>([&](auto i) FORCED { values[i] = rectified(values[i]); });
    } else if (op.act == CLAMP) {
        const Scalar least(op.alpha), most(op.beta);
        repeat<N>([&](auto i) FORCED { values[i] = bounded(values[i], least, most); });
    } else if (op.act) {
        V copies[N];
        repeat<N>([&](auto i) FORCED { copies[i] = values[i]; });
        activate_any(copies, N, op.act, op.act == PRELU ? op.slope[c] : op.alpha);
        repeat<N>([&](auto i) FORCED { values[i] = copies[i]; });
    }
}

}  // namespace
