// The loops that multiply: W in pairs of rows, or rows that share a mask, with a tile of x.
#pragma once
#include "vec.h"

constexpr int MAX_PAIRS_TILE = VEC_REGISTERS == 32 ? 12 : 6;
constexpr int MAX_SHARED_TILE = 6;

// The widest tile for units of so many rows with one mask; 0: of pairs.
inline int widest_tile(int unit) {
  if (!unit) return MAX_PAIRS_TILE;
  return VEC_REGISTERS == 16 && unit == 3 ? 4 : MAX_SHARED_TILE;
}

template <int T>
constexpr int lanes() {
  return T * L;
}

// Bytes that are read soon, ``ahead`` of ``from``: hardware does not look past the end of a page, and
// weights come from far. What lies behind the last weight is fetched, but never read.
constexpr int64_t AHEAD = 512;
inline void fetch(const void* from, int64_t ahead, int64_t bytes) {
  const uintptr_t start = (uintptr_t)from + ahead;
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch((const void*)(start + b), 0, 2);
}

// ``first``: the sums begin at zero.
template <int T, class W>
void run_pairs(const float* x, float* c, const W* w, const uint8_t* index, const uint16_t* rows,
               const uint8_t* common, int pairs, int kept, bool first) {
  constexpr int S = lanes<T>();
  for (int p = 0; p < pairs; p++) {
    float* ca = c + (int64_t)rows[2 * p] * S;
    float* cb = c + (int64_t)rows[2 * p + 1] * S;
    fetch(w + 2 * kept, AHEAD, 2 * kept * sizeof(W));
    fetch(index + 2 * kept, AHEAD, 2 * kept);
    vf a[T], b[T];
    for (int t = 0; t < T; t++) {
      a[t] = first ? vf{} : load<vf>(ca + t * L);
      b[t] = first ? vf{} : load<vf>(cb + t * L);
    }
    const int both = common[p];
    int i = 0;
    for (; i < both; i++) {
      const float* q = x + index[2 * i] * S;
      const vf wa = splat(widen(w[2 * i])), wb = splat(widen(w[2 * i + 1]));
      for (int t = 0; t < T; t++) {
        const vf v = in_register(load<vf>(q + t * L));
        a[t] += wa * v;
        b[t] += wb * v;
      }
    }
    for (; i < kept; i++) {
      const float* q = x + index[2 * i] * S;
      const float* r = x + index[2 * i + 1] * S;
      const vf wa = splat(widen(w[2 * i])), wb = splat(widen(w[2 * i + 1]));
      for (int t = 0; t < T; t++) a[t] += wa * load<vf>(q + t * L);
      for (int t = 0; t < T; t++) b[t] += wb * load<vf>(r + t * L);
    }
    for (int t = 0; t < T; t++) {
      store(ca + t * L, a[t]);
      store(cb + t * L, b[t]);
    }
    w += 2 * kept;
    index += 2 * kept;
  }
}

// R rows of a unit of U, whose values lie together: as many as have their sums in registers.
template <int U, int R, int T, class W>
void run_rows(const float* x, float* c, const W* w, const uint16_t* index, int kept, bool first) {
  constexpr int S = lanes<T>();
  vf a[R][T];
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) a[r][t] = first ? vf{} : load<vf>(c + r * S + t * L);
  for (int i = 0; i < kept; i++, w += U) {
    const float* q = x + (int64_t)index[i] * S;
    if constexpr (T < R) {  // the shorter of x and W waits in registers, the other comes one by one
      vf v[T];
      for (int t = 0; t < T; t++) v[t] = in_register(load<vf>(q + t * L));
      for (int r = 0; r < R; r++) {
        const vf wide = in_register(splat(widen(w[r])));
        for (int t = 0; t < T; t++) a[r][t] += wide * v[t];
      }
    } else {
      vf wide[R];
      for (int r = 0; r < R; r++) wide[r] = splat(widen(w[r]));
      for (int t = 0; t < T; t++) {
        const vf v = in_register(load<vf>(q + t * L));
        for (int r = 0; r < R; r++) a[r][t] += wide[r] * v;
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) store(c + r * S + t * L, a[r][t]);
}

// ``next``: values between two blocks of rows, as those are read one after the other.
template <int U, int T, class W>
void run_shared(const float* x, float* c, const W* w, const uint16_t* index, int units, int kept,
                bool first, int64_t next) {
  constexpr int R = VEC_REGISTERS == 16 && U == 4 && T > 3 ? 2 : U;
  for (int u = 0; u < units; u++, c += U * lanes<T>(), w += (int64_t)U * kept) {
    fetch(w, next * sizeof(W), U * kept * sizeof(W));
    for (int r = 0; r < U; r += R) run_rows<U, R, T>(x, c + r * lanes<T>(), w + r, index, kept, first);
  }
}
