// What happens between the convolutions of a channels-last U-Net: x is (windows, voxels, channels).
//
// moments, fold, apply: instance normalisation and leaky ReLU, in place. PyTorch's own turns channels-last activations around and back, which took more than half of a window's time on an H200. Here the
// activations are read twice and written once, 16 bytes at a time; sums are float32 around the window's first voxel, parts of them are
// added in double precision, in a fixed order. KIND: 0 float32, 1 float16, 2 bfloat16. Channels are a multiple of LANES.
//
// Blocks of THREADS threads: a thread keeps to LANES channels ("column") and strides over voxels ("row"), so that neighbouring threads read
// neighbouring memory.

#define THREADS 256

#if KIND == 0
#define LANES 4
#else
#define LANES 8
#endif

#if KIND == 0
typedef float Value;
#else
typedef unsigned short Value;
#endif

struct __align__(16) Vector {
    Value values[LANES];
};

#if KIND == 1
typedef unsigned short Logit;
#else
typedef float Logit;
#endif

#ifndef HOST  // a C++ compiler brings its own
__device__ float from_half(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ unsigned short to_half(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#if KIND == 2  // no instruction of GPUs before Ampere
__device__ unsigned short to_bfloat16(float value) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif
#endif

#if KIND == 0
__device__ float widen(float value) { return value; }
__device__ float narrow(float value) { return value; }
#elif KIND == 1
__device__ float widen(unsigned short bits) { return from_half(bits); }
__device__ unsigned short narrow(float value) { return to_half(value); }
#else
__device__ float widen(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }
__device__ unsigned short narrow(float value) { return to_bfloat16(value); }
#endif

// grid (parts, windows); sums (windows, parts, 2, channels): of the distance from the window's first voxel, and of its square
extern "C" __global__ void moments(const Vector* x, float* sums, long long voxels, int channels) {
    __shared__ float shared[2 * THREADS * LANES];
    const int columns = channels / LANES, rows = THREADS / columns;
    const int column = threadIdx.x % columns, row = threadIdx.x / columns;
    const Vector* window = x + blockIdx.y * voxels * columns;
    float pivot[LANES], sum[LANES], square[LANES];
    const Vector first = window[column];
    for (int k = 0; k < LANES; ++k) {
        pivot[k] = widen(first.values[k]);
        sum[k] = square[k] = 0;
    }
    if (row < rows) {
#pragma unroll 4
        for (long long i = (long long)blockIdx.x * rows + row; i < voxels; i += (long long)gridDim.x * rows) {
            const Vector v = window[i * columns + column];
            for (int k = 0; k < LANES; ++k) {
                const float d = widen(v.values[k]) - pivot[k];
                sum[k] += d;
                square[k] += d * d;
            }
        }
    }
    for (int k = 0; k < LANES; ++k) {
        shared[threadIdx.x * LANES + k] = sum[k];
        shared[(THREADS + threadIdx.x) * LANES + k] = square[k];
    }
    __syncthreads();
    float* part = sums + 2LL * channels * (blockIdx.y * gridDim.x + blockIdx.x);
    for (int c = threadIdx.x; c < channels; c += THREADS) {
        float s = 0, q = 0;
        for (int r = 0; r < rows; ++r) {
            s += shared[r * channels + c];
            q += shared[THREADS * LANES + r * channels + c];
        }
        part[c] = s;
        part[channels + c] = q;
    }
}

// grid (ceil(channels / 32), windows), blocks of 32 channels by 8 shares of the parts; table (windows, 2, channels): mean and factor
extern "C" __global__ void fold(const Vector* x, const float* sums, const float* weight, float* table, long long voxels, int channels, int parts,
                                float eps) {
    __shared__ double shared[2][8][32];
    const int lane = threadIdx.x % 32, share = threadIdx.x / 32, c = blockIdx.x * 32 + lane;
    double s = 0, q = 0;
    if (c < channels) {
        for (int p = share; p < parts; p += 8) {
            const float* part = sums + 2LL * channels * (blockIdx.y * parts + p);
            s += part[c];
            q += part[channels + c];
        }
    }
    shared[0][share][lane] = s;
    shared[1][share][lane] = q;
    __syncthreads();
    if (share == 0 && c < channels) {
        for (int k = 1; k < 8; ++k) {
            s += shared[0][k][lane];
            q += shared[1][k][lane];
        }
        const double shift = s / voxels, variance = fmax(q / voxels - shift * shift, 0.0);
        const double pivot = widen(x[blockIdx.y * voxels * (channels / LANES) + c / LANES].values[c % LANES]);
        table[2 * channels * blockIdx.y + c] = (float)(pivot + shift);
        table[2 * channels * blockIdx.y + channels + c] = (float)((weight ? weight[c] : 1.0) / sqrt(variance + eps));
    }
}

// grid (parts, windows); negative results are multiplied by slope
extern "C" __global__ void apply(Vector* x, const float* table, const float* bias, long long voxels, int channels, float slope) {
    const int columns = channels / LANES, rows = THREADS / columns;
    const int column = threadIdx.x % columns, row = threadIdx.x / columns;
    if (row >= rows) return;
    Vector* window = x + blockIdx.y * voxels * columns;
    // the mean goes first: in a window of one value the factor is large, and a product of both would lose digits
    float mean[LANES], factor[LANES], offset[LANES];
    for (int k = 0; k < LANES; ++k) {
        mean[k] = table[2 * channels * blockIdx.y + column * LANES + k];
        factor[k] = table[2 * channels * blockIdx.y + channels + column * LANES + k];
        offset[k] = bias ? bias[column * LANES + k] : 0;
    }
#pragma unroll 4
    for (long long i = (long long)blockIdx.x * rows + row; i < voxels; i += (long long)gridDim.x * rows) {
        Vector v = window[i * columns + column];
        for (int k = 0; k < LANES; ++k) {
            const float y = (widen(v.values[k]) - mean[k]) * factor[k] + offset[k];
            v.values[k] = narrow(y > 0 ? y : y * slope);
        }
        window[i * columns + column] = v;
    }
}

// grid (parts, windows); joined = (below + bias, skip) along the channels, which are multiples of LANES; voxels of all windows are one axis
extern "C" __global__ void join(const Vector* below, const float* bias, const Vector* skip, Vector* joined, long long voxels, int channels,
                                int others) {
    const int columns = (channels + others) / LANES, own = channels / LANES, rows = THREADS / columns;
    const int column = threadIdx.x % columns, row = threadIdx.x / columns;
    if (row >= rows) return;
    float added[LANES];
    for (int k = 0; k < LANES; ++k) added[k] = bias && column < own ? bias[column * LANES + k] : 0;
#pragma unroll 4
    for (long long i = (long long)blockIdx.x * rows + row; i < voxels; i += (long long)gridDim.x * rows) {
        if (column < own) {
            Vector v = below[i * own + column];
            for (int k = 0; k < LANES; ++k) v.values[k] = narrow(widen(v.values[k]) + added[k]);
            joined[i * columns + column] = v;
        } else {
            joined[i * columns + column] = skip[i * (columns - own) + column - own];
        }
    }
}

__device__ void store(unsigned short* out, float value) { *out = to_half(value); }
__device__ void store(float* out, float value) { *out = value; }

// grid (parts, windows); channels come first: out (windows, channels, voxels), float16 for float16 and float32 for the others
extern "C" __global__ void separate(const Value* x, Logit* out, long long voxels, int channels) {
    const Value* window = x + blockIdx.y * voxels * channels;
    Logit* planes = out + blockIdx.y * voxels * channels;
    for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < voxels; i += (long long)gridDim.x * THREADS) {
        for (int k = 0; k < channels; ++k) store(planes + k * voxels + i, widen(window[i * channels + k]));
    }
}
