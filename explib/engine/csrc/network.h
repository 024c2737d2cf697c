// A planned network with its surviving kernels only: one call, no allocation between ops.
//
// Many images go in blocks (interleaved.h): each thread takes a block through the whole network, so
// that it stays in its cache. Few go one by one (spatial.h), and in blocks again through the linear
// layers at the end, whose weights are read once for all of them. Scalars are float or, where the
// processor multiplies them, _Float16 or bfloat16: that one in blocks only, with sums in float.
#pragma once
#include <algorithm>
#include <exception>
#include <vector>

#include "interleaved.h"
#include "spatial.h"

namespace {

constexpr int64_t LARGEST_BLOCK = 16 << 20;  // bytes of a value

enum Type { FLOAT32, FLOAT16, BFLOAT16, INT8 };

// The ops at the end of a plan that are on one pixel each, where a linear layer is among them
struct Tail {
    std::vector<Op> kept;  // stores what they read of earlier ops
    Plan plan;             // loads that and goes on; without ops where there is no such end
    size_t first;          // of them, in the whole plan

    explicit Tail(const Plan& whole) : plan{{}, whole.tensors, whole.slots, 0, whole.threads} {
        const auto one_pixel = [&](int t) {
            return t < 0 || whole.tensors[t].height * whole.tensors[t].width == 1;
        };
        const auto second = [](const Op& op) {  // -1: none
            return op.kind == STORE || op.kind == LINEAR ? -1 : op.other;
        };
        const auto& ops = whole.ops;
        for (first = ops.size(); first > 0; --first) {
            const Op& op = ops[first - 1];
            if (op.kind == LOAD || op.kind == CONV || !one_pixel(op.in) || !one_pixel(op.out) ||
                !one_pixel(second(op)))
                break;
        }
        const auto linear = [](const Op& op) { return op.kind == LINEAR; };
        if (std::none_of(ops.begin() + first, ops.end(), linear)) first = ops.size();
        std::vector<bool> made(whole.tensors.size()), used(whole.slots.size());
        const auto read = [&](int t, Code code) {
            if (t < 0) return;
            used[whole.tensors[t].slot] = true;
            if (made[t]) return;
            made[t] = true;
            const int argument = int(kept.size());
            kept.push_back({.kind = STORE, .in = t, .other = argument, .out = -1, .in_code = code});
            plan.ops.push_back({.kind = LOAD, .in = -1, .other = argument, .out = t, .out_code = code});
        };
        for (size_t i = first; i < ops.size(); ++i) {
            const Op& op = ops[i];
            read(op.in, op.in_code);
            read(second(op), op.other_code);
            if (op.out >= 0) made[op.out] = used[whole.tensors[op.out].slot] = true;
        }
        plan.ops.insert(plan.ops.end(), ops.begin() + first, ops.end());
        for (size_t s = 0; s < used.size(); ++s)
            if (!used[s]) plan.slots[s].channels = 0;
    }
};

struct Network {
    virtual ~Network() = default;
    virtual int64_t blocks(int64_t images) const = 0;  // that they go in; the others one by one
    virtual void prepare_blocks() = 0;
    virtual void prepare_images() = 0;
    virtual void prepare_tail() = 0;
    virtual std::vector<int64_t> kept() const = 0;  // scalars of an image that its tail begins with
    virtual void run_block(const float* const* in, float* const* out, int64_t images, int64_t block,
                           const Part& by) = 0;
    // kept: where these go if the tail is left out, or null
    virtual void run_image(const float* const* in, float* const* out, float* const* kept,
                           int64_t image, const Part& by) = 0;
    virtual void run_tail(const float* const* kept, float* const* out, int64_t images,
                          int64_t block, const Part& by) = 0;
    int threads = 1, lanes = 1;  // images of a block
};

template <class T>
class Planned : public Network {
    // bfloat16 goes one by one as float
    using Alone = std::conditional_t<std::is_same_v<T, Byte>, T, typename Types<T>::Scalar>;
    const Plan plan;
    const Tail tail;
    Blocks<T> by_block;
    Images<Alone> by_image;
    Blocks<Alone> tail_by_block;

  public:
    explicit Planned(Plan given)
        : plan(std::move(given)), tail(plan), by_block(plan), by_image(plan),
          tail_by_block(tail.plan) {
        threads = plan.threads, lanes = Types<T>::lanes;
    }

    // Blocks whose lanes are mostly full. Where the maps of a block are so large that no cache holds
    // them, images go one by one (which bfloat16 would not compute in)
    int64_t blocks(int64_t images) const override {
        constexpr int64_t most = std::is_same_v<T, Byte> ? LARGEST_BLOCK / 2 : LARGEST_BLOCK;
        if (sizeof(T) == sizeof(Alone) && by_block.largest() > most) return 0;
        return images / lanes + (5 * (images % lanes) >= 3 * lanes);
    }

    std::vector<int64_t> kept() const override {
        std::vector<int64_t> sizes;
        for (const Op& op : tail.kept) sizes.push_back(plan.tensors[op.in].channels);
        return sizes;
    }

    void prepare_blocks() override { by_block.prepare(); }
    void prepare_images() override { by_image.prepare(); }
    void prepare_tail() override { tail_by_block.prepare(); }

    void run_block(const float* const* in, float* const* out, int64_t images, int64_t block,
                   const Part& by) override {
        by_block.run(in, out, images, block, by);
    }

    void run_image(const float* const* in, float* const* out, float* const* kept, int64_t image,
                   const Part& by) override {
        const size_t last = kept ? tail.first : plan.ops.size();
        by_image.run(plan.ops.data(), last, in, out, image, by);
        if (kept) by_image.run(tail.kept.data(), tail.kept.size(), in, kept, image, by);
    }

    void run_tail(const float* const* kept, float* const* out, int64_t images, int64_t block,
                  const Part& by) override {
        tail_by_block.run(kept, out, images, block, by);
    }
};

struct Call {
    Network& network;
    const float* const* in;
    float* const* out;
    const int64_t images, blocks, first;  // first: of the images that go one by one
    std::vector<std::vector<float>> memory;
    std::vector<float*> kept;  // of every image, if their tails go in blocks
    std::atomic<int64_t> next_block{0}, next_image, next_tail;
    Barrier barrier{};

    Call(Network& network, const float* const* in, float* const* out, int64_t images)
        : network(network), in(in), out(out), images(images), blocks(network.blocks(images)),
          first(std::min(images, blocks * network.lanes)), next_image(first), next_tail(blocks) {
        if (blocks) network.prepare_blocks();
        if (first < images) network.prepare_images();
        // a block takes as long as two or three images, however many it has
        if (images - first < 3) return;
        for (const int64_t scalars : network.kept()) memory.emplace_back(images * scalars);
        for (auto& values : memory) kept.push_back(values.data());
        if (!kept.empty()) network.prepare_tail();
    }
};

// One each while there is one for every thread, then all threads on each: blocks, then images, then
// these ones' tails
void run_part(void* argument, int worker) {
    Call& call = *(Call*)argument;
    Network& network = call.network;
    const int threads = network.threads;
    const auto shared = [&](std::atomic<int64_t>& next, int64_t first, int64_t last, auto run) {
        const int64_t alone = last - (last - first) % threads;
        for (int64_t i; (i = next.fetch_add(1)) < alone;) run(i, Part{worker, 0, 1, call.barrier});
        if (alone == last) return;
        call.barrier.wait(threads);
        for (int64_t i = alone; i < last; ++i) run(i, Part{0, worker, threads, call.barrier});
    };
    shared(call.next_block, 0, call.blocks, [&](int64_t block, const Part& by) {
        network.run_block(call.in, call.out, call.images, block, by);
    });
    float* const* kept = call.kept.empty() ? nullptr : call.kept.data();
    shared(call.next_image, call.first, call.images, [&](int64_t image, const Part& by) {
        network.run_image(call.in, call.out, kept, image, by);
    });
    if (!kept) return;
    call.barrier.wait(threads);
    const int64_t last = (call.images + network.lanes - 1) / network.lanes;
    shared(call.next_tail, call.blocks, last, [&](int64_t block, const Part& by) {
        network.run_tail(kept, call.out, call.images, block, by);
    });
}

// A network of values of T, or null where there is no memory
template <class T>
Network* planned(const Op* ops, int n_ops, const Tensor* tensors, int n_tensors, const Slot* slots,
                 int n_slots, int halo, int threads) try {
    return new Planned<T>(Plan{{ops, ops + n_ops},
                               {tensors, tensors + n_tensors},
                               {slots, slots + n_slots},
                               halo,
                               threads});
} catch (const std::bad_alloc&) {
    return nullptr;
}

}  // namespace

extern "C" {

// Channels of a chunk of a conv with so many taps, of single images; 0: its kernels go by channel
int explib_tap_chunk(int taps) { return tap_chunk_channels(taps); }

// 0, or 1 where memory or threads are short. in: one NCHW float array per LOAD argument; out: per
// STORE.
int explib_run(void* handle, const float* const* in, float* const* out, int64_t images) try {
    Network* network = (Network*)handle;
    std::lock_guard<std::mutex> lock(Pool::get().callers);
    Call call(*network, in, out, images);
    run_on_threads(network->threads, run_part, &call);
    return 0;
} catch (const std::exception&) {
    return 1;
}

void explib_free(void* handle) { delete (Network*)handle; }
}
