// What all kernels share: 16-byte accesses, conversions, sums over a row's threads, random bits, launches.
//
// A `dtype` of the C interfaces is 0 for float, 1 for bfloat16, 2 for half. Everything is computed in float. Every
// function returns a cudaError_t, 0 for success; work is put onto `stream` and not waited for.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

constexpr int VECTOR_BYTES = 16;

template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
    T at[N];
};

template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load(const T* from) {
    return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <int N, typename T>
__device__ __forceinline__ void store(T* to, const Pack<T, N>& pack) {
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) { return value; }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) { return __float2bfloat16(value); }
template <>
__device__ __forceinline__ __half from_float<__half>(float value) { return __float2half(value); }

__device__ __forceinline__ float warp_sum(float value) {
    for (int step = 16; step; step /= 2) value += __shfl_xor_sync(0xffffffff, value, step);
    return value;
}

// The sum over the threads of threadIdx.y, the same in each. With more than a warp of them, blockDim.y must be 1.
__device__ __forceinline__ float row_sum(float value) {
    __shared__ float of_warp[32];
    value = warp_sum(value);
    if (blockDim.x == 32) return value;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) of_warp[warp] = value;
    __syncthreads();
    value = warp_sum(lane < blockDim.x / 32 ? of_warp[lane] : 0.0f);
    __syncthreads();  // nobody writes the next sum while somebody still reads this one
    return value;
}

// Philox 4x32-10 (Salmon et al. 2011): 128 random bits as a function of (key, counter), so that a backward pass makes
// the forward pass's bits again in place of reading them.
__device__ __forceinline__ void philox(uint64_t key, uint64_t counter, uint32_t bits[4]) {
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    uint32_t c0 = uint32_t(counter), c1 = uint32_t(counter >> 32), c2 = 0, c3 = 0;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint64_t low = uint64_t(0xD2511F53u) * c0, high = uint64_t(0xCD9E8D57u) * c2;
        c0 = uint32_t(high >> 32) ^ c1 ^ k0;
        c1 = uint32_t(high);
        c2 = uint32_t(low >> 32) ^ c3 ^ k1;
        c3 = uint32_t(low);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    bits[0] = c0, bits[1] = c1, bits[2] = c2, bits[3] = c3;
}

// Dropout: element e of a tensor is kept where its 16 random bits are not below `threshold` = p x 2^16, and is then
// divided by the probability of that. One Philox block serves 8 elements.
struct Dropout {
    const int64_t* seed;
    int threshold;  // 0: no dropout, and no seed

    // The factors, 0 or 1 / (1 - p), of N elements from `first` on; N divides 8, and first is a multiple of N.
    template <int N>
    __device__ __forceinline__ void factors(int64_t first, float factor[N]) const {
        uint32_t bits[4];
        philox(uint64_t(*seed), uint64_t(first) / 8, bits);
        const float kept = threshold < 65536 ? 65536.0f / float(65536 - threshold) : 0.0f;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int part = (N == 8 ? 0 : int(first & 7)) + i;
            uint32_t word = bits[0];
#pragma unroll
            for (int other = 1; other < 4; ++other) word = part / 2 == other ? bits[other] : word;
            factor[i] = int(word >> (16 * (part & 1)) & 0xffff) >= threshold ? kept : 0.0f;
        }
    }
};

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % VECTOR_BYTES == 0; }

// `call(T())` with the type that `dtype` stands for.
template <typename Call>
int with_type(int64_t dtype, Call call) {
    if (dtype == 0) return call(float());
    if (dtype == 1) return call(__nv_bfloat16());
    if (dtype == 2) return call(__half());
    return cudaErrorInvalidConfiguration;
}

template <typename... Expected, typename... Actual>
int launch(void* stream, dim3 grid, dim3 block, void (*kernel)(Expected...), Actual... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}
