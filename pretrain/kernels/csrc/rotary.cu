// Rotary positions: pairs of a head's two halves rotated, heads from `rotated_heads` on copied. See ../rotary.py.
#include "gpu.cuh"

namespace {

constexpr int ROTARY_THREADS = 256;

// A thread has VEC pairs of a head. The angles of a token are read by all of its heads, so they come out of the cache.
template <typename T, int VEC>
__global__ void __launch_bounds__(ROTARY_THREADS)
    rotate(const T* x, const float* cosines, const float* sines, T* out, unsigned items, unsigned heads,
           unsigned rotated_heads, unsigned half, unsigned angle_rows, float direction) {
    const unsigned item = blockIdx.x * ROTARY_THREADS + threadIdx.x;
    if (item >= items) return;
    const unsigned packs = half / VEC, row = item / packs, column = item % packs * VEC;
    const unsigned token = row / heads, head = row % heads;
    const int64_t at = int64_t(row) * 2 * half + column;
    Pack<T, VEC> first = load<VEC>(x + at), second = load<VEC>(x + at + half);
    if (head < rotated_heads) {
        const int64_t angle = int64_t(token % angle_rows) * half + column;
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            const float c = cosines[angle + j], s = direction * sines[angle + j];
            const float a = to_float(first.at[j]), b = to_float(second.at[j]);
            first.at[j] = from_float<T>(a * c - b * s);
            second.at[j] = from_float<T>(b * c + a * s);
        }
    }
    store(out + at, first);
    store(out + at + half, second);
}

}  // namespace

// x, out (tokens, heads, 2 half), contiguous; cosines, sines (angle_rows, half) float, of token i in row i % angle_rows.
// direction: 1, or -1 to rotate back.
extern "C" int rotary_positions(void* stream, int64_t dtype, const void* x, const float* cosines, const float* sines,
                                void* out, int64_t tokens, int64_t heads, int64_t rotated_heads, int64_t half,
                                int64_t angle_rows, float direction) {
    if (tokens == 0) return cudaSuccess;
    return with_type(dtype, [&](auto zero) -> int {
        using T = decltype(zero);
        constexpr int VEC = VECTOR_BYTES / sizeof(T);
        const bool fits = half % VEC == 0 && is_aligned(x) && is_aligned(out);
        const int64_t items = tokens * heads * (fits ? half / VEC : half);
        if (half < 1 || angle_rows < 1 || items > INT32_MAX) return cudaErrorInvalidConfiguration;
        const dim3 grid(unsigned((items + ROTARY_THREADS - 1) / ROTARY_THREADS));
        return launch(stream, grid, dim3(ROTARY_THREADS), fits ? rotate<T, VEC> : rotate<T, 1>, (const T*)x, cosines,
                      sines, (T*)out, unsigned(items), unsigned(heads), unsigned(rotated_heads), unsigned(half),
                      unsigned(angle_rows), direction);
    });
}
