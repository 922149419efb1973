// LayerNorm and RMSNorm over rows that stay in registers, forward and backward, whatever the rows come from.
//
// A row belongs to blockDim.x threads, a warp up to 1,024 columns and a whole block beyond, each with up to ELEMENTS of
// its columns in registers: it is read once, and mean and variance are computed one after the other, which stays exact
// for rows far from zero. The backward pass lets each block go over many rows, so that the weights' gradients are summed
// up in registers first, then over the block's rows, then over blocks (column_sums.cuh).
//
// All of a row is loaded before anything of it is stored: the compiler may not move a load over a store, and a thread
// that waits for each of its loads in turn does not keep the memory busy.
#pragma once
#include "column_sums.cuh"

constexpr int ELEMENTS = 32;                 // of a row, in a thread's registers
constexpr int WARP_COLUMNS = 32 * ELEMENTS;  // the widest row for one warp
constexpr int THREADS = 256;                 // of a block, at most: beyond, registers would be spilled
constexpr int MAX_COLUMNS = THREADS * ELEMENTS;
constexpr int ROWS_PER_BLOCK = 8;  // where a row has one warp

template <typename T>
struct Norm {
    const T *weight, *bias;  // bias may be null
    float* mean;             // of each row, null for RMSNorm
    float* rstd;
    T* rows_out;  // where the rows themselves go; may be null
    T* out;
    int64_t rows;
    int columns;
    float eps;
};

template <typename T>
struct NormGradient {
    const T* weight;
    const float *mean, *rstd;  // mean is null for RMSNorm
    const T* grad_out;
    const T* grad_rows;                    // a gradient of the rows themselves, added; may be null
    float *partial_weight, *partial_bias;  // (blocks, columns); partial_bias may be null
    int64_t rows;
    int columns;
};

// The block's shape for rows of so many columns.
inline dim3 norm_block(int columns) {
    if (columns <= WARP_COLUMNS) return dim3(32, ROWS_PER_BLOCK);
    int threads = 64;
    while (threads * ELEMENTS < columns) threads *= 2;
    return dim3(threads);
}

// How many packs of a row are unrolled, so that they stay in registers. Rows that are no multiples of 16 bytes are read
// element by element; nobody trains with such a width, and unrolled they took half of the compile time.
template <int VEC>
constexpr int UNROLLED = VEC == 1 ? 1 : ELEMENTS;

// Column of a thread's pack number i. Packs of neighbours lie side by side.
template <int VEC>
__device__ __forceinline__ int column_of(int i) {
    return (i * blockDim.x + threadIdx.x) * VEC;
}

// `Source::read<VEC>(row, column)` gives VEC values of a row; `Sink::scale<VEC>(row, column, float[VEC])` changes what is
// written, for dropout.
template <typename T, int VEC, typename Source, typename Sink>
__global__ void __launch_bounds__(THREADS) norm_forward(Norm<T> norm, Source source, Sink sink) {
    constexpr int PACKS = ELEMENTS / VEC;
    const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= norm.rows) return;  // a whole warp, or none: with more threads a row there is one row a block
    Pack<T, VEC> value[PACKS];
#pragma unroll UNROLLED<VEC>
    for (int i = 0; i < PACKS; ++i)
        if (column_of<VEC>(i) < norm.columns) value[i] = source.template read<VEC>(row, column_of<VEC>(i));

    float mean = 0.0f;
    if (norm.mean) {
        float sum = 0.0f;
#pragma unroll UNROLLED<VEC>
        for (int i = 0; i < PACKS; ++i)
            if (column_of<VEC>(i) < norm.columns)
#pragma unroll
                for (int j = 0; j < VEC; ++j) sum += to_float(value[i].at[j]);
        mean = row_sum(sum) / float(norm.columns);
    }
    float squares = 0.0f;
#pragma unroll UNROLLED<VEC>
    for (int i = 0; i < PACKS; ++i)
        if (column_of<VEC>(i) < norm.columns)
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                const float centred = to_float(value[i].at[j]) - mean;
                squares += centred * centred;
            }
    const float rstd = rsqrtf(row_sum(squares) / float(norm.columns) + norm.eps);
    if (threadIdx.x == 0) {
        if (norm.mean) norm.mean[row] = mean;
        norm.rstd[row] = rstd;
    }

#pragma unroll UNROLLED<VEC>
    for (int i = 0; i < PACKS; ++i) {
        const int column = column_of<VEC>(i);
        if (column >= norm.columns) continue;
        const Pack<T, VEC> weight = load<VEC>(norm.weight + column);
        Pack<T, VEC> bias, written;
        if (norm.bias) bias = load<VEC>(norm.bias + column);
        float result[VEC];
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            result[j] = (to_float(value[i].at[j]) - mean) * rstd * to_float(weight.at[j]);
            if (norm.bias) result[j] += to_float(bias.at[j]);
        }
        sink.template scale<VEC>(row, column, result);
#pragma unroll
        for (int j = 0; j < VEC; ++j) written.at[j] = from_float<T>(result[j]);
        store(norm.out + row * norm.columns + column, written);
        if (norm.rows_out) store(norm.rows_out + row * norm.columns + column, value[i]);
    }
}

// A thread's sums for the weight's or bias's gradient, over the block's rows into partial (blocks, columns).
template <int VEC>
__device__ __forceinline__ void write_partial(const float mine[ELEMENTS], float* partial, int columns) {
    __shared__ float sums[ROWS_PER_BLOCK][WARP_COLUMNS];
    partial += int64_t(blockIdx.x) * columns;
    if (blockDim.y == 1) {
#pragma unroll UNROLLED<VEC>
        for (int i = 0; i < ELEMENTS; ++i)
            if (column_of<VEC>(i / VEC) + i % VEC < columns) partial[column_of<VEC>(i / VEC) + i % VEC] = mine[i];
        return;
    }
    __syncthreads();  // the sums of the other gradient have been read
#pragma unroll UNROLLED<VEC>
    for (int i = 0; i < ELEMENTS; ++i) sums[threadIdx.y][column_of<VEC>(i / VEC) + i % VEC] = mine[i];
    __syncthreads();
    for (int column = threadIdx.y * 32 + threadIdx.x; column < columns; column += 32 * ROWS_PER_BLOCK) {
        float sum = 0.0f;
#pragma unroll
        for (int row = 0; row < ROWS_PER_BLOCK; ++row) sum += sums[row][column];
        partial[column] = sum;
    }
}

// `Source` gives the normalised rows again, `Sink` the factors between the norm's own result and what forward wrote, and
// `Target::write<VEC>(row, column, float[VEC])` takes the rows' gradient.
//
//     x^ = (x - mean) rstd,  g = weight dy:   dx = rstd (g - mean(g) - x^ mean(g x^)),  without mean(g) for RMSNorm
template <typename T, int VEC, typename Source, typename Sink, typename Target>
__global__ void __launch_bounds__(THREADS)
    norm_backward(NormGradient<T> norm, Source source, Sink sink, Target target) {
    constexpr int PACKS = ELEMENTS / VEC;
    float of_weight[ELEMENTS], of_bias[ELEMENTS];
#pragma unroll UNROLLED<VEC>
    for (int i = 0; i < ELEMENTS; ++i) of_weight[i] = of_bias[i] = 0.0f;

    for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < norm.rows;
         row += int64_t(gridDim.x) * blockDim.y) {
        const float mean = norm.mean ? norm.mean[row] : 0.0f, rstd = norm.rstd[row];
        Pack<T, VEC> value[PACKS], grad[PACKS], more[PACKS];
#pragma unroll UNROLLED<VEC>
        for (int i = 0; i < PACKS; ++i) {
            const int column = column_of<VEC>(i);
            if (column >= norm.columns) continue;
            value[i] = source.template read<VEC>(row, column);
            grad[i] = load<VEC>(norm.grad_out + row * norm.columns + column);
            if (norm.grad_rows) more[i] = load<VEC>(norm.grad_rows + row * norm.columns + column);
        }
        float sum = 0.0f, product = 0.0f;
#pragma unroll UNROLLED<VEC>
        for (int i = 0; i < PACKS; ++i) {
            const int column = column_of<VEC>(i);
            if (column >= norm.columns) continue;
            const Pack<T, VEC> weight = load<VEC>(norm.weight + column);
            float of_out[VEC];
#pragma unroll
            for (int j = 0; j < VEC; ++j) of_out[j] = to_float(grad[i].at[j]);
            sink.template scale<VEC>(row, column, of_out);
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                const float normal = (to_float(value[i].at[j]) - mean) * rstd;
                const float weighted = of_out[j] * to_float(weight.at[j]);
                of_weight[i * VEC + j] += of_out[j] * normal;
                of_bias[i * VEC + j] += of_out[j];
                sum += weighted;
                product += weighted * normal;
            }
        }
        const float mean_of_gradient = norm.mean ? row_sum(sum) / float(norm.columns) : 0.0f;
        const float along_row = row_sum(product) / float(norm.columns);
#pragma unroll UNROLLED<VEC>
        for (int i = 0; i < PACKS; ++i) {
            const int column = column_of<VEC>(i);
            if (column >= norm.columns) continue;
            const Pack<T, VEC> weight = load<VEC>(norm.weight + column);
            float gradient[VEC];
#pragma unroll
            for (int j = 0; j < VEC; ++j) gradient[j] = to_float(grad[i].at[j]);
            sink.template scale<VEC>(row, column, gradient);
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                const float normal = (to_float(value[i].at[j]) - mean) * rstd;
                gradient[j] = rstd * (gradient[j] * to_float(weight.at[j]) - mean_of_gradient - normal * along_row);
                if (norm.grad_rows) gradient[j] += to_float(more[i].at[j]);
            }
            target.template write<VEC>(row, column, gradient);
        }
    }
    write_partial<VEC>(of_weight, norm.partial_weight, norm.columns);
    if (norm.partial_bias) write_partial<VEC>(of_bias, norm.partial_bias, norm.columns);
}

struct Unchanged {  // the sink without dropout
    template <int VEC>
    __device__ __forceinline__ void scale(int64_t, int, float[VEC]) const {}
};
