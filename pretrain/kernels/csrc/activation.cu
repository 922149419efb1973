// out = act(x + bias), or act(gate + bias) * (up + bias): forward and backward. See ../activation.py.
//
// A thread has the same columns in all of its rows, so it reads the bias once, and the bias's gradient is a sum in its
// registers, then over blocks (column_sums.cuh). The pointers are __restrict__, so that a row can be loaded before the
// last one is stored.
#include <type_traits>

#include "column_sums.cuh"

namespace {

constexpr int TILE_THREADS = 128;

enum Kind { GELU_TANH, GELU, SILU };

// tanh by one exponential: exact where it matters, 1 + tanh, and 1 or -1 where the exponential overflows
__device__ __forceinline__ float tanh_by_exp(float x) { return 1.0f - __fdividef(2.0f, 1.0f + expf(2.0f * x)); }

template <int KIND>
__device__ __forceinline__ float activated(float x) {
    if (KIND == SILU) return x / (1.0f + expf(-x));
    if (KIND == GELU) return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    return 0.5f * x * (1.0f + tanh_by_exp(0.79788456f * (x + 0.044715f * x * x * x)));
}

template <int KIND>
__device__ __forceinline__ float slope(float x) {
    if (KIND == SILU) {
        const float s = 1.0f / (1.0f + expf(-x));
        return s * (1.0f + x * (1.0f - s));
    }
    if (KIND == GELU) return 0.5f * (1.0f + erff(x * 0.70710678f)) + x * 0.39894228f * expf(-0.5f * x * x);
    const float t = tanh_by_exp(0.79788456f * (x + 0.044715f * x * x * x));
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.79788456f * (1.0f + 3.0f * 0.044715f * x * x);
}

template <typename T, int VEC>
__device__ __forceinline__ void read(const T* from, float value[VEC]) {
    const Pack<T, VEC> pack = load<VEC>(from);
#pragma unroll
    for (int j = 0; j < VEC; ++j) value[j] = to_float(pack.at[j]);
}

template <typename T, int VEC>
__device__ __forceinline__ void write(T* to, const float value[VEC]) {
    Pack<T, VEC> pack;
#pragma unroll
    for (int j = 0; j < VEC; ++j) pack.at[j] = from_float<T>(value[j]);
    store(to, pack);
}

// x (rows, columns), or gated (rows, 2 columns): gate, then up. out (rows, columns).
template <typename T, int VEC, int KIND, bool GATED>
__global__ void __launch_bounds__(TILE_THREADS)
    activation_forward(const T* __restrict__ x, const T* __restrict__ bias, T* __restrict__ out, int64_t rows,
                       int columns) {
    const int column = (blockIdx.x * TILE_THREADS + threadIdx.x) * VEC;
    if (column >= columns) return;
    const int64_t width = GATED ? 2 * int64_t(columns) : columns;
    float of_gate[VEC] = {}, of_up[VEC] = {};
    if (bias) read<T, VEC>(bias + column, of_gate);
    if (bias && GATED) read<T, VEC>(bias + columns + column, of_up);
#pragma unroll 2
    for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
        float gate[VEC], up[VEC];
        read<T, VEC>(x + row * width + column, gate);
        if (GATED) read<T, VEC>(x + row * width + columns + column, up);
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            gate[j] = activated<KIND>(gate[j] + of_gate[j]);
            if (GATED) gate[j] *= up[j] + of_up[j];
        }
        write<T, VEC>(out + row * columns + column, gate);
    }
}

// partial (gridDim.y, columns or 2 columns), null without a bias.
template <typename T, int VEC, int KIND, bool GATED>
__global__ void __launch_bounds__(TILE_THREADS) activation_backward(const T* __restrict__ grad_out, const T* __restrict__ x,
                                                                    const T* __restrict__ bias, T* __restrict__ grad_x,
                                                                    float* __restrict__ partial, int64_t rows, int columns) {
    const int column = (blockIdx.x * TILE_THREADS + threadIdx.x) * VEC;
    if (column >= columns) return;
    const int64_t width = GATED ? 2 * int64_t(columns) : columns;
    float of_gate[VEC] = {}, of_up[VEC] = {}, sum_gate[VEC] = {}, sum_up[VEC] = {};
    if (bias) read<T, VEC>(bias + column, of_gate);
    if (bias && GATED) read<T, VEC>(bias + columns + column, of_up);
#pragma unroll 2
    for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
        float grad[VEC], gate[VEC], up[VEC];
        read<T, VEC>(grad_out + row * columns + column, grad);
        read<T, VEC>(x + row * width + column, gate);
        if (GATED) read<T, VEC>(x + row * width + columns + column, up);
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            const float before = gate[j] + of_gate[j];
            const float through = GATED ? grad[j] * (up[j] + of_up[j]) : grad[j];
            gate[j] = through * slope<KIND>(before);
            sum_gate[j] += gate[j];
            if (!GATED) continue;
            up[j] = grad[j] * activated<KIND>(before);
            sum_up[j] += up[j];
        }
        write<T, VEC>(grad_x + row * width + column, gate);
        if (GATED) write<T, VEC>(grad_x + row * width + columns + column, up);
    }
    if (!partial) return;
    partial += blockIdx.y * width + column;
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
        partial[j] = sum_gate[j];
        if (GATED) partial[columns + j] = sum_up[j];
    }
}

// `call(kind constant, gated constant)` for kind 0 GELU by tanh, 1 GELU by erf, 2 SiLU.
template <typename Call>
int with_kind(int64_t kind, bool gated, Call call) {
    using std::integral_constant;
    const auto with_gate = [&](auto k) -> int {
        return gated ? call(k, integral_constant<bool, true>()) : call(k, integral_constant<bool, false>());
    };
    if (kind == GELU_TANH) return with_gate(integral_constant<int, GELU_TANH>());
    if (kind == GELU) return with_gate(integral_constant<int, GELU>());
    if (kind == SILU) return with_gate(integral_constant<int, SILU>());
    return cudaErrorInvalidConfiguration;
}

template <int VEC>
dim3 tiles(int64_t columns, int64_t row_blocks) {
    const int64_t tile = int64_t(TILE_THREADS) * VEC;
    return dim3(unsigned((columns + tile - 1) / tile), unsigned(row_blocks));
}

}  // namespace

extern "C" int bias_activation_forward(void* stream, int64_t dtype, const void* x, const void* bias, void* out,
                                       int64_t rows, int64_t columns, int64_t row_blocks, int64_t kind, int64_t gated) {
    if (rows == 0 || columns == 0) return cudaSuccess;
    return with_type(dtype, [&](auto zero) -> int {
        using T = decltype(zero);
        constexpr int VEC = VECTOR_BYTES / sizeof(T);
        const bool fits = columns % VEC == 0 && is_aligned(x) && is_aligned(bias) && is_aligned(out);
        return with_kind(kind, gated != 0, [&](auto k, auto g) -> int {
            const auto wide = activation_forward<T, VEC, k.value, g.value>;
            const auto narrow = activation_forward<T, 1, k.value, g.value>;
            const dim3 grid = fits ? tiles<VEC>(columns, row_blocks) : tiles<1>(columns, row_blocks);
            return launch(stream, grid, dim3(TILE_THREADS), fits ? wide : narrow, (const T*)x, (const T*)bias, (T*)out,
                          rows, int(columns));
        });
    });
}

// partial (row_blocks, columns, twice that if gated) float; it and grad_bias are null without a bias.
extern "C" int bias_activation_backward(void* stream, int64_t dtype, const void* grad_out, const void* x,
                                        const void* bias, void* grad_x, void* grad_bias, float* partial, int64_t rows,
                                        int64_t columns, int64_t row_blocks, int64_t kind, int64_t gated) {
    if (columns == 0) return cudaSuccess;
    return with_type(dtype, [&](auto zero) -> int {
        using T = decltype(zero);
        constexpr int VEC = VECTOR_BYTES / sizeof(T);
        const bool fits = columns % VEC == 0 && is_aligned(grad_out) && is_aligned(x) && is_aligned(bias) &&
                          is_aligned(grad_x);
        return with_kind(kind, gated != 0, [&](auto k, auto g) -> int {
            const auto wide = activation_backward<T, VEC, k.value, g.value>;
            const auto narrow = activation_backward<T, 1, k.value, g.value>;
            const dim3 grid = fits ? tiles<VEC>(columns, row_blocks) : tiles<1>(columns, row_blocks);
            const int error = launch(stream, grid, dim3(TILE_THREADS), fits ? wide : narrow, (const T*)grad_out,
                                     (const T*)x, (const T*)bias, (T*)grad_x, partial, rows, int(columns));
            if (error || !partial) return error;
            return sum_columns(stream, partial, (T*)grad_bias, int(row_blocks), int(columns) * (g.value ? 2 : 1));
        });
    });
}
