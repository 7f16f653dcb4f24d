// y = act(W x + b) with W pruned to n of m, for Linear and Conv2d.
//
// Activations are packed feature-major into tiles of T vectors of tokens (output pixels), so that
// a kept weight is one broadcast and T fused multiply-adds on its column of the tile. Three
// layouts of W, all written by pack.cpp:
//   pairs   rows in twos, matched anew for every block of columns so that many columns are kept by
//           both: those are loaded once for two rows. For masks that are free per row.
//   shared  R rows with one column list: every column is loaded once for R rows.
//   wide    shared by 16 rows or more, bfloat16: see wide.h.
#include <algorithm>
#include <new>
#include <vector>

#include "act.h"
#include "format.h"
#include "vec.h"
#include "wide.h"

namespace {

// Mirrored by abi.py: change them together.
struct Call {
  const uint8_t* weight;
  const void* x;
  void* out;
  const void* bias;
  int32_t x_type, bias_type, act, conv;  // conv: 0 row-major tokens, 1 NCHW planes, 2 NHWC rows
  int64_t tokens, x_stride, out_stride;
  int64_t images, channels, height, width, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
  int32_t tile, threads, isa;
};

constexpr int MAX_PAIRS_TILE = VEC_REGISTERS == 32 ? 8 : 6;
constexpr int MAX_SHARED_TILE = VEC_REGISTERS == 32 ? 6 : 3;

template <int T>
constexpr int lanes() {
  return T * L;
}

// ---------------------------------------------------------------- micro kernels

template <int T, class W>
void run_pairs(const float* x, float* c, const W* w, const uint8_t* index, const uint16_t* rows,
               const uint8_t* common, int pairs, int kept, bool first) {
  constexpr int S = lanes<T>();
  for (int p = 0; p < pairs; p++) {
    float* ca = c + (int64_t)rows[2 * p] * S;
    float* cb = c + (int64_t)rows[2 * p + 1] * S;
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

template <int R, int T, class W>
void run_shared(const float* x, float* c, const W* w, const uint16_t* index, int units, int kept,
                bool first) {
  constexpr int S = lanes<T>();
  for (int u = 0; u < units; u++, c += R * S) {
    vf a[R][T];
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) a[r][t] = first ? vf{} : load<vf>(c + r * S + t * L);
    for (int i = 0; i < kept; i++, w += R) {
      const float* q = x + (int64_t)index[i] * S;
      vf wide[R];
      for (int r = 0; r < R; r++) wide[r] = splat(widen(w[r]));
      for (int t = 0; t < T; t++) {
        const vf v = in_register(load<vf>(q + t * L));
        for (int r = 0; r < R; r++) a[r][t] += wide[r] * v;
      }
    }
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) store(c + r * S + t * L, a[r][t]);
  }
}

// ---------------------------------------------------------------- tiles of x

// A run of output pixels that lie side by side in the padded input and in the output.
struct Run {
  int lane, size;
  int64_t in, out;
};

struct Tile {
  int64_t first;  // token
  int vectors;
  std::vector<Run> runs;  // planes
  bool whole;             // each run is a vector
};

struct Work {
  const Call& call;
  const Header& h;
  const float* planes;  // padded input of a conv on planes
  int64_t plane_h, plane_w;
};

template <class X>
inline const X* pixel(const Call& c, int64_t token, int64_t i, int64_t j) {
  const int64_t pixels = c.out_height * c.out_width;
  const int64_t image = token / pixels, y = token % pixels / c.out_width, z = token % c.out_width;
  const int64_t row = y * c.stride_h - c.pad_h + i * c.dil_h;
  const int64_t col = z * c.stride_w - c.pad_w + j * c.dil_w;
  if (row < 0 || row >= c.height || col < 0 || col >= c.width) return nullptr;
  return (const X*)c.x + ((image * c.height + row) * c.width + col) * c.channels;
}

// Columns [k0, k1) of the tile from rows in memory; columns of one tap lie side by side.
template <class X>
void pack_rows(const Work& work, const Tile& tile, int64_t k0, int64_t k1, float* dst) {
  const Call& c = work.call;
  const int64_t stride = tile.vectors * L, per_tap = c.conv ? c.channels : work.h.cols;
  for (int64_t k = k0; k < k1;) {
    const int64_t tap = k / per_tap, from = k % per_tap;
    const int64_t size = std::min(per_tap - from, k1 - k);
    for (int t = 0; t < tile.vectors; t++) {
      const X* rows[L];
      for (int l = 0; l < L; l++) {
        const int64_t token = tile.first + t * L + l;
        rows[l] = token >= c.tokens ? nullptr
                  : c.conv          ? pixel<X>(c, token, tap / c.kernel_w, tap % c.kernel_w)
                                    : (const X*)c.x + token * c.x_stride;
        if (rows[l]) rows[l] += from;
      }
      float* to = dst + (k - k0) * stride + t * L;
      int64_t j = 0;
      for (; j + L <= size; j += L) {
        vf block[L];
        for (int l = 0; l < L; l++) block[l] = rows[l] ? load_wide(rows[l] + j) : vf{};
        transpose(block);
        for (int l = 0; l < L; l++) store(to + (j + l) * stride, block[l]);
      }
      for (; j < size; j++)
        for (int l = 0; l < L; l++) to[j * stride + l] = rows[l] ? widen(rows[l][j]) : 0.0f;
    }
    k += size;
  }
}

template <int N>
inline void copy(float* to, const float* from) {
  std::memcpy(to, from, N * sizeof(float));
}

void pack_planes(const Work& work, const Tile& tile, int64_t k0, int64_t k1, float* dst) {
  const Call& c = work.call;
  const int64_t stride = tile.vectors * L;
  for (int64_t k = k0; k < k1; k++, dst += stride) {
    const int64_t tap = k / c.channels, i = tap / c.kernel_w, j = tap % c.kernel_w;
    const float* src = work.planes + (k % c.channels) * work.plane_h * work.plane_w +
                       i * c.dil_h * work.plane_w + j * c.dil_w;
    if (tile.whole) {
      for (int t = 0; t < tile.vectors; t++)
        store(dst + t * L, load<vf>(src + tile.runs[t].in));
      continue;
    }
    for (const Run& run : tile.runs) {
      const float* from = src + run.in;
      float* to = dst + run.lane;
      if (c.stride_w != 1) {
        for (int l = 0; l < run.size; l++) to[l] = from[l * c.stride_w];
      } else if (run.size == 16) {
        copy<16>(to, from);
      } else if (run.size == 8) {
        copy<8>(to, from);
      } else if (run.size == 4) {
        copy<4>(to, from);
      } else {
        for (int l = 0; l < run.size; l++) to[l] = from[l];
      }
    }
  }
}

// The runs of a tile; each lies within one row of pixels and one vector of at most 16 lanes.
void find_runs(const Work& work, Tile& tile) {
  const Call& c = work.call;
  const int64_t pixels = c.out_height * c.out_width;
  const int64_t end = std::min<int64_t>(c.tokens, tile.first + tile.vectors * L);
  for (int64_t token = tile.first; token < end;) {
    const int lane = (int)(token - tile.first);
    const int64_t image = token / pixels, pixel = token % pixels;
    const int64_t y = pixel / c.out_width, z = pixel % c.out_width;
    const int64_t size = std::min({c.out_width - z, end - token, (int64_t)(L - lane % L)});
    const int64_t in = image * c.channels * work.plane_h * work.plane_w +
                       y * c.stride_h * work.plane_w + z * c.stride_w;
    tile.runs.push_back({lane, (int)size, in, image * work.h.rows * pixels + pixel});
    token += size;
  }
  tile.whole = c.stride_w == 1 && (int)tile.runs.size() == tile.vectors && end % L == 0;
}

// ---------------------------------------------------------------- tiles of y

// Where the accumulators of output row ``row`` of a block lie: groups are padded to whole units.
inline int64_t tile_row(const Header& h, int64_t row) {
  return h.share ? row / h.share * h.group + row % h.share : row;
}

inline float bias_of(const Call& c, int64_t row) {
  if (!c.bias) return 0.0f;
  return c.bias_type == BF16 ? widen(((const bf16*)c.bias)[row]) : ((const float*)c.bias)[row];
}

template <class Y>
void unpack_rows(const Work& work, const Tile& tile, const float* acc, int64_t row0, int64_t size) {
  const Call& c = work.call;
  const int64_t stride = tile.vectors * L;
  for (int64_t r = 0; r < size; r += L) {
    const int count = (int)std::min<int64_t>(L, size - r);
    vf bias[L];
    const float* from[L];
    for (int l = 0; l < L; l++) {
      bias[l] = splat(l < count ? bias_of(c, row0 + r + l) : 0.0f);
      from[l] = acc + tile_row(work.h, r + std::min(l, count - 1)) * stride;
    }
    for (int t = 0; t < tile.vectors; t++) {
      vf block[L];
      for (int l = 0; l < L; l++) block[l] = act_v(load<vf>(from[l] + t * L) + bias[l], (Act)c.act);
      transpose(block);
      const int64_t token0 = tile.first + t * L;
      for (int l = 0; l < L && token0 + l < c.tokens; l++) {
        Y* to = (Y*)c.out + (token0 + l) * c.out_stride + row0 + r;
        if (count == L) {
          store_as(to, block[l]);
        } else {
          for (int i = 0; i < count; i++) put(to + i, block[l][i]);
        }
      }
    }
  }
}

template <class Y>
void unpack_planes(const Work& work, const Tile& tile, const float* acc, int64_t row0,
                   int64_t size) {
  const Call& c = work.call;
  const int64_t pixels = c.out_height * c.out_width;
  for (int64_t r = 0; r < size; r++) {
    const float* from = acc + tile_row(work.h, r) * tile.vectors * L;
    const vf bias = splat(bias_of(c, row0 + r));
    for (const Run& run : tile.runs) {
      Y* to = (Y*)c.out + run.out + (row0 + r) * pixels;
      const int start = run.lane / L * L;  // a run lies within one vector
      const vf v = act_v(load<vf>(from + start) + bias, (Act)c.act);
      if (run.size == L) {
        store_as(to, v);
      } else {
        for (int l = 0; l < run.size; l++) put(to + l, v[run.lane - start + l]);
      }
    }
  }
}

// ---------------------------------------------------------------- one piece of work

struct Scratch {
  float* data = nullptr;
  size_t size = 0;
  float* need(size_t floats) {
    if (floats > size) {
      ::operator delete[](data, std::align_val_t(64));
      data = nullptr;  // what follows may throw
      size = 0;
      data = (float*)::operator new[](floats * sizeof(float), std::align_val_t(64));
      size = floats;
    }
    return data;
  }
  ~Scratch() { ::operator delete[](data, std::align_val_t(64)); }
};

int64_t padded_rows(const Header& h, int64_t rows) {
  if (h.share) return (rows + h.share - 1) / h.share * h.group;
  return rows + 1;  // an odd last row is paired with one nobody reads
}

void pack(const Work& work, const Tile& tile, int64_t k0, int64_t k1, float* dst) {
  if (work.call.conv == 1) return pack_planes(work, tile, k0, k1, dst);
  if (work.call.x_type == BF16) return pack_rows<bf16>(work, tile, k0, k1, dst);
  pack_rows<float>(work, tile, k0, k1, dst);
}

void unpack(const Work& work, const Tile& tile, const float* acc, int64_t row0, int64_t size) {
  const bool planes = work.call.conv == 1, wide = work.call.x_type == F32;
  if (planes && wide) return unpack_planes<float>(work, tile, acc, row0, size);
  if (planes) return unpack_planes<bf16>(work, tile, acc, row0, size);
  if (wide) return unpack_rows<float>(work, tile, acc, row0, size);
  unpack_rows<bf16>(work, tile, acc, row0, size);
}

// Values of a group of rows in the wide layout before column k, padded block by block.
int64_t wide_values(const Header& h, int64_t k) {
  const int per_block = blocks_of((int)((int64_t)h.col_block * h.n / h.m));
  const int rest = blocks_of((int)((k % h.col_block) * h.n / h.m));
  return (k / h.col_block * per_block + rest) * DEPTH * h.group;
}

template <int T>
void multiply_wide(const Work& work, const float* x, float* acc, int64_t row0, int64_t size,
                   int64_t k0, int64_t k1) {
  thread_local Scratch panel_scratch;
  const Header& h = work.h;
  const int64_t before = k0 * h.n / h.m, all = (int64_t)h.cols * h.n / h.m;
  const int kept = (int)((k1 - k0) * h.n / h.m);
  uint32_t* panel = (uint32_t*)panel_scratch.need((size_t)blocks_of(kept) * PAIRS * lanes<T>());
  const int64_t group0 = row0 / h.share, groups = (size + h.share - 1) / h.share;
  for (int64_t g = 0; g < groups; g++) {
    const uint16_t* index =
        (const uint16_t*)(work.call.weight + h.index) + (group0 + g) * all + before;
    const bf16* w = (const bf16*)(work.call.weight + h.values) +
                    (group0 + g) * wide_values(h, h.cols) + wide_values(h, k0);
    run_wide<T>(x, acc + g * h.group * lanes<T>(), w, index, h.group / UNIT, kept, k0 == 0,
                (Isa)work.call.isa, panel);
  }
}

// Rows [row0, row0 + size) += columns [k0, k1) of W times the tile's.
template <int T, class W>
void multiply(const Work& work, const float* x, float* acc, int64_t row0, int64_t size, int64_t k0,
              int64_t k1) {
  const Header& h = work.h;
  const uint8_t* blob = work.call.weight;
  const int64_t density_cols = (int64_t)h.cols * h.n / h.m;
  const int64_t before = k0 * h.n / h.m;
  const int kept = (int)((k1 - k0) * h.n / h.m);
  const W* values = (const W*)(blob + h.values);
  const bool first = k0 == 0;
  if (!h.share) {
    const int pairs = (int)((size + 1) / 2);
    const int64_t blocks = (h.cols + h.col_block - 1) / h.col_block;
    const int64_t at = row0 * density_cols + 2 * pairs * before;  // row blocks are even
    const int64_t unit = row0 / 2 * blocks + k0 / h.col_block * pairs;
    run_pairs<T, W>(x, acc, values + at, blob + h.index + at,
                    (const uint16_t*)(blob + h.units) + 2 * unit, blob + h.common + unit, pairs,
                    kept, first);
    return;
  }
  if constexpr (T <= MAX_SHARED_TILE && sizeof(W) == sizeof(bf16)) {
    if (h.wide) return multiply_wide<T>(work, x, acc, row0, size, k0, k1);
  }
  if constexpr (T <= MAX_SHARED_TILE) {
    const int64_t group0 = row0 / h.share, groups = (size + h.share - 1) / h.share;
    const int units = h.group / h.layout;
    for (int64_t g = 0; g < groups; g++) {
      const uint16_t* index = (const uint16_t*)(blob + h.index) + (group0 + g) * density_cols + before;
      const W* w = values + (group0 + g) * h.group * density_cols + before * h.group;
      float* c = acc + g * h.group * lanes<T>();
      if (h.layout == 4) run_shared<4, T, W>(x, c, w, index, units, kept, first);
      if (h.layout == 3) run_shared<3, T, W>(x, c, w, index, units, kept, first);
      if (h.layout == 2) run_shared<2, T, W>(x, c, w, index, units, kept, first);
    }
  }
}

using Multiply = void (*)(const Work&, const float*, float*, int64_t, int64_t, int64_t, int64_t);

template <class W>
Multiply multiply_of(int vectors) {
  static const Multiply table[] = {nullptr,        multiply<1, W>, multiply<2, W>, multiply<3, W>,
                                   multiply<4, W>, multiply<5, W>, multiply<6, W>, multiply<7, W>,
                                   multiply<8, W>};
  return table[vectors];
}

// Output rows [row0, row1) of one tile.
void run_item(const Work& work, const Tile& tile, int64_t row0, int64_t row1) {
  thread_local Scratch x_scratch, acc_scratch;
  const Header& h = work.h;
  const int64_t stride = tile.vectors * L;
  const bool pack_once = row1 - row0 > h.row_block;
  float* x = x_scratch.need((pack_once ? h.cols : h.col_block) * stride);
  float* acc = acc_scratch.need(padded_rows(h, std::min<int64_t>(h.row_block, h.rows)) * stride);
  const Multiply mul = h.type == BF16 ? multiply_of<bf16>(tile.vectors) : multiply_of<float>(tile.vectors);
  if (pack_once) pack(work, tile, 0, h.cols, x);
  for (int64_t row = row0; row < row1; row += h.row_block) {
    const int64_t size = std::min<int64_t>(h.row_block, row1 - row);
    for (int64_t k0 = 0; k0 < h.cols; k0 += h.col_block) {
      const int64_t k1 = std::min<int64_t>(h.cols, k0 + h.col_block);
      if (!pack_once) pack(work, tile, k0, k1, x);
      mul(work, pack_once ? x + k0 * stride : x, acc, row, size, k0, k1);
    }
    unpack(work, tile, acc, row, size);
  }
}

// Copy of x with its zero padding, as fp32: [images, channels, plane_h, plane_w].
template <class X>
void pad_planes(const Call& c, float* dst, int64_t plane_h, int64_t plane_w, int64_t index) {
  const X* src = (const X*)c.x + index * c.height * c.width;
  dst += index * plane_h * plane_w;
  std::fill(dst, dst + plane_h * plane_w, 0.0f);
  for (int64_t y = 0; y < c.height; y++) {
    float* to = dst + (y + c.pad_h) * plane_w + c.pad_w;
    for (int64_t z = 0; z < c.width; z++) to[z] = widen(src[y * c.width + z]);
  }
}

template <class F>
void parallel(int64_t count, int threads, F body) {
  (void)threads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && count > 1)
  for (int64_t i = 0; i < count; i++) body(i);
}

}  // namespace

extern "C" {

const char* sdm_isa() { return ISA_NAME; }

// 0, 1 if memory ran out, 2 for fp32 activations beside a weight packed for bfloat16.
int32_t sdm_run(const Call* call) try {
  const Call& c = *call;
  const Header& h = *(const Header*)c.weight;
  if (h.wide && c.x_type != BF16) return 2;
  if (c.tokens == 0 || h.rows == 0) return 0;
  const int threads = std::max(1, c.threads);
  Work work{c, h, nullptr, c.height + 2 * c.pad_h, c.width + 2 * c.pad_w};
  std::vector<float> padded;
  if (c.conv == 1) {
    if (c.x_type == F32 && c.pad_h == 0 && c.pad_w == 0) {
      work.planes = (const float*)c.x;
    } else {
      const int64_t planes = c.images * c.channels;
      padded.resize(planes * work.plane_h * work.plane_w);
      work.planes = padded.data();
      parallel(planes, threads, [&](int64_t i) {
        if (c.x_type == BF16) return pad_planes<bf16>(c, padded.data(), work.plane_h, work.plane_w, i);
        pad_planes<float>(c, padded.data(), work.plane_h, work.plane_w, i);
      });
    }
  }
  const int64_t vectors = (c.tokens + L - 1) / L;
  const int limit = std::max(1, std::min(c.tile, h.share ? MAX_SHARED_TILE : MAX_PAIRS_TILE));
  const int64_t tiles = (vectors + limit - 1) / limit;
  const int64_t row_blocks = (h.rows + h.row_block - 1) / h.row_block;
  // Split rows too, where tiles alone do not keep all threads busy; each part packs x again.
  int64_t parts = 1;
  auto waste = [&](int64_t p) {
    const int64_t items = tiles * p;
    return (double)((items + threads - 1) / threads * threads) / (double)items;
  };
  for (int64_t p = 2; p <= row_blocks; p++)
    if (waste(p) < 0.9 * waste(parts)) parts = p;
  std::vector<Tile> all(tiles);
  for (int64_t i = 0; i < tiles; i++) {
    const int64_t from = vectors * i / tiles, to = vectors * (i + 1) / tiles;
    all[i].first = from * L;
    all[i].vectors = (int)(to - from);
    if (c.conv == 1) find_runs(work, all[i]);
  }
  int failed = 0;
  parallel(tiles * parts, threads, [&](int64_t item) {
    try {
      const int64_t part = item % parts;
      const int64_t from = row_blocks * part / parts, to = row_blocks * (part + 1) / parts;
      run_item(work, all[item / parts], from * h.row_block,
               std::min<int64_t>(h.rows, to * h.row_block));
    } catch (const std::bad_alloc&) {
      failed = 1;
    }
  });
  return failed;
} catch (const std::bad_alloc&) {
  return 1;
}
}
