// Images resampled; the thread bodies of `resample.py` and `normalize.py` say the same.
//
// Cubic B-splines go along one axis, prefilter and samples in one pass, where the bodies have sums over 28 taps. A thread takes SPAN positions of a line with HALO more on either side into registers, runs the recursion forwards, and backwards while
// it makes the samples whose four coefficients are there: what lies beyond a window is taken to be what lies at its end, which changes a
// coefficient by less than POLE^HALO = 1e-8 of the range. So a voxel costs two multiplications and additions, a sample four.
//
// INTEGER 1: int16 voxels, 0: float32. Nothing here depends on the order of threads.

typedef long long Long;

#if INTEGER
typedef short Voxel;
#else
typedef float Voxel;
#endif

#ifndef SPAN
#define SPAN 32
#endif
#ifndef WARPS
#define WARPS 4  // spans along x of a block
#endif
#define RESIDENT (INTEGER ? 3 : 4)  // blocks of a multiprocessor; more would have registers spilled
#define HALO 14
#define WINDOW (SPAN + 3 + 2 * HALO)  // a sample needs one coefficient before the position below it, and two after
#define BEFORE (HALO + 1)

#ifndef HOST  // a C++ compiler brings its own
#define SHARED(name) extern __shared__ float name[]
#define BARRIER() __syncthreads()
#endif

#define POLE -0.2679491924311228f
#define FIRST 0.7886751345948129f         // 1 / (1 - POLE)
#define LAST_STEADY 0.21132486540518713f  // -POLE / (1 - POLE)
#define LAST_DECAY 0.28867513459481287f   // -POLE / (1 - POLE^2)

struct __align__(16) Weights {
    float a, b, c, d;
};

// positions: the first sample that lies at or after each position, from position -1 on; where the next plane begins
struct Samples {
    const int* begin;
    const Weights* weights;
};

struct Reading {
    int plain;
    float lower, upper, shift, factor;
};

__device__ __forceinline__ float read(float v, const Reading& r) {
    if (!r.plain) {
        // NaN stays NaN
        v = v < r.lower ? r.lower : v;
        v = v > r.upper ? r.upper : v;
        v = (v - r.shift) * r.factor;
    }
    return v;
}

__device__ __forceinline__ float clip(float v, float low, float high) {
    v = v < low ? low : v;
    return v > high ? high : v;
}

// samples of positions base .. base + SPAN - 1 out of c, the voxels from base - BEFORE on, last one first
template <class Put>
__device__ __forceinline__ void sample(float (&c)[WINDOW], int base, const Samples& s, Put put) {
    const float end = c[WINDOW - 1] * FIRST;
    c[0] *= FIRST;
#pragma unroll
    for (int i = 1; i < WINDOW; ++i) c[i] = fmaf(POLE, c[i - 1], c[i]);
    c[WINDOW - 1] = fmaf(c[WINDOW - 1] - end, LAST_DECAY, end * LAST_STEADY);
    // positions count from -1; what the next one asks for is under way while this one is served
    const int* begin = s.begin + base + 1;
    int o = begin[SPAN] - 1, first = begin[SPAN - 1];
#pragma unroll
    for (int i = WINDOW - 2; i >= HALO; --i) {
        c[i] = POLE * (c[i + 1] - c[i]);
        if (i < HALO + SPAN) {
            const int next = i > HALO ? begin[i - HALO - 1] : 0;
#pragma unroll 1
            for (; o >= first; --o) {
                const Weights w = s.weights[o];
                put(o, w.a * c[i] + w.b * c[i + 1] + w.c * c[i + 2] + w.d * c[i + 3]);
            }
            first = next;
        }
    }
}

__device__ __forceinline__ int inside(int i, int size) { return min(max(i, 0), size - 1); }

#define PARAMETERS                                                                                                                       \
    const Voxel *in, Long in_plane, Long in_line, int size, const int *begin, const Weights *weights, const int *rows, int plain,       \
        float lower, float upper, float shift, float factor, const float *bounds, int slots, float *out, Long out_plane, Long out_line, \
        int high, int wide

// along the middle axis; grid (ceil(wide / threads x), ceil(spans / threads y), planes); plane z comes from plane rows[2z] and keeps to
// bounds rows[2z + 1]
extern "C" __global__ void __launch_bounds__(128, RESIDENT) along_lines(PARAMETERS) {
    const int x = blockIdx.x * blockDim.x + threadIdx.x, base = (blockIdx.y * blockDim.y + threadIdx.y) * SPAN - 1, z = blockIdx.z;
    if (x >= wide || base >= size) return;
    const Reading reading = {plain, lower, upper, shift, factor};
    const Voxel* source = in + rows[2 * z] * in_plane + x;
    const unsigned line = in_line * sizeof(Voxel);  // a plane has fewer than 2^32 bytes
    float c[WINDOW];
#pragma unroll
    for (int i = 0; i < WINDOW; ++i) c[i] = *(const Voxel*)((const char*)source + inside(base - BEFORE + i, size) * line);
    if (!plain) {
#pragma unroll
        for (int i = 0; i < WINDOW; ++i) c[i] = read(c[i], reading);
    }
    const float low = bounds[rows[2 * z + 1]], top = bounds[slots + rows[2 * z + 1]];
    float* target = out + z * out_plane + x + begin[base + 1 + SPAN] * out_line;
    sample(c, base, {begin, weights}, [&](int, float v) { *(target -= out_line) = clip(v, low, top); });
}

// along the last axis, 32 lines of a plane and WARPS spans a block, turned in shared memory of 32 * pitch floats;
// grid (ceil(spans / WARPS), ceil(high / 32), planes)
extern "C" __global__ void __launch_bounds__(32 * WARPS, 4) along_rows(PARAMETERS, int pitch) {
    SHARED(tile);
    const int lane = threadIdx.x, warp = threadIdx.y, y0 = blockIdx.y * 32, z = blockIdx.z;
    const int first = blockIdx.x * WARPS * SPAN - 1, base = first + warp * SPAN;
    const Reading reading = {plain, lower, upper, shift, factor};
    const Voxel* source = in + rows[2 * z] * in_plane;
    const int columns = WARPS * SPAN + WINDOW - SPAN;
    for (int r = warp; r < 32; r += WARPS) {
        const Voxel* line = source + inside(y0 + r, high) * in_line;
#pragma unroll
        for (int i = lane; i < columns; i += 32) tile[r * pitch + i] = read(line[inside(first - BEFORE + i, size)], reading);
    }
    BARRIER();
    float c[WINDOW];
#pragma unroll
    for (int i = 0; i < WINDOW; ++i) c[i] = tile[lane * pitch + warp * SPAN + i];
    BARRIER();
    const float low = bounds[rows[2 * z + 1]], top = bounds[slots + rows[2 * z + 1]];
    const int start = begin[first + 1], stop = begin[inside(first + 1 + WARPS * SPAN, size + 2)];
    if (base < size) sample(c, base, {begin, weights}, [&](int o, float v) { tile[lane * pitch + o - start] = clip(v, low, top); });
    BARRIER();
    float* const target = out + z * out_plane;
    for (int r = warp; r < 32 && y0 + r < high; r += WARPS) {
        for (int o = start + lane; o < stop; o += 32) target[(y0 + r) * out_line + o] = tile[r * pitch + o - start];
    }
}

__device__ __forceinline__ void widen_range(float v, float& low, float& top) {
    low = v < low || v != v ? v : low;
    top = v > top || v != v ? v : top;
}

// smallest and largest of all threads of a block, a power of two of them, to out[0] and out[step]; tile of two floats a thread
__device__ __forceinline__ void fold(float low, float top, float* tile, float* out, int step) {
    const int thread = threadIdx.y * 32 + threadIdx.x, threads = 32 * blockDim.y;
    tile[thread] = low;
    tile[threads + thread] = top;
    for (int half = threads / 2; half > 0; half /= 2) {
        BARRIER();
        if (thread < half) {
            float unused = tile[thread];
            widen_range(tile[thread + half], tile[thread], unused);
            unused = tile[threads + thread];
            widen_range(tile[threads + thread + half], unused, tile[threads + thread]);
        }
    }
    if (thread == 0) {
        out[0] = tile[0];
        out[step] = tile[threads];
    }
}

// smallest and largest value of part of a plane; grid (parts, planes), threads (32, 8); partial (2, parts, planes); NaN where there is one
extern "C" __global__ void extremes(const Voxel* in, Long in_plane, Long in_line, int high, int wide, int plain, float lower, float upper,
                                    float shift, float factor, float* partial) {
    SHARED(tile);
    const Reading reading = {plain, lower, upper, shift, factor};
    const Voxel* source = in + blockIdx.y * in_plane;
    float low = read(source[0], reading), top = low;
    for (int y = blockIdx.x * blockDim.y + threadIdx.y; y < high; y += gridDim.x * blockDim.y) {
#pragma unroll 8
        for (int x = threadIdx.x; x < wide; x += 32) widen_range(read(source[y * in_line + x], reading), low, top);
    }
    fold(low, top, tile, partial + blockIdx.x * gridDim.y + blockIdx.y, gridDim.x * gridDim.y);
}

// partial (2, count, columns) -> folded (2, columns); grid (columns), threads (32, 8)
extern "C" __global__ void fold_extremes(const float* partial, int count, float* folded) {
    SHARED(tile);
    const int columns = gridDim.x, column = blockIdx.x;
    float low = partial[column], top = partial[count * columns + column];
    for (int n = threadIdx.y * 32 + threadIdx.x; n < count; n += 32 * blockDim.y) {
        float unused = low;
        widen_range(partial[n * columns + column], low, unused);
        unused = top;
        widen_range(partial[(count + n) * columns + column], unused, top);
    }
    fold(low, top, tile, folded + column, columns);
}

#ifndef RZ
#define RZ 4  // planes and rows of the result that a thread makes: what lies between two of them is interpolated once
#endif
#ifndef RY
#define RY 2
#endif

// from a to b; a itself, infinite or not, where b has no weight
__device__ __forceinline__ float between(float a, float b, float t) { return t == 0 ? a : fmaf(t, b - a, a); }

__device__ __forceinline__ float along_x(const char* in, unsigned offset, unsigned next, float tx, const Reading& reading) {
    const float a = *(const Voxel*)(in + offset), b = *(const Voxel*)(in + offset + next);
    return between(read(a, reading), read(b, reading), tx);
}

// order 0 or 1 along each axis; `lower` and `fraction` hold z's, y's and x's positions one after the other;
// grid (tiles along x, y, z), threads (x, y)
extern "C" __global__ void __launch_bounds__(256, 3) linear(const Voxel* in, unsigned plane_bytes, unsigned line_bytes, const int* lower,
                                                            const float* fraction, int plain, float smallest, float largest, float shift,
                                                            float factor, float* out, Long out_plane, Long out_line, int deep, int high,
                                                            int wide) {
    const int x = blockIdx.x * blockDim.x + threadIdx.x, y0 = (blockIdx.y * blockDim.y + threadIdx.y) * RY, z0 = blockIdx.z * RZ;
    if (x >= wide || y0 >= high) return;
    const Reading reading = {plain, smallest, largest, shift, factor};
    const float tx = fraction[deep + high + x];
    const unsigned column = lower[deep + high + x] * sizeof(Voxel), next = tx == 0 ? 0 : sizeof(Voxel);
    unsigned rows[2 * RY];
    float ty[RY];
#pragma unroll
    for (int r = 0; r < RY; ++r) {
        const int y = min(y0 + r, high - 1);
        ty[r] = fraction[deep + y];
        rows[2 * r] = lower[deep + y] * line_bytes + column;
        rows[2 * r + 1] = rows[2 * r] + (ty[r] == 0 ? 0 : line_bytes);
    }
    float upper[RY] = {};
    unsigned above = 0;
#pragma unroll
    for (int a = 0; a < RZ; ++a) {
        const int z = min(z0 + a, deep - 1);
        const float tz = fraction[z];
        const unsigned plane = lower[z] * plane_bytes;
        float below[RY];
        // the plane above the last result is the one below this
        const bool follows = a > 0 && plane == above;
        above = plane + (tz == 0 ? 0 : plane_bytes);
#pragma unroll
        for (int b = 0; b < RY; ++b) below[b] = upper[b];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (half == 0 ? follows : tz == 0) continue;
            const char* source = (const char*)in + (half == 0 ? plane : above);
            float last = 0;
#pragma unroll
            for (int b = 0; b < RY; ++b) {
                const bool same = b > 0 && rows[2 * b] == rows[2 * b - 1];
                const float first = same ? last : along_x(source, rows[2 * b], next, tx, reading);
                last = ty[b] == 0 ? first : along_x(source, rows[2 * b + 1], next, tx, reading);
                (half == 0 ? below : upper)[b] = between(first, last, ty[b]);
            }
        }
#pragma unroll
        for (int b = 0; b < RY; ++b) {
            if (tz == 0) upper[b] = below[b];
            if (z0 + a < deep && y0 + b < high) out[(z0 + a) * out_plane + (y0 + b) * out_line + x] = between(below[b], upper[b], tz);
        }
    }
}
