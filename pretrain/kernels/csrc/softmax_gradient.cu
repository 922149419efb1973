// Cross entropy of rows of logits, and their gradient in place of them: one block a row. See ../softmax_gradient.py.
//
// The first pass over a row keeps a running maximum and the sum of exponentials relative to it (Milakov and Gimelshein
// 2018), the second one writes p; it reads the row out of the L2 cache. A row of an odd vocabulary begins anywhere, so
// elements up to the next 16-byte border and after the last one are handled one by one.
#include "gpu.cuh"

#include <cfloat>

namespace {

constexpr int ROW_THREADS = 512;

__device__ __forceinline__ float exponential(float x, float) { return expf(x); }
__device__ __forceinline__ float exponential(float x, __nv_bfloat16) { return __expf(x); }  // exact beyond its dtype
__device__ __forceinline__ float exponential(float x, __half) { return __expf(x); }

struct Running {
    float largest, sum;  // of exp(value - largest)
};

template <typename T>
__device__ __forceinline__ Running merged(Running a, Running b) {
    const float largest = fmaxf(a.largest, b.largest);
    return {largest,
            a.sum * exponential(a.largest - largest, T()) + b.sum * exponential(b.largest - largest, T())};
}

// Over all threads of the block, the same in each.
template <typename T>
__device__ __forceinline__ Running merged_over_block(Running mine) {
    __shared__ float largest[32], sum[32];
    for (int step = 16; step; step /= 2)
        mine = merged<T>(mine, {__shfl_xor_sync(0xffffffff, mine.largest, step),
                                __shfl_xor_sync(0xffffffff, mine.sum, step)});
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) largest[warp] = mine.largest, sum[warp] = mine.sum;
    __syncthreads();
    mine = lane < ROW_THREADS / 32 ? Running{largest[lane], sum[lane]} : Running{-FLT_MAX, 0.0f};
    for (int step = 16; step; step /= 2)
        mine = merged<T>(mine, {__shfl_xor_sync(0xffffffff, mine.largest, step),
                                __shfl_xor_sync(0xffffffff, mine.sum, step)});
    return mine;
}

// `on_pack(first, float[VEC])` or `on_element(i, float)` for all of a row; with `is_written` what they leave is stored.
template <int VEC, bool is_written, typename T, typename OnPack, typename OnElement>
__device__ __forceinline__ void over_row(T* row, int vocab, OnPack on_pack, OnElement on_element) {
    const int past = int(reinterpret_cast<uintptr_t>(row) % VECTOR_BYTES);
    const int to_border = past ? int((VECTOR_BYTES - past) / sizeof(T)) : 0;
    const int head = to_border < vocab ? to_border : vocab;
    const int packs = (vocab - head) / VEC, tail = head + packs * VEC;
    for (int i = threadIdx.x; i < packs; i += ROW_THREADS) {
        Pack<T, VEC> pack = load<VEC>(row + head + i * VEC);
        float value[VEC];
#pragma unroll
        for (int j = 0; j < VEC; ++j) value[j] = to_float(pack.at[j]);
        on_pack(head + i * VEC, value);
        if constexpr (is_written) {
#pragma unroll
            for (int j = 0; j < VEC; ++j) pack.at[j] = from_float<T>(value[j]);
            store(row + head + i * VEC, pack);
        }
    }
    // fewer than VEC elements before the first pack and after the last one
    const int single = threadIdx.x < head ? threadIdx.x : tail + int(threadIdx.x) - head;
    if (single >= vocab) return;
    float value = to_float(row[single]);
    on_element(single, value);
    if constexpr (is_written) row[single] = from_float<T>(value);
}

template <typename T>
__global__ void __launch_bounds__(ROW_THREADS) softmax_gradient(T* logits, const int64_t* targets, float* losses,
                                                                int vocab, float smoothing, float z_loss,
                                                                bool is_gradient_wanted) {
    constexpr int VEC = VECTOR_BYTES / sizeof(T);
    T* row = logits + int64_t(blockIdx.x) * vocab;
    const int64_t target = targets[blockIdx.x];
    const float of_target = to_float(row[target]);
    Running running{-FLT_MAX, 0.0f};
    float total = 0.0f;
    over_row<VEC, false>(
        row, vocab,
        [&](int, const float value[VEC]) {
            float largest = value[0];
#pragma unroll
            for (int j = 1; j < VEC; ++j) largest = fmaxf(largest, value[j]);
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                sum += exponential(value[j] - largest, T());
                total += value[j];
            }
            running = merged<T>(running, {largest, sum});
        },
        [&](int, float value) {
            running = merged<T>(running, {value, 1.0f});
            total += value;
        });
    running = merged_over_block<T>(running);  // and so all have read the target's logit before it is overwritten
    const float log_sum = logf(running.sum), log_z = running.largest + log_sum;
    if (smoothing > 0.0f) total = row_sum(total);
    if (threadIdx.x == 0) {
        float* out = losses + 3 * int64_t(blockIdx.x);
        out[0] = log_sum - (of_target - running.largest);
        out[1] = smoothing > 0.0f ? log_sum - (total / float(vocab) - running.largest) : 0.0f;
        out[2] = z_loss > 0.0f ? log_z * log_z : 0.0f;
    }
    if (!is_gradient_wanted) return;
    const float factor = (1.0f + 2.0f * z_loss * log_z) / running.sum;
    const float everywhere = smoothing / float(vocab), at_target = 1.0f - smoothing;
    const auto gradient = [&](int i, float value) {
        return factor * exponential(value - running.largest, T()) - everywhere - (i == target ? at_target : 0.0f);
    };
    over_row<VEC, true>(
        row, vocab,
        [&](int first, float value[VEC]) {
#pragma unroll
            for (int j = 0; j < VEC; ++j) value[j] = gradient(first + j, value[j]);
        },
        [&](int i, float& value) { value = gradient(i, value); });
}

}  // namespace

// logits (rows, vocab), contiguous, become the gradient; targets (rows,) in [0, vocab); losses (rows, 3).
extern "C" int softmax_gradient_in_place(void* stream, int64_t dtype, void* logits, const int64_t* targets,
                                         float* losses, int64_t rows, int64_t vocab, float smoothing, float z_loss,
                                         int64_t is_gradient_wanted) {
    if (rows == 0) return cudaSuccess;
    if (vocab < 1 || vocab > INT32_MAX || rows > INT32_MAX) return cudaErrorInvalidConfiguration;
    return with_type(dtype, [&](auto zero) -> int {
        using T = decltype(zero);
        return launch(stream, dim3(unsigned(rows)), dim3(ROW_THREADS), softmax_gradient<T>, (T*)logits, targets, losses,
                      int(vocab), smoothing, z_loss, is_gradient_wanted != 0);
    });
}
