// Activations on vectors, to fp32 rounding: |error| <= 4e-7 (1 + |x|).
#pragma once
#include <type_traits>

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

// Phi(x) = (1 + erf(x / sqrt 2)) / 2 = 1/2 + x P(x^2) / Q(x^2) for |x| <= 5.4, a minimax fit of
// error 6e-9; beyond it Phi is within 4e-8 of 0 or 1.
static inline vf phi_v(vf x) {
  const vf limit = splat(5.4f);
  const vf z = select(x > limit, limit, select(x < -limit, -limit, x));
  const vf u = z * z;
  vf p = splat(2.3386584e-8f);
  p = p * u + splat(6.3599165e-6f);
  p = p * u + splat(1.6431722e-4f);
  p = p * u + splat(4.6508244e-3f);
  p = p * u + splat(3.3371863e-2f);
  p = p * u + splat(3.9894225e-1f);
  vf q = splat(1.2165788e-6f);
  q = q * u + splat(7.2398347e-5f);
  q = q * u + splat(1.8589572e-3f);
  q = q * u + splat(2.8378466e-2f);
  q = q * u + splat(2.5031695e-1f);
  q = q * u + splat(1.0f);
  const vf inside = splat(0.5f) + z * p * inverse(q);
  return select(x > limit, splat(1.0f), select(x < -limit, vf{}, inside));
}

static inline vf sigmoid_v(vf x) { return inverse(splat(1.0f) + exp_v(-x)); }

template <Act A>
static inline vf act_v(vf x) {
  if constexpr (A == GELU) return x * phi_v(x);
  if constexpr (A == GELU_TANH)  // tanh(u) = 2 sigmoid(2u) - 1
    return x * sigmoid_v(x * splat(1.59576912f) * (splat(1.0f) + splat(0.044715f) * x * x));
  if constexpr (A == SILU) return x * sigmoid_v(x);
  return x;
}

// Calls ``body`` with the activation as a type that knows it when compiled.
template <class F>
void choose_act(int32_t act, F body) {
  switch ((Act)act) {
    case GELU:
      return body(std::integral_constant<Act, GELU>{});
    case GELU_TANH:
      return body(std::integral_constant<Act, GELU_TANH>{});
    case SILU:
      return body(std::integral_constant<Act, SILU>{});
    default:
      return body(std::integral_constant<Act, NONE>{});
  }
}
