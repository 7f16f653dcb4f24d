// Activations on vectors, to fp32 rounding: |error| <= 4e-7 (1 + |x|).
#pragma once
#include "vec.h"

enum Act : int32_t { NONE = 0, GELU = 1, GELU_TANH = 2, SILU = 3 };

// e^x by range reduction x = k ln2 + r, |r| <= ln2 / 2, and a degree 6 Taylor polynomial in r.
static inline vf exp_v(vf x) {
  x = select(x > splat(88.0f), splat(88.0f), x);
  x = select(x < splat(-87.0f), splat(-87.0f), x);
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = x * splat(1.44269504f) + magic;
  const vf k = shifted - magic;
  const vf r = (x - k * splat(0.693359375f)) + k * splat(2.12194440e-4f);
  vf p = splat(1.0f / 720);
  p = p * r + splat(1.0f / 120);
  p = p * r + splat(1.0f / 24);
  p = p * r + splat(1.0f / 6);
  p = p * r + splat(0.5f);
  p = p * r + splat(1.0f);
  p = p * r + splat(1.0f);
  const vi scale = (__builtin_convertvector(k, vi) + 127) << 23;
  return p * (vf)scale;
}

// Phi(x) = (1 + erf(x / sqrt 2)) / 2, from erfc(z) = t e^(-z^2 + P(t)), t = 1 / (1 + z / 2)
// (Chebyshev fit, Numerical Recipes 6.2; relative error 1.2e-7).
static inline vf phi_v(vf x) {
  const vf z = select(x < splat(0.0f), -x, x) * splat(0.70710678f);
  const vf t = splat(1.0f) / (splat(1.0f) + splat(0.5f) * z);
  vf p = splat(0.17087277f);
  p = p * t + splat(-0.82215223f);
  p = p * t + splat(1.48851587f);
  p = p * t + splat(-1.13520398f);
  p = p * t + splat(0.27886807f);
  p = p * t + splat(-0.18628806f);
  p = p * t + splat(0.09678418f);
  p = p * t + splat(0.37409196f);
  p = p * t + splat(1.00002368f);
  p = p * t + splat(-1.26551223f);
  const vf half = splat(0.5f) * t * exp_v(p - z * z);
  return select(x < splat(0.0f), half, splat(1.0f) - half);
}

static inline vf sigmoid_v(vf x) { return splat(1.0f) / (splat(1.0f) + exp_v(-x)); }

template <Act A>
static inline vf act_v(vf x) {
  if constexpr (A == GELU) return x * phi_v(x);
  if constexpr (A == GELU_TANH)  // tanh(u) = 2 sigmoid(2u) - 1
    return x * sigmoid_v(x * splat(1.59576912f) * (splat(1.0f) + splat(0.044715f) * x * x));
  if constexpr (A == SILU) return x * sigmoid_v(x);
  return x;
}
