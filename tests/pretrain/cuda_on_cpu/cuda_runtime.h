// As much of CUDA as the kernels in pretrain/kernels/csrc use, on a CPU, with g++ in nvcc's place: what a kernel computes
// is tested without a GPU. How fast it is, and how a GPU orders memory accesses between blocks, is not.
//
// The threads of a block are fibers that take turns: each runs until it waits in a barrier or a shuffle, in ascending or
// in descending order (`emulation_order`). A kernel that forgets a barrier therefore gives other numbers in one of the
// two orders; one whose barrier not all threads reach stops with an error instead of hanging. Shared memory keeps what
// the block before left there, as on a GPU. Blocks run one after the other, also in either order.
#pragma once
#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <vector>
#include <ucontext.h>

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr size_t STACK_BYTES = 1 << 16;

struct Barrier {  // of a block, or of a warp, with what its lanes hand each other
    unsigned present = 0, waiting = 0, generation = 0;
    float lanes[32];
};

struct Fiber {
    dim3 thread;
    Barrier* warp;
    jmp_buf at;
    ucontext_t context;
    bool begun = false, ended = false;
};

inline bool descending = false;
inline Fiber* current;
inline Barrier block;
inline jmp_buf scheduler;
inline unsigned long progress;
inline const std::function<void()>* kernel;

inline void yield() {
    if (!_setjmp(current->at)) _longjmp(scheduler, 1);
}

inline void release_if_complete(Barrier& barrier) {
    if (barrier.waiting < barrier.present || !barrier.present) return;
    barrier.waiting = 0;
    ++barrier.generation;
}

inline void wait(Barrier& barrier) {
    const unsigned generation = barrier.generation;
    ++progress;
    ++barrier.waiting;
    release_if_complete(barrier);
    while (barrier.generation == generation) yield();
}

inline void run_fiber() {
    (*kernel)();
    ++progress;
    current->ended = true;
    --block.present;  // a thread that has ended is not waited for in __syncthreads; a shuffle needs its whole warp
    release_if_complete(block);
    _longjmp(scheduler, 1);
}

inline void resume(Fiber& fiber, char* stack) {
    current = &fiber;
    threadIdx = fiber.thread;
    if (_setjmp(scheduler)) return;
    if (fiber.begun) _longjmp(fiber.at, 1);
    fiber.begun = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack = {stack, 0, STACK_BYTES};
    makecontext(&fiber.context, run_fiber, 0);
    setcontext(&fiber.context);
}

inline bool run_block() {
    static std::vector<char> stacks;
    const unsigned count = blockDim.x * blockDim.y * blockDim.z;
    if (stacks.size() < count * STACK_BYTES) stacks.resize(count * STACK_BYTES);
    std::vector<Fiber> fibers(count);
    std::vector<Barrier> warps((count + 31) / 32);
    block = Barrier{count};
    for (unsigned i = 0; i < count; ++i) {
        fibers[i].thread = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
        fibers[i].warp = &warps[i / 32];
        ++warps[i / 32].present;
    }
    for (unsigned ended = 0; ended < count;) {
        const unsigned long before = progress;
        ended = 0;
        for (unsigned turn = 0; turn < count; ++turn) {
            const unsigned i = descending ? count - 1 - turn : turn;
            if (!fibers[i].ended) resume(fibers[i], stacks.data() + i * STACK_BYTES);
            ended += fibers[i].ended;
        }
        if (progress == before) {
            std::fprintf(stderr, "a barrier or shuffle that not all threads of the block or warp reach\n");
            return false;
        }
    }
    return true;
}

inline cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& body) {
    const dim3 grid = config.gridDim, threads = config.blockDim;
    const unsigned long size = 1ul * threads.x * threads.y * threads.z;
    if (!size || size > 1024 || !grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535)
        return cudaErrorInvalidConfiguration;
    kernel = &body;
    gridDim = grid;
    blockDim = threads;
    const unsigned long blocks = 1ul * grid.x * grid.y * grid.z;
    for (unsigned long turn = 0; turn < blocks; ++turn) {
        const unsigned long i = descending ? blocks - 1 - turn : turn;
        blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
        if (!run_block()) return cudaErrorLaunchFailure;
    }
    return cudaSuccess;
}

}  // namespace emulation

extern "C" __attribute__((used)) inline void emulation_order(int descending) { emulation::descending = descending; }

template <typename... Expected, typename... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... arguments) {
    return emulation::launch(*config, [&] { kernel(Expected(arguments)...); });
}

inline void __syncthreads() { emulation::wait(emulation::block); }

inline float __shfl_xor_sync(unsigned, float value, int lane_mask) {
    emulation::Barrier& warp = *emulation::current->warp;
    const unsigned lane = (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32;
    warp.lanes[lane] = value;
    emulation::wait(warp);
    const float other = warp.lanes[lane ^ lane_mask];
    emulation::wait(warp);
    return other;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
