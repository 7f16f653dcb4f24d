// Tiles of x and y: a few vectors of tokens (output pixels), feature-major, and how they are filled
// from tensors and written to them.
#pragma once
#include <algorithm>
#include <vector>

#include "act.h"
#include "format.h"
#include "vec.h"

// How x and y lie in memory. MIXED: x as the planes of a 1x1 conv, y as rows.
enum Form : int32_t { ROWS = 0, PLANES = 1, NHWC = 2, MIXED = 3 };

// Mirrored by abi.py: change them together.
struct Call {
  const uint8_t* weight;
  const void* x;
  void* out;
  const void* bias;
  int32_t x_type, bias_type, act, form;
  int64_t tokens, x_stride, out_stride;
  int64_t images, channels, height, width, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
  int32_t tile, threads, isa;
  int64_t cache;  // bytes of the second-level cache; 0: as this CPU states it
  // A GroupNorm(x + offset) and an activation in front of a conv on planes; no groups: neither.
  const float *offset, *norm_weight, *norm_bias;
  int64_t groups, offset_stride;  // offset: [images or 1, channels], stride 0 for 1
  double epsilon;
  int32_t pre_act;
};

inline bool reads_planes(const Call& c) { return c.form == PLANES || c.form == MIXED; }

// A run of output pixels that lie side by side in the padded input and in the output.
struct Run {
  int lane, size;
  int64_t in, out;
};

// Whether a conv takes x from where it lies, with zeros for what is outside an image. No vector of output
// pixels spans two rows then, and its pixels lie side by side in x.
inline bool reads_in_place(const Call& c) {
  return c.form == PLANES && c.stride_w == 1 && c.out_width % L == 0 && (c.pad_h > 0 || c.pad_w > 0);
}

// Where the kernel lies over the input for an output pixel: the first row and column, before padding.
struct Place {
  int64_t image, row, col;
};

struct Tile {
  int64_t first;  // token
  int vectors;
  std::vector<Run> runs;      // planes
  bool whole;                 // each run is a vector
  std::vector<Place> places;  // of every token of NHWC rows, of every vector of planes read in place
};

struct Work {
  const Call& call;
  const Header& h;
  // The input of a conv on planes as fp32, padded where it is not read in place; null: x itself is.
  const float* planes;
  int64_t plane_h, plane_w;
};

// The channels under tap (i, j) of a place; null in the padding.
template <class X>
inline const X* pixel(const Call& c, const Place& place, int64_t i, int64_t j) {
  const int64_t row = place.row + i * c.dil_h, col = place.col + j * c.dil_w;
  if (row < 0 || row >= c.height || col < 0 || col >= c.width) return nullptr;
  return (const X*)c.x + ((place.image * c.height + row) * c.width + col) * c.channels;
}

inline void find_places(const Call& c, Tile& tile) {
  const int64_t pixels = c.out_height * c.out_width;
  const int64_t end = std::min<int64_t>(c.tokens, tile.first + tile.vectors * L);
  const int64_t step = c.form == NHWC ? 1 : L;
  for (int64_t token = tile.first; token < end; token += step) {
    const int64_t y = token % pixels / c.out_width, z = token % c.out_width;
    tile.places.push_back({token / pixels, y * c.stride_h - c.pad_h, z * c.stride_w - c.pad_w});
  }
}

// Columns [k0, k1) of the tile from rows in memory; columns of one tap lie side by side.
template <class X>
void pack_rows(const Work& work, const Tile& tile, int64_t k0, int64_t k1, float* dst) {
  const Call& c = work.call;
  const bool images = c.form == NHWC;
  const int64_t stride = tile.vectors * L, per_tap = images ? c.channels : work.h.cols;
  for (int64_t k = k0; k < k1;) {
    const int64_t tap = k / per_tap, from = k % per_tap;
    const int64_t size = std::min(per_tap - from, k1 - k);
    const int64_t i = images ? tap / c.kernel_w : 0, j = images ? tap % c.kernel_w : 0;
    for (int t = 0; t < tile.vectors; t++) {
      const X* rows[L];
      for (int l = 0; l < L; l++) {
        const int64_t token = tile.first + t * L + l;
        rows[l] = token >= c.tokens ? nullptr
                  : images          ? pixel<X>(c, tile.places[t * L + l], i, j)
                                    : (const X*)c.x + token * c.x_stride;
        if (rows[l]) rows[l] += from;
      }
      float* to = dst + (k - k0) * stride + t * L;
      const bool whole = std::find(rows, rows + L, nullptr) == rows + L;
      int64_t s = 0;
      for (; s + L <= size; s += L) {
        vf block[L];
        for (int l = 0; l < L; l++)
          block[l] = whole || rows[l] ? load_wide(rows[l] + s) : vf{};
        transpose(block);
        for (int l = 0; l < L; l++) store(to + (s + l) * stride, block[l]);
      }
      for (; s < size; s++)
        for (int l = 0; l < L; l++) to[s * stride + l] = rows[l] ? widen(rows[l][s]) : 0.0f;
    }
    k += size;
  }
}

template <int N>
inline void copy(float* to, const float* from) {
  std::memcpy(to, from, N * sizeof(float));
}

// ``count`` planes of one tap, a whole vector for each run.
template <int T>
void copy_vectors(const Tile& tile, const float* src, int64_t plane, int64_t count, float* dst) {
  int64_t in[T];
  for (int t = 0; t < T; t++) in[t] = tile.runs[t].in;
  for (int64_t k = 0; k < count; k++, src += plane, dst += T * L) {
    for (int t = 0; t < T; t++) store(dst + t * L, load<vf>(src + in[t]));
  }
}

using CopyVectors = void (*)(const Tile&, const float*, int64_t, int64_t, float*);
constexpr CopyVectors COPY_VECTORS[] = {
    nullptr,          copy_vectors<1>, copy_vectors<2>,  copy_vectors<3>,  copy_vectors<4>,
    copy_vectors<5>,  copy_vectors<6>, copy_vectors<7>,  copy_vectors<8>,  copy_vectors<9>,
    copy_vectors<10>, copy_vectors<11>, copy_vectors<12>};

// ``count`` channels from ``channel`` on under tap (i, j) of a tile that is read in place.
template <int T, class X>
void copy_inside(const Work& work, const X* x, const Tile& tile, int64_t i, int64_t j, int64_t channel,
                 int64_t count, float* dst) {
  const Call& c = work.call;
  const int64_t plane = c.height * c.width, size = c.images * c.channels * plane;
  vi lane;
  for (int l = 0; l < L; l++) lane[l] = l;
  int64_t in[T];
  vi inside[T];
  for (int t = 0; t < T; t++) {
    const Place& place = tile.places[t];
    const int64_t row = place.row + i * c.dil_h, col = place.col + j * c.dil_w;
    const bool real = row >= 0 && row < c.height;
    in[t] = (place.image * c.channels + channel) * plane + (real ? row * c.width + col : 0);
    const vi at = lane + (int32_t)col;
    inside[t] = real ? (vi)(at >= 0) & (vi)(at < (int32_t)c.width) : vi{};
  }
  int64_t least = *std::min_element(in, in + T), end = *std::max_element(in, in + T) + L;
  for (int64_t k = 0; k < count; k++, x += plane, dst += T * L, least += plane, end += plane) {
    if (least >= 0 && end <= size) {
      for (int t = 0; t < T; t++) store(dst + t * L, (vf)((vi)load_wide(x + in[t]) & inside[t]));
      continue;
    }
    for (int t = 0; t < T; t++)  // a vector would reach beyond x
      for (int l = 0; l < L; l++) dst[t * L + l] = inside[t][l] ? widen(x[in[t] + l]) : 0.0f;
  }
}

template <class X>
using CopyInside = void (*)(const Work&, const X*, const Tile&, int64_t, int64_t, int64_t, int64_t, float*);
template <class X>
constexpr CopyInside<X> COPY_INSIDE[] = {
    nullptr,           copy_inside<1, X>, copy_inside<2, X>,  copy_inside<3, X>,  copy_inside<4, X>,
    copy_inside<5, X>, copy_inside<6, X>, copy_inside<7, X>,  copy_inside<8, X>,  copy_inside<9, X>,
    copy_inside<10, X>, copy_inside<11, X>, copy_inside<12, X>};

template <class X>
void pack_inside(const Work& work, const X* x, const Tile& tile, int64_t k0, int64_t k1, float* dst) {
  const Call& c = work.call;
  for (int64_t k = k0; k < k1;) {
    const int64_t tap = k / c.channels, channel = k % c.channels;
    const int64_t count = std::min(c.channels - channel, k1 - k);
    COPY_INSIDE<X>[tile.vectors](work, x, tile, tap / c.kernel_w, tap % c.kernel_w, channel, count, dst);
    k += count;
    dst += count * tile.vectors * L;
  }
}

inline void copy_runs(const Tile& tile, const float* src, int64_t stride, float* dst) {
  for (const Run& run : tile.runs) {
    const float* from = src + run.in;
    float* to = dst + run.lane;
    if (stride != 1) {
      for (int l = 0; l < run.size; l++) to[l] = from[l * stride];
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

inline void pack_planes(const Work& work, const Tile& tile, int64_t k0, int64_t k1, float* dst) {
  const Call& c = work.call;
  const int64_t stride = tile.vectors * L, plane = work.plane_h * work.plane_w;
  for (int64_t k = k0; k < k1;) {
    const int64_t tap = k / c.channels, channel = k % c.channels;
    const int64_t count = std::min(c.channels - channel, k1 - k);
    const float* src = work.planes + channel * plane +
                       tap / c.kernel_w * c.dil_h * work.plane_w + tap % c.kernel_w * c.dil_w;
    if (tile.whole) {
      COPY_VECTORS[tile.vectors](tile, src, plane, count, dst);
    } else {
      for (int64_t i = 0; i < count; i++) copy_runs(tile, src + i * plane, c.stride_w, dst + i * stride);
    }
    k += count;
    dst += count * stride;
  }
}

// The runs of a tile; each lies within one row of pixels and one vector of at most 16 lanes.
inline void find_runs(const Work& work, Tile& tile) {
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

// Where a tile of a conv lies in x and in y.
inline void locate(const Work& work, Tile& tile) {
  if (reads_planes(work.call)) find_runs(work, tile);
  if (work.call.form == NHWC || reads_in_place(work.call)) find_places(work.call, tile);
}

// ---------------------------------------------------------------- tiles of y

// Where the accumulators of output row ``row`` of a block lie: groups are padded to whole units.
inline bool is_straight(const Header& h) { return !h.share || h.share == h.group; }
inline int64_t tile_row(const Header& h, int64_t row) {
  return is_straight(h) ? row : row / h.share * h.group + row % h.share;
}

inline float bias_of(const Call& c, int64_t row) {
  if (!c.bias) return 0.0f;
  return c.bias_type == BF16 ? widen(((const bf16*)c.bias)[row]) : ((const float*)c.bias)[row];
}

// The biases of up to L rows.
inline vf biases_of(const Call& c, int64_t row, int count) {
  vf bias{};
  if (!c.bias) return bias;
  if (count == L)
    return c.bias_type == BF16 ? load_wide((const bf16*)c.bias + row) : load_wide((const float*)c.bias + row);
  for (int l = 0; l < count; l++) bias[l] = bias_of(c, row + l);
  return bias;
}

// A vector of tokens at a time, so that few lines and pages of the output are open at once.
template <class Y, Act A>
void unpack_rows(const Work& work, const Tile& tile, const float* acc, int64_t row0, int64_t size) {
  const Call& c = work.call;
  const int64_t stride = tile.vectors * L, out_stride = c.out_stride;
  const bool straight = is_straight(work.h);
  for (int t = 0; t < tile.vectors; t++) {
    const int64_t token0 = tile.first + t * L;
    const int tokens = (int)std::min<int64_t>(L, c.tokens - token0);
    Y* to = (Y*)c.out + token0 * out_stride + row0;
    for (int64_t r = 0; r < size; r += L, to += L) {
      const int count = (int)std::min<int64_t>(L, size - r);
      const vf bias = biases_of(c, row0 + r, count);
      vf block[L];
      if (straight && tokens == L && count == L) {
        const float* from = acc + r * stride + t * L;
        for (int l = 0; l < L; l++) block[l] = load<vf>(from + l * stride);
        transpose(block);
        for (int l = 0; l < L; l++) store_as(to + l * out_stride, act_v<A>(block[l] + bias));
        continue;
      }
      for (int l = 0; l < L; l++)
        block[l] = load<vf>(acc + tile_row(work.h, r + std::min(l, count - 1)) * stride + t * L);
      transpose(block);
      for (int l = 0; l < tokens; l++) {
        const vf y = act_v<A>(block[l] + bias);
        for (int i = 0; i < count; i++) put(to + l * out_stride + i, y[i]);
      }
    }
  }
}

template <class Y, Act A>
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
      const vf v = act_v<A>(load<vf>(from + start) + bias);
      if (run.size == L) {
        store_as(to, v);
      } else {
        for (int l = 0; l < run.size; l++) put(to + l, v[run.lane - start + l]);
      }
    }
  }
}

inline void pack(const Work& work, const Tile& tile, int64_t k0, int64_t k1, float* dst) {
  const Call& c = work.call;
  if (reads_in_place(c)) {
    if (work.planes) return pack_inside(work, work.planes, tile, k0, k1, dst);
    if (c.x_type == BF16) return pack_inside(work, (const bf16*)c.x, tile, k0, k1, dst);
    return pack_inside(work, (const float*)c.x, tile, k0, k1, dst);
  }
  if (reads_planes(c)) return pack_planes(work, tile, k0, k1, dst);
  if (c.x_type == BF16) return pack_rows<bf16>(work, tile, k0, k1, dst);
  pack_rows<float>(work, tile, k0, k1, dst);
}

template <class Y, Act A>
void unpack_as(const Work& work, const Tile& tile, const float* acc, int64_t row0, int64_t size) {
  if (work.call.form == PLANES) return unpack_planes<Y, A>(work, tile, acc, row0, size);
  unpack_rows<Y, A>(work, tile, acc, row0, size);
}

template <class Y>
void unpack(const Work& work, const Tile& tile, const float* acc, int64_t row0, int64_t size) {
  choose_act(work.call.act, [&](auto act) { unpack_as<Y, act()>(work, tile, acc, row0, size); });
}
