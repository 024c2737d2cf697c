// Runs a planned network with its surviving kernels only: one call, no allocation between ops.
//
// Many images go in blocks (interleaved.h): each thread takes a block through the whole network, so
// that it stays in its cache. Few go one by one (spatial.h). Scalars are float or, where the
// processor multiplies them, _Float16 or bfloat16: that one in blocks only, with sums in float.
#include <exception>

#include "interleaved.h"
#include "spatial.h"

namespace {

constexpr int64_t LARGEST_BLOCK = 16 << 20;  // bytes of a value

enum Type { FLOAT32, FLOAT16, BFLOAT16, INT8 };

struct Network {
    virtual ~Network() = default;
    virtual bool interleave(int64_t images) const = 0;
    virtual void prepare(bool interleaved) = 0;
    virtual int64_t blocks(int64_t images) const = 0;
    virtual void run_block(int worker, const float* const* in, float* const* out, int64_t images,
                           int64_t block, int part, int parts, Barrier& barrier) = 0;
    virtual void run_image(int worker, const float* const* in, float* const* out, int64_t image,
                           int part, int parts, Barrier& barrier) = 0;
    int threads = 1;
};

template <class T>
class Planned : public Network {
    const Plan plan;
    Blocks<T> by_block;
    Images<typename Types<T>::Scalar> by_image;

  public:
    explicit Planned(Plan given) : plan(std::move(given)), by_block(plan), by_image(plan) {
        threads = plan.threads;
    }

    // Blocks whose lanes are mostly full; with fewer images, and where the maps of a block are so
    // large that no cache holds them, images go one by one (which bfloat16 would not compute in)
    bool interleave(int64_t images) const override {
        if (sizeof(T) == sizeof(typename Types<T>::Scalar) && by_block.largest() > LARGEST_BLOCK)
            return false;
        return 3 * blocks(images) * Types<T>::lanes <= 5 * images;  // of the lanes 3 in 5 are used
    }
    int64_t blocks(int64_t images) const override {
        return (images + Types<T>::lanes - 1) / Types<T>::lanes;
    }

    void prepare(bool interleaved) override {
        interleaved ? by_block.prepare() : by_image.prepare();
    }

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
    int64_t images;
    bool interleaved;
    std::atomic<int64_t> next{0};
    Barrier barrier{};
};

void run_part(void* argument, int worker) {
    Call& call = *(Call*)argument;
    Network& network = *call.network;
    if (call.interleaved) {
        // a block each while there is one for every thread, then all threads on each
        const int64_t blocks = network.blocks(call.images), alone = blocks - blocks % network.threads;
        for (int64_t b; (b = call.next.fetch_add(1)) < alone;)
            network.run_block(worker, call.in, call.out, call.images, b, 0, 1, call.barrier);
        call.barrier.wait(network.threads);
        for (int64_t b = alone; b < blocks; ++b)
            network.run_block(0, call.in, call.out, call.images, b, worker, network.threads,
                              call.barrier);
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
// Channels of a chunk of a 1x1 conv whose kernels are in `weight`, or in `pair_weight`
int explib_chunk(int type, int pairs) {
    if (type == FLOAT16) return chunk<float>() * 2;
    return chunk<float>() * (pairs ? 2 : 1);
}
// Channels of a chunk of an int8 conv with outputs (height, width), whose kernels stand together
int explib_byte_chunk(int kernel, int stride, int height, int width, int channels) {
    return byte_chunk(kernel, stride, height, width, channels);
}
int explib_computes(int type) {
    return type == FLOAT32 || type == INT8 || (type == FLOAT16 && HALF) ||
           (type == BFLOAT16 && BRAIN);
}

void* explib_new(const Op* ops, int n_ops, const Tensor* tensors, int n_tensors, const Slot* slots,
                 int n_slots, int halo, int threads, int type) try {
    Plan plan{{ops, ops + n_ops},
              {tensors, tensors + n_tensors},
              {slots, slots + n_slots},
              halo,
              threads};
#if HALF
    if (type == FLOAT16) return static_cast<Network*>(new Planned<_Float16>(std::move(plan)));
#endif
#if BRAIN
    if (type == BFLOAT16) return static_cast<Network*>(new Planned<Brain>(std::move(plan)));
#endif
    if (type == INT8) return static_cast<Network*>(new Planned<Byte>(std::move(plan)));
    return type == FLOAT32 ? static_cast<Network*>(new Planned<float>(std::move(plan))) : nullptr;
} catch (const std::bad_alloc&) {
    return nullptr;
}

// 0, or 1 where memory or threads are short. in: one NCHW float array per LOAD argument; out: per
// STORE.
int explib_run(void* handle, const float* const* in, float* const* out, int64_t images) try {
    Network* network = (Network*)handle;
    std::lock_guard<std::mutex> lock(Pool::get().callers);
    Call call{network, in, out, images, network->interleave(images)};
    network->prepare(call.interleaved);
    run_on_threads(network->threads, run_part, &call);
    return 0;
} catch (const std::exception&) {
    return 1;
}

void explib_free(void* handle) { delete (Network*)handle; }
}
