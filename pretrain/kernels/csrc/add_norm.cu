// y = norm(s), s = residual + dropout(x): forward and backward in one pass over the rows each. See ../add_norm.py.
#include "norm_rows.cuh"

namespace {

template <typename T>
struct AddedRows {  // forward: s, rounded as it is stored
    const T *x, *residual;  // residual may be null
    int columns;
    Dropout dropout;

    template <int VEC>
    __device__ __forceinline__ Pack<T, VEC> read(int64_t row, int column) const {
        const int64_t at = row * columns + column;
        Pack<T, VEC> value = load<VEC>(x + at), other;
        if (residual) other = load<VEC>(residual + at);
        float factor[VEC];
        if (dropout.threshold) dropout.factors<VEC>(at, factor);
        if (!residual && !dropout.threshold) return value;
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            float sum = to_float(value.at[j]);
            if (dropout.threshold) sum *= factor[j];
            if (residual) sum += to_float(other.at[j]);
            value.at[j] = from_float<T>(sum);
        }
        return value;
    }
};

template <typename T>
struct StoredRows {  // backward: s as forward left it
    const T* sum;
    int columns;

    template <int VEC>
    __device__ __forceinline__ Pack<T, VEC> read(int64_t row, int column) const {
        return load<VEC>(sum + row * columns + column);
    }
};

template <typename T>
struct AddedGradients {
    T *grad_residual, *grad_x;  // grad_x is null where dropout does not tell them apart
    int columns;
    Dropout dropout;

    template <int VEC>
    __device__ __forceinline__ void write(int64_t row, int column, float gradient[VEC]) const {
        const int64_t at = row * columns + column;
        Pack<T, VEC> written;
        if (grad_residual) {
#pragma unroll
            for (int j = 0; j < VEC; ++j) written.at[j] = from_float<T>(gradient[j]);
            store(grad_residual + at, written);
        }
        if (!grad_x) return;
        float factor[VEC];
        dropout.factors<VEC>(at, factor);
#pragma unroll
        for (int j = 0; j < VEC; ++j) written.at[j] = from_float<T>(gradient[j] * factor[j]);
        store(grad_x + at, written);
    }
};

}  // namespace

extern "C" int add_norm_forward(void* stream, int64_t dtype, const void* x, const void* residual, const void* weight,
                                const void* bias, void* y, void* sum, float* mean, float* rstd, int64_t rows,
                                int64_t columns, float eps, const int64_t* seed, int64_t threshold) {
    if (rows == 0) return cudaSuccess;
    if (columns < 1 || columns > MAX_COLUMNS) return cudaErrorInvalidConfiguration;
    return with_type(dtype, [&](auto zero) -> int {
        using T = decltype(zero);
        constexpr int VEC = VECTOR_BYTES / sizeof(T);
        const Norm<T> norm{(const T*)weight, (const T*)bias, mean, rstd, (T*)sum, (T*)y, rows, int(columns), eps};
        const AddedRows<T> source{(const T*)x, (const T*)residual, int(columns), {seed, int(threshold)}};
        const dim3 block = norm_block(int(columns)), grid(unsigned((rows + block.y - 1) / block.y));
        const bool fits = columns % VEC == 0 && is_aligned(x) && is_aligned(residual) && is_aligned(weight) &&
                          is_aligned(bias) && is_aligned(y) && is_aligned(sum);
        const auto wide = norm_forward<T, VEC, AddedRows<T>, Unchanged>;
        const auto narrow = norm_forward<T, 1, AddedRows<T>, Unchanged>;
        return launch(stream, grid, block, fits ? wide : narrow, norm, source, Unchanged{});
    });
}

// partial: (1 or 2, blocks, columns) float, the second only with grad_bias. Rows go to `blocks` blocks in turn.
extern "C" int add_norm_backward(void* stream, int64_t dtype, const void* grad_y, const void* grad_sum, const void* sum,
                                 const void* weight, const float* mean, const float* rstd, void* grad_residual,
                                 void* grad_x, void* grad_weight, void* grad_bias, float* partial, int64_t blocks,
                                 int64_t rows, int64_t columns, const int64_t* seed, int64_t threshold) {
    if (columns < 1 || columns > MAX_COLUMNS || blocks < 1) return cudaErrorInvalidConfiguration;
    return with_type(dtype, [&](auto zero) -> int {
        using T = decltype(zero);
        constexpr int VEC = VECTOR_BYTES / sizeof(T);
        float* partial_bias = grad_bias ? partial + int64_t(blocks) * columns : nullptr;
        const NormGradient<T> norm{(const T*)weight, mean,    rstd,        (const T*)grad_y, (const T*)grad_sum,
                                   partial,          partial_bias, rows, int(columns)};
        const StoredRows<T> source{(const T*)sum, int(columns)};
        const AddedGradients<T> target{(T*)grad_residual, (T*)grad_x, int(columns), {seed, int(threshold)}};
        const bool fits = columns % VEC == 0 && is_aligned(grad_y) && is_aligned(grad_sum) && is_aligned(sum) &&
                          is_aligned(weight) && is_aligned(grad_residual) && is_aligned(grad_x);
        const auto wide = norm_backward<T, VEC, StoredRows<T>, Unchanged, AddedGradients<T>>;
        const auto narrow = norm_backward<T, 1, StoredRows<T>, Unchanged, AddedGradients<T>>;
        int error = launch(stream, dim3(unsigned(blocks)), norm_block(int(columns)), fits ? wide : narrow, norm, source, Unchanged{},
                           target);
        if (!error) error = sum_columns(stream, partial, (T*)grad_weight, int(blocks), int(columns));
        if (!error && grad_bias) error = sum_columns(stream, partial_bias, (T*)grad_bias, int(blocks), int(columns));
        return error;
    });
}
