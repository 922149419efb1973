// The second stage of every gradient that is a sum over rows: no atomics, so the same bits every time.
#pragma once
#include "gpu.cuh"

constexpr int SUMMED_COLUMNS = 32, SUMMING_ROWS = 32;

// out[column] = the sum over rows of partial (rows, columns), always in the same order.
template <typename T>
__global__ void __launch_bounds__(SUMMED_COLUMNS* SUMMING_ROWS)
    column_sums(const float* partial, T* out, int rows, int columns) {
    __shared__ float sums[SUMMING_ROWS][SUMMED_COLUMNS + 1];
    const int column = blockIdx.x * SUMMED_COLUMNS + threadIdx.x;
    float sum = 0.0f;
    if (column < columns)
        for (int row = threadIdx.y; row < rows; row += SUMMING_ROWS) sum += partial[int64_t(row) * columns + column];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    // Each warp sums one column: its lanes are the rows.
    sum = warp_sum(sums[threadIdx.x][threadIdx.y]);
    const int summed = blockIdx.x * SUMMED_COLUMNS + threadIdx.y;
    if (threadIdx.x == 0 && summed < columns) out[summed] = from_float<T>(sum);
}

template <typename T>
int sum_columns(void* stream, const float* partial, T* out, int rows, int columns) {
    const dim3 grid((columns + SUMMED_COLUMNS - 1) / SUMMED_COLUMNS), block(SUMMED_COLUMNS, SUMMING_ROWS);
    return launch(stream, grid, block, column_sums<T>, partial, out, rows, columns);
}
