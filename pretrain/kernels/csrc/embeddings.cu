// dropout(LayerNorm(word[id] + position[p] + type[t])), and its gradients. See ../embeddings.py.
//
// A table's gradient is the sum of rows with equal ids. The ids come sorted. A block adds up CHUNK entries of that order,
// run by run; a run that goes on into the next chunk leaves its sum in `partial`, and the block of the chunk in which it
// began adds those up in a second kernel. Every sum has one order, so the bits are the same every time.
#include <cmath>

#include "norm_rows.cuh"

namespace {

constexpr int CHUNK = 32;    // entries
constexpr int LOADED = 4;    // of them at a time
constexpr int TILE_THREADS = 128;

template <typename T>
struct Table {
    const T* rows;
    const int64_t* ids;
    int64_t size;

    // A row that the table does not have is NaN: that shows, and reads nothing it should not.
    template <int VEC>
    __device__ __forceinline__ void add(int64_t token, int column, int columns, float sum[VEC]) const {
        const int64_t id = ids[token];
        const bool is_there = id >= 0 && id < size;
        const Pack<T, VEC> pack = load<VEC>(rows + (is_there ? id : 0) * columns + column);
#pragma unroll
        for (int j = 0; j < VEC; ++j) sum[j] += is_there ? to_float(pack.at[j]) : NAN;
    }
};

template <typename T>
struct EmbeddedRows {
    Table<T> word, position, type;
    int columns;

    template <int VEC>
    __device__ __forceinline__ Pack<T, VEC> read(int64_t row, int column) const {
        float sum[VEC] = {};
        word.template add<VEC>(row, column, columns, sum);
        position.template add<VEC>(row, column, columns, sum);
        type.template add<VEC>(row, column, columns, sum);
        Pack<T, VEC> value;
#pragma unroll
        for (int j = 0; j < VEC; ++j) value.at[j] = from_float<T>(sum[j]);
        return value;
    }
};

struct Dropped {
    Dropout dropout;
    int columns;

    template <int VEC>
    __device__ __forceinline__ void scale(int64_t row, int column, float value[VEC]) const {
        if (!dropout.threshold) return;
        float factor[VEC];
        dropout.factors<VEC>(row * columns + column, factor);
#pragma unroll
        for (int j = 0; j < VEC; ++j) value[j] *= factor[j];
    }
};

template <typename T>
struct StoredGradient {
    T* grad_rows;
    int columns;

    template <int VEC>
    __device__ __forceinline__ void write(int64_t row, int column, float gradient[VEC]) const {
        Pack<T, VEC> written;
#pragma unroll
        for (int j = 0; j < VEC; ++j) written.at[j] = from_float<T>(gradient[j]);
        store(grad_rows + row * columns + column, written);
    }
};

template <typename T, int VEC>
__device__ __forceinline__ void store_rounded(T* to, const float sum[VEC]) {
    Pack<T, VEC> written;
#pragma unroll
    for (int j = 0; j < VEC; ++j) written.at[j] = from_float<T>(sum[j]);
    store(to, written);
}

// partial (chunks, 2, columns): the sum of a run that came in from the chunk before, and of one that began here and goes
// on. Runs that do neither go to `out` at once.
template <typename T, int VEC>
__global__ void __launch_bounds__(TILE_THREADS)
    sum_runs(const T* rows, const int64_t* ids, const int64_t* order, T* out, float* partial, int64_t entries,
             int columns, int64_t skipped) {
    const int column = (blockIdx.y * TILE_THREADS + threadIdx.x) * VEC;
    if (column >= columns) return;
    const int64_t begin = int64_t(blockIdx.x) * CHUNK, end = begin + CHUNK < entries ? begin + CHUNK : entries;
    bool came_in = begin > 0 && ids[begin - 1] == ids[begin];
    float sum[VEC] = {};
    for (int64_t first = begin; first < end; first += LOADED) {
        Pack<T, VEC> loaded[LOADED];
#pragma unroll
        for (int k = 0; k < LOADED; ++k)
            if (first + k < end) loaded[k] = load<VEC>(rows + order[first + k] * columns + column);
#pragma unroll
        for (int k = 0; k < LOADED; ++k) {
            const int64_t i = first + k;
            if (i >= end) break;
#pragma unroll
            for (int j = 0; j < VEC; ++j) sum[j] += to_float(loaded[k].at[j]);
            const bool is_last = i + 1 == entries || ids[i + 1] != ids[i];
            if (!is_last && i + 1 < end) continue;
            if (is_last && !came_in) {
                if (ids[i] != skipped) store_rounded<T, VEC>(out + ids[i] * columns + column, sum);
            } else {
                float* to = partial + (int64_t(blockIdx.x) * 2 + (came_in ? 0 : 1)) * columns + column;
#pragma unroll
                for (int j = 0; j < VEC; ++j) to[j] = sum[j];
            }
            came_in = false;
#pragma unroll
            for (int j = 0; j < VEC; ++j) sum[j] = 0.0f;
        }
    }
}

template <typename T, int VEC>
__global__ void __launch_bounds__(TILE_THREADS)
    join_runs(const int64_t* ids, T* out, const float* partial, int64_t entries, int columns, int64_t skipped) {
    const int column = (blockIdx.y * TILE_THREADS + threadIdx.x) * VEC;
    const int64_t begin = int64_t(blockIdx.x) * CHUNK, end = begin + CHUNK;
    if (column >= columns || end >= entries) return;
    const int64_t id = ids[end - 1];
    const bool began_before = begin > 0 && ids[begin - 1] == id;
    if (ids[end] != id || began_before || id == skipped) return;
    int64_t last = blockIdx.x + 1;  // the last chunk that this run goes into
    while ((last + 1) * CHUNK < entries && ids[(last + 1) * CHUNK] == id) ++last;
    float sum[VEC];
    const float* own = partial + (int64_t(blockIdx.x) * 2 + 1) * columns + column;
#pragma unroll
    for (int j = 0; j < VEC; ++j) sum[j] = own[j];
#pragma unroll 8
    for (int64_t chunk = blockIdx.x + 1; chunk <= last; ++chunk) {
        const float* from = partial + chunk * 2 * columns + column;
#pragma unroll
        for (int j = 0; j < VEC; ++j) sum[j] += from[j];
    }
    store_rounded<T, VEC>(out + id * columns + column, sum);
}

template <typename T>
EmbeddedRows<T> embedded(const void* const tables[3], const int64_t* const ids[3], const int64_t sizes[3],
                         int64_t columns) {
    const auto table = [&](int i) { return Table<T>{(const T*)tables[i], ids[i], sizes[i]}; };
    return {table(0), table(1), table(2), int(columns)};
}

template <typename T>
bool are_rows_aligned(int64_t columns) {
    return columns > 0 && columns <= MAX_COLUMNS && columns % (VECTOR_BYTES / sizeof(T)) == 0;
}

}  // namespace

// Rows must be multiples of 16 bytes, and all tensors aligned to that.
extern "C" int embeddings_forward(void* stream, int64_t dtype, const void* word, const void* position, const void* type,
                                  const int64_t* ids, const int64_t* position_ids, const int64_t* type_ids,
                                  int64_t words, int64_t positions, int64_t types, const void* weight, const void* bias,
                                  void* y, float* mean, float* rstd, int64_t rows, int64_t columns, float eps,
                                  const int64_t* seed, int64_t threshold) {
    if (rows == 0) return cudaSuccess;
    return with_type(dtype, [&](auto zero) -> int {
        using T = decltype(zero);
        if (!are_rows_aligned<T>(columns)) return cudaErrorInvalidConfiguration;
        const void* tables[] = {word, position, type};
        const int64_t* all_ids[] = {ids, position_ids, type_ids};
        const int64_t sizes[] = {words, positions, types};
        const Norm<T> norm{(const T*)weight, (const T*)bias, mean, rstd, nullptr, (T*)y, rows, int(columns), eps};
        const dim3 block = norm_block(int(columns)), grid(unsigned((rows + block.y - 1) / block.y));
        return launch(stream, grid, block, norm_forward<T, VECTOR_BYTES / sizeof(T), EmbeddedRows<T>, Dropped>, norm,
                      embedded<T>(tables, all_ids, sizes, columns), Dropped{{seed, int(threshold)}, int(columns)});
    });
}

// grad_rows (rows, columns): of the sums of the three rows. partial (2, blocks, columns) float.
extern "C" int embeddings_backward(void* stream, int64_t dtype, const void* grad_y, const void* word,
                                   const void* position, const void* type, const int64_t* ids,
                                   const int64_t* position_ids, const int64_t* type_ids, int64_t words,
                                   int64_t positions, int64_t types, const void* weight, const float* mean,
                                   const float* rstd, void* grad_rows, void* grad_weight, void* grad_bias,
                                   float* partial, int64_t blocks, int64_t rows, int64_t columns, const int64_t* seed,
                                   int64_t threshold) {
    return with_type(dtype, [&](auto zero) -> int {
        using T = decltype(zero);
        if (!are_rows_aligned<T>(columns) || blocks < 1) return cudaErrorInvalidConfiguration;
        const void* tables[] = {word, position, type};
        const int64_t* all_ids[] = {ids, position_ids, type_ids};
        const int64_t sizes[] = {words, positions, types};
        float* partial_bias = partial + blocks * columns;
        const NormGradient<T> norm{(const T*)weight, mean,         rstd, (const T*)grad_y, nullptr,
                                   partial,          partial_bias, rows, int(columns)};
        const auto kernel =
            norm_backward<T, VECTOR_BYTES / sizeof(T), EmbeddedRows<T>, Dropped, StoredGradient<T>>;
        int error = launch(stream, dim3(unsigned(blocks)), norm_block(int(columns)), kernel, norm,
                           embedded<T>(tables, all_ids, sizes, columns), Dropped{{seed, int(threshold)}, int(columns)},
                           StoredGradient<T>{(T*)grad_rows, int(columns)});
        if (!error) error = sum_columns(stream, partial, (T*)grad_weight, int(blocks), int(columns));
        if (!error) error = sum_columns(stream, partial_bias, (T*)grad_bias, int(blocks), int(columns));
        return error;
    });
}

// out (table rows, columns), zero before, gets the sums of `rows` (entries, columns) by id; ids are sorted, and entry i of
// them belongs to row order[i]. The id `skipped` gets none. partial (ceil(entries / 32), 2, columns) float.
extern "C" int sum_rows_by_id(void* stream, int64_t dtype, const void* rows, const int64_t* ids, const int64_t* order,
                              void* out, float* partial, int64_t entries, int64_t columns, int64_t skipped) {
    if (entries == 0) return cudaSuccess;
    return with_type(dtype, [&](auto zero) -> int {
        using T = decltype(zero);
        constexpr int VEC = VECTOR_BYTES / sizeof(T);
        if (!are_rows_aligned<T>(columns)) return cudaErrorInvalidConfiguration;
        const dim3 grid(unsigned((entries + CHUNK - 1) / CHUNK),
                        unsigned((columns + TILE_THREADS * VEC - 1) / (TILE_THREADS * VEC)));
        int error = launch(stream, grid, dim3(TILE_THREADS), sum_runs<T, VEC>, (const T*)rows, ids, order, (T*)out,
                           partial, entries, int(columns), skipped);
        if (!error)
            error = launch(stream, grid, dim3(TILE_THREADS), join_runs<T, VEC>, ids, (T*)out, partial, entries,
                           int(columns), skipped);
        return error;
    });
}
