// W shared by 16 or more rows, bfloat16: the kept columns are gathered once for all of them into a
// panel of pairs, [pair][token] of two bfloat16, and multiplied as dense. The panel suits both
// vdpbf16ps (AVX512-BF16) and the tiles of AMX, and plain vector code stands in for them.
#pragma once
#include "format.h"
#include "vec.h"

enum Isa : int32_t { PLAIN = 0, DPBF16 = 1, AMX = 2 };

constexpr int UNIT = 16;   // rows of a block of weights
constexpr int DEPTH = 32;  // kept columns of a block of weights: 16 pairs
constexpr int PAIRS = DEPTH / 2;

inline int blocks_of(int kept) { return (kept + DEPTH - 1) / DEPTH; }

// x: [column][T vectors] of fp32 that hold bfloat16 -> panel [pair][T vectors] of two bfloat16.
template <int T>
void gather(const float* x, const uint16_t* index, int kept, uint32_t* panel) {
  constexpr int S = T * L;
  const int pairs = blocks_of(kept) * PAIRS;
  for (int p = 0; p < pairs; p++, panel += S) {
    const bool low = 2 * p < kept, high = 2 * p + 1 < kept;
    const float* a = x + (int64_t)index[low ? 2 * p : 0] * S;
    const float* b = x + (int64_t)index[high ? 2 * p + 1 : 0] * S;
    for (int t = 0; t < T; t++) {
      const vu la = low ? load<vu>(a + t * L) >> 16 : vu{};
      const vu hb = high ? load<vu>(b + t * L) & 0xffff0000u : vu{};
      store(panel + t * L, la | hb);
    }
  }
}

template <int T>
void wide_plain(const uint32_t* panel, const bf16* w, float* c, int blocks, bool first) {
  constexpr int S = T * L;
  for (int r = 0; r < UNIT; r++, c += S) {
    vf a[T];
    for (int t = 0; t < T; t++) a[t] = first ? vf{} : load<vf>(c + t * L);
    for (int b = 0; b < blocks; b++)
      for (int p = 0; p < PAIRS; p++) {
        const bf16* pair = w + ((int64_t)b * UNIT + r) * DEPTH + 2 * p;
        const vf low = splat(widen(pair[0])), high = splat(widen(pair[1]));
        const uint32_t* x = panel + (b * PAIRS + p) * S;
        for (int t = 0; t < T; t++) {
          const vu both = load<vu>(x + t * L);
          a[t] += low * (vf)(both << 16) + high * (vf)(both & 0xffff0000u);
        }
      }
    for (int t = 0; t < T; t++) store(c + t * L, a[t]);
  }
}

#if defined(__AVX512F__)
#define BF16_TARGETS
#define DPBF16_TARGET __attribute__((target("avx512bf16")))
#define AMX_TARGET __attribute__((target("amx-tile,amx-bf16,avx512f")))
#endif

#if defined(BF16_TARGETS)

typedef float v16f __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));

#if defined(__AVX512F__)
// a + x.even y.even + x.odd y.odd
DPBF16_TARGET inline v16f dot(v16f a, v16i x, v16i y) {
  return (v16f)_mm512_dpbf16_ps((__m512)a, (__m512bh)x, (__m512bh)y);
}
#endif

template <int R, int T>
DPBF16_TARGET inline void dpbf16_rows(const uint32_t* panel, const bf16* w, float* c, int blocks,
                                      bool first) {
  constexpr int S = T * L;
  v16f a[R][T];
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) a[r][t] = first ? v16f{} : load<v16f>(c + r * S + t * L);
  for (int b = 0; b < blocks; b++, w += UNIT * DEPTH)
    for (int p = 0; p < PAIRS; p++, panel += S) {
      v16i x[T];
      for (int t = 0; t < T; t++) x[t] = load<v16i>(panel + t * L);
      for (int r = 0; r < R; r++) {
        const v16i pair = load<int32_t>(w + r * DEPTH + 2 * p) - v16i{};
        for (int t = 0; t < T; t++) a[r][t] = dot(a[r][t], pair, x[t]);
      }
    }
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) store(c + r * S + t * L, a[r][t]);
}

template <int T>
void wide_dpbf16(const uint32_t* panel, const bf16* w, float* c, int blocks, bool first) {
  constexpr int R = T <= 3 ? 8 : 4;  // accumulators fit the registers
  for (int r = 0; r < UNIT; r += R)
    dpbf16_rows<R, T>(panel, w + r * DEPTH, c + r * T * L, blocks, first);
}

// One tile register: 16 rows of 64 bytes. 0-3 hold y, 4 and 5 weights, 6 and 7 the panel.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// ``two``: a second unit of 16 rows, w2 and c2, shares the loads of the panel.
template <int T>
AMX_TARGET void wide_amx(
    const uint32_t* panel, const bf16* w, const bf16* w2, float* c, float* c2, int blocks,
    bool first) {
  constexpr int S = T * L;
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int t = 0; t < T; t += 2) {
    const bool pair = t + 1 < T;
    const int u = pair ? t + 1 : t;
    if (first) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, c + t * L, S * 4);
      _tile_loadd(1, c + u * L, S * 4);
      _tile_loadd(2, c2 + t * L, S * 4);
      _tile_loadd(3, c2 + u * L, S * 4);
    }
    for (int b = 0; b < blocks; b++) {
      _tile_loadd(4, w + (int64_t)b * UNIT * DEPTH, DEPTH * 2);
      _tile_loadd(6, panel + b * PAIRS * S + t * L, S * 4);
      _tile_dpbf16ps(0, 4, 6);
      if (pair) {
        _tile_loadd(7, panel + b * PAIRS * S + u * L, S * 4);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (w2) {
        _tile_loadd(5, w2 + (int64_t)b * UNIT * DEPTH, DEPTH * 2);
        _tile_dpbf16ps(2, 5, 6);
        if (pair) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c + t * L, S * 4);
    if (pair) _tile_stored(1, c + u * L, S * 4);
    if (w2) {
      _tile_stored(2, c2 + t * L, S * 4);
      if (pair) _tile_stored(3, c2 + u * L, S * 4);
    }
  }
  _tile_release();
}

#endif

// One group of rows: its index and weights [unit of 16 rows][block][16][32], c: [row][T vectors].
template <int T>
void run_wide(const float* x, float* c, const bf16* w, const uint16_t* index, int units, int kept,
              bool first, Isa isa, uint32_t* panel) {
  constexpr int S = T * L;
  (void)isa;
  const int blocks = blocks_of(kept);
  const int64_t step = (int64_t)blocks * UNIT * DEPTH;
  gather<T>(x, index, kept, panel);
  for (int u = 0; u < units; u++) {
    float* cu = c + (int64_t)u * UNIT * S;
    const bf16* wu = w + u * step;
#if defined(BF16_TARGETS)
    if (isa == AMX) {
      const bool two = u + 1 < units;
      wide_amx<T>(panel, wu, two ? wu + step : nullptr, cu, two ? cu + UNIT * S : cu, blocks, first);
      u += two;
      continue;
    }
    if (isa == DPBF16) {
      wide_dpbf16<T>(panel, wu, cu, blocks, first);
      continue;
    }
#endif
    wide_plain<T>(panel, wu, cu, blocks, first);
  }
}
