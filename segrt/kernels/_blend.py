"""The loops of `blend`: a window added to the sums, in float32, or in nnU-Net's float16 rounded after every step."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

_U32 = np.uint32


@njit(cache=True, nogil=True, parallel=True, fastmath={"contract"})
def add(flat, layout, patch, wz, wy, wx):  # type: ignore[no-untyped-def]
    offset, sk, sz, sy, sx = layout
    classes, nz, ny, nx = patch.shape
    for job in prange(classes * nz):
        k, z = job // nz, job % nz
        for y in range(ny):
            weight = wz[z] * wy[y]
            start = offset + k * sk + z * sz + y * sy
            source = patch[k, z, y]
            if sx == 1:
                row = flat[start : start + nx]
                for x in range(nx):
                    row[x] += source[x] * (weight * wx[x])
            else:
                for x in range(nx):
                    flat[start + x * sx] += source[x] * (weight * wx[x])


# float16 by its bits, without branches, so that the loops below run in vector registers
@njit(cache=True, nogil=True, inline="always")
def widen(half):  # type: ignore[no-untyped-def]
    """float32 of the float16 with these bits."""
    wide = _U32(half)
    sign = _U32(_U32(wide & _U32(0x8000)) << _U32(16))
    bits = _U32(_U32(wide & _U32(0x7FFF)) << _U32(13))
    # the exponent is too small by 112; multiplying puts subnormals right as well
    finite = np.float32(_U32(bits).view(np.float32) * np.float32(2.0**112)).view(np.uint32)
    size = _U32(bits | _U32(0x7F800000)) if bits >= _U32(0x0F800000) else finite
    return _U32(size | sign).view(np.float32)


@njit(cache=True, nogil=True, inline="always")
def narrow(value):  # type: ignore[no-untyped-def]
    """Bits of the float16 nearest to a float32, ties to even."""
    bits = np.float32(value).view(np.uint32)
    sign = _U32(bits & _U32(0x80000000))
    size = _U32(bits ^ sign)
    odd = _U32(_U32(size >> _U32(13)) & _U32(1))
    normal = _U32(_U32(size + _U32(0xC8000FFF) + odd) >> _U32(13))
    # below 2^-14: adding 0.5 leaves the rounded subnormal in the lowest bits
    small = _U32(np.float32(_U32(size).view(np.float32) + np.float32(0.5)).view(np.uint32) - _U32(0x3F000000))
    infinite = _U32(0x7E00) if size > _U32(0x7F800000) else _U32(0x7C00)
    result = small if size < _U32(0x38800000) else normal
    result = infinite if size >= _U32(0x47800000) else result
    return np.uint16(result | _U32(sign >> _U32(16)))


@njit(cache=True, nogil=True, parallel=True)
def add_half(flat, layout, patch, weight):  # type: ignore[no-untyped-def]
    offset, sk, sz, sy, sx = layout
    classes, nz, ny, nx = patch.shape
    for job in prange(classes * nz):
        k, z = job // nz, job % nz
        for y in range(ny):
            start = offset + k * sk + z * sz + y * sy
            source, factor = patch[k, z, y], weight[z, y]
            # no fused multiply-add: the product is rounded to float32 first
            if sx == 1:
                row = flat[start : start + nx]
                for x in range(nx):
                    row[x] = narrow(widen(row[x]) + source[x] * widen(factor[x]))
            else:
                for x in range(nx):
                    flat[start + x * sx] = narrow(widen(flat[start + x * sx]) + source[x] * widen(factor[x]))


@njit(cache=True, nogil=True, parallel=True)
def divide_half(flat, layout, classes, count):  # type: ignore[no-untyped-def]
    offset, sk, sz, sy, sx = layout
    nz, ny, nx = count.shape
    for job in prange(classes * nz):
        k, z = job // nz, job % nz
        for y in range(ny):
            start = offset + k * sk + z * sz + y * sy
            divisor = count[z, y]
            if sx == 1:
                row = flat[start : start + nx]
                for x in range(nx):
                    row[x] = narrow(widen(row[x]) / widen(divisor[x]))
            else:
                for x in range(nx):
                    flat[start + x * sx] = narrow(widen(flat[start + x * sx]) / widen(divisor[x]))
