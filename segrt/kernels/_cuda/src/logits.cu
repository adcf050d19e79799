// Logits of all classes on a device: windows blended into them, and labels made of them. The thread bodies of `blend.py` and `labels.py`
// say the same for every layout and are what runs without a GPU; these are for planes without gaps, which is what the pipeline makes.
//
// What limits all three is memory, so that a thread keeps many loads in flight: arrays below are unrolled into registers.
//
// HALF 1: float16 logits, 0: float32. WIDE 1: uint16 labels, 0: uint8. No thread waits for another, no result depends on their order.

typedef long long Long;

#if HALF
typedef unsigned short Logit;
#else
typedef float Logit;
#endif

#if WIDE
typedef unsigned short Label;
#else
typedef unsigned char Label;
#endif

#ifndef HOST  // a C++ compiler brings its own
// a value the compiler takes as it is, where it would compute it again and again: addresses from the index of the class, float from double
#define HOLD(kind, value) asm volatile("" : "+" kind(value))
// what nobody writes meanwhile
__device__ __forceinline__ Logit fetch(const Logit* address) { return __ldg(address); }
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
// as plain loads and stores, which the compiler makes generic ones of once it has lost sight of where a pointer came from
__device__ __forceinline__ float fetch_sum(const float* address) {
    float value;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(address));
    return value;
}
__device__ __forceinline__ void store_sum(float* address, float value) { asm volatile("st.global.f32 [%0], %1;" ::"l"(address), "f"(value)); }
// rounded to the nearest float16, ties to even
__device__ __forceinline__ double round_half(double value) {
    unsigned short bits;
    asm("cvt.rn.f16.f64 %0, %1;" : "=h"(bits) : "d"(value));
    return widen(bits);
}
#endif

// ---------------------------------------------------------------- labels of every voxel, not resampled

#ifndef VEC
#define VEC 1  // neighbours that one load brings
#endif
#ifndef GROUPS
#define GROUPS 4  // loads of one class in flight
#endif
#ifndef AHEAD
#define AHEAD 4  // classes in flight
#endif

struct __align__(VEC * sizeof(Logit)) Logits {
    Logit values[VEC];
};

struct __align__(VEC * sizeof(Label)) Labels {
    Label values[VEC];
};

// what takes a class in: the largest wins, the first of equal ones; or whoever is above `bound` paints over what was there
template <bool PAINT>
__device__ __forceinline__ void meet(float v, int k, float bound, float& best, int& winner) {
    if (PAINT ? v > bound : v > best) {
        best = v;
        winner = k;
    }
}

template <bool PAINT>
__device__ __forceinline__ void label(const Logit* logits, Long step, int classes, Long voxels, const int* values, float bound, Label* out) {
    const Long count = voxels / VEC, first = (Long)blockIdx.x * blockDim.x * GROUPS + threadIdx.x;
    float best[GROUPS][VEC];
    int winner[GROUPS][VEC];
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
        const Long i = first + g * blockDim.x;
        Logits v = {};
        if (!PAINT && i < count) v = ((const Logits*)logits)[i];
#pragma unroll
        for (int n = 0; n < VEC; ++n) {
            best[g][n] = widen(v.values[n]);
            winner[g][n] = PAINT ? -1 : 0;
        }
    }
    for (int k = PAINT ? 0 : 1; k < classes; k += AHEAD) {
        Logits v[AHEAD][GROUPS];
#pragma unroll
        for (int c = 0; c < AHEAD; ++c) {
            const Logits* source = (const Logits*)(logits + (k + c) * step);
#pragma unroll
            for (int g = 0; g < GROUPS; ++g) {
                if (k + c < classes && first + g * blockDim.x < count) v[c][g] = source[first + g * blockDim.x];
            }
        }
#pragma unroll
        for (int c = 0; c < AHEAD; ++c) {
            if (k + c < classes) {
#pragma unroll
                for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
                    for (int n = 0; n < VEC; ++n) meet<PAINT>(widen(v[c][g].values[n]), k + c, bound, best[g][n], winner[g][n]);
                }
            }
        }
    }
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
        const Long i = first + g * blockDim.x;
        Labels found;
#pragma unroll
        for (int n = 0; n < VEC; ++n) found.values[n] = winner[g][n] < 0 ? 0 : values[winner[g][n]];
        if (i < count) ((Labels*)out)[i] = found;
    }
}

// grid (ceil(voxels / VEC / GROUPS / threads)); class k lies at logits + k * step; `out` has no gaps
extern "C" __global__ void largest(const Logit* logits, Long step, int classes, Long voxels, const int* values, float bound, Label* out) {
    label<false>(logits, step, classes, voxels, values, bound, out);
}

extern "C" __global__ void painted(const Logit* logits, Long step, int classes, Long voxels, const int* values, float bound, Label* out) {
    label<true>(logits, step, classes, voxels, values, bound, out);
}

// ---------------------------------------------------------------- windows added to the sums

#ifndef CHUNK
#define CHUNK 8  // classes in flight
#endif
#define COLUMNS 10  // of an entry: start z y x, flip z y x, row of each axis' weights, position in the batch
#ifndef BLEND_BLOCKS
#define BLEND_BLOCKS 4
#endif

struct Window {
    const Logit* logits;
    float weight;
};

struct Blend {
    const int* entries;
    int count;
    const Logit* logits;
    Long plane, window;  // voxels of a class of a window, and of all of them
    int deep, high, wide;
    const float *weights_z, *weights_y, *weights_x;
    float scale;
};

// the first window from `i` on that covers a voxel, else how many there are
__device__ __forceinline__ int next_window(const Blend& b, int i, int z, int y, int x) {
    for (; i < b.count; ++i) {
        const int* entry = b.entries + COLUMNS * i;
        if ((unsigned)(z - entry[0]) < (unsigned)b.deep && (unsigned)(y - entry[1]) < (unsigned)b.high &&
            (unsigned)(x - entry[2]) < (unsigned)b.wide)
            break;
    }
    return i;
}

__device__ __forceinline__ Window window_voxel(const Blend& b, int i, int z, int y, int x) {
    const int* entry = b.entries + COLUMNS * i;
    int iz = z - entry[0], iy = y - entry[1], ix = x - entry[2];
    const float wz = b.weights_z[entry[6] * b.deep + iz], wy = b.weights_y[entry[7] * b.high + iy], wx = b.weights_x[entry[8] * b.wide + ix];
    if (entry[3]) iz = b.deep - 1 - iz;
    if (entry[4]) iy = b.high - 1 - iy;
    if (entry[5]) ix = b.wide - 1 - ix;
    return {b.logits + entry[9] * b.window + ((Long)iz * b.high + iy) * b.wide + ix, wz * wy * wx * b.scale};
}

// COUNT classes of one voxel; all pointers go on to the next class
template <int COUNT>
__device__ __forceinline__ void add_classes(float*& target, Long step, const Logit*& p, const Logit*& q, Long plane, float first, float second,
                                            bool two) {
    float v[COUNT];
    Logit a[COUNT], b[COUNT];
    const float* source = target;
#pragma unroll
    for (int c = 0; c < COUNT; ++c, source += step, p += plane, q += plane) {
        HOLD("l", source);
        HOLD("l", p);
        HOLD("l", q);
        v[c] = fetch_sum(source);
        a[c] = fetch(p);
        if (two) b[c] = fetch(q);
    }
#pragma unroll
    for (int c = 0; c < COUNT; ++c, target += step) {
        HOLD("l", target);
        v[c] = fmaf(widen(a[c]), first, v[c]);
        if (two) v[c] = fmaf(widen(b[c]), second, v[c]);
        store_sum(target, v[c]);
    }
}

// grid (ceil(nx / threads x), ceil(ny / threads y), nz) over the box that holds all windows: `acc` is its first voxel
extern "C" __global__ void __launch_bounds__(256, BLEND_BLOCKS) blend(float* acc, Long step, Long step_z, Long step_y, int classes, int ny, int nx, const Logit* logits, int deep,
                                 int high, int wide, const int* entries, int count, const float* weights_z, const float* weights_y,
                                 const float* weights_x, float scale) {
    const int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y, z = blockIdx.z;
    if (x >= nx || y >= ny) return;
    const Long plane = (Long)deep * high * wide;
    const Blend b = {entries, count, logits, plane, classes * plane, deep, high, wide, weights_z, weights_y, weights_x, scale};
    float* const sums = acc + z * step_z + y * step_y + x;
    // two windows at a time, in their order: sums are read and written once where no more overlap
    for (int i = next_window(b, 0, z, y, x); i < count;) {
        const int j = next_window(b, i + 1, z, y, x);
        const bool two = j < count;
        const Window one = window_voxel(b, i, z, y, x), other = window_voxel(b, two ? j : i, z, y, x);
        float* target = sums;
        const Logit *p = one.logits, *q = other.logits;
        int left = classes;
        for (; left >= CHUNK; left -= CHUNK) add_classes<CHUNK>(target, step, p, q, plane, one.weight, other.weight, two);
        for (; left > 0; --left) add_classes<1>(target, step, p, q, plane, one.weight, other.weight, two);
        i = two ? next_window(b, j + 1, z, y, x) : count;
    }
}

// ---------------------------------------------------------------- labels of another grid: every class interpolated, then compared

#ifndef RZ
#define RZ 4  // planes and rows of the result that a thread makes: what lies between two of them is interpolated once
#endif
#ifndef RY
#define RY 2
#endif
#ifndef BLOCKS
#define BLOCKS 2
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define RESIDENT 1  // the compiler keeps more addresses in registers there
#else
#define RESIDENT BLOCKS
#endif

// see labels.py: how far float32 may be from float64, and what float16 makes equal
#define ERROR 2.6e-6f
#define HALF_ULP (1.01f * 0.0009765625f)
#define HALF_TINY 5.9604644775390625e-8f

struct Source {
    const Logit* logits;
    Long step;
    int classes, nz, ny, nx;
};

struct Place {
    int z, y, x;         // the lower source position
    double tz, ty, tx;   // how far to the next
};

__device__ __forceinline__ float lerp(float a, float b, float t) { return fmaf(t, b - a, a); }

// one class in float64, corners in scipy's order, nothing fused
__device__ __noinline__ double exactly(const Source& s, const Place& p, int k, int half) {
    const int uz = min(p.z + 1, s.nz - 1), uy = min(p.y + 1, s.ny - 1), ux = min(p.x + 1, s.nx - 1);
    double total = 0;
    for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 2; ++j) {
            const Logit* row = s.logits + k * s.step + ((Long)(i ? uz : p.z) * s.ny + (j ? uy : p.y)) * s.nx;
            const double wz = i ? p.tz : 1 - p.tz, wy = j ? p.ty : 1 - p.ty;
            total = __dadd_rn(total, __dmul_rn(__dmul_rn(__dmul_rn(widen(row[p.x]), wz), wy), 1 - p.tx));
            total = __dadd_rn(total, __dmul_rn(__dmul_rn(__dmul_rn(widen(row[ux]), wz), wy), p.tx));
        }
    }
    return half ? round_half(total) : total;
}

// the winner among the classes whose float32 value reaches `floor`
__device__ __noinline__ int decide(const Source& s, const Place& p, float floor, int half) {
    const int uz = min(p.z + 1, s.nz - 1), uy = min(p.y + 1, s.ny - 1), ux = min(p.x + 1, s.nx - 1);
    const float tz = p.tz, ty = p.ty, tx = p.tx;
    double top = -1.0 / 0.0;
    int winner = 0;
    for (int k = 0; k < s.classes; ++k) {
        const Logit* planes = s.logits + k * s.step;
        const Logit *a = planes + ((Long)p.z * s.ny + p.y) * s.nx, *b = planes + ((Long)p.z * s.ny + uy) * s.nx;
        const Logit *c = planes + ((Long)uz * s.ny + p.y) * s.nx, *d = planes + ((Long)uz * s.ny + uy) * s.nx;
        const float low = lerp(lerp(widen(a[p.x]), widen(a[ux]), tx), lerp(widen(b[p.x]), widen(b[ux]), tx), ty);
        const float high = lerp(lerp(widen(c[p.x]), widen(c[ux]), tx), lerp(widen(d[p.x]), widen(d[ux]), tx), ty);
        if (lerp(low, high, tz) >= floor) {
            const double v = exactly(s, p, k, half);
            if (v > top) {
                top = v;
                winner = k;
            }
        }
    }
    return winner;
}

// between two neighbours of a row
__device__ __forceinline__ float along_x(const Logit* logits, unsigned offset, float tx, float& peak) {
    const Logit* pair = (const Logit*)((const char*)logits + offset);
    const float a = widen(fetch(pair)), b = widen(fetch(pair + 1));
    peak = fmaxf(fmaxf(peak, fabsf(a)), fabsf(b));
    return lerp(a, b, tx);
}

// values of RY rows at one column of one plane; rows 2r and 2r + 1 are the lower and the upper of r
__device__ __forceinline__ void plane_rows(const Logit* logits, unsigned plane, const unsigned* rows, const float* ty, const bool* follows,
                                           float tx, float& peak, float* values) {
    float upper = 0;
#pragma unroll
    for (int r = 0; r < RY; ++r) {
        float lower = upper;
        if (!follows[r]) lower = along_x(logits, plane + rows[2 * r], tx, peak);
        upper = along_x(logits, plane + rows[2 * r + 1], tx, peak);
        values[r] = lerp(lower, upper, ty[r]);
    }
}

// grid (tiles along z, then x, then y), threads (x, y); `lower` and `fraction` hold z's, y's and x's positions one after the other
template <bool PAINT>
__device__ __forceinline__ void resampled(const Source s, const int* lower, const double* fraction, int deep, int high, int wide, const int* values,
                                          float bound, int half, Label* out, Long out_z, Long out_y, Long out_x) {
    const int tiles_z = (deep + RZ - 1) / RZ, tiles_x = (wide + blockDim.x - 1) / blockDim.x;
    const int column = blockIdx.x / tiles_z % tiles_x, row = blockIdx.x / tiles_z / tiles_x;
    const int z0 = blockIdx.x % tiles_z * RZ, y0 = (row * blockDim.y + threadIdx.y) * RY, x = column * blockDim.x + threadIdx.x;
    if (x >= wide || y0 >= high) return;
    // the last position reads its left neighbour, so that the right one is always the next
    int ix = lower[deep + high + x];
    float tx = fraction[deep + high + x];
    if (ix > s.nx - 2) {
        ix = s.nx - 2;
        tx = 1;
    }
    HOLD("f", tx);
    // in bytes from the first voxel of a class
    const unsigned plane_bytes = (unsigned)s.ny * s.nx * sizeof(Logit);
    unsigned rows[2 * RY];
    float ty[RY];
    bool row_follows[RY];
#pragma unroll
    for (int r = 0; r < RY; ++r) {
        const int y = min(y0 + r, high - 1), iy = lower[deep + y];
        ty[r] = fraction[deep + y];
        HOLD("f", ty[r]);
        rows[2 * r] = ((unsigned)iy * s.nx + ix) * sizeof(Logit);
        rows[2 * r + 1] = ((unsigned)min(iy + 1, s.ny - 1) * s.nx + ix) * sizeof(Logit);
        row_follows[r] = r > 0 && rows[2 * r] == rows[2 * r - 1];
    }
    unsigned planes[2 * RZ];
    float tz[RZ];
    bool plane_follows[RZ], flat[RZ];
#pragma unroll
    for (int r = 0; r < RZ; ++r) {
        const int z = min(z0 + r, deep - 1), iz = lower[z];
        tz[r] = fraction[z];
        HOLD("f", tz[r]);
        flat[r] = tz[r] == 0;  // nearest, or not resampled: there is nothing above
        planes[2 * r] = iz * plane_bytes;
        planes[2 * r + 1] = flat[r] ? planes[2 * r] : min(iz + 1, s.nz - 1) * plane_bytes;
        plane_follows[r] = r > 0 && planes[2 * r] == planes[2 * r - 1];
    }
    float best[RZ][RY], second[RZ][RY], peak = 0;
    int winner[RZ][RY];
#pragma unroll
    for (int a = 0; a < RZ; ++a) {
#pragma unroll
        for (int b = 0; b < RY; ++b) {
            best[a][b] = second[a][b] = -1.0f / 0.0f;
            winner[a][b] = PAINT ? -1 : 0;
        }
    }
    const Logit* logits = s.logits;
    for (int k = 0; k < s.classes; ++k, logits += s.step) {
        HOLD("l", logits);
        float upper[RY] = {};
        if (PAINT) peak = 0;
#pragma unroll
        for (int a = 0; a < RZ; ++a) {
            float below[RY];
#pragma unroll
            for (int b = 0; b < RY; ++b) below[b] = upper[b];
            if (!plane_follows[a] && !flat[a]) plane_rows(logits, planes[2 * a], rows, ty, row_follows, tx, peak, below);
            plane_rows(logits, planes[2 * a + 1], rows, ty, row_follows, tx, peak, upper);
#pragma unroll
            for (int b = 0; b < RY; ++b) {
                const float v = flat[a] ? upper[b] : lerp(below[b], upper[b], tz[a]);
                if (PAINT) {
                    bool passes = v > bound;
                    float tolerance = ERROR * peak;
                    if (half) tolerance += HALF_ULP * fmaxf(fabsf(v), fabsf(bound)) + HALF_TINY;
                    if (fabsf(v - bound) <= tolerance && z0 + a < deep && y0 + b < high) {
                        const Place p = {lower[z0 + a], lower[deep + y0 + b], lower[deep + high + x],
                                         fraction[z0 + a], fraction[deep + y0 + b], fraction[deep + high + x]};
                        passes = exactly(s, p, k, half) > bound;
                    }
                    if (passes) winner[a][b] = k;
                } else {
                    second[a][b] = fmaxf(second[a][b], fminf(v, best[a][b]));
                    if (v > best[a][b]) winner[a][b] = k;
                    best[a][b] = fmaxf(best[a][b], v);
                }
            }
        }
    }
#pragma unroll
    for (int a = 0; a < RZ; ++a) {
#pragma unroll
        for (int b = 0; b < RY; ++b) {
            if (z0 + a < deep && y0 + b < high) {
                if (!PAINT) {
                    float tolerance = ERROR * peak;
                    if (half) tolerance += HALF_ULP * fmaxf(fabsf(best[a][b]), fabsf(second[a][b])) + HALF_TINY;
                    if (best[a][b] - second[a][b] <= tolerance) {
                        const Place p = {lower[z0 + a], lower[deep + y0 + b], lower[deep + high + x],
                                         fraction[z0 + a], fraction[deep + y0 + b], fraction[deep + high + x]};
                        winner[a][b] = decide(s, p, best[a][b] - 2 * tolerance, half);
                    }
                }
                const int found = winner[a][b] < 0 ? 0 : values[winner[a][b]];
                out[(z0 + a) * out_z + (y0 + b) * out_y + x * out_x] = found;
            }
        }
    }
}

#define RESAMPLED_PARAMETERS                                                                                                             \
    const Logit *logits, Long step, int classes, int nz, int ny, int nx, const int *lower, const double *fraction, int deep, int high,  \
        int wide, const int *values, float bound, int half, Label *out, Long out_z, Long out_y, Long out_x

extern "C" __global__ void __launch_bounds__(256, RESIDENT) largest_resampled(RESAMPLED_PARAMETERS) {
    resampled<false>({logits, step, classes, nz, ny, nx}, lower, fraction, deep, high, wide, values, bound, half, out, out_z, out_y, out_x);
}

extern "C" __global__ void __launch_bounds__(256, RESIDENT) painted_resampled(RESAMPLED_PARAMETERS) {
    resampled<true>({logits, step, classes, nz, ny, nx}, lower, fraction, deep, high, wide, values, bound, half, out, out_z, out_y, out_x);
}
