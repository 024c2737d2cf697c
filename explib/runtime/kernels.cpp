// Runs a planned network with its surviving kernels only: one call, no allocation in it.
//
// Two layouts of a tensor:
//   interleaved  [C][H][W][lanes]: a vector holds one pixel of as many images as it has lanes. Each
//                thread takes such a block of images through the whole network.
//   spatial      one image, [C][rows of W + halo]: a vector holds neighbouring pixels. Planes have
//                zeros around them, so that a shifted plane is a shifted load; the threads share
//                every op.
// Vectors are the compiler's own (GCC, Clang): their width follows the target. Scalars are float
// or, where the processor multiplies it, _Float16.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

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
constexpr int MAX_TAPS = 49;
constexpr int CACHE_SKEW = 6;   // lines
constexpr int PREFETCH = 1024;  // bytes of weights ahead, which are used once and in order

enum Kind { LOAD, STORE, CONV, LINEAR, MAXPOOL, AVGPOOL, SUBSAMPLE, ADD, RELU, COPY, FLATTEN };

}  // namespace

extern "C" {
struct Slot {  // memory of one size; spatial planes keep their zeros since only equals share a slot
    int32_t channels, height, width;
};
struct Tensor {  // `channels` of a slot from `first` on
    int32_t slot, first, channels, height, width;
};
struct Op {
    int32_t kind, in, other, out;  // tensors; -1: none. LOAD and STORE: `other` is the argument
    int32_t kernel, stride, pad, relu;
    int32_t before;        // SUBSAMPLE: zero channels in front. AVGPOOL: whether padding counts
    const float* bias;     // (F,)
    const void* weight;    // kernels by filter, each K * K words; LINEAR: scalars (F, C)
    const int32_t* start;  // (F + 1,) where a filter's kernels start
    const int32_t* index;  // the channel of each kernel
    // the same kernels by thread, whose filters are `share`, and in that by channel
    const void* weight_by_channel;
    const int32_t* start_by_channel;  // (threads * C + 1,)
    const int32_t* index_by_channel;  // the filter of each kernel
    const int32_t* share;             // (threads + 1,)
};
}

namespace {

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

// Planes of a multiple of 4 KiB would all fall on the same few lines of the first cache
int64_t block_plane(int height, int width) {
    const int64_t pixels = int64_t(height) * width;
    return pixels % 64 ? pixels : pixels + CACHE_SKEW;
}
int round_up(int value, int to) { return (value + to - 1) / to * to; }
int64_t split(int64_t n, int part, int parts) { return n * part / parts; }

// ---- interleaved: one vector is one pixel of LANES images
// ----------------------------------------

template <class T>
struct ConvBlock {
    const T* in;
    const T* other;  // added to the outputs, or null
    T* out;
    int filters, height, width, out_height, out_width, kernel, stride, pad, relu;
    const int32_t* weight;
    const float* bias;
    const int32_t *start, *index;
};

template <class T, int TH, int TW>
FORCED inline void finish(const ConvBlock<T>& a, int f, int y, int x,
                          typename Types<T>::V (&acc)[TH][TW]) {
    USE_TYPES;
    const int64_t first =
        (f * block_plane(a.out_height, a.out_width) + int64_t(y) * a.out_width + x) * LANES;
    const V bias = splat<T>(T(a.bias[f]));
    repeat<TH>([&](auto r) FORCED {
        repeat<TW>([&](auto c) FORCED {
            const int64_t at = first + (int64_t(r) * a.out_width + c) * LANES;
            V value = acc[r][c] + bias;
            if (a.other) value += *(const V*)(a.other + at);
            *(V*)(a.out + at) = a.relu ? rectified(value) : value;
        });
    });
}

// One tile of every filter; K is 1 or 3 and the padding K / 2. The input pixels of a tile are
// loaded once per kernel and go to all outputs they belong to; those outside the image are left
// out.
template <class T, int K, int S, int TH, int TW>
void conv_tile(const ConvBlock<T>& a, int y, int x) {
    USE_TYPES;
    constexpr int P = K / 2, IH = (TH - 1) * S + K, IW = (TW - 1) * S + K;
    constexpr int SETS = TH * TW >= 8 ? 1 : 8 / (TH * TW);  // enough sums to hide their latency
    const int top = y * S - P, left = x * S - P;
    const bool first_row = top >= 0, last_row = top + IH <= a.height;
    const bool first_col = left >= 0, last_col = left + IW <= a.width;
    const int64_t plane = block_plane(a.height, a.width);
    const int64_t origin = int64_t(top) * a.width + left;
    for (int f = 0; f < a.filters; ++f) {
        V acc[SETS][TH][TW] = {};
        const auto add = [&](V(&sum)[TH][TW], int k) FORCED {
            const int32_t* w = a.weight + int64_t(k) * K * K;
            const int64_t base = a.index[k] * plane + origin;
            repeat<IH>([&](auto i) FORCED {
                if ((i < P && !first_row) || (i >= IH - P && !last_row)) return;
                repeat<IW>([&](auto j) FORCED {
                    if ((j < P && !first_col) || (j >= IW - P && !last_col)) return;
                    const V pixel = *(const V*)(a.in + (base + int64_t(i) * a.width + j) * LANES);
                    repeat<K>([&](auto ky) FORCED {
                        constexpr int dy = i - ky;
                        if constexpr (dy >= 0 && dy % S == 0 && dy / S < TH)
                            repeat<K>([&](auto kx) FORCED {
                                constexpr int dx = j - kx;
                                if constexpr (dx >= 0 && dx % S == 0 && dx / S < TW)
                                    sum[dy / S][dx / S] += pixel * broadcast<T>(w + ky * K + kx);
                            });
                    });
                });
            });
        };
        int k = a.start[f];
        const int end = a.start[f + 1];
        if constexpr (SETS > 1)
            for (; k + SETS <= end; k += SETS)
                repeat<SETS>([&](auto s) FORCED { add(acc[s], k + s); });
        for (; k < end; ++k) add(acc[0], k);
        repeat<SETS - 1>([&](auto s) FORCED {
            repeat<TH>([&](auto r) FORCED {
                repeat<TW>([&](auto c) FORCED { acc[0][r][c] += acc[s + 1][r][c]; });
            });
        });
        finish<T, TH, TW>(a, f, y, x, acc[0]);
    }
}

// Any kernel, stride and padding: the same tile with its borders tested pixel by pixel
template <class T, int TH, int TW>
void conv_tile_any(const ConvBlock<T>& a, int y, int x) {
    USE_TYPES;
    const int K = a.kernel;
    for (int f = 0; f < a.filters; ++f) {
        V acc[TH][TW] = {};
        for (int k = a.start[f]; k < a.start[f + 1]; ++k) {
            const T* in = a.in + a.index[k] * block_plane(a.height, a.width) * LANES;
            for (int tap = 0; tap < K * K; ++tap) {
                const V w = broadcast<T>(a.weight + int64_t(k) * K * K + tap);
                const int top = y * a.stride - a.pad + tap / K,
                          left = x * a.stride - a.pad + tap % K;
                repeat<TH>([&](auto r) FORCED {
                    const int row = top + r * a.stride;
                    if (row < 0 || row >= a.height) return;
                    repeat<TW>([&](auto c) FORCED {
                        const int col = left + c * a.stride;
                        if (col >= 0 && col < a.width)
                            acc[r][c] +=
                                *(const V*)(in + (int64_t(row) * a.width + col) * LANES) * w;
                    });
                });
            }
        }
        finish<T, TH, TW>(a, f, y, x, acc);
    }
}

// The last tile of a row or column ends with it and may overlap the one before
template <class T, int TH, int TW, void (*TILE)(const ConvBlock<T>&, int, int)>
void tiles(const ConvBlock<T>& a) {
    for (int y = 0; y < a.out_height; y += TH)
        for (int x = 0; x < a.out_width; x += TW)
            TILE(a, std::min(y, a.out_height - TH), std::min(x, a.out_width - TW));
}

template <class T, int TH, int TW>
void conv_sized(const ConvBlock<T>& a) {
    const bool same = a.pad == a.kernel / 2;
    if (same && a.kernel == 3 && a.stride == 1)
        return tiles<T, TH, TW, conv_tile<T, 3, 1, TH, TW>>(a);
    if (same && a.kernel == 3 && a.stride == 2)
        return tiles<T, TH, TW, conv_tile<T, 3, 2, TH, TW>>(a);
    if (same && a.kernel == 1 && a.stride == 1)
        return tiles<T, TH, TW, conv_tile<T, 1, 1, TH, TW>>(a);
    tiles<T, TH, TW, conv_tile_any<T, TH, TW>>(a);
}

template <class T>
void conv_block(const ConvBlock<T>& a) {
    const int side = std::min(a.out_height, a.out_width);
    if (side >= 4) return conv_sized<T, TILE_H, TILE_W>(a);
    if (side >= 2) return conv_sized<T, 2, 2>(a);
    conv_sized<T, 1, 1>(a);
}

template <class T>
void linear_block(const T* in, T* out, const Op& op, int channels, int features) {
    USE_TYPES;
    constexpr int GROUP = 8;
    const T* weight = (const T*)op.weight;
    for (int f = 0; f < features; f += GROUP) {
        V acc[GROUP];
        const T* rows[GROUP];
        for (int g = 0; g < GROUP; ++g) {
            const int feature = std::min(f + g, features - 1);
            acc[g] = splat<T>(T(op.bias[feature]));
            rows[g] = weight + int64_t(feature) * channels;
        }
        for (int c = 0; c < channels; ++c) {
            const V x = *(const V*)(in + int64_t(c) * LANES);
            repeat<GROUP>([&](auto g) FORCED { acc[g] += x * rows[g][c]; });
        }
        for (int g = 0; g < GROUP && f + g < features; ++g)
            *(V*)(out + int64_t(f + g) * LANES) = op.relu ? rectified(acc[g]) : acc[g];
    }
}

// ---- spatial: one vector is LANES neighbouring pixels of one image
// -------------------------------

// Kernels of NT taps by channel: the shifted planes stay in registers while all filters that use
// this channel take them; the sums of N vectors of every filter lie in `sums`.
template <class T, int NT, int N>
void conv_vectors(const Op& op, const T* in, int64_t plane, int channels, const int* shift,
                  int first_list, int last_list, int first, int last, T* sums) {
    USE_TYPES;
    using Loose = typename Types<T>::Loose;
    const int32_t* words = (const int32_t*)op.weight_by_channel;
    for (int f = first; f < last; ++f)
        repeat<N>([&](auto n) FORCED { ((V*)sums)[f * N + n] = splat<T>(T(op.bias[f])); });
    for (int c = 0; c < channels; ++c) {
        V pixels[NT][N];
        repeat<NT>([&](auto t) FORCED {
            repeat<N>([&](auto n) FORCED {
                pixels[t][n] = *(const Loose*)(in + c * plane + shift[t] + n * LANES);
            });
        });
        for (int list = first_list; list < last_list; ++list) {
            const int32_t* start = op.start_by_channel + int64_t(list) * channels + c;
            for (int k = start[0]; k < start[1]; ++k) {
                V* sum = (V*)sums + int64_t(op.index_by_channel[k]) * N;
                const int32_t* w = words + int64_t(k) * NT;
                __builtin_prefetch((const char*)w + PREFETCH);
                V acc[N];
                repeat<N>([&](auto n) FORCED { acc[n] = sum[n]; });
                repeat<NT>([&](auto t) FORCED {
                    const V weight = broadcast<T>(w + t);
                    repeat<N>([&](auto n) FORCED { acc[n] += pixels[t][n] * weight; });
                });
                repeat<N>([&](auto n) FORCED { sum[n] = acc[n]; });
            }
        }
    }
}

// Kernels of any size by filter: N vectors of one filter's sums stay in registers
template <class T, int N>
void conv_filter(const Op& op, const T* in, int64_t plane, const int* shift, int f, T* sums) {
    USE_TYPES;
    using Loose = typename Types<T>::Loose;
    const int taps = op.kernel * op.kernel;
    V acc[N];
    repeat<N>([&](auto n) FORCED { acc[n] = splat<T>(T(op.bias[f])); });
    for (int k = op.start[f]; k < op.start[f + 1]; ++k) {
        const T* x = in + op.index[k] * plane;
        const int32_t* w = (const int32_t*)op.weight + int64_t(k) * taps;
        for (int t = 0; t < taps; ++t) {
            const V weight = broadcast<T>(w + t);
            repeat<N>([&](auto n)
                          FORCED { acc[n] += *(const Loose*)(x + shift[t] + n * LANES) * weight; });
        }
    }
    repeat<N>([&](auto n) FORCED { ((V*)sums)[n] = acc[n]; });
}

// ---- a planned network
// ---------------------------------------------------------------------------

struct Memory {
    void* data = nullptr;
    explicit Memory(size_t bytes) {
        bytes = (bytes + 127) / 64 * 64;
        data = std::aligned_alloc(64, bytes);
        if (!data) throw std::bad_alloc();
        std::memset(data, 0, bytes);
    }
    ~Memory() { std::free(data); }
    Memory(const Memory&) = delete;
};

class Barrier {
    std::atomic<int> waiting{0}, round{0};

  public:
    void wait(int parts) {
        if (parts == 1) return;
        const int seen = round.load();
        if (waiting.fetch_add(1) + 1 == parts) {
            waiting.store(0);
            round.store(seen + 1);
            return;
        }
        for (int spins = 0; round.load(std::memory_order_acquire) == seen; ++spins)
            if (spins > 2000) std::this_thread::yield();
    }
};

struct Network {
    virtual ~Network() = default;
    virtual bool interleave(int64_t images) const = 0;
    virtual void prepare(bool interleaved) = 0;
    virtual int64_t blocks(int64_t images) const = 0;
    virtual void run_block(int worker, const float* const* in, float* const* out, int64_t images,
                           int64_t block) = 0;
    virtual void run_image(int worker, const float* const* in, float* const* out, int64_t image,
                           int part, int parts, Barrier& barrier) = 0;
    int threads = 1;
};

template <class T>
class Planned : public Network {
    using V = typename Types<T>::V;
    static constexpr int LANES = Types<T>::lanes;
    std::vector<Op> ops;
    std::vector<Tensor> tensors;
    std::vector<Slot> slots;
    std::vector<int64_t> block_at, image_at;  // where each slot starts, in scalars
    int64_t block_size = 0, image_size = 0, scratch_size = 0;
    int halo;
    std::vector<std::unique_ptr<Memory>> block_memory, image_memory, scratch;
    std::map<std::pair<int, int>, std::unique_ptr<Memory>>
        inside;  // of a plane: 1, between rows: 0

    // spatial geometry
    int pitch(int width) const { return width + halo; }
    int body(int height, int width) const { return round_up(height * pitch(width), LANES); }
    int margin(int width) const { return round_up(halo * pitch(width) + halo, LANES); }
    int64_t plane(int height, int width) const { return body(height, width) + margin(width); }

    T* block_data(T* memory, int t) const {
        const Tensor& a = tensors[t];
        return memory + block_at[a.slot] + a.first * block_plane(a.height, a.width) * LANES;
    }
    T* image_data(T* memory, int t) const {
        const Tensor& a = tensors[t];
        return memory + image_at[a.slot] + margin(a.width) + a.first * plane(a.height, a.width);
    }

  public:
    Planned(const Op* op, int n_ops, const Tensor* tensor, int n_tensors, const Slot* slot,
            int n_slots, int halo, int threads)
        : ops(op, op + n_ops),
          tensors(tensor, tensor + n_tensors),
          slots(slot, slot + n_slots),
          halo(halo) {
        this->threads = threads;
        for (const Slot& s : slots) {
            block_at.push_back(block_size);
            image_at.push_back(image_size);
            block_size += s.channels * block_plane(s.height, s.width) * LANES;
            // two margins more: before the first plane, and for loads that begin near the end
            image_size +=
                s.channels * plane(s.height, s.width) + 2 * margin(s.width) + 2 * PAIR * LANES;
        }
        for (const Op& o : ops) {
            if (o.in < 0 || o.out < 0) continue;
            const Tensor &in = tensors[o.in], &out = tensors[o.out];
            const int each = o.kind == CONV     ? out.channels * PAIR * LANES
                             : o.kind == LINEAR ? round_up(in.channels, LANES)
                                                : round_up(pitch(in.width), LANES);
            int64_t need = int64_t(each) * threads;
            if (o.kind == CONV && o.stride > 1)
                need += int64_t(o.stride) * o.stride * in.channels * plane(out.height, out.width) +
                        2 * margin(out.width) + 2 * PAIR * LANES;
            scratch_size = std::max(scratch_size, need);
            auto& mask = inside[{out.height, out.width}];
            if (mask) continue;
            mask = std::make_unique<Memory>(body(out.height, out.width) * sizeof(T));
            for (int r = 0; r < out.height; ++r)
                std::fill_n((T*)mask->data + r * pitch(out.width), out.width, T(1));
        }
        block_memory.resize(threads);
        image_memory.resize(threads);
        scratch.resize(threads);
    }

    // Blocks fill their lanes from so many images on; below it, images go one by one
    bool interleave(int64_t images) const override {
        const int64_t rounds = (blocks(images) + threads - 1) / threads;
        return images >= LANES / 2 && rounds * LANES <= 2 * ((images + threads - 1) / threads);
    }
    int64_t blocks(int64_t images) const override { return (images + LANES - 1) / LANES; }

    void prepare(bool interleaved) override {
        for (int i = 0; i < threads; ++i) {
            auto& memory = interleaved ? block_memory[i] : image_memory[i];
            if (!memory)
                memory =
                    std::make_unique<Memory>((interleaved ? block_size : image_size) * sizeof(T));
            if (!interleaved && !scratch[i])
                scratch[i] = std::make_unique<Memory>(scratch_size * sizeof(T));
        }
    }

    void run_block(int worker, const float* const* in, float* const* out, int64_t images,
                   int64_t block) override {
        T* memory = (T*)block_memory[worker]->data;
        const int64_t first = block * LANES;
        const int live = (int)std::min<int64_t>(LANES, images - first);
        for (const Op& op : ops) block_op(op, memory, in, out, first, live);
    }

    void run_image(int worker, const float* const* in, float* const* out, int64_t image, int part,
                   int parts, Barrier& barrier) override {
        T* memory = (T*)image_memory[worker]->data;
        T* extra = (T*)scratch[worker]->data;
        for (const Op& op : ops) {
            image_op(op, memory, extra, in, out, image, part, parts, barrier);
            barrier.wait(parts);
        }
    }

  private:
    void block_op(const Op& op, T* memory, const float* const* ins, float* const* outs,
                  int64_t first, int live) {
        const Tensor& a = tensors[op.in >= 0 ? op.in : op.out];
        const Tensor& o = tensors[op.out >= 0 ? op.out : op.in];
        const T* in = op.in >= 0 ? block_data(memory, op.in) : nullptr;
        T* out = op.out >= 0 ? block_data(memory, op.out) : nullptr;
        if (op.kind == CONV)
            return conv_block<T>({in, op.other >= 0 ? block_data(memory, op.other) : nullptr, out,
                                  o.channels, a.height, a.width, o.height, o.width, op.kernel,
                                  op.stride, op.pad, op.relu, (const int32_t*)op.weight, op.bias,
                                  op.start, op.index});
        if (op.kind == LINEAR) return linear_block<T>(in, out, op, a.channels, o.channels);
        const int64_t from = block_plane(a.height, a.width), to = block_plane(o.height, o.width);
        const int pixels = a.height * a.width;
        const int channels = op.kind == SUBSAMPLE ? o.channels : a.channels;
        for (int c = 0; c < channels; ++c) {
            const V* x = (const V*)in + c * from;
            V* y = (V*)out + c * to;
            switch (op.kind) {
                case LOAD:
                    for (int start = 0; start < pixels; start += 64)
                        for (int lane = 0; lane < LANES; ++lane) {
                            const float* image =
                                ins[op.other] + ((first + lane) * channels + c) * pixels;
                            for (int i = start; i < std::min(pixels, start + 64); ++i)
                                ((T*)(y + i))[lane] = lane < live ? T(image[i]) : T(0);
                        }
                    break;
                case STORE:
                    for (int lane = 0; lane < live; ++lane) {
                        float* image = outs[op.other] + ((first + lane) * channels + c) * pixels;
                        for (int i = 0; i < pixels; ++i)
                            image[i] = float(((const T*)(x + i))[lane]);
                    }
                    break;
                case MAXPOOL:
                case AVGPOOL:
                    for (int r = 0; r < o.height; ++r)
                        for (int q = 0; q < o.width; ++q) {
                            const auto [r0, r1] = window(op, r, a.height);
                            const auto [c0, c1] = window(op, q, a.width);
                            V value = op.kind == MAXPOOL ? x[r0 * a.width + c0] : V{};
                            for (int i = r0; i < r1; ++i)
                                for (int j = c0; j < c1; ++j) {
                                    const V pixel = x[i * a.width + j];
                                    value =
                                        op.kind == MAXPOOL ? larger(value, pixel) : value + pixel;
                                }
                            *y++ = op.kind == MAXPOOL ? value : value * scale(op, r1 - r0, c1 - c0);
                        }
                    break;
                case SUBSAMPLE: {
                    const int source = c - op.before;
                    const bool padded = source < 0 || source >= a.channels;
                    x = (const V*)in + source * from;
                    for (int r = 0; r < o.height; ++r)
                        for (int q = 0; q < o.width; ++q)
                            *y++ = padded ? V{} : x[r * op.stride * a.width + q * op.stride];
                    break;
                }
                case ADD:
                case RELU: {
                    const V* z = op.kind == ADD ? (const V*)block_data(memory, op.other) + c * from
                                                : nullptr;
                    for (int i = 0; i < pixels; ++i) {
                        const V value = z ? x[i] + z[i] : x[i];
                        y[i] = op.relu ? rectified(value) : value;
                    }
                    break;
                }
                case COPY:
                    std::memcpy(y, x, pixels * sizeof(V));
                    break;
                case FLATTEN:
                    std::memcpy((V*)out + int64_t(c) * pixels, x, pixels * sizeof(V));
                    break;
            }
        }
    }

    // The rows or columns of a pooling window, without those outside
    static std::pair<int, int> window(const Op& op, int at, int size) {
        const int start = at * op.stride - op.pad;
        return {std::max(start, 0), std::min(start + op.kernel, size)};
    }

    static T scale(const Op& op, int rows, int columns) {
        return T(1.0f / (op.before ? op.kernel * op.kernel : rows * columns));
    }

    // First over rows, whole vectors at a time, then over columns
    void pool_plane(const Op& op, const Tensor& a, const Tensor& o, const T* in, T* out,
                    T* row) const {
        const int wide = pitch(a.width), wide_out = pitch(o.width);
        const bool most = op.kind == MAXPOOL;
        for (int r = 0; r < o.height; ++r) {
            const auto [r0, r1] = window(op, r, a.height);
            std::copy_n(in + r0 * wide, a.width, row);
            for (int i = r0 + 1; i < r1; ++i)
                for (int q = 0; q < a.width; ++q) {
                    const T x = in[i * wide + q];
                    row[q] = most ? larger(row[q], x) : row[q] + x;
                }
            for (int q = 0; q < o.width; ++q) {
                const auto [c0, c1] = window(op, q, a.width);
                T value = row[c0];
                for (int c = c0 + 1; c < c1; ++c)
                    value = most ? larger(value, row[c]) : value + row[c];
                out[r * wide_out + q] = most ? value : value * scale(op, r1 - r0, c1 - c0);
            }
        }
    }

    void image_op(const Op& op, T* memory, T* extra, const float* const* ins, float* const* outs,
                  int64_t image, int part, int parts, Barrier& barrier) {
        const Tensor& a = tensors[op.in >= 0 ? op.in : op.out];
        const Tensor& o = tensors[op.out >= 0 ? op.out : op.in];
        const T* in = op.in >= 0 ? image_data(memory, op.in) : nullptr;
        T* out = op.out >= 0 ? image_data(memory, op.out) : nullptr;
        if (op.kind == CONV) return image_conv(op, a, o, memory, extra, part, parts, barrier);
        if (op.kind == LINEAR) return image_linear(op, a, o, in, out, extra, part, parts);
        const int64_t from = plane(a.height, a.width), to = plane(o.height, o.width);
        const int wide = pitch(a.width), wide_out = pitch(o.width);
        const int channels = op.kind == FLATTEN ? a.channels : o.channels;
        const int last = (int)split(channels, part + 1, parts);
        for (int c = (int)split(channels, part, parts); c < last; ++c) {
            const T* x = in + c * from;
            T* y = op.kind == FLATTEN ? out + int64_t(c) * a.height * a.width * to : out + c * to;
            switch (op.kind) {
                case LOAD:
                case STORE:
                    for (int r = 0; r < o.height; ++r)
                        for (int q = 0; q < o.width; ++q) {
                            const int64_t at =
                                ((image * o.channels + c) * o.height + r) * o.width + q;
                            if (op.kind == LOAD)
                                y[r * wide_out + q] = T(ins[op.other][at]);
                            else
                                outs[op.other][at] = float(x[r * wide + q]);
                        }
                    break;
                case MAXPOOL:
                case AVGPOOL:
                    pool_plane(op, a, o, x, y, extra + int64_t(part) * round_up(wide, LANES));
                    break;
                case SUBSAMPLE: {
                    const int source = c - op.before;
                    const bool padded = source < 0 || source >= a.channels;
                    for (int r = 0; r < o.height; ++r)
                        for (int q = 0; q < o.width; ++q)
                            y[r * wide_out + q] =
                                padded ? T(0)
                                       : in[source * from + (r * op.stride) * wide + q * op.stride];
                    break;
                }
                case FLATTEN:
                    for (int r = 0; r < a.height; ++r)
                        for (int q = 0; q < a.width; ++q)
                            y[(r * a.width + q) * to] = x[r * wide + q];
                    break;
                case ADD:
                case RELU:
                case COPY: {
                    const T* z = op.kind == ADD ? image_data(memory, op.other) + c * from : nullptr;
                    for (int i = 0; i < body(a.height, a.width); i += LANES) {
                        V value = *(const V*)(x + i);
                        if (z) value += *(const V*)(z + i);
                        *(V*)(y + i) = op.relu ? rectified(value) : value;
                    }
                    break;
                }
            }
        }
    }

    void image_linear(const Op& op, const Tensor& a, const Tensor& o, const T* in, T* out, T* extra,
                      int part, int parts) {
        using Loose = typename Types<T>::Loose;
        const int64_t from = plane(1, 1), to = plane(1, 1);
        T* x = extra + int64_t(part) * round_up(a.channels, LANES);
        for (int c = 0; c < a.channels; ++c) x[c] = in[c * from];
        const int last = (int)split(o.channels, part + 1, parts);
        for (int f = (int)split(o.channels, part, parts); f < last; ++f) {
            const T* row = (const T*)op.weight + int64_t(f) * a.channels;
            V sums = {};
            int c = 0;
            for (; c + LANES <= a.channels; c += LANES)
                sums += *(const Loose*)(row + c) * *(const V*)(x + c);
            float sum = op.bias[f];
            for (; c < a.channels; ++c) sum += float(row[c]) * float(x[c]);
            for (int i = 0; i < LANES; ++i) sum += float(sums[i]);
            out[f * to] = T(op.relu && sum < 0 ? 0 : sum);
        }
    }

    void image_conv(const Op& op, const Tensor& a, const Tensor& o, T* memory, T* extra, int part,
                    int parts, Barrier& barrier) {
        const T* in = image_data(memory, op.in);
        const int K = op.kernel, S = op.stride, wide = pitch(o.width);
        const int64_t to = plane(o.height, o.width);
        int64_t from = plane(a.height, a.width);
        const int32_t* share = op.share;
        // A stride becomes S * S planes of the output's size, one for each phase of the input
        T* phases = extra + int64_t(o.channels) * PAIR * LANES * threads + margin(o.width);
        if (S > 1) {
            const int last = (int)split(a.channels, part + 1, parts);
            for (int c = (int)split(a.channels, part, parts); c < last; ++c)
                for (int phase = 0; phase < (K == 1 ? 1 : S * S); ++phase)
                    split_phase(in + c * from, phases + (int64_t(c) * S * S + phase) * to, a, o, S,
                                phase / S, phase % S);
            if (last == a.channels) {
                T* end = phases + int64_t(S) * S * a.channels * to - margin(o.width);
                std::fill_n(end, 2 * margin(o.width), T(0));
            }
            barrier.wait(parts);
            in = phases;
            from = int64_t(S) * S * to;
        }
        int shift[MAX_TAPS];
        for (int t = 0; t < K * K; ++t) {
            const int dy = t / K - op.pad, dx = t % K - op.pad;
            const int ky = dy >= 0 ? dy / S : -((S - 1 - dy) / S),
                      kx = dx >= 0 ? dx / S : -((S - 1 - dx) / S);
            const int64_t phase = (dy - ky * S) * S + dx - kx * S;
            shift[t] = int(phase * to) + ky * wide + kx;
        }
        const int vectors = body(o.height, o.width) / LANES;
        T* sums = extra + int64_t(part) * o.channels * PAIR * LANES;
        // Threads share the plane where it is large, else the filters
        const bool by_plane = vectors >= 8 * parts;
        const int v0 = by_plane ? (int)split(vectors, part, parts) : 0;
        const int v1 = by_plane ? (int)split(vectors, part + 1, parts) : vectors;
        const int f0 = by_plane || parts == 1 ? 0 : share[part];
        const int f1 = by_plane || parts == 1 ? o.channels : share[part + 1];
        const int first = by_plane || parts == 1 ? 0 : part;
        const int last = by_plane || parts == 1 ? threads : part + 1;
        if (K == 3) {
            int v = v0;
            for (; v + PAIR <= v1; v += PAIR) {
                conv_vectors<T, 9, PAIR>(op, in + v * LANES, from, a.channels, shift, first, last,
                                         f0, f1, sums);
                image_finish<PAIR>(op, o, memory, sums + int64_t(f0) * PAIR * LANES, f0, f1, v);
            }
            if (PAIR > 1 && v < v1) {
                conv_vectors<T, 9, 1>(op, in + v * LANES, from, a.channels, shift, first, last, f0,
                                      f1, sums);
                image_finish<1>(op, o, memory, sums + int64_t(f0) * LANES, f0, f1, v);
            }
            return;
        }
        for (int f = f0; f < f1; ++f) {
            int v = v0;
            alignas(64) T one[4 * LANES];
            for (; v + 4 <= v1; v += 4) {
                conv_filter<T, 4>(op, in + v * LANES, from, shift, f, one);
                image_finish<4>(op, o, memory, one, f, f + 1, v);
            }
            for (; v < v1; ++v) {
                conv_filter<T, 1>(op, in + v * LANES, from, shift, f, one);
                image_finish<1>(op, o, memory, one, f, f + 1, v);
            }
        }
    }

    void split_phase(const T* in, T* out, const Tensor& a, const Tensor& o, int S, int row,
                     int col) {
        const int wide = pitch(a.width), wide_out = pitch(o.width);
        std::fill(out - margin(o.width), out + body(o.height, o.width), T(0));
        for (int r = 0; r < o.height && r * S + row < a.height; ++r)
            for (int q = 0; q < o.width && q * S + col < a.width; ++q)
                out[r * wide_out + q] = in[(r * S + row) * wide + q * S + col];
    }

    // Sums of N vectors of filters f0 to f1 to their planes, from vector v on; zeros between rows
    template <int N>
    void image_finish(const Op& op, const Tensor& o, T* memory, const T* sums, int f0, int f1,
                      int v) {
        const V* mask = (const V*)inside.at({o.height, o.width})->data + v;
        const int64_t to = plane(o.height, o.width);
        T* out = image_data(memory, op.out) + v * LANES;
        const T* other = op.other >= 0 ? image_data(memory, op.other) + v * LANES : nullptr;
        for (int f = f0; f < f1; ++f)
            repeat<N>([&](auto n) FORCED {
                V value = ((const V*)sums)[(f - f0) * N + n];
                if (other) value += *(const V*)(other + f * to + n * LANES);
                if (op.relu) value = rectified(value);
                *(V*)(out + f * to + n * LANES) = mask[n] == V{} ? V{} : value;
            });
    }
};

// ---- threads
// -------------------------------------------------------------------------------------

// Workers that wait awake for a moment, then asleep. One pool a process: a fork makes its own.
class Pool {
    std::vector<std::thread> workers;
    std::mutex mutex;
    std::condition_variable wake;
    std::atomic<uint64_t> round{0};
    std::atomic<int> busy{0};
    void (*job)(void*, int) = nullptr;
    void* argument = nullptr;
    int wanted = 0;

    void work(int id, uint64_t seen) {
        for (;;) {
            for (int spins = 0; spins < 20000 && round.load(std::memory_order_acquire) == seen;
                 ++spins) {
#if defined(__x86_64__)
                __builtin_ia32_pause();
#endif
            }
            if (round.load() == seen) {
                std::unique_lock<std::mutex> lock(mutex);
                wake.wait(lock, [&] { return round.load() != seen; });
            }
            seen = round.load();
            if (id < wanted) job(argument, id);
            busy.fetch_sub(1);
        }
    }

  public:
    std::mutex callers;  // one network at a time

    void run(int threads, void (*task)(void*, int), void* with) {
        if (threads == 1) return task(with, 0);
        {
            std::unique_lock<std::mutex> lock(mutex);
            while ((int)workers.size() < threads - 1) {
                const int id = (int)workers.size() + 1;
                workers.emplace_back([this, id, seen = round.load()] { work(id, seen); });
                workers.back().detach();
            }
            job = task, argument = with, wanted = threads;
            busy.store((int)workers.size());
            round.fetch_add(1);
        }
        wake.notify_all();
        task(with, 0);
        for (int spins = 0; busy.load(std::memory_order_acquire) > 0; ++spins)
            if (spins > 2000) std::this_thread::yield();
    }

    static Pool& get() {
        static std::mutex guard;
        static Pool* pool = nullptr;
        static pid_t owner = 0;
        std::lock_guard<std::mutex> lock(guard);
        if (!pool || owner != getpid())
            pool = new Pool, owner = getpid();  // never ends: nor do they
        return *pool;
    }
};

struct Call {
    Network* network;
    const float* const* in;
    float* const* out;
    int64_t images;
    bool interleaved;
    std::atomic<int64_t> next{0};
    Barrier barrier{};
};

void run_part(void* argument, int worker) {
    Call& call = *(Call*)argument;
    Network& network = *call.network;
    if (call.interleaved) {
        const int64_t blocks = network.blocks(call.images);
        for (int64_t b; (b = call.next.fetch_add(1)) < blocks;)
            network.run_block(worker, call.in, call.out, call.images, b);
    } else if (call.images == 1) {
        network.run_image(0, call.in, call.out, 0, worker, network.threads, call.barrier);
    } else {
        for (int64_t i; (i = call.next.fetch_add(1)) < call.images;)
            network.run_image(worker, call.in, call.out, i, 0, 1, call.barrier);
    }
}

}  // namespace

extern "C" {

int explib_vector_bytes() { return VECTOR_BYTES; }
int explib_half() { return HALF; }

void* explib_new(const Op* ops, int n_ops, const Tensor* tensors, int n_tensors, const Slot* slots,
                 int n_slots, int halo, int threads, int half) try {
#if HALF
    if (half)
        return static_cast<Network*>(
            new Planned<_Float16>(ops, n_ops, tensors, n_tensors, slots, n_slots, halo, threads));
#endif
    if (half) return nullptr;
    return static_cast<Network*>(
        new Planned<float>(ops, n_ops, tensors, n_tensors, slots, n_slots, halo, threads));
} catch (const std::bad_alloc&) {
    return nullptr;
}

// 0, or 1 where memory is short. in: one NCHW float array per LOAD argument; out: per STORE.
int explib_run(void* handle, const float* const* in, float* const* out, int64_t images) try {
    Network* network = (Network*)handle;
    Pool& pool = Pool::get();
    std::lock_guard<std::mutex> lock(pool.callers);
    Call call{network, in, out, images, network->interleave(images)};
    network->prepare(call.interleaved);
    pool.run(network->threads, run_part, &call);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

void explib_free(void* handle) { delete (Network*)handle; }
}
