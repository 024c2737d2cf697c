// A planned network with its surviving kernels only: one call, no allocation between ops.
//
// Many images go in blocks (interleaved.h): each thread takes a block through the whole network, so
// that it stays in its cache. Few go one by one (spatial.h). Scalars are float or, where the
// processor multiplies them, _Float16 or bfloat16: that one in blocks only, with sums in float.
#pragma once
#include <exception>

#include "interleaved.h"
#include "spatial.h"

namespace {

constexpr int64_t LARGEST_BLOCK = 16 << 20;  // bytes of a value

enum Type { FLOAT32, FLOAT16, BFLOAT16, INT8 };

struct Network {
    virtual ~Network() = default;
    virtual int64_t blocks(int64_t images) const = 0;  // that they go in; the others one by one
    virtual void prepare_blocks() = 0;
    virtual void prepare_images() = 0;
    virtual void run_block(int worker, const float* const* in, float* const* out, int64_t images,
                           int64_t block, int part, int parts, Barrier& barrier) = 0;
    virtual void run_image(int worker, const float* const* in, float* const* out, int64_t image,
                           int part, int parts, Barrier& barrier) = 0;
    int threads = 1, lanes = 1;  // images of a block
};

template <class T>
class Planned : public Network {
    const Plan plan;
    Blocks<T> by_block;
    // bfloat16 goes one by one as float
    using Alone = std::conditional_t<std::is_same_v<T, Byte>, T, typename Types<T>::Scalar>;
    Images<Alone> by_image;

  public:
    explicit Planned(Plan given) : plan(std::move(given)), by_block(plan), by_image(plan) {
        threads = plan.threads, lanes = Types<T>::lanes;
    }

    // Blocks whose lanes are mostly full. Where the maps of a block are so large that no cache holds
    // them, images go one by one (which bfloat16 would not compute in)
    int64_t blocks(int64_t images) const override {
        if (sizeof(T) == sizeof(Alone) && by_block.largest() > LARGEST_BLOCK) return 0;
        return images / lanes + (5 * (images % lanes) >= 3 * lanes);
    }

    void prepare_blocks() override { by_block.prepare(); }
    void prepare_images() override { by_image.prepare(); }

    void run_block(int worker, const float* const* in, float* const* out, int64_t images,
                   int64_t block, int part, int parts, Barrier& barrier) override {
        by_block.run(worker, in, out, images, block, part, parts, barrier);
    }

    void run_image(int worker, const float* const* in, float* const* out, int64_t image, int part,
                   int parts, Barrier& barrier) override {
        by_image.run(worker, in, out, image, part, parts, barrier);
    }
};

struct Call {
    Network* network;
    const float* const* in;
    float* const* out;
    int64_t images, blocks;
    std::atomic<int64_t> next_block{0}, next_image;
    Barrier barrier{};
};

// One each while there is one for every thread, then all threads on each: blocks, then images
void run_part(void* argument, int worker) {
    Call& call = *(Call*)argument;
    Network& network = *call.network;
    const int threads = network.threads;
    const auto shared = [&](std::atomic<int64_t>& next, int64_t first, int64_t last, auto run) {
        const int64_t alone = last - (last - first) % threads;
        for (int64_t i; (i = next.fetch_add(1)) < alone;) run(worker, i, 0, 1);
        if (alone == last) return;
        call.barrier.wait(threads);
        for (int64_t i = alone; i < last; ++i) run(0, i, worker, threads);
    };
    shared(call.next_block, 0, call.blocks, [&](int memory, int64_t b, int part, int parts) {
        network.run_block(memory, call.in, call.out, call.images, b, part, parts, call.barrier);
    });
    const int64_t first = std::min(call.images, call.blocks * network.lanes);
    shared(call.next_image, first, call.images, [&](int memory, int64_t i, int part, int parts) {
        network.run_image(memory, call.in, call.out, i, part, parts, call.barrier);
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

// 0, or 1 where memory or threads are short. in: one NCHW float array per LOAD argument; out: per
// STORE.
int explib_run(void* handle, const float* const* in, float* const* out, int64_t images) try {
    Network* network = (Network*)handle;
    std::lock_guard<std::mutex> lock(Pool::get().callers);
    Call call{network, in, out, images, network->blocks(images)};
    call.next_image = call.blocks * network->lanes;
    if (call.blocks) network->prepare_blocks();
    if (images > call.blocks * network->lanes) network->prepare_images();
    run_on_threads(network->threads, run_part, &call);
    return 0;
} catch (const std::exception&) {
    return 1;
}

void explib_free(void* handle) { delete (Network*)handle; }
}
