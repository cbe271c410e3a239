/* Arithmetic of one number, written so that a compiler makes vectors of it. */
#ifndef VKV_SCALARS_H
#define VKV_SCALARS_H

#include "kernels.h"

#include <string.h>

#define INLINE static inline __attribute__((always_inline))

INLINE float from_bf16(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

INLINE uint16_t to_bf16(float x) { /* to nearest, ties to even; a NaN stays one */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)(x != x ? (bits >> 16 | 0x40) : rounded);
}

/* Elements from `at` on, as floats. */
INLINE void take(const void *from, int64_t at, int count, int32_t dtype, float *goal) {
    if (dtype == VKV_BFLOAT16) {
        const uint16_t *p = (const uint16_t *)from + at;
        for (int i = 0; i < count; i++) goal[i] = from_bf16(p[i]);
    } else {
        memcpy(goal, (const float *)from + at, 4 * (size_t)count);
    }
}

INLINE float exp2_of(float x) { /* relative error about 1e-7 from -126 to 127 */
    x = x < -126.0f ? -126.0f : x; /* one after the other: nested, a compiler makes branches */
    x = x > 127.0f ? 127.0f : x;
    const float shifted = x + 12582912.0f, f = x - (shifted - 12582912.0f);
    float p = 1.535336e-4f;
    p = p * f + 1.339887e-3f;
    p = p * f + 9.618437e-3f;
    p = p * f + 5.550332e-2f;
    p = p * f + 2.402264e-1f;
    p = p * f + 6.931472e-1f;
    p = p * f + 1.0f;
    int32_t bits, power;
    memcpy(&bits, &p, 4);
    memcpy(&power, &shifted, 4);
    bits += (power - 0x4b400000) << 23;
    memcpy(&p, &bits, 4);
    return p;
}

/* The natural logarithm of a positive x; relative error about 1e-7. */
INLINE float log_of(float x) {
    int32_t bits, power;
    memcpy(&bits, &x, 4);
    power = (bits - 0x3f3504f3) >> 23; /* so that what is left is from 0.707 to 1.414 */
    bits -= power << 23;
    memcpy(&x, &bits, 4);
    const float f = x - 1.0f, s = f / (2.0f + f), t = s * s;
    float p = 0.153383f; /* of 2 artanh(s) = log((1 + s) / (1 - s)) */
    p = p * t + 0.181836f;
    p = p * t + 0.222221984f;
    p = p * t + 0.285714279f;
    p = p * t + 0.400000001f;
    p = p * t + 0.666666667f;
    return 0.693147181f * (float)power + (2.0f * s + s * t * p);
}

/* x * sigmoid(y): y is x for SiLU, and for GELU's tanh form twice its cubic. */
INLINE float gate_of(float x, int32_t gate) {
    float y = x;
    if (gate == VKV_GELU_TANH) y *= 1.59576912f * (1.0f + 0.044715f * y * y);
    return x / (1.0f + exp2_of(-1.44269504f * y));
}

#endif
