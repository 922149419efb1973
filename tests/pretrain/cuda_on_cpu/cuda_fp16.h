// half precision as in CUDA's header: storage, and conversions that round to nearest even.
#pragma once

struct __half {
    _Float16 value;
};

inline float __half2float(__half value) { return float(value.value); }
inline __half __float2half(float value) { return {_Float16(value)}; }
