// W in blocks of 16 k rows by 32 k columns, bfloat16: the columns of a block lie side by side, so that
// rows of x are multiplied where they lie and the sums are rows of y. Nothing is gathered.
#pragma once
#include "act.h"
#include "pieces.h"
#include "tiles.h"
#include "wide.h"

constexpr int BLOCK_TOKENS = 32;  // tokens that are multiplied at once: two tiles of AMX
constexpr int BLOCK_ROWS = 32;    // rows of W beside them: two units

// Some tokens times up to two units of W in some chunks of DEPTH columns. A pair of columns of a chunk
// lies side by side for its UNIT rows: [chunk][pair][row][2].
struct Product {
  const bf16* x;
  int64_t stride;  // values from token to token
  int tokens;      // at most BLOCK_TOKENS
  const bf16* w;
  int64_t step;           // values from unit to unit
  const uint16_t* index;  // every DEPTH-th is the first column of a chunk
  int chunks;
  bool first;  // the sums begin at zero
};

inline const bf16* column_of(const Product& p, int chunk) { return p.x + p.index[chunk * DEPTH]; }

// R tokens from ``token`` on. sums: [token][U units of 16 rows].
template <int U, int R>
void add_plain(const Product& p, int token, float* sums) {
  constexpr int V = U * UNIT / L;
  sums += token * U * UNIT;
  vf a[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) a[r][v] = p.first ? vf{} : load<vf>(sums + r * U * UNIT + v * L);
  for (int k = 0; k < p.chunks; k++)
    for (int q = 0; q < PAIRS; q++) {
      const bf16* w = p.w + (int64_t)(k * PAIRS + q) * 2 * UNIT;
      const bf16* x = column_of(p, k) + token * p.stride + 2 * q;
      vf low[R], high[R];
      for (int r = 0; r < R; r++) {
        low[r] = splat(widen(x[r * p.stride]));
        high[r] = splat(widen(x[r * p.stride + 1]));
      }
      for (int v = 0; v < V; v++) {
        const vu both = load<vu>(w + v * L / UNIT * p.step + v * L % UNIT * 2);
        for (int r = 0; r < R; r++)
          a[r][v] += low[r] * (vf)(both << 16) + high[r] * (vf)(both & 0xffff0000u);
      }
    }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store(sums + r * U * UNIT + v * L, a[r][v]);
}

#if defined(BF16_TARGETS)

template <int U, int R>
DPBF16_TARGET void add_dpbf16(const Product& p, int token, float* sums) {
  sums += token * U * UNIT;
  v16f a[R][U];
  for (int r = 0; r < R; r++)
    for (int u = 0; u < U; u++)
      a[r][u] = p.first ? v16f{} : load<v16f>(sums + (r * U + u) * UNIT);
  for (int k = 0; k < p.chunks; k++)
    for (int q = 0; q < PAIRS; q++) {
      const bf16* x = column_of(p, k) + token * p.stride + 2 * q;
      v16i w[U];
      for (int u = 0; u < U; u++)
        w[u] = load<v16i>(p.w + u * p.step + (int64_t)(k * PAIRS + q) * 2 * UNIT);
      for (int r = 0; r < R; r++) {
        const v16i pair = load<int32_t>(x + r * p.stride) - v16i{};
        for (int u = 0; u < U; u++) a[r][u] = dot(a[r][u], pair, w[u]);
      }
    }
  for (int r = 0; r < R; r++)
    for (int u = 0; u < U; u++) store(sums + (r * U + u) * UNIT, a[r][u]);
}

// Tiles 0-3 hold the sums of two times 16 tokens and two units, 4 and 5 x, 6 and 7 weights.
template <int U>
AMX_TARGET void add_amx(const Product& p, float* sums) {
  const uint8_t upper = (uint8_t)std::min(p.tokens, UNIT), lower = (uint8_t)(p.tokens - upper);
  const bool both = lower > 0;
  TileConfig config;
  const uint8_t rows[8] = {upper, upper, lower, lower, upper, lower, UNIT, UNIT};
  for (int i = 0; i < 8; i++) {
    config.rows[i] = rows[i];
    if (!rows[i]) config.bytes[i] = 0;
  }
  _tile_loadconfig(&config);
  constexpr int64_t TO = U * UNIT * sizeof(float);  // bytes from token to token of the sums
  float* below = sums + UNIT * U * UNIT;
  if (p.first) {
    _tile_zero(0);
    if (U == 2) _tile_zero(1);
    if (both) _tile_zero(2);
    if (both && U == 2) _tile_zero(3);
  } else {
    _tile_loadd(0, sums, TO);
    if (U == 2) _tile_loadd(1, sums + UNIT, TO);
    if (both) _tile_loadd(2, below, TO);
    if (both && U == 2) _tile_loadd(3, below + UNIT, TO);
  }
  for (int k = 0; k < p.chunks; k++) {
    const bf16 *x = column_of(p, k), *w = p.w + (int64_t)k * UNIT * DEPTH;
    _tile_loadd(4, x, p.stride * 2);
    _tile_loadd(6, w, UNIT * 4);
    _tile_dpbf16ps(0, 4, 6);
    if (U == 2) {
      _tile_loadd(7, w + p.step, UNIT * 4);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (both) {
      _tile_loadd(5, x + UNIT * p.stride, p.stride * 2);
      _tile_dpbf16ps(2, 5, 6);
      if (U == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, TO);
  if (U == 2) _tile_stored(1, sums + UNIT, TO);
  if (both) _tile_stored(2, below, TO);
  if (both && U == 2) _tile_stored(3, below + UNIT, TO);
  _tile_release();
}

#endif

template <int U>
void add(const Product& p, Isa isa, float* sums) {
  (void)isa;
  int token = 0;
#if defined(BF16_TARGETS)
  if (isa == AMX) return add_amx<U>(p, sums);
  if (isa == DPBF16) {
    for (; token + 8 <= p.tokens; token += 8) add_dpbf16<U, 8>(p, token, sums);
    for (; token < p.tokens; token++) add_dpbf16<U, 1>(p, token, sums);
    return;
  }
#endif
  for (; token + 2 <= p.tokens; token += 2) add_plain<U, 2>(p, token, sums);
  for (; token < p.tokens; token++) add_plain<U, 1>(p, token, sums);
}

// act(sums + bias) of ``tokens`` tokens and ``rows`` rows of W, to y.
template <Act A>
void write_sums(const Work& work, float* sums, int64_t token0, int tokens, int64_t row0, int rows) {
  const Call& c = work.call;
  for (int r = 0; r < rows; r += L) {
    const vf bias = biases_of(c, row0 + r, L);
    for (int t = 0; t < tokens; t++) {
      float* from = sums + t * rows + r;
      const vf y = act_v<A>(load<vf>(from) + bias);
      if (c.form == PLANES)
        store(from, y);
      else
        store_as((bf16*)c.out + (token0 + t) * c.out_stride + row0 + r, y);
    }
  }
  if (c.form != PLANES) return;
  const int64_t pixels = c.out_height * c.out_width;
  for (int r = 0; r < rows; r++)
    for (int t = 0; t < tokens; t++) {
      const int64_t image = (token0 + t) / pixels, pixel = (token0 + t) % pixels;
      put((bf16*)c.out + (image * work.h.rows + row0 + r) * pixels + pixel, sums[t * rows + r]);
    }
}

// Up to BLOCK_TOKENS tokens of images as rows of bfloat16: [token][column]. ``planes``: room for them
// feature-major.
inline void lay_out_tokens(const Work& work, int64_t token0, int tokens, float* planes, bf16* rows) {
  const int vectors = (int)divide_up(tokens, L);
  Tile tile{token0, vectors, {}, false, {}};
  locate(work, tile);
  pack(work, tile, 0, work.h.cols, planes);
  for (int64_t k = 0; k < work.h.cols; k++)
    for (int t = 0; t < tokens; t++) rows[t * work.h.cols + k] = narrow(planes[k * vectors * L + t]);
}

// All columns of W times up to BLOCK_TOKENS tokens, for rows [row0, row0 + rows) of one group.
inline void run_block(const Work& work, const bf16* x, int64_t stride, int64_t token0, int tokens,
                      int64_t row0, int rows) {
  const Header& h = work.h;
  alignas(64) float sums[BLOCK_TOKENS * BLOCK_ROWS];
  const int64_t group = row0 / h.share, unit = row0 % h.share / UNIT;
  const int64_t all = (int64_t)h.cols * h.n / h.m;
  const bf16* w = (const bf16*)(work.call.weight + h.values) + group * h.group * all;
  const uint16_t* index = (const uint16_t*)(work.call.weight + h.index) + group * all;
  for (int64_t k0 = 0; k0 < h.cols; k0 += h.col_block) {
    const int64_t kept = std::min<int64_t>(h.cols - k0, h.col_block) * h.n / h.m;
    const Product product{x + k0, stride,         tokens, w + unit * kept * UNIT, kept * UNIT,
                          index,  (int)kept / DEPTH, k0 == 0};
    rows == UNIT ? add<1>(product, (Isa)work.call.isa, sums)
                 : add<2>(product, (Isa)work.call.isa, sums);
    w += kept * h.group;
    index += kept;
  }
  choose_act(work.call.act, [&](auto act) {
    write_sums<act()>(work, sums, token0, tokens, row0, rows);
  });
}

// The tokens of a group that are laid out at once, and their rows of W; no x is packed for a linear
// layer.
inline void run_blocks(const Work& work, int64_t token0, int64_t token1, int64_t row0, int64_t row1) {
  thread_local Scratch scratch;
  const Header& h = work.h;
  const Call& c = work.call;
  const bool in_place = c.form == ROWS;
  const int64_t size = h.cols * BLOCK_TOKENS, blocks = divide_up(token1 - token0, BLOCK_TOKENS);
  const int64_t floats = size + divide_up(blocks * size, 2);
  float* planes = in_place ? nullptr : scratch.need((size_t)floats);
  bf16* laid_out = (bf16*)(planes + size);
  const auto tokens_of = [&](int64_t block) {
    return (int)std::min<int64_t>(BLOCK_TOKENS, token1 - token0 - block * BLOCK_TOKENS);
  };
  for (int64_t b = 0; b < blocks && !in_place; b++)
    lay_out_tokens(work, token0 + b * BLOCK_TOKENS, tokens_of(b), planes, laid_out + b * size);
  for (int64_t row = row0, step; row < row1; row += step) {
    step = std::min<int64_t>(BLOCK_ROWS, h.share - row % h.share);
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t token = token0 + b * BLOCK_TOKENS;
      const bf16* x = in_place ? (const bf16*)c.x + token * c.x_stride : laid_out + b * size;
      run_block(work, x, in_place ? c.x_stride : h.cols, token, tokens_of(b), row, (int)step);
    }
  }
}

// Groups of tokens that stay in half the cache, cut further until all threads have some; or rows, too.
inline void run_all_blocks(const Work& work, int64_t cache, int threads, int* failed) {
  const Header& h = work.h;
  const int64_t tokens = divide_up(work.call.tokens, BLOCK_TOKENS), row_groups = h.rows / h.share;
  const int64_t most = std::max<int64_t>(1, cache / 2 / (h.cols * BLOCK_TOKENS * (int64_t)sizeof(bf16)));
  const int64_t wanted = threads == 1 ? 1 : 2 * threads;
  const int64_t groups = std::min(tokens, std::max(divide_up(tokens, most), wanted));
  const int64_t parts = std::min(row_groups, divide_up(wanted, groups));
  parallel(groups * parts, threads, [&](int64_t item) {
    try {
      const int64_t group = item / parts, part = item % parts;
      run_blocks(work, tokens * group / groups * BLOCK_TOKENS,
                 std::min(work.call.tokens, tokens * (group + 1) / groups * BLOCK_TOKENS),
                 row_groups * part / parts * h.share, row_groups * (part + 1) / parts * h.share);
    } catch (const std::bad_alloc&) {
      *failed = 1;
    }
  });
}
